//! The broker's process.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;

use super::frames::Frame;
use crate::cancel::Cancellation;
use crate::memory::{WorkingSetError, working_set};
use crate::revert::collapse::Collapsing;

/// What a broker may do for its server. It is given when the broker is started, and not asked
/// for later.
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct Rights {
    /// The QEMU whose memory it may collapse.
    pub qemu: Option<i32>,
    /// The file of the working set, which it may read and write.
    pub working_set: Option<PathBuf>,
}

/// Does what the server at the other end of `connection` asks for, as far as `rights` go, until
/// the connection ends.
pub fn run(connection: UnixStream, rights: Rights) {
    let connection = Arc::new(connection);
    let mut collapse: Option<(Cancellation, JoinHandle<()>)> = None;
    // A server that sends what is no frame is served no more.
    while let Ok(Some(frame)) = Frame::receive(&*connection) {
        let answer = match frame {
            Frame::Read => read(&rights),
            Frame::Write(bytes) => write(&rights, &bytes),
            Frame::Collapse(asked) if collapse.is_none() => {
                let cancel = Cancellation::new();
                let (to, cancelled, qemu) = (Arc::clone(&connection), cancel.clone(), rights.qemu);
                let work = std::thread::spawn(move || {
                    // The server is gone if it can't be told.
                    let _ = collapse_all(qemu, &asked, &cancelled).send(&*to);
                });
                collapse = Some((cancel, work));
                continue;
            }
            Frame::Stop => {
                collapse.iter().for_each(|(cancel, _)| cancel.request());
                continue;
            }
            _ => Frame::Failed("that is not done here".into()),
        };
        if answer.send(&*connection).is_err() {
            break;
        }
    }
    if let Some((cancel, work)) = collapse {
        cancel.request();
        let _ = work.join();
    }
}

fn read(rights: &Rights) -> Frame {
    let Some(path) = &rights.working_set else { return Frame::Nothing };
    match working_set::read_file(path) {
        Ok(bytes) => Frame::Done(bytes),
        Err(WorkingSetError::None(_)) => Frame::Nothing,
        Err(error) => Frame::Failed(error.to_string()),
    }
}

fn write(rights: &Rights, bytes: &[u8]) -> Frame {
    let Some(path) = &rights.working_set else { return Frame::Nothing };
    match working_set::write_file(path, bytes) {
        Ok(()) => Frame::Done(Vec::new()),
        Err(error) => Frame::Failed(error.to_string()),
    }
}

/// Collapses what is asked for of its own QEMU, whichever the server names.
fn collapse_all(qemu: Option<i32>, asked: &[u8], cancel: &Cancellation) -> Frame {
    let Some(pid) = qemu else { return Frame::Nothing };
    let collapsing = match serde_json::from_slice::<Collapsing>(asked) {
        Ok(asked) => Collapsing { pid, ..asked },
        Err(error) => return Frame::Failed(error.to_string()),
    };
    match serde_json::to_vec(&collapsing.run(cancel)) {
        Ok(event) => Frame::Done(event),
        Err(error) => Frame::Failed(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::Identity;
    use crate::memory::WorkingSet;
    use crate::page::{BlockId, Page};

    /// What a broker with these rights answers to these requests.
    fn answers(rights: Rights, asked: Vec<Frame>) -> Vec<Frame> {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let broker = std::thread::spawn(move || run(theirs, rights));
        let answers = asked.into_iter().map(|frame| {
            frame.send(&ours).unwrap();
            Frame::receive(&ours).unwrap().unwrap()
        });
        let answers = answers.collect();
        drop(ours);
        broker.join().unwrap();
        answers
    }

    #[test]
    fn a_working_set_and_nothing_else_is_written() {
        let folder = tempfile::tempdir().unwrap();
        let rights =
            || Rights { working_set: Some(folder.path().join("vm.snap.ws")), ..Rights::default() };
        let block = crate::page::Block { name: "ram".into(), len: 1 << 20, page_size: 4096 };
        let page = Page { block: BlockId(0), number: 3 };
        let set =
            WorkingSet::following(None, Identity::from_bytes([7; 16]), [page], &[block]).unwrap();
        let told = answers(
            rights(),
            vec![
                Frame::Read,
                Frame::Write(b"#!/bin/sh".to_vec()),
                Frame::Read,
                Frame::Write(set.encode()),
                Frame::Read,
                Frame::Done(Vec::new()),
            ],
        );
        assert_eq!(told[0], Frame::Nothing);
        assert!(matches!(&told[1], Frame::Failed(why) if why.contains("not a working set")));
        assert_eq!(told[2], Frame::Nothing);
        assert_eq!(told[3..5], [Frame::Done(Vec::new()), Frame::Done(set.encode())]);
        assert!(matches!(told[5], Frame::Failed(_)));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_broker_without_rights_does_nothing() {
        let asked = || vec![Frame::Read, Frame::Write(Vec::new()), Frame::Collapse(b"{}".to_vec())];
        assert!(answers(Rights::default(), asked()).iter().all(|told| *told == Frame::Nothing));
    }

    #[test]
    fn another_process_than_the_named_one_is_left_alone() {
        let qemu = std::process::Command::new("true").spawn().unwrap();
        let pid = qemu.id() as i32;
        drop(qemu.wait_with_output());
        let ours = Collapsing { pid: std::process::id() as i32, memory: Vec::new(), rate: None };
        let asked = Frame::Collapse(serde_json::to_vec(&ours).unwrap());
        // That one has ended, of which there is nothing to tell.
        let told = answers(Rights { qemu: Some(pid), ..Rights::default() }, vec![asked]);
        assert_eq!(told, [Frame::Done(b"null".to_vec())]);
    }
}
