//! The record of a machine that does not run: from a command line, and the version of the
//! QEMU that it names.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::cancel::Cancellation;
use crate::guest::GuestError;
use crate::guest::command_line::parameters::{Params, Spec};
use crate::guest::command_line::{CommandLine, CommandOption};
use crate::guest::record::{is_recorded, is_system_emulator};
use crate::host::program::{ProgramError, answer};
use crate::machine::{Machine, QemuVersion};

/// How long `qemu --version` may take, with the binary on a slow disk.
const VERSION_LIMIT: Duration = Duration::from_secs(60);

/// Records a machine by its command line, the program's name first; assignments of
/// environment variables may stand before it, as in a shell. `qemu` is the program to
/// use instead of the one that is named there. Relative paths start from our working
/// directory. The caller adds the machine type and whether the guest ran. `cancel`
/// ends the program, which is asked for its version.
///
/// # Errors
/// [`GuestError::Described`] when the words are no command line, or the program is not
/// QEMU.
pub fn describe(
    words: &[String],
    qemu: Option<&Path>,
    cancel: &Cancellation,
) -> Result<Machine, GuestError> {
    let split = words.iter().position(|word| assignment(word).is_none()).unwrap_or(words.len());
    let (assigned, argv) = words.split_at(split);
    let mut argv = argv.to_vec();
    if argv.first().is_none_or(|first| first.starts_with('-')) {
        let Some(qemu) = qemu else {
            return Err(described(
                "it names no program: begin it with one, or name it in `ImportOptions::qemu`",
            ));
        };
        argv.insert(0, qemu.display().to_string());
    }
    let cwd = std::env::current_dir()
        .map_err(|e| described(format!("the working directory can't be determined: {e}")))?;
    let program = qemu.map_or_else(|| PathBuf::from(&argv[0]), Path::to_owned);
    let binary = find(&program, &cwd)
        .ok_or_else(|| described(format!("there is no program `{}`", program.display())))?;
    let ours = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    let given = assigned
        .iter()
        .filter_map(|word| assignment(word))
        .map(|(name, value)| (name.to_owned(), value.to_owned()));
    // Later ones replace earlier ones.
    let env: BTreeMap<_, _> = ours.chain(given).filter(|(name, _)| is_recorded(name)).collect();
    let env: Vec<_> = env.into_iter().collect();
    let text = |path: &Path| {
        let text = path.to_str().map(str::to_owned);
        text.ok_or_else(|| described(format!("{path:?} is not UTF-8")))
    };
    Ok(Machine {
        qemu: version(&binary, &env, cancel)?,
        binary: text(&binary)?,
        argv: drop_libvirts_own(argv),
        cwd: text(&cwd)?,
        env,
        running: true,
        ..Machine::default()
    })
}

/// Records a machine as [`describe()`] does, from a command line that came with a guest and is
/// not trusted. Its assignments of variables are ignored, since they could make any program
/// load other code, and its program is run only if it has the name of a QEMU system emulator,
/// or `qemu` replaces it.
///
/// # Errors
/// As [`describe()`].
pub fn describe_foreign(
    words: &[String],
    qemu: Option<&Path>,
    cancel: &Cancellation,
) -> Result<Machine, GuestError> {
    let split = words.iter().position(|word| assignment(word).is_none()).unwrap_or(words.len());
    let words = &words[split..];
    let name = words.first().and_then(|program| Path::new(program).file_name());
    let name = name.unwrap_or_default().to_string_lossy();
    if qemu.is_none() && !is_system_emulator(&name) {
        return Err(described(format!(
            "its program `{}` is not called as a QEMU is (qemu-system-…), and is not run: name \
             the QEMU to use in `ImportOptions::qemu`",
            words.first().map_or("", String::as_str)
        )));
    }
    describe(words, qemu, cancel)
}

/// Drops what libvirt added for its own use: a key and a monitor in a directory that exists
/// only while libvirt runs the guest. The guest sees neither.
fn drop_libvirts_own(argv: Vec<String>) -> Vec<String> {
    const KEY: &str = "masterKey0";
    const MONITOR: &str = "charmonitor";
    let mut args = argv.into_iter();
    let program = args.next();
    let mut line = CommandLine::parse(args);
    let id = |option: &CommandOption| Spec::parse(option.value()).get("id").map(str::to_owned);
    let is_key =
        |option: &CommandOption| option.name() == "object" && id(option).as_deref() == Some(KEY);
    // If something is encrypted with the key, QEMU will report the missing key itself.
    let key_serves = line.options().any(|o| !is_key(o) && o.value().contains(KEY));
    line.retain_options(|option| match option.name() {
        "object" => key_serves || !is_key(option),
        "chardev" => id(option).as_deref() != Some(MONITOR),
        "mon" => Params::parse(option.value()).get("chardev") != Some(MONITOR),
        _ => true,
    });
    program.into_iter().chain(line.into_args()).collect()
}

/// The machine type that a command line names: a versioned one, or an alias such as
/// `pc`.
pub fn named_machine_type(argv: &[String]) -> Option<String> {
    let line = CommandLine::parse(argv.iter().skip(1).map(String::as_str));
    let named = |value: &str| {
        let params = Params::parse(value);
        let name = params.get("type").or_else(|| params.implied()).map(str::to_owned);
        name.filter(|name| !name.is_empty())
    };
    line.options()
        .filter(|o| ["machine", "M"].contains(&o.name()))
        .filter_map(|o| named(o.value()))
        .last()
}

fn described(problem: impl Into<String>) -> GuestError {
    GuestError::Described { problem: problem.into() }
}

/// `NAME=value` before a command.
fn assignment(word: &str) -> Option<(&str, &str)> {
    let (name, value) = word.split_once('=')?;
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let starts_well = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
    (starts_well && name.chars().all(is_name)).then_some((name, value))
}

/// A program's absolute path; a bare name is searched in PATH.
pub(super) fn find(program: &Path, cwd: &Path) -> Option<PathBuf> {
    if program.components().count() > 1 || program.is_absolute() {
        return Some(cwd.join(program)).filter(|path| path.is_file());
    }
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|directory| directory.join(program))
        .find(|path| path.is_file())
}

/// The version that `--version` prints.
fn version(
    binary: &Path,
    env: &[(String, String)],
    cancel: &Cancellation,
) -> Result<QemuVersion, GuestError> {
    let mut command = Command::new(binary);
    command.arg("--version");
    command.envs(env.iter().map(|(name, value)| (name, value)));
    let answer =
        answer(command, Vec::new(), VERSION_LIMIT, cancel).map_err(|error| match error {
            ProgramError::Run(source) => GuestError::Start { binary: binary.to_owned(), source },
            error => described(format!("`{} --version` {error}", binary.display())),
        })?;
    let said = String::from_utf8_lossy(&answer.stdout);
    parse_version(&said).ok_or_else(|| {
        let said: String = said.chars().take(200).collect();
        let binary = binary.display();
        described(format!("`{binary} --version` does not say that it is QEMU, but {said:?}"))
    })
}

/// Reads `QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)`.
fn parse_version(said: &str) -> Option<QemuVersion> {
    let rest = said.lines().next()?.strip_prefix("QEMU emulator version ")?;
    let (numbers, package) = rest.split_once(' ').unwrap_or((rest, ""));
    let mut numbers = numbers.split('.').map(str::parse);
    let mut next = || numbers.next()?.ok();
    let package = package.trim_start_matches('(').trim_end_matches(')').to_owned();
    Some(QemuVersion { major: next()?, minor: next()?, micro: next()?, package })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn versions_are_read() {
        let debian =
            parse_version("QEMU emulator version 7.2.22 (Debian 1:7.2)\nCopyright").unwrap();
        assert_eq!(
            (debian.to_string().as_str(), debian.package.as_str()),
            ("7.2.22", "Debian 1:7.2")
        );
        assert_eq!(parse_version("QEMU emulator version 10.0.2").unwrap().major, 10);
        assert!(parse_version("bash, version 5").is_none());
    }

    #[test]
    fn a_machine_is_described_by_its_command_line() {
        let words = ["LC_ALL=C", "QEMU_AUDIO_DRV=none", "qemu-system-x86_64", "-M", "pc", "-S"];
        let machine = describe(&words.map(String::from), None, &Cancellation::default()).unwrap();
        assert!(machine.binary.ends_with("/qemu-system-x86_64"), "{machine:?}");
        assert_eq!(machine.argv, words[2..]);
        assert!(machine.env.contains(&("QEMU_AUDIO_DRV".into(), "none".into())));
        assert!(machine.env.iter().all(|(name, _)| name != "LC_ALL"));
        assert_eq!((machine.qemu.major, machine.running), (7, true));
        assert_eq!(named_machine_type(&machine.argv).as_deref(), Some("pc"));
    }

    #[test]
    fn what_only_a_living_libvirt_has_is_dropped() {
        let drop =
            |words: &[&str]| drop_libvirts_own(words.iter().map(|word| word.to_string()).collect());
        let key = r#"{"qom-type":"secret","id":"masterKey0","file":"/run/key.aes"}"#;
        let line = [
            "qemu",
            "-object",
            key,
            "-chardev",
            "socket,id=charmonitor,path=/run/m,server=on",
            "-mon",
            "chardev=charmonitor,id=monitor,mode=control",
            "-chardev",
            "null,id=c0",
        ];
        assert_eq!(drop(&line), ["qemu", "-chardev", "null,id=c0"]);
        let used = ["qemu", "-object", key, "-object", r#"{"id":"s","keyid":"masterKey0"}"#];
        assert_eq!(drop(&used), used);
    }

    #[test]
    fn a_strangers_line_runs_a_qemu_and_nothing_else() {
        let describe = |words: &[&str], qemu| {
            let words: Vec<_> = words.iter().map(|word| word.to_string()).collect();
            describe_foreign(&words, qemu, &Cancellation::default())
        };
        let assigned = "QEMU_MODULE_DIR=/strangers/own";
        let machine = describe(&[assigned, "qemu-system-x86_64", "-S"], None).unwrap();
        assert_eq!(machine.argv, ["qemu-system-x86_64", "-S"]);
        assert!(machine.env.iter().all(|(_, value)| value != "/strangers/own"));
        // It would leave a file if it were run.
        let directory = tempfile::tempdir().unwrap();
        let (program, trace) = (directory.path().join("program"), directory.path().join("trace"));
        let script = format!("#!/bin/sh\ntouch {}\n", trace.display());
        std::fs::write(&program, script).unwrap();
        std::fs::set_permissions(&program, PermissionsExt::from_mode(0o700)).unwrap();
        let words = ["QEMU_A=b", program.to_str().unwrap(), "-S"];
        let error = describe(&words, None).unwrap_err().to_string();
        assert!(error.contains("::qemu`") && error.contains(words[1]), "{error}");
        assert!(!trace.exists());
        assert!(describe(&words, Some(Path::new("qemu-system-x86_64"))).is_ok());
        assert!(describe(&[], None).unwrap_err().to_string().contains("::qemu`"));
    }

    #[test]
    fn what_is_no_qemu_is_refused_by_name() {
        let says = |words: &[&str]| {
            let words: Vec<_> = words.iter().map(|word| word.to_string()).collect();
            describe(&words, None, &Cancellation::default()).unwrap_err().to_string()
        };
        assert!(says(&["-m", "1G"]).contains("::qemu`"));
        assert!(says(&[]).contains("::qemu`"));
        assert!(says(&["no-such-program"]).contains("no-such-program"));
        assert!(says(&["/bin/true"]).contains("does not say that it is QEMU"));
    }
}
