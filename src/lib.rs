//! Instant snapshot and instant revert for stock QEMU virtual machines.
//!
//! A guest is saved while it runs, through its QMP socket. It is paused for as long as QEMU needs
//! to write-protect its memory:
//!
//! ```no_run
//! use snapback::{Cancellation, SaveError, SaveEvent, SaveOptions, save};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), SaveError> {
//! let options = SaveOptions::new("/run/vm/qmp.sock", "vm.snap");
//! let saved = save(&options, Cancellation::new(), |event| match event {
//!     SaveEvent::Moment { .. } => println!("the moment has passed; the guest runs on"),
//!     // The guest lives in the overlays from now on: start it from these.
//!     SaveEvent::Saved { disks, .. } => {
//!         disks.iter().for_each(|disk| println!("{} -> {}", disk.disk, disk.overlay));
//!     }
//!     _ => {}
//! })
//! .await?;
//! println!("{} bytes on disk", saved.image_bytes);
//! # Ok(())
//! # }
//! ```
//!
//! It is brought back as often as one likes. It runs at once, and its memory follows:
//!
//! ```no_run
//! use snapback::{Cancellation, RevertError, RevertEvent, RevertOptions, revert};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), RevertError> {
//! let mut options = RevertOptions::new("vm.snap");
//! options.rewrite.paths.push(("/run/vm".into(), "/run/vm2".into()));
//! let reverted = revert(&options, Cancellation::new(), |event| match event {
//!     RevertEvent::Running { .. } => println!("the guest runs"),
//!     RevertEvent::Progress(progress) => println!("{} of {}", progress.pages, progress.total),
//!     _ => {}
//! })
//! .await?;
//! println!("QEMU lives on as process {}", reverted.pid);
//! # Ok(())
//! # }
//! ```
//!
//! The journeys on a live guest are asynchronous and have to run in a tokio runtime with all its
//! drivers enabled; those on files block. All take options (`new` with what is required, public
//! fields for the rest), tell what happens as events, and end early by a [`Cancellation`]. Every
//! error tells its kind ([`ErrorKind`]) and what it is about ([`Details`]). Messages name the options to change by their
//! fields.
//!
//! | journey | what it does |
//! |---|---|
//! | [`save()`], [`check()`], [`recover()`] | saves a guest, asks whether that would work, cleans up behind a save that was killed |
//! | [`revert()`], [`serve()`], [`harvest()`] | brings a guest back, in a QEMU of ours or of others, or to learn its working set |
//! | [`take_over()`] | goes on with a guest whose server was killed, started by its keeper |
//! | [`resume()`] | goes on with a guest whose server and keeper were both killed |
//! | [`save_resettable()`] | saves a guest that can be reset in its QEMU from then on |
//! | [`revert_resettable()`] | brings a guest back that can be reset inside its QEMU, again and again |
//! | [`session`] | the same in steps, to hold a guest in standby |
//! | [`inspect()`], [`verify()`], [`flatten()`], [`Image`] | reads, checks and merges images |
//! | [`export()`], [`import()`] | converts from and to other programs' formats |
//! | [`snapshots`] | keeps snapshots in a directory or an object store, and brings them back |
//! | [`backups`] | saves guests into a repository, as a configuration file says |
//! | [`pool`] | takes, resets and releases guests of a daemon's pools (`snapback daemon`) |
//! | [`runs`] | lists the reverts that are under way, ends them, and removes what killed ones left |
//! | [`check_here()`] | tells whether this host can run the guest of an image or a snapshot |
//! | [`doctor::examine()`] | tells what this host and its QEMUs can do |

/// Declares the rooms of the house: private, or public behind the feature `internals`, by which
/// benches, fuzz targets and integration tests get in.
macro_rules! rooms {
    ($($room:ident)*) => {
        $(
            #[cfg(feature = "internals")]
            #[doc(hidden)]
            pub mod $room;
            #[cfg(not(feature = "internals"))]
            mod $room;
        )*
    };
}

rooms! {
    agent backup bench cancel daemon exchange far follow fork guest host identity image keeper kind libvirt machine memory page pools qmp repository reset
    revert save transport wire
}

#[doc(hidden)]
pub mod cli;
pub mod doctor;
mod failpoint;
mod qcow2;
mod rate;
pub mod runs;

pub use cancel::Cancellation;
pub use doctor::check_here;
pub use exchange::{
    ExchangeError, ExchangeEvent, ExportFormat, ExportOptions, ImportOptions, export, import,
};
pub use far::{CacheOptions, FarOptions, FarSnapshot};
pub use fork::{ForkError, ForkEvent, ForkOptions, fork};
pub use guest::{NewPort, OverlayOptions, Profile, RewriteOptions};
pub use identity::Identity;
pub use image::journeys::{FlattenOptions, VerifyOptions, flatten, verify};
pub use image::{
    Compression, Damage, DamagedRange, Image, ImageError, Layout, Overview, Saved, VerifyReport,
    inspect,
};
pub use keeper::{Inheritance, Successor};
pub use kind::{Details, ErrorKind};
pub use libvirt::{DomainAddress, DomainOptions};
pub use memory::{FillDelay, WorkingSet};
pub use revert::{
    AgentOptions, CloneIdentity, Delivery, Orphan, Outcome, Placement, Preload, Progress, ResetWay,
    ResumeOptions, RevertError, RevertEvent, RevertOptions, Reverted, Rtc, ServeOptions, Target,
    Unreadable, harvest, resume, revert, revert_resettable, serve, session, take_over,
};
pub use save::{
    ChangedSince, CheckItem, CopyError, DiskChoice, GuestAddress, PauseParts, Quiesce, Reading,
    Recovered, SaveError, SaveEvent, SaveOptions, SavedGuest, SwitchedDisk, check, recover, save,
    save_resettable,
};

/// What the errors of the journeys are made of.
pub mod error {
    pub use crate::agent::AgentError;
    pub use crate::guest::GuestError;
    pub use crate::host::PageSizeError;
    pub use crate::host::in_use::{Protocol, ReadError};
    pub use crate::host::rights::Lack;
    pub use crate::host::uffd::UffdError;
    pub use crate::libvirt::{DefinitionError, LibvirtError, PlanError};
    pub use crate::memory::{MemoryError, WorkingSetError};
    pub use crate::qmp::QmpError;
    pub use crate::reset::ResetError;
    pub use crate::revert::{AttachError, FollowError, PostcopyError};
    pub use crate::save::{CheckError, JournalError, LeftOver, Obstacle, OverlayError};
    pub use crate::transport::TransportError;
    pub use crate::wire::WireError;
}

/// Guests of a daemon's pools, asked for by its socket.
pub mod pool {
    pub use crate::daemon::{Client, ClientError};
    pub use crate::pools::{
        CacheView, Change, GuestView, MemoryView, PoolConfig, PoolSettings, PoolState, PoolView,
        Problem, ResetView, SetupState, SetupView,
    };
}

/// Guests saved into a repository, as a configuration file says.
pub mod backups {
    pub use crate::backup::{
        BackupConfig, BackupError, BackupEvent, BackupReport, KeepConfig, MachineConfig, Spool,
        back_up,
    };
}

/// Snapshots kept in repositories: in a directory or an object store. Everything here blocks.
pub mod snapshots {
    pub use crate::repository::{
        Access, Address, CheckOptions, Checked, Difference, Extent, ExtentId, FileMap, FileRef,
        ForgetOptions, Inline, KeySource, Looked, MapId, Moment, Moved, PackId, PackOptions,
        PackSource, PackedAt, PruneOptions, Pruned, PullOptions, Pulled, PulledFile, PushOptions,
        Pushed, Recipients, Repository, RepositoryDamage, RepositoryError, RepositoryId, Retention,
        Role, Snapshot, SnapshotId, SnapshotManifest, SnapshotName, StoreError, StoreFailure,
        StoreWait, check, copy, diff, forget, list, pack, prune, pull, push, tag, unpack,
    };
}

/// What an image says of itself and of its machine.
pub mod record {
    pub use crate::image::{LayerRef, Manifest, Sections};
    pub use crate::machine::{
        Disk, DiskFile, DiskRole, FileStamp, Hotplug, Machine, PluggedDevice, QemuVersion,
    };
}

/// The memory in an image, page by page: an `Arc<Image>` is a [`PageSource`](pages::PageSource).
pub mod pages {
    pub use crate::page::{
        Block, BlockId, ChunkId, ChunkReader, Location, PAGE_SIZE, Page, PageSource, SourceError,
    };
}
