//! What is done with an image as a whole: checking it, and merging it with its parents.

use std::path::PathBuf;

use crate::cancel::Cancellation;
use crate::image::format::error::ImageError;
use crate::image::read::flat::verify_flat;
use crate::image::read::image::Image;
use crate::image::read::verify::{self, VerifyReport, verify_chain};
use crate::image::write::flatten as merge;
use crate::image::write::options::{Compression, Layout, Saved, WriterOptions};

/// Which image to check, and how far.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct VerifyOptions {
    /// The image.
    pub image: PathBuf,
    /// Check the images that it refers to as well.
    pub chain: bool,
}

impl VerifyOptions {
    /// Checks this image, and none that it refers to.
    pub fn new(image: impl Into<PathBuf>) -> VerifyOptions {
        VerifyOptions { image: image.into(), chain: false }
    }
}

/// Checks every checksum of an image, and says which memory its damage affects. `on_progress`
/// is called with the bytes checked so far and the bytes in all. Blocks.
///
/// # Errors
/// When the image can't be opened. Damage beyond that is in the report.
pub fn verify(
    options: &VerifyOptions,
    on_progress: impl FnMut(u64, u64),
) -> Result<VerifyReport, ImageError> {
    let image = Image::open(&options.image)?;
    let mut report = match options.chain {
        true => verify_chain(&image, on_progress),
        false => verify::verify(&image, on_progress),
    }?;
    if let Err(error) = verify_flat(&image) {
        report.add(error);
    }
    Ok(report)
}

/// Which image to merge with its parents, where to, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct FlattenOptions {
    /// The image.
    pub image: PathBuf,
    /// The image to write.
    pub to: PathBuf,
    /// How it is laid out.
    pub layout: Layout,
    /// How memory is stored; of no account in the flat layout, which is never compressed.
    pub compression: Compression,
    /// Replace an existing file.
    pub force: bool,
}

impl FlattenOptions {
    /// Merges `image` and all its parents into a packed image, compressed with zstd at level 1.
    pub fn new(image: impl Into<PathBuf>, to: impl Into<PathBuf>) -> FlattenOptions {
        FlattenOptions {
            image: image.into(),
            to: to.into(),
            layout: Layout::Packed,
            compression: Compression::Zstd(1),
            force: false,
        }
    }
}

/// Merges an image and all its parents into a new image that refers to no other. The machine,
/// the moment and the device state stay the same; the identity is new. `on_progress` is called
/// with the pages written so far and the pages in all. Blocks.
///
/// # Errors
/// When an image can't be read or written, and [`ImageError::Interrupted`] once `cancel` is
/// requested. Nothing is left of the new image then.
pub fn flatten(
    options: &FlattenOptions,
    cancel: &Cancellation,
    mut on_progress: impl FnMut(u64, u64),
) -> Result<Saved, ImageError> {
    let FlattenOptions { image, to, layout, compression, force } = options;
    let image = Image::open(image)?;
    let writer =
        WriterOptions { compression: *compression, force: *force, ..WriterOptions::default() };
    merge::flatten(&image, to, *layout, writer, |done, total| {
        on_progress(done, total);
        !cancel.is_requested()
    })
}
