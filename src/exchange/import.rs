//! A file of another program converted to an image.

use std::fs::File;
use std::io::{self, Cursor, Read};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use super::decompress::Decompressed;
use super::libvirt::{Compressed, LibvirtHeader};
use super::patient::Patient;
use super::stream::{self, Received};
use super::{ExchangeError, ExchangeEvent, Watch, native};
use crate::cancel::Cancellation;
use crate::guest::{Board, describe, describe_foreign, named_machine_type};
use crate::image::{Compression, Details, ImageError, Saved, WriterOptions, check_replaces_none};
use crate::libvirt::without_our_arguments;
use crate::machine::Machine;
use crate::wire::{StreamReader, run_state};

/// First bytes of a migration stream, mapped-ram or not.
const STREAM_MAGIC: &[u8] = b"QEVM";

/// What to import, and how.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ImportOptions {
    /// The file: a migration stream, a mapped-ram file, or a guest saved by libvirt.
    /// Standard input without one.
    pub from: Option<PathBuf>,
    /// The image to write.
    pub image: PathBuf,
    /// QEMU's command line as the guest had it, the program first. Assignments of
    /// environment variables may stand before it.
    pub command: Vec<String>,
    /// The QEMU binary to record instead of the one on the command line.
    pub qemu: Option<PathBuf>,
    /// Whether the guest runs after a revert even if it was stopped when it was written.
    pub run: bool,
    /// How memory is stored.
    pub compression: Compression,
    /// Whether an existing image is replaced.
    pub force: bool,
}

impl ImportOptions {
    /// Imports from standard input to `image`, compressed by zstd at level 1, with no
    /// command line given.
    pub fn new(image: impl Into<PathBuf>) -> ImportOptions {
        ImportOptions {
            from: None,
            image: image.into(),
            command: Vec::new(),
            qemu: None,
            run: false,
            compression: Compression::Zstd(1),
            force: false,
        }
    }
}

/// Converts a guest that another program has saved to an image.
///
/// # Errors
/// When the file is of no known format, damaged or incomplete, or when the command
/// line is not the guest's. No image is left then.
pub fn import(
    options: &ImportOptions,
    cancel: &Cancellation,
    on_event: &mut dyn FnMut(ExchangeEvent),
) -> Result<Saved, ExchangeError> {
    let mut watch = Watch::new(cancel, on_event);
    let source = Source::open(options.from.as_deref())?;
    check_replaces_none(&options.image, [(source.path.as_path(), &source.input)])?;
    let machine = record(options, &source, &mut watch);
    // A program that was ended by cancellation has not failed.
    watch.check()?;
    let machine = machine?;
    let moment_unix_us = source.moment();
    let libvirt = source.libvirt.clone();

    let mut machine_type = String::new();
    let check = |found: &str| {
        machine_type = found.to_owned();
        check_machine_type(&machine, found)
    };
    let writer = WriterOptions {
        compression: options.compression,
        force: options.force,
        ..WriterOptions::default()
    };
    let received = source.read((&options.image, writer), check, &mut watch);
    watch.check()?;
    let Received { writer, mut sections } = received?;

    let state = run_state::get(&sections.devices);
    let ran = state.as_deref().is_none_or(|state| state == "running");
    let running = ran || options.run || libvirt.as_ref().is_some_and(|found| found.was_running);
    // QEMU leaves a guest that was stopped as it was.
    if running && !ran && !run_state::set_running(&mut sections.devices) {
        return Err(ExchangeError::NoRunState);
    }
    if !running {
        let state = state.unwrap_or_default();
        watch.tell(ExchangeEvent::Note {
            what: format!(
                "the guest was `{state}` when it was written, and will be after a revert \
                 (`ImportOptions::run` has it run)"
            ),
        });
    }
    let libvirt_xml = libvirt.map(|found| found.xml);
    let machine = Machine { machine_type: machine_type.clone(), running, libvirt_xml, ..machine };
    let details = Details { machine, moment_unix_us, pause_us: None };
    let saved = writer.finish(details, sections).map_err(|error| match error {
        ImageError::Interrupted(_) => ExchangeError::Interrupted,
        error => error.into(),
    })?;
    let Saved { data_pages: pages, zero_pages, image_bytes, .. } = saved;
    watch.tell(ExchangeEvent::Imported { machine_type, running, pages, zero_pages, image_bytes });
    Ok(saved)
}

/// The machine, from the given command line, or the one that libvirt derives from its XML.
fn record(
    options: &ImportOptions,
    source: &Source,
    watch: &mut Watch<'_>,
) -> Result<Machine, ExchangeError> {
    let qemu = options.qemu.as_deref();
    if !options.command.is_empty() {
        return Ok(describe(&options.command, qemu, watch.cancel)?);
    }
    let Some(libvirt) = &source.libvirt else {
        return Err(ExchangeError::NoCommandLine { what: "migration stream", why: String::new() });
    };
    let words = native::command_line(&libvirt.xml, watch.cancel).map_err(|why| {
        let (what, why) = ("guest saved by libvirt", format!("; {why}"));
        ExchangeError::NoCommandLine { what, why }
    })?;
    let what = "the command line is what `virsh domxml-to-native` makes of the guest's XML";
    watch.tell(ExchangeEvent::Note { what: what.into() });
    let words = without_our_arguments(words, &libvirt.xml);
    Ok(describe_foreign(&words, qemu, watch.cancel)?)
}

/// Device state is right for its own machine type only: whether the command line has
/// the same, and whether its QEMU knows it. An alias such as `pc`, which means another type
/// in every version, is replaced by the right one at a revert.
fn check_machine_type(machine: &Machine, found: &str) -> Result<(), ExchangeError> {
    if let Some(given) = named_machine_type(&machine.argv) {
        let alias = Board::of(found).map(Board::alias);
        if given != found && Some(given.as_str()) != alias {
            return Err(ExchangeError::MachineType { given, stream: found.to_owned() });
        }
    }
    let number = |text: &str| text.parse::<u32>().ok();
    let version = found.rsplit('-').next().and_then(|version| version.split_once('.'));
    let version = version.and_then(|(major, minor)| Some((number(major)?, number(minor)?)));
    match version {
        Some(needed) if needed > (machine.qemu.major, machine.qemu.minor) => {
            Err(ExchangeError::OldQemu {
                machine_type: found.to_owned(),
                qemu: machine.qemu.to_string(),
            })
        }
        _ => Ok(()),
    }
}

/// What is imported, opened and looked at.
struct Source {
    /// How messages name it.
    path: PathBuf,
    /// The file, or a copy of standard input. It stands behind `begins`, or behind
    /// libvirt's header.
    input: File,
    is_file: bool,
    begins: [u8; 16],
    libvirt: Option<LibvirtHeader>,
}

impl Source {
    fn open(path: Option<&Path>) -> Result<Source, ExchangeError> {
        let (path, mut input, is_file) = match path {
            Some(path) => {
                let input = File::open(path).map_err(ExchangeError::io("open", path))?;
                let metadata = input.metadata().map_err(ExchangeError::io("look at", path))?;
                (path.to_owned(), input, metadata.is_file())
            }
            None => {
                let path = Path::new("standard input");
                let copy = io::stdin().as_fd().try_clone_to_owned();
                (path.to_owned(), copy.map_err(ExchangeError::io("read", path))?.into(), false)
            }
        };
        let mut begins = [0; 16];
        input
            .read_exact(&mut begins)
            .map_err(ExchangeError::io("read the first bytes of", &path))?;
        let libvirt = match LibvirtHeader::starts_with(&begins) {
            true => {
                let header = LibvirtHeader::read(&begins, &mut input);
                Some(header.map_err(LibvirtHeader::failed(&path))?)
            }
            false if begins.starts_with(STREAM_MAGIC) => None,
            false => {
                let begins = String::from_utf8_lossy(&begins).into_owned();
                return Err(ExchangeError::Foreign { path, begins });
            }
        };
        Ok(Source { path, input, is_file, begins, libvirt })
    }

    /// When the guest was saved, as far as the file tells: when it was last written.
    fn moment(&self) -> u64 {
        let written = self.input.metadata().and_then(|metadata| metadata.modified());
        let moment = written.ok().filter(|_| self.is_file).unwrap_or_else(SystemTime::now);
        let since = moment.duration_since(UNIX_EPOCH).unwrap_or_default();
        u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
    }

    /// Reads the stream, whatever it is wrapped in.
    fn read(
        self,
        image: (&Path, WriterOptions),
        check: impl FnOnce(&str) -> Result<(), ExchangeError>,
        watch: &mut Watch<'_>,
    ) -> Result<Received, ExchangeError> {
        let (path, cancel) = (&self.path, watch.cancel);
        match self.libvirt.as_ref().map(|found| found.compressed) {
            None if self.is_file => {
                let stream = StreamReader::of_file(rewound(&self.input, path)?);
                stream::read(stream, Some(&self.input), path, image, check, watch)
            }
            None => {
                let input = Cursor::new(self.begins).chain(Patient::new(self.input, cancel));
                stream::read(StreamReader::new(input), None, path, image, check, watch)
            }
            // The places in it are counted from the beginning of the file.
            Some(Compressed::Sparse) if self.is_file => {
                let at = self.libvirt.as_ref().map_or(0, |found| found.stream_at);
                let stream = StreamReader::of_file_from(&self.input, at);
                stream::read(stream, Some(&self.input), path, image, check, watch)
            }
            Some(Compressed::Raw | Compressed::Sparse) => {
                let stream = StreamReader::new(Patient::new(self.input, cancel));
                stream::read(stream, None, path, image, check, watch)
            }
            Some(Compressed::Zstd) => {
                let input = zstd::Decoder::new(Patient::new(self.input, cancel));
                let input = input.map_err(ExchangeError::io("decompress", path))?;
                stream::read(StreamReader::new(input), None, path, image, check, watch)
            }
            Some(Compressed::By(tool)) => {
                let mut input = Decompressed::start(tool, self.input, path, cancel)?;
                let stream = StreamReader::new(&mut input);
                let received = stream::read(stream, None, path, image, check, watch);
                // The program's message explains why its output was no stream.
                let ended = matches!(received, Ok(_) | Err(ExchangeError::Stream { .. }));
                if ended && !cancel.is_requested() {
                    input.end()?;
                }
                received
            }
        }
    }
}

/// The file, to be read from its first byte on.
fn rewound<'a>(file: &'a File, path: &Path) -> Result<&'a File, ExchangeError> {
    use std::io::Seek;
    let mut file = file;
    file.rewind().map_err(ExchangeError::io("read", path))?;
    Ok(file)
}
