//! Drafts: manifests that count for nothing yet, or never will.
//!
//! Who puts a manifest in place of another one can look only afterwards whether the snapshot was forgotten
//! meanwhile, and may be killed in between. So it puts an object beside the manifest first, and removes that
//! last; the manifest names the object, since two who put the same one are each to remove their own.

use bytes::Bytes;

use super::repository::{Repository, Snapshot};
use crate::repository::error::{RepositoryError, StoreFailure};
use crate::repository::format::draft::Draft;
use crate::repository::format::ids::{ObjectId, random};

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
                && match self.manifest_by_anybody(&snapshot.key) {
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
        match self.manifest_by_anybody(&draft.of) {
            Ok(manifest) if draft.is_of(&manifest) => self.remote.delete(&draft.of)?,
            Ok(_) => {}
            Err(RepositoryError::Store(error)) if error.failure == StoreFailure::NotFound => {}
            Err(error) => return Err(error),
        }
        Ok(self.remote.delete(&draft.key)?)
    }
}
