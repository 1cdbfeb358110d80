//! The server's side.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use super::frames::Frame;
use crate::cancel::Cancellation;
use crate::revert::collapse::Collapsing;
use crate::revert::event::RevertEvent;

/// How long reading or writing a working set may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// A connection with a broker. Dropping it ends the broker.
#[derive(Debug)]
pub struct Broker {
    connection: UnixStream,
    /// Where this process has started it.
    process: Option<Child>,
}

impl Broker {
    /// Starts one by the program `snapback`, with these rights.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn start(
        program: &Path,
        qemu: Option<i32>,
        working_set: Option<&Path>,
    ) -> io::Result<Broker> {
        let (connection, theirs) = UnixStream::pair()?;
        let mut command = Command::new(program);
        command.arg("broker");
        if let Some(qemu) = qemu {
            command.arg("--qemu").arg(qemu.to_string());
        }
        if let Some(path) = working_set {
            command.arg("--working-set").arg(std::path::absolute(path)?);
        }
        // Out of the reach of our terminal's signals.
        command.process_group(0).stdin(OwnedFd::from(theirs));
        // What it has to say is in its answers; a log that it had open would not be removed behind
        // a server that was killed.
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let process = Some(command.spawn()?);
        Ok(Broker { connection, process })
    }

    /// The broker of a server that has died.
    pub fn inherited(connection: OwnedFd) -> Broker {
        Broker { connection: connection.into(), process: None }
    }

    /// What a successor needs to go on with it.
    pub fn connection(&self) -> BorrowedFd<'_> {
        self.connection.as_fd()
    }

    /// The bytes of the image's working set; none where there is none.
    ///
    /// # Errors
    /// When it can't be read.
    pub fn read_working_set(&self) -> io::Result<Option<Vec<u8>>> {
        self.ask(&Frame::Read, Some(PATIENCE))
    }

    /// Replaces the image's working set.
    ///
    /// # Errors
    /// When it can't be written.
    pub fn write_working_set(&self, bytes: Vec<u8>) -> io::Result<()> {
        self.ask(&Frame::Write(bytes), Some(PATIENCE)).map(drop)
    }

    /// Has memory collapsed, as [`Collapsing::run`] does. It blocks; `cancel` ends it within
    /// some milliseconds.
    ///
    /// # Errors
    /// When the broker has ended.
    pub fn collapse(
        &self,
        collapsing: &Collapsing,
        cancel: &Cancellation,
    ) -> io::Result<Option<RevertEvent>> {
        let stop = self.connection.try_clone()?;
        cancel.on_request(move || drop(Frame::Stop.send(stop)));
        let told = self.ask(&Frame::Collapse(serde_json::to_vec(collapsing)?), None)?;
        Ok(told.map(|event| serde_json::from_slice(&event)).transpose()?.flatten())
    }

    /// Asks, and waits for the answer, for so long at most.
    fn ask(&self, frame: &Frame, most: Option<Duration>) -> io::Result<Option<Vec<u8>>> {
        self.connection.set_read_timeout(most)?;
        frame.send(&self.connection)?;
        match Frame::receive(&self.connection)? {
            Some(Frame::Done(bytes)) => Ok(Some(bytes)),
            Some(Frame::Nothing) => Ok(None),
            Some(Frame::Failed(why)) => Err(io::Error::other(why)),
            _ => Err(io::Error::other("the process that holds its rights has ended")),
        }
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        // For the copy that a keeper holds as well.
        let _ = self.connection.shutdown(std::net::Shutdown::Both);
        if let Some(process) = &mut self.process {
            let _ = process.wait();
        }
    }
}
