//! The file from which QEMU takes the state of the devices.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};

use super::ResetError;
use crate::guest::RESET_POINT;
use crate::host::shared_memory;
use crate::image::Sections;
use crate::qcow2::write_state;
use crate::wire::tail;

/// A disk in memory whose internal snapshot [`RESET_POINT`] holds the state of a guest's devices,
/// and no RAM but what can't go back in another way.
pub(crate) struct StateFile {
    file: File,
    /// RAM that QEMU is to load with the devices, as a stream has it; of most guests none.
    ram: Vec<u8>,
}

impl StateFile {
    /// One that is empty.
    ///
    /// # Errors
    /// When the kernel has no memory or no descriptor left.
    pub fn new() -> Result<StateFile, ResetError> {
        let file = shared_memory::file(c"snapback-state").map_err(ResetError::StateFile)?;
        Ok(StateFile { file, ram: Vec::new() })
    }

    /// One that has QEMU load this RAM as well, which is what stands between the configuration and
    /// the devices in a stream.
    pub fn with_ram(self, ram: Vec<u8>) -> StateFile {
        StateFile { ram, ..self }
    }

    /// Writes it anew, for these parts of a migration stream. QEMU loads from it what it would load
    /// from a file that its own `savevm` has written, but for RAM (`qemu_loadvm_state` in QEMU's
    /// `migration/savevm.c` asks for no section).
    ///
    /// QEMU must not have it open: going to a snapshot changes the file, and it can't be gone to
    /// again.
    ///
    /// # Errors
    /// When the state is too large, or memory is short.
    pub fn write(&self, sections: &Sections) -> Result<BorrowedFd<'_>, ResetError> {
        let mut stream = sections.config.clone();
        stream.extend_from_slice(&self.ram);
        stream.extend(tail(&sections.devices, &sections.vmdesc));
        let emptied = self.file.set_len(0);
        let written = emptied.and_then(|()| write_state(&self.file, RESET_POINT, &stream));
        written.map(|()| self.file.as_fd()).map_err(ResetError::StateFile)
    }
}
