//! Drafts: manifests that count for nothing yet, or never will.
//!
//! Who puts a manifest in place of another one can look only afterwards whether the snapshot was forgotten
//! meanwhile, and may be killed in between. So it puts an object beside the manifest first, and removes that
//! last; the manifest names the object, since two who put the same one are each to remove their own.

use bytes::Bytes;

use super::repository::{Repository, Snapshot, parse_key};
use crate::repository::error::{RepositoryError, StoreFailure};
use crate::repository::format::ids::{ObjectId, random};
use crate::repository::format::manifest::SnapshotManifest;
use crate::repository::remote::Listing;

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
    /// Reads what a listing tells.
    pub fn read(listing: &Listing) -> Option<Draft> {
        let (of, id) = listing.key.rsplit_once('-')?;
        let (id, put_ms) = (id.parse().ok()?, listing.put_ms);
        parse_key(of)?;
        Some(Draft { id, of: of.to_owned(), key: listing.key.clone(), put_ms })
    }

    /// Whether it makes this manifest a draft.
    fn is_of(&self, manifest: &SnapshotManifest) -> bool {
        manifest.draft == Some(self.id)
    }
}

impl Repository {
    /// Of these manifests, those that are drafts because of `drafts`, which were listed with them. Hardly
    /// ever is there any: their manifests are read.
    pub(super) fn take_drafts(
        &self,
        found: Vec<Snapshot>,
        drafts: &[Draft],
    ) -> Result<(Vec<Snapshot>, Vec<Snapshot>), RepositoryError> {
        let (mut count, mut are_drafts) = (Vec::new(), Vec::new());
        for snapshot in found {
            let mut of_it = drafts.iter().filter(|draft| draft.of == snapshot.key).peekable();
            let is_draft = of_it.peek().is_some()
                && match self.by_anybody(&snapshot.key) {
                    Ok(manifest) => of_it.any(|draft| draft.is_of(&manifest)),
                    Err(RepositoryError::Store(error))
                        if error.failure != StoreFailure::NotFound =>
                    {
                        return Err(error.into());
                    }
                    // Removed meanwhile, or damaged, which is told where it is read.
                    Err(_) => false,
                };
            if is_draft { are_drafts.push(snapshot) } else { count.push(snapshot) }
        }
        Ok((count, are_drafts))
    }

    /// Reads a manifest, whoever has signed it: drafts are of anybody.
    fn by_anybody(&self, key: &str) -> Result<SnapshotManifest, RepositoryError> {
        self.open_manifest(key, &self.remote.get(key)?)
    }

    /// Puts what makes the manifest with this key a draft, which has to name it and to be put later.
    pub(in crate::repository) fn begin_draft(&self, of: &str) -> Result<Draft, RepositoryError> {
        let id = ObjectId(random());
        let draft = Draft { id, of: of.to_owned(), key: format!("{of}-{id}"), put_ms: 0 };
        self.remote.put(&draft.key, Bytes::new())?;
        Ok(draft)
    }

    /// Removes what is left of one who was killed before it ended its draft: first the manifest, if that is
    /// a draft because of this.
    pub(in crate::repository) fn undo_draft(&self, draft: &Draft) -> Result<(), RepositoryError> {
        match self.by_anybody(&draft.of) {
            Ok(manifest) if draft.is_of(&manifest) => self.remote.delete(&draft.of)?,
            Ok(_) => {}
            Err(RepositoryError::Store(error)) if error.failure == StoreFailure::NotFound => {}
            Err(error) => return Err(error),
        }
        Ok(self.remote.delete(&draft.key)?)
    }
}
