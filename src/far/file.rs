//! A file of a repository, read as if it were here: what is missing is fetched.

use std::collections::{HashMap, HashSet};
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use quick_cache::Weighter;
use quick_cache::sync::Cache as Recent;

use super::cache::Cache;
use super::fetch::Fetchers;
use super::latency::Latency;
use super::watch::Watch;
use crate::repository::{Extent, Fetched, FileMap, Inline, Repository, RepositoryError};

/// Bytes of extents that are kept in memory, opened: what is read a little at a time is opened once.
const IN_MEMORY: u64 = 64 << 20;
/// What is fetched with an extent that somebody waits for, as it is stored: its neighbours, which come
/// in the same request.
const AROUND: u64 = 512 << 10;
/// What one request fetches that was asked for ahead.
const AHEAD: u64 = 1 << 20;
/// How many extents are looked for to estimate how many are here.
const SAMPLE: usize = 256;

/// What all files of a snapshot have in common.
pub struct Origin {
    pub repository: Repository,
    pub cache: Cache,
    pub fetchers: Fetchers,
    pub latency: Latency,
    pub watch: Arc<Watch>,
    /// Bytes that were fetched.
    pub fetched: AtomicU64,
}

/// A file of a repository.
pub struct FarFile {
    shared: Arc<Shared>,
}

struct Shared {
    name: String,
    origin: Arc<Origin>,
    map: FileMap,
    recent: Recent<usize, Bytes, ByLength>,
    under_way: Mutex<HashMap<usize, UnderWay>>,
}

#[derive(Clone)]
struct ByLength;

impl Weighter<usize, Bytes> for ByLength {
    fn weight(&self, _: &usize, bytes: &Bytes) -> u64 {
        bytes.len() as u64 + 64
    }
}

/// An extent that is being fetched.
#[derive(Default)]
struct UnderWay {
    /// Requests for it that are not answered.
    requests: usize,
    /// Who waits for it.
    waiting: usize,
    /// It is there, for those who wait.
    bytes: Option<Bytes>,
    /// Why it can't be had, if the last request has failed.
    failed: Option<Failed>,
    /// Wakes who waits for it, and nobody else: some dozen threads wait at a time, and thousands of extents
    /// arrive in a second.
    arrived: Arc<Condvar>,
}

/// Why an extent can't be had.
#[derive(Clone)]
struct Failed {
    /// [`HostUnreachable`](io::ErrorKind::HostUnreachable) where the store does not answer or refuses.
    kind: io::ErrorKind,
    problem: String,
}

impl From<RepositoryError> for Failed {
    fn from(error: RepositoryError) -> Failed {
        let kind = match &error {
            RepositoryError::Store(_) => io::ErrorKind::HostUnreachable,
            _ => io::ErrorKind::InvalidData,
        };
        Failed { kind, problem: error.to_string() }
    }
}

impl FarFile {
    /// A file that consists of this. `name` is what errors call it.
    pub fn new(name: String, origin: Arc<Origin>, map: FileMap) -> FarFile {
        let extents = map.extents.len().max(16);
        let recent = Recent::with_weighter(extents.min(4096), IN_MEMORY, ByLength);
        let under_way = Mutex::default();
        let shared = Shared { name, origin, map, recent, under_way };
        FarFile { shared: Arc::new(shared) }
    }

    /// What errors call it.
    pub fn name(&self) -> &str {
        &self.shared.name
    }

    /// Its length in bytes.
    pub fn len(&self) -> u64 {
        self.shared.map.len
    }

    /// Fills `buffer` with the bytes from `position` on. Waits for what has to be fetched.
    ///
    /// # Errors
    /// When that can't be had, or lies beyond the end; of kind [`HostUnreachable`](io::ErrorKind::HostUnreachable) where
    /// the store does not answer, or refuses.
    pub fn read_at(&self, buffer: &mut [u8], position: u64) -> io::Result<()> {
        let Shared { map, .. } = &*self.shared;
        let end = position.checked_add(buffer.len() as u64).filter(|end| *end <= map.len);
        let end = end.ok_or(io::ErrorKind::UnexpectedEof)?;
        // Whatever neither an extent nor an inline part covers.
        buffer.fill(0);
        for part in &map.inline {
            copy(buffer, position, &part.bytes, part.offset);
        }
        for number in map.extents_in(position..end) {
            let bytes = self.shared.extent(number)?;
            copy(buffer, position, &bytes, map.extents[number].offset);
        }
        Ok(())
    }

    /// How many bytes from `offset` on, `most` at most and one at least, are alike, and whether they are
    /// in a hole: zeros that are stored nowhere.
    pub fn allocation(&self, offset: u64, most: u64) -> (u64, bool) {
        let map = &self.shared.map;
        let limit = most.min(u64::from(u32::MAX) & !0xfff);
        let inside = |start: u64, end: u64| (start..end).contains(&offset).then_some(end);
        let next = map.extents.partition_point(|extent| extent.end() <= offset);
        let inline = |part: &Inline| (part.offset, part.offset + part.bytes.len() as u64);
        let stored = map.extents.get(next).map(|extent| (extent.offset, extent.end()));
        let parts = || stored.into_iter().chain(map.inline.iter().map(inline));
        if let Some(end) = parts().find_map(|(start, end)| inside(start, end)) {
            return ((end - offset).min(limit), false);
        }
        let next = parts().map(|(start, _)| start).filter(|start| *start > offset).min();
        (next.map_or(limit, |start| (start - offset).min(limit)), true)
    }

    /// About how many bytes of it are not in the cache, as they are stored: by a sample, so that a large
    /// file takes no longer than a small one.
    pub fn missing(&self) -> u64 {
        let Shared { map, origin, .. } = &*self.shared;
        let every = map.extents.len().div_ceil(SAMPLE).max(1);
        let (mut looked, mut missing) = (0, 0);
        for extent in map.extents.iter().step_by(every) {
            looked += 1;
            missing += u64::from(!origin.cache.has(&extent.id.to_string()));
        }
        (u128::from(map.stored()) * u128::from(missing) / u128::from(looked.max(1_u64))) as u64
    }

    /// Has these bytes fetched, in this order, unless they are here. Returns at once.
    pub fn will_read(&self, ranges: &[Range<u64>]) {
        let map = &self.shared.map;
        let mut seen = HashSet::new();
        let numbers = ranges.iter().flat_map(|range| map.extents_in(range.clone()));
        let (mut part, mut stored) = (Vec::new(), 0);
        for number in numbers.filter(|number| seen.insert(*number)) {
            stored += u64::from(map.extents[number].stored);
            part.push(number);
            if stored >= AHEAD {
                self.fetch_later(std::mem::take(&mut part));
                stored = 0;
            }
        }
        if !part.is_empty() {
            self.fetch_later(part);
        }
    }

    fn fetch_later(&self, wanted: Vec<usize>) {
        let shared = Arc::clone(&self.shared);
        self.shared.origin.fetchers.later(move || {
            let mine = shared.begin(wanted);
            shared.fetch(&mine);
        });
    }
}

/// Copies what two ranges of a file have in common.
fn copy(to: &mut [u8], to_offset: u64, from: &[u8], from_offset: u64) {
    let start = to_offset.max(from_offset);
    let end = (to_offset + to.len() as u64).min(from_offset + from.len() as u64);
    if start < end {
        let (to_at, from_at) = ((start - to_offset) as usize, (start - from_offset) as usize);
        let len = (end - start) as usize;
        to[to_at..to_at + len].copy_from_slice(&from[from_at..from_at + len]);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, HashMap<usize, UnderWay>> {
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The bytes of an extent, fetched if they have to be.
    fn extent(self: &Arc<Shared>, number: usize) -> io::Result<Bytes> {
        if let Some(bytes) = self.recent.get(&number) {
            return Ok(bytes);
        }
        let mut under_way = self.lock();
        // It may have arrived in between.
        if let Some(bytes) = self.recent.get(&number) {
            return Ok(bytes);
        }
        let is_under_way = under_way.contains_key(&number);
        under_way.entry(number).or_default().waiting += 1;
        drop(under_way);
        if !is_under_way {
            match self.cached(number) {
                Some(bytes) => self.settle(number, 0, Ok(bytes)),
                None => self.request(number, true),
            }
        }
        self.wait(number)
    }

    /// Waits for an extent. A request that takes unusually long gets a second one beside it.
    fn wait(self: &Arc<Shared>, number: usize) -> io::Result<Bytes> {
        let began = Instant::now();
        let mut hedged = false;
        let mut under_way = self.lock();
        loop {
            let Some(entry) = under_way.get_mut(&number) else {
                return Err(io::Error::other("it was given up"));
            };
            let found = entry.bytes.clone().map(Ok).or_else(|| {
                let failed = entry.failed.clone().filter(|_| entry.requests == 0);
                failed.map(|Failed { kind, problem }| Err(io::Error::new(kind, problem)))
            });
            if let Some(found) = found {
                entry.waiting -= 1;
                if entry.waiting == 0 && entry.requests == 0 {
                    under_way.remove(&number);
                }
                return found;
            }
            let arrived = Arc::clone(&entry.arrived);
            let slow = self.origin.latency.slow().filter(|_| !hedged);
            match slow.map(|slow| slow.saturating_sub(began.elapsed())) {
                Some(Duration::ZERO) => {
                    hedged = true;
                    drop(under_way);
                    self.request(number, false);
                    under_way = self.lock();
                }
                Some(left) => {
                    let waited = arrived.wait_timeout(under_way, left);
                    under_way = waited.unwrap_or_else(PoisonError::into_inner).0;
                }
                None => {
                    under_way = arrived.wait(under_way).unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }

    /// Asks for an extent that somebody waits for, with what lies behind it in the same pack if it is to
    /// come in `company`.
    fn request(self: &Arc<Shared>, number: usize, company: bool) {
        let wanted = if company { self.around(number) } else { vec![number] };
        self.lock().entry(number).or_default().requests += 1;
        let others = wanted.into_iter().filter(|other| *other != number).collect();
        let mut mine = vec![number];
        mine.extend(self.begin(others));
        let shared = Arc::clone(self);
        self.origin.fetchers.urgent(move || shared.fetch(&mine));
    }

    /// The extents that come in the same request as this one.
    fn around(&self, number: usize) -> Vec<usize> {
        let extents = &self.map.extents;
        let mut stored = 0;
        let goes_on = |(at, extent): &(usize, &Extent)| {
            stored += u64::from(extent.stored);
            let before = &extents[at.saturating_sub(1)];
            let beside = before.at.checked_add(before.stored) == Some(extent.at);
            *at == number || (extent.pack == extents[number].pack && beside && stored <= AROUND)
        };
        extents.iter().enumerate().skip(number).take_while(goes_on).map(|(at, _)| at).collect()
    }

    /// Of these extents, those that are neither here nor under way. They are, from now on.
    fn begin(&self, wanted: Vec<usize>) -> Vec<usize> {
        let is_here = |number: &usize| {
            self.recent.peek(number).is_some()
                || self.origin.cache.has(&self.map.extents[*number].id.to_string())
        };
        // The disk is asked before the lock is taken.
        let mut mine: Vec<usize> = wanted.into_iter().filter(|number| !is_here(number)).collect();
        let mut under_way = self.lock();
        mine.retain(|number| match under_way.contains_key(number) {
            true => false,
            false => {
                under_way.insert(*number, UnderWay { requests: 1, ..UnderWay::default() });
                true
            }
        });
        mine
    }

    /// An extent that was fetched earlier.
    fn cached(&self, number: usize) -> Option<Bytes> {
        let extent = &self.map.extents[number];
        let name = extent.id.to_string();
        let stored = self.origin.cache.find(&name)?;
        match self.origin.repository.open_extent(extent, &stored) {
            Ok(bytes) => Some(bytes),
            Err(error) => {
                tracing::warn!("fetched again, as what was kept is damaged: {error}");
                self.origin.cache.remove(&name);
                None
            }
        }
    }

    /// Fetches extents that are under way, for this request among others.
    fn fetch(&self, numbers: &[usize]) {
        if numbers.is_empty() {
            return;
        }
        let began = Instant::now();
        let Origin { repository, cache, latency, watch, fetched, .. } = &*self.origin;
        let extents: Vec<Extent> = numbers.iter().map(|number| self.map.extents[*number]).collect();
        match repository.fetch_extents(&extents) {
            Ok(all) => {
                latency.note(began.elapsed());
                watch.answers();
                let mut right = Vec::with_capacity(all.len());
                for ((number, extent), Fetched { stored, bytes }) in
                    numbers.iter().zip(&extents).zip(all)
                {
                    fetched.fetch_add(stored.len() as u64, Ordering::Relaxed);
                    if bytes.is_ok() {
                        right.push((extent.id.to_string(), stored));
                    }
                    self.settle(*number, 1, bytes.map_err(Failed::from));
                }
                // Behind all of them: nobody waits for the cache's disk.
                right.iter().for_each(|(name, stored)| cache.keep(name, stored));
            }
            Err(error) => {
                let failed = Failed::from(error);
                if failed.kind == io::ErrorKind::HostUnreachable {
                    watch.fails(failed.problem.clone());
                }
                numbers.iter().for_each(|number| self.settle(*number, 1, Err(failed.clone())));
            }
        }
    }

    /// An extent is there, or can't be had. So many requests for it are answered by that.
    fn settle(&self, number: usize, answered: usize, answer: Result<Bytes, Failed>) {
        let mut under_way = self.lock();
        if let Ok(bytes) = &answer {
            // Before anybody can find it no longer under way.
            self.recent.insert(number, bytes.clone());
        }
        if let Some(entry) = under_way.get_mut(&number) {
            entry.requests = entry.requests.saturating_sub(answered);
            match answer {
                Ok(bytes) => entry.bytes = Some(bytes),
                Err(failed) => entry.failed = Some(failed),
            }
            match entry.waiting {
                0 if entry.requests == 0 => drop(under_way.remove(&number)),
                0 => {}
                _ => entry.arrived.notify_all(),
            }
        }
    }
}
