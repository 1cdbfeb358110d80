//! An image written in the format of another program.

use std::fmt;
use std::path::PathBuf;

use super::output::Output;
use super::{ExchangeError, ExchangeEvent, Watch, elf, mapped_ram, plain_memory, stream};
use crate::cancel::Cancellation;
use crate::image::{Image, check_replaces_none};

/// What an image can be written as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ExportFormat {
    /// An ordinary migration stream, which every QEMU that knows the machine type
    /// loads with `-incoming`.
    Stream,
    /// A mapped-ram file, which QEMU 9.0 and later loads with the capability of that
    /// name.
    MappedRam,
    /// Plain memory: a directory with a sparse file for each block, which holds its bytes.
    /// The command line calls it `flat`.
    PlainMemory,
    /// An ELF core of the guest's physical memory, for `crash`, `gdb` and `readelf`.
    Elf,
}

impl fmt::Display for ExportFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ExportFormat::Stream => "stream",
            ExportFormat::MappedRam => "mapped-ram",
            ExportFormat::PlainMemory => "flat",
            ExportFormat::Elf => "elf",
        })
    }
}

/// Which image to write, as what and where.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ExportOptions {
    /// The image.
    pub image: PathBuf,
    /// What it is written as.
    pub format: ExportFormat,
    /// The file to write, or the directory; standard output without one, for a stream.
    pub to: Option<PathBuf>,
    /// Replace an existing file; a directory is never replaced.
    pub force: bool,
}

impl ExportOptions {
    /// Writes `image` as `format` to standard output, or, with [`ExportOptions::to`], to a
    /// file or directory.
    pub fn new(image: impl Into<PathBuf>, format: ExportFormat) -> ExportOptions {
        ExportOptions { image: image.into(), format, to: None, force: false }
    }
}

/// Writes an image in another format. Every byte of memory is verified on the way.
/// Returns the length of what was written in bytes.
///
/// # Errors
/// When the image is damaged, or what is written can't be. No file is left then.
pub fn export(
    options: &ExportOptions,
    cancel: &Cancellation,
    on_event: &mut dyn FnMut(ExchangeEvent),
) -> Result<u64, ExchangeError> {
    let image = Image::open(&options.image)?;
    if let Some(path) = &options.to {
        check_replaces_none(path, image.files())?;
    }
    let mut watch = Watch::new(cancel, on_event);
    let file_bytes = match (options.format, &options.to) {
        (ExportFormat::Stream, to) => {
            let mut output = match to {
                Some(path) => Output::file(path, options.force)?,
                None => Output::stdout()?,
            };
            stream::write(&image, &mut output, &mut watch)?;
            output.commit()?
        }
        (ExportFormat::MappedRam, Some(path)) => {
            let output = Output::file(path, options.force)?;
            mapped_ram::write(&image, &output, &mut watch)?;
            output.commit()?
        }
        (ExportFormat::Elf, Some(path)) => {
            let output = Output::file(path, options.force)?;
            elf::write(&image, &output, &mut watch)?;
            output.commit()?
        }
        (ExportFormat::PlainMemory, Some(_)) if options.force => {
            return Err(ExchangeError::ForceDirectory);
        }
        (ExportFormat::PlainMemory, Some(path)) => plain_memory::write(&image, path, &mut watch)?,
        (format, None) => return Err(ExchangeError::NeedsFile(format)),
    };
    let ram_bytes = image.manifest().blocks.iter().map(|block| block.len).sum();
    watch.tell(ExchangeEvent::Exported { ram_bytes, file_bytes });
    Ok(file_bytes)
}
