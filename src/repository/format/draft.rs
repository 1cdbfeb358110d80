//! What makes a manifest a draft: an empty object beside it, which the manifest names.

use super::ids::ObjectId;
use super::manifest::SnapshotManifest;

/// An object that makes a manifest a draft.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Draft {
    /// What the manifest calls it.
    pub id: ObjectId,
    /// The key of the manifest, which may not be there.
    pub of: String,
    /// Its own key. It begins as that of the manifest does: whoever lists both in their order finds it
    /// behind the manifest, which was put later.
    pub key: String,
    /// When it was put, in milliseconds since 1970 by the store's clock; 0 where it was put just now.
    pub put_ms: i64,
}

impl Draft {
    /// The one with this key. Whether `of` is a manifest's key is for who knows these.
    pub fn read(key: &str, put_ms: i64) -> Option<Draft> {
        let (of, id) = key.rsplit_once('-')?;
        Some(Draft { id: id.parse().ok()?, of: of.to_owned(), key: key.to_owned(), put_ms })
    }

    /// Whether it makes this manifest a draft.
    pub fn is_of(&self, manifest: &SnapshotManifest) -> bool {
        manifest.draft == Some(self.id)
    }
}
