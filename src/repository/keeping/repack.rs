//! Repacking: what is still needed of packs that are partly unused is put into new ones, so that a prune
//! can remove the old ones as a whole.
//!
//! A map names packs, and a manifest names maps: so both are put anew, and nothing is altered in its
//! place. The new manifest is of the same snapshot and one microsecond later, which is how everybody knows
//! that it stands for the old one. Until a prune removes that, whoever has read it finds all that it refers
//! to. In this order:
//!
//! 1. A lease as that of a push: no prune marks what is put here, or carries out a mark beside it.
//! 2. Packs and maps, and then, one by one, manifests.
//! 3. Behind each of these it is looked whether the old one is still there. If it was forgotten, the new
//!    one goes, too. A `forget` looks in the opposite order, so one of them finds the other's. Until it has
//!    been looked, the new one is a draft, which counts for nothing.
//!
//! Killed at any time, it leaves snapshots that are whole, old or new, drafts, which the next prune removes,
//! and packs and maps that nothing refers to, as a push does.

use std::collections::{BTreeMap, HashMap, HashSet};

use crate::failpoint::failpoint;
use crate::repository::error::RepositoryError;
use crate::repository::format::envelope::Kind;
use crate::repository::format::ids::{ExtentId, MapId, PackId, random};
use crate::repository::format::manifest::SnapshotManifest;
use crate::repository::format::map::{Extent, FileMap};
use crate::repository::format::pack::room;
use crate::repository::lease::{Held, Lease};
use crate::repository::marks::Mark;
use crate::repository::reading::pull::parts;
use crate::repository::reading::repository::{Repository, map_key};
use crate::repository::signing::is_renewable;
use crate::repository::writing::known::Place;
use crate::repository::writing::packer::Packer;

/// How many bytes of packs are looked at in one run, those with the most unused ones: what is known of
/// each of their extents stays in memory, some 100 MB of all.
const LOOKED_AT: u64 = 256 << 30;
/// How many maps are read at once. Each can be of some 100 MB.
const MAPS_AT_ONCE: usize = 4;

/// What was repacked, or would be.
#[derive(Debug, Default)]
pub struct Repacked {
    /// Packs.
    pub packs: u64,
    /// Bytes that were needed of these, and were put into new ones.
    pub bytes: u64,
    /// Bytes that are free once the old ones are removed.
    pub freed: u64,
    /// Bytes of the packs that stay that nothing needs, at most.
    pub unused: u64,
    /// Packs that would be repacked as well, if what refers to them could be signed.
    pub signed: u64,
    /// What is left over, unless somebody still refers to it.
    pub left: Mark,
}

/// Repacks as many of these packs, each with its length, as brings their unused bytes under the share
/// `most` of all their bytes; first those of which the least has to be copied for what it frees. These
/// manifests are all that refer to them. Packs stay to which one refers that is signed with another key
/// than is given here for that.
///
/// # Errors
/// When the store fails, or something is damaged. Snapshots are whole nevertheless.
pub fn repack(
    repository: &Repository,
    packs: &HashMap<PackId, u64>,
    manifests: &[SnapshotManifest],
    most: f64,
    dry_run: bool,
) -> Result<Repacked, RepositoryError> {
    let Selected { packs: selected, unused, signed } = select(repository, packs, manifests, most)?;
    let bytes: u64 = selected.values().map(|of| of.used).sum();
    let freed = selected.values().map(Use::unused).sum();
    let (packs, left) = (selected.len() as u64, Mark::default());
    let mut repacked = Repacked { packs, bytes, freed, unused, signed, left };
    if selected.is_empty() || dry_run {
        return Ok(repacked);
    }
    let from: HashSet<PackId> = selected.keys().copied().collect();
    let lease = Held::put(repository, &Lease::new(true))?;
    repacked.left = lease.while_held(|| {
        let gaps = lease.gaps();
        let affected = || manifests.iter().filter(|of| refers_to(of, &from));
        let (put, maps) = Moving::new(repository, &from).all(maps_of(affected()))?;
        (repacked.bytes, repacked.freed) = (put, (bytes + freed).saturating_sub(put));
        failpoint("prune-before-manifests");
        let mut left = Mark::default();
        for old in affected() {
            if lease.gaps() != gaps {
                // What was put may have been removed meanwhile. A later prune begins again.
                break;
            }
            left.manifests.extend(replace(repository, old, renewed(old, &from, &maps))?);
        }
        left.maps = maps.into_keys().collect();
        left.packs = selected.into_iter().map(|(pack, of)| (pack, of.len)).collect();
        Ok(left)
    })?;
    Ok(repacked)
}

/// How much of a pack is used: at least so much.
#[derive(Debug, Clone, Copy)]
struct Use {
    len: u64,
    used: u64,
}

impl Use {
    fn unused(&self) -> u64 {
        self.len.saturating_sub(self.used)
    }
}

/// Which packs are repacked.
#[derive(Default)]
struct Selected {
    packs: HashMap<PackId, Use>,
    /// How many unused bytes the others have at most.
    unused: u64,
    /// How many of the others have some, and stay for the signatures of what refers to them.
    signed: u64,
}

/// Selects the packs that are repacked.
fn select(
    repository: &Repository,
    packs: &HashMap<PackId, u64>,
    manifests: &[SnapshotManifest],
    most: f64,
) -> Result<Selected, RepositoryError> {
    let mut uses: HashMap<PackId, Use> = HashMap::new();
    for (pack, used) in manifests.iter().flat_map(SnapshotManifest::used) {
        if let Some(&len) = packs.get(&pack) {
            let of = uses.entry(pack).or_insert(Use { len, used });
            of.used = of.used.max(used);
        }
    }
    let mut whole: u64 = uses.values().map(|of| of.len).sum();
    let unused = |uses: &HashMap<PackId, Use>| uses.values().map(Use::unused).sum::<u64>();
    let fits = |unused: u64, whole: u64| unused as f64 <= whole as f64 * most;
    // What manifests tell is mostly enough: of a pack whose own snapshot is there, all is used.
    let mut left = unused(&uses);
    if fits(left, whole) {
        return Ok(Selected { unused: left, ..Selected::default() });
    }
    // A manifest that is put anew would lose a signature with another key: what it refers to stays.
    let fixed = manifests.iter().filter(|of| !is_renewable(of.seal));
    let fixed: HashSet<PackId> = fixed.flat_map(|of| of.packs.iter().copied()).collect();
    let looked_at = most_unused(&uses, &fixed);
    for (pack, used) in look_at(repository, manifests, &looked_at)? {
        uses.entry(pack).and_modify(|of| of.used = used);
    }
    left = unused(&uses);
    let found = looked_at.iter().map(|pack| (*pack, uses[pack])).filter(|(_, of)| of.unused() > 0);
    let (signed, mut found): (Vec<_>, Vec<(PackId, Use)>) =
        found.partition(|(pack, _)| fixed.contains(pack));
    // What is copied for each byte that it frees.
    let cost = |of: &Use| of.used as f64 / of.unused() as f64;
    found.sort_by(|(a, of_a), (b, of_b)| cost(of_a).total_cmp(&cost(of_b)).then(a.cmp(b)));
    let mut selected = HashMap::new();
    for (pack, of) in found {
        if fits(left, whole) {
            break;
        }
        left -= of.unused();
        whole -= of.unused();
        selected.insert(pack, of);
    }
    let signed = if fits(left, whole) { 0 } else { signed.len() as u64 };
    Ok(Selected { packs: selected, unused: left, signed })
}

/// The packs of which the most may be unused, as many as are looked at in one run; first those that can be
/// repacked.
fn most_unused(uses: &HashMap<PackId, Use>, fixed: &HashSet<PackId>) -> HashSet<PackId> {
    let mut found: Vec<(&PackId, &Use)> = uses.iter().filter(|(_, of)| of.unused() > 0).collect();
    found.sort_by_key(|(pack, of)| (fixed.contains(pack), std::cmp::Reverse(of.unused()), **pack));
    let mut bytes = 0;
    let fits = found.into_iter().take_while(|(_, of)| {
        bytes += of.len;
        bytes <= LOOKED_AT
    });
    fits.map(|(pack, _)| *pack).collect()
}

/// Reads how much of each of these packs is used.
fn look_at(
    repository: &Repository,
    manifests: &[SnapshotManifest],
    packs: &HashSet<PackId>,
) -> Result<HashMap<PackId, u64>, RepositoryError> {
    let mut seen: HashMap<PackId, (HashSet<u32>, u64)> =
        packs.iter().map(|pack| (*pack, Default::default())).collect();
    let maps = maps_of(manifests.iter().filter(|of| refers_to(of, packs)));
    for some in maps.chunks(MAPS_AT_ONCE) {
        let keys = some.iter().map(|map| map_key(*map)).collect();
        repository.remote.get_each(keys, |key, stored| {
            for extent in repository.open_map_at(key, &stored)?.extents {
                if let Some((places, stored)) = seen.get_mut(&extent.pack)
                    && places.insert(extent.at)
                {
                    *stored += u64::from(extent.stored);
                }
            }
            Ok(())
        })?;
    }
    let used = |(pack, (places, stored)): (PackId, (HashSet<u32>, u64))| {
        (pack, room(places.len(), stored))
    };
    Ok(seen.into_iter().map(used).collect())
}

fn refers_to(manifest: &SnapshotManifest, packs: &HashSet<PackId>) -> bool {
    manifest.packs.iter().any(|pack| packs.contains(pack))
}

/// The maps of manifests, each once, in their order.
fn maps_of<'a>(manifests: impl Iterator<Item = &'a SnapshotManifest>) -> Vec<MapId> {
    let mut seen = HashSet::new();
    manifests.flat_map(SnapshotManifest::maps).filter(|map| seen.insert(*map)).collect()
}

/// A map in whose place another one was put.
struct NewMap {
    id: MapId,
    /// What it uses of each pack.
    used: BTreeMap<PackId, u64>,
}

/// Extents on their way into new packs.
struct Moving<'a> {
    repository: &'a Repository,
    packer: Packer<'a>,
    /// The packs that they come from.
    from: &'a HashSet<PackId>,
    moved: HashMap<ExtentId, Place>,
}

impl<'a> Moving<'a> {
    fn new(repository: &'a Repository, from: &'a HashSet<PackId>) -> Moving<'a> {
        Moving { repository, packer: Packer::new(repository), from, moved: HashMap::new() }
    }

    /// Moves what these maps refer to, and puts maps that refer to its new places in place of those that
    /// do. Returns the bytes of the new packs, and the new maps by the old ones.
    fn all(mut self, maps: Vec<MapId>) -> Result<(u64, HashMap<MapId, NewMap>), RepositoryError> {
        let mut new = HashMap::new();
        for old in maps {
            let map = self.repository.map_of(old)?;
            if !map.extents.iter().any(|extent| self.from.contains(&extent.pack)) {
                continue;
            }
            let map = self.one(map)?;
            self.packer.end_file()?;
            let body = map.encode();
            let id = self.repository.keys.map_id(&body);
            let key = map_key(id);
            let object = self.repository.keys.close(Kind::Map, &key, &body, true);
            self.repository.remote.put(&key, object)?;
            new.insert(old, NewMap { id, used: FileMap::used(&[&map]) });
        }
        let put = self.packer.finish()?;
        Ok((put.iter().map(|listed| listed.len).sum(), new))
    }

    /// Moves what a map refers to, as it is stored, in the order of the file. Each extent is verified.
    fn one(&mut self, mut map: FileMap) -> Result<FileMap, RepositoryError> {
        let mut seen = HashSet::new();
        let wanted = map.extents.iter().filter(|extent| self.from.contains(&extent.pack));
        let wanted = wanted.filter(|extent| !self.moved.contains_key(&extent.id));
        let wanted: Vec<Extent> = wanted.filter(|extent| seen.insert(extent.id)).copied().collect();
        for part in parts(&wanted) {
            if self.repository.access.cancel().is_requested() {
                return Err(RepositoryError::Interrupted);
            }
            for (extent, fetched) in part.iter().zip(self.repository.fetch_extents(part)?) {
                let raw = fetched.bytes?;
                let place = self.packer.add(extent.id, &fetched.stored, raw.len())?;
                self.moved.insert(extent.id, place);
            }
        }
        for extent in map.extents.iter_mut().filter(|extent| self.from.contains(&extent.pack)) {
            if let Some(&Place { pack, at, stored, raw }) = self.moved.get(&extent.id) {
                *extent = Extent { pack, at, stored, raw, ..*extent };
            }
        }
        // As that of a push: no name comes again.
        map.salt = random();
        Ok(map)
    }
}

/// The manifest that is put in place of this one.
fn renewed(
    old: &SnapshotManifest,
    from: &HashSet<PackId>,
    maps: &HashMap<MapId, NewMap>,
) -> SnapshotManifest {
    let mut new = old.clone();
    new.moment_unix_us = old.moment_unix_us.saturating_add(1);
    let stay = old.used().filter(|(pack, _)| !from.contains(pack));
    let mut used: BTreeMap<PackId, u64> = stay.collect();
    for file in &mut new.files {
        let Some(map) = maps.get(&file.map) else { continue };
        file.map = map.id;
        for (pack, bytes) in &map.used {
            let of = used.entry(*pack).or_default();
            *of = (*of).max(*bytes);
        }
    }
    new.refer_to(&used);
    new
}

/// Puts a manifest in place of another one. Returns the key of that, unless it is not there any more, or
/// another prune was faster.
fn replace(
    repository: &Repository,
    old: &SnapshotManifest,
    mut new: SnapshotManifest,
) -> Result<Option<String>, RepositoryError> {
    let (key, old) = (repository.manifest_key(&new), repository.manifest_key(old));
    let draft = repository.begin_draft(&key)?;
    new.draft = Some(draft.id);
    failpoint("prune-behind-draft");
    let object = repository.close_manifest(&key, &new);
    let is_put = repository.remote.create(&key, object)?;
    failpoint("prune-behind-manifest");
    let replaces = is_put && repository.remote.head(&old)?.is_some();
    if is_put && !replaces {
        repository.remote.delete(&key)?;
    }
    failpoint("prune-behind-look");
    // Whatever is there counts from here on.
    repository.remote.delete(&draft.key)?;
    Ok(replaces.then_some(old))
}
