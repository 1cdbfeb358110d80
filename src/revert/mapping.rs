//! A guest whose memory QEMU maps from a flat image: nobody serves it. What is not
//! mapped, some small blocks and the device state, goes as an ordinary (precopy)
//! migration stream.

use std::io::{self, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use nix::sys::statfs::statfs;

use super::error::RevertError;
use super::options::{Placement, RevertOptions};
use crate::guest::{GuestError, MappedMemory, RewriteOptions, StartPlan, rewrite};
use crate::image::{Cursor, Image, ImageError, Piece};
use crate::page::{BlockId, PAGE_SIZE, PageSource, Run};
use crate::wire::{Frame, end_of_ram, precopy_opening, tail};

/// Blocks from this length on are mapped, in bytes.
const LARGE: u64 = 1 << 20;

/// The most bytes that may have to be sent while the guest waits for them: video memory and
/// firmware. ARM's `virt` has 128 MiB of flash memory, most of which is zeros.
const MOST_SENT: u64 = 192 << 20;

/// File systems whose files come over a network or from another program (statfs(2)):
/// mapped memory would hang or fault where these do.
const NOT_LOCAL: [i64; 7] =
    [0x6969, 0x517b, 0xff53_4d42, 0xfe53_4d42, 0x6573_5546, 0x0102_1997, 0x00c3_6400];

/// Why memory is not mapped of a guest that is to be reset, unless that is asked for.
const SERVED: &str = "a reset has to look at all mapped memory that was ever written: it is mapped \
                      only if that is asked for";

/// Why memory is not mapped where libvirt starts the guest.
const READABLE: &str = "libvirt's QEMU would have to be able to read the image, which is not known: \
                        it is mapped only if that is asked for";

/// Plans the start of QEMU, with the image's memory mapped where that is wanted and possible.
/// Returns also why a flat image is not mapped, where that was left to us.
pub(super) fn plan(
    image: &Image,
    options: &RevertOptions,
    rewriting: RewriteOptions,
) -> Result<(StartPlan, Option<String>), RevertError> {
    let machine = &image.manifest().machine;
    let wanted = options.delivery.placement == Placement::Map;
    let refused = |problem: String| RevertError::Vm(GuestError::NotMapped { problem });
    let without = |reason| Ok((rewrite(machine, &rewriting)?, reason));
    if !wanted
        && (options.delivery.placement != Placement::Auto || image.manifest().flat.is_empty())
    {
        return without(None);
    }
    if options.resettable && !wanted {
        return without(Some(SERVED.to_owned()));
    }
    let memory = match mapped_memory(image, options, wanted) {
        Ok(memory) => memory,
        Err(problem) if wanted => return Err(refused(problem)),
        Err(problem) => return without(Some(problem)),
    };
    let mapped = RewriteOptions { mapped: Some(memory), ..rewriting.clone() };
    let planned = rewrite(machine, &mapped).map_err(RevertError::from);
    let planned = planned.and_then(|plan| {
        let mapped: Vec<&str> = plan.mapped.iter().map(String::as_str).collect();
        check_left(image, &mapped).map(|()| plan)
    });
    match planned {
        Ok(plan) => Ok((plan, None)),
        Err(RevertError::Vm(GuestError::NotMapped { problem })) if !wanted => {
            without(Some(problem))
        }
        Err(error) => Err(error),
    }
}

/// What of an image is mapped where libvirt starts its guest. Returns also why it is not, where
/// that was left to us.
///
/// # Errors
/// When it can't be, and was asked for.
pub(super) fn for_domain(
    image: &Image,
    options: &RevertOptions,
) -> Result<(Option<MappedMemory>, Option<String>), RevertError> {
    if options.delivery.placement != Placement::Map {
        let is_flat = !image.manifest().flat.is_empty();
        let left_to_us = options.delivery.placement == Placement::Auto && is_flat;
        return Ok((None, left_to_us.then(|| READABLE.to_owned())));
    }
    let memory = mapped_memory(image, options, true);
    let memory = memory.map_err(|problem| GuestError::NotMapped { problem })?;
    Ok((Some(memory), None))
}

/// Checks that hardly anything has to be sent, which is what mapping promises.
///
/// # Errors
/// When more has to be.
pub(super) fn check_left(image: &Image, mapped: &[&str]) -> Result<(), RevertError> {
    let blocks = image.manifest().blocks.iter();
    let left = || blocks.clone().filter(|block| !mapped.contains(&block.name.as_str()));
    if left().map(|block| block.len).sum::<u64>() <= MOST_SENT {
        return Ok(());
    }
    let names: Vec<&str> = left().filter(|b| b.len >= LARGE).map(|b| b.name.as_str()).collect();
    let problem = format!("the command line gives no place to map {}", names.join(", "));
    Err(GuestError::NotMapped { problem }.into())
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
        return Err("the version of another QEMU than the recorded one is not known".into());
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

/// The RAM that QEMU does not map, as an ordinary stream has it between its configuration and its
/// devices. `mapped` are the names of blocks in the image and in QEMU.
pub(super) fn unmapped_ram(
    image: &Arc<Image>,
    mapped: &[(String, String)],
) -> Result<Vec<u8>, ImageError> {
    let blocks = image.blocks();
    let in_qemu = |name: &str| mapped.iter().find(|(block, _)| block == name);
    let mut named = blocks.to_vec();
    for block in &mut named {
        if let Some((_, name)) = in_qemu(&block.name) {
            block.name.clone_from(name);
        }
    }
    let mut stream = precopy_opening(&[], &named);
    let mut frame = Frame::default();
    for (block, id) in blocks.iter().zip((0..).map(BlockId)) {
        if in_qemu(&block.name).is_some() {
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
    Ok(stream)
}

/// The stream for QEMU: everything but the blocks that it maps.
pub(super) struct MappedStream {
    stream: Vec<u8>,
}

impl MappedStream {
    /// Reads from the image what is sent. `config` and `devices` are the saved stream's; `mapped`
    /// are the names of blocks in the image and in QEMU.
    pub fn new(
        image: &Arc<Image>,
        config: &[u8],
        devices: &[u8],
        mapped: &[(String, String)],
    ) -> Result<MappedStream, ImageError> {
        let stream = [config, &unmapped_ram(image, mapped)?, &tail(devices, &[])].concat();
        Ok(MappedStream { stream })
    }

    /// Has a thread write the stream, and close it: QEMU would wait for a description behind
    /// it. That QEMU hangs up is told by QEMU, with its reason.
    ///
    /// # Errors
    /// When the thread can't be started.
    pub fn send(self, mut socket: UnixStream) -> io::Result<()> {
        let send = move || {
            let _ = socket.write_all(&self.stream);
            let _ = socket.shutdown(Shutdown::Both);
        };
        std::thread::Builder::new().name("send".into()).spawn(send).map(drop)
    }
}
