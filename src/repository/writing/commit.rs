//! The end of a push or a copy: a snapshot is seen once all that it refers to is there.

use std::collections::HashSet;

use super::packer::Packer;
use crate::failpoint::failpoint;
use crate::repository::error::RepositoryError;
use crate::repository::format::envelope::Kind;
use crate::repository::format::ids::{MapId, PackId};
use crate::repository::format::manifest::SnapshotManifest;
use crate::repository::format::map::FileMap;
use crate::repository::lease::Held;
use crate::repository::reading::repository::{Repository, map_key, pack_key};

/// How often packs that went away meanwhile are made up for.
const TRIES: u32 = 3;

/// Has `attempt` put into a repository what a snapshot consists of, and then puts its manifest: an attempt
/// is told which packs are not to be referred to, and returns those that went away meanwhile. `lease` is
/// held all the while. Returns the manifest that is there, and whether somebody else has put it.
///
/// # Errors
/// When an attempt fails, or packs go away again and again.
pub fn commit(
    repository: &Repository,
    key: &str,
    lease: &Held<'_>,
    mut attempt: impl FnMut(
        &HashSet<PackId>,
    ) -> Result<(SnapshotManifest, Vec<PackId>), RepositoryError>,
) -> Result<(SnapshotManifest, bool), RepositoryError> {
    let mut gone = HashSet::new();
    for _ in 0..TRIES {
        let gaps = lease.gaps();
        let (manifest, missing) = attempt(&gone)?;
        if missing.is_empty() && lease.gaps() == gaps {
            failpoint("push-before-manifest");
            let object = repository.close_manifest(key, &manifest);
            return Ok(match repository.remote.create(key, object)? {
                true => (manifest, false),
                false => (repository.was_there(repository.manifest_at(key)?)?, true),
            });
        }
        gone.extend(missing);
    }
    Err(RepositoryError::Options(
        "packs go away as fast as they are referred to: is another program at work there?".into(),
    ))
}

/// Sends the last pack and the maps that are new, and notes in the manifest what its files, which
/// consist of `maps`, take and refer to. Returns the packs of others that went away meanwhile.
///
/// # Errors
/// When the store fails.
pub fn put_maps(
    repository: &Repository,
    packer: Packer<'_>,
    manifest: &mut SnapshotManifest,
    maps: &[&FileMap],
    new: Vec<(MapId, Vec<u8>)>,
) -> Result<Vec<PackId>, RepositoryError> {
    let own = packer.finish()?;
    manifest.own = own.iter().map(|listed| listed.len).sum();
    manifest.stored = maps.iter().map(|map| map.stored()).sum();
    manifest.refer_to(&FileMap::used(maps));
    for (id, body) in new {
        let key = map_key(id);
        let object = repository.keys.close(Kind::Map, &key, &body, true);
        repository.remote.put(&key, object)?;
    }
    failpoint("push-before-look");
    let own: HashSet<PackId> = own.iter().map(|listed| listed.pack).collect();
    let others: Vec<PackId> =
        manifest.packs.iter().filter(|pack| !own.contains(pack)).copied().collect();
    let there = repository.remote.exist(others.iter().map(|pack| pack_key(*pack)).collect())?;
    let missing = others.into_iter().zip(there).filter(|(_, there)| !there);
    Ok(missing.map(|(pack, _)| pack).collect())
}
