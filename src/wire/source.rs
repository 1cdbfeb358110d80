//! What a postcopy source sends: opening, package, pages, closing.
//!
//! The order is that of QEMU's own source (`migration/migration.c`,
//! `postcopy_start`), with nothing in the precopy phase but the block list:
//!
//! 1. [`Opening`]: header, OPEN_RETURN_PATH, PING, POSTCOPY_ADVISE, the block
//!    list, RAM_DISCARD of every block. Without a discard, LISTEN itself puts QEMU
//!    back into the "discard" state, and pages are written in place instead of
//!    being installed.
//! 2. [`package`]: LISTEN and all device state in *one* package, since once LISTEN
//!    has run another thread of QEMU's owns the stream; RUN ends it.
//! 3. [`Frame`]s of pages, each page at most once.
//! 4. [`closing`].

use super::{RAM_SECTION_VERSION, command, ram_flag, section};
use crate::page::{Block, PAGE_SIZE, PageBytes, Run};

/// The section number under which RAM is announced. Device sections keep the numbers that
/// QEMU gave them, counting from 0; RAM's must be none of these: while one thread of QEMU loads
/// devices, another finds the handler of RAM's parts by that number.
pub(super) const RAM_SECTION: u32 = 0x4000_0000;

/// `postcopy_ram_discard_version` in `migration/savevm.c`.
const DISCARD_VERSION: u8 = 0;

fn push_command(out: &mut Vec<u8>, command: u16, data: &[u8]) {
    out.push(section::COMMAND);
    out.extend_from_slice(&command.to_be_bytes());
    out.extend_from_slice(&(data.len() as u16).to_be_bytes());
    out.extend_from_slice(data);
}

pub(super) fn push_name(out: &mut Vec<u8>, name: &str) {
    debug_assert!(name.len() <= 255);
    out.push(name.len() as u8);
    out.extend_from_slice(name.as_bytes());
}

pub(super) fn push_end_of_ram_section(out: &mut Vec<u8>) {
    out.extend_from_slice(&ram_flag::EOS.to_be_bytes());
    out.push(section::FOOTER);
    out.extend_from_slice(&RAM_SECTION.to_be_bytes());
}

/// What comes before the package.
#[derive(Debug)]
pub struct Opening<'a> {
    /// The saved stream's header and configuration section.
    pub config: &'a [u8],
    /// The saved stream's block list.
    pub blocks: &'a [Block],
    /// The value of the PING, which comes back as a PONG.
    pub ping: u32,
    /// The host's page size in bytes: a block's page size is sent only if it differs from this (`ram_save_setup` in `migration/ram.c`).
    pub host_page_size: u64,
}

impl Opening<'_> {
    /// The bytes to send.
    pub fn bytes(&self) -> Vec<u8> {
        let mut out = self.config.to_vec();
        push_command(&mut out, command::OPEN_RETURN_PATH, &[]);
        push_command(&mut out, command::PING, &self.ping.to_be_bytes());
        let page_sizes = self.blocks.iter().fold(0, |sizes, block| sizes | block.page_size);
        let mut advise = page_sizes.to_be_bytes().to_vec();
        advise.extend_from_slice(&(PAGE_SIZE as u64).to_be_bytes());
        push_command(&mut out, command::POSTCOPY_ADVISE, &advise);
        push_ram_start(&mut out, self.blocks);
        for block in self.blocks {
            push_name(&mut out, &block.name);
            out.extend_from_slice(&block.len.to_be_bytes());
            if block.page_size != self.host_page_size {
                out.extend_from_slice(&block.page_size.to_be_bytes());
            }
        }
        push_end_of_ram_section(&mut out);
        for block in self.blocks {
            let mut discard = vec![DISCARD_VERSION];
            push_name(&mut discard, &block.name);
            discard.push(0);
            discard.extend_from_slice(&0u64.to_be_bytes());
            discard.extend_from_slice(&block.len.to_be_bytes());
            push_command(&mut out, command::POSTCOPY_RAM_DISCARD, &discard);
        }
        out
    }
}

/// The `ram` START section up to its list of blocks.
pub(super) fn push_ram_start(out: &mut Vec<u8>, blocks: &[Block]) {
    out.push(section::START);
    out.extend_from_slice(&RAM_SECTION.to_be_bytes());
    push_name(out, "ram");
    out.extend_from_slice(&0u32.to_be_bytes());
    out.extend_from_slice(&RAM_SECTION_VERSION.to_be_bytes());
    let total: u64 = blocks.iter().map(|block| block.len).sum();
    out.extend_from_slice(&(total | ram_flag::MEM_SIZE).to_be_bytes());
}

/// What an ordinary (precopy) stream has before its pages. It holds no page sizes.
pub fn precopy_opening(config: &[u8], blocks: &[Block]) -> Vec<u8> {
    let mut out = config.to_vec();
    push_ram_start(&mut out, blocks);
    for block in blocks {
        push_name(&mut out, &block.name);
        out.extend_from_slice(&block.len.to_be_bytes());
    }
    push_end_of_ram_section(&mut out);
    out
}

/// The `ram` END section, behind which a precopy stream has its devices.
pub fn end_of_ram() -> Vec<u8> {
    let mut out = vec![section::END];
    out.extend_from_slice(&RAM_SECTION.to_be_bytes());
    push_end_of_ram_section(&mut out);
    out
}

/// What an ordinary stream has behind its RAM: devices, the end-of-file mark, and the
/// description where there is one.
pub fn tail(devices: &[u8], vmdesc: &[u8]) -> Vec<u8> {
    let mut out = devices.to_vec();
    out.push(section::EOF);
    if !vmdesc.is_empty() {
        out.push(section::VMDESCRIPTION);
        out.extend_from_slice(&(vmdesc.len() as u32).to_be_bytes());
        out.extend_from_slice(vmdesc);
    }
    out
}

/// The package that starts the guest: LISTEN, a PING with `listening` (answered
/// once QEMU's userfaultfd is set up), the device state, a PING with `loaded`
/// (answered once it is in), RUN. No end-of-file mark and no description inside.
pub fn package(devices: &[u8], listening: u32, loaded: u32) -> Vec<u8> {
    let mut inner = Vec::with_capacity(devices.len() + 64);
    push_command(&mut inner, command::POSTCOPY_LISTEN, &[]);
    push_command(&mut inner, command::PING, &listening.to_be_bytes());
    inner.extend_from_slice(devices);
    push_command(&mut inner, command::PING, &loaded.to_be_bytes());
    push_command(&mut inner, command::POSTCOPY_RUN, &[]);

    let mut out = Vec::with_capacity(inner.len() + 16);
    push_command(&mut out, command::PACKAGED, &(inner.len() as u32).to_be_bytes());
    out.append(&mut inner);
    out
}

/// The command that has the destination open the return path. It loads an ordinary stream as
/// well as a postcopy one behind it (`loadvm_process_command` in QEMU's `migration/savevm.c`).
pub fn open_return_path() -> Vec<u8> {
    let mut out = Vec::new();
    push_command(&mut out, command::OPEN_RETURN_PATH, &[]);
    out
}

/// A PING, which is answered by a PONG once everything sent before it has been loaded.
pub fn ping(value: u32) -> Vec<u8> {
    let mut out = Vec::new();
    push_command(&mut out, command::PING, &value.to_be_bytes());
    out
}

/// Asks a destination whose postcopy was interrupted which pages of a block it has received. The
/// answer is [`ReturnPathMessage::Received`](super::ReturnPathMessage::Received).
pub fn received_bitmap(block: &str) -> Vec<u8> {
    let mut name = Vec::new();
    push_name(&mut name, block);
    let mut out = Vec::new();
    push_command(&mut out, command::RECV_BITMAP, &name);
    out
}

/// Has a destination whose postcopy was interrupted go on with this stream. It answers by
/// [`ReturnPathMessage::Resumed`](super::ReturnPathMessage::Resumed), and asks again for all
/// pages that it has asked for and not received.
pub fn resume() -> Vec<u8> {
    let mut out = Vec::new();
    push_command(&mut out, command::POSTCOPY_RESUME, &[]);
    out
}

/// The end of everything: the `ram` END section and the end-of-file mark.
pub fn closing() -> Vec<u8> {
    let mut out = end_of_ram();
    out.push(section::EOF);
    out
}

/// Builds `ram` PART sections, in a buffer that is reused.
#[derive(Debug, Default)]
pub struct Frame {
    bytes: Vec<u8>,
}

impl Frame {
    /// Starts the section for the pages of one run.
    fn start(&mut self) {
        self.bytes.clear();
        self.bytes.push(section::PART);
        self.bytes.extend_from_slice(&RAM_SECTION.to_be_bytes());
    }

    fn record(&mut self, block: &Block, run: Run, number: u64, flag: u64) {
        let address = number << crate::page::PAGE_SHIFT;
        if number == run.first {
            self.bytes.extend_from_slice(&(address | flag).to_be_bytes());
            push_name(&mut self.bytes, &block.name);
        } else {
            self.bytes.extend_from_slice(&(address | flag | ram_flag::CONTINUE).to_be_bytes());
        }
    }

    /// The section that carries the run's pages; `pages` holds one item a page.
    pub fn pages<'a>(
        &mut self,
        block: &Block,
        run: Run,
        pages: impl Iterator<Item = &'a PageBytes>,
    ) -> &[u8] {
        self.start();
        for (number, bytes) in (run.first..run.end()).zip(pages) {
            self.record(block, run, number, ram_flag::PAGE);
            self.bytes.extend_from_slice(bytes);
        }
        push_end_of_ram_section(&mut self.bytes);
        &self.bytes
    }

    /// The section that says that the run's pages are zero.
    pub fn zeros(&mut self, block: &Block, run: Run) -> &[u8] {
        self.start();
        for number in run.first..run.end() {
            self.record(block, run, number, ram_flag::ZERO);
            self.bytes.push(0);
        }
        push_end_of_ram_section(&mut self.bytes);
        &self.bytes
    }
}
