//! A guest whose memory QEMU maps from a flat image: nobody serves it. What is not
//! mapped, some small blocks and the device state, goes as an ordinary (precopy)
//! migration stream.

use std::io::Write;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::statfs::statfs;

use super::{
    FeedError, INCOMING, Outcome, Progress, RevertError, RevertEvent, RevertOptions, Start, Way,
    feed_error, socket_pair,
};
use crate::guest::{MappedMemory, RewriteOptions, StartPlan, VmError, rewrite};
use crate::image::{Cursor, Image, ImageError, Piece, Sections};
use crate::memory::FaultReport;
use crate::page::{BlockId, PAGE_SIZE, PageSource, Run};
use crate::qmp::Qmp;
use crate::wire::{Frame, end_of_ram, precopy_opening, tail};

/// How often QEMU is asked how far it is, beside its events.
const POLL: Duration = Duration::from_millis(5);

/// Blocks from this length on are mapped, in bytes.
const LARGE: u64 = 1 << 20;

/// What may be left to be sent while the guest waits for it, in bytes: video memory and
/// firmware. ARM's `virt` has 128 MiB of flash memory, most of which is zeros.
const MOST_SENT: u64 = 192 << 20;

/// File systems whose files come over a network or from another program (statfs(2)):
/// mapped memory would hang or fault where these do.
const NOT_LOCAL: [i64; 7] =
    [0x6969, 0x517b, 0xff53_4d42, 0xfe53_4d42, 0x6573_5546, 0x0102_1997, 0x00c3_6400];

/// Plans the start of QEMU, with the image's memory mapped where that is wanted and can
/// be had. Returns why it is or is not, where there was a choice.
pub(super) fn plan(
    image: &Image,
    options: &RevertOptions,
    rewriting: RewriteOptions,
) -> Result<(StartPlan, Option<String>), RevertError> {
    let machine = &image.manifest().machine;
    let wanted = options.delivery.way == Way::Map;
    let refused = |problem: String| RevertError::Vm(VmError::NotMapped { problem });
    let without = |reason| Ok((rewrite(machine, &rewriting)?, reason));
    if !wanted && (options.delivery.way != Way::Auto || image.manifest().flat.is_empty()) {
        return without(None);
    }
    let memory = match mapped_memory(image, options, wanted) {
        Ok(memory) => memory,
        Err(problem) if wanted => return Err(refused(problem)),
        Err(problem) => return without(Some(problem)),
    };
    let mapped = RewriteOptions { mapped: Some(memory), ..rewriting.clone() };
    let planned = rewrite(machine, &mapped).map_err(RevertError::from);
    match planned.and_then(|plan| left_small(image, plan)) {
        Ok(plan) => Ok((plan, None)),
        Err(RevertError::Vm(VmError::NotMapped { problem })) if !wanted => without(Some(problem)),
        Err(error) => Err(error),
    }
}

/// Holds a plan to what mapping promises: that hardly anything has to be sent.
fn left_small(image: &Image, plan: StartPlan) -> Result<StartPlan, RevertError> {
    let blocks = image.manifest().blocks.iter();
    let left = || blocks.clone().filter(|block| !plan.mapped.contains(&block.name));
    if left().map(|block| block.len).sum::<u64>() <= MOST_SENT {
        return Ok(plan);
    }
    let names: Vec<&str> = left().filter(|b| b.len >= LARGE).map(|b| b.name.as_str()).collect();
    let problem = format!("the command line gives no place to map {}", names.join(", "));
    Err(VmError::NotMapped { problem }.into())
}

/// What of an image can be mapped, or why nothing can.
fn mapped_memory(
    image: &Image,
    options: &RevertOptions,
    wanted: bool,
) -> Result<MappedMemory, String> {
    let manifest = image.manifest();
    if manifest.flat.is_empty() {
        return Err("the image has another layout (`snapback flatten --layout flat` makes a flat \
                    one of it)"
            .into());
    }
    if options.rewrite.isolated || options.delivery.hold.is_some() {
        return Err("a working set can only be seen where memory is served".into());
    }
    if options.rewrite.qemu.is_some() && !wanted {
        return Err("the version of the QEMU given by --qemu is not known".into());
    }
    let file = image.path().ok_or("the image is not a file")?;
    let file = std::path::absolute(file).map_err(|e| e.to_string())?;
    if !wanted && !is_local(&file) {
        return Err("the image is not on a local file system".into());
    }
    let small_pages = |page_size: u64| page_size == PAGE_SIZE as u64;
    let blocks = manifest.blocks.iter().zip(&manifest.flat);
    let blocks = blocks
        .filter(|(block, _)| block.len >= LARGE && small_pages(block.page_size))
        .map(|(block, offset)| (block.name.clone(), block.len, *offset))
        .collect();
    Ok(MappedMemory { file, qemu: manifest.machine.qemu.clone(), blocks })
}

fn is_local(file: &Path) -> bool {
    statfs(file).is_ok_and(|fs| !NOT_LOCAL.contains(&fs.filesystem_type().0))
}

/// The stream for QEMU: everything but the blocks that it maps.
pub(super) struct Mapped {
    stream: Vec<u8>,
}

impl Mapped {
    /// Reads from the image what is sent.
    pub fn new(
        image: &Arc<Image>,
        sections: &Sections,
        mapped: &[String],
    ) -> Result<Mapped, ImageError> {
        let blocks = image.blocks();
        let mut stream = precopy_opening(&sections.config, blocks);
        let mut frame = Frame::default();
        for (block, id) in blocks.iter().zip((0..).map(BlockId)) {
            if mapped.contains(&block.name) {
                continue;
            }
            let all = Run { block: id, first: 0, count: block.pages() };
            let mut pages = Cursor::over(image, all)?;
            while let Some(piece) = pages.next_piece()? {
                stream.extend_from_slice(match piece {
                    Piece::Zeros(run) => frame.zeros(block, run),
                    Piece::Data(run, bytes) => frame.pages(block, run, bytes.as_chunks().0.iter()),
                });
            }
        }
        stream.extend_from_slice(&end_of_ram());
        stream.extend_from_slice(&tail(&sections.devices, &[]));
        Ok(Mapped { stream })
    }

    /// Writes the stream, and closes it: QEMU would wait for a description behind it.
    fn send(&self, mut socket: UnixStream) {
        // That QEMU hangs up is told by QEMU, with its reason.
        let _ = socket.write_all(&self.stream);
        let _ = socket.shutdown(Shutdown::Both);
    }

    /// Gives QEMU its guest, and returns once that runs, or could.
    pub async fn bring(
        self,
        image: &Image,
        qmp: &Qmp,
        start: Start,
        on_event: &mut impl FnMut(RevertEvent),
    ) -> Result<Outcome, RevertError> {
        let (ours, theirs) = socket_pair()?;
        let mut events = qmp.events();
        let sending = std::thread::Builder::new().name("send".into());
        let sending = sending.spawn(move || self.send(ours)).map_err(FeedError::Thread);
        sending.map_err(feed_error)?;
        qmp.getfd(INCOMING, theirs.as_fd()).await?;
        drop(theirs);
        qmp.migrate_incoming(&format!("fd:{INCOMING}")).await?;
        let reason = "the image is flat: nothing is left to serve".to_owned();
        on_event(RevertEvent::Placing { way: Way::Map, reason });
        let mut tick = tokio::time::interval(POLL);
        loop {
            tokio::select! {
                event = events.next() => if event?.name == "RESUME" { break },
                _ = tick.tick() => match qmp.migration_info().await?.status.as_deref() {
                    Some("completed") => match start {
                        Start::StaysPaused => break,
                        Start::WhenPreloaded => qmp.cont().await?,
                        // QEMU lets the guest go before it says so.
                        Start::Runs => match qmp.status().await? {
                            status if status == "running" => break,
                            status => return Err(not_run(status)),
                        },
                    },
                    Some(status @ "failed") => return Err(not_run(status.into())),
                    _ => {}
                },
            }
        }
        let total = image.manifest().blocks.iter().map(|block| block.pages()).sum();
        let progress = Progress { pages: total, total, requests: 0 };
        Ok(Outcome { progress, faults: FaultReport::none(), way: Way::Map })
    }
}

fn not_run(status: String) -> RevertError {
    RevertError::NotRun { status, qemu: String::new() }
}
