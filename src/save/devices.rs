//! The state of the devices at the moment. QEMU's stream brings it too, but last; with it at hand,
//! the stream need not be waited for.

use std::fs::File;
use std::io::{Read, Seek};
use std::os::fd::{AsFd, AsRawFd};

use crate::host::shared_memory;
use crate::qmp::{Qmp, QmpError};
use crate::wire::devices;

/// The set by which QEMU opens the descriptor: a number that nobody else takes.
const SET: u64 = 0x5ba0_0001;

/// Memory to which QEMU writes the state of its devices.
pub(super) struct DeviceState {
    file: File,
    /// QEMU has written it.
    taken: bool,
}

impl DeviceState {
    /// Gives QEMU the memory, ahead of the pause.
    ///
    /// # Errors
    /// Says why that can't be had.
    pub async fn prepare(qmp: &Qmp) -> Result<DeviceState, String> {
        let failed = |error: std::io::Error| format!("memory for the state of devices: {error}");
        let file = shared_memory::file(c"snapback-devices").map_err(failed)?;
        // QEMU takes a descriptor of a set only if it was opened as it wants to open it.
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let writable = File::options().write(true).open(path).map_err(failed)?;
        // A save that was killed may have left one.
        let _ = qmp.remove_fds(SET).await;
        qmp.add_fd(SET, writable.as_fd()).await.map_err(|error: QmpError| error.to_string())?;
        Ok(DeviceState { file, taken: false })
    }

    /// Has QEMU write it. The guest stands still. If QEMU can't, its stream is waited for.
    pub async fn take(&mut self, qmp: &Qmp) {
        match qmp.save_devices(SET).await {
            Ok(()) => self.taken = true,
            Err(error) => tracing::warn!("the state of the devices comes last: {error}"),
        }
    }

    /// It is not needed.
    pub async fn discard(self, qmp: &Qmp) {
        forget(qmp).await;
    }

    /// Whether it has been written.
    pub fn is_taken(&self) -> bool {
        self.taken
    }

    /// The device sections as a migration stream has them; nothing if QEMU has not written them.
    pub fn sections(&self) -> Option<Vec<u8>> {
        let mut state = Vec::new();
        let read = self.taken.then(|| (&self.file).read_to_end(&mut state))?;
        read.and_then(|_| (&self.file).rewind())
            .map_err(|error| error.to_string())
            .and_then(|()| devices::sections(state).map_err(|error| error.to_string()))
            .inspect_err(|error| tracing::warn!("the state of the devices: {error}"))
            .ok()
    }

    /// The same, once it is needed no more.
    pub async fn into_sections(self, qmp: &Qmp) -> Option<Vec<u8>> {
        forget(qmp).await;
        self.sections()
    }
}

/// Has QEMU close its copy.
async fn forget(qmp: &Qmp) {
    if let Err(error) = qmp.remove_fds(SET).await {
        tracing::debug!("QEMU keeps memory that it does not need: {error}");
    }
}
