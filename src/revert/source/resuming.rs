//! A source for a guest whose page server and keeper have died: all that it knows is what can be
//! seen of QEMU from outside.
//!
//! Faults come first: QEMU answers no QMP command while a virtual processor waits for memory with
//! QEMU's big lock held. Then it is given a new stream, and goes on with the postcopy by that.

use std::sync::Arc;

use super::direct::FaultThreads;
use super::event::PostcopyEvent;
use super::pings;
use super::transports::Transports;
use crate::host::procfs::{Mapping, Pagemap};
use crate::page::Block;
use crate::revert::error::PostcopyError;
use crate::revert::options::Placement;
use crate::transport::DirectTransport;
use crate::transport::search::Found;
use crate::wire::{ping, received_bitmap, resume};

/// Where an interrupted postcopy is taken up.
pub(in crate::revert) enum Interrupted {
    /// By userfaultfd: what was found in QEMU.
    Direct(Found),
    /// By the socket, and why. QEMU tells which pages it has.
    BySocket(String),
}

/// Serves the guest again. Returns the thread that takes faults, if there is one; nothing when
/// the source has ended.
pub(super) fn take_up(
    transports: &mut Transports,
    interrupted: Interrupted,
) -> Result<Option<Option<FaultThreads>>, PostcopyError> {
    match interrupted {
        Interrupted::Direct(found) => serve_directly(transports, found).map(Some),
        Interrupted::BySocket(reason) => serve_by_socket(transports, &reason),
    }
}

fn serve_directly(
    transports: &mut Transports,
    found: Found,
) -> Result<Option<FaultThreads>, PostcopyError> {
    found.present.iter().for_each(|run| transports.memory.found(*run));
    // SAFETY: `search::find` has found each address to be the block's in the process whose
    // userfaultfd this is.
    let direct = unsafe { DirectTransport::new(Arc::new(found.uffd), found.addresses) };
    transports.route.open_direct(direct);
    let faults = transports.serve_faults(true)?;
    let _ = transports.events.send(PostcopyEvent::TakenOver);
    transports.tell(Placement::Uffd, "every block was found again");
    transports.route.first().send(&resume()).map_err(|_| PostcopyError::HungUp)?;
    Ok(faults)
}

fn serve_by_socket(
    transports: &mut Transports,
    reason: &str,
) -> Result<Option<Option<FaultThreads>>, PostcopyError> {
    let send =
        |bytes: &[u8]| transports.route.first().send(bytes).map_err(|_| PostcopyError::HungUp);
    for block in transports.memory.blocks() {
        send(&received_bitmap(&block.name))?;
    }
    send(&ping(pings::TAKEN_OVER))?;
    if !transports.pongs.taken_in(pings::TAKEN_OVER) {
        return Ok(None);
    }
    // By the socket they would be installed a second time.
    let received = transports.memory.counts().present;
    let pid = transports.options.pid;
    if pid.and_then(|pid| pages_in(pid, transports.memory.blocks())) > Some(received) {
        return Err(PostcopyError::NotBySocket(reason.to_owned()));
    }
    transports.route.first().send(&resume()).map_err(|_| PostcopyError::HungUp)?;
    let _ = transports.events.send(PostcopyEvent::TakenOver);
    transports.tell(Placement::Socket, reason);
    Ok(Some(None))
}

/// How many pages process `pid` has of guest memory, where that can be seen.
fn pages_in(pid: i32, blocks: &[Block]) -> Option<u64> {
    let mut mappings = Mapping::registered_of(pid).ok()?;
    mappings.retain(|mapping| blocks.iter().any(|block| block.len == mapping.size()));
    let pagemap = Pagemap::open(pid).ok()?;
    let mut pages = 0;
    for mapping in &mappings {
        let page_size = mapping.page_size?;
        pagemap.present(mapping.range(), page_size, |_, count| pages += count).ok()?;
    }
    Some(pages)
}
