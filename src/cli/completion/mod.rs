//! What completes arguments in a shell, as far as the table of arguments doesn't say it.
//!
//! A shell asks this program at each TAB (`COMPLETE=bash snapback` prints what has it do so):
//! images, pools, ids, domains and snapshots of repositories are those that are there at that time.
//! Nothing here may wait for long, or print: what can't be had is not proposed.

mod bash;

use std::ffi::{OsStr, OsString};
use std::io::Read;
use std::path::Path;
use std::process::{Command as Process, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use clap::{Arg, Command, ValueHint};
use clap_complete::CompleteEnv;
use clap_complete::engine::{
    ArgValueCandidates, ArgValueCompleter, CompletionCandidate, PathCompleter, ValueCompleter,
};
use clap_complete::env::{Fish, Shells, Zsh};

use super::backup::CONFIG as BACKUP_CONFIG;
use super::repository;
use super::settings::Settings;
use crate::backup::BackupConfig;
use crate::daemon::{Client, default_socket};
use crate::pools::{GuestView, PoolView};

/// How long a daemon, libvirt, or a repository's store has to answer.
pub(super) const PATIENCE: Duration = Duration::from_millis(300);

/// Answers a shell and ends the program, if a shell asks.
pub(super) fn answer() {
    if std::env::var_os("COMPLETE").is_some() {
        let shells = Shells(&[&bash::WholeWords, &Fish, &Zsh]);
        CompleteEnv::with_factory(command).shells(shells).completer("snapback").complete();
    }
}

/// All commands, whose arguments know what there is.
fn command() -> Command {
    with_completers(super::command())
}

fn with_completers(command: Command) -> Command {
    let name = command.get_name().to_owned();
    command.mut_args(|arg| with_completer(arg, &name)).mut_subcommands(with_completers)
}

fn with_completer(arg: Arg, command: &str) -> Arg {
    let candidates = |found: fn() -> Vec<CompletionCandidate>| ArgValueCandidates::new(found);
    match (command, arg.get_id().as_str()) {
        ("revert", "image") => arg.add(ArgValueCompleter::new(images_and_snapshots)),
        (_, "image" | "parent") => arg.add(ArgValueCompleter::new(images)),
        (_, "pool") | ("set" | "remove", "name") => arg.add(candidates(pools)),
        (_, "id") => arg.add(candidates(ids)),
        (_, "domain") => arg.add(candidates(domains)),
        ("pull" | "drill" | "tag" | "forget" | "diff" | "copy", "name" | "names" | "a" | "b") => {
            arg.add(candidates(repository::snapshot_candidates))
        }
        ("backup", "names") => arg.add(candidates(machines_of_backup)),
        (_, "machine") => arg.add(candidates(repository::machine_candidates)),
        // Of an address, what is on this host.
        (_, "repo") | ("copy", "from") => arg.value_hint(ValueHint::DirPath),
        _ => arg,
    }
}

/// What the words that a shell gives behind `--` say of an option.
pub(super) fn option_of_words(option: &str) -> Option<String> {
    let words: Vec<OsString> = std::env::args_os().collect();
    let words: Vec<_> = words.iter().map(|word| word.to_string_lossy()).collect();
    words.iter().enumerate().find_map(|(at, word)| match word.strip_prefix(option) {
        Some("") => words.get(at + 1).map(|word| word.to_string()),
        Some(value) => value.strip_prefix('=').map(str::to_owned),
        None => None,
    })
}

/// The same, or else the setting of this name.
pub(super) fn option_or_setting(option: &str, setting: &str) -> Option<String> {
    let settings = || Settings::of_host(&[]).unwrap_or_default();
    option_of_words(option).or_else(|| Some(settings().get(setting)?.0.clone()))
}

/// What this tells, if it does in time. The thread of what doesn't ends with the program.
pub(super) fn in_time<T: Send + 'static>(
    ask: impl FnOnce() -> Option<T> + Send + 'static,
) -> Option<T> {
    let (tell, told) = mpsc::channel();
    // By then nobody may listen any more.
    std::thread::spawn(move || drop(tell.send(ask())));
    told.recv_timeout(PATIENCE).ok().flatten()
}

fn images(begun: &OsStr) -> Vec<CompletionCandidate> {
    PathCompleter::any().filter(is_image).complete(begun)
}

/// With `--repo` a snapshot may be named in an image's place.
fn images_and_snapshots(begun: &OsStr) -> Vec<CompletionCandidate> {
    let snapshots = match option_of_words("--repo") {
        Some(_) => repository::snapshot_candidates(),
        None => Vec::new(),
    };
    let begins = |found: &CompletionCandidate| {
        found.get_value().to_string_lossy().starts_with(&*begun.to_string_lossy())
    };
    snapshots.into_iter().filter(begins).chain(images(begun)).collect()
}

/// Directories lead to images.
fn is_image(path: &Path) -> bool {
    path.is_dir() || path.extension().is_some_and(|extension| extension == "snap")
}

pub(super) fn candidate(value: String, help: String) -> CompletionCandidate {
    CompletionCandidate::new(value).help(Some(help.into()))
}

/// The reverts that are under way, and the guests that were taken.
fn ids() -> Vec<CompletionCandidate> {
    let runs = crate::runs::list().unwrap_or_default().into_iter();
    let runs = runs.map(|run| candidate(run.id, run.image.display().to_string()));
    let guests = asked(|daemon| async move { daemon.guests().await.ok() }).into_iter();
    let guests = guests.map(|GuestView { name, pool, .. }| candidate(name, pool));
    runs.chain(guests).collect()
}

fn pools() -> Vec<CompletionCandidate> {
    let pools = asked(|daemon| async move { daemon.pools().await.ok() }).into_iter();
    pools.map(|PoolView { name, image, .. }| candidate(name, image.display().to_string())).collect()
}

/// What a daemon answers, if one does in time.
fn asked<T, F>(ask: impl FnOnce(Client) -> F) -> Vec<T>
where
    F: Future<Output = Option<Vec<T>>>,
{
    let socket = option_or_setting("--socket", "socket").map(Into::into);
    let client = Client::new(socket.unwrap_or_else(default_socket));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let answer = runtime.ok().and_then(|runtime| {
        runtime.block_on(async { tokio::time::timeout(PATIENCE, ask(client)).await.ok().flatten() })
    });
    answer.unwrap_or_default()
}

/// The domains of the libvirt that is named, or that virsh connects to.
fn domains() -> Vec<CompletionCandidate> {
    let mut virsh = Process::new("virsh");
    virsh.args(["--quiet", "--readonly"]);
    virsh.args(option_or_setting("--connect", "connect").map(|uri| format!("--connect={uri}")));
    virsh.args(["list", "--all", "--name"]);
    virsh.stdin(Stdio::null()).stderr(Stdio::null()).stdout(Stdio::piped());
    let names = in_time(move || {
        let mut child = virsh.spawn().ok()?;
        let mut names = String::new();
        child.stdout.take()?.read_to_string(&mut names).ok()?;
        let _ = child.wait();
        Some(names)
    });
    let names = names.unwrap_or_default();
    let names = names.lines().map(str::trim).filter(|name| !name.is_empty());
    names.map(CompletionCandidate::new).collect()
}

/// The machines that the file of `backup` names.
fn machines_of_backup() -> Vec<CompletionCandidate> {
    let file = option_of_words("--config").unwrap_or_else(|| BACKUP_CONFIG.to_owned());
    let machines = BackupConfig::read(Path::new(&file)).map(|config| config.machines);
    machines.unwrap_or_default().into_keys().map(CompletionCandidate::new).collect()
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;

    /// What a shell is proposed behind these words.
    fn proposed(words: &[&str], directory: &std::path::Path) -> Vec<String> {
        let words: Vec<OsString> = words.iter().map(OsString::from).collect();
        let index = words.len() - 1;
        let mut table = super::command();
        let found =
            clap_complete::engine::complete(&mut table, words, index, Some(directory)).unwrap();
        found.iter().map(|found| found.get_value().display().to_string()).collect()
    }

    #[test]
    fn commands_options_and_images_are_proposed() {
        let directory = tempfile::tempdir().unwrap();
        for name in ["vm.snap", "vm.log"] {
            std::fs::write(directory.path().join(name), "").unwrap();
        }
        let begun = format!("{}/v", directory.path().display());
        let image = format!("{}/vm.snap", directory.path().display());
        assert!(proposed(&["snapback", "rev"], directory.path()).contains(&"revert".to_owned()));
        assert_eq!(proposed(&["snapback", "verify", &begun], directory.path()), [image]);
        let ways = proposed(&["snapback", "revert", "x", "--place", ""], directory.path());
        assert!(ways.contains(&"eager".to_owned()), "{ways:?}");
        let commands = proposed(&["snapback", ""], directory.path());
        assert!(!commands.contains(&"broker".to_owned()), "{commands:?}");
    }
}
