//! Opening an image, and reading what lies in it.

use std::collections::HashSet;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use crate::identity::Identity;

use crate::image::format::error::ImageError;
use crate::image::format::layout::{ChunkEntry, Codec, PageEntry, Region};
use crate::image::format::manifest::{Manifest, Sections};
use crate::image::read::layer::{Buffers, Layer, Shape, chunk_id, layer_and_number, read_plain};
use crate::image::read::lineage;
use crate::image::read::table::Table;
use crate::image::store::Store;
use crate::image::store::file::FileStore;
use crate::page::{
    Block, ChunkId, ChunkReader, Location, PAGE_SIZE, Page, PageSource, SourceError,
};

/// An open image.
///
/// It keeps the parts of the page index and of the chunk tables that were needed: at most 8
/// bytes per target page and 24 bytes per chunk. It holds its own file open, and one for each
/// image that it refers to, at most 255. `Arc<Image>` is a [`PageSource`].
pub struct Image {
    /// Its own, then the others in the order of the manifest: never empty.
    layers: Vec<Layer>,
    manifest: Manifest,
    /// Each block's first entry in the page index.
    starts: Vec<u64>,
    pub(in crate::image) pages: Table,
    /// The most pages that a chunk of any layer holds.
    chunk_pages: usize,
}

impl Image {
    /// Opens an image. Reads the superblock and the manifest, and the superblock of
    /// each image that it refers to, nothing else: it takes as long for 512 GiB as for
    /// 512 MiB.
    ///
    /// # Errors
    /// A file that can't be read, is no image, is truncated, damaged, or of a
    /// later version; an image that it refers to and that is not there, or is another
    /// one. The message says which and what to do.
    pub fn open(path: impl AsRef<Path>) -> Result<Arc<Image>, ImageError> {
        Image::open_in(Box::new(FileStore::open(path.as_ref())?))
    }

    /// Opens an image whose own file is open already, be it deleted by now. `path` is where it
    /// was opened; the images that it refers to are looked for from there.
    ///
    /// # Errors
    /// As for [`Image::open`].
    pub fn open_file(file: File, path: impl AsRef<Path>) -> Result<Arc<Image>, ImageError> {
        Image::open_in(Box::new(FileStore::of(file, path.as_ref())?))
    }

    /// Opens the image that a store holds, as [`Image::open`] does.
    pub(crate) fn open_in(store: Box<dyn Store>) -> Result<Arc<Image>, ImageError> {
        let own = Layer::open(store)?;
        let mut manifest = own.manifest()?;
        if let Some(directory) = own.store.file().and_then(|(path, _)| path.parent()) {
            manifest.machine.locate_copies(directory);
        }
        let others = lineage::open_layers(&own, &manifest.layers)?;
        let starts = manifest
            .blocks
            .iter()
            .scan(0, |next, block| {
                let start = *next;
                *next += block.pages();
                Some(start)
            })
            .collect();
        let pages = Table::new(Region::PageIndex, &own.superblock);
        let layers: Vec<Layer> = [own].into_iter().chain(others).collect();
        let chunk_pages = layers.iter().map(|layer| layer.superblock.chunk_pages).max();
        let chunk_pages = chunk_pages.unwrap_or(1) as usize;
        Ok(Arc::new(Image { layers, manifest, starts, pages, chunk_pages }))
    }

    /// What the image says of itself and of the machine.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// What error messages call it: its path, if it is a file.
    pub fn name(&self) -> &str {
        self.own().name()
    }

    /// The path by which it was opened, if it is a file.
    pub fn path(&self) -> Option<&Path> {
        self.own().store.file().map(|(path, _)| path)
    }

    /// The files that its pages lie in: its own first, then those of the images that it
    /// refers to, each with the path by which it was opened. What lies elsewhere than in a
    /// file is left out.
    pub fn files(&self) -> impl Iterator<Item = (&Path, &File)> {
        self.layers.iter().filter_map(|layer| layer.store.file())
    }

    /// What the files consist of that its pages lie in, in the order of [`Image::files`].
    ///
    /// # Errors
    /// When the manifest of one can't be read.
    pub(crate) fn shapes(&self) -> Result<Vec<Shape>, ImageError> {
        self.layers.iter().map(Layer::shape).collect()
    }

    /// Its identity, different for every image written.
    pub fn identity(&self) -> Identity {
        self.own().superblock.identity
    }

    /// Length of the file in bytes.
    pub fn file_len(&self) -> u64 {
        self.own().superblock.file_len
    }

    /// Number of chunks.
    pub fn chunk_count(&self) -> u64 {
        self.own().superblock.chunk_count
    }

    /// Reads and verifies the parts of the migration stream that are not RAM.
    ///
    /// # Errors
    /// When one can't be read or its checksum does not match.
    pub fn sections(&self) -> Result<Sections, ImageError> {
        let read = |region| self.own().read_whole(region);
        Ok(Sections {
            config: read(Region::Config)?,
            devices: read(Region::Devices)?,
            vmdesc: read(Region::Vmdesc)?,
        })
    }

    /// Where a page is stored. Costs two look-ups, and the first time in each
    /// 4 KiB of the tables a read and a checksum.
    ///
    /// # Errors
    /// A page that does not exist, or damage where the tables speak of it.
    pub fn find(&self, page: Page) -> Result<Location, ImageError> {
        let raw = self.entry(page)?;
        self.check_entry(raw, |_, layer, chunk| layer.chunk(chunk)).map_err(|problem| {
            let place = format!(
                "page index of block {:?}, offset {:#x}",
                self.manifest.blocks[page.block.index()].name,
                page.offset()
            );
            ImageError::damaged(self.name(), place, problem)
        })
    }

    /// A page's raw entry in the index.
    fn entry(&self, page: Page) -> Result<[u8; 8], ImageError> {
        let number = page.block.index();
        let blocks = &self.manifest.blocks;
        let start = match (blocks.get(number), self.starts.get(number)) {
            (Some(block), Some(start)) if page.number < block.pages() => start,
            _ => return Err(ImageError::no_such_page(blocks, page)),
        };
        self.pages.entry(start + page.number, &*self.own().store)
    }

    /// The block that an entry of the page index belongs to, and the block's first
    /// entry.
    pub(in crate::image) fn block_of(&self, entry: u64) -> Option<(&Block, u64)> {
        // The last block that starts at or before the entry; empty blocks before
        // it may start there too.
        let number = self.starts.partition_point(|start| *start <= entry).checked_sub(1)?;
        self.manifest.blocks.get(number).zip(self.starts.get(number).copied())
    }

    /// Turns a raw entry of the index into a location, and checks it. `entry_of` reads a
    /// chunk's entry: it gets a layer's number, the layer, and the number of a chunk there.
    pub(in crate::image) fn check_entry<'a>(
        &'a self,
        raw: [u8; 8],
        entry_of: impl FnOnce(usize, &'a Layer, u64) -> Result<ChunkEntry, ImageError>,
    ) -> Result<Location, String> {
        let (layer, number, slot) = match PageEntry::decode(u64::from_le_bytes(raw))? {
            PageEntry::Zero => return Ok(Location::Zero),
            PageEntry::Missing => return Err("the page was never written".into()),
            PageEntry::Stored { layer, chunk, slot } => (layer, chunk, slot),
        };
        let Some(holder) = self.layers.get(usize::from(layer)) else {
            return Err(format!("it lies in layer {layer}, of {}", self.layers.len() - 1));
        };
        let chunks = holder.chunks.entries();
        if number >= chunks {
            return Err(format!("chunk {number} does not exist, there are {chunks}"));
        }
        let pages = entry_of(usize::from(layer), holder, number).map_err(|e| e.to_string())?.pages;
        if slot >= pages {
            return Err(format!("chunk {number} has {pages} pages, not a page {slot}"));
        }
        Ok(Location::Stored { chunk: chunk_id(layer, number), slot: usize::from(slot) })
    }

    /// A chunk's layer and its entry in the table there.
    pub(in crate::image) fn chunk(
        &self,
        chunk: ChunkId,
    ) -> Result<(&Layer, u64, ChunkEntry), ImageError> {
        let (layer, number) = layer_and_number(chunk);
        let layer = self.layers.get(usize::from(layer)).ok_or_else(|| {
            let problem = format!("there is no layer {layer}");
            ImageError::damaged(self.name(), format!("chunk {number}"), problem)
        })?;
        Ok((layer, number, layer.chunk(number)?))
    }

    /// The layer of its own chunks.
    pub(in crate::image) fn own(&self) -> &Layer {
        &self.layers[0]
    }

    /// Its own layer, and behind it those that it refers to.
    pub(in crate::image) fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// Buffers that any of its chunks fits into.
    pub(in crate::image) fn buffers(&self) -> Result<Buffers, ImageError> {
        Buffers::new(self.chunk_pages, self.name())
    }

    /// Verifies a section or the manifest.
    pub(in crate::image) fn check_whole(&self, region: Region) -> Result<(), ImageError> {
        self.own().read_whole(region).map(drop)
    }
}

impl PageSource for Arc<Image> {
    fn blocks(&self) -> &[Block] {
        &self.manifest.blocks
    }

    fn chunk_pages(&self) -> usize {
        self.chunk_pages
    }

    fn locate(&self, page: Page) -> Result<Location, SourceError> {
        Ok(self.find(page)?)
    }

    fn is_zero(&self, page: Page) -> bool {
        let decode = |raw| PageEntry::decode(u64::from_le_bytes(raw));
        self.entry(page).is_ok_and(|raw| matches!(decode(raw), Ok(PageEntry::Zero)))
    }

    /// A copy of the image, or of one that it refers to, may have taken its place.
    fn look_again(&self) {
        self.layers.iter().for_each(Layer::look_again);
    }

    fn is_far(&self) -> bool {
        self.layers.iter().any(|layer| layer.store.is_far())
    }

    /// Pages that can't be found are left out: whoever reads them is told why.
    fn will_need(&self, pages: &[Page]) {
        if !self.is_far() {
            return;
        }
        let mut ranges = vec![Vec::new(); self.layers.len()];
        let mut seen = HashSet::new();
        for page in pages {
            let Ok(Location::Stored { chunk, .. }) = self.find(*page) else { continue };
            if !seen.insert(chunk) {
                continue;
            }
            let Ok((_, _, entry)) = self.chunk(chunk) else { continue };
            let (number, _) = layer_and_number(chunk);
            let end = entry.offset + u64::from(entry.stored_len);
            ranges[usize::from(number)].push(entry.offset..end);
        }
        for (layer, ranges) in self.layers.iter().zip(ranges) {
            layer.store.will_read(ranges);
        }
    }

    fn reader(&self) -> Result<Box<dyn ChunkReader>, SourceError> {
        let buffers = self.buffers()?;
        let run = Vec::with_capacity(RUN_BYTES / PAGE_SIZE);
        Ok(Box::new(Reader { image: Arc::clone(self), buffers, run }))
    }
}

/// The most bytes that are read at once, so that they are still in the processor's cache when
/// their checksums are computed.
const RUN_BYTES: usize = 256 << 10;

/// One thread's reader of an image's chunks.
struct Reader {
    image: Arc<Image>,
    buffers: Buffers,
    /// The chunks that are read at once.
    run: Vec<ChunkEntry>,
}

impl ChunkReader for Reader {
    fn read(&mut self, chunk: ChunkId) -> Result<&[u8], SourceError> {
        let (layer, number, entry) = self.image.chunk(chunk)?;
        Ok(self.buffers.read(layer, number, &entry)?)
    }

    fn read_to(&mut self, chunk: ChunkId, out: &mut [u8]) -> Result<bool, SourceError> {
        let (layer, number, entry) = self.image.chunk(chunk)?;
        if entry.plain_len() != out.len() {
            return Ok(false);
        }
        self.buffers.read_to(layer, number, &entry, out)?;
        Ok(true)
    }

    fn read_run(
        &mut self,
        chunks: &[(ChunkId, usize)],
        out: &mut [u8],
    ) -> Result<usize, SourceError> {
        let Some(&(first, len)) = chunks.first() else { return Ok(0) };
        let (layer, number, entry) = self.image.chunk(first)?;
        if entry.plain_len() != len {
            return Ok(0);
        }
        self.run.clear();
        self.run.push(entry);
        let mut end = len;
        for (chunk, len) in &chunks[1..] {
            if layer_and_number(*chunk).0 != layer_and_number(first).0 || end + len > RUN_BYTES {
                break;
            }
            match self.image.chunk(*chunk) {
                Ok((_, _, next)) if next.plain_len() == *len && self.run_goes_on(&next) => {
                    self.run.push(next);
                    end += len;
                }
                _ => break,
            }
        }
        if self.run.len() > 1 {
            let read = read_plain(layer, &self.run, &mut out[..end]);
            if read > 0 {
                return Ok(read);
            }
        }
        // A single chunk, or one that is damaged: this says how.
        self.buffers.read_to(layer, number, &entry, &mut out[..len])?;
        Ok(1)
    }
}

impl Reader {
    /// Whether a chunk lies right behind the last one of the run, both uncompressed.
    fn run_goes_on(&self, next: &ChunkEntry) -> bool {
        self.run.last().is_some_and(|last| {
            let plain = [last, next].iter().all(|entry| entry.codec == Codec::Plain);
            plain && last.offset + u64::from(last.stored_len) == next.offset
        })
    }
}
