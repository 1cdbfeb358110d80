//! Reading an image of which another is made, with progress and cancellation.

use std::path::Path;
use std::sync::Arc;

use crate::image::format::error::ImageError;
use crate::image::read::cursor::{Cursor, Piece};
use crate::image::read::image::Image;

/// How many pages come between two words on progress, about.
const PROGRESS_PAGES: u64 = 4096;

/// Gives all pages of an image to `each`, in ascending order. `progress` is told the pages
/// given so far and the pages in all, now and then and at the end, and cancels by answering
/// false: `to`, which is written meanwhile, is named in the error.
///
/// # Errors
/// What can't be read, what `each` says, or [`ImageError::Interrupted`].
pub(in crate::image) fn for_every_page(
    image: &Arc<Image>,
    to: &Path,
    mut progress: impl FnMut(u64, u64) -> bool,
    mut each: impl FnMut(Piece<'_>) -> Result<(), ImageError>,
) -> Result<(), ImageError> {
    let total = image.manifest().blocks.iter().map(|block| block.pages()).sum();
    let mut pages = Cursor::over_all(image)?;
    let (mut done, mut told) = (0, 0);
    while let Some(piece) = pages.next_piece()? {
        done += piece.run().count;
        each(piece)?;
        if done - told >= PROGRESS_PAGES {
            told = done;
            if !progress(done, total) {
                return Err(ImageError::Interrupted(to.to_owned()));
            }
        }
    }
    progress(done, total);
    Ok(())
}
