//! What a user chooses: which guest to bring back, and how its memory travels.

use std::path::PathBuf;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::rtc::Rtc;
use crate::far::FarSnapshot;
use crate::guest::RewriteOptions;
use crate::keeper::Successor;
use crate::libvirt::DomainOptions;
use crate::memory::FillDelay;
use crate::runs::RunOptions;

/// How often progress is told, by default.
const PROGRESS_EVERY: Duration = Duration::from_millis(100);

/// Which guest to bring back, and how.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct RevertOptions {
    /// The image. Of a snapshot that is [far away](RevertOptions::far) only what overlays of disks are
    /// called by default, and where they lie.
    pub image: PathBuf,
    /// A snapshot of a repository in place of an image on this host. A sandbox can't be had then.
    pub far: Option<FarSnapshot>,
    /// The image is under way: its save, which must be
    /// [followable](crate::SaveOptions::followable), is followed from its moment on. What has not been
    /// captured is waited for, or captured at once; should the save fail, the guest is ended. Its memory
    /// goes by userfaultfd or the socket; a keeper, a sandbox, a working set, a check, a domain or a
    /// reset can't be had.
    pub follow: bool,
    /// How the recorded command line is changed.
    pub rewrite: RewriteOptions,
    /// Have libvirt start it, as the domain that was saved. Of `rewrite`, the paths, the disks and
    /// the overlays count then.
    pub domain: Option<DomainOptions>,
    /// How its memory is brought.
    pub delivery: Delivery,
    /// Let the guest run only once so much of its memory is in place.
    pub preload: Preload,
    /// Hold the guest in the state [`Armed`](super::session::Armed) until
    /// [`run`](super::session::Armed::run) is called: it stands still with its device state
    /// in, and nothing of its memory is filled but what `preload` says.
    pub standby: bool,
    /// What the machine's battery-backed clock shows.
    pub rtc: Rtc,
    /// Check the whole image before anything of it is used. Memory that is mapped is
    /// checked in no other way.
    pub check: bool,
    /// Prepare the guest to be reset inside its QEMU
    /// ([`Resettable`](super::session::Resettable)): its overlays get an internal snapshot, its
    /// memory is not mapped, and its writes are tracked once all its memory is in place.
    pub resettable: bool,
    /// The program that is started to hold all that is needed to go on, and to serve the guest should this
    /// process be killed between [`RevertEvent::Running`](super::RevertEvent::Running) and
    /// [`RevertEvent::Resident`](super::RevertEvent::Resident). Without, the guest then waits
    /// for ever.
    pub keeper: Option<Successor>,
    /// The program `snapback`. With it, this process and its keeper enter a sandbox as soon as
    /// the guest runs, and start that program outside of it, as the process that keeps the few
    /// rights which are needed later. **The sandbox holds for the whole process that calls this, and
    /// for good.** Without, or where memory is not served, the process keeps its rights.
    pub sandbox: Option<PathBuf>,
    /// What the guest's agent is told as soon as the guest runs. That it fails is told by
    /// [`RevertEvent::Agent`](super::RevertEvent::Agent), and ends nothing. A guest of libvirt's
    /// has no agent for us.
    pub agent: AgentOptions,
    /// How this revert is recorded while it is under way, for [`runs`](crate::runs). Without, it
    /// is not.
    pub run: Option<RunOptions>,
}

impl RevertOptions {
    /// Brings back the guest of this image as it was recorded.
    pub fn new(image: impl Into<PathBuf>) -> RevertOptions {
        RevertOptions {
            image: image.into(),
            far: None,
            follow: false,
            rewrite: RewriteOptions::default(),
            domain: None,
            delivery: Delivery::default(),
            preload: Preload::Nothing,
            standby: false,
            rtc: Rtc::default(),
            check: false,
            resettable: false,
            keeper: None,
            sandbox: None,
            agent: AgentOptions::default(),
            run: None,
        }
    }
}

impl RevertOptions {
    /// Brings back the guest of a snapshot that is read from its repository as it is needed.
    pub fn from_afar(far: FarSnapshot) -> RevertOptions {
        RevertOptions { far: Some(far.clone()), ..RevertOptions::new(far.machine()) }
    }

    /// The same for a guest whose memory is still being captured, without what can't be had then.
    pub(crate) fn while_captured(mut self) -> RevertOptions {
        // An ordinary stream would be made of an image that has no memory.
        if matches!(self.delivery.placement, Placement::Auto | Placement::Eager | Placement::Map) {
            self.delivery.placement = Placement::Uffd;
        }
        // A guest whose memory can't be had any more is stopped, and said to be.
        self.delivery.fail_on_damage = true;
        self.delivery.working_set = false;
        // Who goes on in our place, or in a sandbox, can't reach who captures.
        (self.keeper, self.sandbox) = (None, None);
        (self.check, self.resettable) = (false, false);
        self
    }
}

/// What the guest's agent (qemu-guest-agent) is told, in this order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct AgentOptions {
    /// The socket of its channel. Without, that of the port `org.qemu.guest_agent.0` on the
    /// command line.
    pub socket: Option<PathBuf>,
    /// To give each network card a new address (MAC). Its cable is unplugged ahead of the guest's
    /// first instruction, and plugged in again once its address has been changed.
    pub new_macs: bool,
    /// To set the guest's clock to the host's time.
    pub set_time: bool,
    /// Commands to be run by the guest's shell (`/bin/sh`), one after the other.
    pub commands: Vec<String>,
}

impl AgentOptions {
    /// Whether it is told nothing.
    pub fn is_empty(&self) -> bool {
        !self.new_macs && !self.set_time && self.commands.is_empty()
    }
}

/// Which image to serve to whom.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ServeOptions {
    /// The image.
    pub image: PathBuf,
    /// The QEMU that waits for it.
    pub to: Target,
    /// How its memory is brought.
    pub delivery: Delivery,
    /// Hold the guest in the state [`Armed`](super::session::Armed) until
    /// [`run`](super::session::Armed::run) is called. QEMU must have been started with `-S`:
    /// without it, QEMU runs the guest as soon as the device state is in.
    pub standby: bool,
    /// What the machine's battery-backed clock shows.
    pub rtc: Rtc,
    /// As [`RevertOptions::sandbox`].
    pub sandbox: Option<PathBuf>,
}

impl ServeOptions {
    /// Serves this image to that QEMU.
    pub fn new(image: impl Into<PathBuf>, to: Target) -> ServeOptions {
        ServeOptions {
            image: image.into(),
            to,
            delivery: Delivery::default(),
            standby: false,
            rtc: Rtc::default(),
            sandbox: None,
        }
    }
}

/// Which guest to go on with whose page server and keeper have died, and how.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ResumeOptions {
    /// The image that the guest was being brought back from.
    pub image: PathBuf,
    /// The guest's QEMU.
    pub of: Orphan,
    /// How its memory is brought. [`Placement::Map`] and [`Placement::Eager`] are taken for
    /// [`Placement::Auto`]; no working set is used or recorded.
    pub delivery: Delivery,
    /// As [`RevertOptions::keeper`].
    pub keeper: Option<Successor>,
    /// As [`RevertOptions::sandbox`].
    pub sandbox: Option<PathBuf>,
}

impl ResumeOptions {
    /// Goes on with that guest of this image.
    pub fn new(image: impl Into<PathBuf>, of: Orphan) -> ResumeOptions {
        let delivery = Delivery { working_set: false, ..Delivery::default() };
        ResumeOptions { image: image.into(), of, delivery, keeper: None, sandbox: None }
    }
}

/// A QEMU whose guest waits for memory that nobody brings any more.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Orphan {
    /// The process of this number, whose control socket (QMP) is a Unix socket on its command
    /// line.
    Process(i32),
    /// The one that listens for QMP on this Unix socket.
    Qmp(PathBuf),
}

/// A QEMU that somebody else started as the machine that was saved, and that waits for its
/// state.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Target {
    /// It listens for a migration on this unix socket (`-incoming unix:PATH`, or
    /// `migrate-incoming`), with its capability `postcopy-ram` on.
    Migration(PathBuf),
    /// It was started with `-incoming defer`, and listens for QMP on this unix socket. Its
    /// capabilities and the migration are set up by that.
    Qmp(PathBuf),
}

/// How a guest's memory is brought.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Delivery {
    /// By which transport pages reach the guest.
    pub placement: Placement,
    /// The most bytes a second that filling brings; unlimited without. What the guest asks
    /// for or waits for (a `preload`, and the first MiB of any working set) is not held
    /// back, and zeros, which are read from nowhere, don't count.
    pub fill_rate: Option<u64>,
    /// What filling, beyond the working set, waits for.
    pub fill_delay: Option<FillDelay>,
    /// Whether the recorded working set is brought first, and recorded anew.
    pub working_set: bool,
    /// Nothing is filled for so long, while what the guest asks for is recorded.
    pub hold: Option<Duration>,
    /// The file of the working set; beside the image without.
    pub working_set_file: Option<PathBuf>,
    /// Whether memory that was installed directly is collapsed into huge pages once all of it is
    /// in place, where QEMU has asked for huge pages. It is collapsed at the rate of `fill_rate`
    /// at most.
    pub collapse: bool,
    /// Whether memory that can't be read ends the session. Else
    /// [`RevertEvent::Degraded`](super::RevertEvent::Degraded) or
    /// [`RevertEvent::Stopped`](super::RevertEvent::Stopped) tells of it, everything else is
    /// brought, and once a second it is tried again, until the image has been repaired or the
    /// session is cancelled. Before the guest runs, memory that it needs ends the session in any
    /// case.
    pub fail_on_damage: bool,
    /// The shortest time between two reports of progress; it is reported only where there
    /// is some.
    pub progress_every: Duration,
}

impl Default for Delivery {
    fn default() -> Delivery {
        Delivery {
            placement: Placement::Auto,
            fill_rate: None,
            fill_delay: None,
            working_set: true,
            hold: None,
            working_set_file: None,
            collapse: true,
            fail_on_damage: false,
            progress_every: PROGRESS_EVERY,
        }
    }
}

/// How much of a guest's memory is in place ahead of its first instruction.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Preload {
    /// What its device state brings along.
    #[default]
    #[serde(rename = "none")]
    Nothing,
    /// Its recorded working set.
    WorkingSet,
    /// All of it, at the rate of [`Delivery::fill_rate`] at most.
    All,
}

/// By which transport pages reach the guest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Placement {
    /// Mapped from a flat image, else straight into memory by QEMU's userfaultfd, else by
    /// the socket, else ahead of the guest: the first of these that can be had.
    #[default]
    Auto,
    /// By userfaultfd for every block, or not at all.
    Uffd,
    /// By QEMU's postcopy socket.
    Socket,
    /// By a private mapping of a flat image, which QEMU makes itself.
    Map,
    /// By an ordinary migration stream: the guest runs once it has all memory. It needs no
    /// userfaultfd. The rate, the delay and the working set of [`Delivery`] don't apply.
    Eager,
}

impl Placement {
    /// Whether memory is served while the guest runs, by QEMU's postcopy.
    pub(super) fn is_postcopy(self) -> bool {
        matches!(self, Placement::Uffd | Placement::Socket)
    }

    /// Its name, as in options and events.
    pub fn name(self) -> &'static str {
        match self {
            Placement::Auto => "auto",
            Placement::Uffd => "uffd",
            Placement::Socket => "socket",
            Placement::Map => "map",
            Placement::Eager => "eager",
        }
    }
}
