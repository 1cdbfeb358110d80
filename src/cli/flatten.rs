//! `flatten`.

use std::path::PathBuf;
use std::sync::Arc;

use clap::{Args, ValueEnum};
use serde_json::json;

use super::output::{Failure, Output, size};
use super::{cancellation, parse_compression};
use crate::image::{self, Compression, Image, WriterOptions};
use crate::page::PAGE_SIZE;

#[derive(Args)]
pub(super) struct FlattenArgs {
    /// The image
    image: PathBuf,
    /// The image to write
    to: PathBuf,
    /// How the image is laid out
    #[arg(long, value_name = "LAYOUT", default_value = "packed")]
    layout: Layout,
    /// How memory is stored: none, zstd, or zstd:LEVEL (-7 to 19); always none in a flat image
    #[arg(long, value_name = "HOW", default_value = "zstd", value_parser = parse_compression)]
    compress: Compression,
    /// Replace an existing image
    #[arg(long)]
    force: bool,
    /// Print one JSON object a line
    #[arg(long)]
    pub json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Layout {
    /// As small as it gets
    Packed,
    /// As it lies in memory, to be mapped: revert --place map
    Flat,
}

/// Makes one image of an image and of all that it refers to.
pub(super) async fn flatten(args: FlattenArgs) -> Result<(), Failure> {
    let output = Arc::new(Output::new(args.json));
    let cancel = cancellation()?;
    let work = tokio::task::spawn_blocking({
        let output = Arc::clone(&output);
        move || {
            let image = Image::open(&args.image)?;
            let options = WriterOptions {
                compression: args.compress,
                force: args.force,
                ..WriterOptions::default()
            };
            let progress = |done, total| {
                output.advance(done, total, String::new());
                !cancel.is_requested()
            };
            let layout = match args.layout {
                Layout::Packed => image::Layout::Packed,
                Layout::Flat => image::Layout::Flat,
            };
            image::flatten(&image, &args.to, layout, options, progress)
        }
    });
    // Interrupted, it is waited for, since it cleans up behind itself.
    let done = work.await;
    let saved = done.unwrap_or_else(|e| std::panic::resume_unwind(e.into_panic()))?;
    let bytes = |pages: u64| pages * PAGE_SIZE as u64;
    let event = json!({
        "event": "flattened",
        "identity": saved.identity.to_string(),
        "pages": saved.data_pages,
        "zero_pages": saved.zero_pages,
        "image_bytes": saved.image_bytes,
    });
    let (data, zeros) = (size(bytes(saved.data_pages)), size(bytes(saved.zero_pages)));
    let words = format!("{data} and {zeros} of zeros in {}", size(saved.image_bytes));
    output.done(&event, "flattened", &words);
    Ok(())
}
