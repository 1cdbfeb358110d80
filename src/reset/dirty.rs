//! Which pages a guest has written since its memory was that of its image, and what was in them.

use crate::page::{BlockId, PAGE_SIZE, PageBytes};

/// Bytes that are set aside at most: 64 MiB. What was in further pages is read from the image.
const ASIDE_BYTES: usize = 64 << 20;

/// Pages that room is made for at once: 1 MiB.
const PIECE_PAGES: usize = 256;

/// What was in a page before it was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Old {
    /// What was set aside at this place.
    Aside(u32),
    /// What the image has.
    Image,
}

/// A page that was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct DirtyPage {
    pub block: BlockId,
    /// Its number in the block, in units of the host pages behind that.
    pub unit: u64,
    pub old: Old,
    /// Whether it was added ahead of any write to it.
    pub expected: bool,
}

/// What was set aside, in pieces, so that nothing moves when it grows.
#[derive(Debug, Default)]
pub(super) struct Aside {
    pieces: Vec<Box<[PageBytes; PIECE_PAGES]>>,
    used: usize,
}

impl Aside {
    /// What was set aside at a place.
    pub fn page(&self, place: u32) -> &PageBytes {
        let place = place as usize;
        &self.pieces[place / PIECE_PAGES][place % PIECE_PAGES]
    }

    /// Room for one more page, and its place; none where there is enough set aside already.
    fn room(&mut self) -> Option<(u32, &mut PageBytes)> {
        if self.used >= ASIDE_BYTES / PAGE_SIZE {
            return None;
        }
        let (piece, page) = (self.used / PIECE_PAGES, self.used % PIECE_PAGES);
        if piece == self.pieces.len() {
            // Once in 256 pages, and after a reset never again for as many: the room is kept.
            self.pieces.push(Box::new([[0; PAGE_SIZE]; PIECE_PAGES]));
        }
        let place = self.used as u32;
        self.used += 1;
        Some((place, &mut self.pieces[piece][page]))
    }
}

/// The pages that were written, each once.
#[derive(Debug)]
pub(super) struct DirtyLog {
    /// A bit for each unit of each block: whether it is among the pages.
    seen: Vec<Box<[u64]>>,
    pages: Vec<DirtyPage>,
    aside: Aside,
}

impl DirtyLog {
    /// A log of blocks with so many units each.
    pub fn new(units: impl Iterator<Item = u64>) -> DirtyLog {
        let bits = |units: u64| vec![0; units.div_ceil(64) as usize].into_boxed_slice();
        let seen = units.map(bits).collect();
        DirtyLog { seen, pages: Vec::new(), aside: Aside::default() }
    }

    /// Whether a page is among those that were written.
    pub fn has(&self, block: BlockId, unit: u64) -> bool {
        self.seen[block.index()][(unit / 64) as usize] & (1 << (unit % 64)) != 0
    }

    /// Adds a page that is written, or `expected` to be, unless it is there already. `old` is given room for what was in it, and
    /// returns whether that was set aside; without, the image has it.
    ///
    /// # Errors
    /// Those of `old`; the page is not added then.
    pub fn add<E>(
        &mut self,
        block: BlockId,
        unit: u64,
        expected: bool,
        old: Option<impl FnOnce(&mut PageBytes) -> Result<(), E>>,
    ) -> Result<(), E> {
        if self.has(block, unit) {
            return Ok(());
        }
        let old = match old.and_then(|old| Some((old, self.aside.room()?))) {
            Some((old, (place, room))) => {
                old(room).map(|()| Old::Aside(place)).inspect_err(|_| self.aside.used -= 1)?
            }
            None => Old::Image,
        };
        self.seen[block.index()][(unit / 64) as usize] |= 1 << (unit % 64);
        self.pages.push(DirtyPage { block, unit, old, expected });
        Ok(())
    }

    /// How many pages were written.
    pub fn len(&self) -> usize {
        self.pages.len()
    }

    /// All pages that were written, in order, and what was set aside of them. The log is empty
    /// then.
    pub fn take(&mut self) -> (Vec<DirtyPage>, Aside) {
        for page in &self.pages {
            self.seen[page.block.index()][(page.unit / 64) as usize] = 0;
        }
        let mut pages = std::mem::take(&mut self.pages);
        pages.sort_unstable_by_key(|page| (page.block, page.unit));
        (pages, std::mem::take(&mut self.aside))
    }

    /// Gives the room back in which pages were set aside. It is used again unless there is other
    /// by now.
    pub fn give_back(&mut self, pages: Vec<DirtyPage>, aside: Aside) {
        if self.pages.capacity() == 0 {
            self.pages = pages;
            self.pages.clear();
        }
        if self.aside.pieces.is_empty() {
            self.aside = Aside { used: 0, ..aside };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: BlockId = BlockId(1);

    fn add(log: &mut DirtyLog, unit: u64, byte: u8) {
        let old = |room: &mut PageBytes| {
            room.fill(byte);
            Ok::<(), ()>(())
        };
        log.add(BLOCK, unit, false, Some(old)).unwrap();
    }

    #[test]
    fn a_page_is_noted_once_with_what_was_in_it_at_first() {
        let mut log = DirtyLog::new([10, 100].into_iter());
        for (unit, byte) in [(99, 1), (3, 2), (99, 3)] {
            add(&mut log, unit, byte);
        }
        assert!(log.has(BLOCK, 3) && !log.has(BlockId(0), 3) && log.len() == 2);
        let (pages, aside) = log.take();
        let seen = |page: &DirtyPage| match page.old {
            Old::Aside(place) => (page.unit, aside.page(place)[4095]),
            Old::Image => panic!("it was set aside"),
        };
        assert_eq!(pages.iter().map(seen).collect::<Vec<_>>(), [(3, 2), (99, 1)]);
        assert!(!log.has(BLOCK, 3) && log.len() == 0);
        log.give_back(pages, aside);
        add(&mut log, 3, 7);
        let (pages, aside) = log.take();
        assert!(matches!(pages[..], [DirtyPage { old: Old::Aside(0), unit: 3, .. }]));
        assert_eq!(aside.page(0)[0], 7);
    }

    #[test]
    fn beyond_the_limit_the_image_has_what_was_there() {
        let limit = (ASIDE_BYTES / PAGE_SIZE) as u64;
        let mut log = DirtyLog::new([0, limit + 1].into_iter());
        (0..=limit).for_each(|unit| add(&mut log, unit, 0));
        let (pages, _) = log.take();
        assert_eq!(pages.iter().filter(|page| page.old == Old::Image).count(), 1);
    }

    #[test]
    fn what_can_not_be_set_aside_is_not_noted() {
        let mut log = DirtyLog::new([0, 100].into_iter());
        assert!(log.add(BLOCK, 5, false, Some(|_: &mut PageBytes| Err(()))).is_err());
        assert!(!log.has(BLOCK, 5) && log.len() == 0 && log.aside.used == 0);
    }
}
