//! The keeper, and what it starts in the place of a server that was killed.

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

use clap::Args;

use super::FAILED;
use crate::keeper::Successor;
use crate::libvirt::DomainAddress;
use crate::save::GuestAddress;

/// The program that runs now, even if its file has been replaced since.
pub(super) const THIS_PROGRAM: &str = "/proc/self/exe";

#[derive(Args)]
pub(super) struct KeeperArgs {
    /// Clean up behind a save
    #[arg(long)]
    clean_up: bool,
    /// The arguments of a new server, or of what cleans up
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    successor: Vec<OsString>,
}

/// What a keeper starts in the place of a server that prints in this way.
pub(super) fn successor(json: bool, serving_detached: bool) -> Successor {
    let mut arguments: Vec<OsString> = vec!["resume".into(), "--inherited".into()];
    if json {
        arguments.push("--json".into());
    }
    if serving_detached {
        arguments.push("--serving-detached".into());
    }
    Successor::new(THIS_PROGRAM, arguments)
}

/// What the keeper of a save of this guest to this image starts should the save be killed.
pub(super) fn cleaner(guest: &GuestAddress, image: &Path, json: bool) -> Successor {
    let mut arguments: Vec<OsString> = vec!["save".into(), "--recover".into()];
    if json {
        arguments.push("--json".into());
    }
    match guest {
        GuestAddress::Socket(socket) => arguments.extend(["--qmp".into(), socket.into()]),
        GuestAddress::Domain(DomainAddress { domain, uri, .. }) => {
            arguments.extend(["--domain".into(), domain.into()]);
            if let Some(uri) = uri {
                arguments.extend(["--connect".into(), uri.into()]);
            }
        }
    }
    arguments.extend(["--".into(), image.into()]);
    Successor::cleaning_up(THIS_PROGRAM, arguments)
}

/// Runs a keeper.
pub(super) fn run(args: KeeperArgs) -> ExitCode {
    let kept = match args.clean_up {
        true => crate::keeper::clean_up(args.successor),
        false => crate::keeper::run(args.successor),
    };
    match kept {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("snapback: a keeper is started by a page server or a save only ({error})");
            ExitCode::from(FAILED)
        }
    }
}
