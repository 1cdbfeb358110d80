//! One image made of an image and of all those that it refers to.

use std::path::Path;
use std::sync::Arc;

use crate::image::format::error::ImageError;
use crate::image::format::manifest::{Details, Manifest};
use crate::image::read::cursor::Piece;
use crate::image::read::image::Image;
use crate::image::write::every_page::for_every_page;
use crate::image::write::flat;
use crate::image::write::options::{Layout, Saved, WriterOptions};
use crate::image::write::target::check_replaces_none;
use crate::image::write::writer::ImageWriter;

/// Writes all pages of an image, wherever they lie, into a new image that refers to no
/// other. The machine, the moment and the device state stay the same; the identity is
/// new. In the flat layout, of the options only `force` counts. `progress` is told the
/// pages written so far and the pages in all, now and then, and cancels by answering false.
///
/// # Errors
/// What can't be read, as the image says it; and as [`ImageWriter`] for the new one.
/// Nothing is left of it then.
pub fn flatten(
    image: &Arc<Image>,
    to: &Path,
    layout: Layout,
    options: WriterOptions,
    progress: impl FnMut(u64, u64) -> bool,
) -> Result<Saved, ImageError> {
    check_replaces_none(to, image.files())?;
    match layout {
        Layout::Packed => pack(image, to, options, progress),
        Layout::Flat => flat::write(image, to, options.force, progress),
    }
}

/// Writes them into chunks, in whatever order suits.
fn pack(
    image: &Arc<Image>,
    to: &Path,
    options: WriterOptions,
    progress: impl FnMut(u64, u64) -> bool,
) -> Result<Saved, ImageError> {
    let Manifest { machine, moment_unix_us, pause_us, blocks, .. } = image.manifest().clone();
    let mut writer = ImageWriter::create(to, options, blocks)?;
    for_every_page(image, to, progress, |piece| match piece {
        Piece::Zeros(run) => run.pages().try_for_each(|page| writer.zero(page)),
        Piece::Data(run, bytes) => {
            let mut pages = run.pages().zip(bytes.as_chunks().0);
            pages.try_for_each(|(page, bytes)| writer.page(page, bytes))
        }
    })?;
    writer.finish(Details { machine, moment_unix_us, pause_us }, image.sections()?)
}
