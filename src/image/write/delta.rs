//! What an image has in common with the one that it is written on top of: pages with
//! the same content at the same place.
//!
//! Contents are compared byte by byte with the verified pages of the other image: checksums
//! prove nothing where a user of the guest chooses the bytes. A page that can't be read there
//! counts as different, which only makes the new image larger.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::image::format::error::ImageError;
use crate::image::format::layout::PageEntry;
use crate::image::format::manifest::LayerRef;
use crate::image::read::cursor::Held;
use crate::image::read::image::Image;
use crate::image::read::layer::layer_and_number;
use crate::image::write::parent::refer_to;
use crate::page::{Block, BlockId, ChunkId, Location, Page};

/// The image on top of which another is written.
pub(in crate::image) struct Base {
    image: Arc<Image>,
    /// The layers of the new image, in order: its page index numbers them from 1.
    pub layers: Vec<LayerRef>,
    /// For each block of the new image, the base's block of the same name.
    blocks: Vec<Option<BlockId>>,
    /// Whether a page that can't be read has been reported.
    reported: AtomicBool,
}

impl Base {
    /// `image` as the base of an image of these blocks that is to be called `target`.
    pub fn new(image: &Arc<Image>, target: &Path, blocks: &[Block]) -> Result<Base, ImageError> {
        let theirs = &image.manifest().blocks;
        let same_name = |block: &Block| {
            let number = theirs.iter().position(|other| other.name == block.name)?;
            u16::try_from(number).ok().map(BlockId)
        };
        Ok(Base {
            layers: refer_to(image, target)?,
            blocks: blocks.iter().map(same_name).collect(),
            image: Arc::clone(image),
            reported: AtomicBool::new(false),
        })
    }

    /// Where the base has the page at the same place, if it has that place.
    fn find(&self, page: Page) -> Result<Option<Location>, ImageError> {
        let Some(Some(block)) = self.blocks.get(page.block.index()) else { return Ok(None) };
        if page.number >= self.image.manifest().blocks[block.index()].pages() {
            return Ok(None);
        }
        self.image.find(Page { block: *block, number: page.number }).map(Some)
    }

    fn report(&self, error: &ImageError) {
        if !self.reported.swap(true, Ordering::Relaxed) {
            tracing::warn!("what can't be read in the parent is stored again: {error}");
        }
    }
}

/// Compares pages with a base: the state of one thread.
pub(in crate::image) struct Comparer {
    base: Arc<Base>,
    chunks: Held,
}

impl Comparer {
    pub fn new(base: &Arc<Base>) -> Result<Comparer, ImageError> {
        Ok(Comparer { base: Arc::clone(base), chunks: Held::new(&base.image)? })
    }

    /// The page's entry in the new image's index, if the base has the same bytes at the
    /// same place.
    pub fn same(&mut self, page: Page, bytes: &[u8]) -> Option<PageEntry> {
        match self.compare(page, bytes) {
            Ok(entry) => entry,
            Err(error) => {
                self.base.report(&error);
                None
            }
        }
    }

    fn compare(&mut self, page: Page, bytes: &[u8]) -> Result<Option<PageEntry>, ImageError> {
        let Some(Location::Stored { chunk, slot }) = self.base.find(page)? else { return Ok(None) };
        self.chunks.hold(chunk)?;
        if self.chunks.pages(slot, 1) != bytes {
            return Ok(None);
        }
        Ok(stored(chunk, slot))
    }
}

/// The entry in the new image's index of a page that the base stores there.
fn stored(chunk: ChunkId, slot: usize) -> Option<PageEntry> {
    // The base itself is the new image's first layer, its layers follow.
    let (layer, chunk) = layer_and_number(chunk);
    let slot = u8::try_from(slot).ok();
    layer.checked_add(1).zip(slot).map(|(layer, slot)| PageEntry::Stored { layer, chunk, slot })
}

/// What the parent of a new image has, for pages that are known to be the same.
#[derive(Clone)]
pub(crate) struct ParentPages(Arc<Base>);

/// A page that is the parent's: what the new image's index says of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Inherited(pub(in crate::image) PageEntry);

impl ParentPages {
    pub(in crate::image) fn of(base: &Arc<Base>) -> ParentPages {
        ParentPages(Arc::clone(base))
    }

    /// The page at the same place of the parent's block of the same name. None where there is no
    /// such page, or its place can't be read: that is reported once.
    pub(crate) fn get(&self, page: Page) -> Option<Inherited> {
        let found = self.0.find(page).inspect_err(|error| self.0.report(error)).ok()??;
        let entry = match found {
            Location::Zero => Some(PageEntry::Zero),
            Location::Stored { chunk, slot } => stored(chunk, slot),
        };
        entry.map(Inherited)
    }
}
