//! `check`: whether all that is referred to is there, and whole.

use std::collections::{BTreeSet, HashMap, HashSet};

use schemars::JsonSchema;
use serde::Serialize;

use super::prune::{pack_of, pack_prefixes};
use crate::repository::error::{RepositoryError, StoreFailure};
use crate::repository::format::envelope::Kind;
use crate::repository::format::ids::{MapId, PackId, random};
use crate::repository::format::manifest::SnapshotManifest;
use crate::repository::format::map::{Extent, FileMap};
use crate::repository::format::pack::{MAX_PACK, TRAILER, footer_len, read_footer};
use crate::repository::reading::repository::{Repository, map_key, pack_key};
use crate::repository::writing::known::{MAX_INDEX, for_each_index};

/// How far a check goes.
#[derive(Debug, Clone, Default, PartialEq)]
#[non_exhaustive]
pub struct CheckOptions {
    /// Read this share of the packs, from 0 to 1, chosen at random, and verify all that lies in them.
    pub read_data: f64,
}

/// Something that is not what it should be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
#[non_exhaustive]
pub struct RepositoryDamage {
    /// The object.
    pub object: String,
    /// What is wrong with it.
    pub problem: String,
    /// The snapshots that can't be reverted because of it.
    pub snapshots: BTreeSet<String>,
}

/// What a check has looked at.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, JsonSchema)]
#[non_exhaustive]
pub struct Checked {
    /// Snapshots.
    pub snapshots: u64,
    /// Files of them; what they share counts once.
    pub maps: u64,
    /// Packs that there are.
    pub packs: u64,
    /// Their bytes.
    pub pack_bytes: u64,
    /// Packs that were read and verified.
    pub read_packs: u64,
    /// Packs that nothing refers to: a prune removes them, or a push goes on with them.
    pub unreferred_packs: u64,
}

/// A check under way.
struct Checking<'a> {
    repository: &'a Repository,
    packs: HashMap<PackId, u64>,
    /// The snapshots that refer to each pack.
    used_by: HashMap<PackId, BTreeSet<String>>,
    on_damage: &'a mut dyn FnMut(RepositoryDamage),
    checked: Checked,
    damages: u64,
}

/// Checks a repository. `on_damage` is told what is wrong.
///
/// # Errors
/// When the store fails. Damage is told, and is no error of this.
pub fn check(
    repository: &Repository,
    options: &CheckOptions,
    mut on_damage: impl FnMut(RepositoryDamage),
) -> Result<(Checked, u64), RepositoryError> {
    // Packs behind manifests: what a push adds meanwhile is there by then.
    let snapshots = repository.snapshots()?;
    let mut manifests = Vec::new();
    let mut unreadable = Vec::new();
    for snapshot in &snapshots {
        match repository.manifest(snapshot) {
            Ok(manifest) => manifests.push(manifest),
            Err(error) => unreadable.push((snapshot, error)),
        }
    }
    let listed = repository.remote.list_each(pack_prefixes())?;
    let packs: HashMap<PackId, u64> =
        listed.iter().filter_map(|listing| Some((pack_of(listing)?, listing.len))).collect();
    let checked = Checked {
        snapshots: snapshots.len() as u64,
        packs: packs.len() as u64,
        pack_bytes: packs.values().sum(),
        ..Checked::default()
    };
    let (used_by, on_damage) = (HashMap::new(), &mut on_damage);
    let mut checking = Checking { repository, packs, used_by, on_damage, checked, damages: 0 };
    for (snapshot, error) in unreadable {
        // Forgotten meanwhile, it is none.
        if !is_gone(&error) {
            checking.tell(&snapshot.key, &error, [snapshot.id.to_string()].into());
        }
    }
    checking.maps(&manifests)?;
    checking.indexes()?;
    checking.data(options.read_data)?;
    Ok((checking.checked, checking.damages))
}

fn is_gone(error: &RepositoryError) -> bool {
    matches!(error, RepositoryError::Store(error) if error.failure == StoreFailure::NotFound)
}

impl Checking<'_> {
    fn tell(&mut self, object: &str, error: &dyn ToString, snapshots: BTreeSet<String>) {
        self.damages += 1;
        let (object, problem) = (object.to_owned(), error.to_string());
        (self.on_damage)(RepositoryDamage { object, problem, snapshots });
    }

    /// Reads all maps, and looks whether their extents lie in packs that are there.
    fn maps(&mut self, manifests: &[SnapshotManifest]) -> Result<(), RepositoryError> {
        let mut users: HashMap<MapId, BTreeSet<String>> = HashMap::new();
        for manifest in manifests {
            let id = manifest.id.to_string();
            for map in manifest.maps() {
                users.entry(map).or_default().insert(id.clone());
            }
            for pack in &manifest.packs {
                self.used_by.entry(*pack).or_default().insert(id.clone());
            }
        }
        self.checked.maps = users.len() as u64;
        let packs_of: HashMap<String, &SnapshotManifest> =
            manifests.iter().map(|manifest| (manifest.id.to_string(), manifest)).collect();
        for (id, snapshots) in users {
            let key = map_key(id);
            let map = match self.repository.map_of(id) {
                Ok(map) => map,
                Err(RepositoryError::Store(error)) if error.failure != StoreFailure::NotFound => {
                    return Err(error.into());
                }
                Err(error) => {
                    self.tell(&key, &error, snapshots);
                    continue;
                }
            };
            // What its manifest does not list a prune would remove.
            let of_map = map.packs();
            let lists = |id: &String| {
                packs_of.get(id).is_some_and(|m| of_map.iter().all(|pack| m.packs.contains(pack)))
            };
            if let Some(id) = snapshots.iter().find(|id| !lists(id)) {
                let problem = format!("the manifest of {id} does not list all packs of it");
                self.tell(&key, &problem, snapshots.clone());
            }
            if let Some(problem) = self.lost(&map) {
                self.tell(&key, &problem, snapshots);
            }
        }
        let used = self.packs.keys().filter(|pack| self.used_by.contains_key(pack)).count();
        self.checked.unreferred_packs = (self.packs.len() - used) as u64;
        Ok(())
    }

    /// What of a map's extents is not there.
    fn lost(&self, map: &FileMap) -> Option<String> {
        let is_lost = |extent: &&Extent| {
            let end = u64::from(extent.at) + u64::from(extent.stored);
            self.packs.get(&extent.pack).is_none_or(|len| end > *len)
        };
        let lost: Vec<&Extent> = map.extents.iter().filter(is_lost).collect();
        let bytes: u64 = lost.iter().map(|extent| u64::from(extent.raw)).sum();
        let packs: HashSet<PackId> = lost.iter().map(|extent| extent.pack).collect();
        let first = packs.iter().next()?;
        let key = pack_key(*first);
        Some(format!("{bytes} bytes lie in {} packs that are not there, as `{key}`", packs.len()))
    }

    /// Looks whether indexes list packs that are not there: a push would refer to them, and be told.
    fn indexes(&mut self) -> Result<(), RepositoryError> {
        let mut lost = Vec::new();
        let packs = &self.packs;
        let read = for_each_index(self.repository, |key, listed| {
            let gone = listed.iter().filter(|listed| packs.get(&listed.pack) != Some(&listed.len));
            lost.extend(gone.map(|listed| (key.to_owned(), pack_key(listed.pack))));
            Ok(())
        });
        match read {
            Err(RepositoryError::Damaged { object, problem, .. }) => {
                self.tell(&object, &problem, BTreeSet::new());
            }
            read => read?,
        }
        for (key, pack) in lost {
            let problem = format!("it lists `{pack}`, which is not there, or of another length");
            self.tell(&key, &problem, BTreeSet::new());
        }
        Ok(())
    }

    /// Reads a share of the packs.
    fn data(&mut self, share: f64) -> Result<(), RepositoryError> {
        let mut packs: Vec<(PackId, u64)> = self.packs.iter().map(|(p, len)| (*p, *len)).collect();
        // Their names are random; so is where it begins among them.
        packs.sort();
        let count = (packs.len() as f64 * share.clamp(0.0, 1.0)).ceil() as usize;
        let start = packs.partition_point(|(pack, _)| pack.0 < random());
        let last = packs.len().saturating_sub(1);
        packs.rotate_left(start.min(last));
        for (pack, len) in packs.into_iter().take(count) {
            if self.repository.access.cancel().is_requested() {
                return Err(RepositoryError::Interrupted);
            }
            let problem = match self.pack(pack, len) {
                Ok(()) => None,
                Err(RepositoryError::Damaged { problem, .. }) => Some(problem),
                // Pruned meanwhile, or lost: what refers to it was told above.
                Err(error) if is_gone(&error) => Some("it is not there any more".into()),
                Err(error) => return Err(error),
            };
            self.checked.read_packs += 1;
            if let Some(problem) = problem {
                let snapshots = self.used_by.get(&pack).cloned().unwrap_or_default();
                self.tell(&pack_key(pack), &problem, snapshots);
            }
        }
        Ok(())
    }

    /// Reads a pack as a whole, and verifies each extent in it.
    fn pack(&self, pack: PackId, len: u64) -> Result<(), RepositoryError> {
        let key = pack_key(pack);
        let damaged = |problem| self.repository.damaged(&key, problem);
        if len > MAX_PACK {
            return Err(damaged(format!("it has {len} bytes")));
        }
        let bytes = self.repository.remote.get(&key)?;
        let open = || {
            let footer = footer_len(&bytes, bytes.len() as u64)?;
            let end = bytes.len() - TRAILER;
            let footer = &bytes[end - footer..end];
            read_footer(&self.repository.keys.open(Kind::Footer, &key, footer, MAX_INDEX)?)
        };
        for entry in open().map_err(damaged)? {
            let (at, end) = (entry.at as usize, entry.at as usize + entry.stored as usize);
            let stored = bytes.get(at..end).ok_or_else(|| damaged("it is cut short".into()))?;
            let opened = self.repository.keys.open_extent(&entry.id, stored, entry.raw as usize);
            opened.map_err(|problem| damaged(format!("extent {} at {at}: {problem}", entry.id)))?;
        }
        Ok(())
    }
}
