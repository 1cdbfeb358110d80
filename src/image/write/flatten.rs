//! One image made of an image and of all those that it refers to.

use std::path::Path;
use std::sync::Arc;

use crate::image::format::error::ImageError;
use crate::image::format::manifest::{Details, Manifest};
use crate::image::read::image::Image;
use crate::image::write::options::{Saved, WriterOptions};
use crate::image::write::target::check_replaces_none;
use crate::image::write::writer::ImageWriter;
use crate::page::{BlockId, ChunkId, Location, PAGE_SIZE, Page};

/// Writes all pages of an image, wherever they lie, into a new image that refers to no
/// other. The machine, the moment and the device state stay the same; the identity is
/// new. `progress` is told the pages written so far and the pages in all, now and then,
/// and ends it by answering false.
///
/// # Errors
/// What can't be read, as the image says it; and as [`ImageWriter`] for the new one.
/// Nothing is left of it then.
pub fn flatten(
    image: &Arc<Image>,
    to: &Path,
    options: WriterOptions,
    mut progress: impl FnMut(u64, u64) -> bool,
) -> Result<Saved, ImageError> {
    let Manifest { machine, moment_unix_us, pause_us, blocks, .. } = image.manifest().clone();
    check_replaces_none(to, image.files())?;
    let mut writer = ImageWriter::create(to, options, blocks.clone())?;
    let mut buffers = image.buffers()?;
    let mut held: Option<ChunkId> = None;
    let total = blocks.iter().map(|block| block.pages()).sum();
    let mut done = 0;
    for (block, id) in blocks.iter().zip((0..).map(BlockId)) {
        for number in 0..block.pages() {
            let page = Page { block: id, number };
            match image.find(page)? {
                Location::Zero => writer.zero(page)?,
                Location::Stored { chunk, slot } => {
                    if held != Some(chunk) {
                        let (layer, number, entry) = image.chunk(chunk)?;
                        buffers.read(layer, number, &entry)?;
                        held = Some(chunk);
                    }
                    // Image::find has seen that the chunk has such a slot.
                    let bytes = &buffers.plain()[slot * PAGE_SIZE..];
                    if let Some(bytes) = bytes.first_chunk() {
                        writer.page(page, bytes)?;
                    }
                }
            }
            done += 1;
            if done % 4096 == 0 && !progress(done, total) {
                return Err(ImageError::Interrupted(to.to_owned()));
            }
        }
    }
    progress(done, total);
    writer.finish(Details { machine, moment_unix_us, pause_us }, image.sections()?)
}
