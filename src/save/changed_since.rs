//! What a guest has not written since the parent of its new image: told by whoever tracks its
//! writes for resets, in the pause.
//!
//! A tracker has write-protected what is as its image has it, and lets each page be written once it has
//! noted that. So what is still protected once the guest stands still has not changed, and the kernel
//! tells which pages that are. Then the tracker lets go, which QEMU's own protection needs, and these
//! pages are taken from the parent. All else counts as changed: what was never protected, what was given
//! back, and what has not been there.

use super::error::SaveError;
use super::options::Reading;
use super::parent_tracker::{ParentTracker, Since};
use super::saving::Saving;
use crate::failpoint::failpoint;
use crate::runs::{Tracking, stop_tracking};

impl Saving<'_> {
    /// Looks for a tracker of the guest's writes. If there is one that knows what has changed since
    /// the parent, it goes on until the pause, and QEMU is set up there; else it is told to let go, and
    /// QEMU is set up now.
    pub async fn set_up_qemu(&mut self) -> Result<(), SaveError> {
        self.since = match &self.checked.parent {
            None => Since::NoParent,
            Some(_) => match self.find_tracker().await {
                Ok(tracker) => Since::Tracked(Box::new(tracker)),
                Err(why) => Since::Compared(why),
            },
        };
        match self.since.is_tracked() {
            true => Ok(()),
            false => self.let_go_and_apply().await,
        }
    }

    /// Compares all memory after all, if it is not too late.
    pub async fn compare_all(&mut self, why: String) -> Result<(), SaveError> {
        if !self.since.is_tracked() {
            return Ok(());
        }
        self.since = Since::Compared(why);
        self.let_go_and_apply().await
    }

    async fn let_go_and_apply(&self) -> Result<(), SaveError> {
        // QEMU refuses to write-protect what somebody else has write-protected.
        stop_tracking(self.checked.pid).await?;
        self.undo.apply_settings(&self.access.qmp).await
    }

    /// The tracker of what has changed since the parent; or why there is none that helps.
    async fn find_tracker(&self) -> Result<ParentTracker, String> {
        let checked = &self.checked;
        if self.options.reading == Reading::Stream || !checked.background {
            return Err("memory comes by QEMU's stream alone".into());
        }
        if self.forking.is_some() {
            return Err("all memory is kept for who is brought back meanwhile".into());
        }
        let tracking = Tracking::of(checked.pid).await;
        let tracking = tracking.ok_or("nobody tracks what the guest writes, or tells it")?;
        let parent = checked.parent.as_ref().map(|parent| parent.manifest());
        let parent = parent.filter(|parent| parent.identity == tracking.what.image);
        let parent = parent.ok_or("what the guest writes is tracked since another image")?;
        ParentTracker::of(tracking, &parent.blocks, checked.pid)
    }

    /// Asks the tracker, in the pause, and sets QEMU up then. What can't be learned is compared.
    pub async fn ask_tracker(&mut self) -> Result<(), SaveError> {
        let Since::Tracked(tracker) = &self.since else { return Ok(()) };
        let unchanged = tracker.unchanged();
        failpoint("scanned");
        let since = match (tracker.tracking.end().await?, unchanged) {
            (true, Ok(unchanged)) => {
                // Nobody has set it before.
                let _ = self.unchanged.set(unchanged);
                Since::Told
            }
            (true, Err(error)) => {
                Since::Compared(format!("QEMU's page map can't be read ({error})"))
            }
            (false, _) => Since::Compared("who tracked what the guest writes has ended".into()),
        };
        self.since = since;
        self.undo.apply_settings(&self.access.qmp).await
    }
}
