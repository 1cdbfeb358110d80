//! `forget`: which snapshots are kept.

use std::collections::{BTreeMap, BTreeSet};

use crate::repository::error::RepositoryError;
use crate::repository::format::ids::SnapshotId;
use crate::repository::format::manifest::SnapshotManifest;
use crate::repository::format::time::calendar;
use crate::repository::reading::list::{all_tags, list};
use crate::repository::reading::name::SnapshotName;
use crate::repository::reading::repository::{Manifests, Repository, Snapshot};

/// Which snapshots of each machine are kept. A snapshot that any of these keeps is kept.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Retention {
    /// The last so many.
    pub last: usize,
    /// The last one of each of the last so many hours in which there is one.
    pub hourly: usize,
    /// The same of days.
    pub daily: usize,
    /// The same of weeks, which begin on Mondays.
    pub weekly: usize,
    /// The same of months.
    pub monthly: usize,
}

/// What is forgotten.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ForgetOptions {
    /// These, whatever else is said.
    pub names: Vec<SnapshotName>,
    /// Of each machine, or of this one, all that this does not keep and that has no tag.
    pub retention: Retention,
    /// Only of this machine.
    pub machine: Option<String>,
    /// Only tell what would be forgotten.
    pub dry_run: bool,
}

/// A snapshot that was looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Looked {
    /// The snapshot.
    pub manifest: SnapshotManifest,
    /// Its tags.
    pub tags: BTreeSet<String>,
    /// Why it is kept: `last`, `hourly`, …, `tag`. Nothing: it is forgotten.
    pub kept_by: Vec<&'static str>,
}

impl Retention {
    fn is_nothing(&self) -> bool {
        *self == Retention::default()
    }

    /// Why each of these moments of one machine is kept. They come in any order.
    fn kept(&self, moments: &[u64]) -> Vec<Vec<&'static str>> {
        let mut order: Vec<usize> = (0..moments.len()).collect();
        order.sort_by_key(|&number| std::cmp::Reverse((moments[number], number)));
        let mut kept = vec![Vec::new(); moments.len()];
        order.iter().take(self.last).for_each(|&number| kept[number].push("last"));
        let seconds = |number: usize| (moments[number] / 1_000_000) as i64;
        let month = |seconds| {
            let [year, month, ..] = calendar(seconds);
            year * 12 + month
        };
        const DAY: i64 = 86_400;
        // 1970 began on a Thursday.
        let week = |seconds: i64| (seconds.div_euclid(DAY) + 3).div_euclid(7);
        type Period<'a> = (&'static str, usize, &'a dyn Fn(i64) -> i64);
        let periods: [Period<'_>; 4] = [
            ("hourly", self.hourly, &|seconds| seconds.div_euclid(3600)),
            ("daily", self.daily, &|seconds| seconds.div_euclid(DAY)),
            ("weekly", self.weekly, &week),
            ("monthly", self.monthly, &month),
        ];
        for (name, count, period) in periods {
            let (mut left, mut before) = (count, None);
            for &number in &order {
                let of = period(seconds(number));
                if left == 0 {
                    break;
                }
                if before != Some(of) {
                    kept[number].push(name);
                    (left, before) = (left - 1, Some(of));
                }
            }
        }
        kept
    }
}

/// Forgets snapshots: they are no longer found, and what nothing else refers to can be pruned.
/// Returns all that were looked at, with what has become of them.
///
/// # Errors
/// When nothing says what is kept, or the store fails.
pub fn forget(
    repository: &Repository,
    options: &ForgetOptions,
) -> Result<Vec<Looked>, RepositoryError> {
    let mut looked = Vec::new();
    if !options.names.is_empty() {
        for name in &options.names {
            let manifest = repository.resolve(name)?;
            let tags = repository.tags_of(manifest.id)?;
            looked.push(Looked { manifest, tags, kept_by: Vec::new() });
        }
    } else if options.retention.is_nothing() {
        let problem =
            "nothing says what is kept: set `ForgetOptions::retention`, or name snapshots";
        return Err(RepositoryError::Options(problem.into()));
    } else {
        let mut of: BTreeMap<String, Vec<Looked>> = BTreeMap::new();
        for (manifest, tags) in list(repository, options.machine.as_deref())? {
            let kept_by = if tags.is_empty() { Vec::new() } else { vec!["tag"] };
            let machine = manifest.machine.clone();
            of.entry(machine).or_default().push(Looked { manifest, tags, kept_by });
        }
        for (_, mut all) in of {
            let moments: Vec<u64> = all.iter().map(|one| one.manifest.moment_unix_us).collect();
            for (one, kept) in all.iter_mut().zip(options.retention.kept(&moments)) {
                one.kept_by.extend(kept);
            }
            looked.extend(all);
        }
    }
    if !options.dry_run {
        let gone = looked.iter().filter(|one| one.kept_by.is_empty());
        let gone: Vec<&SnapshotManifest> = gone.map(|one| &one.manifest).collect();
        remove(repository, &gone)?;
    }
    Ok(looked)
}

/// Removes manifests, and then their tags.
fn remove(repository: &Repository, gone: &[&SnapshotManifest]) -> Result<(), RepositoryError> {
    if gone.is_empty() {
        return Ok(());
    }
    let ids: BTreeSet<SnapshotId> = gone.iter().map(|manifest| manifest.id).collect();
    let of =
        |manifest: &&SnapshotManifest| (repository.manifests_under(&manifest.machine), manifest.id);
    let of: BTreeSet<(String, SnapshotId)> = gone.iter().map(of).collect();
    let is_gone = |one: &Snapshot| of.contains(&(one.folder().to_owned(), one.id));
    let mut removed = BTreeSet::new();
    loop {
        let Manifests { snapshots, replaced, unfinished, .. } = repository.all_manifests()?;
        let there = snapshots.into_iter().chain(replaced).chain(unfinished);
        let keys = there.filter(is_gone).map(|one| one.key);
        let keys: Vec<String> = keys.filter(|key| removed.insert(key.clone())).collect();
        if keys.is_empty() {
            break;
        }
        repository.remote.delete_all(keys)?;
        // And again: a prune may just have put others in their places. It looks whether what they
        // replace is still there, after it has put them; this looks after it has removed that. What makes
        // a manifest a draft is left to who has put it: the manifest may be about to follow.
    }
    let tags = all_tags(repository)?.into_iter().filter(|(id, _)| ids.contains(id));
    let keys = tags
        .flat_map(|(id, tags)| tags.into_iter().map(move |tag| (id, tag)))
        .map(|(id, tag)| repository.tag_key(id, &tag))
        .collect();
    Ok(repository.remote.delete_all(keys)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_rule_keeps_the_last_of_each_period() {
        const HOUR: u64 = 3_600_000_000;
        // 2026-11-25T00:30 and on: one each half hour for three days.
        let start = 1_795_564_800_000_000 + HOUR / 2;
        let moments: Vec<u64> = (0..144).map(|n| start + n * HOUR / 2).collect();
        let kept = |retention: Retention| {
            let kept = retention.kept(&moments);
            let kept = kept.iter().enumerate().filter(|(_, why)| !why.is_empty());
            kept.map(|(number, _)| number).collect::<Vec<_>>()
        };
        assert_eq!(kept(Retention { last: 2, ..Retention::default() }), [142, 143]);
        assert_eq!(kept(Retention { hourly: 2, ..Retention::default() }), [142, 143]);
        assert_eq!(kept(Retention { daily: 9, ..Retention::default() }), [46, 94, 142, 143]);
        assert_eq!(kept(Retention { monthly: 9, ..Retention::default() }), [143]);
        assert_eq!(kept(Retention { weekly: 1, last: 1, ..Retention::default() }), [143]);
        assert!(kept(Retention::default()).is_empty());
    }

    #[test]
    fn weeks_begin_on_mondays_and_months_on_their_first() {
        // Sunday 2026-11-29T23:59:59, a second later, and the first of December.
        let moments = [1_795_996_799_000_000, 1_795_996_800_000_000, 1_796_083_200_000_000];
        let weekly = Retention { weekly: 3, ..Retention::default() }.kept(&moments);
        assert_eq!(weekly, [vec!["weekly"], vec![], vec!["weekly"]]);
        let monthly = Retention { monthly: 3, ..Retention::default() }.kept(&moments);
        assert_eq!(monthly, [vec![], vec!["monthly"], vec!["monthly"]]);
    }
}
