//! What completes arguments in a shell, as far as the table of arguments doesn't say it.
//!
//! A shell asks this program at each TAB (`COMPLETE=bash snapback` prints what has it do so):
//! images, pools, ids, domains and snapshots of repositories are those that are there at that time.
//! Nothing here may wait for long, or print: what can't be had is not proposed.

use std::io::Read;
use std::path::Path;
use std::process::{Command as Process, Stdio};
use std::time::Duration;

use clap::{Arg, Command};
use clap_complete::CompleteEnv;
use clap_complete::engine::{
    ArgValueCandidates, ArgValueCompleter, CompletionCandidate, PathCompleter,
};

use super::pool::SocketArgs;
use super::repository;
use crate::daemon::{Client, default_socket};
use crate::pools::{GuestView, PoolView};

/// How long a daemon, or a repository's store, has to answer.
pub(super) const PATIENCE: Duration = Duration::from_millis(300);

/// Answers a shell and ends the program, if a shell asks.
pub(super) fn answer() {
    if std::env::var_os("COMPLETE").is_some() {
        CompleteEnv::with_factory(super::command).completer("snapback").complete();
    }
}

/// The same commands, whose arguments know what there is.
pub(super) fn with_completers(command: Command) -> Command {
    // `pool set` and `pool remove` name a pool that there is.
    let names_pool = matches!(command.get_name(), "set" | "remove");
    let names_snapshots =
        matches!(command.get_name(), "pull" | "drill" | "tag" | "forget" | "diff" | "copy");
    let command = command.mut_args(|arg| with_completer(arg, names_pool, names_snapshots));
    command.mut_subcommands(with_completers)
}

fn with_completer(arg: Arg, names_pool: bool, names_snapshots: bool) -> Arg {
    let images = || ArgValueCompleter::new(PathCompleter::any().filter(is_image));
    match arg.get_id().as_str() {
        "image" | "parent" => arg.add(images()),
        "pool" => arg.add(ArgValueCandidates::new(pools)),
        "name" if names_pool => arg.add(ArgValueCandidates::new(pools)),
        "id" => arg.add(ArgValueCandidates::new(ids)),
        "domain" => arg.add(ArgValueCandidates::new(domains)),
        "name" | "names" | "a" | "b" if names_snapshots => {
            arg.add(ArgValueCandidates::new(repository::snapshot_candidates))
        }
        "machine" => arg.add(ArgValueCandidates::new(repository::machine_candidates)),
        _ => arg,
    }
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
    let client = Client::new(SocketArgs::of_environment().unwrap_or_else(default_socket));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let answer = runtime.ok().and_then(|runtime| {
        runtime.block_on(async { tokio::time::timeout(PATIENCE, ask(client)).await.ok().flatten() })
    });
    answer.unwrap_or_default()
}

/// The domains of the libvirt that virsh connects to.
fn domains() -> Vec<CompletionCandidate> {
    let mut virsh = Process::new("virsh");
    virsh.args(["--quiet", "--readonly", "list", "--all", "--name"]);
    let asked = virsh.stdin(Stdio::null()).stderr(Stdio::null()).stdout(Stdio::piped()).spawn();
    let Ok(mut child) = asked else { return Vec::new() };
    let mut names = String::new();
    let _ = child.stdout.take().map(|mut stdout| stdout.read_to_string(&mut names));
    let _ = child.wait();
    let names = names.lines().map(str::trim).filter(|name| !name.is_empty());
    names.map(CompletionCandidate::new).collect()
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;

    /// What a shell is proposed behind these words.
    fn proposed(words: &[&str], directory: &std::path::Path) -> Vec<String> {
        let words: Vec<OsString> = words.iter().map(OsString::from).collect();
        let index = words.len() - 1;
        let mut table = crate::cli::command();
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
