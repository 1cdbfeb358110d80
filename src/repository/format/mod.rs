//! The bytes of a repository's objects, as `docs/repository-format.md` draws them. No I/O.
//!
//! Whatever is read here may be hostile: every length is checked against what is there before
//! anything is allocated.

pub mod bytes;
pub mod config;
pub mod draft;
pub mod envelope;
pub mod ids;
pub mod manifest;
pub mod map;
pub mod pack;
pub mod packed;
pub mod signature;
pub mod time;
