//! Finds the RAMBlocks of a QEMU in postcopy anew, for a server that has not seen them being
//! filled: both their places and what of them is in place.
//!
//! QEMU has registered each block by itself with its userfaultfd, as long as the block is. Where
//! several are of one size, what is in them tells them apart: pages that the guest has not written
//! to are those of the image. So do they tell whether the image is the guest's at all.

use super::proof::{AttachError, the_userfaultfd};
use crate::host::memory;
use crate::host::procfs::{Mapping, Pagemap};
use crate::host::uffd::Uffd;
use crate::kind::{Details, ErrorKind};
use crate::page::{
    Block, BlockId, ChunkReader, Location, PAGE_SIZE, Page, PageSource, Run, SourceError,
};

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
    let pagemap = Pagemap::open(pid).map_err(failed("the page map"))?;
    let reader = pages.reader().map_err(SearchError::Source)?;
    let mut search = Search { pid, pages, reader, mappings, pagemap };
    let mut addresses = vec![None; pages.blocks().len()];
    let mut present = Vec::new();
    // The largest first: it tells whether the image is the guest's.
    for (nth, group) in groups(pages.blocks()).iter().enumerate() {
        let places = search.places_of(group)?;
        for (block, place) in search.assign(group, &places)? {
            if nth == 0 {
                search.check(block, place)?;
            }
            addresses[block.index()] = Some(place.start);
            present.extend(place.present.iter().map(|run| Run { block, ..*run }));
        }
    }
    Ok(Found { uffd, addresses, present })
}

/// The blocks of each size, the largest first.
fn groups(blocks: &[Block]) -> Vec<Vec<BlockId>> {
    let mut groups: Vec<Vec<BlockId>> = Vec::new();
    let shape = |id: BlockId| (blocks[id.index()].len, blocks[id.index()].page_size);
    for id in (0..blocks.len()).map(|index| BlockId(index as u16)) {
        match groups.iter_mut().find(|group| shape(group[0]) == shape(id)) {
            Some(group) => group.push(id),
            None => groups.push(vec![id]),
        }
    }
    groups.sort_by_key(|group| std::cmp::Reverse(blocks[group[0].index()].len));
    groups
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
    pagemap: Pagemap,
}

impl Search<'_> {
    /// Where the blocks of one size lie.
    fn places_of(&self, group: &[BlockId]) -> Result<Vec<Place>, SearchError> {
        let block = &self.pages.blocks()[group[0].index()];
        let fits = |mapping: &&Mapping| {
            mapping.size() == block.len && mapping.page_size == Some(block.page_size)
        };
        let place = |mapping: &Mapping| {
            let mut present = Vec::new();
            let pages = self.pagemap.present(mapping.range(), block.page_size, |first, count| {
                let count = count.min(block.pages() - first);
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
        let mut blocks = group.to_vec();
        let mut places: Vec<&Place> = places.iter().collect();
        while blocks.len() > 1 {
            let Some((block, place)) = self.clear_pair(&blocks, &places)? else { break };
            assigned.push((blocks.remove(block), places.remove(place)));
        }
        match (&blocks[..], &places[..]) {
            ([block], [place]) => assigned.push((*block, place)),
            // Where all are zero it does not matter which is which.
            (blocks, places) if blocks.iter().all(|block| self.is_zero(*block)) => {
                assigned.extend(blocks.iter().copied().zip(places.iter().copied()));
            }
            // Nothing is there; QEMU knows where to put what it is sent.
            (_, places) if places.iter().all(|place| place.present.is_empty()) => {}
            (blocks, _) => {
                let block = self.pages.blocks()[blocks[0].index()].name.clone();
                return Err(SearchError::Alike { pid: self.pid, block });
            }
        }
        Ok(assigned)
    }

    /// A block and a place that hold the same pages, while no other block or place does.
    fn clear_pair(
        &mut self,
        blocks: &[BlockId],
        places: &[&Place],
    ) -> Result<Option<(usize, usize)>, SearchError> {
        let mut alike = Vec::new();
        for (block, id) in blocks.iter().enumerate() {
            for (place, at) in places.iter().enumerate() {
                if self.compare(*id, at.start, &at.present)?.0 > 0 {
                    alike.push((block, place));
                }
            }
        }
        let is_clear = |pair: &&(usize, usize)| {
            alike.iter().filter(|other| other.0 == pair.0 || other.1 == pair.1).count() == 1
        };
        Ok(alike.iter().find(is_clear).copied())
    }

    /// Compares pages of a block that are `present` at `start` with the image. How many are the
    /// same and how many were compared; zeros tell nothing.
    fn compare(
        &mut self,
        block: BlockId,
        start: u64,
        present: &[Run],
    ) -> Result<(u64, u64), SearchError> {
        let total: u64 = present.iter().map(|run| run.count).sum();
        let stride = (total / SAMPLES).max(1) as usize;
        let (mut same, mut compared) = (0, 0);
        let numbers = present.iter().flat_map(|run| run.first..run.end());
        for number in numbers.step_by(stride) {
            let page = Page { block, number };
            let location = self.pages.locate(page).map_err(SearchError::Source)?;
            let Location::Stored { chunk, slot } = location else { continue };
            let bytes = self.reader.read(chunk).map_err(SearchError::Source)?;
            let mut found = [0; PAGE_SIZE];
            memory::read(self.pid, start + page.offset(), &mut found)
                .map_err(AttachError::at(self.pid, "the memory"))?;
            compared += 1;
            same += u64::from(bytes[slot * PAGE_SIZE..].starts_with(&found));
        }
        Ok((same, compared))
    }

    fn is_zero(&self, block: BlockId) -> bool {
        let pages = self.pages.blocks()[block.index()].pages();
        (0..pages).all(|number| self.pages.is_zero(Page { block, number }))
    }

    /// Checks that a block holds pages of the image, if it holds any.
    fn check(&mut self, block: BlockId, place: &Place) -> Result<(), SearchError> {
        match self.compare(block, place.start, &place.present)? {
            (0, compared) if compared > 0 => Err(SearchError::OtherImage { pid: self.pid }),
            _ => Ok(()),
        }
    }
}
