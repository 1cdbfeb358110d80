//! QEMU's own control socket as a transport, on two tasks: one always reads, so that events are
//! never stuck behind an unawaited answer, and one writes.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde_json::json;
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::inbox::Inbox;
use super::message::Messages;
use super::transport::{Outgoing, Transport};

/// A control socket whose greeting has been read.
#[derive(Debug)]
pub(super) struct Socket {
    outgoing: mpsc::UnboundedSender<Outgoing>,
    reader: JoinHandle<()>,
    writer: JoinHandle<()>,
    socket: OwnedFd,
}

impl Socket {
    /// Starts its tasks: `messages` and `write_half` are the two directions of `socket`.
    pub fn start(
        messages: Messages<OwnedReadHalf>,
        write_half: OwnedWriteHalf,
        socket: OwnedFd,
        inbox: Arc<Inbox>,
    ) -> Socket {
        let (outgoing, queue) = mpsc::unbounded_channel();
        let reader = tokio::spawn(read_messages(messages, inbox.clone()));
        let writer = tokio::spawn(write_messages(write_half, queue, inbox));
        Socket { outgoing, reader, writer, socket }
    }
}

impl Transport for Socket {
    fn send(&self, command: Outgoing) -> bool {
        self.outgoing.send(command).is_ok()
    }

    fn socket(&self) -> Option<BorrowedFd<'_>> {
        Some(self.socket.as_fd())
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // Each task owns its half of the socket: it closes with them.
        self.reader.abort();
        self.writer.abort();
    }
}

/// The reader task: delivers messages until the connection ends.
async fn read_messages(mut messages: Messages<OwnedReadHalf>, inbox: Arc<Inbox>) {
    loop {
        match messages.next().await {
            Ok(message) => inbox.deliver(message),
            Err(reason) => return inbox.end(reason.to_string()),
        }
    }
}

/// The writer task. As a task of its own it completes a message even if its caller has stopped
/// waiting.
async fn write_messages(
    socket: OwnedWriteHalf,
    mut queue: mpsc::UnboundedReceiver<Outgoing>,
    inbox: Arc<Inbox>,
) {
    while let Some(Outgoing { id, mut request, mut fd }) = queue.recv().await {
        request["id"] = json!(id);
        let bytes = format!("{request}\n");
        let mut rest = bytes.as_bytes();
        while !rest.is_empty() {
            let stream: &UnixStream = socket.as_ref();
            let sent = stream.async_io(Interest::WRITABLE, || send_part(stream, rest, fd.as_ref()));
            match sent.await {
                Ok(sent) => rest = &rest[sent..],
                Err(error) => return inbox.end(format!("writing failed: {error}")),
            }
            // The descriptor has gone with the message's first byte.
            fd = None;
        }
    }
}

/// Sends what the socket takes at once; a descriptor goes with its first byte.
fn send_part(socket: &UnixStream, bytes: &[u8], fd: Option<&OwnedFd>) -> io::Result<usize> {
    let raw = fd.map(|fd| [fd.as_raw_fd()]);
    let rights = raw.as_ref().map(|raw| ControlMessage::ScmRights(raw));
    sendmsg::<()>(
        socket.as_fd().as_raw_fd(),
        &[IoSlice::new(bytes)],
        rights.as_slice(),
        MsgFlags::MSG_NOSIGNAL,
        None,
    )
    .map_err(io::Error::from)
}
