//! A QEMU command line, parsed without loss.

pub(super) mod backend;
pub(super) mod parameters;
pub(super) mod ports;

use std::fmt;

/// The options that take no value, in any version from 7.2 to 11 (those that
/// `qemu-options.hx` defines without `HAS_ARG`). Every other option takes one.
const WITHOUT_VALUE: &[&str] = &[
    "S",
    "async-teardown",
    "audio-help",
    "daemonize",
    "enable-kvm",
    "enable-sync-profile",
    "full-screen",
    "h",
    "help",
    "jitdump",
    "mem-prealloc",
    "no-acpi",
    "no-fd-bootchk",
    "no-hpet",
    "no-reboot",
    "no-shutdown",
    "no-user-config",
    "nodefaults",
    "nographic",
    "old-param",
    "only-migratable",
    "perfmap",
    "portrait",
    "preconfig",
    "s",
    "semihosting",
    "singlestep",
    "snapshot",
    "usb",
    "version",
    "win2k-hack",
    "xen-attach",
    "xen-domid-restrict",
];

/// A command line behind the program's name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CommandLine {
    /// Its parts, in order.
    pub args: Vec<Arg>,
}

/// One part of a command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Arg {
    /// A disk image without an option, the same as with `-hda`.
    Image(String),
    /// An option with its value, if it takes one.
    Option(CommandOption),
}

/// An option with its value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommandOption {
    /// As it was spelled: with one dash or two.
    pub flag: String,
    /// Its value; `None` when it takes none, or when the line ends too early.
    pub value: Option<String>,
}

impl CommandOption {
    /// An option without a value.
    pub fn flag(name: &str) -> CommandOption {
        CommandOption { flag: format!("-{name}"), value: None }
    }

    /// An option with a value.
    pub fn new(name: &str, value: impl Into<String>) -> CommandOption {
        CommandOption { flag: format!("-{name}"), value: Some(value.into()) }
    }

    /// The option's name without its dashes: QEMU takes `--name` for `-name`.
    pub fn name(&self) -> &str {
        let rest = self.flag.strip_prefix('-').unwrap_or(&self.flag);
        rest.strip_prefix('-').unwrap_or(rest)
    }

    /// The value, empty when there is none.
    pub fn value(&self) -> &str {
        self.value.as_deref().unwrap_or_default()
    }
}

impl fmt::Display for CommandOption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.value {
            Some(value) => write!(f, "{} {value}", self.flag),
            None => f.write_str(&self.flag),
        }
    }
}

impl CommandLine {
    /// Parses arguments (without the program's name) by the rules of QEMU's `lookup_opt`. Any
    /// list of arguments can be parsed; whether it is valid is for QEMU to decide.
    pub fn parse<I>(args: I) -> CommandLine
    where
        I: IntoIterator,
        I::Item: Into<String>,
    {
        let mut rest = args.into_iter().map(Into::into);
        let mut args = Vec::new();
        while let Some(arg) = rest.next() {
            let arg: String = arg;
            if !arg.starts_with('-') {
                args.push(Arg::Image(arg));
                continue;
            }
            let mut option = CommandOption { flag: arg, value: None };
            if !WITHOUT_VALUE.contains(&option.name()) {
                option.value = rest.next();
            }
            args.push(Arg::Option(option));
        }
        CommandLine { args }
    }

    /// The arguments again.
    pub fn into_args(self) -> Vec<String> {
        let mut args = Vec::with_capacity(self.args.len() * 2);
        for arg in self.args {
            match arg {
                Arg::Image(image) => args.push(image),
                Arg::Option(option) => {
                    args.push(option.flag);
                    args.extend(option.value);
                }
            }
        }
        args
    }

    /// The options, in order.
    pub fn options(&self) -> impl Iterator<Item = &CommandOption> {
        self.args.iter().filter_map(|arg| match arg {
            Arg::Option(option) => Some(option),
            Arg::Image(_) => None,
        })
    }

    /// The options, to be changed.
    pub fn options_mut(&mut self) -> impl Iterator<Item = &mut CommandOption> {
        self.args.iter_mut().filter_map(|arg| match arg {
            Arg::Option(option) => Some(option),
            Arg::Image(_) => None,
        })
    }

    /// Keeps the options that `keep` accepts.
    pub fn retain_options(&mut self, mut keep: impl FnMut(&CommandOption) -> bool) {
        self.args.retain(|arg| match arg {
            Arg::Option(option) => keep(option),
            Arg::Image(_) => true,
        });
    }

    /// Whether an option of this name is given.
    pub fn has(&self, name: &str) -> bool {
        self.options().any(|option| option.name() == name)
    }

    /// Adds an option at the end.
    pub fn push(&mut self, option: CommandOption) {
        self.args.push(Arg::Option(option));
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn options_values_and_images() {
        let line = CommandLine::parse(["-S", "--name", "-x", "disk.img", "-nographic", "-m"]);
        assert_eq!(
            line.args,
            [
                Arg::Option(CommandOption::flag("S")),
                Arg::Option(CommandOption { flag: "--name".into(), value: Some("-x".into()) }),
                Arg::Image("disk.img".into()),
                Arg::Option(CommandOption::flag("nographic")),
                Arg::Option(CommandOption::flag("m")),
            ]
        );
        assert!(line.has("name") && !line.has("x"));
    }

    /// The table agrees with the installed QEMU on which options take a value.
    #[test]
    fn the_table_agrees_with_the_installed_qemu() {
        let run = |args: &[&str]| {
            let out = Command::new("qemu-system-x86_64")
                .args(args)
                .stdin(Stdio::null())
                .output()
                .unwrap();
            String::from_utf8_lossy(&out.stdout).into_owned()
                + &String::from_utf8_lossy(&out.stderr)
        };
        let help = run(&["-help"]);
        let mut checked = std::collections::HashSet::new();
        for word in help.lines().filter_map(|line| line.split_whitespace().next()) {
            let Some(name) = word.strip_prefix('-').map(|name| name.trim_start_matches('-')) else {
                continue;
            };
            // The help writes a few pairs as `-fda/-fdb`.
            if name.is_empty()
                || !checked.insert(name)
                || !name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-')
            {
                continue;
            }
            // The first unknown option is a value or an error, the second one an
            // error in any case: no QEMU gets as far as starting.
            let (first, second) = ("-no-such-option", "-nor-such-a-one");
            let says = run(&["-machine", "none", &format!("-{name}"), first, second]);
            let ends_early = ["h", "help", "version", "audio-help"].contains(&name);
            let takes_none = says.contains(&format!("{first}: invalid option")) || ends_early;
            assert_eq!(WITHOUT_VALUE.contains(&name), takes_none, "-{name}: {says}");
        }
        assert!(checked.len() > 50, "{help}");
    }

    proptest! {
        #[test]
        fn lossless(args in prop::collection::vec("-{0,2}(S|m|name|x|nographic)?|.{0,8}", 0..12)) {
            prop_assert_eq!(CommandLine::parse(args.clone()).into_args(), args);
        }
    }
}
