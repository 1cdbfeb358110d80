//! Migration streams, as `migrate` writes them and `-incoming` reads them.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use super::mapped_ram;
use super::output::Output;
use super::pages::for_each;
use super::{ExchangeError, Watch};
use crate::image::{Image, ImageWriter, Piece, Sections, WriterOptions};
use crate::libvirt::block_name;
use crate::page::{Block, PAGE_SIZE};
use crate::wire::{
    Frame, Item, StreamBlock, StreamReader, Tail, WireError, end_of_ram, precopy_opening, tail,
};

/// Writes an image as the stream of an ordinary migration.
pub(super) fn write(
    image: &Arc<Image>,
    output: &mut Output,
    watch: &mut Watch<'_>,
) -> Result<(), ExchangeError> {
    let sections = image.sections()?;
    let blocks = &image.manifest().blocks;
    output.put(&precopy_opening(&sections.config, blocks))?;
    let mut frame = Frame::default();
    for_each(image, watch, |piece| {
        let bytes = match piece {
            // QEMU has filled ROMs before it reads the stream, so zeros must be sent too.
            Piece::Zeros(run) => frame.zeros(&blocks[run.block.index()], run),
            Piece::Data(run, bytes) => {
                let (pages, _) = bytes.as_chunks::<PAGE_SIZE>();
                frame.pages(&blocks[run.block.index()], run, pages.iter())
            }
        };
        output.put(bytes)
    })?;
    output.put(&end_of_ram())?;
    output.put(&tail(&sections.devices, &sections.vmdesc))
}

/// All of a stream except the machine's record: memory, in a writer that has not finished, and
/// the device sections.
pub(super) struct Received {
    pub writer: ImageWriter,
    pub sections: Sections,
}

/// Reads a stream of any kind into an image. `file` is the file that it is read from,
/// where it is one; `path` names it. `check` sees the machine type before any page is
/// read.
pub(super) fn read<R: Read>(
    mut stream: StreamReader<R>,
    file: Option<&File>,
    path: &Path,
    image: (&Path, WriterOptions),
    check: impl FnOnce(&str) -> Result<(), ExchangeError>,
    watch: &mut Watch<'_>,
) -> Result<Received, ExchangeError> {
    let malformed = |error| ExchangeError::Stream { path: path.to_owned(), error };
    let blocks = match stream.next_item().map_err(malformed)? {
        Some(Item::Blocks(blocks)) => blocks.to_vec(),
        _ => return Err(malformed(WireError::Ended { at: 0, inside: "the block list" })),
    };
    check(stream.machine_type())?;
    if let Some(file) = file {
        mapped_ram::check_lengths(file, path, &blocks)?;
    }
    watch.total = blocks.iter().map(|block| block.len / PAGE_SIZE as u64).sum();
    let mut writer = ImageWriter::create(image.0, image.1, with_page_sizes(&blocks))?;
    let writing = writer.cancellation();
    watch.cancel.on_request(move || writing.request());
    if let Some(file) = file {
        mapped_ram::read(file, path, &blocks, &mut writer, watch)?;
    }
    loop {
        match stream.next_item().map_err(malformed)? {
            Some(Item::Page(page, bytes)) => {
                writer.page(page, bytes)?;
                watch.done(1)?;
            }
            Some(Item::Zero(page)) => {
                writer.zero(page)?;
                watch.done(1)?;
            }
            Some(Item::Tail(Tail { devices, vmdesc })) => {
                let sections = Sections { config: stream.config(), devices, vmdesc };
                return Ok(Received { writer, sections });
            }
            // The reader gives the block list once, and the tail last.
            Some(Item::Blocks(_)) | None => {
                return Err(malformed(WireError::Ended { at: 0, inside: "memory" }));
            }
        }
    }
}

/// Reads a stream in a file, and in a mapped-ram file its bitmaps and pages, into an image
/// that is never finished and leaves nothing. For the fuzz targets.
#[cfg(any(test, feature = "internals"))]
pub fn read_memory(file: &File, path: &Path, image: &Path) -> Result<(), ExchangeError> {
    let (stop, mut ignore) = (crate::Cancellation::new(), |_: super::ExchangeEvent| {});
    let options = WriterOptions { workers: 1, memory: 0, ..WriterOptions::default() };
    let (stream, mut watch) = (StreamReader::of_file(file), Watch::new(&stop, &mut ignore));
    read(stream, Some(file), path, (image, options), |_| Ok(()), &mut watch).map(drop)
}

/// A stream holds no page sizes: those of ordinary memory are assumed.
fn with_page_sizes(blocks: &[StreamBlock]) -> Vec<Block> {
    let block = |block: &StreamBlock| Block {
        name: block_name(&block.name).to_owned(),
        len: block.len,
        page_size: PAGE_SIZE as u64,
    };
    blocks.iter().map(block).collect()
}
