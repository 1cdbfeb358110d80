//! All pages of an image in order.

use std::ops::Range;
use std::sync::Arc;

use crate::image::format::error::ImageError;
use crate::image::read::image::Image;
use crate::image::read::layer::Buffers;
use crate::page::{BlockId, ChunkId, Location, PAGE_SIZE, Page, Run};

/// The most zero pages that come at once, 16 MiB: it bounds the time between two checks for
/// cancellation, and the memory of what is made of them.
const MAX_ZEROS: u64 = 4096;

/// Neighbouring pages of one block.
pub(crate) enum Piece<'a> {
    /// All zeros.
    Zeros(Run),
    /// Stored side by side: their bytes, verified, one page behind the other.
    Data(Run, &'a [u8]),
}

impl Piece<'_> {
    /// Which pages they are.
    pub fn run(&self) -> Run {
        let (Piece::Zeros(run) | Piece::Data(run, _)) = self;
        *run
    }
}

/// Reads pages in ascending order, in pieces as large as they come: runs of zeros, and the
/// pages that are stored side by side in one chunk. A chunk is read once as long as its pages
/// lie near each other, whatever lies between them.
///
/// After an error it stands where it stood before.
pub(crate) struct Cursor {
    chunks: Held,
    /// What is left of the block where it stands.
    rest: Run,
    /// The blocks behind that one.
    blocks: Range<u16>,
    /// Where the first page of the rest lies, if that is known already.
    location: Option<Location>,
}

impl Cursor {
    /// A cursor over all pages of all blocks.
    pub fn over_all(image: &Arc<Image>) -> Result<Cursor, ImageError> {
        // No more blocks than a BlockId can count: see check_blocks.
        let blocks = 0..image.manifest().blocks.len() as u16;
        let rest = Run { block: BlockId(0), first: 0, count: 0 };
        Ok(Cursor { chunks: Held::new(image)?, rest, blocks, location: None })
    }

    /// A cursor over some pages of one block.
    pub fn over(image: &Arc<Image>, pages: Run) -> Result<Cursor, ImageError> {
        Ok(Cursor { chunks: Held::new(image)?, rest: pages, blocks: 0..0, location: None })
    }

    /// The page where it stands: the first of the next piece. None at the end.
    pub fn page(&mut self) -> Option<Page> {
        while self.rest.count == 0 {
            let block = BlockId(self.blocks.next()?);
            let count = self.chunks.image.manifest().blocks[block.index()].pages();
            self.rest = Run { block, first: 0, count };
        }
        Some(Page { block: self.rest.block, number: self.rest.first })
    }

    /// The next pages. None at the end.
    ///
    /// # Errors
    /// When the index is damaged where it speaks of the first of these pages, or when their
    /// chunk can't be read or is damaged.
    pub fn next_piece(&mut self) -> Result<Option<Piece<'_>>, ImageError> {
        let Some(first) = self.page() else { return Ok(None) };
        let location = match self.location {
            Some(location) => location,
            None => self.chunks.image.find(first)?,
        };
        self.location = Some(location);
        if let Location::Stored { chunk, .. } = location {
            self.chunks.hold(chunk)?;
        }
        let (run, next) = self.run_from(first, location);
        self.location = next;
        self.rest = Run { first: run.end(), count: self.rest.count - run.count, ..self.rest };
        Ok(Some(match location {
            Location::Zero => Piece::Zeros(run),
            Location::Stored { slot, .. } => {
                Piece::Data(run, self.chunks.pages(slot, run.count as usize))
            }
        }))
    }

    /// The pages from the first on that are one piece, and where the page behind them lies,
    /// if it had to be looked for and was found. Damage of the index behind the first page is
    /// told when its turn comes.
    fn run_from(&self, first: Page, location: Location) -> (Run, Option<Location>) {
        let mut run = Run::single(first);
        let most = match location {
            Location::Zero => self.rest.count.min(MAX_ZEROS),
            Location::Stored { .. } => self.rest.count,
        };
        while run.count < most {
            let next = self.chunks.image.find(Page { number: run.end(), ..first }).ok();
            let goes_on = match location {
                Location::Zero => Location::Zero,
                Location::Stored { chunk, slot } => {
                    Location::Stored { chunk, slot: slot + run.count as usize }
                }
            };
            if next != Some(goes_on) {
                return (run, next);
            }
            run.count += 1;
        }
        (run, None)
    }
}

/// An image, and the chunk of it that was read last.
pub(crate) struct Held {
    image: Arc<Image>,
    buffers: Buffers,
    chunk: Option<ChunkId>,
}

impl Held {
    pub fn new(image: &Arc<Image>) -> Result<Held, ImageError> {
        Ok(Held { image: Arc::clone(image), buffers: image.buffers()?, chunk: None })
    }

    /// Reads a chunk, unless it was the last one.
    pub fn hold(&mut self, chunk: ChunkId) -> Result<(), ImageError> {
        if self.chunk != Some(chunk) {
            let (layer, number, entry) = self.image.chunk(chunk)?;
            // What the buffers hold after an error is none.
            self.chunk = None;
            self.buffers.read(layer, number, &entry)?;
            self.chunk = Some(chunk);
        }
        Ok(())
    }

    /// Bytes of pages of the chunk that is held. [`Image::find`] has seen that the chunk has
    /// these pages.
    pub fn pages(&self, slot: usize, count: usize) -> &[u8] {
        &self.buffers.plain()[slot * PAGE_SIZE..(slot + count) * PAGE_SIZE]
    }
}
