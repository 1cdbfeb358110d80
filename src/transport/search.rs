//! Finds the RAMBlocks of a QEMU that others have filled: of one in postcopy both their places and
//! what of them is in place, for a server that has not seen them being filled; of one that was just
//! saved their places.
//!
//! QEMU has mapped each block by itself, as long as the block is, and registered it with its
//! userfaultfd where it is in postcopy. Where several are of one size, what is in them tells them
//! apart: pages that the guest has not written to are those of the image. So do they tell whether
//! the image is the guest's at all.

use super::proof::{AttachError, the_userfaultfd};
use crate::host::memory;
use crate::host::procfs::{Mapping, Pagemap};
use crate::host::uffd::Uffd;
use crate::kind::{Details, ErrorKind};
use crate::page::{BlockId, ChunkReader, Location, PAGE_SIZE, Page, PageSource, Run, SourceError};

/// Pages that are compared of each block, at most.
const SAMPLES: u64 = 64;

/// Why a guest's memory can't be found in QEMU.
#[derive(Debug, thiserror::Error)]
pub enum SearchError {
    /// QEMU can't be looked into.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// Its memory has another shape.
    #[error(
        "process {pid} has no memory like block `{block}` of the image that a server could fill: \
         it is another guest's, or has all its memory already"
    )]
    NotThere {
        /// QEMU's process id.
        pid: i32,
        /// The block's name.
        block: String,
    },
    /// It was started for another image, or its memory holds nothing of this one.
    #[error("the memory of process {pid} is not this image's")]
    OtherImage {
        /// QEMU's process id.
        pid: i32,
    },
    /// Blocks can't be told apart.
    #[error(
        "block `{block}` can't be told from others of its size in process {pid}: memory can't be \
         put in place directly"
    )]
    Alike {
        /// QEMU's process id.
        pid: i32,
        /// The block's name.
        block: String,
    },
    /// The image can't be read.
    #[error("the image can't be compared with the guest's memory: {0}")]
    Source(SourceError),
}

impl SearchError {
    /// What kind of error it is, for programs to act on.
    pub fn kind(&self) -> ErrorKind {
        match self {
            SearchError::Attach(error) => error.kind(),
            SearchError::NotThere { .. } | SearchError::OtherImage { .. } => ErrorKind::NotQemu,
            SearchError::Alike { .. } => ErrorKind::UserfaultfdUnavailable,
            // What a source says of itself is for those to tell who know it.
            SearchError::Source(_) => ErrorKind::Io,
        }
    }

    /// What it is about.
    pub fn details(&self) -> Details {
        Details::new(&self.to_string(), None::<std::path::PathBuf>, None)
    }
}

/// A guest's memory as it was found.
#[derive(Debug)]
pub struct Found {
    /// A copy of QEMU's userfaultfd.
    pub uffd: Uffd,
    /// The address of each block's first byte. Nothing where blocks can't be told apart, none of
    /// which has a page.
    pub addresses: Vec<Option<u64>>,
    /// The host pages that are in place.
    pub present: Vec<Run>,
}

/// Finds the memory of `pages` in the QEMU that is process `pid`.
///
/// # Errors
/// When QEMU can't be looked into, or its memory is not that of `pages`.
pub fn find(pid: i32, pages: &dyn PageSource) -> Result<Found, SearchError> {
    let failed = |what| AttachError::at(pid, what);
    let uffd = the_userfaultfd(pid)?;
    let mappings = Mapping::registered_of(pid).map_err(failed("the list of mappings"))?;
    let mapped = pages.blocks().iter().map(|block| block.len).collect();
    let (addresses, present) = Search::new(pid, pages, mappings, mapped)?.all()?;
    Ok(Found { uffd, addresses, present })
}

/// Finds the memory of `pages` in the QEMU that is process `pid`, whose guest has all of it, among
/// these mappings. `mapped` tells how many bytes QEMU has mapped for each block. Returns the address
/// of each block's first byte.
///
/// # Errors
/// When QEMU can't be looked into, or its memory is not that of `pages`.
pub fn find_among(
    pid: i32,
    pages: &dyn PageSource,
    mappings: Vec<Mapping>,
    mapped: Vec<u64>,
) -> Result<Vec<Option<u64>>, SearchError> {
    Ok(Search::new(pid, pages, mappings, mapped)?.all()?.0)
}

/// Where a block may lie.
struct Place {
    start: u64,
    /// What is in place there; the block is any of that size.
    present: Vec<Run>,
}

struct Search<'a> {
    pid: i32,
    pages: &'a dyn PageSource,
    reader: Box<dyn ChunkReader>,
    mappings: Vec<Mapping>,
    /// How many bytes are mapped for each block.
    mapped: Vec<u64>,
    pagemap: Pagemap,
}

impl<'a> Search<'a> {
    fn new(
        pid: i32,
        pages: &'a dyn PageSource,
        mappings: Vec<Mapping>,
        mapped: Vec<u64>,
    ) -> Result<Search<'a>, SearchError> {
        let pagemap = Pagemap::open(pid).map_err(AttachError::at(pid, "the page map"))?;
        let reader = pages.reader().map_err(SearchError::Source)?;
        Ok(Search { pid, pages, reader, mappings, mapped, pagemap })
    }

    /// Where all blocks lie, and what of them is in place.
    fn all(mut self) -> Result<(Vec<Option<u64>>, Vec<Run>), SearchError> {
        let mut addresses = vec![None; self.pages.blocks().len()];
        let mut present = Vec::new();
        // The largest first: it tells whether the image is the guest's.
        for (nth, group) in self.groups().iter().enumerate() {
            let places = self.places_of(group)?;
            for (block, place) in self.assign(group, &places)? {
                if nth == 0 {
                    self.check(block, place)?;
                }
                addresses[block.index()] = Some(place.start);
                present.extend(place.present.iter().map(|run| Run { block, ..*run }));
            }
        }
        Ok((addresses, present))
    }

    /// The blocks of each size, the largest first.
    fn groups(&self) -> Vec<Vec<BlockId>> {
        let mut groups: Vec<Vec<BlockId>> = Vec::new();
        let blocks = self.pages.blocks();
        let shape = |id: BlockId| (self.mapped[id.index()], blocks[id.index()].page_size);
        for id in (0..blocks.len()).map(|index| BlockId(index as u16)) {
            match groups.iter_mut().find(|group| shape(group[0]) == shape(id)) {
                Some(group) => group.push(id),
                None => groups.push(vec![id]),
            }
        }
        groups.sort_by_key(|group| std::cmp::Reverse(blocks[group[0].index()].len));
        groups
    }

    /// Where the blocks of one size lie.
    fn places_of(&self, group: &[BlockId]) -> Result<Vec<Place>, SearchError> {
        let blocks = self.pages.blocks();
        let block = &blocks[group[0].index()];
        // Of what is mapped a block need not use all.
        let all = group.iter().map(|id| &blocks[id.index()]);
        let longest = all.max_by_key(|block| block.len).unwrap_or(block);
        let fits = |mapping: &&Mapping| {
            mapping.size() == self.mapped[group[0].index()]
                && mapping.page_size == Some(block.page_size)
        };
        let place = |mapping: &Mapping| {
            let mut present = Vec::new();
            let range = mapping.start..mapping.start + longest.len;
            let pages = self.pagemap.present(range, block.page_size, |first, count| {
                let count = count.min(longest.pages() - first);
                present.push(Run { block: group[0], first, count });
            });
            pages.map_err(AttachError::at(self.pid, "the page map"))?;
            Ok(Place { start: mapping.start, present })
        };
        let places: Vec<Place> =
            self.mappings.iter().filter(fits).map(place).collect::<Result<_, SearchError>>()?;
        match places.len() == group.len() {
            true => Ok(places),
            false => Err(SearchError::NotThere { pid: self.pid, block: block.name.clone() }),
        }
    }

    /// Which block lies where.
    fn assign<'p>(
        &mut self,
        group: &[BlockId],
        places: &'p [Place],
    ) -> Result<Vec<(BlockId, &'p Place)>, SearchError> {
        let mut assigned = Vec::new();
        let mut places: Vec<&Place> = places.iter().collect();
        let mut classes = self.classes(group)?;
        while classes.len() > 1 {
            let Some((class, found)) = self.clear_class(&classes, &places)? else { break };
            // From the last on, so that the others stay where they are.
            let found = found.into_iter().rev().map(|place| places.remove(place));
            assigned.extend(classes.remove(class).into_iter().zip(found));
        }
        match &classes[..] {
            // It does not matter which is which: the same belongs there.
            [class] => assigned.extend(class.iter().copied().zip(places)),
            // Nothing is there; QEMU knows where to put what it is sent.
            _ if places.iter().all(|place| place.present.is_empty()) => {}
            classes => {
                let block = self.pages.blocks()[classes[0][0].index()].name.clone();
                return Err(SearchError::Alike { pid: self.pid, block });
            }
        }
        Ok(assigned)
    }

    /// The blocks in classes of the same content, such as the ROMs of several cards of a kind.
    fn classes(&mut self, blocks: &[BlockId]) -> Result<Vec<Vec<BlockId>>, SearchError> {
        let mut classes: Vec<Vec<BlockId>> = Vec::new();
        for block in blocks {
            let mut known = None;
            for (at, class) in classes.iter().enumerate() {
                if self.are_the_same(class[0], *block)? {
                    known = Some(at);
                }
            }
            match known {
                Some(at) => classes[at].push(*block),
                None => classes.push(vec![*block]),
            }
        }
        Ok(classes)
    }

    /// Whether two blocks of one size hold the same.
    fn are_the_same(&mut self, one: BlockId, other: BlockId) -> Result<bool, SearchError> {
        let pages = |id: BlockId| self.pages.blocks()[id.index()].pages();
        if pages(one) != pages(other) {
            return Ok(false);
        }
        for number in 0..pages(one) {
            let read = |search: &mut Self, block| search.read(Page { block, number });
            if read(self, one)? != read(self, other)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// What the image has for a page; none for zeros.
    fn read(&mut self, page: Page) -> Result<Option<[u8; PAGE_SIZE]>, SearchError> {
        let location = self.pages.locate(page).map_err(SearchError::Source)?;
        let Location::Stored { chunk, slot } = location else { return Ok(None) };
        let bytes = self.reader.read(chunk).map_err(SearchError::Source)?;
        Ok(bytes.as_chunks().0.get(slot).copied())
    }

    /// A class of blocks, and as many places that hold the same pages, while no other class or place
    /// does.
    fn clear_class(
        &mut self,
        classes: &[Vec<BlockId>],
        places: &[&Place],
    ) -> Result<Option<(usize, Vec<usize>)>, SearchError> {
        let mut alike: Vec<Vec<usize>> = Vec::new();
        for class in classes {
            let mut found = Vec::new();
            for (place, at) in places.iter().enumerate() {
                if self.compare(class[0], at.start, &at.present)?.0 > 0 {
                    found.push(place);
                }
            }
            alike.push(found);
        }
        let is_clear = |class: &usize| {
            let others = alike.iter().enumerate().filter(|(other, _)| other != class);
            alike[*class].len() == classes[*class].len()
                && others.flat_map(|(_, found)| found).all(|place| !alike[*class].contains(place))
        };
        let clear = (0..classes.len()).find(is_clear);
        Ok(clear.map(|class| (class, alike.swap_remove(class))))
    }

    /// Compares pages of a block that are `present` at `start` with the image. How many are the
    /// same and how many were compared; zeros tell nothing.
    fn compare(
        &mut self,
        block: BlockId,
        start: u64,
        present: &[Run],
    ) -> Result<(u64, u64), SearchError> {
        let end = self.pages.blocks()[block.index()].pages();
        let total: u64 = present.iter().map(|run| run.count).sum();
        let stride = (total / SAMPLES).max(1) as usize;
        let (mut same, mut compared) = (0, 0);
        let numbers = present.iter().flat_map(|run| run.first..run.end().min(end));
        for number in numbers.step_by(stride) {
            let page = Page { block, number };
            let Some(expected) = self.read(page)? else { continue };
            let mut found = [0; PAGE_SIZE];
            memory::read(self.pid, start + page.offset(), &mut found)
                .map_err(AttachError::at(self.pid, "the memory"))?;
            compared += 1;
            same += u64::from(expected == found);
        }
        Ok((same, compared))
    }

    /// Checks that a block holds pages of the image, if it holds any.
    fn check(&mut self, block: BlockId, place: &Place) -> Result<(), SearchError> {
        match self.compare(block, place.start, &place.present)? {
            (0, compared) if compared > 0 => Err(SearchError::OtherImage { pid: self.pid }),
            _ => Ok(()),
        }
    }
}
