//! What can go wrong with an export or import.

use std::io;
use std::path::{Path, PathBuf};

use super::ExportFormat;
use crate::guest::VmError;
use crate::image::ImageError;
use crate::wire::WireError;

/// Why an export or import failed. Nothing is left behind then.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExchangeError {
    /// An image can't be read or written.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The migration stream to import can't be understood.
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
        /// What was being done, to be followed by the path.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// Standard output can't take the export.
    #[error("can't write to standard output: {0}")]
    Output(String),
    /// The format needs a file.
    #[error("the format {0} needs a file: only a stream can go to a pipe")]
    NeedsFile(ExportFormat),
    /// The file is of no known format.
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
    /// The file says that libvirt saved it, and is not as libvirt writes it.
    #[error("`{}` is a guest saved by libvirt, but {problem}", path.display())]
    Libvirt {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what to do.
        problem: String,
    },
    /// A program that decompresses is missing or failed.
    #[error("decompressing `{}` with `{tool}` failed: {problem}", path.display())]
    Decompress {
        /// The file.
        path: PathBuf,
        /// The program.
        tool: &'static str,
        /// What went wrong.
        problem: String,
    },
    /// The file does not hold the command line, and none was given.
    #[error(
        "a {what} does not hold QEMU's command line: give it behind `--` (-- qemu-system-x86_64 \
         ARGS…) or in a file with --command{why}"
    )]
    NoCommandLine {
        /// Which kind of file.
        what: &'static str,
        /// Why it was not made of what the file holds; begins with a semicolon.
        why: String,
    },
    /// The command line that was given can't be used.
    #[error("the command line that was given can't be used: {0}")]
    CommandLine(String),
    /// The machine that was given can't be recorded.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// The command line is another machine's.
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
    /// QEMU is older than the guest.
    #[error(
        "the guest is a `{machine_type}`, which QEMU {qemu} does not know: name a newer one with \
         --qemu"
    )]
    OldQemu {
        /// The guest's machine type.
        machine_type: String,
        /// The QEMU that was given.
        qemu: String,
    },
    /// The guest's physical memory map is not known.
    #[error("where the guest's memory lies can't be told: {problem}; export it as `flat` instead")]
    NoLayout {
        /// What is unknown.
        problem: String,
    },
    /// The guest's processors are none that an ELF core can be written for.
    #[error("the guest's processors are not known here: {problem}; export it as `flat` instead")]
    NoProcessor {
        /// What is unknown.
        problem: &'static str,
    },
    /// A directory is not replaced.
    #[error("--force does not replace a directory: remove it, or choose another name")]
    ForceDirectory,
    /// The guest's run state is not where it should be in its device state.
    #[error(
        "the guest was stopped when it was written, and where its device state says so was not \
         found: import it without --run, and let it run with `cont` after a revert"
    )]
    NoRunState,
    /// It was cancelled.
    #[error("interrupted: nothing was written")]
    Interrupted,
}

impl ExchangeError {
    /// For `map_err`: what was being done to which file.
    pub(super) fn io(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ExchangeError {
        let path = path.to_owned();
        move |source| ExchangeError::Io { doing, path, source }
    }

    /// For `map_err`: what an image said of a page.
    pub(super) fn memory(block: &str, offset: u64, error: &ImageError) -> ExchangeError {
        ExchangeError::Memory { block: block.to_owned(), offset, problem: error.to_string() }
    }
}
