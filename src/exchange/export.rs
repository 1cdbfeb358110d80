//! An image converted to the format of another program.

use std::fmt;
use std::path::PathBuf;

use super::output::Output;
use super::{ExchangeError, ExchangeEvent, Watch, elf, libvirt, mapped_ram, memory, stream};
use crate::cancel::Cancellation;
use crate::image::{Image, check_replaces_none};

/// The formats that an image can be exported to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ExportFormat {
    /// An ordinary migration stream, which every QEMU that knows the machine type
    /// loads with `-incoming`.
    Stream,
    /// A mapped-ram file, which QEMU 9.0 and later loads with the capability of that
    /// name.
    MappedRam,
    /// Plain memory: a directory with a sparse file for each block.
    Memory,
    /// An ELF core of the guest's physical memory, for `crash`, `gdb` and `readelf`.
    Elf,
    /// A saved domain, which libvirt's own `restore` takes (virsh(1)). Each captured disk gets an
    /// overlay, beside its frozen file and named after the export.
    Libvirt,
}

impl fmt::Display for ExportFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ExportFormat::Stream => "stream",
            ExportFormat::MappedRam => "mapped-ram",
            ExportFormat::Memory => "memory",
            ExportFormat::Elf => "elf",
            ExportFormat::Libvirt => "libvirt",
        })
    }
}

/// What to export, and how.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ExportOptions {
    /// The image.
    pub image: PathBuf,
    /// The format to write.
    pub format: ExportFormat,
    /// The file to write, or for [`ExportFormat::Memory`] the directory. `None` is standard
    /// output, which takes a stream only.
    pub to: Option<PathBuf>,
    /// Whether an existing file is replaced; a directory never is.
    pub force: bool,
}

impl ExportOptions {
    /// Exports `image` to standard output.
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
        (ExportFormat::Libvirt, Some(path)) => {
            let mut output = Output::file(path, options.force)?;
            let mut overlays = libvirt::write(&image, path, &mut output, &mut watch)?;
            let file_bytes = output.commit()?;
            overlays.keep();
            file_bytes
        }
        (ExportFormat::Memory, Some(_)) if options.force => {
            return Err(ExchangeError::ForceDirectory);
        }
        (ExportFormat::Memory, Some(path)) => memory::write(&image, path, &mut watch)?,
        (format, None) => return Err(ExchangeError::NeedsFile(format)),
    };
    let ram_bytes = image.manifest().blocks.iter().map(|block| block.len).sum();
    watch.tell(ExchangeEvent::Exported { ram_bytes, file_bytes });
    Ok(file_bytes)
}
