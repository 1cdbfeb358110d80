//! Checking what is mapped of an image in the flat layout.

use std::io;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek64};

use crate::image::format::error::ImageError;
use crate::image::format::layout::Codec;
use crate::image::format::manifest::Manifest;
use crate::image::read::image::Image;
use crate::image::read::layer::layer_and_number;
use crate::image::store::Store;
use crate::page::{BlockId, Location, PAGE_SIZE, Page};

/// Checks that what would be mapped of an image in the flat layout is what its index says:
/// that every page lies in its place, and that the places of zero pages hold zeros. What its
/// chunks hold is checked by [`verify()`](crate::image::verify()). Does nothing for other images.
///
/// # Errors
/// Damage, with the block and the offset.
pub fn verify_flat(image: &Image) -> Result<(), ImageError> {
    let Manifest { blocks, flat, .. } = image.manifest();
    let mut zeros = Zeros { store: &*image.own().store, data_from: 0 };
    for ((block, id), start) in blocks.iter().zip((0..).map(BlockId)).zip(flat) {
        for number in 0..block.pages() {
            let page = Page { block: id, number };
            let place = start + page.offset();
            let damaged = |problem: String| {
                let at = format!("block {:?}, offset {:#x}", block.name, page.offset());
                ImageError::damaged(image.name(), at, problem)
            };
            match image.find(page)? {
                Location::Stored { chunk, slot } => {
                    let (_, _, entry) = image.chunk(chunk)?;
                    let is_own = layer_and_number(chunk).0 == 0 && entry.codec == Codec::Plain;
                    if !is_own || entry.offset + (slot * PAGE_SIZE) as u64 != place {
                        return Err(damaged(format!("it does not lie in its place, {place:#x}")));
                    }
                }
                Location::Zero => match zeros.are_at(place) {
                    Ok(true) => {}
                    Ok(false) => return Err(damaged("it holds data, where zeros are due".into())),
                    Err(error) => return Err(damaged(format!("can't read: {error}"))),
                },
            }
        }
    }
    Ok(())
}

/// Looks for zeros, and reads none where the file has a hole.
struct Zeros<'a> {
    store: &'a dyn Store,
    /// Up to here, from the last place that was asked for on, lies a hole.
    data_from: u64,
}

impl Zeros<'_> {
    /// Whether the page at `place`, in bytes from the image's start, is all zeros. To be
    /// asked in ascending order.
    fn are_at(&mut self, place: u64) -> io::Result<bool> {
        let end = place + PAGE_SIZE as u64;
        if end <= self.data_from {
            return Ok(true);
        }
        if let Some((_, file)) = self.store.file() {
            self.data_from = match lseek64(file, place as i64, Whence::SeekData) {
                Ok(at) => at as u64,
                // No data up to the end of the file (lseek(2)).
                Err(Errno::ENXIO) => u64::MAX,
                Err(errno) => return Err(errno.into()),
            };
            if end <= self.data_from {
                return Ok(true);
            }
        }
        let mut bytes = [0; PAGE_SIZE];
        self.store.read_at(&mut bytes, place)?;
        Ok(bytes == [0; PAGE_SIZE])
    }
}
