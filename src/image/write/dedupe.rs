//! Chunks that are stored already, found by their content.
//!
//! Two chunks that are taken for equal are one to the guest later, and users of the guest
//! choose what lies in its memory. So the checksum can't decide, since different bytes with
//! the same checksum are easily made. A keyed cryptographic hash (BLAKE3) decides. Its key is
//! random for each image and never leaves memory, so nobody can search for a collision; by
//! chance, two of 2^23 chunks collide in one of 2^83 images.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use uuid::Uuid;

/// Parts of the index, each with a lock of its own: threads seldom wait for each other, and
/// not for long while a part grows.
const SHARDS: usize = 64;

/// The most fingerprints in a part. A hash map fills 7/8 of its slots, whose number is
/// a power of two, before it doubles them.
const SHARD_CHUNKS: usize = (1 << 17) / 8 * 7;

// The most chunks that are known. A chunk behind them is stored even if it is there already.
// 7.3 million chunks of 16 KiB are 112 GiB of memory without any repetition. They take 21
// bytes in each of 2^23 slots: 168 MiB at most.
const _: () = assert!(SHARDS * SHARD_CHUNKS == 7 << 20);

/// The chunks that are known, and their numbers.
pub(in crate::image) struct Known {
    key: [u8; 32],
    shards: Box<[Mutex<Shard>]>,
    next: AtomicU64,
    /// The most fingerprints in a shard.
    limit: usize,
}

type Shard = HashMap<Fingerprint, u32, BuildHasherDefault<Leading>>;

/// The first half of a BLAKE3 hash, in words of 4 bytes so that it needs no padding.
type Fingerprint = [u32; 4];

/// Whether a chunk is new.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::image) enum Number {
    /// It is new and has this number.
    New(u64),
    /// It has been given this number before.
    Again(u64),
}

impl Known {
    pub fn new() -> Known {
        Known::with_limit(SHARD_CHUNKS)
    }

    fn with_limit(limit: usize) -> Known {
        let mut key = [0; 32];
        key[..16].copy_from_slice(Uuid::new_v4().as_bytes());
        key[16..].copy_from_slice(Uuid::new_v4().as_bytes());
        let shards = (0..SHARDS).map(|_| Mutex::default()).collect();
        Known { key, shards, next: AtomicU64::new(0), limit }
    }

    /// The number of the chunk with these bytes. Of several threads that ask for the same
    /// bytes, exactly one gets [`Number::New`].
    pub fn number(&self, bytes: &[u8]) -> Number {
        let hash = blake3::keyed_hash(&self.key, bytes);
        let mut fingerprint = [0; 4];
        for (word, bytes) in fingerprint.iter_mut().zip(hash.as_bytes().as_chunks().0) {
            *word = u32::from_le_bytes(*bytes);
        }
        // Another word than the one that finds the place within the shard.
        let shard = &self.shards[fingerprint[3] as usize % SHARDS];
        let mut shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(number) = shard.get(&fingerprint) {
            return Number::Again(u64::from(*number));
        }
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        if shard.len() < self.limit
            && let Ok(short) = u32::try_from(number)
        {
            shard.insert(fingerprint, short);
        }
        Number::New(number)
    }
}

/// Hashes a fingerprint, which is a hash already, to its first eight bytes.
#[derive(Default)]
pub(in crate::image) struct Leading(u64);

impl Hasher for Leading {
    fn write(&mut self, bytes: &[u8]) {
        if let Some(first) = bytes.first_chunk() {
            self.0 = u64::from_le_bytes(*first);
        }
    }

    // The length of an array, the same for all.
    fn write_usize(&mut self, _: usize) {}

    fn finish(&self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_bytes_have_one_number_whoever_asks() {
        let known = Known::new();
        let chunk = |n: u64| n.to_le_bytes().repeat(8);
        let asked = |known: &Known| (0..500).map(|n| known.number(&chunk(n))).collect::<Vec<_>>();
        let answers: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| asked(&known))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        for n in 0..500 {
            let mut new = 0;
            let numbers = answers.iter().map(|answers| match answers[n] {
                Number::New(number) => {
                    new += 1;
                    number
                }
                Number::Again(number) => number,
            });
            let numbers: Vec<u64> = numbers.collect();
            assert!(numbers.iter().all(|number| *number == numbers[0]));
            assert_eq!(new, 1);
        }
        let longer = [&chunk(1)[..], &[0; 8]].concat();
        assert_eq!(known.number(&longer), Number::New(500));
    }

    #[test]
    fn beyond_the_bound_nothing_is_added_and_nothing_is_wrong() {
        let known = Known::with_limit(1);
        let numbers: Vec<_> = (0..1000u64).map(|n| known.number(&n.to_le_bytes())).collect();
        for (n, number) in (0..).zip(numbers) {
            assert_eq!(number, Number::New(n));
        }
        assert!(known.shards.iter().all(|shard| shard.lock().unwrap().len() == 1));
        let again = (0..1000u64)
            .filter(|n| matches!(known.number(&n.to_le_bytes()), Number::Again(m) if m == *n));
        assert_eq!(again.count(), SHARDS);
    }

    #[test]
    fn a_fingerprint_takes_what_is_said() {
        assert_eq!(size_of::<(Fingerprint, u32)>(), 20);
        let mut shard = Shard::default();
        for n in 0..SHARD_CHUNKS as u32 {
            shard.insert([n, n ^ 0x5555_5555, 0, 0], n);
        }
        assert!(shard.capacity() <= SHARD_CHUNKS);
    }
}
