//! A guest's memory as two sides bring it: QEMU's stream, and what is read from outside.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;

use super::error::SaveError;
use crate::cancel::Cancellation;
use crate::image::{ImageWriter, Inherited};
use crate::memory::ClaimMap;
use crate::memory::captured::CapturedMemory;
use crate::page::{Block, BlockId, PAGE_SIZE, Page, PageBytes, Run};

/// Pages that are handed to the writer while it is locked: the other side waits some
/// microseconds at most.
const AT_ONCE: u64 = 16;

/// How long somebody's capture, which takes tens of microseconds, is waited for at a time.
const NAP: Duration = Duration::from_micros(20);

/// Where memory is put, and who has captured which page. Both sides bring a page as it was at the
/// moment, so it does not matter which of them does; the claim sees to it that one does.
pub(super) struct Merge {
    /// The image, if one is written.
    image: Mutex<Option<ImageWriter>>,
    /// Memory from which clones and who follows take it, and the image what it had no room for.
    memory: Option<Arc<CapturedMemory>>,
    /// What is in memory and not in the image yet.
    deferred: Mutex<Vec<Run>>,
    blocks: Vec<Block>,
    claims: ClaimMap,
    /// Pages that were read from outside.
    direct: AtomicU64,
    /// Pages that were taken from the parent unread.
    inherited: AtomicU64,
    /// The stream has ended.
    ended: AtomicBool,
    /// Somebody waits for a page that only the stream can bring.
    wanted: AtomicBool,
    /// Told once all pages are captured.
    complete: Mutex<Option<oneshot::Sender<()>>>,
}

impl Merge {
    /// Begins with nothing captured of `blocks`. `complete` is told once all is.
    pub fn new(
        image: Option<ImageWriter>,
        memory: Option<Arc<CapturedMemory>>,
        blocks: &[Block],
        complete: oneshot::Sender<()>,
    ) -> Merge {
        // Pages are captured one by one, however large the host's are.
        let single = |block: &Block| Block { page_size: PAGE_SIZE as u64, ..block.clone() };
        let blocks: Vec<Block> = blocks.iter().map(single).collect();
        Merge {
            image: Mutex::new(image),
            memory,
            deferred: Mutex::default(),
            claims: ClaimMap::new(&blocks),
            blocks,
            direct: AtomicU64::new(0),
            inherited: AtomicU64::new(0),
            ended: AtomicBool::new(false),
            wanted: AtomicBool::new(false),
            complete: Mutex::new(Some(complete)),
        }
    }

    /// The guest's blocks, all with pages of 4096 bytes.
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// A page came by the stream.
    pub fn stream(&self, page: Page, bytes: &PageBytes) -> Result<(), SaveError> {
        self.capture(Run::single(page), |piece| self.put(piece, std::slice::from_ref(bytes)))
    }

    /// A page of zeros came by the stream.
    pub fn stream_zero(&self, page: Page) -> Result<(), SaveError> {
        self.capture(Run::single(page), |piece| self.put_zeros(piece))
    }

    /// Pages were read from outside, and are known to be as they were at the moment.
    pub fn read(&self, run: Run, bytes: &[u8]) -> Result<(), SaveError> {
        let pages = bytes.as_chunks::<PAGE_SIZE>().0;
        self.capture(run, |piece| {
            let skipped = (piece.first - run.first) as usize;
            self.direct.fetch_add(piece.count, Ordering::Relaxed);
            self.put(piece, &pages[skipped..skipped + piece.count as usize])
        })
    }

    /// The same for pages that are zeros.
    pub fn read_zeros(&self, run: Run) -> Result<(), SaveError> {
        self.capture(run, |piece| {
            self.direct.fetch_add(piece.count, Ordering::Relaxed);
            self.put_zeros(piece)
        })
    }

    /// Pages are what the image's parent has, as they were at the moment too.
    pub fn inherit(&self, run: Run, pages: &[Inherited]) -> Result<(), SaveError> {
        self.capture(run, |piece| {
            let skipped = (piece.first - run.first) as usize;
            self.inherited.fetch_add(piece.count, Ordering::Relaxed);
            match &mut *self.image() {
                Some(image) => Ok(image.inherit(piece, &pages[skipped..])?),
                None => Ok(()),
            }
        })
    }

    fn put(&self, run: Run, pages: &[PageBytes]) -> Result<(), SaveError> {
        if let Some(memory) = &self.memory {
            memory.put(run, pages).map_err(SaveError::Captured)?;
        }
        let mut image = self.image();
        let Some(image) = &mut *image else { return Ok(()) };
        if self.memory.is_some() && !image.has_room(run.count) {
            // Clones are not to wait for a disk.
            self.deferred.lock().unwrap_or_else(PoisonError::into_inner).push(run);
            return Ok(());
        }
        write(image, run, pages)
    }

    /// Puts into the image what it had no room for, once all is captured, or until `stop` is requested.
    /// `progress` is told of the image's bytes.
    pub fn write_deferred(
        &self,
        stop: &Cancellation,
        progress: impl Fn(u64),
    ) -> Result<(), SaveError> {
        let deferred =
            std::mem::take(&mut *self.deferred.lock().unwrap_or_else(PoisonError::into_inner));
        let Some(memory) = &self.memory else { return Ok(()) };
        let mut buffer = vec![[0; PAGE_SIZE]; AT_ONCE as usize];
        for run in deferred {
            if stop.is_requested() {
                return Err(SaveError::Interrupted);
            }
            let pages = &mut buffer[..run.count as usize];
            memory.read(run, pages.as_flattened_mut()).map_err(SaveError::Captured)?;
            if let Some(image) = &mut *self.image() {
                write(image, run, pages)?;
                progress(image.stats().written_bytes);
            }
        }
        Ok(())
    }

    fn put_zeros(&self, run: Run) -> Result<(), SaveError> {
        if let Some(memory) = &self.memory {
            memory.put_zeros(run);
        }
        match &mut *self.image() {
            Some(image) => Ok(image.zeros(run)?),
            None => Ok(()),
        }
    }

    /// Has `put` store each piece of `run` that nobody else has captured.
    fn capture(
        &self,
        run: Run,
        mut put: impl FnMut(Run) -> Result<(), SaveError>,
    ) -> Result<(), SaveError> {
        self.claims.claim(run, |claimed| {
            let mut first = claimed.first;
            while first < claimed.end() {
                let count = AT_ONCE.min(claimed.end() - first);
                put(Run { first, count, ..claimed })?;
                first += count;
            }
            if self.claims.mark_present(claimed) {
                let complete = self.complete.lock().unwrap_or_else(PoisonError::into_inner).take();
                complete.map(|complete| complete.send(()));
            }
            Ok(())
        })
    }

    fn image(&self) -> MutexGuard<'_, Option<ImageWriter>> {
        self.image.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The part of `run` from its first page that is not captured to its last one; nothing if all
    /// are.
    pub fn absent_within(&self, run: Run) -> Option<Run> {
        let absent = |number: &u64| !self.claims.is_claimed(run.block, *number);
        let first = (run.first..run.end()).find(absent)?;
        let last = (first..run.end()).rev().find(absent)?;
        Some(Run { first, count: last + 1 - first, ..run })
    }

    /// Whether `pages` can be stored at once with half of all buffers left to the stream. What is kept in
    /// memory as well always can.
    pub fn has_room(&self, pages: u64) -> bool {
        self.memory.is_some() || self.image().as_ref().is_none_or(|image| image.has_room(pages))
    }

    /// Whether all pages are captured.
    pub fn is_complete(&self) -> bool {
        self.claims.present() == self.claims.total()
    }

    /// The stream has ended, well or not: it brings nothing more.
    pub fn end(&self) {
        self.ended.store(true, Ordering::Release);
    }

    /// Whether it has.
    pub fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    /// Somebody waits for a page that only the stream can bring.
    pub fn want(&self) {
        self.wanted.store(true, Ordering::Release);
    }

    /// Whether somebody has begun to since this was last asked.
    pub fn takes_want(&self) -> bool {
        self.wanted.swap(false, Ordering::AcqRel)
    }

    /// How many pages are captured.
    pub fn captured(&self) -> u64 {
        self.claims.present()
    }

    /// How many of them were read from outside.
    pub fn direct(&self) -> u64 {
        self.direct.load(Ordering::Relaxed)
    }

    /// How many were taken from the image's parent, and read nowhere.
    pub fn inherited(&self) -> u64 {
        self.inherited.load(Ordering::Relaxed)
    }

    /// Bytes that the image has by now.
    pub fn written_bytes(&self) -> u64 {
        self.image().as_ref().map_or(0, |image| image.stats().written_bytes)
    }

    /// Waits until all that is claimed is captured: who waits for a page may be capturing it on a thread
    /// of their own.
    pub fn wait_settled(&self) {
        let is_settled = |block| {
            let mut settled = true;
            self.claims.unfinished(block, |_| settled = false);
            settled
        };
        for block in (0..self.blocks.len()).map(|index| BlockId(index as u16)) {
            while !is_settled(block) {
                std::thread::sleep(NAP);
            }
        }
    }

    /// The image's writer, once both sides are done.
    pub fn take_image(&self) -> Option<ImageWriter> {
        self.image().take()
    }
}

fn write(image: &mut ImageWriter, run: Run, pages: &[PageBytes]) -> Result<(), SaveError> {
    let mut pages = run.pages().zip(pages);
    Ok(pages.try_for_each(|(page, bytes)| image.page(page, bytes))?)
}
