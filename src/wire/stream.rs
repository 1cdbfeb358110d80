//! The migration stream as `migrate` writes it: configuration, RAM, devices.
//!
//! Two kinds of stream are supported: the one of `background-snapshot` (RAM in
//! any order, then all devices, no `ram` END section), and an ordinary precopy
//! stream (the `ram` END section closes RAM). Device state carries no lengths, so
//! it is taken as a whole: it runs from the first section that isn't `ram` to the
//! end-of-file mark.

use std::collections::HashMap;
use std::io::{Read, Seek};

use super::config::Config;
use super::input::{Input, Skip};
use super::mapped_ram::MappedBlock;
use super::{RAM_SECTION_VERSION, WireError, command, ram_flag, section};
use crate::page::{BlockId, PAGE_SHIFT, PAGE_SIZE, Page, PageBytes};

/// Limit of the device state in bytes. A machine's device state is
/// a few hundred KiB; its bulk (video memory and the like) travels as RAM.
const TAIL_MAX_BYTES: usize = 256 << 20;

/// One block of the stream's block list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamBlock {
    /// QEMU's name of the block.
    pub name: String,
    /// Used length in bytes.
    pub len: u64,
    /// Where its pages lie, if they have fixed places in a mapped-ram file; the
    /// stream then carries none of them.
    pub mapped: Option<MappedBlock>,
}

/// What comes next in a stream.
#[derive(Debug)]
pub enum Item<'a> {
    /// The list of blocks; [`BlockId`]s of the pages that follow index it. Comes
    /// once, before any page.
    Blocks(&'a [StreamBlock]),
    /// One page with its bytes.
    Page(Page, &'a PageBytes),
    /// One page that is all zeros.
    Zero(Page),
    /// Everything else, to the end. Comes once, last.
    Tail(Tail),
}

/// What follows the RAM in a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tail {
    /// The device sections, without the end-of-file mark behind them.
    pub devices: Vec<u8>,
    /// QEMU's JSON description of the device sections; empty where the machine
    /// type suppresses it.
    pub vmdesc: Vec<u8>,
}

/// Where in the stream the reader is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Before the configuration section.
    Start,
    /// Between two sections.
    Between,
    /// Inside a `ram` section, between two records.
    InRam,
    /// Behind the tail.
    Done,
}

/// Parses a migration stream as it comes, in bounded memory.
pub struct StreamReader<R> {
    input: Input<R>,
    place: Place,
    config: Config,
    ram_section: Option<u32>,
    blocks: Vec<StreamBlock>,
    by_name: HashMap<String, BlockId>,
    /// The block that a record with CONTINUE means.
    current: Option<BlockId>,
    /// A zero record with another fill byte than 0 becomes a page; its bytes.
    filled: Box<PageBytes>,
}

impl<R: Read> StreamReader<R> {
    /// A reader of the stream that `input` gives from its first byte on.
    pub fn new(input: R) -> StreamReader<R> {
        StreamReader::over(Input::new(input))
    }

    /// The same for a file: only in one can the stream of a mapped-ram file be
    /// followed, which passes over the places of pages.
    pub fn of_file(file: R) -> StreamReader<R>
    where
        R: Seek,
    {
        StreamReader::of_file_from(file, 0)
    }

    /// The same for a stream that begins behind something else, at offset `at` of its file, where
    /// the file stands.
    pub fn of_file_from(file: R, at: u64) -> StreamReader<R>
    where
        R: Seek,
    {
        let skip: Skip<R> = |file, count| file.seek_relative(count);
        StreamReader::over(Input::skipping(file, skip).counting_from(at))
    }

    fn over(input: Input<R>) -> StreamReader<R> {
        StreamReader {
            input,
            place: Place::Start,
            config: Config::default(),
            ram_section: None,
            blocks: Vec::new(),
            by_name: HashMap::new(),
            current: None,
            filled: Box::new([0; PAGE_SIZE]),
        }
    }

    /// The stream's header and configuration section, as they came but for the mark
    /// of a mapped-ram file; complete once [`Item::Blocks`] has been seen.
    pub fn config(&self) -> Vec<u8> {
        self.config.bytes()
    }

    /// The blocks; none before [`Item::Blocks`] has been seen.
    pub fn blocks(&self) -> &[StreamBlock] {
        &self.blocks
    }

    /// The versioned machine type that the configuration section names.
    pub fn machine_type(&self) -> &str {
        &self.config.machine_type
    }

    /// The next item, or `None` behind the tail.
    ///
    /// # Errors
    /// When reading fails, when the stream ends too early, and when it is
    /// malformed or holds what is not supported. No item follows an error.
    pub fn next_item(&mut self) -> Result<Option<Item<'_>>, WireError> {
        loop {
            // Nothing follows an error: each step that succeeds sets the next state.
            match std::mem::replace(&mut self.place, Place::Done) {
                Place::Start => {
                    self.config.read(&mut self.input)?;
                    self.place = Place::Between;
                }
                Place::Between => match self.input.u8("the start of a section")? {
                    section::START if self.ram_section.is_none() => {
                        self.read_ram_start()?;
                        self.place = Place::InRam;
                        return Ok(Some(Item::Blocks(&self.blocks)));
                    }
                    kind @ (section::PART | section::END) if self.ram_section.is_some() => {
                        self.expect_ram_section(kind)?;
                        self.place = Place::InRam;
                    }
                    section::COMMAND => {
                        self.pass_command()?;
                        self.place = Place::Between;
                    }
                    kind @ (section::FULL | section::EOF) if self.ram_section.is_some() => {
                        return Ok(Some(Item::Tail(self.read_tail(kind)?)));
                    }
                    kind if self.ram_section.is_some() => {
                        return Err(self.unsupported(format!("a section of type {kind:#04x}")));
                    }
                    section::SUBSECTION => {
                        self.config.read_subsection(&mut self.input)?;
                        self.place = Place::Between;
                    }
                    kind => return Err(self.early_section(kind)?),
                },
                Place::InRam => match self.read_record()? {
                    Record::Page(page) => {
                        let bytes = self.input.take(PAGE_SIZE, "a page")?;
                        self.place = Place::InRam;
                        let bytes = bytes.try_into().expect("take gives what was asked for");
                        return Ok(Some(Item::Page(page, bytes)));
                    }
                    Record::Filled(page) => {
                        self.place = Place::InRam;
                        return Ok(Some(Item::Page(page, &self.filled)));
                    }
                    Record::Zero(page) => {
                        self.place = Place::InRam;
                        return Ok(Some(Item::Zero(page)));
                    }
                    Record::End => {
                        self.read_footer()?;
                        self.place = Place::Between;
                    }
                },
                Place::Done => return Ok(None),
            }
        }
    }

    fn malformed(&self, what: impl Into<String>) -> WireError {
        WireError::Malformed { at: self.input.at(), what: what.into() }
    }

    fn unsupported(&self, what: impl Into<String>) -> WireError {
        WireError::Unsupported { at: self.input.at(), what: what.into() }
    }

    /// The error for a section before `ram`: without lengths, what can't be read
    /// can't be passed over.
    fn early_section(&mut self, kind: u8) -> Result<WireError, WireError> {
        let inside = "a section before `ram`";
        Ok(match kind {
            section::FULL => {
                self.input.u32(inside)?;
                let name = self.input.counted_string(inside)?;
                self.unsupported(format!(
                    "device `{name}` sends state before RAM (virtio-mem and some others do); \
                     remove that device from the machine to snapshot it"
                ))
            }
            kind => self.malformed(format!("a section of type {kind:#04x} before `ram`")),
        })
    }

    /// A command before or amid `ram`. What opens a return path, announces postcopy or
    /// says that the source has stopped (QEMU 10.0 and later, before the last of `ram`)
    /// means nothing to a stream in a file; it is not kept.
    fn pass_command(&mut self) -> Result<(), WireError> {
        let inside = "a command";
        let command = self.input.u16(inside)?;
        let len = usize::from(self.input.u16(inside)?);
        let data = self.input.take(len, inside)?;
        match (command, data) {
            (command::OPEN_RETURN_PATH, []) | (command::PING, [_, _, _, _]) => Ok(()),
            (command::POSTCOPY_ADVISE | command::SWITCHOVER_START, []) => Ok(()),
            // The sizes of all pages, in one word: with larger ones among them, the
            // block list would hold them too, and not say where.
            (command::POSTCOPY_ADVISE, sizes) if sizes.len() == 16 => {
                match sizes[..8] == (PAGE_SIZE as u64).to_be_bytes() {
                    true => Ok(()),
                    false => Err(self.unsupported(
                        "postcopy of a machine with huge pages: migrate with the capability \
                         `postcopy-ram` off",
                    )),
                }
            }
            _ => Err(self.unsupported(format!(
                "command {command} of {len} bytes before the devices: migrate without postcopy"
            ))),
        }
    }

    /// Behind the byte START: the header of the `ram` section and its block list.
    fn read_ram_start(&mut self) -> Result<(), WireError> {
        let inside = "the `ram` section's start";
        let id = self.input.u32(inside)?;
        let name = self.input.counted_string(inside)?;
        self.input.u32(inside)?;
        let version = self.input.u32(inside)?;
        if name != "ram" {
            return Err(self.unsupported(format!(
                "the iterable section `{name}` before `ram`: migrate without it"
            )));
        }
        if version != RAM_SECTION_VERSION {
            return Err(self.unsupported(format!("version {version} of the `ram` section")));
        }
        self.ram_section = Some(id);
        let word = self.input.u64(inside)?;
        if word & ram_flag::ALL != ram_flag::MEM_SIZE {
            return Err(self.malformed(format!("{word:#x} where the block list was due")));
        }
        let mut left = word & !ram_flag::ALL;
        while left > 0 {
            let name = self.input.counted_string("the block list")?;
            let len = self.input.u64("the block list")?;
            if len > left || len == 0 || len % PAGE_SIZE as u64 != 0 {
                return Err(self.malformed(format!("block `{name}` has a length of {len} bytes")));
            }
            let id = u16::try_from(self.blocks.len())
                .map_err(|_| self.malformed("more than 65,535 blocks"))?;
            if self.by_name.insert(name.clone(), BlockId(id)).is_some() {
                return Err(self.malformed(format!("block `{name}` is listed twice")));
            }
            let mapped = match self.config.mapped_ram {
                true => Some(MappedBlock::read(&mut self.input, len)?),
                false => None,
            };
            self.blocks.push(StreamBlock { name, len, mapped });
            left -= len;
        }
        Ok(())
    }

    fn expect_ram_section(&mut self, kind: u8) -> Result<(), WireError> {
        let id = self.input.u32("a section's header")?;
        if Some(id) != self.ram_section {
            return Err(self.unsupported(format!(
                "section {id} of type {kind:#04x}, which is not `ram` (a device with bulk state \
                 of its own, such as VFIO): migrate without that device"
            )));
        }
        Ok(())
    }

    fn read_footer(&mut self) -> Result<(), WireError> {
        let mark = self.input.u8("a section's footer")?;
        let id = self.input.u32("a section's footer")?;
        if mark != section::FOOTER || Some(id) != self.ram_section {
            return Err(self.malformed("a `ram` section without its footer"));
        }
        Ok(())
    }

    fn read_record(&mut self) -> Result<Record, WireError> {
        let word = self.input.u64("a RAM record")?;
        let flags = word & ram_flag::ALL;
        let number = word >> PAGE_SHIFT;
        match flags & !ram_flag::CONTINUE {
            ram_flag::EOS => Ok(Record::End),
            ram_flag::PAGE => Ok(Record::Page(self.read_page_name(flags, number)?)),
            ram_flag::ZERO => {
                let page = self.read_page_name(flags, number)?;
                match self.input.u8("a zero page")? {
                    0 => Ok(Record::Zero(page)),
                    fill => {
                        self.filled.fill(fill);
                        Ok(Record::Filled(page))
                    }
                }
            }
            other => {
                let what = match other {
                    ram_flag::XBZRLE => "pages of `xbzrle`",
                    ram_flag::COMPRESS_PAGE => "pages of the capability `compress`",
                    ram_flag::MULTIFD_FLUSH => "the mark of `multifd`",
                    _ => "an unknown kind of page",
                };
                Err(self.unsupported(format!(
                    "{what} (RAM records with flags {flags:#x}): migrate without the \
                     capabilities `xbzrle`, `multifd`, `compress` and `rdma-pin-all`"
                )))
            }
        }
    }

    fn read_page_name(&mut self, flags: u64, number: u64) -> Result<Page, WireError> {
        if flags & ram_flag::CONTINUE == 0 {
            let len = usize::from(self.input.u8("a RAM record")?);
            let bytes = self.input.take(len, "a RAM record")?;
            let known = std::str::from_utf8(bytes).ok().and_then(|name| self.by_name.get(name));
            self.current = known.copied();
        }
        let Some(block) = self.current else {
            return Err(self.malformed("a page of a block that is not in the block list"));
        };
        if number >= self.blocks[block.index()].len >> PAGE_SHIFT {
            let name = &self.blocks[block.index()].name;
            return Err(self.malformed(format!("page {number} is outside block `{name}`")));
        }
        Ok(Page { block, number })
    }

    /// Everything from the section whose type `kind` was just read to the end.
    fn read_tail(&mut self, kind: u8) -> Result<Tail, WireError> {
        let mut bytes = vec![kind];
        while !self.input.at_end()? {
            bytes.extend_from_slice(self.input.take_some()?);
            if bytes.len() > TAIL_MAX_BYTES {
                return Err(self.unsupported(format!(
                    "more than {} MiB of device state",
                    TAIL_MAX_BYTES >> 20
                )));
            }
        }
        Tail::split(bytes).ok_or(WireError::Ended { at: self.input.at(), inside: "device state" })
    }
}

enum Record {
    Page(Page),
    Filled(Page),
    Zero(Page),
    End,
}

impl Tail {
    /// Splits the end of a stream into device sections and description. The
    /// description's text differs between versions, so it is found by its length:
    /// a mark behind the end-of-file byte, and a length that reaches exactly the
    /// end. JSON holds no bytes 00 or 06, so the last such place is the right one.
    ///
    /// None where the stream was cut short. Device state is full of zeros, so the
    /// end-of-file byte alone proves nothing: it counts behind the end of a section.
    fn split(mut bytes: Vec<u8>) -> Option<Tail> {
        const HEAD: usize = 6;
        let starts_here = |at: usize| {
            let head = &bytes[at..at + HEAD];
            let len = u32::from_be_bytes([head[2], head[3], head[4], head[5]]) as usize;
            head[..2] == [section::EOF, section::VMDESCRIPTION] && at + HEAD + len == bytes.len()
        };
        let last = bytes.len().checked_sub(HEAD);
        let (end, vmdesc) = match last.and_then(|last| (0..=last).rev().find(|&at| starts_here(at)))
        {
            Some(end) => (end, bytes.split_off(end + HEAD)),
            None if bytes.last() == Some(&section::EOF) => (bytes.len() - 1, Vec::new()),
            None => return None,
        };
        bytes.truncate(end);
        ends_a_section(&bytes).then_some(Tail { devices: bytes, vmdesc })
    }
}

/// Whether device state ends with the footer of the section that began last. Every
/// stream with a configuration section has footers. What is cut short passes only behind
/// bytes of a section that are by chance its own footer.
fn ends_a_section(devices: &[u8]) -> bool {
    let Some((body, footer)) = devices.split_last_chunk::<{ section::MARK_BYTES }>() else {
        return devices.is_empty();
    };
    let begins = |at: usize| {
        let behind_another = at == 0
            || at
                .checked_sub(section::MARK_BYTES)
                .is_some_and(|mark| body[mark] == section::FOOTER);
        behind_another && body[at] == section::FULL && has_name(&body[at + 1..])
    };
    let last = (0..body.len()).rev().find(|&at| begins(at));
    footer[0] == section::FOOTER && last.is_some_and(|at| body[at + 1..at + 5] == footer[1..])
}

/// Whether a section's header goes on like this behind its type: a number of four bytes,
/// a counted name.
fn has_name(header: &[u8]) -> bool {
    let name = header.get(4).and_then(|len| header.get(5..5 + usize::from(*len)));
    name.is_some_and(|name| {
        !name.is_empty() && name.iter().all(|byte| (b' '..=b'~').contains(byte))
    })
}
