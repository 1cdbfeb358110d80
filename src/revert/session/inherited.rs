//! A guest whose server has died: the session is entered where it runs.

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::adopted::{Adopted, Control};
use super::away::{self, StoreWatch};
use super::confined::Confinement;
use super::connection::Connection;
use super::contents::fill_options;
use super::lifecycle::Lifecycle;
use super::qemu::Qemu;
use super::resident::Resident;
use super::running::Running;
use crate::cancel::Cancellation;
use crate::far::{FarAgain, FarSnapshot};
use crate::host::procfs::AddressSpace;
use crate::keeper::{Inheritance, Ledger};
use crate::memory::FaultReport;
use crate::page::PageSource;
use crate::repository::{RepositoryError, StoreFailure, StoreWait};
use crate::revert::error::{PostcopyError, RevertError};
use crate::revert::event::{Progress, RevertEvent};
use crate::revert::kept::{Details, FarDetails, Kept, note_keepers};
use crate::revert::options::Placement;
use crate::revert::outcome::Outcome;
use crate::revert::rtc::Rtc;
use crate::runs::{Entry, ProcessId};

/// How long to wait before a store that does not answer is asked again.
const ASK_AGAIN: Duration = Duration::from_secs(1);

/// A guest whose server has died, and that is ours now.
pub(in crate::revert) struct Inherited {
    /// How far it is.
    pub stage: Stage,
    /// Its snapshot, where that is one of a repository, and the overlays that its disks follow into.
    pub far: Option<(FarSnapshot, Vec<PathBuf>)>,
}

/// How far a guest is whose server has died.
pub(in crate::revert) enum Stage {
    /// Its memory follows.
    Running(Box<Running>),
    /// Its memory is in place, and its disks follow. The event tells of the takeover.
    Resident(Box<Resident>, RevertEvent),
}

impl Inherited {
    /// Goes on with a guest whose server has died. `cancel` holds for the session. Where its snapshot is
    /// one of a repository, this waits until the store answers.
    ///
    /// # Errors
    /// When something that was left can't be used. QEMU has then been ended.
    pub async fn of(
        inheritance: Inheritance,
        cancel: Cancellation,
    ) -> Result<Inherited, RevertError> {
        let Inheritance {
            ledger,
            image,
            qemu,
            control,
            output,
            stream,
            userfaultfd,
            mappings,
            page_map,
            broker,
            keeper,
            ..
        } = inheritance;
        let details = Details::read(&ledger);
        let domain = details.as_ref().ok().and_then(|details| details.domain.clone());
        let control = match (control, domain) {
            (Some(socket), _) => Control::Socket(socket),
            (None, Some(domain)) => Control::Domain(domain),
            (None, None) => Control::Nobody,
        };
        // From here on an error ends it.
        let qemu = Adopted::new(qemu, ledger.qemu(), control, output);
        let space = match mappings.zip(page_map) {
            Some((mappings, page_map)) => Some(AddressSpace::of(mappings, page_map)),
            // Before this process enters a sandbox of its own.
            None => qemu.pid().and_then(|pid| AddressSpace::open(pid).ok()),
        };
        let details = details.map_err(PostcopyError::Inherited)?;
        let server = ProcessId::serving(std::process::id() as i32, &ledger);
        let pid = qemu.pid();
        let run = details.run.clone().map(|run| Entry::take_over(run, Some(server)));
        let run = run.inspect(|run| {
            // The predecessor may have died before it was written. In the sandbox, where QEMU can't
            // be seen, it has been.
            run.note(move |record| record.qemu = pid.and_then(ProcessId::of).or(record.qemu));
        });
        note_keepers(&keeper, &ledger, run.as_ref());
        let far = match &details.far {
            Some(FarDetails { again, overlays }) => {
                let opened = open_again(again, run.as_ref(), &cancel).await;
                Some((opened.inspect_err(|_| qemu.kill())?, overlays.clone()))
            }
            None => None,
        };
        let image = match &far {
            Some((far, _)) => Arc::clone(far.image()),
            // QEMU ends ahead of its record, which tells what it has left.
            None => details.open_image(File::from(image)).inspect_err(|_| qemu.kill())?,
        };
        let Details { delivery, sandbox, .. } = details;
        let qemu = Qemu::Adopted(qemu);
        if ledger.is_resident() {
            let event = RevertEvent::TakenOver {
                by: "keeper".into(),
                after_ms: ledger.died_ms_ago(),
                restarts: ledger.restarts(),
            };
            let resident = Resident {
                qemu,
                outcome: outcome(&image, &ledger),
                collapsing: None,
                reset: None,
                image,
                rtc: Rtc::default(),
                confinement: Confinement::None,
                cancel,
                kept: Some((keeper, ledger)),
                run,
            };
            return Ok(Inherited { stage: Stage::Resident(Box::new(resident), event), far });
        }
        let fill = fill_options(&delivery, &image, Vec::new());
        let kept = Kept::inherited(&keeper, ledger);
        let lifecycle = Lifecycle::taken_over();
        let mut connection = Connection::new(qemu, lifecycle, image, delivery, cancel);
        connection.run = run;
        if let Some((far, _)) = &far {
            connection.disks_follow = !far.disks().is_empty();
            connection.store = Some(StoreWatch::new(far.answering()));
        }
        connection.keep(keeper, kept);
        connection.space = space.map(Arc::new);
        connection.confinement = Confinement::inherited(broker, sandbox);
        connection.take_over(UnixStream::from(stream), userfaultfd, fill)?;
        Ok(Inherited { stage: Stage::Running(Box::new(Running { connection })), far })
    }
}

/// How the memory of a guest came that has all of it.
fn outcome(image: &dyn PageSource, ledger: &Ledger) -> Outcome {
    let pages = image.blocks().iter().map(|block| block.pages()).sum();
    let placement = if ledger.direct().is_some() { Placement::Uffd } else { Placement::Socket };
    let progress = Progress { pages, total: pages, requests: 0 };
    Outcome { progress, placement, faults: FaultReport::none() }
}

/// Opens a snapshot of a repository again, and serves its disks where its guest's QEMU looks for them.
/// The guest waits as long as the store does not answer, whatever the reason.
async fn open_again(
    again: &FarAgain,
    run: Option<&Entry>,
    cancel: &Cancellation,
) -> Result<FarSnapshot, RevertError> {
    loop {
        let (how, notes) = (again.clone(), run.map(Entry::notes));
        let tell = move |wait| {
            if let Some(notes) = &notes {
                away::note_waiting(matches!(wait, StoreWait::StoreWaiting { .. }), notes);
            }
        };
        let opened = tokio::task::spawn_blocking(move || FarSnapshot::open_again(&how, tell)).await;
        match opened.unwrap_or_else(|e| std::panic::resume_unwind(e.into_panic())) {
            Ok(far) => {
                if !far.disks().is_empty() {
                    far.serve_disks().map_err(RevertError::Disks)?;
                }
                return Ok(far);
            }
            Err(RepositoryError::Store(error)) if error.failure != StoreFailure::NotFound => {
                tracing::warn!("the guest waits for the store: {error}");
            }
            Err(error) => return Err(RevertError::Repository(Box::new(error))),
        }
        tokio::select! {
            () = tokio::time::sleep(ASK_AGAIN) => {}
            () = cancel.requested_times(2) => {
                return Err(RevertError::Interrupted(
                    "the guest was stopped, since its memory was not complete",
                ));
            }
        }
    }
}
