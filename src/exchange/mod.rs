//! Conversion between images and the formats of other programs: QEMU's migration streams
//! and mapped-ram files, guests saved by libvirt, plain memory, ELF cores.
//!
//! There is one file for each format; [`export`] and [`import`] choose among them.
//! Everything here blocks, and reports its progress to a function of the caller's.

mod command;
mod decompress;
mod elf;
mod error;
mod export;
mod import;
mod libvirt;
mod mapped_ram;
mod memory;
mod native;
mod output;
mod pages;
mod patient;
mod stream;

use std::time::{Duration, Instant};

use schemars::JsonSchema;
use serde::Serialize;

pub use command::words;
pub use error::ExchangeError;
pub use export::{ExportFormat, ExportOptions, export};
pub use import::{ImportOptions, import};
#[cfg(feature = "internals")]
pub use libvirt::{Compressed, LibvirtHeader};
#[cfg(any(test, feature = "internals"))]
pub use stream::read_memory;

use crate::cancel::Cancellation;

/// The least time between two progress events.
const PROGRESS_EVERY: Duration = Duration::from_millis(100);

/// Events of an export or import, in the order in which they come.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
#[non_exhaustive]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum ExchangeEvent {
    /// Something that the user should know.
    Note {
        /// What it is.
        what: String,
    },
    /// Progress, ten times a second at most.
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

/// An export or import under way: reports its progress, and notices cancellation.
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

    /// Fails once cancellation is requested.
    ///
    /// # Errors
    /// [`ExchangeError::Interrupted`].
    fn check(&self) -> Result<(), ExchangeError> {
        if self.cancel.is_requested() { Err(ExchangeError::Interrupted) } else { Ok(()) }
    }

    /// Counts pages that are done, and checks for cancellation now and then.
    ///
    /// # Errors
    /// [`ExchangeError::Interrupted`] once cancellation is requested.
    fn done(&mut self, pages: u64) -> Result<(), ExchangeError> {
        let before = self.pages;
        self.pages += pages;
        // Reading the clock costs more than handling most pages: every 256th is enough.
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
