//! Guests saved into a repository: one, or all that a configuration file names
//! (docs/disaster-recovery.md).
//!
//! - `spool`: a save on this host, and its way into the repository.
//! - `config`: which machines, where to, what is kept.
//! - `run`: all of them, one behind the other.
//! - `metrics`: what came of it, for Prometheus.

mod config;
mod error;
mod metrics;
mod run;
mod spool;

pub use config::{BackupConfig, KeepConfig, MachineConfig};
pub use error::BackupError;
pub use run::{BackupEvent, BackupReport, back_up};
pub use spool::Spool;
