//! Errors of an export or import.

use std::io;
use std::path::{Path, PathBuf};

use super::ExportFormat;
use crate::guest::GuestError;
use crate::image::ImageError;
use crate::kind::{Details, ErrorKind};
use crate::libvirt::PlanError;
use crate::wire::WireError;

/// Why an export or import failed. It leaves no file behind.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExchangeError {
    /// An image can't be read or written.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The migration stream to import can't be parsed.
    #[error("`{}`: {error}", path.display())]
    Stream {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        error: WireError,
    },
    /// Memory can't be read from the image.
    #[error("block {block:?} at offset {offset:#x}: {problem}")]
    Memory {
        /// The block's name.
        block: String,
        /// Offset in the block in bytes.
        offset: u64,
        /// What is wrong.
        problem: String,
    },
    /// The operating system refused something.
    #[error("can't {doing} `{}`: {source}", path.display())]
    Io {
        /// The operation, a verb that the path follows.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// The operating system's reason.
        source: io::Error,
    },
    /// The export can't be written to standard output.
    #[error("can't write to standard output: {0}")]
    Output(String),
    /// The format can't be written to a pipe.
    #[error("the format {0} needs a file: only a stream can go to a pipe")]
    NeedsFile(ExportFormat),
    /// The file has no known format.
    #[error(
        "`{}` begins with {begins:?}: that is neither a migration stream (QEVM) nor a guest saved \
         by libvirt (LibvirtQemudSave)",
        path.display()
    )]
    Foreign {
        /// The file.
        path: PathBuf,
        /// Its first bytes, as text.
        begins: String,
    },
    /// The file has libvirt's magic, but not libvirt's format.
    #[error("`{}` is a guest saved by libvirt, but {problem}", path.display())]
    Libvirt {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what to do.
        problem: String,
    },
    /// The decompression program is missing or failed.
    #[error("decompressing `{}` with `{tool}` failed: {problem}", path.display())]
    Decompress {
        /// The file.
        path: PathBuf,
        /// The program.
        tool: &'static str,
        /// What went wrong.
        problem: String,
    },
    /// The file does not hold QEMU's command line, and none was given.
    #[error("a {what} does not hold QEMU's command line: give it in `ImportOptions::command`{why}")]
    NoCommandLine {
        /// Which kind of file.
        what: &'static str,
        /// Why it could not be derived from the file; begins with a semicolon, or is empty.
        why: String,
    },
    /// The given command line can't be used.
    #[error("the given command line can't be used: {0}")]
    CommandLine(String),
    /// The machine can't be recorded, or its disks not be used.
    #[error(transparent)]
    Vm(#[from] GuestError),
    /// The image's domain can't be written.
    #[error(transparent)]
    Domain(Box<PlanError>),
    /// The command line names another machine type than the stream.
    #[error(
        "the command line names the machine type `{given}`, but the guest is a `{stream}`: device \
         state fits its own machine type only; give the command line that the guest had"
    )]
    MachineType {
        /// The machine type on the command line.
        given: String,
        /// The machine type in the stream.
        stream: String,
    },
    /// QEMU is too old for the guest's machine type.
    #[error(
        "the guest is a `{machine_type}`, which QEMU {qemu} does not know: name a newer one in \
         `ImportOptions::qemu`"
    )]
    OldQemu {
        /// The guest's machine type.
        machine_type: String,
        /// The version of the given QEMU.
        qemu: String,
    },
    /// The guest's physical memory map can't be derived.
    #[error(
        "the guest's physical memory map can't be derived: {problem}; export it as `memory` instead"
    )]
    NoLayout {
        /// What is unknown.
        problem: String,
    },
    /// No ELF core can be written for the guest's processors.
    #[error(
        "no ELF core can be written for the guest's processors: {problem}; export it as `memory` instead"
    )]
    NoProcessor {
        /// What is unknown.
        problem: &'static str,
    },
    /// An existing directory is never replaced.
    #[error(
        "`ExportOptions::force` does not replace a directory: remove it, or choose another name"
    )]
    ForceDirectory,
    /// The device state has no run state at its known place.
    #[error(
        "the guest was stopped when it was written, and its device state has no run state that \
         could be changed: import it without `ImportOptions::run`, and resume it with `cont` after a revert"
    )]
    NoRunState,
    /// The export or import was cancelled.
    #[error("interrupted: nothing was written")]
    Interrupted,
}

impl From<PlanError> for ExchangeError {
    fn from(error: PlanError) -> ExchangeError {
        match error {
            PlanError::Guest(error) => error.into(),
            error => ExchangeError::Domain(Box::new(error)),
        }
    }
}

impl ExchangeError {
    /// What kind of error it is, for programs to act on.
    pub fn kind(&self) -> ErrorKind {
        use ExchangeError::*;
        match self {
            Image(error) => error.kind(),
            Vm(error) => error.kind(),
            Domain(error) => error.kind(),
            Stream { error, .. } => match error.kind() {
                ErrorKind::QemuProtocol | ErrorKind::QemuEnded | ErrorKind::GuestUnsupported => {
                    ErrorKind::InputInvalid
                }
                kind => kind,
            },
            Memory { .. } => ErrorKind::ImageDamaged,
            Io { source, .. } => ErrorKind::of_io(source),
            Output(_) | Decompress { .. } => ErrorKind::Io,
            NeedsFile(_) | ForceDirectory => ErrorKind::OptionsInvalid,
            Foreign { .. } | Libvirt { .. } | NoRunState => ErrorKind::InputInvalid,
            NoCommandLine { .. } | CommandLine(_) | MachineType { .. } => {
                ErrorKind::CommandLineInvalid
            }
            OldQemu { .. } => ErrorKind::QemuTooOld,
            NoLayout { .. } | NoProcessor { .. } => ErrorKind::GuestUnsupported,
            Interrupted => ErrorKind::Interrupted,
        }
    }

    /// What it is about.
    pub fn details(&self) -> Details {
        use ExchangeError::*;
        let path = match self {
            Image(error) => return error.details(),
            Vm(error) => return error.details(),
            Stream { path, .. }
            | Io { path, .. }
            | Foreign { path, .. }
            | Libvirt { path, .. }
            | Decompress { path, .. } => Some(path.clone()),
            _ => None,
        };
        Details::new(&self.to_string(), path, None)
    }
}

impl ExchangeError {
    /// For `map_err`: adds the operation and the file.
    pub(super) fn io(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ExchangeError {
        let path = path.to_owned();
        move |source| ExchangeError::Io { doing, path, source }
    }

    /// For `map_err`: what an image said of a page.
    pub(super) fn memory(block: &str, offset: u64, error: &ImageError) -> ExchangeError {
        ExchangeError::Memory { block: block.to_owned(), offset, problem: error.to_string() }
    }
}
