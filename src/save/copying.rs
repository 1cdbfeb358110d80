//! Behind the moment: captured disks are copied, and the guest is put back on its own files.

use std::time::Instant;

use super::copies::{Copying, DiskCopy};
use super::copy_error::CopyError;
use super::error::SaveError;
use super::event::SaveEvent;
use super::moment::millis;
use super::saving::Saving;
use crate::failpoint::failpoint;

impl Saving<'_> {
    /// Copies the frozen disks, if that was asked for, and commits the overlays back.
    pub async fn copy_disks(&mut self) -> Result<(), SaveError> {
        let copies: Vec<DiskCopy> = self.undo.copies().to_vec();
        if copies.is_empty() {
            return Ok(());
        }
        // It may take long, and QEMU's migrations are its owner's again.
        self.undo.restore_settings(&self.access.qmp).await?;
        let how = Copying::of(self.options);
        for copy in copies {
            let began = Instant::now();
            let (disk, file) = (copy.disk.clone(), copy.path.clone());
            let cancel = self.cancel.clone();
            let made = tokio::task::spawn_blocking(move || copy.make(how, &cancel)).await;
            let bytes = match made.unwrap_or_else(|e| std::panic::resume_unwind(e.into_panic())) {
                Ok(bytes) => bytes,
                Err(Some(error)) => return Err(error.into()),
                Err(None) => return Err(SaveError::Interrupted),
            };
            failpoint("copied");
            self.tell(SaveEvent::DiskCopied {
                disk,
                file,
                bytes,
                took_ms: millis(began.elapsed()),
            });
        }
        match self.undo.commit(&self.access, &mut self.on_event).await? {
            true => Ok(()),
            false => Err(CopyError::NotCommitted.into()),
        }
    }
}
