//! The record of a revert, as its server keeps it. All of it is written by a thread of its own:
//! the guest waits for none of it.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use super::record::FILES;
use super::{ProcessId, Record, RunOptions, directory};

/// The record of a revert. Dropping it removes the record, unless there is something left for
/// [`left_overs`](super::left_overs) to find.
#[derive(Debug)]
pub(crate) struct Entry {
    directory: PathBuf,
    notes: Notes,
    thread: Option<JoinHandle<()>>,
}

/// Notes changes of a record. Once its [`Entry`] has been dropped it does nothing.
#[derive(Debug, Clone)]
pub(crate) struct Notes(Sender<Message>);

enum Message {
    Change(Box<dyn FnOnce(&mut Record) + Send>),
    End,
}

impl std::fmt::Debug for Message {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Message::Change(_) => "Change",
            Message::End => "End",
        })
    }
}

impl Entry {
    /// Begins the record of a revert that this process serves.
    pub fn begin(options: &RunOptions, record: Record) -> Entry {
        let RunOptions { id, log, again, pool } = options.clone();
        let record = Record { log, again, pool, ..record };
        let is_id = directory::is_id(&id);
        Entry::start(directory::of(&id), move |directory| {
            if !is_id {
                return Err(io::Error::other("its id is not one of 8 hexadecimal digits"));
            }
            directory::make(directory)?;
            Ok(Record { server: ProcessId::this(), ..record })
        })
    }

    /// Goes on with the record of a server that has died, as this one.
    pub fn take_over(directory: PathBuf, server: Option<ProcessId>) -> Entry {
        Entry::start(directory, move |directory| Ok(Record { server, ..Record::read(directory)? }))
    }

    fn start(
        directory: PathBuf,
        first: impl FnOnce(&Path) -> io::Result<Record> + Send + 'static,
    ) -> Entry {
        let (sender, messages) = channel();
        let path = directory.clone();
        let keep = move || match first(&path).and_then(|record| keep(&path, record, &messages)) {
            Ok(()) => {}
            Err(error) => tracing::warn!(
                "this revert can't be recorded in `{}`, and is not listed: {error}",
                path.display()
            ),
        };
        let thread = std::thread::Builder::new().name("record".into()).spawn(keep);
        let thread = thread.inspect_err(|e| tracing::warn!("this revert is not recorded: {e}"));
        Entry { directory, notes: Notes(sender), thread: thread.ok() }
    }

    /// Its directory, for a server that may have to take over.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The directory in which its own and the user's are removed, once they are empty.
    pub fn removed_from(&self) -> Option<PathBuf> {
        self.directory.parent()?.parent().map(Path::to_owned)
    }

    /// Waits until its directory is there. False where it can't be made: nothing is recorded then.
    pub async fn has_begun(&self) -> bool {
        let (tell, told) = tokio::sync::oneshot::channel();
        self.note(move |_| _ = tell.send(()));
        told.await.is_ok()
    }

    /// What notes changes from elsewhere.
    pub fn notes(&self) -> Notes {
        self.notes.clone()
    }

    /// Changes the record. It returns at once.
    pub fn note(&self, change: impl FnOnce(&mut Record) + Send + 'static) {
        self.notes.note(change);
    }
}

impl Notes {
    /// Changes the record. It returns at once.
    pub fn note(&self, change: impl FnOnce(&mut Record) + Send + 'static) {
        // Fails when nothing is recorded any more.
        let _ = self.0.send(Message::Change(Box::new(change)));
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let _ = self.notes.0.send(Message::End);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Keeps a record written, until the end.
fn keep(directory: &Path, mut record: Record, messages: &Receiver<Message>) -> io::Result<()> {
    record.write(directory)?;
    while let Ok(Message::Change(change)) = messages.recv() {
        change(&mut record);
        record.write(directory)?;
    }
    // Of a revert that failed when its guest had run, the overlays stay, and nobody else knows
    // of them. One that was taken up by hand and failed leaves QEMU to be taken up again. A guest
    // that has all its memory is its owner's, with its overlays; one of a pool's is the pool's.
    let leaves = record.overlays.iter().any(|overlay| overlay.symlink_metadata().is_ok());
    let waits = record.qemu.is_some_and(ProcessId::may_live);
    match record.pool.is_none() && !record.resident && (leaves || waits) {
        true => Ok(()),
        false => directory::remove(directory, &FILES),
    }
}
