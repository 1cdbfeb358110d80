//! The thread that reads memory from the back.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use super::places::{Place, Places};
use super::unchanged::Inheritance;
use super::window::{Ended, capture, run_of};
use crate::cancel::Cancellation;
use crate::host::memory;
use crate::host::procfs::{Pagemap, flags};
use crate::page::{BlockId, PAGE_SIZE, Run};
use crate::save::merge::Merge;

/// Pages that are read by one call, 2 MiB: in pieces of this size the kernel reads at full speed
/// and never holds the lock of QEMU's address space for long.
const WINDOW: u64 = (2 << 20) / PAGE_SIZE as u64;

/// How long it waits before it looks again whether the image's writer has room, or clones run.
const NAP: Duration = Duration::from_micros(300);

/// Reads what is still protected.
pub(super) struct Reader {
    pid: i32,
    pagemap: Pagemap,
    /// The blocks that can be read.
    blocks: Vec<(BlockId, Place)>,
    merge: Arc<Merge>,
    stop: Cancellation,
    /// Requested once there is nobody who needs the processors more.
    clear: Option<Cancellation>,
    /// What is not read, but taken from the parent first.
    inheritance: Option<Inheritance>,
    buffer: Vec<u8>,
}

impl Reader {
    /// Makes ready to read.
    ///
    /// # Errors
    /// When QEMU's page map can't be read.
    pub fn new(
        places: &Places,
        merge: Arc<Merge>,
        stop: Cancellation,
        clear: Option<Cancellation>,
        inheritance: Option<Inheritance>,
    ) -> io::Result<Reader> {
        let pagemap = Pagemap::open(places.pid())?;
        let ids = (0..merge.blocks().len()).map(|index| BlockId(index as u16));
        let blocks = ids.filter_map(|id| Some((id, places.of(id)?))).collect();
        let buffer = vec![0; WINDOW as usize * PAGE_SIZE];
        let pid = places.pid();
        Ok(Reader { pid, pagemap, blocks, merge, stop, clear, inheritance, buffer })
    }

    /// Reads all blocks, the last first, or until it is stopped. What it can't read comes by
    /// QEMU's stream.
    pub fn run(mut self) {
        if let Err(ended) = self.read_all() {
            tracing::debug!("reading memory beside QEMU's stream has ended early: {ended}");
        }
    }

    fn read_all(&mut self) -> Result<(), Ended> {
        if let Some(inheritance) = self.inheritance.take() {
            inheritance.take(&self.merge, &self.stop)?;
        }
        let blocks = std::mem::take(&mut self.blocks);
        let read_only = |(_, place): &&(BlockId, Place)| place.read_only;
        // Firmware, some hundreds of KiB: at once, since only QEMU can write to it, and what it
        // sends is what is there then.
        for (block, place) in blocks.iter().filter(read_only) {
            self.read_whole(*block, place.start)?;
        }
        let is_clear = |clear: &Cancellation| clear.is_requested() || self.stop.is_requested();
        while !self.clear.as_ref().is_none_or(is_clear) {
            std::thread::sleep(NAP);
        }
        for (block, place) in blocks.iter().rev().filter(|block| !read_only(block)) {
            self.read_block(*block, place.start)?;
        }
        Ok(())
    }

    /// Reads a block to which the guest can't write.
    fn read_whole(&mut self, block: BlockId, start: u64) -> Result<(), Ended> {
        let pages = self.merge.blocks()[block.index()].pages();
        for first in (0..pages).step_by(WINDOW as usize) {
            self.wait_for_room()?;
            let run = Run { block, first, count: WINDOW.min(pages - first) };
            let bytes = &mut self.buffer[..run.bytes() as usize];
            memory::read(self.pid, start + run.offset(), bytes)?;
            self.merge.read(run, bytes)?;
        }
        Ok(())
    }

    fn read_block(&mut self, block: BlockId, start: u64) -> Result<(), Ended> {
        let pages = self.merge.blocks()[block.index()].pages();
        self.take_unused(block, start, pages)?;
        let mut end = pages;
        while end > 0 {
            // Windows are aligned as huge pages of QEMU's memory are.
            let first = (end - 1) / WINDOW * WINDOW;
            self.wait_for_room()?;
            let window = Run { block, first, count: end - first };
            capture(self.pid, &self.pagemap, start, window, &self.merge, &mut self.buffer)?;
            end = first;
        }
        Ok(())
    }

    /// Takes memory that was never used: the kernel says that it is mapped to the page of zeros.
    /// Linux before 6.7 doesn't, and it is read as everything else.
    fn take_unused(&self, block: BlockId, start: u64, pages: u64) -> Result<(), Ended> {
        let mut outcome = Ok(());
        let range = start..start + pages * PAGE_SIZE as u64;
        let unused = flags::PRESENT | flags::ZERO;
        let scanned = self.pagemap.scan(range, unused, flags::WRITTEN, |found| {
            if outcome.is_ok() {
                outcome = self
                    .going_on()
                    .and_then(|()| Ok(self.merge.read_zeros(run_of(block, start, &found))?));
            }
        });
        match scanned {
            Err(error) if error.raw_os_error() != Some(libc::ENOTTY) => Err(error.into()),
            _ => outcome,
        }
    }

    /// Waits until a good part of the image's buffers is free: QEMU's stream, for which guests
    /// wait, must not wait behind what is read here.
    fn wait_for_room(&self) -> Result<(), Ended> {
        loop {
            self.going_on()?;
            if self.merge.has_room(WINDOW) {
                return Ok(());
            }
            std::thread::sleep(NAP);
        }
    }

    fn going_on(&self) -> Result<(), Ended> {
        if self.stop.is_requested() { Err(Ended::Stopped) } else { Ok(()) }
    }
}
