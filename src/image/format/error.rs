//! What can go wrong with an image, and what to do about it.

use std::io;
use std::path::{Path, PathBuf};

use crate::identity::Identity;
use crate::kind::{Details, ErrorKind};

use crate::page::{Block, PAGE_SIZE, Page};

/// Why an image could not be written, opened or read.
///
/// An image that is read is named as where it lies: by the path that its file was opened
/// with. Every message is one complete line: it contains the operating system's error where
/// there is one, so there is no further `source` to print.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// The operating system refused something.
    #[error("cannot {doing} {}: {error}", path.display())]
    Io {
        /// What was being done, to be followed by the path.
        doing: &'static str,
        /// The image's path.
        path: PathBuf,
        /// What the operating system said.
        error: io::Error,
    },
    /// A part of an image can't be read.
    #[error("cannot read {image} at offset {position:#x}: {error}")]
    Read {
        /// The image's name.
        image: String,
        /// Where, in bytes from the image's start.
        position: u64,
        /// Why not.
        error: io::Error,
    },
    /// There is no memory for a decompressor.
    #[error("cannot make a decompressor for {image}: {error}")]
    Decompressor {
        /// The image's name.
        image: String,
        /// What the decompressor's library said.
        error: io::Error,
    },
    /// The disk or the quota is full.
    #[error(
        "no space left to write {}: free some space there or save elsewhere; \
         nothing was left behind ({error})",
        path.display()
    )]
    NoSpace {
        /// The image's path.
        path: PathBuf,
        /// What the operating system said.
        error: io::Error,
    },
    /// There is a file of that name, and overwriting was not asked for.
    #[error("{} exists already: choose another name, or overwrite it with force", .0.display())]
    Exists(PathBuf),
    /// The path is no regular file, so it is neither read nor overwritten.
    #[error("{} is not a regular file: an image can only be a regular file", .0.display())]
    NotRegular(PathBuf),
    /// The path has no file name at its end.
    #[error("{} does not name a file to write an image to", .0.display())]
    NoFileName(PathBuf),
    /// The writer's options make no sense.
    #[error("cannot write an image with {0}")]
    Options(String),
    /// The list of blocks breaks a rule of the format.
    #[error("cannot write an image of this machine: {0}")]
    Blocks(String),
    /// The index of the machine's pages does not fit into this host.
    #[error(
        "cannot write {}: the index of a machine of {ram} bytes takes {index} bytes of memory, and \
         {limit} (a quarter of this host's) is the most that is given it: use a larger host",
        path.display()
    )]
    IndexTooLarge {
        /// The image's path.
        path: PathBuf,
        /// Bytes of the machine's memory.
        ram: u64,
        /// Bytes of the index.
        index: u64,
        /// The most that it may have.
        limit: u64,
    },
    /// A part is larger than the format allows.
    #[error("the {what} of {len} bytes exceeds the format's limit of {limit} bytes")]
    TooLarge {
        /// Which part.
        what: &'static str,
        /// Its length in bytes.
        len: u64,
        /// The most bytes it may have.
        limit: u64,
    },
    /// There is no such page in the machine.
    #[error("there is no page at block {block}, offset {offset:#x}")]
    NoSuchPage {
        /// The block's position in the list, and its name if it has one.
        block: String,
        /// Offset in the block in bytes.
        offset: u64,
    },
    /// The writer was to finish before it had been given every page.
    #[error(
        "cannot finish {}: {missing} pages were never given, the first of them \
         block {block}, offset {offset:#x}; save again",
        path.display()
    )]
    PagesMissing {
        /// The image's path.
        path: PathBuf,
        /// Name of the first missing page's block.
        block: String,
        /// The first missing page's offset in its block, in bytes.
        offset: u64,
        /// How many pages are missing in all.
        missing: u64,
    },
    /// A thread of the writer ended without saying why.
    #[error("a thread that writes {} ended unexpectedly: save again and report this", .0.display())]
    ThreadLost(PathBuf),
    /// It is something else.
    #[error("{0} is not a snapback image (it does not begin with its magic)")]
    NotAnImage(String),
    /// The superblock, which is written last, is all zeros.
    #[error("{0} was never finished (its superblock is empty): save again")]
    Unfinished(String),
    /// It ends too early.
    #[error(
        "{image} is truncated: {found} of {expected} bytes; copy it again from where it is whole"
    )]
    Truncated {
        /// The image's name.
        image: String,
        /// Its length in bytes.
        found: u64,
        /// Length that it should have (at least) in bytes.
        expected: u64,
    },
    /// A later snapback wrote it.
    #[error(
        "{image} is of format version {version}, this snapback reads version {known}: \
         use a snapback that knows it"
    )]
    NewerVersion {
        /// The image's name.
        image: String,
        /// Version found.
        version: u32,
        /// Version known.
        known: u32,
    },
    /// It needs features that this snapback does not have.
    #[error(
        "{image} needs features that this snapback does not know (bits {bits:#x}): \
         use a newer snapback"
    )]
    UnknownFeatures {
        /// The image's name.
        image: String,
        /// The unknown ones of the incompatible feature bits.
        bits: u64,
    },
    /// Another image, in which pages of this one lie, is not there or not the same.
    #[error("{image} needs image {identity}: {problem}")]
    Layer {
        /// The name of the image that refers to it.
        image: String,
        /// The other image's identity.
        identity: Identity,
        /// Where it was looked for, what was found there, and what to do.
        problem: String,
    },
    /// An image can't be written on top of another.
    #[error("cannot save on top of {parent}: {problem}")]
    Parent {
        /// The other image's name.
        parent: String,
        /// Why not, and what to do.
        problem: String,
    },
    /// What is written would replace a file that it is made of.
    #[error(
        "cannot write {}: it would replace {}, which it is made of or refers to: give it another \
         name",
        path.display(), needed.display()
    )]
    Replaces {
        /// What is to be written.
        path: PathBuf,
        /// What it needs.
        needed: PathBuf,
    },
    /// Writing was cancelled.
    #[error("interrupted: {} was not written", .0.display())]
    Interrupted(PathBuf),
    /// A part of the image is not what was written, or can't be read.
    #[error("{image} is damaged: {place}: {problem}")]
    Damaged {
        /// The image's name.
        image: String,
        /// Which part, and where in the image.
        place: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A chunk is not what was written, or can't be read.
    #[error("{image} is damaged: chunk {chunk} at file offset {offset:#x}: {problem}")]
    Chunk {
        /// The image's name.
        image: String,
        /// The chunk's number.
        chunk: u64,
        /// Where the chunk is stored, in bytes from the image's start.
        offset: u64,
        /// What is wrong with it.
        problem: String,
    },
}

impl ImageError {
    /// What kind of error it is, for programs to act on.
    pub fn kind(&self) -> ErrorKind {
        use ImageError::*;
        match self {
            Io { error, .. } | Read { error, .. } => ErrorKind::of_io(error),
            Decompressor { .. } | ThreadLost(_) | PagesMissing { .. } | NoSuchPage { .. } => {
                ErrorKind::Internal
            }
            NoSpace { .. } => ErrorKind::NoSpace,
            Exists(_) => ErrorKind::FileExists,
            NotRegular(_) | NoFileName(_) | Options(_) | Parent { .. } | Replaces { .. } => {
                ErrorKind::OptionsInvalid
            }
            Blocks(_) | TooLarge { .. } => ErrorKind::GuestUnsupported,
            IndexTooLarge { .. } => ErrorKind::HostUnsupported,
            NotAnImage(_) => ErrorKind::NotAnImage,
            Unfinished(_) | Truncated { .. } | Damaged { .. } | Chunk { .. } => {
                ErrorKind::ImageDamaged
            }
            NewerVersion { .. } | UnknownFeatures { .. } => ErrorKind::ImageTooNew,
            Layer { .. } => ErrorKind::ParentMissing,
            Interrupted(_) => ErrorKind::Interrupted,
        }
    }

    /// What it is about.
    pub fn details(&self) -> Details {
        use ImageError::*;
        let path = match self {
            Io { path, .. }
            | NoSpace { path, .. }
            | Exists(path)
            | NotRegular(path)
            | NoFileName(path)
            | IndexTooLarge { path, .. }
            | PagesMissing { path, .. }
            | ThreadLost(path)
            | Replaces { path, .. }
            | Interrupted(path) => Some(path.clone()),
            Read { image, .. }
            | Decompressor { image, .. }
            | NotAnImage(image)
            | Unfinished(image)
            | Truncated { image, .. }
            | NewerVersion { image, .. }
            | UnknownFeatures { image, .. }
            | Layer { image, .. }
            | Parent { parent: image, .. }
            | Damaged { image, .. }
            | Chunk { image, .. } => Some(image.into()),
            Options(_) | Blocks(_) | TooLarge { .. } | NoSuchPage { .. } => None,
        };
        Details::new(&self.to_string(), path, None)
    }
}

impl ImageError {
    /// An operating system's error; a full disk gets a variant of its own.
    pub(crate) fn io(doing: &'static str, path: &Path, error: io::Error) -> ImageError {
        let path = path.to_owned();
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                ImageError::NoSpace { path, error }
            }
            _ => ImageError::Io { doing, path, error },
        }
    }

    /// Whether it says that something does not exist.
    pub(in crate::image) fn is_not_found(&self) -> bool {
        let (ImageError::Io { error, .. } | ImageError::Read { error, .. }) = self else {
            return false;
        };
        error.kind() == io::ErrorKind::NotFound
    }

    /// A page outside of these blocks.
    pub(in crate::image) fn no_such_page(blocks: &[Block], page: Page) -> ImageError {
        let block = match blocks.get(page.block.index()) {
            Some(block) => format!("{:?} of {:#x} bytes", block.name, block.len),
            None => format!("{} (there are {})", page.block.0, blocks.len()),
        };
        ImageError::NoSuchPage { block, offset: page.number.saturating_mul(PAGE_SIZE as u64) }
    }

    /// Damage to a named place.
    pub(in crate::image) fn damaged(
        image: &str,
        place: impl Into<String>,
        problem: impl Into<String>,
    ) -> ImageError {
        ImageError::Damaged {
            image: image.to_owned(),
            place: place.into(),
            problem: problem.into(),
        }
    }
}
