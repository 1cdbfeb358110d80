//! Takes faults from a userfaultfd and has them answered.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::fault_reader::FaultReader;
use super::{FaultReport, Memory, MemoryError, Pager};
use crate::cancel::Cancellation;
use crate::host::uffd::Uffd;
use crate::page::{BlockId, PAGE_SIZE};
use crate::transport::DirectTransport;

/// The longest time to spin while memory is being filled: the processors are busy then, and a thread that has
/// just been given a page may wait for the processor on which we spin (on two processors, one
/// fault in a hundred waited for all of [`SPIN_MAX`]).
const SPIN_MAX_FILLING: Duration = Duration::from_micros(60);

/// Takes faults from a userfaultfd, of which others may be readers as well.
pub struct FaultHandler {
    memory: Arc<Memory>,
    pager: Pager,
    uffd: Arc<Uffd>,
    reader: FaultReader,
    /// The blocks by address: first address, address behind the last, block.
    ranges: Vec<(u64, u64, BlockId)>,
}

impl FaultHandler {
    /// A handler of the faults in the memory that `direct` serves. That must be every block,
    /// since no other reader hears of a fault that is read here. `cancel` ends [`run`], behind
    /// the faults that it has read.
    ///
    /// [`run`]: FaultHandler::run
    ///
    /// # Errors
    /// When a reader of the source or a descriptor can't be had.
    pub fn new(
        memory: Arc<Memory>,
        direct: &DirectTransport,
        cancel: &Cancellation,
    ) -> Result<FaultHandler, MemoryError> {
        let reader = FaultReader::new(Arc::clone(direct.uffd()), cancel);
        let range = |(index, block): (usize, &crate::page::Block)| {
            let id = BlockId(index as u16);
            direct.address(id).map(|start| (start, start + block.len, id))
        };
        let mut ranges: Vec<_> = memory.blocks().iter().enumerate().filter_map(range).collect();
        ranges.sort_unstable();
        Ok(FaultHandler {
            pager: Pager::new(Arc::clone(&memory))?,
            memory,
            uffd: Arc::clone(direct.uffd()),
            reader: reader.map_err(MemoryError::FaultHandler)?,
            ranges,
        })
    }

    /// Records what is demanded, for so long from now on.
    pub fn recording(self, window: Duration) -> FaultHandler {
        FaultHandler { pager: self.pager.recording(window), ..self }
    }

    /// Takes and answers faults until it is cancelled. That the guest's process has ended shows
    /// only when a page is installed. In the report, an answer's time runs from reading the
    /// fault to the page being in place.
    ///
    /// # Errors
    /// When a fault could not be answered; the thread that waits for it waits forever.
    pub fn run(mut self) -> Result<FaultReport, MemoryError> {
        while let Some(heard) = self.wait()? {
            for at in 0..self.reader.faults().len() {
                self.answer(self.reader.faults()[at].address, heard)?;
            }
        }
        Ok(self.pager.into_report())
    }

    /// Waits for faults, and returns when they were read; nothing once it is cancelled.
    fn wait(&mut self) -> Result<Option<Instant>, MemoryError> {
        let most = match self.memory.is_far() {
            // What a fault waits for takes far longer than waking up does.
            true => Duration::ZERO,
            false if self.memory.is_filling() => SPIN_MAX_FILLING,
            false => Duration::MAX,
        };
        self.reader.wait(most).map_err(MemoryError::FaultHandler)
    }

    fn find(&self, address: u64) -> Option<(u64, BlockId)> {
        let behind = self.ranges.partition_point(|(start, ..)| *start <= address);
        let (start, end, block) = *self.ranges.get(behind.checked_sub(1)?)?;
        (address < end).then_some((start, block))
    }

    fn answer(&mut self, address: u64, heard: Instant) -> Result<(), MemoryError> {
        let Some((start, block)) = self.find(address) else {
            // Not memory of the guest's. The thread is woken and faults again; the owner of the
            // userfaultfd may read that fault.
            let page = address & !(PAGE_SIZE as u64 - 1);
            return self
                .uffd
                .wake(page, PAGE_SIZE as u64)
                .map_err(|e| MemoryError::FaultHandler(e.into()));
        };
        let page_size = self.memory.block(block).page_size;
        let offset = (address - start) & !(page_size - 1);
        let len = page_size.min(self.memory.block(block).len - offset);
        self.pager.serve(block, offset, len, heard)
    }
}
