//! The thread that reads the return path and answers QEMU's requests for pages.

use std::io::ErrorKind;
use std::sync::{Arc, mpsc};
use std::time::Instant;

use tokio::sync::mpsc::UnboundedSender;

use super::event::{LastWord, PostcopyEvent};
use super::pings;
use super::unread::Unread;
use crate::keeper::Ledger;
use crate::memory::{Memory, MemoryError, Pager};
use crate::page::BlockId;
use crate::revert::error::PostcopyError;
use crate::wire::{ReturnPath, ReturnPathMessage, WireError};

pub(super) struct Requests {
    pub server: Pager,
    pub path: ReturnPath<Unread>,
    /// Where what a successor needs is noted.
    pub ledger: Option<Ledger>,
    pub memory: Arc<Memory>,
    pub events: UnboundedSender<PostcopyEvent>,
    pub pongs: mpsc::Sender<u32>,
}

impl Requests {
    pub fn run(mut self) {
        let _last = LastWord { events: self.events.clone(), doing: "answer QEMU's requests" };
        let last = match self.answer() {
            Ok(()) => PostcopyEvent::Finished(self.server.into_report()),
            Err(error) => PostcopyEvent::Failed(error),
        };
        let _ = self.events.send(last);
    }

    fn answer(&mut self) -> Result<(), PostcopyError> {
        let last = self.ledger.as_ref().and_then(Ledger::last_block);
        let last = last.filter(|index| *index < self.memory.blocks().len());
        let mut block = last.map(|index| BlockId(index as u16));
        while let Some(message) = self.path.next_message().map_err(hung_up)? {
            let heard = Instant::now();
            match message {
                ReturnPathMessage::RequestPages { block: name, offset, len } => {
                    if let Some(name) = name {
                        let found = self.find(&name, offset, len)?;
                        self.ledger.iter().for_each(|ledger| ledger.set_last_block(found.index()));
                        block = Some(found);
                    }
                    let block = block.ok_or_else(|| PostcopyError::Wire(nameless(offset)))?;
                    self.server.serve(block, offset, u64::from(len), heard)?;
                }
                ReturnPathMessage::Pong(value) => {
                    if value == pings::LOADED {
                        let _ = self.events.send(PostcopyEvent::Loaded);
                    }
                    let _ = self.pongs.send(value);
                }
                ReturnPathMessage::Shut(0) => return Ok(()),
                ReturnPathMessage::Shut(status) => return Err(PostcopyError::Refused(status)),
                ReturnPathMessage::Received { block, pages } => {
                    let block = self.find(&block, 0, 0)?;
                    self.memory.found_bits(block, &pages);
                }
                ReturnPathMessage::Resumed => {
                    let _ = self.events.send(PostcopyEvent::Reconnected);
                    self.path.input_mut().keep();
                }
                ReturnPathMessage::Other(_) => {}
            }
            // Only now: should we be killed before, our successor deals with it again.
            let dealt_with = self.path.at();
            self.path
                .input_mut()
                .consume(dealt_with)
                .map_err(|source| hung_up(WireError::Io { at: dealt_with, source }))?;
        }
        Err(PostcopyError::HungUp)
    }

    fn find(&self, name: &str, offset: u64, len: u32) -> Result<BlockId, MemoryError> {
        let found = self.memory.blocks().iter().position(|block| block.name == name);
        found.map(|index| BlockId(index as u16)).ok_or_else(|| MemoryError::NoSuchMemory {
            block: name.into(),
            offset,
            len: u64::from(len),
        })
    }
}

/// A QEMU that ends without having read all that we sent resets the connection.
fn hung_up(error: WireError) -> PostcopyError {
    match error {
        WireError::Io { source, .. } if source.kind() == ErrorKind::ConnectionReset => {
            PostcopyError::HungUp
        }
        other => other.into(),
    }
}

fn nameless(offset: u64) -> WireError {
    WireError::Malformed {
        at: 0,
        what: format!("a request for offset {offset:#x} of the block before, and there was none"),
    }
}
