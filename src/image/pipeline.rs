//! The writer's threads: chunks go in, a file's data region and its chunk table
//! come out.
//!
//! ```text
//! caller ─▶ packing threads (checksum, compress) ─▶ writing thread ─▶ file
//!    ▲                                                    │
//!    └───────────────────── buffers ◀─────────────────────┘
//! ```
//!
//! A fixed number of buffers goes round: that is the memory bound, and the only
//! thing that the caller ever waits for. A thread that ends for whatever reason
//! closes its channels, so its neighbours end too and the caller gets the error.

use std::fs::File;
use std::io::{self, IoSlice};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use nix::errno::Errno;
use nix::sys::uio::pwritev;
use xxhash_rust::xxh3::xxh3_64;

use super::error::ImageError;
use super::layout::{ChunkEntry, Codec, SUPERBLOCK_BYTES};
use super::writer::Compression;
use crate::page::PAGE_SIZE;

/// Bytes that one write gathers, if that many are waiting.
const WRITE_BYTES: usize = 1 << 20;
/// Chunks that one write gathers at most; `IOV_MAX` is 1024 (writev(2)).
const WRITE_CHUNKS: usize = 512;

/// Room for one chunk.
pub(super) type Buffer = Box<[u8]>;

/// A chunk to be stored.
pub(super) struct Job {
    /// Its number.
    pub chunk: u64,
    /// Which pages of the buffer belong to it; they are packed in order.
    pub mask: u64,
    /// One aligned group's pages, each in its place.
    pub buffer: Buffer,
}

/// A chunk ready to be written: the entry lacks only its offset.
struct Packed {
    chunk: u64,
    entry: ChunkEntry,
    buffer: Buffer,
}

/// What the caller and the threads share.
#[derive(Default)]
struct Shared {
    /// The threads have failed, or shall stop.
    stop: AtomicBool,
    /// Why they have failed.
    failure: Mutex<Option<io::Error>>,
    /// Bytes written to the data region.
    written: AtomicU64,
}

/// The threads and the buffers that go round between them and the caller.
pub(super) struct Pipeline {
    path: PathBuf,
    shared: Arc<Shared>,
    /// Gone once no more chunks come.
    jobs: Option<Sender<Job>>,
    packers: Vec<JoinHandle<()>>,
    /// Gives the chunk table and the end of the data region.
    writer: Option<JoinHandle<(Vec<ChunkEntry>, u64)>>,
    /// Buffers come back here.
    returned: Receiver<Buffer>,
    /// Buffers that came back without having been used.
    spare: Vec<Buffer>,
    chunk_bytes: usize,
    /// Buffers made so far, and how many there may be.
    made: usize,
    limit: usize,
    stalled: Duration,
}

impl Pipeline {
    /// Starts the threads. `limit` is the number of buffers.
    pub fn start(
        file: &File,
        path: &Path,
        compression: Compression,
        workers: usize,
        chunk_bytes: usize,
        limit: usize,
    ) -> Result<Pipeline, ImageError> {
        // No channel is ever full: each has room for all the buffers there are.
        let (jobs, job_queue) = bounded::<Job>(limit);
        let (packed, packed_queue) = bounded::<Packed>(limit + workers);
        let (give_back, returned) = bounded::<Buffer>(limit + workers);
        let mut pipeline = Pipeline {
            path: path.to_owned(),
            shared: Arc::default(),
            jobs: Some(jobs),
            packers: Vec::with_capacity(workers),
            writer: None,
            returned,
            spare: Vec::new(),
            chunk_bytes,
            made: 0,
            limit,
            stalled: Duration::ZERO,
        };
        let packers = (0..workers).map(|_| Packer::new(compression, chunk_bytes));
        pipeline
            .spawn(file, packers, job_queue, packed, packed_queue, give_back)
            .map_err(|error| ImageError::io("start the threads to write", path, error))?;
        Ok(pipeline)
    }

    /// Starts the threads. It owns the channels' ends, so that a failure halfway
    /// closes them before the threads that did start are waited for.
    fn spawn(
        &mut self,
        file: &File,
        packers: impl Iterator<Item = io::Result<Packer>>,
        job_queue: Receiver<Job>,
        packed: Sender<Packed>,
        packed_queue: Receiver<Packed>,
        give_back: Sender<Buffer>,
    ) -> io::Result<()> {
        let (file, shared) = (file.try_clone()?, Arc::clone(&self.shared));
        let thread = thread::Builder::new().name("image-write".into());
        self.writer =
            Some(thread.spawn(move || write_chunks(&file, &packed_queue, &give_back, &shared))?);
        for packer in packers {
            let (mut packer, job_queue, packed) = (packer?, job_queue.clone(), packed.clone());
            let thread = thread::Builder::new().name("image-pack".into());
            self.packers.push(thread.spawn(move || {
                for job in job_queue {
                    if packed.send(packer.pack(job)).is_err() {
                        break;
                    }
                }
            })?);
        }
        Ok(())
    }

    /// Passes on an error of the threads, if there is one.
    pub fn check(&self) -> Result<(), ImageError> {
        if self.shared.stop.load(Ordering::Relaxed) { Err(self.failure()) } else { Ok(()) }
    }

    /// A buffer for a chunk. Waits while all of them are on their way to disk;
    /// so the caller must hold fewer than there are.
    pub fn buffer(&mut self) -> Result<Buffer, ImageError> {
        if let Some(buffer) = self.spare.pop() {
            return Ok(buffer);
        }
        if let Ok(buffer) = self.returned.try_recv() {
            return Ok(buffer);
        }
        if self.made < self.limit {
            self.made += 1;
            return Ok(vec![0; self.chunk_bytes].into());
        }
        let start = Instant::now();
        let buffer = self.returned.recv();
        self.stalled += start.elapsed();
        buffer.map_err(|_| self.failure())
    }

    /// Takes back a buffer that was not used.
    pub fn give_back(&mut self, buffer: Buffer) {
        self.spare.push(buffer);
    }

    /// Sends a chunk on its way.
    pub fn submit(&mut self, job: Job) -> Result<(), ImageError> {
        let sent = self.jobs.as_ref().is_some_and(|jobs| jobs.send(job).is_ok());
        if sent { Ok(()) } else { Err(self.failure()) }
    }

    /// Bytes in buffers that hold pages now.
    pub fn buffered_bytes(&self) -> usize {
        (self.made - self.returned.len() - self.spare.len()) * self.chunk_bytes
    }

    /// Bytes written to the data region so far.
    pub fn written_bytes(&self) -> u64 {
        self.shared.written.load(Ordering::Relaxed)
    }

    /// Time that was spent waiting for buffers.
    pub fn stalled(&self) -> Duration {
        self.stalled
    }

    /// Waits until all is written. Gives the chunk table and the file offset
    /// behind the last chunk.
    pub fn finish(mut self) -> Result<(Vec<ChunkEntry>, u64), ImageError> {
        let written = self.join();
        self.check()?;
        written.ok_or_else(|| self.failure())
    }

    /// Ends the threads. `None` if one of them panicked.
    fn join(&mut self) -> Option<(Vec<ChunkEntry>, u64)> {
        self.jobs = None;
        let mut whole = true;
        for packer in self.packers.drain(..) {
            whole &= packer.join().is_ok();
        }
        let written = self.writer.take()?.join().ok();
        if whole { written } else { None }
    }

    /// The threads' error. Given again each time it is asked for.
    fn failure(&self) -> ImageError {
        match &*self.shared.failure.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(error) => ImageError::io("write", &self.path, same_error(error)),
            None => ImageError::ThreadLost(self.path.clone()),
        }
    }
}

impl Drop for Pipeline {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.join();
    }
}

/// `io::Error` can't be cloned.
fn same_error(error: &io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(code) => io::Error::from_raw_os_error(code),
        None => io::Error::new(error.kind(), error.to_string()),
    }
}

/// Packs, checksums and compresses chunks: one thread's share.
struct Packer {
    zstd: Option<zstd::bulk::Compressor<'static>>,
    /// Room for the compressed bytes, exchanged for the chunk's own buffer.
    scratch: Buffer,
}

impl Packer {
    fn new(compression: Compression, chunk_bytes: usize) -> io::Result<Packer> {
        Ok(match compression {
            Compression::None => Packer { zstd: None, scratch: Box::default() },
            Compression::Zstd(level) => Packer {
                zstd: Some(zstd::bulk::Compressor::new(level)?),
                scratch: vec![0; chunk_bytes].into(),
            },
        })
    }

    fn pack(&mut self, job: Job) -> Packed {
        let Job { chunk, mask, mut buffer } = job;
        let mut pages = 0;
        let mut rest = mask;
        while rest != 0 {
            let at = rest.trailing_zeros() as usize;
            if at != pages {
                buffer.copy_within(at * PAGE_SIZE..(at + 1) * PAGE_SIZE, pages * PAGE_SIZE);
            }
            pages += 1;
            rest &= rest - 1;
        }
        let len = pages * PAGE_SIZE;
        let mut entry = ChunkEntry {
            offset: 0,
            stored_len: len as u32,
            codec: Codec::Plain,
            pages: pages as u8,
            checksum: xxh3_64(&buffer[..len]),
        };
        if let Some(zstd) = &mut self.zstd {
            // Room for one byte less than there are: what does not get smaller
            // fails, and is stored as it is.
            let room = &mut self.scratch[..len - 1];
            if let Ok(packed_len) = zstd.compress_to_buffer(&buffer[..len], room) {
                entry.stored_len = packed_len as u32;
                entry.codec = Codec::Zstd;
                std::mem::swap(&mut buffer, &mut self.scratch);
            }
        }
        Packed { chunk, entry, buffer }
    }
}

/// The writing thread: appends chunks in the order in which they become ready.
fn write_chunks(
    file: &File,
    queue: &Receiver<Packed>,
    give_back: &Sender<Buffer>,
    shared: &Shared,
) -> (Vec<ChunkEntry>, u64) {
    let mut table = Vec::new();
    let mut end = SUPERBLOCK_BYTES as u64;
    let mut batch: Vec<Packed> = Vec::with_capacity(WRITE_CHUNKS);
    while let Ok(first) = queue.recv() {
        let mut bytes = first.entry.stored_len as usize;
        batch.push(first);
        while bytes < WRITE_BYTES && batch.len() < WRITE_CHUNKS {
            let Ok(next) = queue.try_recv() else { break };
            bytes += next.entry.stored_len as usize;
            batch.push(next);
        }
        if shared.stop.load(Ordering::Relaxed) {
            break;
        }
        let mut slices: Vec<IoSlice<'_>> = batch
            .iter()
            .map(|packed| IoSlice::new(&packed.buffer[..packed.entry.stored_len as usize]))
            .collect();
        if let Err(error) = write_all_at(file, &mut slices, end) {
            *shared.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
            shared.stop.store(true, Ordering::Relaxed);
            break;
        }
        for Packed { chunk, mut entry, buffer } in batch.drain(..) {
            entry.offset = end;
            end += u64::from(entry.stored_len);
            let number = chunk as usize;
            if table.len() <= number {
                table.resize(number + 1, ChunkEntry::default());
            }
            table[number] = entry;
            // It fails only when the caller is gone, who then needs no buffer.
            let _ = give_back.send(buffer);
        }
        shared.written.store(end - SUPERBLOCK_BYTES as u64, Ordering::Relaxed);
    }
    (table, end)
}

/// Writes all the slices, one behind the other.
fn write_all_at(file: &File, mut slices: &mut [IoSlice<'_>], mut at: u64) -> io::Result<()> {
    while !slices.is_empty() {
        match pwritev(file, slices, at as i64) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => {
                at += written as u64;
                IoSlice::advance_slices(&mut slices, written);
            }
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}
