//! Images to and from the formats of other programs: migration streams and
//! mapped-ram files of QEMU's, libvirt's saved guests, plain memory, ELF cores.
//!
//! Each format has its file; [`export`] and [`import`] choose among them. Everything
//! here blocks, and reports its progress to a function of the caller.

mod command;
mod decompress;
mod elf;
mod error;
mod export;
mod import;
mod libvirt;
mod mapped_ram;
mod native;
mod output;
mod pages;
mod patient;
mod physical;
mod plain_memory;
mod stream;

use std::time::{Duration, Instant};

use serde::Serialize;

pub use command::words;
pub use error::ExchangeError;
pub use export::{ExportFormat, ExportOptions, export};
pub use import::{ImportOptions, import};
pub use libvirt::{Compressed, LibvirtHeader};
#[doc(hidden)]
pub use stream::read_memory;

use crate::cancel::Cancellation;

/// How often progress is reported.
const PROGRESS_EVERY: Duration = Duration::from_millis(100);

/// What happens during an export or import, in this order.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
#[non_exhaustive]
pub enum ExchangeEvent {
    /// Something that the user should know.
    Note {
        /// What it is.
        what: String,
    },
    /// How far memory has come.
    Progress {
        /// Pages of 4096 bytes done; a stream may bring a page several times.
        pages: u64,
        /// Pages of the machine.
        total: u64,
    },
    /// The export is whole, on disk, under its name.
    Exported {
        /// Bytes of guest memory in it, zeros included.
        ram_bytes: u64,
        /// Length of what was written in bytes; holes of a sparse file count.
        file_bytes: u64,
    },
    /// The image is whole, on disk, under its name.
    Imported {
        /// Versioned machine type of the guest.
        machine_type: String,
        /// Whether the guest runs once it is reverted.
        running: bool,
        /// Pages of 4096 bytes that are stored.
        pages: u64,
        /// Pages that are all zeros.
        zero_pages: u64,
        /// Size of the image in bytes.
        image_bytes: u64,
    },
}

/// Reports the progress of an export or import, and checks for cancellation.
struct Watch<'a> {
    cancel: &'a Cancellation,
    on_event: &'a mut dyn FnMut(ExchangeEvent),
    pages: u64,
    total: u64,
    told: Instant,
}

impl<'a> Watch<'a> {
    fn new(cancel: &'a Cancellation, on_event: &'a mut dyn FnMut(ExchangeEvent)) -> Watch<'a> {
        Watch { cancel, on_event, pages: 0, total: 0, told: Instant::now() }
    }

    /// Reports an event.
    fn tell(&mut self, event: ExchangeEvent) {
        (self.on_event)(event);
    }

    /// Checks for cancellation.
    ///
    /// # Errors
    /// [`ExchangeError::Interrupted`] once it is requested.
    fn check(&self) -> Result<(), ExchangeError> {
        if self.cancel.is_requested() { Err(ExchangeError::Interrupted) } else { Ok(()) }
    }

    /// Counts pages that are done, and checks for cancellation now and then.
    ///
    /// # Errors
    /// [`ExchangeError::Interrupted`] once it is requested.
    fn done(&mut self, pages: u64) -> Result<(), ExchangeError> {
        let before = self.pages;
        self.pages += pages;
        // The clock costs more than most pages do.
        if before >> 8 == self.pages >> 8 {
            return Ok(());
        }
        self.check()?;
        if self.told.elapsed() >= PROGRESS_EVERY {
            self.told = Instant::now();
            let (pages, total) = (self.pages, self.total);
            self.tell(ExchangeEvent::Progress { pages, total });
        }
        Ok(())
    }
}
