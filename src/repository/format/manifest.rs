//! The manifest of a snapshot: what it is of, and which files belong to it.

use std::collections::{BTreeMap, BTreeSet};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::ids::{MapId, ObjectId, PackId, SnapshotId};
use crate::identity::Identity;

/// The longest manifest.
pub const MAX_MANIFEST: u64 = 64 << 20;

/// A snapshot in a repository. Fields that are not known are ignored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct SnapshotManifest {
    /// The snapshot: the identity of its image.
    pub id: SnapshotId,
    /// The machine's name.
    pub machine: String,
    /// The moment, in microseconds since 1970 (UTC).
    pub moment_unix_us: u64,
    /// When it was put here, in microseconds since 1970 (UTC).
    pub pushed_unix_us: u64,
    /// The tags that it was put here with.
    pub tags: BTreeSet<String>,
    /// The host that put it here.
    pub host: String,
    /// The program that put it here.
    pub created_by: String,
    /// The images that this one refers to.
    pub parents: Vec<SnapshotId>,
    /// The machine's memory in bytes.
    pub memory: u64,
    /// Bytes of its files.
    pub bytes: u64,
    /// Bytes that its files take in packs; what two of them share counts twice.
    pub stored: u64,
    /// Bytes of packs that came with it.
    pub own: u64,
    /// How it is to be reverted at another site: options by name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub profile: BTreeMap<String, Vec<String>>,
    /// Its files, its image first.
    pub files: Vec<FileRef>,
    /// All packs that its files refer to.
    pub packs: BTreeSet<PackId>,
    /// What they use of each of these, in bytes and in their order: a prune that finds them to use a
    /// pack as a whole need not read what they consist of. It may be more than this.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub used: Vec<u64>,
    /// What makes it a draft while that is there, an object beside it: a prune has put it, and has not yet
    /// looked whether the snapshot was forgotten meanwhile.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub draft: Option<ObjectId>,
    /// Who has signed it. Whether it is signed when it is put follows from this.
    #[serde(skip)]
    pub(crate) seal: Seal,
}

/// Who has signed a manifest, as far as the keys tell that are given.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Seal {
    /// Nobody.
    #[default]
    None,
    /// Somebody else; or it was altered since, or is in another one's place.
    Unknown,
    /// Who has a key that is trusted.
    Trusted,
    /// Who has the key that this program signs with.
    Own,
}

/// A file of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct FileRef {
    /// What it is.
    pub role: Role,
    /// Its absolute path on the host that put it here.
    pub path: String,
    /// Its length in bytes.
    pub len: u64,
    /// What it consists of.
    pub map: MapId,
    /// The image that it is, if it is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<Identity>,
}

impl FileRef {
    /// A file.
    pub fn new(role: Role, path: String, len: u64, map: MapId, image: Option<Identity>) -> FileRef {
        FileRef { role, path, len, map, image }
    }

    /// Its name without the directory.
    pub fn name(&self) -> &str {
        self.path.rsplit('/').next().unwrap_or(&self.path)
    }
}

/// What a file of a snapshot is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// The image.
    Image,
    /// An image that it refers to.
    Parent,
    /// A file of a disk.
    Disk,
    /// What guests of the image ask for first.
    WorkingSet,
}

/// Whether a machine or a tag can be called so: nothing in it means something else in a name, in a
/// key, or in a path.
pub fn is_name(name: &str) -> bool {
    let fits = !name.is_empty() && name.len() <= 128 && !matches!(name, "." | "..");
    fits && !name.contains(['@', '/']) && !name.contains(char::is_control)
}

impl SnapshotManifest {
    /// Its image.
    pub fn image(&self) -> Option<&FileRef> {
        self.files.iter().find(|file| file.role == Role::Image)
    }

    /// The packs that it refers to, each with what it uses of that at least: nothing where that is not
    /// known.
    pub fn used(&self) -> impl Iterator<Item = (PackId, u64)> {
        self.packs.iter().copied().zip(self.used.iter().copied().chain(std::iter::repeat(0)))
    }

    /// Notes what it refers to, and how much of each it uses.
    pub fn refer_to(&mut self, used: &BTreeMap<PackId, u64>) {
        self.packs = used.keys().copied().collect();
        self.used = used.values().copied().collect();
    }

    /// The maps of its files.
    pub fn maps(&self) -> impl Iterator<Item = MapId> {
        self.files.iter().map(|file| file.map)
    }
}
