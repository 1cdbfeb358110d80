//! The end of a revert, at which QEMU can't be held up: against a scripted socket.

use std::io::Write;
use std::os::unix::net::UnixStream as StdStream;
use std::sync::{Mutex, mpsc};

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

use super::*;
use crate::page::{Block, ChunkReader, Location, Page, PageSource, SourceError};

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
    finish(&qmp.await).await.unwrap();
}

#[tokio::test]
async fn a_save_that_has_begun_meanwhile_is_not_waited_for() {
    let qmp = scripted(|command| match command {
        "query-migrate" => vec![json!({"return": {"status": "active"}})],
        _ => vec![json!({"error": {"class": "GenericError", "desc": "there is a migration"}})],
    });
    let error = finish(&qmp.await).await.unwrap_err();
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

/// An image on a disk that has died: who reads waits, until `end` is closed.
struct DeadDisk {
    blocks: Vec<Block>,
    read: mpsc::Sender<()>,
    end: Mutex<mpsc::Receiver<()>>,
}

impl PageSource for DeadDisk {
    fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    fn chunk_pages(&self) -> usize {
        1
    }

    fn locate(&self, _: Page) -> Result<Location, SourceError> {
        self.read.send(()).unwrap();
        let _ = self.end.lock().unwrap().recv();
        Ok(Location::Zero)
    }

    fn reader(&self) -> Result<Box<dyn ChunkReader>, SourceError> {
        struct None;
        impl ChunkReader for None {
            fn read(&mut self, _: crate::page::ChunkId) -> Result<&[u8], SourceError> {
                unreachable!("all pages are zero")
            }
        }
        Ok(Box::new(None))
    }
}

#[test]
fn a_feed_that_hangs_in_a_read_is_not_waited_for() {
    let block = Block { name: "ram".into(), len: 4096, page_size: 4096 };
    let ((read, has_read), (end, ends)) = (mpsc::channel(), mpsc::channel());
    let disk = DeadDisk { blocks: vec![block], read, end: Mutex::new(ends) };
    let (ours, mut theirs) = StdStream::pair().unwrap();
    let prepared = Prepared::new(&[], &[], &disk.blocks);
    let options = FeedOptions { way: Way::Socket, ..FeedOptions::default() };
    let (feed, _steps) = Feed::start(prepared, Arc::new(disk), ours, options).unwrap();
    // REQ_PAGES_ID: what follows is 16 bytes; offset, length, the block's name.
    theirs.write_all(&[0, 3, 0, 16]).unwrap();
    theirs.write_all(&[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 16, 0, 3, b'r', b'a', b'm']).unwrap();
    has_read.recv().unwrap();
    abandon(Some(feed));
    drop(end);
}
