//! Writes back what was in a guest's memory at the moment of its image.

use super::ResetError;
use super::dirty::{Aside, DirtyPage, Old};
use super::memory::{Unit, ZEROS};
use super::shared::Shared;
use crate::image::{Held, ImageError};
use crate::page::{Location, Page};

/// Bytes that are written back in one call, and protected again in one: 1 MiB.
const RUN_BYTES: usize = 1 << 20;

/// Pages from which on two threads are faster than one: starting one takes as long as writing some
/// hundred pages.
const ENOUGH_FOR_TWO: usize = 1024;

/// Writes pages back, which are sorted, and protects them again. Returns those that had been
/// written, in order: not all that were expected to be need have been.
pub(super) fn write_back(
    shared: &Shared,
    pages: &[DirtyPage],
    aside: &Aside,
) -> Result<Vec<Unit>, ResetError> {
    let all = |pages: &[DirtyPage]| WriteBack::new(shared, aside).all(pages);
    if pages.len() < ENOUGH_FOR_TWO {
        return all(pages);
    }
    let (first, second) = pages.split_at(pages.len() / 2);
    std::thread::scope(|scope| {
        let second = scope.spawn(|| all(second));
        let first = all(first);
        let second = second.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        Ok([first?, second?].concat())
    })
}

/// Writes pages back, in runs.
struct WriteBack<'a> {
    shared: &'a Shared,
    aside: &'a Aside,
    /// The chunk of the image that was read last; none where nothing of it was needed.
    chunks: Option<Held>,
    /// What is written back next.
    run: Vec<u8>,
    /// The pages of that, and whether each was only expected to be written.
    units: Vec<(Unit, bool)>,
    /// What is there now.
    now: Vec<u8>,
    written: Vec<Unit>,
}

impl<'a> WriteBack<'a> {
    fn new(shared: &'a Shared, aside: &'a Aside) -> WriteBack<'a> {
        let (run, units) = (Vec::new(), Vec::new());
        WriteBack { shared, aside, chunks: None, run, units, now: Vec::new(), written: Vec::new() }
    }

    /// Writes all of them back; they are sorted.
    fn all(mut self, pages: &[DirtyPage]) -> Result<Vec<Unit>, ResetError> {
        for page in pages {
            let unit = self.shared.guest.unit(page.block, page.unit);
            if !self.goes_on(unit) {
                self.flush()?;
            }
            self.units.push((unit, page.expected));
            match page.old {
                Old::Aside(place) => self.run.extend_from_slice(self.aside.page(place)),
                Old::Image => self.append_from_image(unit)?,
            }
        }
        self.flush()?;
        Ok(self.written)
    }

    /// Appends what the image has for a host page.
    fn append_from_image(&mut self, unit: Unit) -> Result<(), ResetError> {
        let guest = &self.shared.guest;
        let block = guest.block(unit.block);
        let first = unit.number * block.pages_per_host_page();
        for number in first..(first + block.pages_per_host_page()).min(block.pages()) {
            let page = Page { block: unit.block, number };
            self.append_page(page).map_err(|error| ResetError::Source {
                block: block.name.clone(),
                offset: page.offset(),
                source: error.into(),
            })?;
        }
        Ok(())
    }

    fn append_page(&mut self, page: Page) -> Result<(), ImageError> {
        let image = &self.shared.guest.image;
        match image.find(page)? {
            Location::Zero => self.run.extend_from_slice(&ZEROS),
            Location::Stored { chunk, slot } => {
                let chunks = match &mut self.chunks {
                    Some(chunks) => chunks,
                    None => self.chunks.insert(Held::new(image)?),
                };
                chunks.hold(chunk)?;
                self.run.extend_from_slice(chunks.pages(slot, 1));
            }
        }
        Ok(())
    }

    /// Whether a page belongs to the run.
    fn goes_on(&self, unit: Unit) -> bool {
        self.units.first().is_some_and(|(first, _)| {
            first.block == unit.block
                && first.address + self.run.len() as u64 == unit.address
                && self.run.len() + unit.len as usize <= RUN_BYTES
        })
    }

    fn flush(&mut self) -> Result<(), ResetError> {
        let Some((first, _)) = self.units.first().copied() else { return Ok(()) };
        self.find_written(first)?;
        if !self.shared.guest.write(first, &self.run)? {
            self.write_one_by_one(first)?;
        }
        self.shared.uffd.protect(first.address, self.run.len() as u64)?;
        self.run.clear();
        self.units.clear();
        Ok(())
    }

    /// Writes a run of which some is missing: the guest has given it back.
    fn write_one_by_one(&self, first: Unit) -> Result<(), ResetError> {
        let Shared { guest, uffd, .. } = self.shared;
        for (unit, _) in &self.units {
            let at = (unit.address - first.address) as usize;
            let bytes = &self.run[at..at + unit.len as usize];
            if !guest.write(*unit, bytes)? {
                // SAFETY: the host page is the guest's, and the bytes are those that belong there.
                unsafe { uffd.copy(unit.address, bytes, unit.len) }?;
            }
        }
        Ok(())
    }

    /// Finds out which pages of the run have been written.
    fn find_written(&mut self, first: Unit) -> Result<(), ResetError> {
        let Self { units, run, now, written, .. } = self;
        if !units.iter().any(|(_, expected)| *expected) {
            written.extend(units.iter().map(|(unit, _)| *unit));
            return Ok(());
        }
        now.resize(run.len(), 0);
        // Of what is missing all counts as written.
        let all = !self.shared.guest.read(first.address, now)?;
        for (unit, expected) in units {
            let at = (unit.address - first.address) as usize;
            let at = at..at + unit.len as usize;
            if all || !*expected || now[at.clone()] != run[at] {
                written.push(*unit);
            }
        }
        Ok(())
    }
}
