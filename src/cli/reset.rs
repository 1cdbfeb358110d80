//! `snapback reset`: a guest goes back to its image, inside its QEMU or in a new one.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;

use super::failure::Failure;
use super::output::Output;
use super::pool::SocketArgs;
use super::{cancellation, detach};
use crate::cancel::Cancellation;
use crate::daemon::Client;
use crate::host::pidfd::peer_pid;
use crate::kind::ErrorKind;
use crate::pools::ResetView;
use crate::revert::{ResetWay, RevertEvent};
use crate::runs::{self, Again, ResetOutcome, Run, RunsError};

#[derive(Args)]
pub(super) struct ResetArgs {
    /// The id of the revert, or its beginning (`snapback ps` shows ids)
    #[arg(required_unless_present = "qmp", conflicts_with = "qmp")]
    id: Option<String>,
    /// The guest whose QEMU listens on this QMP socket (a Unix socket)
    #[arg(long, value_name = "SOCKET")]
    qmp: Option<PathBuf>,
    #[command(flatten)]
    socket: SocketArgs,
    /// Fail where the guest can't be reset inside its QEMU, instead of starting a new one
    #[arg(long)]
    in_place: bool,
    /// Print one JSON object a line
    #[arg(long)]
    pub json: bool,
}

/// Runs the command.
pub(super) async fn reset(args: ResetArgs) -> Result<(), Failure> {
    let began = Instant::now();
    let output = Output::new(args.json);
    if let (Some(id), Some(daemon)) = (&args.id, args.socket.named()) {
        return reset_by(&daemon, id, &output).await;
    }
    let run = match (&args.id, &args.qmp) {
        (Some(id), _) => runs::find(id)?,
        (None, Some(socket)) => run_of(socket)?,
        (None, None) => unreachable!("one of them is required"),
    };
    if let Some(of) = run.pool() {
        return reset_by(&Client::new(&of.daemon), &run.id, &output).await;
    }
    let (kind, why) = match run.reset().await {
        Ok(ResetOutcome::Done { pages, took_ms }) => {
            let how = ResetWay::InPlace;
            output.revert(&RevertEvent::Reset { how, pages: Some(pages), took_ms });
            return Ok(());
        }
        Ok(ResetOutcome::Refused { why }) => (ErrorKind::NotResettable, why),
        Ok(ResetOutcome::Failed { why }) => (ErrorKind::QemuFailed, why),
        Err(error @ RunsError::NotTracked { .. }) => (error.kind(), error.to_string()),
        Err(error) => return Err(error.into()),
    };
    let again = match (run.again(), args.in_place) {
        (Some(again), false) => again.clone(),
        _ => return Err(Failure::said(kind, why)),
    };
    output.revert(&RevertEvent::Note { what: "the guest gets a new QEMU".to_owned(), why });
    replace(&run, &again, cancellation()?, &output).await?;
    let took_ms = began.elapsed().as_secs_f64() * 1e3;
    output.revert(&RevertEvent::Reset { how: ResetWay::NewProcess, pages: None, took_ms });
    Ok(())
}

/// Has this daemon take a guest of its pools back.
async fn reset_by(daemon: &Client, id: &str, output: &Output) -> Result<(), Failure> {
    let ResetView { how, pages, ms, why, .. } = daemon.reset(id).await?;
    if let Some(why) = why {
        output.revert(&RevertEvent::Note { what: "the guest got a new QEMU".to_owned(), why });
    }
    output.revert(&RevertEvent::Reset { how, pages, took_ms: ms });
    Ok(())
}

/// The revert whose QEMU listens on a socket.
fn run_of(socket: &Path) -> Result<Run, Failure> {
    let unreachable = |error: std::io::Error| {
        let doing = format!("nobody listens on `{}`", socket.display());
        Failure::new(ErrorKind::QemuUnreachable, &doing, &error)
    };
    // Who listens is known without a word: waiting for QEMU's greeting would cost a millisecond.
    let pid = peer_pid(&UnixStream::connect(socket).map_err(unreachable)?);
    let run = pid.map(runs::of_qemu).transpose()?.flatten();
    run.ok_or_else(|| RunsError::NoSuchRun { id: socket.display().to_string() }.into())
}

/// Ends the guest with all that it has written, and reverts to its image as that was done before.
async fn replace(
    run: &Run,
    again: &Again,
    cancel: Cancellation,
    output: &Output,
) -> Result<(), Failure> {
    for overlay in run.stop()?.kept {
        std::fs::remove_file(&overlay)
            .map_err(|error| Failure::io("removing what the guest has written failed", &error))?;
    }
    detach::repeat(again, cancel, output).await
}
