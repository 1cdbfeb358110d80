//! libvirt as the transport of QMP: commands go by virDomainQemuMonitorCommand, on a thread of
//! their own since libvirt's calls block.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use serde_json::{Value, json};

use super::error::LibvirtError;
use super::link::Link;
use crate::qmp::{Outgoing, Transport};

/// The monitor of a domain's QEMU.
#[derive(Debug)]
pub(super) struct Monitor {
    commands: Sender<Outgoing>,
}

impl Monitor {
    /// Starts its thread, which ends once the monitor is dropped and its last command is done.
    pub fn start(link: Arc<Link>) -> io::Result<Monitor> {
        let (commands, queue) = channel();
        let thread = std::thread::Builder::new().name("libvirt-monitor".into());
        thread.spawn(move || carry_all(&link, &queue))?;
        Ok(Monitor { commands })
    }
}

impl Transport for Monitor {
    fn send(&self, command: Outgoing) -> bool {
        self.commands.send(command).is_ok()
    }

    fn socket(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

fn carry_all(link: &Link, queue: &Receiver<Outgoing>) {
    for command in queue {
        let name = command.request["execute"].as_str().unwrap_or_default();
        let answer = match carry(link, name, &command) {
            // libvirtd was restarted. It may have been carried out.
            Err(LibvirtError::Lost { .. }) if is_repeatable(name) => carry(link, name, &command),
            answer => answer,
        };
        match answer {
            Ok(answer) => link.inbox().answer(command.id, Ok(answer)),
            Err(error @ LibvirtError::ShutOff { .. }) => {
                return link.inbox().end(error.to_string());
            }
            Err(error) => link.inbox().answer(command.id, Err(error.to_string())),
        }
    }
}

fn carry(link: &Link, name: &str, command: &Outgoing) -> Result<Value, LibvirtError> {
    let fd = command.fd.as_ref().map(AsFd::as_fd);
    let answer = link.monitor_command(name, &command.request.to_string(), fd)?;
    // An answer that can't be read holds neither a result nor an error, which is told.
    Ok(serde_json::from_str(&answer).unwrap_or_else(|_| json!({ "unreadable": answer })))
}

/// Whether a command does the same when it is carried out twice: those that only ask, and those that
/// set something.
fn is_repeatable(name: &str) -> bool {
    const SET: [&str; 6] =
        ["cont", "getfd", "migrate-set-capabilities", "migrate-set-parameters", "qom-get", "stop"];
    ["query-", "x-query-", "qom-list"].iter().any(|prefix| name.starts_with(prefix))
        || SET.contains(&name)
}
