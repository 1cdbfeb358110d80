//! A QEMU that another process has started, which has died.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use tokio::net::UnixStream as AsyncUnixStream;
use tokio::sync::OnceCell;

use crate::guest::Log;
use crate::host::pidfd::Pidfd;
use crate::libvirt::{Domain, DomainAddress, PATIENCE};
use crate::qmp::{Qmp, QmpError};
use crate::revert::error::RevertError;

/// How long a QEMU that is killed may take to end.
const END_TIMEOUT: Duration = Duration::from_secs(60);

/// Why a QEMU without any control can't be told anything.
const NOBODY: &str = "the server that died has left no control socket";

/// How it is told what to do.
pub(super) enum Control {
    /// By our end of its control socket.
    Socket(OwnedFd),
    /// By libvirt.
    Domain(DomainAddress),
    /// Not at all.
    Nobody,
}

/// A QEMU that another process has started, and that is ours now. Dropping it kills it, unless
/// it has been let go.
pub(super) struct Adopted {
    process: Pidfd,
    pid: Option<i32>,
    control: Control,
    /// Its QMP, once that has been had: ending it would end the connection for whoever comes next.
    reached: OnceCell<Qmp>,
    output: Log,
    let_go: bool,
}

impl Adopted {
    /// The QEMU of this pidfd and process id, where that is known, with the file of its output.
    pub fn new(process: OwnedFd, pid: Option<i32>, control: Control, output: OwnedFd) -> Adopted {
        let process = Pidfd::from_fd(process);
        let (reached, output) = (OnceCell::new(), Log::of(output));
        Adopted { process, pid, control, reached, output, let_go: false }
    }

    /// Its process id.
    pub fn pid(&self) -> Option<i32> {
        self.pid
    }

    /// Whether libvirt has started it.
    pub fn is_libvirts(&self) -> bool {
        matches!(self.control, Control::Domain(_))
    }

    /// What it has written to its standard error.
    pub fn words(&self) -> String {
        self.output.tail()
    }

    /// Goes on with its control socket, or has libvirt pass commands on.
    pub async fn qmp(&self) -> Result<Qmp, RevertError> {
        self.reached.get_or_try_init(|| self.reach()).await.cloned()
    }

    async fn reach(&self) -> Result<Qmp, RevertError> {
        let socket = match &self.control {
            Control::Socket(socket) => socket,
            Control::Domain(domain) => {
                return Ok(Domain::open(domain, PATIENCE).await?.monitor().await?);
            }
            Control::Nobody => return Err(QmpError::Gone { reason: NOBODY.into() }.into()),
        };
        Ok(Adopted::go_on(socket).await?)
    }

    async fn go_on(socket: &OwnedFd) -> Result<Qmp, QmpError> {
        let control = UnixStream::from(socket.try_clone().map_err(QmpError::Socket)?);
        control.set_nonblocking(true).map_err(QmpError::Socket)?;
        Qmp::take_over(AsyncUnixStream::from_std(control).map_err(QmpError::Socket)?).await
    }

    /// Kills it, and waits until it has ended.
    pub fn kill(&self) {
        // Fails when it has ended already, which is what we want.
        let _ = self.process.kill();
        self.process.wait_end(END_TIMEOUT);
    }

    /// Lets it live on.
    pub fn let_go(&mut self) {
        self.let_go = true;
    }
}

impl Drop for Adopted {
    fn drop(&mut self) {
        if !self.let_go {
            self.kill();
        }
    }
}
