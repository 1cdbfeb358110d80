//! Launched: QEMU's QMP answers, or somebody else's QEMU waits for its guest.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use super::armed::Armed;
use super::confined::Confinement;
use super::connection::{Connection, socket_pair};
use super::contents::Reading;
use super::lifecycle::{Lifecycle, Start};
use super::open_image::OpenImage;
use super::qemu::{POSTCOPY, Qemu, migrate_from};
use crate::cancel::Cancellation;
use crate::guest::GuestError;
use crate::host::check_page_size;
use crate::host::pidfd::peer_pid;
use crate::image::Image;
use crate::qmp::{Qmp, QmpError};
use crate::revert::error::RevertError;
use crate::revert::event::{OnEvent, RevertEvent};
use crate::revert::options::{Placement, Preload, ServeOptions, Target};

/// How long somebody else's QEMU may take to greet.
const GREETING_TIMEOUT: Duration = Duration::from_secs(10);

/// A QEMU that waits for its guest. Dropping it ends a QEMU of ours.
pub struct Launched {
    pub(super) connection: Connection,
    pub(super) contents: Reading,
    /// The migration socket, where QEMU listens on it; else it is handed one by QMP.
    pub(super) socket: Option<UnixStream>,
    /// Why QEMU takes no postcopy migration by that socket.
    pub(super) refused: Option<QmpError>,
}

impl Launched {
    /// Enters a session with a QEMU that somebody else has started. `cancel` holds for the
    /// whole session.
    ///
    /// # Errors
    /// When the image can't be used, or nobody waits there.
    pub async fn outside(
        options: &ServeOptions,
        cancel: Cancellation,
    ) -> Result<Launched, RevertError> {
        check_page_size()?;
        let ServeOptions { image, to, delivery, standby, rtc, sandbox } = options;
        if delivery.placement == Placement::Map {
            let problem = "a QEMU that was started already has its memory".to_owned();
            return Err(GuestError::NotMapped { problem }.into());
        }
        let image = Image::open(image)?;
        // A QEMU that waits is not disturbed for an image that can't be read.
        let contents = Reading::start(&image, delivery, *rtc, &[]).finish().await?;
        let (qemu, socket) = match to {
            Target::Migration(path) => {
                let socket = connect(path)?;
                (Qemu::Theirs { qmp: None, pid: peer_pid(&socket) }, Some(socket))
            }
            Target::Qmp(path) => {
                let qmp = Qmp::connect(path, GREETING_TIMEOUT).await?;
                let pid = qmp.peer_pid();
                (Qemu::Theirs { qmp: Some(qmp), pid }, None)
            }
        };
        // Without QMP we can neither see nor say when it runs, and without standby it is not
        // for us to say.
        let start = match (qemu.qmp(), standby) {
            (Some(_), true) => Start::Continued { preload: Preload::Nothing },
            _ => Start::LeftToOwner,
        };
        let lifecycle = Lifecycle::new(start, *standby);
        let mut connection = Connection::new(qemu, lifecycle, image, delivery.clone(), cancel);
        connection.confinement = Confinement::wanted(sandbox.clone());
        Ok(Launched { connection, contents: Reading::Done(contents), socket, refused: None })
    }

    /// Has QEMU wait for a postcopy migration already, ahead of there being anything to send: no command is
    /// left for then. QEMU reads those byte by byte, which takes it milliseconds.
    ///
    /// # Errors
    /// When QEMU can't be told.
    pub(in crate::revert) async fn listen(mut self) -> Result<Launched, RevertError> {
        let Some(qmp) = self.connection.qemu.qmp().cloned() else { return Ok(self) };
        let refused = &mut self.refused;
        let listening = async {
            let (ours, theirs) = socket_pair()?;
            let hear = |capable: Result<(), QmpError>| {
                *refused = capable.err();
                Ok(())
            };
            migrate_from(&qmp, &POSTCOPY, theirs, hear).await?;
            Ok(ours)
        };
        match listening.await {
            Ok(ours) => Ok(Launched { socket: Some(ours), ..self }),
            Err(error) => Err(self.connection.fail(error).await),
        }
    }

    /// Gives it another image of the same machine.
    pub(in crate::revert) fn give(&mut self, open: OpenImage) {
        let OpenImage { image, pages } = open;
        let connection = &mut self.connection;
        self.contents = Reading::start(&image, &connection.delivery, connection.rtc, &[]);
        (connection.image, connection.pages) = (image, pages);
    }

    /// Gives QEMU the guest's device state and serves its faults. A guest in standby is
    /// armed when its device state is in; any other doesn't stop here, and may run already
    /// when this returns.
    ///
    /// # Errors
    /// When QEMU refuses the guest, or the session is cancelled.
    pub async fn arm(self, on_event: OnEvent<'_>) -> Result<Armed, RevertError> {
        let Launched { mut connection, contents, socket, refused } = self;
        if !connection.qemu.is_ours() {
            for says in connection.image.exposures() {
                on_event(RevertEvent::Warning { says });
            }
        }
        let cancelled = connection.cancel.requested();
        let arming = async {
            let contents = contents.finish().await?;
            let contents = match refused {
                Some(error) => contents.without_postcopy(&connection.qemu, error)?,
                None => contents,
            };
            connection.begin(contents, socket).await?;
            connection.advance(on_event).await?;
            match connection.lifecycle.is_held() {
                true => check_held(&connection.qemu).await,
                false => Ok(()),
            }
        };
        let armed = tokio::select! {
            armed = arming => armed,
            () = cancelled => Err(connection.cancelled()),
        };
        match armed {
            Ok(()) => Ok(Armed { connection }),
            Err(error) => Err(connection.fail(error).await),
        }
    }
}

/// Looks whether QEMU holds a guest that is in standby, where we can ask it.
async fn check_held(qemu: &Qemu) -> Result<(), RevertError> {
    let Some(qmp) = qemu.qmp() else { return Ok(()) };
    match qmp.status().await?.as_str() {
        "running" => Err(RevertError::NotHeld),
        _ => Ok(()),
    }
}

fn connect(path: &Path) -> Result<UnixStream, RevertError> {
    UnixStream::connect(path).map_err(|source| RevertError::Socket {
        what: format!(
            "connecting to `{}` failed (QEMU must wait there: `-incoming unix:…`)",
            path.display()
        ),
        source,
    })
}
