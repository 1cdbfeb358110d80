//! A stream's header and configuration section.

use std::io::Read;

use super::input::Input;
use super::{FILE_MAGIC, FILE_VERSION, WireError, section};
use crate::page::PAGE_SHIFT;

/// Limit in bytes of a machine name and of a configuration section; real ones have some dozens
/// of bytes.
const MAX_BYTES: usize = 64 << 10;

/// The subsection that names the capabilities on which both ends must agree.
const CAPABILITIES: &str = "configuration/capabilities";
/// The capability of a mapped-ram file.
const MAPPED_RAM: &str = "mapped-ram";
/// The capability that leaves shared memory out of the stream.
const IGNORE_SHARED: &str = "x-ignore-shared";

/// The beginning of a stream (`vmstate_configuration` in
/// `migration/savevm.c`).
#[derive(Debug, Default)]
pub(super) struct Config {
    /// The versioned machine type.
    pub machine_type: String,
    /// Whether the stream is a mapped-ram file's.
    pub mapped_ram: bool,
    /// Header, machine name and subsections, but for the capability `mapped-ram`.
    bytes: Vec<u8>,
}

impl Config {
    /// The section as an ordinary stream has it.
    pub fn bytes(&self) -> Vec<u8> {
        self.bytes.clone()
    }

    /// Reads the header and the section up to its subsections.
    pub fn read<R: Read>(&mut self, input: &mut Input<R>) -> Result<(), WireError> {
        let magic = input.u32("the header")?;
        let version = input.u32("the header")?;
        if (magic, version) != (FILE_MAGIC, FILE_VERSION) {
            return Err(WireError::NotAStream { magic, version });
        }
        let inside = "the configuration section";
        if input.u8(inside)? != section::CONFIGURATION {
            return Err(WireError::Unsupported {
                at: input.at(),
                what: "a machine type without a configuration section (older than QEMU 2.4's)"
                    .into(),
            });
        }
        let len = input.u32(inside)? as usize;
        if len > MAX_BYTES {
            let what = format!("a machine name of {len} bytes");
            return Err(WireError::Malformed { at: input.at(), what });
        }
        let name = input.take(len, "the machine name")?;
        self.machine_type = String::from_utf8_lossy(name).into_owned();
        self.bytes.extend_from_slice(&FILE_MAGIC.to_be_bytes());
        self.bytes.extend_from_slice(&FILE_VERSION.to_be_bytes());
        self.bytes.push(section::CONFIGURATION);
        self.bytes.extend_from_slice(&(len as u32).to_be_bytes());
        self.bytes.extend_from_slice(name);
        Ok(())
    }

    /// Reads a subsection behind its mark. They carry no length, so only the known
    /// ones can be read.
    pub fn read_subsection<R: Read>(&mut self, input: &mut Input<R>) -> Result<(), WireError> {
        let inside = "a subsection of the configuration";
        let name = input.counted_string(inside)?;
        let version = input.u32(inside)?;
        let body = match name.as_str() {
            "configuration/target-page-bits" => {
                let bits = input.u32(inside)?;
                if bits != PAGE_SHIFT {
                    let what = format!("target pages of 2^{bits} bytes");
                    return Err(WireError::Unsupported { at: input.at(), what });
                }
                bits.to_be_bytes().to_vec()
            }
            "configuration/uuid" => input.take(16, inside)?.to_vec(),
            CAPABILITIES => match self.read_capabilities(input, inside)? {
                Some(body) => body,
                None => return Ok(()),
            },
            other => {
                let what = format!("the subsection `{other}`");
                return Err(WireError::Unsupported { at: input.at(), what });
            }
        };
        push_subsection(&mut self.bytes, &name, version, &body);
        match self.bytes.len() <= MAX_BYTES {
            true => Ok(()),
            false => Err(endless(input)),
        }
    }

    /// Reads the capabilities. None is left of them when they only mark the file.
    fn read_capabilities<R: Read>(
        &mut self,
        input: &mut Input<R>,
        inside: &'static str,
    ) -> Result<Option<Vec<u8>>, WireError> {
        let count = input.u32(inside)?;
        let (mut kept, mut body) = (0u32, vec![0; 4]);
        for _ in 0..count {
            let capability = input.counted_string(inside)?;
            match capability.as_str() {
                MAPPED_RAM => self.mapped_ram = true,
                IGNORE_SHARED => {
                    let what = "a stream that leaves out shared memory: migrate with the \
                                capability `x-ignore-shared` off";
                    return Err(WireError::Unsupported { at: input.at(), what: what.into() });
                }
                _ => {
                    kept += 1;
                    body.push(capability.len() as u8);
                    body.extend_from_slice(capability.as_bytes());
                    if body.len() > MAX_BYTES {
                        return Err(endless(input));
                    }
                }
            }
        }
        body[..4].copy_from_slice(&kept.to_be_bytes());
        Ok((kept > 0).then_some(body))
    }
}

fn endless<R: Read>(input: &Input<R>) -> WireError {
    WireError::Malformed { at: input.at(), what: "a configuration section without end".into() }
}

fn push_subsection(out: &mut Vec<u8>, name: &str, version: u32, body: &[u8]) {
    out.push(section::SUBSECTION);
    out.push(name.len() as u8);
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(&version.to_be_bytes());
    out.extend_from_slice(body);
}

/// An ordinary stream's header and configuration section, marked as a mapped-ram
/// file's: a QEMU with that capability takes no other.
pub(super) fn marked_mapped_ram(config: &[u8]) -> Vec<u8> {
    let mut out = config.to_vec();
    let mut body = 1u32.to_be_bytes().to_vec();
    body.push(MAPPED_RAM.len() as u8);
    body.extend_from_slice(MAPPED_RAM.as_bytes());
    push_subsection(&mut out, CAPABILITIES, 1, &body);
    out
}
