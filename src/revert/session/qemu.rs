//! The QEMU of a session: ours, or somebody else's.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::Duration;

use super::adopted::Adopted;
use crate::guest::{Process, Reach};
use crate::libvirt::StartedDomain;
use crate::qmp::{Event, Events, Qmp, QmpError};
use crate::revert::error::RevertError;
use crate::revert::kept::Kept;

/// The name under which QEMU is given its end of the migration stream.
pub(super) const INCOMING: &str = "snapback-incoming";

/// The migration capabilities that a postcopy turns on, and off again at its end.
pub(super) const POSTCOPY: [&str; 2] = ["postcopy-ram", "events"];

/// How long QEMU may take to end the migration once it has confirmed its end.
const END_TIMEOUT: Duration = Duration::from_secs(60);

/// How long the process of a QEMU that has closed its sockets may take to end.
const ENDING_TIMEOUT: Duration = Duration::from_secs(1);

/// How long it may take to read the last events of a QEMU that has ended.
const LAST_WORDS_TIMEOUT: Duration = Duration::from_secs(5);

/// The QEMU of a session.
pub(super) enum Qemu {
    /// One that we have started, and that ends with the session unless it is let go.
    Ours {
        process: Process,
        qmp: Qmp,
        /// All its events from its start on.
        said: Events,
        /// How others reach it.
        reach: Reach,
    },
    /// One that libvirt has started for us, and that ends with the session unless it is let go.
    Domain {
        domain: StartedDomain,
        qmp: Qmp,
        /// All its events from its start on.
        said: Events,
    },
    /// One that somebody else has started.
    Theirs {
        /// Its QMP, where that is how we have come to it.
        qmp: Option<Qmp>,
        /// Its process id, where it is known.
        pid: Option<i32>,
    },
    /// One that a process has started which has died. It is ours now.
    Adopted(Adopted),
}

impl Qemu {
    /// One that we have started.
    pub fn ours(process: Process, qmp: Qmp, reach: Reach) -> Qemu {
        let said = qmp.events();
        Qemu::Ours { process, qmp, said, reach }
    }

    /// One that libvirt has started for us.
    pub fn domain(domain: StartedDomain, qmp: Qmp) -> Qemu {
        let said = qmp.events();
        Qemu::Domain { domain, qmp, said }
    }

    /// How others reach it, where we have started it.
    pub fn reach(&self) -> Reach {
        match self {
            Qemu::Ours { reach, .. } => reach.clone(),
            Qemu::Domain { .. } | Qemu::Theirs { .. } | Qemu::Adopted(_) => Reach::default(),
        }
    }

    /// Its QMP, if we speak to it.
    pub fn qmp(&self) -> Option<&Qmp> {
        match self {
            Qemu::Ours { qmp, .. } | Qemu::Domain { qmp, .. } => Some(qmp),
            Qemu::Theirs { qmp, .. } => qmp.as_ref(),
            Qemu::Adopted(_) => None,
        }
    }

    /// Its QMP at the end of the migration, when every QEMU answers: one whose guest waits for
    /// memory may not. None where there is none, or it can't be had.
    pub async fn last_qmp(&self) -> Option<Qmp> {
        let Qemu::Adopted(qemu) = self else { return self.qmp().cloned() };
        let reached = qemu.qmp().await;
        reached.inspect_err(|error| tracing::warn!("QEMU's control socket: {error}")).ok()
    }

    /// The capabilities that are on for a postcopy only. libvirt has QEMU tell of every
    /// migration, and waits for that when it saves the domain itself.
    pub fn turned_on(&self) -> &'static [&'static str] {
        let is_libvirts = match self {
            Qemu::Domain { .. } => true,
            Qemu::Adopted(qemu) => qemu.is_libvirts(),
            Qemu::Ours { .. } | Qemu::Theirs { .. } => false,
        };
        if is_libvirts { &POSTCOPY[..1] } else { &POSTCOPY }
    }

    /// Its process id, where it is known.
    pub fn pid(&self) -> Option<i32> {
        match self {
            Qemu::Ours { process, .. } => Some(process.pid()),
            Qemu::Domain { domain, .. } => Some(domain.pid()),
            Qemu::Theirs { pid, .. } => *pid,
            Qemu::Adopted(qemu) => qemu.pid(),
        }
    }

    /// The directories of socket files that are removed behind it.
    pub fn socket_directories(&self) -> Vec<PathBuf> {
        let Qemu::Ours { process, .. } = self else { return Vec::new() };
        let directories = process.sockets().iter().filter_map(|socket| socket.parent());
        let named = directories.map(|path| match path.as_os_str().is_empty() {
            true => PathBuf::from("."),
            false => path.to_owned(),
        });
        named.collect()
    }

    /// Whether it ends with a session that fails.
    pub fn is_ours(&self) -> bool {
        !matches!(self, Qemu::Theirs { .. })
    }

    /// Keeps the overlays of its disks from now on: its guest writes to them.
    pub fn keep_overlays(&mut self) {
        match self {
            Qemu::Ours { process, .. } => process.keep_overlays(),
            Qemu::Domain { domain, .. } => domain.keep_overlays(),
            Qemu::Theirs { .. } | Qemu::Adopted(_) => {}
        }
    }

    /// Has it run its guest.
    pub async fn run_guest(&self) -> Result<(), RevertError> {
        match self {
            // libvirt knows of it then, and has locks taken that it holds for a guest that runs.
            Qemu::Domain { domain, .. } => Ok(domain.resume().await?),
            qemu => match qemu.qmp() {
                Some(qmp) => Ok(qmp.cont().await?),
                None => Ok(()),
            },
        }
    }

    /// Has libvirt keep the domain's definition, where that was asked for.
    pub async fn define(&mut self) -> Result<(), RevertError> {
        match self {
            Qemu::Domain { domain, .. } => Ok(domain.define().await?),
            _ => Ok(()),
        }
    }

    /// Has a keeper hold it.
    pub fn keep_by(&self, kept: &Kept) -> io::Result<()> {
        match self {
            Qemu::Ours { process, qmp, .. } => kept.hold_qemu(process, qmp),
            Qemu::Domain { domain, .. } => kept.hold_domain(domain.pid()),
            Qemu::Theirs { .. } | Qemu::Adopted(_) => Ok(()),
        }
    }

    /// What it has written to its standard error, as far as that comes to us.
    pub fn words(&self) -> String {
        match self {
            Qemu::Ours { process, .. } => process.log_tail(),
            Qemu::Domain { .. } | Qemu::Theirs { .. } => String::new(),
            Qemu::Adopted(qemu) => qemu.words(),
        }
    }

    /// Waits until it has ended, where it is one that we have started. Safe to cancel.
    pub fn ended(&self) -> impl Future<Output = ()> + Send + use<> {
        let ended = match self {
            Qemu::Ours { process, .. } => Some(process.ended()),
            Qemu::Domain { .. } | Qemu::Theirs { .. } | Qemu::Adopted(_) => None,
        };
        async move {
            match ended {
                Some(ended) => ended.await,
                None => std::future::pending().await,
            }
        }
    }

    /// How it has ended, if it has or is about to, and that comes to us. Its sockets close a
    /// little before its process ends.
    pub async fn end_status(&mut self) -> Option<ExitStatus> {
        match self {
            Qemu::Ours { process, .. } => process.wait_exit(ENDING_TIMEOUT).await,
            Qemu::Domain { .. } | Qemu::Theirs { .. } | Qemu::Adopted(_) => None,
        }
    }

    /// Ends it, if it is ours.
    pub async fn kill(&mut self) {
        match self {
            Qemu::Ours { process, .. } => process.kill().await,
            Qemu::Domain { domain, .. } => domain.end().await,
            Qemu::Adopted(qemu) => qemu.kill(),
            Qemu::Theirs { .. } => {}
        }
    }

    /// Keeps the overlays of a QEMU that has been ended if its guest has run: it may have
    /// told others of data that is in them.
    pub async fn settle_overlays(&mut self) {
        if let Qemu::Ours { said, .. } | Qemu::Domain { said, .. } = self {
            // With QEMU gone, its events end: all of them can be read.
            let has_run = tokio::time::timeout(LAST_WORDS_TIMEOUT, has_run(said)).await;
            if has_run != Ok(false) {
                self.keep_overlays();
            }
        }
    }
}

/// Has QEMU read a migration stream from its end, `theirs`. The commands are sent one behind
/// the other without waiting for answers: QEMU executes them in that order, and each
/// round trip would delay the guest by a good part of a millisecond.
///
/// `send` begins to send the stream as soon as QEMU has answered whether it has the
/// capabilities, while it executes the rest. It reads nothing before: without them, what is
/// sent can still be another stream.
pub(super) async fn migrate_from(
    qmp: &Qmp,
    capabilities: &[&str],
    theirs: UnixStream,
    send: impl FnOnce(Result<(), QmpError>) -> Result<(), RevertError>,
) -> Result<(), RevertError> {
    let capabilities: Vec<_> = capabilities.iter().map(|name| (*name, true)).collect();
    let send = async {
        send(match capabilities.is_empty() {
            true => Ok(()),
            false => qmp.set_migration_capabilities(&capabilities).await,
        })
    };
    let incoming = format!("fd:{INCOMING}");
    let (sent, given, listening) = tokio::join!(
        biased;
        send,
        qmp.getfd(INCOMING, theirs.as_fd()),
        qmp.migrate_incoming(&incoming),
    );
    sent?;
    Ok(given.and(listening)?)
}

/// Reads events until one says that the guest runs, or QEMU has gone and there are no more.
pub(super) async fn has_run(events: &mut Events) -> bool {
    loop {
        match events.next().await {
            Ok(event) if event.name == "RESUME" => return true,
            Ok(_) => {}
            // It may be among those that are lost.
            Err(QmpError::EventsLost(_)) => return true,
            Err(_) => return false,
        }
    }
}

/// Waits until QEMU has ended the migration, whose completion it has confirmed on the return
/// path, and turns the capabilities off that were turned on for it.
pub(super) async fn finish_postcopy(qmp: &Qmp, turned_on: &[&str]) -> Result<(), QmpError> {
    let mut events = qmp.events();
    let status = qmp.migration_info().await?.status.unwrap_or_default();
    // Any other status belongs to a later migration: somebody saves this guest, for example.
    if status.starts_with("postcopy") {
        let ended =
            |event: &Event| event.name == "MIGRATION" && event.data["status"] == "completed";
        events.wait(ended, END_TIMEOUT).await?;
    }
    let off: Vec<_> = turned_on.iter().map(|name| (*name, false)).collect();
    qmp.set_migration_capabilities(&off).await
}

#[cfg(test)]
mod tests {
    //! The end of a revert against a scripted socket: a real QEMU can't be stopped there.

    use serde_json::{Value, json};
    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
    use tokio::net::UnixStream;

    use super::{POSTCOPY, Qmp, QmpError, finish_postcopy, has_run};
    use std::time::Duration;

    /// A QEMU's control socket: `answer` gives what is sent for each command.
    async fn scripted(mut answer: impl FnMut(&str) -> Vec<Value> + Send + 'static) -> Qmp {
        let (ours, theirs) = UnixStream::pair().unwrap();
        tokio::spawn(async move {
            let (commands, mut answers) = theirs.into_split();
            let version = json!({"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": ""});
            let mut said = vec![json!({"QMP": {"version": version, "capabilities": []}})];
            let mut commands = BufReader::new(commands).lines();
            loop {
                for message in said.drain(..) {
                    answers.write_all(format!("{message}\r\n").as_bytes()).await.unwrap();
                }
                let Ok(Some(line)) = commands.next_line().await else { return };
                let command: Value = serde_json::from_str(&line).unwrap();
                said = match command["execute"].as_str().unwrap() {
                    "qmp_capabilities" => vec![json!({"return": {}})],
                    name => answer(name),
                };
                // Events go without an id; an answer may be any of the messages.
                for message in said.iter_mut().filter(|message| message.get("event").is_none()) {
                    message["id"] = command["id"].clone();
                }
            }
        });
        Qmp::over(ours, Duration::from_secs(60)).await.unwrap()
    }

    fn migration(status: &str) -> Value {
        json!({"event": "MIGRATION", "data": {"status": status},
               "timestamp": {"seconds": 1, "microseconds": 1}})
    }

    #[tokio::test]
    async fn the_end_is_waited_for_by_its_event() {
        let qmp = scripted(|command| match command {
            "query-migrate" => vec![
                json!({"return": {"status": "postcopy-active"}}),
                migration("device"),
                migration("completed"),
            ],
            _ => vec![json!({"return": {}})],
        });
        finish_postcopy(&qmp.await, &POSTCOPY).await.unwrap();
    }

    #[tokio::test]
    async fn a_save_that_has_begun_meanwhile_is_not_waited_for() {
        let qmp = scripted(|command| match command {
            "query-migrate" => vec![json!({"return": {"status": "active"}})],
            _ => vec![json!({"error": {"class": "GenericError", "desc": "there is a migration"}})],
        });
        let error = finish_postcopy(&qmp.await, &POSTCOPY).await.unwrap_err();
        assert!(matches!(&error, QmpError::Command { .. }), "{error}");
    }

    #[tokio::test]
    async fn whether_the_guest_has_run_is_known_when_qemu_is_gone() {
        let resume = json!({"event": "RESUME", "timestamp": {"seconds": 1, "microseconds": 1}});
        for (said, has) in [(migration("active"), false), (resume, true)] {
            let qmp = scripted(move |_| vec![said.clone(), json!({"return": {}})]).await;
            let mut events = qmp.events();
            qmp.execute("quit", ()).await.unwrap();
            // It closes the connection.
            drop(qmp);
            assert_eq!(has_run(&mut events).await, has);
        }
    }
}
