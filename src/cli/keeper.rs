//! The keeper, and the server that it starts in the place of one that was killed.

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Args;

use super::failure::Failure;
use super::output::Output;
use super::{FAILED, cancellation};
use crate::keeper::{Inheritance, Successor};
use crate::kind::ErrorKind;

/// The program that runs now, even if its file has been replaced since.
pub(super) const THIS_PROGRAM: &str = "/proc/self/exe";

#[derive(Args)]
pub(super) struct KeeperArgs {
    /// The arguments of a new server
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    successor: Vec<OsString>,
}

#[derive(Args)]
pub(super) struct ResumeArgs {
    /// Set by the keeper: what the server that was killed has left comes as descriptors
    #[arg(long, required = true)]
    inherited: bool,
    /// Print one JSON object a line
    #[arg(long)]
    pub json: bool,
    /// Set for the successor of a server in the background
    #[arg(long, hide = true)]
    pub serving_detached: bool,
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

/// Serves the guest of a server that was killed.
pub(super) async fn resume(args: ResumeArgs) -> Result<(), Failure> {
    let output = match args.serving_detached {
        true => Output::of_server(),
        false => Output::new(args.json),
    };
    let successor = successor(args.json, args.serving_detached);
    // SAFETY: this is the only call, in a process that has just begun; nobody else starts this
    // command with descriptors from 64 on.
    let inheritance = unsafe { Inheritance::take(successor) };
    let inheritance = inheritance.map_err(|error| {
        let doing = "what the server that was killed has left can't be used";
        Failure::new(ErrorKind::ServerLost, doing, &error)
    })?;
    let served = crate::revert::take_over(inheritance, cancellation()?, |e| output.revert(&e));
    Ok(served.await.map(drop)?)
}
