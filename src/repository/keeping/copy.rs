//! `copy`: snapshots from one repository to another, each with its own key.

use std::collections::{HashMap, HashSet};

use crate::repository::Moved;
use crate::repository::error::RepositoryError;
use crate::repository::format::ids::{MapId, PackId, random};
use crate::repository::format::manifest::SnapshotManifest;
use crate::repository::format::map::{Extent, FileMap};
use crate::repository::keeping::tag::tag;
use crate::repository::lease::{Held, Lease};
use crate::repository::marks::marked;
use crate::repository::reading::pull::parts;
use crate::repository::reading::repository::{Repository, pack_key};
use crate::repository::writing::commit::{commit, put_maps};
use crate::repository::writing::known::{Known, Place};
use crate::repository::writing::packer::Packer;

/// Copies a snapshot, with its tags. What is there already is not sent again, nor fetched where both
/// repositories are not encrypted. It is signed anew, with the key given for that, or not at all: a
/// signature holds in one repository. Returns its manifest there, and whether it was there before.
///
/// # Errors
/// When it can't be read or written; when it is there already, and would have been signed.
pub fn copy(
    from: &Repository,
    manifest: &SnapshotManifest,
    to: &Repository,
    mut on_progress: impl FnMut(Moved),
) -> Result<(SnapshotManifest, bool), RepositoryError> {
    let tags = from.tags_of(manifest.id)?;
    tag(to, manifest, &tags, &Default::default())?;
    if let Some(there) = to.find(manifest)? {
        return Ok((to.was_there(to.manifest(&there)?)?, true));
    }
    let key = to.manifest_key(manifest);
    let reads = Held::put(from, &Lease::reading(manifest))?;
    let writes = Held::put(to, &Lease::new(true))?;
    reads.while_held(|| {
        writes.while_held(|| {
            commit(to, &key, &writes, |gone| {
                Copying::new(from, to, gone, &mut on_progress)?.all(manifest)
            })
        })
    })
}

/// A copy under way.
struct Copying<'a> {
    from: &'a Repository,
    to: &'a Repository,
    known: Known,
    packer: Packer<'a>,
    on_progress: &'a mut dyn FnMut(Moved),
    moved: Moved,
}

impl<'a> Copying<'a> {
    fn new(
        from: &'a Repository,
        to: &'a Repository,
        gone: &HashSet<PackId>,
        on_progress: &'a mut dyn FnMut(Moved),
    ) -> Result<Copying<'a>, RepositoryError> {
        let mut without = marked(to)?.packs;
        without.extend(gone);
        let known = Known::read(to, &without)?;
        let (packer, moved) = (Packer::new(to), Moved::default());
        Ok(Copying { from, to, known, packer, on_progress, moved })
    }

    fn all(
        mut self,
        manifest: &SnapshotManifest,
    ) -> Result<(SnapshotManifest, Vec<PackId>), RepositoryError> {
        let seal = self.to.signing.own_seal();
        let mut copied = SnapshotManifest { draft: None, seal, ..manifest.clone() };
        self.moved.total = manifest.bytes;
        let mut maps: HashMap<MapId, FileMap> = HashMap::new();
        let mut ids: HashMap<MapId, MapId> = HashMap::new();
        let mut new = Vec::new();
        for file in &mut copied.files {
            file.map = match ids.get(&file.map) {
                Some(id) => *id,
                None => {
                    let map = self.file(self.from.map(file)?)?;
                    self.packer.end_file()?;
                    let body = map.encode();
                    let id = self.to.keys.map_id(&body);
                    new.push((id, body));
                    ids.insert(file.map, id);
                    maps.insert(id, map);
                    id
                }
            };
            self.moved.done += file.len;
            (self.on_progress)(self.moved);
        }
        let of_files: Vec<&FileMap> = copied.files.iter().map(|file| &maps[&file.map]).collect();
        let missing = put_maps(self.to, self.packer, &mut copied, &of_files, new)?;
        Ok((copied, missing))
    }

    /// Copies what a file consists of.
    fn file(&mut self, map: FileMap) -> Result<FileMap, RepositoryError> {
        let mut extents = Vec::with_capacity(map.extents.len());
        // Their names mean the same in both.
        let same = !self.from.keys.encrypt() && !self.to.keys.encrypt();
        for part in parts(&map.extents) {
            if self.from.access.cancel().is_requested() || self.to.access.cancel().is_requested() {
                return Err(RepositoryError::Interrupted);
            }
            let is_there = |extent: &&Extent| same && self.known.find(&extent.id).is_some();
            let wanted: Vec<Extent> =
                part.iter().filter(|extent| !is_there(extent)).copied().collect();
            let mut read = self.from.read_extents(&wanted)?.into_iter();
            let mut wanted = wanted.iter().map(|extent| extent.offset).peekable();
            for extent in part {
                let raw = wanted.next_if_eq(&extent.offset).and_then(|_| read.next());
                let (id, place) = match &raw {
                    // It was found above.
                    None => (extent.id, self.known.find(&extent.id)),
                    Some(raw) => {
                        let id = self.to.keys.extent_id(raw);
                        (id, self.known.find(&id))
                    }
                };
                let place = match (place, raw) {
                    (Some(place), _) => place,
                    (None, Some(raw)) => {
                        // As it was found worth in the other one.
                        let stored = extent.stored as usize - self.from.keys.overhead();
                        let compress = stored < extent.raw as usize;
                        let stored = self.to.keys.close_extent(&id, &raw, compress);
                        let place = self.packer.add(id, &stored, raw.len())?;
                        self.known.note(id, place);
                        place
                    }
                    (None, None) => {
                        let problem = format!("extent {id} was not read");
                        return Err(self.from.damaged(&pack_key(extent.pack), problem));
                    }
                };
                let Place { pack, at, stored, raw } = place;
                extents.push(Extent { offset: extent.offset, raw, pack, at, stored, id });
            }
            self.moved.sent = self.packer.sent();
            (self.on_progress)(self.moved);
        }
        Ok(FileMap { salt: random(), extents, ..map })
    }
}
