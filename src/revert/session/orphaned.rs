//! A guest of which nobody is left: neither the server nor the keeper. The session is entered
//! where it runs, by what can be seen of QEMU from outside.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::confined::Confinement;
use super::connection::{Connection, socket_pair};
use super::contents::fill_options;
use super::lifecycle::Lifecycle;
use super::qemu::Qemu;
use super::reconnect::Resuming;
use super::running::Running;
use crate::cancel::Cancellation;
use crate::guest;
use crate::host::check_page_size;
use crate::host::pidfd::{Pidfd, peer_pid};
use crate::image::Image;
use crate::keeper::if_started;
use crate::page::PageSource;
use crate::qmp::{Qmp, QmpError};
use crate::revert::error::{PostcopyError, RevertError};
use crate::revert::kept::Kept;
use crate::revert::options::{Orphan, Placement, ResumeOptions};
use crate::revert::source::Interrupted;
use crate::runs::{self, Entry, ProcessId};
use crate::transport::proof::AttachError;
use crate::transport::search::{self, Found, SearchError};

/// How long QEMU is asked for the state of its migration. One that does not answer has a virtual
/// processor that waits for memory.
const ASK_TIMEOUT: Duration = Duration::from_millis(100);

/// How long QEMU may take to notice that its migration was interrupted.
const NOTICE_TIMEOUT: Duration = Duration::from_secs(1);

impl Running {
    /// Takes up a guest whose server and keeper have died. `cancel` holds for the session.
    ///
    /// # Errors
    /// When the image can't be used, or QEMU is not one that waits for its memory. Then nothing
    /// was changed.
    pub async fn resume(
        options: &ResumeOptions,
        cancel: Cancellation,
    ) -> Result<Running, RevertError> {
        check_page_size()?;
        let began = Instant::now();
        let image = Image::open(&options.image)?;
        let (pid, monitor) = reach(&options.of)?;
        if guest::label_of(pid).is_some_and(|label| label != image.identity().to_string()) {
            return Err(PostcopyError::from(SearchError::OtherImage { pid }).into());
        }
        let file = std::fs::canonicalize(&options.image).unwrap_or_default();
        if let Some(by) = Pidfd::held_with(pid, &file) {
            return Err(RevertError::Served { by });
        }
        let (found, interrupted) =
            tokio::join!(find(pid, &image, options.delivery.placement), check(&monitor));
        interrupted?;
        let found = found?;

        let (ours, theirs) = socket_pair()?;
        let fill = fill_options(&options.delivery, &image, Vec::new());
        let run = runs::directory_of(pid).map(|run| Entry::take_over(run, ProcessId::this()));
        let sandbox = options.sandbox.as_deref();
        let kept = options.keeper.as_ref().and_then(|successor| {
            if_started(Kept::start(
                successor,
                &image,
                &options.delivery,
                None,
                sandbox,
                run.as_ref(),
                None,
            ))
        });
        let qemu = Qemu::Theirs { qmp: None, pid: Some(pid) };
        let (lifecycle, delivery) = (Lifecycle::taken_over(), options.delivery.clone());
        let mut connection = Connection::new(qemu, lifecycle, image, delivery, cancel);
        connection.confinement = Confinement::wanted(options.sandbox.clone());
        connection.run = run;
        if let Some((keeper, kept)) = kept {
            connection.keep(keeper, kept);
        }
        let wake = connection.take_up(found, ours, fill)?;
        connection.resuming = Some(Resuming::start(began, monitor, theirs, wake));
        Ok(Running { connection })
    }
}

/// QEMU's process, and where its control socket is.
fn reach(orphan: &Orphan) -> Result<(i32, PathBuf), RevertError> {
    match orphan {
        Orphan::Process(pid) => {
            let mut sockets = guest::control_sockets(*pid).into_iter();
            let monitor = sockets.next().ok_or(RevertError::NoControl { pid: *pid })?;
            Ok((*pid, monitor))
        }
        Orphan::Qmp(path) => {
            let connected = UnixStream::connect(path)
                .map_err(|source| QmpError::Connect { path: path.clone(), source })?;
            let pid = peer_pid(&connected).ok_or(PostcopyError::Adopt(AttachError::Unseen))?;
            Ok((pid, path.clone()))
        }
    }
}

/// Finds the guest's memory, where it may be put in place directly.
async fn find(
    pid: i32,
    image: &Arc<Image>,
    placement: Placement,
) -> Result<Interrupted, RevertError> {
    if placement == Placement::Socket {
        return Ok(Interrupted::BySocket("as was asked for".into()));
    }
    let pages = Arc::clone(image);
    let found = tokio::task::spawn_blocking(move || search::find(pid, &pages as &dyn PageSource));
    let found: Result<Found, SearchError> =
        found.await.unwrap_or_else(|e| std::panic::resume_unwind(e.into_panic()));
    match found {
        Ok(found) => Ok(Interrupted::Direct(found)),
        Err(error @ (SearchError::Attach(_) | SearchError::Alike { .. }))
            if placement != Placement::Uffd =>
        {
            Ok(Interrupted::BySocket(error.to_string()))
        }
        Err(error) => Err(PostcopyError::from(error).into()),
    }
}

/// Checks that nobody serves the guest, as far as QEMU answers.
async fn check(monitor: &Path) -> Result<(), RevertError> {
    let began = Instant::now();
    loop {
        let ask = async { Qmp::connect(monitor, ASK_TIMEOUT * 2).await?.migration_info().await };
        let Ok(answer) = tokio::time::timeout(ASK_TIMEOUT, ask).await else { return Ok(()) };
        let status = answer?.status.unwrap_or_default();
        match status.as_str() {
            "postcopy-paused" | "postcopy-recover" => return Ok(()),
            "postcopy-active" if began.elapsed() < NOTICE_TIMEOUT => {
                tokio::time::sleep(ASK_TIMEOUT / 10).await;
            }
            _ => return Err(RevertError::NotInterrupted { status }),
        }
    }
}
