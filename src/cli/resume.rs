//! `snapback resume`: serves a guest whose page server was killed. Started by a keeper it is given
//! what the server has left; started by hand it finds all of it from outside.

use std::path::PathBuf;

use clap::{ArgGroup, Args, ValueEnum};

use super::failure::Failure;
use super::keeper::successor;
use super::output::Output;
use super::{FillArgs, SandboxArgs, cancellation};
use crate::keeper::Inheritance;
use crate::kind::ErrorKind;
use crate::revert::{Orphan, Placement, ResumeOptions};

#[derive(Args)]
#[command(group = ArgGroup::new("of").required(true))]
pub(super) struct ResumeArgs {
    /// The image that the guest was being brought back from
    #[arg(required_unless_present = "inherited")]
    image: Option<PathBuf>,
    /// The guest's QEMU, by its process id
    #[arg(long, value_name = "PID", group = "of")]
    pid: Option<i32>,
    /// The guest's QEMU, by its QMP socket (a unix socket)
    #[arg(long, value_name = "SOCKET", group = "of")]
    qmp: Option<PathBuf>,
    /// How memory reaches the guest
    #[arg(long, value_name = "WAY", default_value = "auto")]
    place: ResumePlacementArg,
    #[command(flatten)]
    fill: FillArgs,
    /// Start no process that serves the guest on should this one be killed
    #[arg(long)]
    no_keeper: bool,
    #[command(flatten)]
    sandbox: SandboxArgs,
    /// Set by the keeper: what the server that was killed has left comes as descriptors
    #[arg(long, hide = true, group = "of", conflicts_with = "image")]
    inherited: bool,
    /// Print one JSON object a line
    #[arg(long)]
    pub json: bool,
    /// Set for the successor of a server in the background
    #[arg(long, hide = true)]
    pub serving_detached: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum ResumePlacementArg {
    /// Directly into its memory where that works, else by QEMU's socket
    Auto,
    /// Directly into its memory, by QEMU's userfaultfd, or not at all
    Uffd,
    /// By QEMU's postcopy socket: only where all memory came by that, and QEMU answers
    Socket,
}

impl From<ResumePlacementArg> for Placement {
    fn from(placement: ResumePlacementArg) -> Placement {
        match placement {
            ResumePlacementArg::Auto => Placement::Auto,
            ResumePlacementArg::Uffd => Placement::Uffd,
            ResumePlacementArg::Socket => Placement::Socket,
        }
    }
}

/// Runs the command.
pub(super) async fn run(args: ResumeArgs) -> Result<(), Failure> {
    let output = match args.serving_detached {
        true => Output::of_server(),
        false => Output::new(args.json),
    };
    let successor = successor(args.json, args.serving_detached);
    let of = match (args.pid, args.qmp) {
        (Some(pid), _) => Orphan::Process(pid),
        (None, Some(path)) => Orphan::Qmp(path),
        (None, None) => {
            // SAFETY: this is the only call, in a process that has just begun; nobody else starts
            // this command with descriptors from 64 on.
            let inheritance = unsafe { Inheritance::take(successor) };
            let inheritance = inheritance.map_err(|error| {
                let doing = "what the server that was killed has left can't be used";
                Failure::new(ErrorKind::ServerLost, doing, &error)
            })?;
            let cancel = cancellation()?;
            let served = crate::revert::take_over(inheritance, cancel, |e| output.revert(&e));
            return Ok(served.await.map(drop)?);
        }
    };
    let options = ResumeOptions {
        delivery: args.fill.delivery(args.place.into()),
        keeper: (!args.no_keeper).then_some(successor),
        sandbox: args.sandbox.program(),
        ..ResumeOptions::new(args.image.unwrap_or_default(), of)
    };
    let served = crate::revert::resume(&options, cancellation()?, |e| output.revert(&e)).await;
    Ok(served.map(drop)?)
}
