//! The broker: what is done outside of the sandbox for a page server in it.

use std::path::PathBuf;

use clap::Args;

use super::FAILED;
use crate::host::packets;
use crate::revert::{Rights, run_broker};

#[derive(Args)]
pub(super) struct BrokerArgs {
    /// The process whose memory may be collapsed
    #[arg(long)]
    qemu: Option<i32>,
    /// The working set, which may be read and replaced
    #[arg(long)]
    working_set: Option<PathBuf>,
    /// A file that may be read
    #[arg(long)]
    file: Vec<PathBuf>,
}

/// Runs a broker. Its connection with the server is its standard input. Returns the exit code.
pub(super) fn run(args: BrokerArgs) -> u8 {
    let BrokerArgs { qemu, working_set, file: files } = args;
    match packets::take_stdin() {
        Ok(connection) => {
            run_broker(connection, &Rights { qemu, working_set, files });
            0
        }
        Err(error) => {
            eprintln!("snapback: a broker is started by a page server only ({error})");
            FAILED
        }
    }
}
