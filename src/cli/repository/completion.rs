//! What a shell is proposed where a snapshot of a repository is named.

use std::ffi::OsString;
use std::sync::mpsc;

use clap_complete::engine::CompletionCandidate;

use crate::cli::completion::{PATIENCE, candidate};
use crate::cli::settings::Settings;
use crate::repository::{
    Access, KeySource, Repository, RepositoryError, SnapshotManifest, time_text,
};

/// The last snapshot of each machine, and each snapshot.
pub(in crate::cli) fn snapshot_candidates() -> Vec<CompletionCandidate> {
    let mut snapshots = manifests();
    snapshots.sort_by_key(|snapshot| std::cmp::Reverse(snapshot.moment_unix_us));
    let mut proposed = Vec::new();
    for snapshot in &snapshots {
        let SnapshotManifest { machine, id, moment_unix_us, .. } = snapshot;
        let made = time_text(*moment_unix_us);
        if !snapshots.iter().take_while(|later| later.id != *id).any(|l| l.machine == *machine) {
            proposed.push(candidate(format!("{machine}@latest"), made.clone()));
        }
        proposed.push(candidate(format!("{machine}@{}", &id.to_string()[..8]), made));
    }
    proposed
}

/// The machines that have snapshots.
pub(in crate::cli) fn machine_candidates() -> Vec<CompletionCandidate> {
    let mut machines: Vec<String> = manifests().into_iter().map(|found| found.machine).collect();
    machines.sort();
    machines.dedup();
    machines.into_iter().map(CompletionCandidate::new).collect()
}

/// The repository that the words behind the shell's `--` name, or the settings.
fn address(words: &[OsString]) -> Option<String> {
    let words: Vec<String> = words.iter().map(|w| w.to_string_lossy().into_owned()).collect();
    let named = words.iter().enumerate().find_map(|(at, word)| match word.as_str() {
        "--repo" | "--from" => words.get(at + 1).cloned(),
        word => word.strip_prefix("--repo=").or(word.strip_prefix("--from=")).map(str::to_owned),
    });
    let settings = || Settings::of_host(&[]).unwrap_or_default();
    named.or_else(|| Some(settings().get("repository")?.0.clone()))
}

/// What the repository holds, if it tells in time. Nobody is asked for a passphrase, and no command run
/// that prints one.
fn manifests() -> Vec<SnapshotManifest> {
    let words: Vec<OsString> = std::env::args_os().collect();
    let Some(address) = address(&words) else { return Vec::new() };
    let identity = std::env::var_os("SNAPBACK_IDENTITY").filter(|path| !path.is_empty());
    let keys = identity.map(|path| KeySource::Identities(path.into())).into_iter().collect();
    let access = Access::new().with_patience(PATIENCE).with_keys(keys).with_plain(true);
    let (tell, told) = mpsc::channel();
    let ask = move || -> Result<(), RepositoryError> {
        // By then nobody may listen any more.
        let _ = tell.send(Repository::open(&address.parse()?, &access)?.manifests()?);
        Ok(())
    };
    // It ends with the program, which does not wait for it.
    std::thread::spawn(ask);
    told.recv_timeout(PATIENCE).unwrap_or_default()
}
