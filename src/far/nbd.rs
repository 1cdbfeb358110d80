//! Files of a repository as disks that QEMU reads: an NBD server on a Unix socket, read only.
//!
//! The protocol is that of NetworkBlockDevice's `doc/proto.md`: fixed newstyle negotiation, simple or
//! structured replies, and the metadata context `base:allocation`, by which holes need not be read. What
//! can't be fetched at present is waited for: a guest must not see an error that will pass.

use std::collections::HashMap;
use std::fs::DirBuilder;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::file::FarFile;
use super::watch::Watch;
use crate::cancel::Cancellation;

/// Requests of one connection that are answered at once.
const AT_ONCE: usize = 8;
/// The longest read, as the protocol asks servers to allow.
const MAX_READ: u32 = 32 << 20;
/// The longest option of a client's.
const MAX_OPTION: u32 = 64 << 10;
/// How long to wait before what failed is tried again.
const TRY_AGAIN: Duration = Duration::from_millis(500);

const MAGIC: u64 = 0x4e42_444d_4147_4943;
const I_HAVE_OPT: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
const REQUEST: u32 = 0x2560_9513;
const SIMPLE_REPLY: u32 = 0x6744_6698;
const STRUCTURED_REPLY: u32 = 0x668e_33ef;
/// NBD_FLAG_FIXED_NEWSTYLE and NBD_FLAG_NO_ZEROES.
const HANDSHAKE: u16 = 0b11;
/// NBD_FLAG_HAS_FLAGS, NBD_FLAG_READ_ONLY and NBD_FLAG_CAN_MULTI_CONN.
const TRANSMISSION: u16 = 1 | 1 << 1 | 1 << 8;

const OPT_ABORT: u32 = 2;
const OPT_INFO: u32 = 6;
const OPT_GO: u32 = 7;
const OPT_STRUCTURED: u32 = 8;
const OPT_LIST_META: u32 = 9;
const OPT_SET_META: u32 = 10;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const REP_META: u32 = 4;
const REP_UNSUPPORTED: u32 = 1 << 31 | 1;
const REP_INVALID: u32 = 1 << 31 | 3;
const REP_UNKNOWN: u32 = 1 << 31 | 6;

const CMD_READ: u16 = 0;
const CMD_DISCONNECT: u16 = 2;
const CMD_BLOCK_STATUS: u16 = 7;
const EPERM: u32 = 1;
const EIO: u32 = 5;
const EINVAL: u32 = 22;

/// The only metadata context, and its number.
const ALLOCATION: &[u8] = b"base:allocation";
const ALLOCATION_ID: u32 = 1;

/// Disks that are served by a socket. Dropping it ends that.
pub struct Exports {
    socket: PathBuf,
    cancel: Cancellation,
    thread: Option<JoinHandle<()>>,
}

/// What every connection needs.
struct Served {
    files: HashMap<String, Arc<FarFile>>,
    watch: Arc<Watch>,
    /// How long a read that fails is tried again, unless it is the store that does not answer.
    patience: Duration,
    cancel: Cancellation,
}

impl Exports {
    /// Serves these files, by their names, on a new socket, or in the place of a process that has died on
    /// this one: who reads them connects again.
    ///
    /// # Errors
    /// When the socket can't be made.
    pub fn start(
        files: HashMap<String, Arc<FarFile>>,
        watch: Arc<Watch>,
        patience: Duration,
        inherited: Option<PathBuf>,
    ) -> io::Result<Exports> {
        let socket = match inherited {
            Some(socket) => {
                let _ = std::fs::remove_file(&socket);
                socket
            }
            None => {
                // What is served is a secret: nobody else gets into the directory.
                let name = format!("snapback-disks-{}", Uuid::new_v4().simple());
                let directory = std::env::temp_dir().join(name);
                DirBuilder::new().mode(0o700).create(&directory)?;
                directory.join("nbd.sock")
            }
        };
        let listener = UnixListener::bind(&socket).inspect_err(|_| {
            let _ = socket.parent().map(std::fs::remove_dir);
        })?;
        let cancel = Cancellation::new();
        let served = Arc::new(Served { files, watch, patience, cancel: cancel.clone() });
        let accept = move || {
            for connection in listener.incoming() {
                let served = Arc::clone(&served);
                if served.cancel.is_requested() {
                    return;
                }
                let Ok(connection) = connection else { return };
                let serve = move || {
                    if let Err(error) = served.serve(&connection) {
                        tracing::debug!("a client of a disk: {error}");
                    }
                };
                let _ = std::thread::Builder::new().name("disk".into()).spawn(serve);
            }
        };
        let thread = std::thread::Builder::new().name("disks".into()).spawn(accept)?;
        Ok(Exports { socket, cancel, thread: Some(thread) })
    }

    /// The socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }
}

impl Drop for Exports {
    fn drop(&mut self) {
        self.cancel.request();
        // Wakes the thread that accepts.
        let _ = UnixStream::connect(&self.socket);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        let _ = std::fs::remove_file(&self.socket);
        let _ = self.socket.parent().map(std::fs::remove_dir);
    }
}

/// What was agreed on with a client.
struct Agreed<'a> {
    file: &'a Arc<FarFile>,
    structured: bool,
    allocation: bool,
}

/// A request of a client.
struct Request {
    kind: u16,
    cookie: u64,
    offset: u64,
    len: u32,
}

impl Served {
    fn serve(&self, connection: &UnixStream) -> io::Result<()> {
        let Some(agreed) = self.negotiate(connection)? else { return Ok(()) };
        let (send, receive) = crossbeam_channel::bounded::<Request>(AT_ONCE);
        let writer = Mutex::new(connection);
        std::thread::scope(|scope| {
            for _ in 0..AT_ONCE {
                let (receive, writer, agreed) = (receive.clone(), &writer, &agreed);
                scope.spawn(move || {
                    for request in receive {
                        let reply = self.answer(agreed, &request);
                        // Held until all of the reply is written.
                        let mut to = writer.lock().unwrap_or_else(PoisonError::into_inner);
                        if to.write_all(&reply).is_err() {
                            // The thread that reads hears of it.
                            let _ = connection.shutdown(Shutdown::Both);
                        }
                    }
                });
            }
            drop(receive);
            let read = read_requests(connection, &send);
            drop(send);
            read
        })
    }

    /// Agrees on a file with the client; nothing if it takes its leave.
    fn negotiate(&self, mut peer: &UnixStream) -> io::Result<Option<Agreed<'_>>> {
        let mut hello = Vec::new();
        hello.extend(MAGIC.to_be_bytes());
        hello.extend(I_HAVE_OPT.to_be_bytes());
        hello.extend(HANDSHAKE.to_be_bytes());
        peer.write_all(&hello)?;
        let _flags: [u8; 4] = array(peer)?;
        let (mut structured, mut allocation) = (false, false);
        loop {
            let magic = u64::from_be_bytes(array(peer)?);
            let option = u32::from_be_bytes(array(peer)?);
            let len = u32::from_be_bytes(array(peer)?);
            if magic != I_HAVE_OPT || len > MAX_OPTION {
                return Err(io::ErrorKind::InvalidData.into());
            }
            let mut data = vec![0; len as usize];
            peer.read_exact(&mut data)?;
            let mut reply =
                |kind: u32, data: &[u8]| peer.write_all(&option_reply(option, kind, data));
            match option {
                OPT_ABORT => {
                    reply(REP_ACK, &[])?;
                    return Ok(None);
                }
                OPT_STRUCTURED => {
                    structured = true;
                    reply(REP_ACK, &[])?;
                }
                OPT_SET_META | OPT_LIST_META => {
                    let asked = data.windows(ALLOCATION.len()).any(|part| part == ALLOCATION);
                    if asked {
                        let context = [&ALLOCATION_ID.to_be_bytes()[..], ALLOCATION].concat();
                        reply(REP_META, &context)?;
                    }
                    allocation = asked && option == OPT_SET_META;
                    reply(REP_ACK, &[])?;
                }
                OPT_INFO | OPT_GO => {
                    let name = name_in(&data).ok_or(io::ErrorKind::InvalidData);
                    let Ok(name) = name else {
                        reply(REP_INVALID, &[])?;
                        continue;
                    };
                    let Some(file) = self.files.get(name) else {
                        reply(REP_UNKNOWN, &[])?;
                        continue;
                    };
                    let mut info = 0u16.to_be_bytes().to_vec();
                    info.extend(file.len().to_be_bytes());
                    info.extend(TRANSMISSION.to_be_bytes());
                    reply(REP_INFO, &info)?;
                    reply(REP_ACK, &[])?;
                    if option == OPT_GO {
                        return Ok(Some(Agreed { file, structured, allocation }));
                    }
                }
                _ => reply(REP_UNSUPPORTED, &[])?,
            }
        }
    }

    fn answer(&self, agreed: &Agreed<'_>, request: &Request) -> Vec<u8> {
        let Agreed { file, structured, allocation } = agreed;
        let Request { kind, cookie, offset, len } = *request;
        let fails = |error: u32| match structured {
            true => {
                // NBD_REPLY_TYPE_ERROR, without a message.
                let body = [&error.to_be_bytes()[..], &0u16.to_be_bytes()].concat();
                chunk(cookie, 1 << 15 | 1, &[&body])
            }
            false => simple(cookie, error, &[]),
        };
        let is_inside = offset.checked_add(u64::from(len)).is_some_and(|end| end <= file.len());
        match kind {
            CMD_READ if is_inside && len <= MAX_READ => {
                let mut bytes = vec![0; len as usize];
                match self.read(file, &mut bytes, offset) {
                    Err(_) => fails(EIO),
                    // NBD_REPLY_TYPE_OFFSET_DATA
                    Ok(()) if *structured => chunk(cookie, 1, &[&offset.to_be_bytes(), &bytes]),
                    Ok(()) => simple(cookie, 0, &bytes),
                }
            }
            CMD_BLOCK_STATUS if is_inside && len > 0 && *allocation => {
                // NBD_REPLY_TYPE_BLOCK_STATUS: one range, of one kind.
                let (count, is_hole) = file.allocation(offset, u64::from(len));
                // NBD_STATE_HOLE and NBD_STATE_ZERO
                let state: u32 = if is_hole { 0b11 } else { 0 };
                let count = (count as u32).to_be_bytes();
                chunk(cookie, 5, &[&ALLOCATION_ID.to_be_bytes(), &count, &state.to_be_bytes()])
            }
            CMD_READ | CMD_BLOCK_STATUS => fails(EINVAL),
            _ => fails(EPERM),
        }
    }

    /// Reads, and tries again what can't be fetched: for as long as it takes where the store does not
    /// answer, since a guest that sees an error of its disk is not mended by the store's coming back.
    fn read(&self, file: &FarFile, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        let began = Instant::now();
        loop {
            let Err(error) = file.read_at(bytes, offset) else { return Ok(()) };
            let is_late = began.elapsed() >= self.patience;
            let is_away = error.kind() == io::ErrorKind::HostUnreachable;
            if self.cancel.is_requested() || (is_late && !is_away) {
                return Err(error);
            }
            tracing::warn!("a disk waits: {}: {error}", file.name());
            if is_late {
                self.watch.give_up(error.to_string());
            }
            std::thread::sleep(TRY_AGAIN);
        }
    }
}

fn read_requests(
    mut peer: &UnixStream,
    send: &crossbeam_channel::Sender<Request>,
) -> io::Result<()> {
    loop {
        let mut header = [0; 28];
        match peer.read_exact(&mut header) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            read => read?,
        }
        let at = |from: usize| &header[from..];
        let (magic, kind) = (u32_at(at(0)), u16::from_be_bytes([header[6], header[7]]));
        let (cookie, offset, len) = (u64_at(at(8)), u64_at(at(16)), u32_at(at(24)));
        // What is written would follow a request: we have said that nothing can be.
        if magic != REQUEST || kind == 1 {
            return Err(io::ErrorKind::InvalidData.into());
        }
        if kind == CMD_DISCONNECT || send.send(Request { kind, cookie, offset, len }).is_err() {
            return Ok(());
        }
    }
}

/// The name in the data of NBD_OPT_INFO or NBD_OPT_GO.
fn name_in(data: &[u8]) -> Option<&str> {
    let (len, rest) = data.split_at_checked(4)?;
    std::str::from_utf8(rest.get(..u32_at(len) as usize)?).ok()
}

fn option_reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let len = data.len() as u32;
    [
        &OPTION_REPLY.to_be_bytes()[..],
        &option.to_be_bytes(),
        &kind.to_be_bytes(),
        &len.to_be_bytes(),
        data,
    ]
    .concat()
}

fn simple(cookie: u64, error: u32, data: &[u8]) -> Vec<u8> {
    let head = [SIMPLE_REPLY.to_be_bytes(), error.to_be_bytes()].concat();
    [&head[..], &cookie.to_be_bytes(), data].concat()
}

/// The only chunk of a structured reply.
fn chunk(cookie: u64, kind: u16, body: &[&[u8]]) -> Vec<u8> {
    /// NBD_REPLY_FLAG_DONE
    const DONE: u16 = 1;
    let len: usize = body.iter().map(|part| part.len()).sum();
    let mut reply = Vec::with_capacity(20 + len);
    reply.extend(STRUCTURED_REPLY.to_be_bytes());
    reply.extend(DONE.to_be_bytes());
    reply.extend(kind.to_be_bytes());
    reply.extend(cookie.to_be_bytes());
    reply.extend((len as u32).to_be_bytes());
    body.iter().for_each(|part| reply.extend(*part));
    reply
}

fn array<const N: usize>(mut peer: &UnixStream) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    peer.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn u32_at(bytes: &[u8]) -> u32 {
    u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

fn u64_at(bytes: &[u8]) -> u64 {
    u64::from(u32_at(bytes)) << 32 | u64::from(u32_at(&bytes[4..]))
}
