//! A machine's memory in order, in pieces as large as they come.

use super::{ExchangeError, Watch};
use crate::page::{BlockId, ChunkId, Location, PAGE_SIZE, Page, PageSource, Run};

/// The most zero pages told at once: as much as bounds the time between two checks
/// of the wish to stop, and the memory of whoever is told.
const ZERO_PAGES: u64 = 4096;

/// Neighbouring pages of one block.
pub(super) enum Piece<'a> {
    /// All zeros.
    Zeros(Run),
    /// Their bytes, one page behind the other.
    Data(Run, &'a [u8]),
}

/// Tells all pages of all blocks to `each`, in ascending order.
pub(super) fn for_each(
    source: &impl PageSource,
    watch: &mut Watch<'_>,
    mut each: impl FnMut(Piece<'_>) -> Result<(), ExchangeError>,
) -> Result<(), ExchangeError> {
    watch.total = source.blocks().iter().map(|block| block.pages()).sum();
    let mut walk = Walk::new(source)?;
    for index in 0..source.blocks().len() {
        let block = BlockId(index as u16);
        let pages = source.blocks()[index].pages();
        let mut number = 0;
        while number < pages {
            let piece = walk.piece(Page { block, number })?;
            let (Piece::Zeros(run) | Piece::Data(run, _)) = piece;
            each(piece)?;
            watch.done(run.count)?;
            number = run.end();
        }
    }
    Ok(())
}

struct Walk<'a, S: PageSource> {
    source: &'a S,
    reader: Box<dyn crate::page::ChunkReader>,
    /// The chunk whose bytes are kept, since zeros may lie between its pages.
    chunk: Option<ChunkId>,
    bytes: Vec<u8>,
}

impl<'a, S: PageSource> Walk<'a, S> {
    fn new(source: &'a S) -> Result<Self, ExchangeError> {
        let reader = source.reader().map_err(|e| ExchangeError::memory("", 0, &e))?;
        Ok(Walk { source, reader, chunk: None, bytes: Vec::new() })
    }

    /// The pages from `first` on that are stored together, or are all zeros.
    fn piece(&mut self, first: Page) -> Result<Piece<'_>, ExchangeError> {
        let block = &self.source.blocks()[first.block.index()];
        let failed = |e| ExchangeError::memory(&block.name, first.offset(), &e);
        let mut run = Run::single(first);
        let next = |run: &Run| {
            let number = run.end();
            let page = Page { block: first.block, number };
            (number < block.pages()).then(|| self.source.locate(page))
        };
        match self.source.locate(first).map_err(failed)? {
            Location::Zero => {
                while run.count < ZERO_PAGES && matches!(next(&run), Some(Ok(Location::Zero))) {
                    run.count += 1;
                }
                Ok(Piece::Zeros(run))
            }
            Location::Stored { chunk, slot } => {
                // Where the index is damaged is told when its turn comes.
                while let Some(Ok(location)) = next(&run)
                    && location == (Location::Stored { chunk, slot: slot + run.count as usize })
                {
                    run.count += 1;
                }
                if self.chunk != Some(chunk) {
                    self.chunk = None;
                    let bytes = self.reader.read(chunk).map_err(failed)?;
                    self.bytes.clear();
                    self.bytes.extend_from_slice(bytes);
                    self.chunk = Some(chunk);
                }
                let bytes = slot * PAGE_SIZE..(slot + run.count as usize) * PAGE_SIZE;
                let bytes = self
                    .bytes
                    .get(bytes)
                    .ok_or_else(|| failed("its chunk is shorter than the index says".into()))?;
                Ok(Piece::Data(run, bytes))
            }
        }
    }
}
