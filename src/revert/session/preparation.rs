//! What a guest needs that is to be reset inside its QEMU.

use std::sync::Arc;

use crate::host::procfs::{AddressSpace, ProcessMemory};
use crate::host::uffd::Uffd;
use crate::image::Image;
use crate::reset::{
    GuestMemory, MappedMemory, Requests, ResetError, SOCKET, StateFile, Tracker, Undo,
};
use crate::revert::mapping::unmapped_ram;
use crate::runs::Entry;

/// What takes rights that the session gives up once its guest runs.
pub(super) struct Preparation {
    space: Arc<AddressSpace>,
    memory: ProcessMemory,
    state: StateFile,
    /// Where resets are asked for; none where the session is not recorded.
    requests: Option<Requests>,
}

impl Preparation {
    /// Takes it while the rights are there; QEMU's memory as /proc shows it may be open already.
    ///
    /// # Errors
    /// When QEMU may not be traced, or there is no room for the socket.
    pub fn new(
        pid: i32,
        space: Option<Arc<AddressSpace>>,
        run: Option<&Entry>,
    ) -> Result<Preparation, ResetError> {
        let failed = |source| ResetError::Memory { what: "opened", address: 0, source };
        let requests = run.map(|run| Requests::listen(&run.directory().join(SOCKET))).transpose();
        Ok(Preparation {
            space: space
                .map_or_else(|| AddressSpace::open(pid).map(Arc::new), Ok)
                .map_err(failed)?,
            memory: ProcessMemory::open(pid).map_err(failed)?,
            state: StateFile::new()?,
            requests: requests.map_err(ResetError::Requests)?,
        })
    }
}

/// How the memory of a guest that has all of it came.
pub(super) enum Placed {
    /// By a userfaultfd.
    Installed {
        /// That of QEMU.
        uffd: Arc<Uffd>,
        /// The address of each block, if it is known.
        addresses: Vec<Option<u64>>,
    },
    /// By a mapping of these blocks: their names in the image, and in QEMU.
    Mapped(Vec<(String, String)>),
}

impl Placed {
    /// Makes ready to take the memory back, and the file of the state that goes with it. Returns also
    /// what is left of the preparation.
    ///
    /// # Errors
    /// When some block did not come by userfaultfd, memory can't be write-protected, or a mapping
    /// is not found.
    pub fn undo(
        self,
        image: Arc<Image>,
        preparation: Preparation,
    ) -> Result<(Undo, StateFile, Option<Requests>), ResetError> {
        let Preparation { space, memory, state, requests } = preparation;
        match self {
            Placed::Installed { uffd, addresses } => {
                // SAFETY: each address has been proven to be the block's before anything was installed
                // there (`transport::proof`), and QEMU keeps its RAMBlocks where they are.
                let guest = unsafe { GuestMemory::new(image, &addresses, space, memory)? };
                Ok((Undo::Tracked(Tracker::start(guest, uffd)?), state, requests))
            }
            Placed::Mapped(blocks) => {
                let state = state.with_ram(unmapped_ram(&image, &blocks)?);
                let names: Vec<_> = blocks.into_iter().map(|(name, _)| name).collect();
                let mapped = MappedMemory::find(image, &names, space, memory)?;
                Ok((Undo::Mapped(mapped), state, requests))
            }
        }
    }
}
