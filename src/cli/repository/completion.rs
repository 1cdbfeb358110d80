//! What a shell is proposed where a snapshot of a repository is named.

use clap_complete::engine::CompletionCandidate;

use crate::cli::completion::{PATIENCE, candidate, in_time, option_of_words, option_or_setting};
use crate::repository::{Access, KeySource, Repository, SnapshotManifest, time_text};

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

/// What the repository holds that is named on the line (that which is copied from, where there are two) or by
/// the settings, if it tells in time. Nobody is asked for a passphrase, and no command run that prints one.
fn manifests() -> Vec<SnapshotManifest> {
    let from = option_of_words("--from");
    let address = from.or_else(|| option_or_setting("--repo", "repository"));
    let identity = std::env::var_os("SNAPBACK_IDENTITY").filter(|path| !path.is_empty());
    let keys = identity.map(|path| KeySource::Identities(path.into())).into_iter().collect();
    let access = Access::new().with_patience(PATIENCE).with_keys(keys).with_plain(true);
    let found = in_time(move || {
        let address = address?.parse().ok()?;
        Repository::open(&address, &access).ok()?.manifests().ok()
    });
    found.unwrap_or_default()
}
