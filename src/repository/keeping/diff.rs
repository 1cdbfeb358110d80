//! `diff`: what two snapshots don't have in common.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use schemars::JsonSchema;
use serde::Serialize;

use crate::repository::error::RepositoryError;
use crate::repository::format::ids::ExtentId;
use crate::repository::format::manifest::{FileRef, Role, SnapshotManifest};
use crate::repository::format::map::FileMap;
use crate::repository::reading::repository::Repository;

/// How a file, or the memory, of a snapshot differs from that of another one.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, JsonSchema)]
#[non_exhaustive]
pub struct Difference {
    /// What it is: `memory`, or a disk's file.
    pub what: String,
    /// Its length in the first, in bytes.
    pub before: Option<u64>,
    /// Its length in the second.
    pub after: Option<u64>,
    /// Bytes of data of the second that the first does not have: of a disk in the same place, of
    /// memory anywhere.
    pub new: u64,
    /// Bytes of data of the first that the second does not have.
    pub gone: u64,
}

/// Tells how snapshots of one repository differ, by what is stored of them: nothing is fetched but
/// their maps. Memory is compared with its parents, in pieces of some 64 KiB as they lie in the image;
/// disks in blocks of 64 KiB.
///
/// # Errors
/// When a map can't be read.
pub fn diff(
    repository: &Repository,
    a: &SnapshotManifest,
    b: &SnapshotManifest,
) -> Result<Vec<Difference>, RepositoryError> {
    let mut differences = vec![memory(repository, a, b)?];
    let disks = |of: &SnapshotManifest| -> BTreeMap<String, FileRef> {
        let disks = of.files.iter().filter(|file| file.role == Role::Disk);
        disks.map(|file| (file.path.clone(), file.clone())).collect()
    };
    let (before, after) = (disks(a), disks(b));
    let paths: BTreeSet<&String> = before.keys().chain(after.keys()).collect();
    for path in paths {
        let map = |file: Option<&FileRef>| file.map(|file| repository.map(file)).transpose();
        let (was, is) = (before.get(path), after.get(path));
        let same = was.zip(is).is_some_and(|(was, is)| was.map == is.map);
        let maps = if same { (None, None) } else { (map(was)?, map(is)?) };
        let place = |map: &Option<FileMap>| -> HashMap<u64, (ExtentId, u32)> {
            let extents = map.iter().flat_map(|map| &map.extents);
            extents.map(|extent| (extent.offset, (extent.id, extent.raw))).collect()
        };
        let (old, new) = (place(&maps.0), place(&maps.1));
        let only = |of: &HashMap<u64, (ExtentId, u32)>, other: &HashMap<u64, (ExtentId, u32)>| {
            let only = of.iter().filter(|(at, (id, _))| other.get(at).is_none_or(|(o, _)| o != id));
            only.map(|(_, (_, raw))| u64::from(*raw)).sum()
        };
        differences.push(Difference {
            what: path.clone(),
            before: was.map(|file| file.len),
            after: is.map(|file| file.len),
            new: only(&new, &old),
            gone: only(&old, &new),
        });
    }
    Ok(differences)
}

fn memory(
    repository: &Repository,
    a: &SnapshotManifest,
    b: &SnapshotManifest,
) -> Result<Difference, RepositoryError> {
    let pieces = |of: &SnapshotManifest| -> Result<HashMap<ExtentId, u64>, RepositoryError> {
        let mut pieces = HashMap::new();
        for file in of.files.iter().filter(|f| matches!(f.role, Role::Image | Role::Parent)) {
            let map = repository.map(file)?;
            pieces.extend(map.extents.iter().map(|extent| (extent.id, u64::from(extent.raw))));
        }
        Ok(pieces)
    };
    let (old, new) = (pieces(a)?, pieces(b)?);
    let only = |of: &HashMap<ExtentId, u64>, other: &HashMap<ExtentId, u64>| {
        of.iter().filter(|(id, _)| !other.contains_key(id)).map(|(_, raw)| raw).sum()
    };
    Ok(Difference {
        what: "memory".into(),
        before: Some(a.memory),
        after: Some(b.memory),
        new: only(&new, &old),
        gone: only(&old, &new),
    })
}
