//! Pools of guests that wait to be taken: each is armed, with its device state in and its faults
//! served, and runs a millisecond after somebody asks for it.
//!
//! ```text
//!              arm                 take               fill
//!   template ───────▶ armed guest ───────▶ running ───────▶ resident ──▶ resettable
//!                          ▲                  │                              │
//!                          └── refill         └────────── reset ◀────────────┘
//! ```
//!
//! - `config`: what a pool is made of, as a configuration file or a request says it.
//! - `images`: the images of all pools, each open once, with one cache of chunks.
//! - `template`: a pool's image, and what each of its guests is called and given.
//! - `guest`: one guest and its session, in a task of its own that obeys commands; `stage`: what it is
//!   meanwhile; `handle`: what others see of it.
//! - `setup`: what is done for a guest as soon as it runs, by its agent and a command of the host's.
//! - `book`: who waits, who runs and who stands in the queue of one pool.
//! - `memory`: how much memory they may take.
//! - `pool`: one pool: its book, and what keeps it filled.
//! - `all`: all pools of a daemon.
//! - `saved`: what is written down of guests and pools, for the daemon that comes after.
//! - `event`, `figures`: what is told and counted.

mod all;
mod book;
mod config;
mod error;
mod event;
mod figures;
mod guest;
mod handle;
mod images;
mod memory;
mod options;
mod pool;
mod saved;
mod setup;
mod stage;
mod template;

pub use all::{Pools, Take};
pub use config::{Change, PoolConfig, PoolSettings};
pub use error::PoolError;
pub use event::{
    CacheView, GuestView, MemoryView, PoolEvent, PoolState, PoolView, Problem, ResetView,
    SetupState, SetupView,
};
pub use figures::{Figures, Histogram};
pub use options::PoolsOptions;
