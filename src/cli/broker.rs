//! The broker: what is done outside of the sandbox for a page server in it.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use super::FAILED;
use crate::revert::{Rights, run_broker};

#[derive(Args)]
pub(super) struct BrokerArgs {
    /// The process whose memory may be collapsed
    #[arg(long)]
    qemu: Option<i32>,
    /// The file that may be read and written
    #[arg(long)]
    working_set: Option<PathBuf>,
}

/// Runs a broker. Its connection with the server is its standard input.
pub(super) fn run(args: BrokerArgs) -> ExitCode {
    let connection = io::stdin().as_fd().try_clone_to_owned().map(UnixStream::from);
    let connection = connection.and_then(|socket| socket.peer_addr().map(|_| socket));
    let connection = connection.and_then(|socket| {
        nix::unistd::dup2_stdin(std::fs::File::open("/dev/null")?)?;
        Ok(socket)
    });
    let mut rights = Rights::default();
    (rights.qemu, rights.working_set) = (args.qemu, args.working_set);
    match connection {
        Ok(connection) => {
            run_broker(connection, rights);
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("snapback: a broker is started by a page server only ({error})");
            ExitCode::from(FAILED)
        }
    }
}
