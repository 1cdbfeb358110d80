//! The memory under test: pages, each with a generation, each under a lock.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::SyncSender;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

use crate::content::{Difference, Generation, Kind, PAGE_WORDS, Recipe, Words, mix};

/// Locks over the pages: page `p` belongs to stripe `p % STRIPES`. Enough that
/// two writers seldom meet.
const STRIPES: u64 = 256;

/// The generations of a stripe's pages; page `p` is at `p / STRIPES`. To hold
/// them is to hold the pages.
type Stripe = Mutex<Vec<Generation>>;

/// A mapping full of pages that are known.
pub struct Region {
    /// Start of a private anonymous mapping of `pages` pages, never unmapped.
    memory: *mut Words,
    pages: u64,
    stripes: Vec<Stripe>,
    recipe: Recipe,
    counters: Counters,
    /// Takes a line on each bad page as long as somebody keeps up reading them.
    reports: SyncSender<String>,
}

/// What has been seen since boot.
#[derive(Default)]
pub struct Counters {
    /// Pages found as they should be.
    pub verified: AtomicU64,
    /// Pages found otherwise. A bad page is left as it is, and counts each time
    /// it is met.
    pub bad: AtomicU64,
    /// Pages given their next generation.
    pub rewritten: AtomicU64,
}

/// What a walk over all pages found.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Census {
    pub pages: u64,
    /// Pages that should be all zeros.
    pub zero: u64,
    /// Pages which this walk found bad.
    pub bad: u64,
    pub generation_sum: u64,
    /// Digest of every page's bytes and generation; independent of the order in
    /// which pages are walked.
    pub digest: u64,
}

impl Census {
    fn add(&mut self, other: Census) {
        self.pages += other.pages;
        self.zero += other.zero;
        self.bad += other.bad;
        self.generation_sum += other.generation_sum;
        self.digest = self.digest.wrapping_add(other.digest);
    }
}

// SAFETY: `memory` is reached only through `Held`, which holds the page's stripe,
// so no two threads touch one page at once; everything else is Sync by itself.
unsafe impl Sync for Region {}
// SAFETY: the mapping belongs to the process, not to a thread.
unsafe impl Send for Region {}

/// A page whose stripe is held.
struct Held<'a> {
    region: &'a Region,
    page: u64,
    stripe: MutexGuard<'a, Vec<Generation>>,
}

impl Held<'_> {
    fn generation(&self) -> Generation {
        self.stripe[(self.page / STRIPES) as usize]
    }

    fn set_generation(&mut self, generation: Generation) {
        self.stripe[(self.page / STRIPES) as usize] = generation;
    }

    fn words(&mut self) -> &mut Words {
        // SAFETY: `hold` checked that the page lies in the mapping, which is never
        // unmapped; the stripe's lock makes this the only reference to it, and
        // `&mut self` keeps one holder from taking two.
        unsafe { &mut *self.region.memory.add(self.page as usize) }
    }
}

impl Region {
    /// Maps `pages` pages, without filling them.
    pub fn map(pages: u64, recipe: Recipe, reports: SyncSender<String>) -> io::Result<Region> {
        let len = pages as usize * size_of::<Words>();
        // SAFETY: a new mapping at an address of the kernel's choice; no memory that
        // exists is touched.
        let memory = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if memory == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let stripe = || Mutex::new(vec![Generation::default(); pages.div_ceil(STRIPES) as usize]);
        Ok(Region {
            memory: memory.cast(),
            pages,
            stripes: (0..STRIPES).map(|_| stripe()).collect(),
            recipe,
            counters: Counters::default(),
            reports,
        })
    }

    pub fn pages(&self) -> u64 {
        self.pages
    }

    pub fn nonce(&self) -> [u64; 2] {
        self.recipe.nonce
    }

    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Writes every page's first generation. Zeros are written, too, so that each
    /// page has memory of its own.
    pub fn fill(&self) {
        self.in_parallel(|page, _| {
            let mut held = self.hold(page);
            let generation = held.generation();
            self.recipe.fill(page, generation, held.words());
        });
    }

    /// Verifies one page and gives it its next generation, or leaves it alone if
    /// it is bad.
    pub fn rewrite(&self, page: u64) {
        let mut held = self.hold(page);
        if self.verify(&mut held) {
            let next = held.generation().next();
            self.recipe.fill(page, next, held.words());
            held.set_generation(next);
            self.counters.rewritten.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Reads a word of each page, so that all of them are had.
    pub fn touch(&self, pages: Range<u64>) -> u64 {
        pages.fold(0, |sum, page| sum ^ self.hold(page).words()[0])
    }

    /// Turns pages to zeros until their next rewrite; how many of them were good
    /// before, and so were turned.
    pub fn zero(&self, pages: Range<u64>) -> u64 {
        let mut turned = 0;
        for page in pages {
            let mut held = self.hold(page);
            if self.verify(&mut held) {
                let zeroed = held.generation().next().zeroed();
                held.words().fill(0);
                held.set_generation(zeroed);
                turned += 1;
            }
        }
        turned
    }

    /// Flips one bit behind the oracle's back: what it says next tells whether it
    /// can be trusted.
    pub fn damage(&self, page: u64, word: usize) {
        self.hold(page).words()[word % PAGE_WORDS] ^= 1;
    }

    /// Verifies every page, whatever the writers do meanwhile.
    pub fn check(&self) -> Census {
        self.in_parallel(|page, census| {
            let mut held = self.hold(page);
            let generation = held.generation();
            census.pages += 1;
            census.zero += u64::from(self.recipe.kind(page, generation) == Kind::Zero);
            census.generation_sum += u64::from(generation.count());
            census.bad += u64::from(!self.verify(&mut held));
        })
    }

    /// Digests every page as it is, right or wrong.
    pub fn digest(&self) -> Census {
        self.in_parallel(|page, census| {
            let mut held = self.hold(page);
            let generation = held.generation();
            let start = mix(page ^ (u64::from(generation.bits()) << 32));
            // An odd multiplier after each word: no two words can change places.
            let digest = held.words().iter().fold(start, |d, word| {
                (d ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29)
            });
            census.pages += 1;
            census.generation_sum += u64::from(generation.count());
            census.digest = census.digest.wrapping_add(mix(digest));
        })
    }

    fn hold(&self, page: u64) -> Held<'_> {
        assert!(page < self.pages, "page {page} of a region of {} pages", self.pages);
        let stripe = &self.stripes[(page % STRIPES) as usize];
        let stripe = stripe.lock().unwrap_or_else(PoisonError::into_inner);
        Held { region: self, page, stripe }
    }

    /// Whether the page is as it should be; counts, and reports if it isn't.
    fn verify(&self, held: &mut Held) -> bool {
        let (page, generation) = (held.page, held.generation());
        let difference = self.recipe.difference(page, generation, held.words());
        let Some(Difference { word, expected, found }) = difference else {
            self.counters.verified.fetch_add(1, Ordering::Relaxed);
            return true;
        };
        self.counters.bad.fetch_add(1, Ordering::Relaxed);
        // Full means that the first reports, those that tell most, are on their way.
        let _ = self.reports.try_send(format!(
            "page={page} offset={} generation={:#x} kind={:?} expected={expected:016x} found={found:016x}",
            word * size_of::<u64>(),
            generation.bits(),
            self.recipe.kind(page, generation),
        ));
        false
    }

    /// Walks all pages, each vCPU its share.
    fn in_parallel(&self, visit: impl Fn(u64, &mut Census) + Sync) -> Census {
        let cpus = thread::available_parallelism().map_or(1, |n| n.get() as u64);
        let share = self.pages.div_ceil(cpus).max(1);
        let visit = &visit;
        thread::scope(|scope| {
            let walks: Vec<_> = (0..cpus)
                .map(|cpu| (cpu * share).min(self.pages)..((cpu + 1) * share).min(self.pages))
                .map(|pages| {
                    scope.spawn(move || {
                        let mut census = Census::default();
                        pages.for_each(|page| visit(page, &mut census));
                        census
                    })
                })
                .collect();
            let mut total = Census::default();
            for walk in walks {
                // A walk that panicked has taken the guest down with it.
                total.add(walk.join().unwrap_or_default());
            }
            total
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::sync_channel;

    use super::*;

    #[test]
    fn rewriting_keeps_all_pages_good_and_damage_is_found_once() {
        let (reports, bad) = sync_channel(4);
        let recipe = Recipe { nonce: [1, 2], random_percent: 40, zero_percent: 20 };
        let region = Region::map(1000, recipe, reports).unwrap();
        region.fill();
        (0..1000).step_by(3).for_each(|page| region.rewrite(page));
        assert_eq!(region.zero(10..20), 10);
        let census = region.check();
        assert_eq!((census.pages, census.bad, census.generation_sum), (1000, 0, 344));

        let before = region.digest();
        assert_eq!(before, region.digest());
        region.damage(77, 511);
        assert_ne!(before, region.digest());
        assert_eq!(region.check().bad, 1);
        assert!(bad.recv().unwrap().starts_with("page=77 offset=4088 "));
    }
}
