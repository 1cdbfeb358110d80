//! `snapback check`: whether a save would work, or whether a repository is whole.

use std::path::PathBuf;

use super::events::CommandEvent;
use super::failure::Failure;
use super::output::{Output, print_about};
use super::repository::{self, RepositoryArgs};
use super::save::GuestArgs;
use crate::save::check;
use clap::Args;

#[derive(Args)]
#[command(after_help = HELP)]
pub(super) struct CheckArgs {
    #[command(flatten)]
    guest: GuestArgs,
    /// The image that would be written [default: only the room in the current directory is looked at]
    image: Option<PathBuf>,
    #[command(flatten)]
    repository: RepositoryArgs,
    /// With --repo: read this share of all packs, chosen at random, and verify what lies in them
    #[arg(long, value_name = "P%", requires = "repo", value_parser = parse_share, default_value = "0%")]
    read_data: f64,
    /// Print one JSON object a line
    #[arg(long)]
    pub(super) json: bool,
}

/// What is checked without a guest.
const HELP: &str = "\
With --repo and without a guest, the repository is checked: that all manifests and maps can be read,
and that everything that they refer to is there. --read-data 100% reads all data, too.";

/// A guest is needed unless a repository is named.
pub(super) fn of_repositories_too(command: clap::Command) -> clap::Command {
    command
        .mut_arg("qmp", |qmp| qmp.required_unless_present_any(["domain", "repo"]))
        .mut_arg("repo", |repo| repo.conflicts_with_all(["qmp", "domain"]))
}

fn parse_share(text: &str) -> Result<f64, String> {
    let share = text.strip_suffix('%').unwrap_or(text).parse().ok();
    let share = share.filter(|share| (0.0..=100.0).contains(share));
    share.map(|share: f64| share / 100.0).ok_or("it is a share from 0% to 100%".into())
}

/// Runs the command: prints every item, and fails when one stands in the way of a save.
pub(super) async fn run(args: CheckArgs) -> Result<(), Failure> {
    if args.guest.is_none() {
        return repository::check(args.repository, args.read_data, args.json).await;
    }
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
            print_about(&format!("{mark:<4}{}", item.name), 25, &says);
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
