//! Defaults that people set once: files, environment, and which of them counts.
//!
//! From the weakest to the strongest: what the program was built with, `/etc/snapback/config.toml`,
//! `~/.config/snapback/config.toml`, variables `SNAPBACK_…`, arguments. A value from anywhere but the
//! arguments becomes the default of the arguments of that name, so that it is read by the same rules
//! and shown by `--help`.

use std::collections::BTreeMap;
use std::env;
use std::ffi::OsString;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use clap::{Arg, Command};

use super::failure::Failure;
use crate::kind::ErrorKind;

/// What all users of a host have in common.
const SYSTEM: &str = "/etc/snapback/config.toml";

/// A setting.
pub(super) struct Setting {
    /// Its name in files; in upper case, behind `SNAPBACK_`, that of its variable.
    pub key: &'static str,
    /// The id of the arguments whose default it is, wherever a command has one.
    argument: &'static str,
    /// Commands to which that argument says what they are to do, and not only where: they have it from
    /// nowhere else.
    not_of: &'static [&'static str],
    /// What it does.
    pub about: &'static str,
}

/// All settings.
pub(super) const SETTINGS: &[Setting] = &[
    setting(
        "allow_plain",
        "allow_plain",
        "whether a repository that is not encrypted is opened though a key is given",
    ),
    setting("cache", "cache", "the directory that keeps what is fetched from repositories"),
    setting("cache_size", "cache_size", "how much is kept there at most, in bytes"),
    setting("color", "color", "whether words are coloured: auto, always, never"),
    setting("compress", "compress", "how memory is stored: none, zstd, zstd:LEVEL"),
    setting("connect", "connect", "the libvirt to connect to, by its URI"),
    setting("fill_rate", "fill_rate", "how fast a revert fills memory at most, in bytes a second"),
    setting("overlay_dir", "overlay_dir", "the directory of disks' overlays"),
    setting("place", "place", "how memory reaches a guest: auto, uffd, socket, map, eager"),
    setting("quiet", "quiet", "whether only results, warnings and errors are printed"),
    Setting {
        not_of: &["check", "revert", "save"],
        ..setting("repository", "repo", "the repository, by its address")
    },
    setting("sign_key", "sign_key", "the private key that signs snapshots, a file"),
    setting("socket", "socket", "the daemon's socket"),
    setting("trust", "trust", "fingerprints of the only repositories that are opened, by commas"),
    setting(
        "trust_key",
        "trust_key",
        "the public keys of the only snapshots that are read, a file",
    ),
];

const fn setting(key: &'static str, argument: &'static str, about: &'static str) -> Setting {
    Setting { key, argument, not_of: &[], about }
}

impl Setting {
    fn variable(&self) -> String {
        format!("SNAPBACK_{}", self.key.to_uppercase())
    }

    /// Arguments whose default it is, of a command and those below it.
    fn arguments<'a>(&self, command: &'a Command) -> Vec<&'a Arg> {
        let own = command.get_arguments().filter(|arg| arg.get_id() == self.argument);
        let below = command.get_subcommands().flat_map(|below| self.arguments(below));
        own.chain(below).collect()
    }
}

/// Where a value comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Origin {
    File(PathBuf),
    Variable(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::File(path) => write!(f, "{}", path.display()),
            Origin::Variable(name) => write!(f, "${name}"),
        }
    }
}

/// The settings that are made, by name, with where each comes from.
#[derive(Debug, Default)]
pub(super) struct Settings {
    values: BTreeMap<&'static str, (String, Origin)>,
}

/// The files of settings, the weakest first.
pub(super) fn files() -> Vec<PathBuf> {
    let home = || Some(PathBuf::from(env::var_os("HOME")?).join(".config"));
    let own = env::var_os("XDG_CONFIG_HOME").map(PathBuf::from);
    let own = own.filter(|path| path.is_absolute()).or_else(home);
    let own = own.map(|directory| directory.join("snapback/config.toml"));
    [Some(PathBuf::from(SYSTEM)), own].into_iter().flatten().collect()
}

impl Settings {
    /// Reads the files and the environment. What a keeper has started must not fail for what was
    /// written to them since: it goes on with a guest and has been told all, or cleans up.
    pub fn of_host(arguments: &[OsString]) -> Result<Settings, Failure> {
        let is = |word: &str| arguments.iter().any(|argument| argument == word);
        let read = || Settings::read(&files(), |name| env::var_os(name));
        match () {
            _ if is("--inherited") || is("broker") => Ok(Settings::default()),
            _ if is("--recover") => Ok(read().unwrap_or_default()),
            _ => read(),
        }
    }

    fn read(
        files: &[PathBuf],
        variable: impl Fn(&str) -> Option<OsString>,
    ) -> Result<Settings, Failure> {
        let mut settings = Settings::default();
        for path in files {
            let text = match std::fs::read_to_string(path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                // In a home that is not ours, such as root's with `sudo -u`, nobody can tell whether
                // it is there.
                Err(error)
                    if error.kind() == io::ErrorKind::PermissionDenied
                        && path.metadata().is_err() =>
                {
                    continue;
                }
                read => read.map_err(|error| wrong(path.display(), &error))?,
            };
            settings.add_file(path, &text)?;
        }
        for setting in SETTINGS {
            let name = setting.variable();
            // An empty one is as good as none, as it is for other programs.
            let Some(value) = variable(&name).filter(|value| !value.is_empty()) else { continue };
            let value =
                value.into_string().map_err(|_| wrong(format!("${name}"), &"is no text"))?;
            settings.values.insert(setting.key, (value, Origin::Variable(name)));
        }
        // To make the table takes longer than all else that a short command does.
        if !settings.values.is_empty() {
            settings.check(&super::table::derived())?;
        }
        Ok(settings)
    }

    fn add_file(&mut self, path: &Path, text: &str) -> Result<(), Failure> {
        let table: toml::Table =
            toml::from_str(text).map_err(|error| wrong(path.display(), &error))?;
        for (key, value) in table {
            let Some(setting) = SETTINGS.iter().find(|setting| setting.key == key) else {
                let known: Vec<&str> = SETTINGS.iter().map(|setting| setting.key).collect();
                let why = format!("there is no setting {key}; there are {}", known.join(", "));
                return Err(wrong(path.display(), &why));
            };
            let value = match value {
                toml::Value::String(text) => text,
                toml::Value::Integer(number) => number.to_string(),
                toml::Value::Boolean(truth) => truth.to_string(),
                _ => return Err(wrong(path.display(), &format!("{key} is no text"))),
            };
            self.values.insert(setting.key, (value, Origin::File(path.to_owned())));
        }
        Ok(())
    }

    /// Each value has to be one that some argument takes, by that argument's own rules.
    fn check(&self, table: &Command) -> Result<(), Failure> {
        for setting in SETTINGS {
            let Some((value, origin)) = self.values.get(setting.key) else { continue };
            let refused: Vec<clap::Error> = match setting.arguments(table) {
                arguments if arguments.iter().any(|arg| takes(arg, value).is_ok()) => continue,
                arguments => arguments.iter().filter_map(|arg| takes(arg, value).err()).collect(),
            };
            let why = refused.first().map(|error| {
                let text = error.to_string();
                text.lines().next().unwrap_or_default().trim_start_matches("error: ").to_owned()
            });
            return Err(wrong(origin, &why.unwrap_or_default()));
        }
        Ok(())
    }

    /// The commands, with the settings as the defaults of their arguments.
    pub fn apply(&self, command: Command) -> Command {
        if self.values.is_empty() {
            return command;
        }
        let name = command.get_name().to_owned();
        let command = command.mut_args(|arg| {
            let of = |setting: &&Setting| {
                arg.get_id() == setting.argument && !setting.not_of.contains(&name.as_str())
            };
            let value = SETTINGS.iter().find(of).and_then(|setting| self.get(setting.key));
            match value {
                // `serve` has fewer ways than `revert`.
                Some((value, _)) if takes(&arg, value).is_ok() => match takes_value(&arg) {
                    true => arg.default_value(value.clone()),
                    // A flag that is set can't be taken back by an argument.
                    false => arg,
                },
                _ => arg,
            }
        });
        command.mut_subcommands(|below| self.apply(below))
    }

    /// The value of a setting, and where it comes from.
    pub fn get(&self, key: &str) -> Option<&(String, Origin)> {
        self.values.get(key)
    }

    /// Whether a setting is on.
    pub fn is_true(&self, key: &str) -> bool {
        self.get(key).is_some_and(|(value, _)| value == "true")
    }
}

fn takes_value(arg: &Arg) -> bool {
    arg.get_action().takes_values()
}

/// Whether an argument takes a value.
fn takes(arg: &Arg, value: &str) -> Result<(), clap::Error> {
    if !takes_value(arg) {
        return match value {
            "true" | "false" => Ok(()),
            _ => Err(clap::Error::raw(
                clap::error::ErrorKind::InvalidValue,
                format!("'{value}' is neither true nor false"),
            )),
        };
    }
    let alone = Arg::new("value").long(arg.get_id().as_str().to_owned());
    let alone = alone.value_parser(arg.get_value_parser().clone()).allow_hyphen_values(true);
    let words = [format!("--{}", arg.get_id()), value.to_owned()];
    let command = Command::new("setting").no_binary_name(true).arg(alone);
    command.try_get_matches_from(words).map(drop)
}

fn wrong(origin: impl fmt::Display, why: &dyn fmt::Display) -> Failure {
    Failure::said(ErrorKind::OptionsInvalid, format!("settings of {origin}: {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Settings of two files and some variables.
    fn read(texts: &[&str], variables: &[(&str, &str)]) -> Result<Settings, Failure> {
        let directory = tempfile::tempdir().unwrap();
        let name = |number: usize| directory.path().join(format!("{number}.toml"));
        for (number, text) in texts.iter().enumerate() {
            std::fs::write(name(number), text).unwrap();
        }
        let files: Vec<PathBuf> = (0..3).map(name).collect();
        let variable = |name: &str| {
            let found = variables.iter().find(|(known, _)| *known == name);
            found.map(|(_, value)| OsString::from(value))
        };
        Settings::read(&files, variable)
    }

    #[test]
    fn the_stronger_origin_counts() {
        let files = ["compress = \"none\"\nplace = \"map\"", "compress = \"zstd:3\""];
        let settings = read(&files, &[("SNAPBACK_PLACE", "socket"), ("SNAPBACK_SOCKET", "")]);
        let settings = settings.unwrap_or_else(|failure| panic!("{}", failure.message()));
        let (compress, origin) = settings.get("compress").unwrap();
        assert!(compress == "zstd:3" && origin.to_string().ends_with("/1.toml"), "{origin}");
        let variable = Origin::Variable("SNAPBACK_PLACE".into());
        assert_eq!(settings.get("place"), Some(&("socket".into(), variable)));
        assert_eq!(settings.get("socket"), None);
    }

    #[test]
    fn the_weakest_file_is_the_hosts() {
        let files = files();
        assert_eq!(files[0], Path::new(SYSTEM));
        assert!(files[1..].iter().all(|file| file.ends_with("snapback/config.toml")), "{files:?}");
    }

    /// From the host's file to the argument: taken away one by one, the next stronger counts.
    #[test]
    fn each_origin_goes_ahead_of_the_weaker() {
        let (host, own) = ("compress = \"zstd:2\"", "compress = \"zstd:3\"");
        let variable: &[_] = &[("SNAPBACK_COMPRESS", "zstd:4")];
        let argument: &[_] = &["--compress", "zstd:5"];
        let level = |texts: &[&str], variables: &[(&str, &str)], arguments: &[&str]| {
            let settings = read(texts, variables);
            let settings = settings.unwrap_or_else(|failure| panic!("{}", failure.message()));
            let words = [&["snapback", "flatten", "a", "b"][..], arguments].concat();
            let matches = settings.apply(crate::cli::command()).try_get_matches_from(words);
            let matches = matches.unwrap();
            let (_, flatten) = matches.subcommand().unwrap();
            match flatten.get_one::<crate::image::Compression>("compress") {
                Some(crate::image::Compression::Zstd(level)) => *level,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(level(&[host, own], variable, argument), 5);
        assert_eq!(level(&[host, own], variable, &[]), 4);
        assert_eq!(level(&[host, own], &[], &[]), 3);
        assert_eq!(level(&[host], &[], &[]), 2);
        assert_eq!(level(&[], &[], &[]), 1);
    }

    #[test]
    fn settings_are_defaults_that_arguments_replace() {
        let settings = read(&["compress = \"none\"\nplace = \"map\""], &[]);
        let settings = settings.unwrap_or_else(|failure| panic!("{}", failure.message()));
        let table = settings.apply(crate::cli::command());
        let compress = |words: &[&str]| {
            let matches = table.clone().try_get_matches_from(words).unwrap();
            let (_, flatten) = matches.subcommand().unwrap();
            *flatten.get_one::<crate::image::Compression>("compress").unwrap()
        };
        use crate::image::Compression;
        assert_eq!(compress(&["snapback", "flatten", "a", "b"]), Compression::None);
        let given = compress(&["snapback", "flatten", "a", "b", "--compress", "zstd"]);
        assert_eq!(given, Compression::Zstd(1));
        // It knows no `map`, and keeps its own default.
        let serve =
            table.clone().try_get_matches_from(["snapback", "serve", "a", "--to", "unix:b"]);
        assert!(serve.is_ok(), "{serve:?}");
    }

    #[test]
    fn a_repository_is_no_default_where_it_says_what_to_do() {
        let settings = read(&["repository = \"/r\""], &[]);
        let settings = settings.unwrap_or_else(|failure| panic!("{}", failure.message()));
        let table = settings.apply(crate::cli::command());
        let repository = |words: &[&str]| {
            let matches = table.clone().try_get_matches_from(words).unwrap();
            let (_, command) = matches.subcommand().unwrap();
            command.get_one::<String>("repo").cloned()
        };
        assert_eq!(repository(&["snapback", "list"]).as_deref(), Some("/r"));
        assert_eq!(repository(&["snapback", "list", "--repo", "/s"]).as_deref(), Some("/s"));
        assert_eq!(repository(&["snapback", "revert", "vm.snap"]), None);
        assert_eq!(repository(&["snapback", "check", "--qmp", "qmp.sock"]), None);
    }

    #[test]
    fn what_is_wrong_is_told_with_its_place() {
        let says = |texts: &[&str], variables: &[(&str, &str)]| {
            read(texts, variables).map(drop).unwrap_err().message()
        };
        let unknown = says(&["compres = 1"], &[]);
        assert!(unknown.contains("0.toml") && unknown.contains("no setting compres"), "{unknown}");
        let syntax = says(&["compress ="], &[]);
        assert!(syntax.contains("0.toml"), "{syntax}");
        let value = says(&[], &[("SNAPBACK_COMPRESS", "lz4")]);
        assert!(value.contains("$SNAPBACK_COMPRESS") && value.contains("lz4"), "{value}");
        let truth = says(&["quiet = 3"], &[]);
        assert!(truth.contains("neither true nor false"), "{truth}");
    }

    #[test]
    fn every_setting_is_of_an_argument() {
        let table = crate::cli::command();
        for setting in SETTINGS {
            assert!(!setting.arguments(&table).is_empty(), "{}", setting.key);
        }
    }
}
