//! The arguments that commands which write a file have in common.

use clap::Args;

use super::parse_compression;
use crate::image::Compression;

/// Of every command that writes a file.
#[derive(Args)]
pub(super) struct WriteArgs {
    /// Replace an existing file
    #[arg(long)]
    pub force: bool,
    /// Print one JSON object a line
    #[arg(long)]
    pub json: bool,
}

/// Of every command that writes an image.
#[derive(Args)]
pub(super) struct WriteImageArgs {
    /// How memory is stored: none, zstd, or zstd:LEVEL (-7 to 19)
    #[arg(long, value_name = "HOW", default_value = "zstd", value_parser = parse_compression)]
    pub compress: Compression,
    #[command(flatten)]
    pub write: WriteArgs,
}
