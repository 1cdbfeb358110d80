//! `prune`: removes what nothing refers to, in two steps that a push or a revert beside it survives.
//!
//! First it is *marked*: no push refers to it from then on. After a time of grace, and after another
//! look, it is removed. What decides, in this order:
//!
//! 1. Packs and maps are listed, and marks read, before leases, and leases before manifests: what a
//!    push has put by the time of the listing is covered by its lease, or it has ended and its
//!    manifest is there.
//! 2. What was put after the first of the pushes began that are under way is not marked.
//! 3. A mark is not carried out as long as a push is under way that began before it: such a push does
//!    not know of it.
//! 4. What a revert reads is in its lease, and counts as what a manifest refers to.
//! 5. What a manifest refers to in whose place another one was put (`repack`) counts no more. It is
//!    marked like all else, and goes before that.
//! 6. A draft that is there when the leases are read again, and is older than all pushes under way, is one of
//!    a prune that was killed: it is removed.
//!
//! All times are the store's.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use crate::repository::error::RepositoryError;
use crate::repository::format::draft::Draft;
use crate::repository::format::envelope::Kind;
use crate::repository::format::ids::{MapId, ObjectId, PackId, random};
use crate::repository::format::manifest::SnapshotManifest;
use crate::repository::format::pack::split_index;
use crate::repository::keeping::repack;
use crate::repository::lease::{HOLDS, Held, Lease, host, leases};
use crate::repository::marks::{Mark, Marked, for_each_mark};
use crate::repository::reading::repository::{
    Manifests, Repository, map_key, map_of_key, pack_key,
};
use crate::repository::remote::Listing;
use crate::repository::writing::known::{close_index, index_key, open_head, open_index};

/// Stores tell times in whole seconds.
const SECOND: i64 = 1000;
/// What is read of an index to see which packs it is of.
const HEAD: u64 = 64 << 10;

/// How a prune goes.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct PruneOptions {
    /// For how long what was marked stays.
    pub grace: Duration,
    /// Which share of what is kept, from 0 to 1, may be bytes that nothing needs, in packs of which
    /// something else is needed. If it is more, what is needed of the emptiest packs is put into new
    /// ones.
    pub max_unused: f64,
    /// Only tell what would be done.
    pub dry_run: bool,
}

impl Default for PruneOptions {
    /// A day of grace, and a twentieth unused.
    fn default() -> PruneOptions {
        let grace = Duration::from_secs(24 * 60 * 60);
        PruneOptions { grace, max_unused: 0.05, dry_run: false }
    }
}

/// What a prune has done.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct Pruned {
    /// Packs that something refers to.
    pub kept_packs: u64,
    /// Their bytes.
    pub kept_bytes: u64,
    /// Packs that were marked now.
    pub marked_packs: u64,
    /// Their bytes.
    pub marked_bytes: u64,
    /// Packs that were marked before, and wait for their time.
    pub waiting_packs: u64,
    /// Packs that were removed.
    pub removed_packs: u64,
    /// Their bytes.
    pub removed_bytes: u64,
    /// Maps that were removed.
    pub removed_maps: u64,
    /// Packs of which a part was unused, and the rest was put into new packs.
    pub repacked_packs: u64,
    /// Bytes of these new packs.
    pub repacked_bytes: u64,
    /// Bytes that become free by that, once a later prune removes the old packs.
    pub freed_bytes: u64,
    /// Bytes of the packs that stay that nothing needs, at most.
    pub unused_bytes: u64,
    /// Packs that would be repacked as well, but snapshots that refer to them are signed with a key that was
    /// not given: put anew, these would not be signed any more.
    pub signed_packs: u64,
    /// Who keeps marks from being carried out.
    pub held_by: Vec<String>,
}

/// What is referred to, and who is at work.
struct Look {
    packs: HashSet<PackId>,
    maps: HashSet<MapId>,
    manifests: Vec<SnapshotManifest>,
    /// The manifests in whose places others were put, by their keys.
    replaced: Vec<String>,
    /// What makes manifests drafts.
    drafts: Vec<Draft>,
    /// Since when each push is under way, and who pushes.
    pushes: Vec<(i64, String)>,
    ended: Vec<String>,
}

/// Removes what nothing refers to.
///
/// # Errors
/// When the store fails, or a manifest is damaged: then nothing is known for sure, and nothing goes.
pub fn prune(repository: &Repository, options: &PruneOptions) -> Result<Pruned, RepositoryError> {
    let lease = Held::put(repository, &Lease::new(false))?;
    lease.while_held(|| {
        let now = lease.since_ms();
        let mut marks = Vec::new();
        let times = times(repository, "marks")?;
        for_each_mark(repository, |key, mark| {
            let put_ms = times.get(key).copied().unwrap_or(now);
            marks.push((key.to_owned(), put_ms, mark));
            Ok(())
        })?;
        let packs = repository.remote.list_each(pack_prefixes())?;
        let maps = repository.remote.list("maps")?;
        let mut look = look(repository, now)?;
        if !look.drafts.is_empty() && !options.dry_run {
            undo(repository, &look.drafts, now)?;
        }
        let mut pruned = Pruned::default();
        let grace = i64::try_from(options.grace.as_millis()).unwrap_or(i64::MAX);
        let mut marked = Marked::default();
        for (key, put_ms, mark) in marks {
            marked.add(&mark);
            match now.saturating_sub(put_ms) >= grace {
                true => sweep(repository, options, &look, &key, put_ms, mark, &mut pruned)?,
                false => pruned.waiting_packs += mark.packs.len() as u64,
            }
        }
        let found = unreferred(&look, &packs, &maps, &marked, &mut pruned);
        if !options.dry_run {
            repository.remote.delete_all(std::mem::take(&mut look.ended))?;
        }
        if !found.is_empty() {
            pruned.marked_packs = found.packs.len() as u64;
            pruned.marked_bytes = found.packs.iter().map(|(_, len)| len).sum();
            if !options.dry_run {
                mark(repository, options, found, &mut pruned)?;
            }
        }
        repack_some(repository, options, now, look, &packs, &marked, &mut pruned)?;
        pruned.held_by.sort();
        pruned.held_by.dedup();
        Ok(pruned)
    })
}

/// Repacks what is mostly unused, and marks what is left over. That is removed by a later prune, even
/// without grace: who has just read a manifest that was replaced has no lease yet.
fn repack_some(
    repository: &Repository,
    options: &PruneOptions,
    now: i64,
    look: Look,
    packs: &[Listing],
    marked: &Marked,
    pruned: &mut Pruned,
) -> Result<(), RepositoryError> {
    let listed = packs.iter().filter_map(|listing| Some((pack_of(listing)?, listing.len)));
    let stay = listed.filter(|(pack, _)| look.packs.contains(pack) && !marked.packs.contains(pack));
    let (stay, most) = (stay.collect(), options.max_unused);
    let done = repack::repack(repository, &stay, &look.manifests, most, options.dry_run)?;
    (pruned.repacked_packs, pruned.repacked_bytes) = (done.packs, done.bytes);
    (pruned.freed_bytes, pruned.unused_bytes) = (done.freed, done.unused);
    pruned.signed_packs = done.signed;
    let mut left = done.left;
    if left.is_empty() {
        return Ok(());
    }
    let look = self::look(repository, now)?;
    left.packs.retain(|(pack, _)| !look.packs.contains(pack));
    left.maps.retain(|map| !look.maps.contains(map));
    put_mark(repository, &left).map(drop)
}

/// Where packs lie.
pub fn pack_prefixes() -> Vec<String> {
    (0..=u8::MAX).map(|first| format!("packs/{first:02x}")).collect()
}

/// The pack that an object is.
pub fn pack_of(listing: &Listing) -> Option<PackId> {
    listing.key.rsplit('/').next()?.parse().ok()
}

fn times(repository: &Repository, under: &str) -> Result<HashMap<String, i64>, RepositoryError> {
    let listed = repository.remote.list(under)?;
    Ok(listed.into_iter().map(|listing| (listing.key, listing.put_ms)).collect())
}

/// Looks who is at work, and then what is referred to.
fn look(repository: &Repository, now: i64) -> Result<Look, RepositoryError> {
    let (mut packs, mut maps) = (HashSet::new(), HashSet::new());
    let (mut pushes, mut ended) = (Vec::new(), Vec::new());
    let holds = i64::try_from(HOLDS.as_millis()).unwrap_or(i64::MAX);
    for found in leases(repository)? {
        if now - found.put_ms > holds {
            ended.push(found.key);
            continue;
        }
        packs.extend(found.lease.packs);
        maps.extend(found.lease.maps);
        if found.lease.writes {
            pushes.push((found.lease.since_ms, found.lease.holder));
        }
    }
    let Manifests { snapshots, replaced, drafts, .. } = repository.all_manifests()?;
    let manifests = repository.manifests_of(&snapshots)?;
    for manifest in &manifests {
        packs.extend(manifest.packs.iter().copied());
        maps.extend(manifest.maps());
    }
    let replaced = replaced.into_iter().map(|snapshot| snapshot.key).collect();
    Ok(Look { packs, maps, manifests, replaced, drafts, pushes, ended })
}

impl Look {
    /// Whether what was put at this time is of nobody who is at work.
    fn is_old(&self, put_ms: i64) -> bool {
        self.pushes.iter().all(|(since, _)| put_ms < *since)
    }
}

/// Removes drafts of prunes that were killed, among those that were found.
fn undo(repository: &Repository, found: &[Draft], now: i64) -> Result<(), RepositoryError> {
    // Whoever has put one and is at work has put a lease before: it is found now, if it was not before. One
    // that has ended meanwhile has removed its draft, and what it has put counts.
    let again = look(repository, now)?;
    let is_left = |draft: &&Draft| again.is_old(draft.put_ms) && again.drafts.contains(draft);
    found.iter().filter(is_left).try_for_each(|draft| repository.undo_draft(draft))
}

/// What nothing refers to and is not marked yet.
fn unreferred(
    look: &Look,
    packs: &[Listing],
    maps: &[Listing],
    marked: &Marked,
    pruned: &mut Pruned,
) -> Mark {
    let replaced = look.replaced.iter().filter(|key| !marked.manifests.contains(*key));
    let mut found = Mark { manifests: replaced.cloned().collect(), ..Mark::default() };
    for listing in packs {
        let Some(pack) = pack_of(listing) else { continue };
        if look.packs.contains(&pack) {
            pruned.kept_packs += 1;
            pruned.kept_bytes += listing.len;
        } else if !marked.packs.contains(&pack) && look.is_old(listing.put_ms) {
            found.packs.push((pack, listing.len));
        }
    }
    for listing in maps {
        let Some(map) = map_of_key(&listing.key) else { continue };
        if !look.maps.contains(&map) && !marked.maps.contains(&map) && look.is_old(listing.put_ms) {
            found.maps.push(map);
        }
    }
    found
}

/// Puts a mark. Without grace it is carried out at once, after the second look.
fn mark(
    repository: &Repository,
    options: &PruneOptions,
    mark: Mark,
    pruned: &mut Pruned,
) -> Result<(), RepositoryError> {
    let key = put_mark(repository, &mark)?;
    if !options.grace.is_zero() {
        return Ok(());
    }
    let Some(put) = repository.remote.head(&key)? else { return Ok(()) };
    let look = look(repository, put.put_ms)?;
    sweep(repository, options, &look, &key, put.put_ms, mark, pruned)
}

/// Puts a mark. Returns its key.
fn put_mark(repository: &Repository, mark: &Mark) -> Result<String, RepositoryError> {
    let key = format!("marks/{}", ObjectId(random()));
    let mark = Mark { by: host(), ..mark.clone() };
    repository.remote.put(&key, repository.close_json(Kind::Mark, &key, &mark, true))?;
    Ok(key)
}

/// Carries out a mark.
fn sweep(
    repository: &Repository,
    options: &PruneOptions,
    look: &Look,
    key: &str,
    put_ms: i64,
    mark: Mark,
    pruned: &mut Pruned,
) -> Result<(), RepositoryError> {
    let unaware = look.pushes.iter().filter(|(since, _)| *since <= put_ms + SECOND);
    let unaware: Vec<String> = unaware.map(|(_, holder)| holder.clone()).collect();
    if !unaware.is_empty() {
        pruned.held_by.extend(unaware);
        pruned.waiting_packs += mark.packs.len() as u64;
        return Ok(());
    }
    let gone: Vec<(PackId, u64)> =
        mark.packs.into_iter().filter(|(pack, _)| !look.packs.contains(pack)).collect();
    let maps: Vec<MapId> = mark.maps.into_iter().filter(|map| !look.maps.contains(map)).collect();
    pruned.removed_packs += gone.len() as u64;
    pruned.removed_bytes += gone.iter().map(|(_, len)| len).sum::<u64>();
    pruned.removed_maps += maps.len() as u64;
    if options.dry_run {
        return Ok(());
    }
    // First what refers to the others.
    let replaced = look.replaced.iter().filter(|key| mark.manifests.contains(key));
    repository.remote.delete_all(replaced.cloned().collect())?;
    // What is removed must not be found by an index any more.
    leave_out(repository, &gone.iter().map(|(pack, _)| *pack).collect())?;
    let keys = maps.into_iter().map(map_key);
    let keys = keys.chain(gone.iter().map(|(pack, _)| pack_key(*pack)));
    repository.remote.delete_all(keys.collect())?;
    Ok(repository.remote.delete(key)?)
}

/// Leaves packs out of all indexes. Of those that are not of any, the heads alone are read.
fn leave_out(repository: &Repository, gone: &HashSet<PackId>) -> Result<(), RepositoryError> {
    if gone.is_empty() {
        return Ok(());
    }
    let listed = repository.remote.list("index")?;
    let heads = listed.iter().map(|listing| (listing.key.clone(), 0..listing.len.min(HEAD)));
    let heads = repository.remote.get_ranges(heads.collect())?;
    for (listing, bytes) in listed.iter().zip(heads) {
        let key = &listing.key;
        let head = |bytes: &[u8]| {
            split_index(bytes).and_then(|(head, _)| open_head(repository, key, head))
        };
        let (mut whole, mut packs) = (None, head(&bytes));
        if packs.is_err() && bytes.len() as u64 != listing.len {
            let all = whole.insert(repository.remote.get(key)?);
            packs = head(all);
        }
        let packs = packs.map_err(|problem| repository.damaged(key, problem))?;
        let left = packs.iter().filter(|(pack, _)| !gone.contains(pack)).count();
        if left == packs.len() {
            continue;
        }
        if left > 0 {
            let all = match whole {
                Some(all) => all,
                None => repository.remote.get(key)?,
            };
            let mut packs = open_index(repository, key, &all)?;
            packs.retain(|listed| !gone.contains(&listed.pack));
            let other = index_key(ObjectId(random()));
            repository.remote.put(&other, close_index(repository, &other, &packs))?;
        }
        repository.remote.delete(key)?;
    }
    Ok(())
}
