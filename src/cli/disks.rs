//! The arguments by which a revert deals with disks.

use std::path::PathBuf;

use clap::Args;

use crate::guest::{OverlayOptions, RewriteOptions};

/// What becomes of disks that are part of the snapshot.
#[derive(Args)]
pub(super) struct RevertDisksArgs {
    /// Put the files for the disks' changes there [default: beside the image]
    #[arg(long, value_name = "DIR")]
    overlay_dir: Option<PathBuf>,
    /// Throw the disks' changes away when QEMU ends
    #[arg(long)]
    ephemeral: bool,
    /// Use PATH, an unchanged copy, as the frozen file of a disk
    #[arg(long = "disk", value_name = "NODE=PATH", value_parser = parse_disk)]
    disks: Vec<(String, PathBuf)>,
}

impl RevertDisksArgs {
    /// Puts them where a revert looks for them.
    pub(super) fn apply(self, options: RewriteOptions) -> RewriteOptions {
        RewriteOptions {
            overlays: OverlayOptions {
                folder: self.overlay_dir,
                prefix: None,
                ephemeral: self.ephemeral,
            },
            disks: self.disks,
            ..options
        }
    }
}

fn parse_disk(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((name, path)) if !name.is_empty() && !path.is_empty() => {
            Ok((name.into(), path.into()))
        }
        _ => Err("it has the form NODE=PATH".into()),
    }
}
