//! An image that is written from two sides: by QEMU's stream, and by what is read from outside.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use super::error::SaveError;
use crate::image::{ImageError, ImageWriter, WriterStats};
use crate::memory::ClaimMap;
use crate::page::{Block, PAGE_SIZE, Page, PageBytes, Run};

/// Pages that are handed to the writer while it is locked: the other side waits some
/// microseconds at most.
const AT_ONCE: u64 = 16;

/// An image's writer, and who has captured which page. Both sides bring a page as it was at the
/// moment, so it does not matter which of them does; the claim sees to it that one does.
pub(super) struct Merge {
    writer: Mutex<ImageWriter>,
    blocks: Vec<Block>,
    claims: ClaimMap,
    /// Pages that were read from outside.
    direct: AtomicU64,
    /// Told once all pages are captured.
    complete: Mutex<Option<oneshot::Sender<()>>>,
}

impl Merge {
    /// Begins with nothing captured of `blocks`. `complete` is told once all is.
    pub fn new(writer: ImageWriter, blocks: &[Block], complete: oneshot::Sender<()>) -> Merge {
        // Pages are captured one by one, however large the host's are.
        let single = |block: &Block| Block { page_size: PAGE_SIZE as u64, ..block.clone() };
        let blocks: Vec<Block> = blocks.iter().map(single).collect();
        Merge {
            writer: Mutex::new(writer),
            claims: ClaimMap::new(&blocks),
            blocks,
            direct: AtomicU64::new(0),
            complete: Mutex::new(Some(complete)),
        }
    }

    /// The guest's blocks, all with pages of 4096 bytes.
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// A page came by the stream.
    pub fn stream(&self, page: Page, bytes: &PageBytes) -> Result<(), SaveError> {
        self.capture(Run::single(page), |writer, _| writer.page(page, bytes))
    }

    /// A page of zeros came by the stream.
    pub fn stream_zero(&self, page: Page) -> Result<(), SaveError> {
        self.capture(Run::single(page), |writer, _| writer.zero(page))
    }

    /// Pages were read from outside, and are known to be as they were at the moment.
    pub fn read(&self, run: Run, bytes: &[u8]) -> Result<(), SaveError> {
        let pages = bytes.as_chunks::<PAGE_SIZE>().0;
        self.capture(run, |writer, piece| {
            let skipped = (piece.first - run.first) as usize;
            let mut brought = piece.pages().zip(&pages[skipped..]);
            self.direct.fetch_add(piece.count, Ordering::Relaxed);
            brought.try_for_each(|(page, bytes)| writer.page(page, bytes))
        })
    }

    /// The same for pages that are zeros.
    pub fn read_zeros(&self, run: Run) -> Result<(), SaveError> {
        self.capture(run, |writer, piece| {
            self.direct.fetch_add(piece.count, Ordering::Relaxed);
            writer.zeros(piece)
        })
    }

    /// Has `put` give the writer each piece of `run` that nobody else has captured.
    fn capture(
        &self,
        run: Run,
        mut put: impl FnMut(&mut ImageWriter, Run) -> Result<(), ImageError>,
    ) -> Result<(), SaveError> {
        self.claims.claim(run, |claimed| {
            let mut first = claimed.first;
            while first < claimed.end() {
                let count = AT_ONCE.min(claimed.end() - first);
                put(&mut self.writer(), Run { first, count, ..claimed })?;
                first += count;
            }
            if self.claims.mark_present(claimed) {
                let complete = self.complete.lock().unwrap_or_else(PoisonError::into_inner).take();
                complete.map(|complete| complete.send(()));
            }
            Ok::<_, ImageError>(())
        })?;
        Ok(())
    }

    fn writer(&self) -> MutexGuard<'_, ImageWriter> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The part of `run` from its first page that is not captured to its last one; nothing if all
    /// are.
    pub fn absent_within(&self, run: Run) -> Option<Run> {
        let absent = |number: &u64| !self.claims.is_claimed(run.block, *number);
        let first = (run.first..run.end()).find(absent)?;
        let last = (first..run.end()).rev().find(absent)?;
        Some(Run { first, count: last + 1 - first, ..run })
    }

    /// Whether the writer has room for `pages` more and as much again as half of all its buffers,
    /// which is the stream's.
    pub fn has_room(&self, pages: u64) -> bool {
        self.writer().has_room(pages)
    }

    /// Whether all pages are captured.
    pub fn is_complete(&self) -> bool {
        self.claims.present() == self.claims.total()
    }

    /// How many pages are captured.
    pub fn captured(&self) -> u64 {
        self.claims.present()
    }

    /// How many of them were read from outside.
    pub fn direct(&self) -> u64 {
        self.direct.load(Ordering::Relaxed)
    }

    /// How far the writer has come.
    pub fn stats(&self) -> WriterStats {
        self.writer().stats()
    }

    /// The writer, once both sides are done.
    pub fn into_writer(self) -> ImageWriter {
        self.writer.into_inner().unwrap_or_else(PoisonError::into_inner)
    }
}
