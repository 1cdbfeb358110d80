//! Checking a whole image, and saying which pages its damage affects.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use crossbeam_channel::bounded;

use crate::image::format::error::ImageError;
use crate::image::format::layout::{
    CHUNK_ENTRY_BYTES, ChunkEntry, PAGE_ENTRY_BYTES, PageEntry, Region,
};
use crate::image::read::image::Image;
use crate::image::read::layer::{Buffers, Layer, chunk_id};
use crate::image::read::table::Piece;
use crate::page::{Location, PAGE_SIZE};

/// Damages that are listed; more are only counted.
pub const MAX_DAMAGES: usize = 100;
/// Ranges of pages that are listed per damage; more are only counted.
pub const MAX_RANGES: usize = 16;

/// What checking a whole image has found.
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct VerifyReport {
    /// Number of chunks checked.
    pub chunks: u64,
    /// Number of pages whose index entries were checked.
    pub pages: u64,
    /// Damages, at most 100.
    pub damages: Vec<Damage>,
    /// Number of damages beyond those listed.
    pub more_damages: u64,
}

impl VerifyReport {
    /// Whether everything is as it was written.
    pub fn is_whole(&self) -> bool {
        self.damages.is_empty()
    }

    /// Adds a damage. Returns its index in the list, if it is listed.
    pub(in crate::image) fn add(&mut self, error: ImageError) -> Option<usize> {
        if self.damages.len() == MAX_DAMAGES {
            self.more_damages += 1;
            return None;
        }
        self.damages.push(Damage { error, ranges: Vec::new(), bytes: 0 });
        Some(self.damages.len() - 1)
    }
}

/// One damage, and what it makes unreadable.
#[derive(Debug)]
#[non_exhaustive]
pub struct Damage {
    /// What is wrong.
    pub error: ImageError,
    /// Guest memory that can't be read because of it, at most 16 ranges.
    pub ranges: Vec<DamagedRange>,
    /// Bytes of guest memory that can't be read because of it, in all.
    pub bytes: u64,
}

impl Damage {
    /// Adds the pages of some entries of the page index.
    fn affects(&mut self, image: &Image, entries: Range<u64>) {
        let mut first = entries.start;
        while first < entries.end {
            let Some((block, start)) = image.block_of(first) else { return };
            let end = entries.end.min(start + block.pages());
            let offset = (first - start) * PAGE_SIZE as u64;
            let len = (end - first) * PAGE_SIZE as u64;
            first = end;
            self.bytes += len;
            if let Some(last) = self.ranges.last_mut()
                && last.block == block.name
                && last.offset + last.len == offset
            {
                last.len += len;
                continue;
            }
            if self.ranges.len() < MAX_RANGES {
                self.ranges.push(DamagedRange { block: block.name.clone(), offset, len });
            }
        }
    }
}

/// A range of guest memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DamagedRange {
    /// The block's name.
    pub block: String,
    /// Offset in the block in bytes.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
}

/// Checks every checksum and every entry of an image, on all processors. The tables are not
/// kept in memory. `progress` is told the bytes checked so far and the bytes in all, now and
/// then.
///
/// Of other images that it refers to, only the entries of the chunks that it needs are
/// looked at: [`verify_chain`] checks them too.
///
/// # Errors
/// Only when checking itself is not possible; damage is in the report.
pub fn verify(image: &Image, progress: impl FnMut(u64, u64)) -> Result<VerifyReport, ImageError> {
    verify_layers(image, &image.layers()[..1], progress)
}

/// Checks an image as [`verify`] does, and all chunks of the images that it refers to. Damage
/// there is reported with the pages of this image that it makes unreadable.
///
/// # Errors
/// As for [`verify`].
pub fn verify_chain(
    image: &Image,
    progress: impl FnMut(u64, u64),
) -> Result<VerifyReport, ImageError> {
    verify_layers(image, image.layers(), progress)
}

/// Checks an image, and all chunks of some of its layers, from the first on.
fn verify_layers(
    image: &Image,
    layers: &[Layer],
    mut progress: impl FnMut(u64, u64),
) -> Result<VerifyReport, ImageError> {
    let own = &image.own().superblock;
    let chunks_of = |layer: &Layer| {
        let superblock = &layer.superblock;
        superblock.region(Region::Data).len + superblock.region(Region::ChunkTable).len
    };
    let total = own.regions.iter().map(|extent| extent.len).sum::<u64>()
        + layers[1..].iter().map(chunks_of).sum::<u64>();
    let mut done = 0;
    let mut report = VerifyReport::default();
    for region in [Region::Manifest, Region::Config, Region::Devices, Region::Vmdesc] {
        if let Err(error) = image.check_whole(region) {
            report.add(error);
        }
        done += own.region(region).len;
    }
    progress(done, total);

    let mut bad = BadChunks::new();
    for (number, layer) in (0..=u8::MAX).zip(layers) {
        verify_chunks(image, number, layer, &mut report, &mut bad, |bytes| {
            // Chunks that share bytes are read once each.
            done = (done + bytes).min(total);
            progress(done, total);
        })?;
    }
    verify_index(image, &mut report, &bad, |bytes| {
        done = (done + bytes).min(total);
        progress(done, total);
    });
    Ok(report)
}

/// Chunks that can't be read: the first one's id → the id behind the last, and the
/// damage it is listed as. Bounded by [`MAX_DAMAGES`].
type BadChunks = BTreeMap<u64, (u64, usize)>;

/// What a thread has found in one piece of the chunk table.
#[derive(Default)]
struct Found {
    bytes: u64,
    chunks: u64,
    /// The chunks that can't be read (first, end), and why.
    bad: Vec<(u64, u64, ImageError)>,
}

/// Reads all chunks of a layer, a piece of its chunk table at a time.
fn verify_chunks(
    image: &Image,
    number: u8,
    layer: &Layer,
    report: &mut VerifyReport,
    bad: &mut BadChunks,
    mut progress: impl FnMut(u64),
) -> Result<(), ImageError> {
    let processors = thread::available_parallelism().map_or(1, |n| n.get());
    let threads = layer.chunks.pieces().clamp(1, processors as u64) as usize;
    let buffers: Vec<Buffers> = (0..threads).map(|_| image.buffers()).collect::<Result<_, _>>()?;
    let next = AtomicU64::new(0);
    thread::scope(|scope| {
        let (sender, results) = bounded(threads);
        for mut buffers in buffers {
            let (sender, next) = (sender.clone(), &next);
            scope.spawn(move || {
                loop {
                    let piece = next.fetch_add(1, Ordering::Relaxed);
                    if piece >= layer.chunks.pieces()
                        || sender.send(verify_piece(layer, piece, &mut buffers)).is_err()
                    {
                        break;
                    }
                }
            });
        }
        drop(sender);
        for Found { bytes, chunks, bad: found } in results {
            report.chunks += chunks;
            for (first, end, error) in found {
                if let Some(damage) = report.add(error) {
                    let id = |chunk| chunk_id(number, chunk).0;
                    bad.insert(id(first), (id(end), damage));
                }
            }
            progress(bytes);
        }
    });
    Ok(())
}

/// Reads the chunks of one piece of a chunk table.
fn verify_piece(layer: &Layer, number: u64, buffers: &mut Buffers) -> Found {
    let mut found = Found::default();
    let entries = layer.chunks.entries_of(number);
    found.bytes += size_of::<Piece>() as u64;
    let piece = match layer.chunks.load(number, &*layer.store) {
        Ok(piece) => piece,
        Err(error) => {
            found.bad.push((entries.start, entries.end, error));
            return found;
        }
    };
    for chunk in entries {
        let raw = layer.chunks.entry_in::<CHUNK_ENTRY_BYTES>(&piece, chunk);
        let read = layer.decode_chunk(chunk, &raw).and_then(|entry| {
            found.bytes += u64::from(entry.stored_len);
            buffers.read(layer, chunk, &entry).map(drop)
        });
        found.chunks += 1;
        if let Err(error) = read {
            found.bad.push((chunk, chunk + 1, error));
        }
    }
    found
}

/// The piece of each layer's chunk table that was needed last.
struct Recent(Vec<Option<(u64, Box<Piece>)>>);

impl Recent {
    /// A chunk's entry. Chunks of a layer come mostly in order.
    fn entry(&mut self, place: usize, layer: &Layer, chunk: u64) -> Result<ChunkEntry, ImageError> {
        let wanted = chunk / Region::ChunkTable.entries_per_piece();
        let piece = match self.0[place].take() {
            Some((number, piece)) if number == wanted => piece,
            _ => layer.chunks.load(wanted, &*layer.store)?,
        };
        let raw = layer.chunks.entry_in(&piece, chunk);
        self.0[place] = Some((wanted, piece));
        layer.decode_chunk(chunk, &raw)
    }
}

/// Reads the page index: checks every entry, and finds the pages of bad chunks.
fn verify_index(
    image: &Image,
    report: &mut VerifyReport,
    bad: &BadChunks,
    mut progress: impl FnMut(u64),
) {
    let own = image.own();
    let mut recent = Recent(image.layers().iter().map(|_| None).collect());
    let (mut data_pages, mut zero_pages) = (0, 0);
    for number in 0..image.pages.pieces() {
        let entries = image.pages.entries_of(number);
        progress(size_of::<Piece>() as u64);
        let piece = match image.pages.load(number, &*own.store) {
            Ok(piece) => piece,
            Err(error) => {
                if let Some(damage) = report.add(error) {
                    report.damages[damage].affects(image, entries);
                }
                continue;
            }
        };
        for entry in entries {
            report.pages += 1;
            let raw = image.pages.entry_in::<PAGE_ENTRY_BYTES>(&piece, entry);
            if let Some(damage) = bad_chunk_of(raw, bad) {
                data_pages += 1;
                report.damages[damage].affects(image, entry..entry + 1);
                continue;
            }
            let location =
                image.check_entry(raw, |place, layer, chunk| recent.entry(place, layer, chunk));
            match location {
                Ok(Location::Zero) => zero_pages += 1,
                Ok(Location::Stored { .. }) => data_pages += 1,
                Err(problem) => {
                    let place = format!("page index entry {entry}");
                    let error = ImageError::damaged(own.name(), place, problem);
                    if let Some(damage) = report.add(error) {
                        report.damages[damage].affects(image, entry..entry + 1);
                    }
                }
            }
        }
    }
    let manifest = image.manifest();
    if report.is_whole() && (data_pages, zero_pages) != (manifest.data_pages, manifest.zero_pages) {
        let problem = format!(
            "it counts {} data and {} zero pages, the page index {data_pages} and {zero_pages}",
            manifest.data_pages, manifest.zero_pages
        );
        report.add(ImageError::damaged(own.name(), "manifest", problem));
    }
}

/// The damage that an entry's chunk is listed under, if it is.
fn bad_chunk_of(raw: [u8; PAGE_ENTRY_BYTES], bad: &BadChunks) -> Option<usize> {
    let Ok(PageEntry::Stored { layer, chunk, .. }) = PageEntry::decode(u64::from_le_bytes(raw))
    else {
        return None;
    };
    let chunk = chunk_id(layer, chunk).0;
    let (_, (end, damage)) = bad.range(..=chunk).next_back()?;
    (chunk < *end).then_some(*damage)
}
