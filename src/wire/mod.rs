//! QEMU's migration stream and its return path: bytes to values and back.
//!
//! There is no policy here: other rooms decide when a socket is read and how an error is
//! handled. The formats are described in QEMU's
//! `docs/devel/migration/main.rst` and defined by `migration/savevm.c`,
//! `migration/ram.c` and `migration/qemu-file.c`. All integers are big-endian.

mod config;
pub(crate) mod devices;
mod input;
mod mapped_ram;
mod return_path;
pub mod run_state;
mod source;
mod stream;

#[cfg(test)]
mod tests;

use crate::kind::{Details, ErrorKind};

pub use mapped_ram::MappedLayout;
pub use return_path::{ReturnPath, ReturnPathMessage};
pub use source::{
    Frame, Opening, closing, end_of_ram, open_return_path, package, ping, precopy_opening,
    received_bitmap, resume, tail,
};
pub use stream::{Item, StreamBlock, StreamReader, Tail};

/// `QEMU_VM_FILE_MAGIC`: the letters "QEVM".
const FILE_MAGIC: u32 = 0x5145_564d;
/// `QEMU_VM_FILE_VERSION`.
const FILE_VERSION: u32 = 3;

/// `QEMU_VM_EOF` and the section types that follow one another in a stream.
pub(crate) mod section {
    pub const EOF: u8 = 0x00;
    pub const START: u8 = 0x01;
    pub const PART: u8 = 0x02;
    pub const END: u8 = 0x03;
    pub const FULL: u8 = 0x04;
    pub const SUBSECTION: u8 = 0x05;
    pub const VMDESCRIPTION: u8 = 0x06;
    pub const CONFIGURATION: u8 = 0x07;
    pub const COMMAND: u8 = 0x08;
    pub const FOOTER: u8 = 0x7e;

    /// Length in bytes of a section's type and the section number behind it, which is all
    /// that a footer consists of.
    pub const MARK_BYTES: usize = 5;
}

/// `MIG_CMD_*` of `migration/savevm.c`.
mod command {
    pub const OPEN_RETURN_PATH: u16 = 1;
    pub const PING: u16 = 2;
    pub const POSTCOPY_ADVISE: u16 = 3;
    pub const POSTCOPY_LISTEN: u16 = 4;
    pub const POSTCOPY_RUN: u16 = 5;
    pub const POSTCOPY_RAM_DISCARD: u16 = 6;
    pub const PACKAGED: u16 = 7;
    pub const POSTCOPY_RESUME: u16 = 9;
    pub const RECV_BITMAP: u16 = 10;
    pub const SWITCHOVER_START: u16 = 11;
}

/// `RAM_SAVE_FLAG_*` of `migration/ram.c`. They share a word with the page's
/// address, whose lowest twelve bits are free.
mod ram_flag {
    pub const ZERO: u64 = 0x02;
    pub const MEM_SIZE: u64 = 0x04;
    pub const PAGE: u64 = 0x08;
    pub const EOS: u64 = 0x10;
    pub const CONTINUE: u64 = 0x20;
    pub const XBZRLE: u64 = 0x40;
    pub const COMPRESS_PAGE: u64 = 0x100;
    pub const MULTIFD_FLUSH: u64 = 0x200;
    pub const ALL: u64 = 0xfff;
}

/// The version of the `ram` section (`register_savevm_live("ram", 0, 4, …)`).
const RAM_SECTION_VERSION: u32 = 4;

/// Why a migration stream or a return path can't be parsed. `at` is the offset in bytes from the
/// start of what was read.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The peer's bytes could not be read.
    #[error("reading the migration stream at byte {at} failed: {source}")]
    Io {
        /// Where in the stream.
        at: u64,
        /// The operating system's reason.
        source: std::io::Error,
    },
    /// The stream ends too early.
    #[error(
        "the migration stream ended at byte {at}, inside {inside}: QEMU died, was told to cancel, \
         or the stream is truncated"
    )]
    Ended {
        /// Where in the stream.
        at: u64,
        /// What was being read.
        inside: &'static str,
    },
    /// The first bytes are not a migration stream's.
    #[error("not a QEMU migration stream (magic {magic:#010x}, version {version})")]
    NotAStream {
        /// The first four bytes.
        magic: u32,
        /// The next four.
        version: u32,
    },
    /// Bytes that the format does not allow.
    #[error("the migration stream is malformed at byte {at}: {what}")]
    Malformed {
        /// Where in the stream.
        at: u64,
        /// What is wrong.
        what: String,
    },
    /// The stream holds something valid that is not supported.
    #[error("the migration stream holds at byte {at} what snapback does not support: {what}")]
    Unsupported {
        /// Where in the stream.
        at: u64,
        /// What it is, and what to do.
        what: String,
    },
}

impl WireError {
    /// What kind of error it is, for programs to act on.
    pub fn kind(&self) -> ErrorKind {
        match self {
            WireError::Io { source, .. } => ErrorKind::of_io(source),
            WireError::Ended { .. } => ErrorKind::QemuEnded,
            WireError::Unsupported { .. } => ErrorKind::GuestUnsupported,
            _ => ErrorKind::QemuProtocol,
        }
    }

    /// What it is about.
    pub fn details(&self) -> Details {
        Details::new(&self.to_string(), None::<std::path::PathBuf>, None)
    }
}
