//! What a session hands to its keeper as it goes, and what its successor reads of it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::broker::Broker;
use super::options::Delivery;
use crate::far::FarAgain;
use crate::guest::Process;
use crate::host::pidfd::Pidfd;
use crate::host::procfs::AddressSpace;
use crate::host::sandbox::Sandbox;
use crate::identity::Identity;
use crate::image::{Image, ImageError};
use crate::keeper::{Held, Holder, Keeper, Ledger, Successor};
use crate::libvirt::DomainAddress;
use crate::memory::ClaimMap;
use crate::qmp::Qmp;
use crate::runs::{Entry, ProcessId};

/// What never changes in a session, as its ledger holds it.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Details {
    pub image: PathBuf,
    pub identity: Identity,
    pub delivery: Delivery,
    /// The domain, where libvirt has started the guest.
    #[serde(default)]
    pub domain: Option<DomainAddress>,
    /// The program of the broker, where the process is to be in a sandbox.
    pub sandbox: Option<PathBuf>,
    /// The directory of its record, where it has one.
    pub run: Option<PathBuf>,
    /// The snapshot, where it is one of a repository. The image is none on this host then.
    #[serde(default)]
    pub far: Option<FarDetails>,
}

/// A snapshot of a repository, for who goes on with its guest.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct FarDetails {
    pub again: FarAgain,
    /// The overlays into which its disks follow, as QEMU names them.
    pub overlays: Vec<PathBuf>,
}

impl Details {
    /// Those of a predecessor's session.
    pub fn read(ledger: &Ledger) -> io::Result<Details> {
        Ok(serde_json::from_slice(&ledger.details()?)?)
    }

    /// Opens the image that was held, or the copy that has taken its place since it was damaged.
    pub fn open_image(&self, held: File) -> Result<Arc<Image>, ImageError> {
        Image::open_file(held, &self.image).or_else(|error| match Image::open(&self.image) {
            Ok(copy) if copy.identity() == self.identity => Ok(copy),
            _ => Err(error),
        })
    }
}

/// Has the record tell of each keeper.
pub(super) fn note_keepers(keeper: &Keeper, ledger: &Ledger, run: Option<&Entry>) {
    if let Some(notes) = run.map(Entry::notes) {
        let ledger = ledger.clone();
        keeper.on_start(move |process| {
            let ledger = ledger.clone();
            notes.note(move |record| {
                record.keeper = Some(ProcessId::serving(process as i32, &ledger));
            });
        });
    }
}

/// The keeper of a session and the ledger that it holds, for those who bring memory.
#[derive(Debug, Clone)]
pub(super) struct Kept {
    pub ledger: Ledger,
    holder: Holder,
}

impl Kept {
    /// Starts a keeper for a session that begins. Dropping it ends the keeper.
    pub fn start(
        successor: &Successor,
        image: &Image,
        delivery: &Delivery,
        domain: Option<DomainAddress>,
        sandbox: Option<&Path>,
        run: Option<&Entry>,
        far: Option<FarDetails>,
    ) -> io::Result<(Keeper, Kept)> {
        let file = image.files().next();
        let nothing = far.is_some().then(|| File::open("/dev/null")).transpose()?;
        let (path, file) = match (file, &nothing) {
            (Some((path, file)), _) => (std::path::absolute(path)?, file),
            (None, Some(nothing)) => (image.name().into(), nothing),
            (None, None) => return Err(io::ErrorKind::Unsupported.into()),
        };
        let details = Details {
            image: path,
            identity: image.identity(),
            delivery: delivery.clone(),
            domain,
            sandbox: sandbox.map(Path::to_owned),
            run: run.map(|run| run.directory().to_owned()),
            far,
        };
        let blocks = &image.manifest().blocks;
        let words = ClaimMap::words_for(blocks);
        let ledger = Ledger::create(blocks.len(), words, &serde_json::to_vec(&details)?)?;
        let keeper = Keeper::start(successor.clone())?;
        note_keepers(&keeper, &ledger, run);
        let kept = Kept { ledger, holder: keeper.holder() };
        kept.holder.hold(Held::Ledger, kept.ledger.as_fd())?;
        kept.holder.hold(Held::Image, file.as_fd())?;
        Ok((keeper, kept))
    }

    /// Those of a session that has been taken over.
    pub fn inherited(keeper: &Keeper, ledger: Ledger) -> Kept {
        Kept { ledger, holder: keeper.holder() }
    }

    /// QEMU has been started.
    pub fn hold_qemu(&self, process: &Process, qmp: &Qmp) -> io::Result<()> {
        self.ledger.set_qemu(process.pid());
        self.holder.hold(Held::Qemu, process.pidfd())?;
        self.hold_control(qmp)?;
        self.holder.hold(Held::Output, process.output())
    }

    /// libvirt has started QEMU. What it says goes to a log of libvirt's.
    pub fn hold_domain(&self, pid: i32) -> io::Result<()> {
        self.ledger.set_qemu(pid);
        self.holder.hold(Held::Qemu, Pidfd::open(pid)?.as_fd())?;
        self.holder.hold(Held::Output, File::open("/dev/null")?.as_fd())
    }

    /// A QEMU that was started by another session goes on by our stream. Told last, and only once
    /// a successor has all that it needs: until it is, QEMU is left alone if we die.
    pub fn hold_orphan(&self, pid: i32, qmp: &Qmp) -> io::Result<()> {
        self.hold_control(qmp)?;
        // What it says goes elsewhere.
        self.holder.hold(Held::Output, File::open("/dev/null")?.as_fd())?;
        self.ledger.set_qemu(pid);
        self.ledger.set_running();
        self.holder.hold(Held::Qemu, Pidfd::open(pid)?.as_fd())
    }

    /// The monitor, where it is ours to pass on: libvirt keeps its own.
    fn hold_control(&self, qmp: &Qmp) -> io::Result<()> {
        match qmp.socket() {
            Some(socket) => self.holder.hold(Held::Control, socket),
            None => Ok(()),
        }
    }

    /// The migration begins.
    pub fn hold_stream(&self, stream: BorrowedFd<'_>) -> io::Result<()> {
        self.holder.hold(Held::Stream, stream)
    }

    /// Nobody may look into QEMU any more from now on.
    pub fn hold_address_space(&self, qemu: &AddressSpace) -> io::Result<()> {
        let [mappings, page_map] = qemu.descriptors();
        self.holder.hold(Held::Mappings, mappings)?;
        self.holder.hold(Held::PageMap, page_map)
    }

    /// There is a broker for this process, and for successors in the same sandbox.
    pub fn hold_broker(&self, broker: &Broker) -> io::Result<()> {
        self.holder.hold(Held::Broker, broker.connection())
    }

    /// This process is in a sandbox from now on, and so will be its successors.
    pub fn confine(&self, sandbox: Sandbox) {
        self.holder.confine(sandbox);
    }

    /// Pages go directly from now on.
    pub fn hold_direct(
        &self,
        userfaultfd: BorrowedFd<'_>,
        addresses: &[Option<u64>],
    ) -> io::Result<()> {
        self.holder.hold(Held::Userfaultfd, userfaultfd)?;
        self.ledger.set_direct(addresses);
        Ok(())
    }
}
