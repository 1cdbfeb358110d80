//! Writes back what was in a guest's memory at the moment of its image.

use super::ResetError;
use super::dirty::{Aside, DirtyPage, Old};
use super::memory::Unit;
use super::shared::Shared;
use crate::page::{ChunkId, ChunkReader, Location, PAGE_SIZE, Page, PageSource, SourceError};

/// Bytes that are written back in one call, and protected again in one: 1 MiB.
const RUN_BYTES: usize = 1 << 20;

static ZEROS: [u8; PAGE_SIZE] = [0; PAGE_SIZE];

/// Pages from which on two threads are faster than one: starting one takes as long as writing some
/// hundred pages.
const ENOUGH_FOR_TWO: usize = 1024;

/// Writes pages back, which are sorted, and protects them again.
pub(super) fn write_back(
    shared: &Shared,
    pages: &[DirtyPage],
    aside: &Aside,
) -> Result<(), ResetError> {
    let all = |pages: &[DirtyPage]| WriteBack::new(shared, aside).all(pages);
    if pages.len() < ENOUGH_FOR_TWO {
        return all(pages);
    }
    let (first, second) = pages.split_at(pages.len() / 2);
    std::thread::scope(|scope| {
        let second = scope.spawn(|| all(second));
        let first = all(first);
        first.and(second.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}

/// Writes pages back, in runs.
struct WriteBack<'a> {
    shared: &'a Shared,
    aside: &'a Aside,
    image: ImagePages<'a>,
    run: Vec<u8>,
    first: Option<Unit>,
}

impl<'a> WriteBack<'a> {
    fn new(shared: &'a Shared, aside: &'a Aside) -> WriteBack<'a> {
        let image = ImagePages { shared, reader: None, held: None, chunk: Vec::new() };
        WriteBack { shared, aside, image, run: Vec::new(), first: None }
    }

    /// Writes all of them back; they are sorted.
    fn all(mut self, pages: &[DirtyPage]) -> Result<(), ResetError> {
        for page in pages {
            let unit = self.shared.guest.unit(page.block, page.unit);
            if !self.goes_on(unit) {
                self.flush()?;
                self.first = Some(unit);
            }
            match page.old {
                Old::Aside(place) => self.run.extend_from_slice(self.aside.page(place)),
                Old::Image => self.image.append(unit, &mut self.run)?,
            }
        }
        self.flush()
    }

    /// Whether a page belongs to the run.
    fn goes_on(&self, unit: Unit) -> bool {
        self.first.is_some_and(|first| {
            first.block == unit.block
                && first.address + self.run.len() as u64 == unit.address
                && self.run.len() + unit.len as usize <= RUN_BYTES
        })
    }

    fn flush(&mut self) -> Result<(), ResetError> {
        let Some(first) = self.first.take() else { return Ok(()) };
        self.shared.guest.write(first, &self.run)?;
        self.shared.uffd.protect(first.address, self.run.len() as u64)?;
        self.run.clear();
        Ok(())
    }
}

/// Pages of the image, of which the last chunk is held.
struct ImagePages<'a> {
    shared: &'a Shared,
    reader: Option<Box<dyn ChunkReader>>,
    held: Option<ChunkId>,
    chunk: Vec<u8>,
}

impl ImagePages<'_> {
    /// Appends what the image has for a host page.
    fn append(&mut self, unit: Unit, bytes: &mut Vec<u8>) -> Result<(), ResetError> {
        let pages = unit.len / PAGE_SIZE as u64;
        let block = self.shared.guest.block(unit.block);
        let first = unit.number * pages;
        for number in first..(first + pages).min(block.pages()) {
            let page = Page { block: unit.block, number };
            let failed = |source| ResetError::Source {
                block: block.name.clone(),
                offset: page.offset(),
                source,
            };
            match self.shared.guest.image.locate(page).map_err(failed)? {
                Location::Zero => bytes.extend_from_slice(&ZEROS),
                Location::Stored { chunk, slot } => {
                    self.hold(chunk).map_err(failed)?;
                    bytes.extend_from_slice(&self.chunk[slot * PAGE_SIZE..][..PAGE_SIZE]);
                }
            }
        }
        Ok(())
    }

    fn hold(&mut self, chunk: ChunkId) -> Result<(), SourceError> {
        if self.held == Some(chunk) {
            return Ok(());
        }
        let reader = match &mut self.reader {
            Some(reader) => reader,
            None => self.reader.insert(self.shared.guest.image.reader()?),
        };
        self.held = None;
        self.chunk.clear();
        self.chunk.extend_from_slice(reader.read(chunk)?);
        self.held = Some(chunk);
        Ok(())
    }
}
