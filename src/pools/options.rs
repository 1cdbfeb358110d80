//! What a daemon's pools have in common.

use std::path::PathBuf;

use crate::keeper::Successor;

/// As much as a guest of a test farm reads of its image before it is done.
const CACHE: u64 = 256 << 20;

/// What a daemon's pools have in common.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct PoolsOptions {
    /// The directory of all that outlives the daemon: its pools, its guests, and their files.
    pub state: PathBuf,
    /// The program that goes on with a guest should the daemon be killed while it runs and its
    /// memory is incomplete. Without, the guest then waits for ever.
    pub keeper: Option<Successor>,
    /// Where the daemon of the pools listens, for commands about one of its guests.
    pub address: Option<PathBuf>,
    /// The most bytes of decompressed chunks that are kept of each image, for all its guests.
    pub cache: u64,
    /// How many guests are armed at a time, of all pools together: what is behind a user's back is
    /// not to take the whole machine.
    pub arming: usize,
}

impl PoolsOptions {
    /// Pools with their state in this directory, that arm one guest at a time.
    pub fn new(state: impl Into<PathBuf>) -> PoolsOptions {
        PoolsOptions { state: state.into(), keeper: None, address: None, cache: CACHE, arming: 1 }
    }
}
