//! The arguments of a revert about disks.

use std::path::PathBuf;

use clap::Args;

use super::clones::expanded;
use crate::guest::{OverlayOptions, RewriteOptions};
use crate::revert::CloneIdentity;

/// How the captured disks are brought back.
#[derive(Args, Clone)]
pub(super) struct RevertDisksArgs {
    /// Create the disks' overlays in this directory [default: beside the image]
    #[arg(long, value_name = "DIR")]
    overlay_dir: Option<PathBuf>,
    /// Discard the disks' changes when QEMU ends
    #[arg(long)]
    ephemeral: bool,
    /// Use PATH, an unchanged copy, as the frozen file of a disk
    #[arg(long = "disk", value_name = "NODE=PATH", value_parser = parse_disk)]
    disks: Vec<(String, PathBuf)>,
}

impl RevertDisksArgs {
    /// The arguments of one clone.
    pub(super) fn of_clone(self, clone: &CloneIdentity) -> RevertDisksArgs {
        let overlay_dir = self.overlay_dir.map(|path| expanded(&path, clone));
        RevertDisksArgs { overlay_dir, ..self }
    }

    /// Adds them to a revert's options.
    pub(super) fn apply(self, options: RewriteOptions) -> RewriteOptions {
        RewriteOptions {
            overlays: OverlayOptions {
                directory: self.overlay_dir,
                prefix: None,
                ephemeral: self.ephemeral,
                ..OverlayOptions::default()
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
