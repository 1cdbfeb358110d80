//! `flatten`.

use std::path::PathBuf;
use std::sync::Arc;

use clap::{Args, ValueEnum};

use super::cancellation;
use super::events::CommandEvent;
use super::failure::Failure;
use super::output::{Output, size};
use super::writing::{WriteArgs, WriteImageArgs};
use crate::image;
use crate::image::journeys::{self, FlattenOptions};
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
    #[command(flatten)]
    pub written: WriteImageArgs,
}

#[derive(Clone, Copy, ValueEnum)]
enum Layout {
    /// Chunks back to back, compressed: the smallest
    Packed,
    /// As it lies in memory, never compressed, to be mapped: revert --place map
    Flat,
}

/// Makes one image of an image and of all that it refers to.
pub(super) async fn flatten(args: FlattenArgs) -> Result<(), Failure> {
    let WriteImageArgs { compress, write: WriteArgs { force, json } } = args.written;
    let output = Arc::new(Output::new(json));
    let cancel = cancellation()?;
    let options = FlattenOptions {
        layout: match args.layout {
            Layout::Packed => image::Layout::Packed,
            Layout::Flat => image::Layout::Flat,
        },
        compression: compress,
        force,
        ..FlattenOptions::new(args.image, args.to)
    };
    let work = tokio::task::spawn_blocking({
        let output = Arc::clone(&output);
        move || {
            journeys::flatten(&options, &cancel, |done, total| {
                output.advance(done, total, String::new());
            })
        }
    });
    // Interrupted, it is waited for, since it cleans up behind itself.
    let done = work.await;
    let saved = done.unwrap_or_else(|e| std::panic::resume_unwind(e.into_panic()))?;
    let bytes = |pages: u64| pages * PAGE_SIZE as u64;
    let event = CommandEvent::Flattened {
        identity: saved.identity.to_string(),
        pages: saved.data_pages,
        zero_pages: saved.zero_pages,
        image_bytes: saved.image_bytes,
    };
    let (data, zeros) = (size(bytes(saved.data_pages)), size(bytes(saved.zero_pages)));
    let words = format!("{data} and {zeros} of zeros in {}", size(saved.image_bytes));
    output.done(&event, "flattened", &words);
    Ok(())
}
