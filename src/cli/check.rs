//! `snapback check`: whether a save would work, whether a repository is whole, or whether this host can
//! run a guest.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;

use super::events::CommandEvent;
use super::failure::Failure;
use super::host::SiteArgs;
use super::output::{Output, print_about};
use super::parse_share;
use super::repository::{self, FarArgs};
use super::save::GuestArgs;
use crate::doctor::{State, check_here};
use crate::kind::ErrorKind;
use crate::revert::RevertOptions;
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
    far: FarArgs,
    /// Ask whether this host can run the guest of IMAGE: an image, or a snapshot of a repository, such
    /// as s3://BUCKET/PREFIX/web1@latest, or web1@latest with --repo
    #[arg(long, requires = "image")]
    here: bool,
    /// With --here: the QEMU binary to use instead of the recorded one
    #[arg(long, value_name = "BIN", requires = "here")]
    qemu: Option<PathBuf>,
    #[command(flatten)]
    site: SiteArgs,
    /// With --repo: read this share of all packs, chosen at random, and verify what lies in them
    #[arg(long, value_name = "P%", requires = "repo", value_parser = parse_share, default_value = "0%")]
    read_data: f64,
    /// Print one JSON object a line
    #[arg(long)]
    pub(super) json: bool,
}

/// What is checked without a guest.
const HELP: &str = "\
With --repo and without a guest, the repository is checked: that all manifests and maps can be read, \
and that everything that they refer to is there. --read-data 100% reads all data, too.

With --here, this host is looked at: QEMU and its machine types, the processor, memory, rights, and the \
files and networks that the guest's command line names, as --path, --port and --netdev change it. What \
is NOT here keeps the guest from running, and the exit code says so.";

/// A guest is needed unless a repository is named.
pub(super) fn of_repositories_too(command: clap::Command) -> clap::Command {
    command
        .mut_arg("qmp", |qmp| qmp.required_unless_present_any(["domain", "repo", "here"]))
        .mut_arg("repo", |repo| repo.conflicts_with_all(["qmp", "domain"]))
        .mut_arg("here", |here| here.conflicts_with_all(["qmp", "domain"]))
        .mut_arg("paths", |paths| paths.requires("here"))
        .mut_arg("ports", |ports| ports.requires("here"))
        .mut_arg("netdevs", |netdevs| netdevs.requires("here"))
}

/// Runs the command: prints every item, and fails when one stands in the way of a save.
pub(super) async fn run(args: CheckArgs) -> Result<(), Failure> {
    if args.here {
        return here(args).await;
    }
    if args.guest.is_none() {
        return repository::check(args.far.repository, args.read_data, args.json).await;
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

/// Prints what this host has for a guest, and fails when something keeps it from running.
async fn here(args: CheckArgs) -> Result<(), Failure> {
    let output = Arc::new(Output::new(args.json));
    // It is required.
    let image = args.image.unwrap_or_default();
    let mut options = match args.far.open(&image, &output).await? {
        Some(far) => RevertOptions::from_afar(far),
        None => RevertOptions::new(&image),
    };
    options.rewrite = args.site.apply(options.rewrite)?;
    options.rewrite.qemu = args.qemu;
    let looked = tokio::task::spawn_blocking(move || check_here(&options)).await;
    let items = looked.unwrap_or_else(|e| std::panic::resume_unwind(e.into_panic()))?;
    let mut failed = BTreeSet::new();
    for item in items {
        if item.state == State::Missing {
            failed.insert(item.name.clone());
        }
        match args.json {
            true => output.print_json(&CommandEvent::Here(Box::new(item))),
            false => {
                let mark = match item.state {
                    State::Ok => "ok",
                    State::Degraded => "!!",
                    State::Missing => "NO",
                };
                let remedy = item.remedy.map(|command| format!("; remedy: `{command}`"));
                let says = item.says + &remedy.unwrap_or_default();
                print_about(&format!("{mark:<4}{}", item.name), 19, &says);
            }
        }
    }
    match failed.is_empty() {
        true => Ok(()),
        false => {
            let failed = failed.into_iter().collect::<Vec<_>>().join(", ");
            let message = format!("this host can't run the guest of {}: {failed}", image.display());
            Err(Failure::said(ErrorKind::HostUnsupported, message))
        }
    }
}
