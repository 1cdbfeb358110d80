//! The writer's threads. They turn groups of pages into an image's data region and its
//! chunk table.
//!
//! ```text
//! caller ─▶ packing threads (deduplicate, checksum, compress) ─▶ writing thread ─▶ file
//!    ▲                                                                │
//!    └─────────────────────────── buffers ◀───────────────────────────┘
//! ```
//!
//! A buffer returns together with where the pages in it are stored.
//!
//! The number of buffers is fixed: it bounds the memory in use, and a free buffer is the
//! only thing that the caller ever waits for. A thread that ends, for whatever reason,
//! closes its channels: its neighbours end too, and the caller gets the error.

use std::fs::File;
use std::io::{self, IoSlice};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};

use crate::cancel::Cancellation;
use crate::image::format::error::ImageError;
use crate::image::format::layout::{ChunkEntry, SUPERBLOCK_BYTES};
use crate::image::write::options::CacheUse;
use crate::image::write::pack::{Buffer, Job, NewChunk, Packed, Packer, Packing, Returned, Stored};
use crate::image::write::sink::Sink;

/// Bytes that one write gathers, if that many are waiting.
const WRITE_BYTES: usize = 1 << 20;
/// Chunks that one write gathers at most; `IOV_MAX` is 1024 (writev(2)).
const WRITE_CHUNKS: usize = 512;

/// What the caller and the threads share.
#[derive(Default)]
struct Shared {
    /// Requested by the caller, or by a thread that has failed.
    stop: Cancellation,
    /// Why a thread has failed.
    failure: Mutex<Option<io::Error>>,
    /// Bytes written to the data region.
    written: AtomicU64,
}

/// The threads, and the buffers that circulate between them and the caller.
pub(in crate::image) struct Pipeline {
    path: PathBuf,
    shared: Arc<Shared>,
    /// Dropped once no more jobs come.
    jobs: Option<Sender<Job>>,
    packers: Vec<JoinHandle<()>>,
    /// Gives the chunk table, and the sink behind the data region.
    writer: Option<JoinHandle<(Vec<ChunkEntry>, Sink)>>,
    /// Buffers come back here.
    returned: Receiver<Returned>,
    /// Buffers that came back without having been used.
    spare: Vec<Buffer>,
    chunk_bytes: usize,
    /// Buffers made so far, and how many there may be.
    made: usize,
    limit: usize,
    stalled: Duration,
}

impl Pipeline {
    /// Starts the threads, `workers` that pack and one that writes, at `bandwidth` bytes
    /// a second at most. `limit` is the number of buffers.
    pub fn start(
        file: &File,
        path: &Path,
        packing: Packing,
        workers: usize,
        limit: usize,
        (bandwidth, cache): (Option<u64>, CacheUse),
    ) -> Result<Pipeline, ImageError> {
        // No channel is ever full: each has room for all the buffers there are.
        let (jobs, job_queue) = bounded::<Job>(limit);
        let (packed, packed_queue) = bounded::<Packed>(limit + workers);
        let (give_back, returned) = bounded::<Returned>(limit + workers);
        let mut pipeline = Pipeline {
            path: path.to_owned(),
            shared: Arc::default(),
            jobs: Some(jobs),
            packers: Vec::with_capacity(workers),
            writer: None,
            returned,
            spare: Vec::new(),
            chunk_bytes: packing.chunk_bytes,
            made: 0,
            limit,
            stalled: Duration::ZERO,
        };
        let packing = Arc::new(packing);
        let packers: Vec<_> =
            (0..workers).map(|_| Packer::new(&packing, path)).collect::<Result<_, _>>()?;
        let sink = |file: File, stop: &Cancellation| {
            Sink::new(file, SUPERBLOCK_BYTES as u64, bandwidth, cache, stop.clone())
        };
        let sink = file.try_clone().map(|file| sink(file, &pipeline.shared.stop));
        sink.and_then(|sink| {
            pipeline.spawn(sink, packers, job_queue, packed, packed_queue, give_back)
        })
        .map_err(|error| ImageError::io("start the threads to write", path, error))?;
        Ok(pipeline)
    }

    /// Starts the threads. It owns the ends of the channels: when a thread can't be started,
    /// they are closed before the threads that did start are joined.
    fn spawn(
        &mut self,
        sink: Sink,
        packers: Vec<Packer>,
        job_queue: Receiver<Job>,
        packed: Sender<Packed>,
        packed_queue: Receiver<Packed>,
        give_back: Sender<Returned>,
    ) -> io::Result<()> {
        let shared = Arc::clone(&self.shared);
        let thread = thread::Builder::new().name("image-write".into());
        self.writer =
            Some(thread.spawn(move || write_chunks(sink, &packed_queue, &give_back, &shared))?);
        for mut packer in packers {
            let (job_queue, packed) = (job_queue.clone(), packed.clone());
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

    /// Returns the threads' error, if they have failed or were cancelled.
    pub fn check(&self) -> Result<(), ImageError> {
        if self.shared.stop.is_requested() { Err(self.failure()) } else { Ok(()) }
    }

    /// A buffer for a group, and where the pages that it held before are stored. Waits while
    /// all buffers are in use: the caller must hold fewer than there are.
    pub fn buffer(&mut self) -> Result<(Buffer, Option<Stored>), ImageError> {
        if let Some(buffer) = self.spare.pop() {
            return Ok((buffer, None));
        }
        let returned = match self.returned.try_recv() {
            Ok(returned) => returned,
            Err(_) if self.made < self.limit => {
                self.made += 1;
                return Ok((vec![0; self.chunk_bytes].into(), None));
            }
            Err(_) => {
                let start = Instant::now();
                let returned = self.returned.recv();
                self.stalled += start.elapsed();
                returned.map_err(|_| self.failure())?
            }
        };
        Ok((returned.buffer, Some(returned.stored)))
    }

    /// Takes back a buffer without pages to store.
    pub fn give_back(&mut self, buffer: Buffer) {
        self.spare.push(buffer);
    }

    /// Hands a job to the packing threads.
    pub fn submit(&mut self, job: Job) -> Result<(), ImageError> {
        let sent = self.jobs.as_ref().is_some_and(|jobs| jobs.send(job).is_ok());
        if sent { Ok(()) } else { Err(self.failure()) }
    }

    /// Buffers that can be had without waiting.
    pub fn free_buffers(&self) -> usize {
        self.limit - self.made + self.returned.len() + self.spare.len()
    }

    /// Bytes in buffers that hold pages now.
    pub fn buffered_bytes(&self) -> usize {
        (self.made - self.returned.len() - self.spare.len()) * self.chunk_bytes
    }

    /// Bytes written to the data region so far.
    pub fn written_bytes(&self) -> u64 {
        self.shared.written.load(Ordering::Relaxed)
    }

    /// Ends all writing when it is requested, from any thread.
    pub fn cancellation(&self) -> Cancellation {
        self.shared.stop.clone()
    }

    /// Time that was spent waiting for buffers.
    pub fn stalled(&self) -> Duration {
        self.stalled
    }

    /// Waits until all is written. Returns the chunk table, and the sink, which stands behind
    /// the last chunk. `on_stored` is told where the pages are stored that were still on their
    /// way.
    pub fn finish(
        mut self,
        on_stored: impl FnMut(Stored),
    ) -> Result<(Vec<ChunkEntry>, Sink), ImageError> {
        let written = self.join();
        self.check()?;
        self.returned.try_iter().map(|returned| returned.stored).for_each(on_stored);
        written.ok_or_else(|| self.failure())
    }

    /// Ends the threads. `None` if one of them panicked.
    fn join(&mut self) -> Option<(Vec<ChunkEntry>, Sink)> {
        self.jobs = None;
        let mut whole = true;
        for packer in self.packers.drain(..) {
            whole &= packer.join().is_ok();
        }
        let written = self.writer.take()?.join().ok();
        if whole { written } else { None }
    }

    /// The threads' error, the same each time.
    fn failure(&self) -> ImageError {
        match &*self.shared.failure.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(error) => ImageError::io("write", &self.path, same_error(error)),
            None if self.shared.stop.is_requested() => ImageError::Interrupted(self.path.clone()),
            None => ImageError::ThreadLost(self.path.clone()),
        }
    }
}

impl Drop for Pipeline {
    fn drop(&mut self) {
        // `finish` has taken the writing thread; without it, writing was abandoned.
        if self.writer.is_some() {
            self.shared.stop.request();
            self.join();
        }
    }
}

/// `io::Error` can't be cloned.
fn same_error(error: &io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(code) => io::Error::from_raw_os_error(code),
        None => io::Error::new(error.kind(), error.to_string()),
    }
}

/// The writing thread: appends chunks in the order in which they become ready.
fn write_chunks(
    mut sink: Sink,
    queue: &Receiver<Packed>,
    give_back: &Sender<Returned>,
    shared: &Shared,
) -> (Vec<ChunkEntry>, Sink) {
    let mut table = Vec::new();
    let enough = sink.piece(WRITE_BYTES);
    let mut batch: Vec<NewChunk> = Vec::with_capacity(WRITE_CHUNKS);
    while let Ok(first) = queue.recv() {
        let mut bytes = 0;
        let mut next = Some(first);
        while let Some(packed) = next {
            match packed {
                Packed::New(chunk) => {
                    bytes += chunk.entry.stored_len as usize;
                    batch.push(chunk);
                }
                // Sending fails only when the caller is gone, and then needs no buffer.
                Packed::Known(returned) => drop(give_back.send(returned)),
            }
            let more = bytes < enough && batch.len() < WRITE_CHUNKS;
            next = if more { queue.try_recv().ok() } else { None };
        }
        if shared.stop.is_requested() {
            break;
        }
        let mut slices: Vec<IoSlice<'_>> = batch
            .iter()
            .map(|chunk| IoSlice::new(&chunk.buffer[..chunk.entry.stored_len as usize]))
            .collect();
        let mut offset = sink.at();
        if let Err(error) = sink.write_slices(&mut slices) {
            // Cancelled meanwhile: the caller knows the reason.
            if shared.stop.is_requested() {
                break;
            }
            *shared.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
            shared.stop.request();
            break;
        }
        for NewChunk { mut entry, buffer, stored } in batch.drain(..) {
            entry.offset = offset;
            offset += u64::from(entry.stored_len);
            let number = stored.chunk as usize;
            if table.len() <= number {
                table.resize(number + 1, ChunkEntry::default());
            }
            table[number] = entry;
            // As above.
            drop(give_back.send(Returned { buffer, stored }));
        }
        shared.written.store(sink.at() - SUPERBLOCK_BYTES as u64, Ordering::Relaxed);
    }
    (table, sink)
}
