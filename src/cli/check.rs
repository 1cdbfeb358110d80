//! `snapback check`: whether a save would work.

use std::path::PathBuf;

use super::events::CommandEvent;
use super::failure::Failure;
use super::output::{Output, print_line};
use super::save::GuestArgs;
use crate::save::check;
use clap::Args;

#[derive(Args)]
pub(super) struct CheckArgs {
    #[command(flatten)]
    guest: GuestArgs,
    /// The image that would be written [default: only the room in the current directory is looked at]
    image: Option<PathBuf>,
    /// Print one JSON object a line
    #[arg(long)]
    pub(super) json: bool,
}

/// Runs the command: prints every item, and fails when one stands in the way of a save.
pub(super) async fn run(args: CheckArgs) -> Result<(), Failure> {
    let options = args.guest.options(args.image.unwrap_or_default());
    let output = Output::new(args.json);
    let mut failed = Vec::new();
    // Of the first that stands in the way.
    let mut kind = None;
    for item in check(&options).await? {
        let (ok, says) = match &item.outcome {
            Ok(says) => (true, says.clone()),
            Err(error) => {
                kind.get_or_insert(error.kind());
                (false, error.to_string())
            }
        };
        if args.json {
            let (item, warning) = (item.name, item.warning);
            output.print_json(&CommandEvent::Check { item, ok, warning, says });
        } else {
            let mark = match (ok, item.warning) {
                (false, _) => "NO",
                (true, false) => "ok",
                (true, true) => "!!",
            };
            print_line(&format!("{mark:<4}{:<20}{says}", item.name));
        }
        if !ok {
            failed.push(item.name);
        }
    }
    match kind {
        None => Ok(()),
        Some(kind) => {
            let message = format!("a save would not work: {}", failed.join(", "));
            Err(Failure::said(kind, message))
        }
    }
}
