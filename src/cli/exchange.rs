//! `export` and `import`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};

use super::cancellation;
use super::failure::Failure;
use super::output::Output;
use super::writing::{WriteArgs, WriteImageArgs};
use crate::cancel::Cancellation;
use crate::exchange::{
    ExchangeError, ExchangeEvent, ExportFormat, ExportOptions, ImportOptions, export as write,
    import as read, words,
};
use crate::kind::ErrorKind;

/// How long an interrupted export or import through a pipe has to end. It takes longer only
/// where it waits for the other end of the pipe, which may never come.
const CLEAN_UP: Duration = Duration::from_secs(2);

/// The longest file with a command line that is read, in bytes; the rest is ignored.
const MAX_COMMAND_BYTES: u64 = 4 << 20;

#[derive(Args)]
pub(super) struct ExportArgs {
    /// The image
    image: PathBuf,
    /// The format to write
    #[arg(long = "to", value_name = "FORMAT")]
    format: Format,
    /// The file to write (for memory: the directory); - for standard output
    file: PathBuf,
    #[command(flatten)]
    pub write: WriteArgs,
}

#[derive(Args)]
pub(super) struct ImportArgs {
    /// A migration stream, a mapped-ram file, or a guest saved by libvirt; - for
    /// standard input
    file: PathBuf,
    /// The image to write
    image: PathBuf,
    /// A file with QEMU's command line, as a shell or /proc/PID/cmdline has it
    #[arg(long, value_name = "FILE", conflicts_with = "words")]
    command: Option<PathBuf>,
    /// The QEMU binary to record instead of the one on the command line
    #[arg(long, value_name = "BIN")]
    qemu: Option<PathBuf>,
    /// Let the guest run after a revert even if it was stopped when it was written
    #[arg(long)]
    run: bool,
    #[command(flatten)]
    pub written: WriteImageArgs,
    /// QEMU's command line, as the guest had it
    #[arg(last = true, value_name = "QEMU ARGS")]
    words: Vec<String>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Format {
    /// A migration stream, which any QEMU that knows the machine type loads
    Stream,
    /// A mapped-ram file, which QEMU 9.0 and later loads
    MappedRam,
    /// Plain memory: a directory with a sparse file for each block
    #[value(alias = "flat")]
    Memory,
    /// An ELF core of physical memory, for crash, gdb and readelf
    Elf,
    /// A saved domain, for virsh restore
    Libvirt,
}

impl From<Format> for ExportFormat {
    fn from(format: Format) -> ExportFormat {
        match format {
            Format::Stream => ExportFormat::Stream,
            Format::MappedRam => ExportFormat::MappedRam,
            Format::Memory => ExportFormat::Memory,
            Format::Elf => ExportFormat::Elf,
            Format::Libvirt => ExportFormat::Libvirt,
        }
    }
}

/// A file, unless it is `-`.
fn named(path: PathBuf) -> Option<PathBuf> {
    Some(path).filter(|path| path.as_os_str() != "-")
}

pub(super) async fn export(args: ExportArgs) -> Result<(), Failure> {
    let options = ExportOptions {
        to: named(args.file),
        force: args.write.force,
        ..ExportOptions::new(args.image, args.format.into())
    };
    let (output, to_standard) = (Output::new(args.write.json), options.to.is_none());
    let tell = move |event| match event {
        _ if !to_standard => output.exchange(&event),
        // Standard output is the export's: no events, but a bar.
        ExchangeEvent::Progress { pages, total } => output.advance(pages, total, String::new()),
        _ => output.finish_bar(),
    };
    let give_up = to_standard.then_some(CLEAN_UP);
    run(cancellation()?, give_up, move |cancel| write(&options, cancel, &mut { tell }).map(drop))
        .await
}

pub(super) async fn import(args: ImportArgs) -> Result<(), Failure> {
    let command = match &args.command {
        None => args.words,
        Some(path) => {
            let doing = format!("reading the command line in `{}` failed", path.display());
            words(&read_text(path).map_err(|e| Failure::io(&doing, &e))?)
                .map_err(|e| Failure::new(ErrorKind::CommandLineInvalid, &doing, &e))?
        }
    };
    let options = ImportOptions {
        from: named(args.file),
        command,
        qemu: args.qemu,
        run: args.run,
        compression: args.written.compress,
        force: args.written.write.force,
        ..ImportOptions::new(args.image)
    };
    let output = Output::new(args.written.write.json);
    let is_file = |path: &PathBuf| path.metadata().is_ok_and(|metadata| metadata.is_file());
    let give_up = (!options.from.as_ref().is_some_and(is_file)).then_some(CLEAN_UP);
    let work = move |cancel: &Cancellation| {
        read(&options, cancel, &mut |event| output.exchange(&event)).map(drop)
    };
    run(cancellation()?, give_up, work).await
}

fn read_text(path: &PathBuf) -> std::io::Result<String> {
    use std::io::Read;
    let mut text = String::new();
    std::fs::File::open(path)?.take(MAX_COMMAND_BYTES).read_to_string(&mut text)?;
    Ok(text)
}

/// Runs blocking work; an interrupt cancels it. The work is waited for, since it removes what
/// it has written; for `give_up` at most where it may never notice.
async fn run(
    cancel: Cancellation,
    give_up: Option<Duration>,
    work: impl FnOnce(&Cancellation) -> Result<(), ExchangeError> + Send + 'static,
) -> Result<(), Failure> {
    let mut task = tokio::task::spawn_blocking({
        let cancel = cancel.clone();
        move || work(&cancel)
    });
    let ended = tokio::select! {
        ended = &mut task => ended,
        () = cancel.requested() => match give_up {
            None => task.await,
            Some(limit) => match tokio::time::timeout(limit, &mut task).await {
                Ok(ended) => ended,
                Err(_) => return Err(ExchangeError::Interrupted.into()),
            },
        }
    };
    Ok(ended.unwrap_or_else(|e| std::panic::resume_unwind(e.into_panic()))?)
}

impl Output {
    fn exchange(&self, event: &ExchangeEvent) {
        if self.is_json() {
            return self.print_json(event);
        }
        use super::output::size;
        match event {
            ExchangeEvent::Note { what } => self.say("note", what),
            ExchangeEvent::Progress { pages, total } => self.advance(*pages, *total, String::new()),
            ExchangeEvent::Exported { ram_bytes, file_bytes } => {
                self.finish_bar();
                let (ram, file) = (size(*ram_bytes), size(*file_bytes));
                self.say("exported", &format!("{ram} of memory in {file}"));
            }
            ExchangeEvent::Imported { machine_type, running, pages, zero_pages, image_bytes } => {
                self.finish_bar();
                let bytes = |pages: &u64| size(pages * crate::page::PAGE_SIZE as u64);
                let state = if *running { "running" } else { "stopped" };
                self.say(
                    "imported",
                    &format!(
                        "a {state} {machine_type}, {} and {} of zeros in {}",
                        bytes(pages),
                        bytes(zero_pages),
                        size(*image_bytes)
                    ),
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::mpsc::channel;

    use super::*;

    #[tokio::test]
    async fn only_what_may_never_end_is_given_up() {
        let cancel = Cancellation::new();
        cancel.request();
        let cleaned_up = Arc::new(AtomicBool::new(false));
        let work = {
            let cleaned_up = Arc::clone(&cleaned_up);
            move |cancel: &Cancellation| {
                while !cancel.is_requested() {
                    std::thread::yield_now();
                }
                cleaned_up.store(true, Ordering::Relaxed);
                Err(ExchangeError::Interrupted)
            }
        };
        assert!(run(cancel.clone(), None, work).await.is_err());
        assert!(cleaned_up.load(Ordering::Relaxed));

        let (release, held) = channel::<()>();
        let work = move |_: &Cancellation| {
            let _ = held.recv();
            Ok(())
        };
        assert!(run(cancel, Some(Duration::ZERO), work).await.is_err());
        drop(release);
    }
}
