//! The keeper, and what it starts in the place of a server that was killed.

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Args;

use super::FAILED;
use crate::keeper::Successor;

/// The program that runs now, even if its file has been replaced since.
const THIS_PROGRAM: &str = "/proc/self/exe";

#[derive(Args)]
pub(super) struct KeeperArgs {
    /// The arguments of a new server
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

/// Runs a keeper.
pub(super) fn run(args: KeeperArgs) -> ExitCode {
    match crate::keeper::run(args.successor) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("snapback: a keeper is started by a page server only ({error})");
            ExitCode::from(FAILED)
        }
    }
}
