//! A machine's memory in order, with progress and cancellation.

use std::sync::Arc;

use super::{ExchangeError, Watch};
use crate::image::{Cursor, Image, Piece};

/// Gives all pages of all blocks to `each`, in ascending order.
pub(super) fn for_each(
    image: &Arc<Image>,
    watch: &mut Watch<'_>,
    mut each: impl FnMut(Piece<'_>) -> Result<(), ExchangeError>,
) -> Result<(), ExchangeError> {
    let blocks = &image.manifest().blocks;
    watch.total = blocks.iter().map(|block| block.pages()).sum();
    let mut pages = Cursor::over_all(image)?;
    while let Some(first) = pages.page() {
        let name = &blocks[first.block.index()].name;
        let failed = |error| ExchangeError::memory(name, first.offset(), &error);
        if let Some(piece) = pages.next_piece().map_err(failed)? {
            let run = piece.run();
            each(piece)?;
            watch.done(run.count)?;
        }
    }
    Ok(())
}
