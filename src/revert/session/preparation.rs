//! What a guest needs that is to be reset inside its QEMU.

use std::sync::Arc;

use crate::host::procfs::{AddressSpace, ProcessMemory};
use crate::host::uffd::Uffd;
use crate::image::Image;
use crate::reset::{GuestMemory, Requests, ResetError, SOCKET, StateFile, Tracker};
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

/// The memory of a guest that has all of it, and the userfaultfd by which it came.
pub(super) struct Installed {
    pub image: Arc<Image>,
    pub uffd: Arc<Uffd>,
    /// The address of each block, if it is known.
    pub addresses: Vec<Option<u64>>,
}

impl Installed {
    /// Begins to track what the guest writes. Returns also what is left of the preparation.
    ///
    /// # Errors
    /// When some block did not come by userfaultfd, or memory can't be write-protected.
    pub fn track(
        self,
        preparation: Preparation,
    ) -> Result<(Tracker, StateFile, Option<Requests>), ResetError> {
        let Preparation { space, memory, state, requests } = preparation;
        // SAFETY: each address has been proven to be the block's before anything was installed
        // there (`transport::proof`), and QEMU keeps its RAMBlocks where they are.
        let guest = unsafe { GuestMemory::new(self.image, &self.addresses, space, memory)? };
        Ok((Tracker::start(guest, self.uffd)?, state, requests))
    }
}
