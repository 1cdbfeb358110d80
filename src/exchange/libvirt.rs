//! Guests that libvirt has saved (`virsh save`, `virsh managedsave`): a header, the
//! domain's XML, and QEMU's migration stream behind it, compressed or not
//! (`struct _virQEMUSaveHeader` and `virQEMUSaveDataRead` in libvirt's
//! `src/qemu/qemu_saveimage.c`).

use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use super::output::Output;
use super::{ExchangeError, ExchangeEvent, Watch, stream};
use crate::guest::Overlays;
use crate::image::Image;
use crate::libvirt::restorable;

/// First bytes of a file that libvirt has finished.
pub(super) const MAGIC: [u8; 16] = *b"LibvirtQemudSave";
/// First bytes of one that it has not.
const MAGIC_PARTIAL: [u8; 16] = *b"LibvirtQemudPart";

/// The versions of the header that are known; they differ in what may follow.
const VERSIONS: std::ops::RangeInclusive<u32> = 1..=2;

/// Length of the header in bytes, magic included. Its integers are in the byte order
/// of the host that wrote it.
const HEADER_BYTES: usize = 16 + 19 * 4;

/// The version that is written, and the number of a stream that is not compressed.
const VERSION: u32 = 2;
const RAW: u32 = 0;

/// Zeros behind the XML, in bytes, as libvirt leaves them.
const EDIT_BYTES: usize = 64 << 10;

/// The most XML that is believed, in bytes; a domain's is some KiB.
const MAX_DATA_BYTES: u32 = 16 << 20;

/// How the stream is compressed (`virQEMUSaveFormat`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compressed {
    /// Not at all.
    Raw,
    /// By the program of this name, which `-dc` makes decompress to its output.
    By(&'static str),
    /// By zstd.
    Zstd,
    /// Not at all, but every page has its place in the file (libvirt's `sparse`, 11.2 and
    /// later): QEMU's mapped-ram behind the header.
    Sparse,
}

/// What stands before the stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LibvirtHeader {
    /// Whether the guest ran when it was saved. libvirt stops it itself before that.
    pub was_running: bool,
    /// How the stream that follows is compressed.
    pub compressed: Compressed,
    /// The domain, as XML.
    pub xml: String,
    /// Where in the file the stream begins, in bytes.
    pub stream_at: u64,
}

impl LibvirtHeader {
    /// Whether these are the first bytes of a guest that libvirt saved, or began to.
    pub fn starts_with(begins: &[u8; 16]) -> bool {
        [MAGIC, MAGIC_PARTIAL].contains(begins)
    }

    /// Reads the header and the XML behind its first 16 bytes, up to the stream, and no
    /// byte further.
    ///
    /// # Errors
    /// When it is not as libvirt writes it, or holds what is not supported: says what,
    /// and what to do.
    pub fn read(begins: &[u8; 16], input: &mut impl Read) -> Result<LibvirtHeader, String> {
        if *begins == MAGIC_PARTIAL {
            return Err("libvirt never finished it: save the guest again".into());
        }
        let mut rest = [0; HEADER_BYTES - 16];
        input.read_exact(&mut rest).map_err(|e| format!("its header can't be read: {e}"))?;
        let (words, _) = rest.as_chunks::<4>();
        let swapped = !VERSIONS.contains(&u32::from_le_bytes(words[0]));
        let word = |number: usize| match swapped {
            true => u32::from_be_bytes(words[number]),
            false => u32::from_le_bytes(words[number]),
        };
        let (version, data_len, was_running, format, cookie) =
            (word(0), word(1), word(2), word(3), word(4));
        if !VERSIONS.contains(&version) {
            return Err(format!("its header is of version {}, not 1 or 2", word(0).swap_bytes()));
        }
        if data_len == 0 || data_len > MAX_DATA_BYTES {
            return Err(format!("its XML is said to have {data_len} bytes"));
        }
        // Version 1 had no cookie; where there is one, the XML ends before it.
        let xml_len = if cookie == 0 { data_len } else { cookie };
        if xml_len > data_len {
            return Err(format!("its cookie is said to lie at {cookie} of {data_len} bytes"));
        }
        let compressed = match format {
            0 => Compressed::Raw,
            1 => Compressed::By("gzip"),
            2 => Compressed::By("bzip2"),
            3 => Compressed::By("xz"),
            4 => Compressed::By("lzop"),
            5 => Compressed::Zstd,
            6 => Compressed::Sparse,
            other => return Err(format!("its memory is in a format of number {other}")),
        };
        let mut data = Vec::new();
        let taken = input.take(u64::from(data_len)).read_to_end(&mut data);
        taken.map_err(|e| format!("its XML can't be read: {e}"))?;
        if data.len() < data_len as usize {
            return Err(format!(
                "it ends within its XML, after {} of {data_len} bytes",
                data.len()
            ));
        }
        data.truncate(xml_len as usize);
        let end = data.iter().position(|byte| *byte == 0).unwrap_or(data.len());
        data.truncate(end);
        let xml = String::from_utf8(data).map_err(|_| "its XML is not UTF-8".to_string())?;
        if !xml.trim_start().starts_with('<') {
            return Err("what should be its XML is something else".into());
        }
        let stream_at = HEADER_BYTES as u64 + u64::from(data_len);
        Ok(LibvirtHeader { was_running: was_running != 0, compressed, xml, stream_at })
    }

    /// The header, as libvirt writes it on this host, with room behind the XML for
    /// `virsh save-image-edit`.
    pub fn write(was_running: bool, xml: &str) -> Vec<u8> {
        let data_len = xml.len() + 1 + EDIT_BYTES;
        let words = [VERSION, data_len as u32, u32::from(was_running), RAW];
        let mut bytes = MAGIC.to_vec();
        bytes.extend(words.iter().flat_map(|word| word.to_ne_bytes()));
        bytes.resize(HEADER_BYTES, 0);
        bytes.extend(xml.as_bytes());
        bytes.resize(HEADER_BYTES + data_len, 0);
        bytes
    }

    /// For `map_err` on [`LibvirtHeader::read`]: names the file.
    pub(super) fn failed(path: &Path) -> impl FnOnce(String) -> ExchangeError {
        let path = path.to_owned();
        move |problem| ExchangeError::Libvirt { path, problem }
    }
}

/// Writes an image as a domain that libvirt has saved, for a file of this name. Returns the
/// overlays that were made for its disks, which go unless they are kept.
pub(super) fn write(
    image: &Arc<Image>,
    path: &Path,
    output: &mut Output,
    watch: &mut Watch<'_>,
) -> Result<Overlays, ExchangeError> {
    let machine = &image.manifest().machine;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let (xml, overlays) = restorable(machine, &name)?;
    let made = Overlays::named(&overlays)?;
    for overlay in overlays.iter().filter_map(|overlay| overlay.path.as_ref()) {
        let what = format!("the domain will write to the new overlay `{}`", overlay.display());
        watch.tell(ExchangeEvent::Note { what });
    }
    output.put(&LibvirtHeader::write(machine.running, &xml))?;
    stream::write(image, output, watch)?;
    Ok(made)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(words: [u32; 5], swapped: bool) -> Vec<u8> {
        let encode = |word: &u32| if swapped { word.to_be_bytes() } else { word.to_le_bytes() };
        let mut bytes: Vec<u8> = words.iter().flat_map(encode).collect();
        bytes.resize(HEADER_BYTES - 16, 0);
        bytes
    }

    fn read(words: [u32; 5], swapped: bool, rest: &[u8]) -> Result<LibvirtHeader, String> {
        let bytes = [&header(words, swapped)[..], rest].concat();
        let mut input = &bytes[..];
        let found = LibvirtHeader::read(&MAGIC, &mut input)?;
        assert_eq!(input, b"QEVM");
        Ok(found)
    }

    #[test]
    fn headers_of_either_byte_order_are_read() {
        let xml = b"<domain/>\0\0\0<cookie/>\0QEVM";
        for swapped in [false, true] {
            let found = read([2, 22, 1, 3, 12], swapped, xml).unwrap();
            assert_eq!(found.xml, "<domain/>");
            assert_eq!((found.was_running, found.compressed), (true, Compressed::By("xz")));
        }
        let sparse = read([2, 22, 1, 6, 12], false, xml).unwrap();
        assert_eq!((sparse.compressed, sparse.stream_at), (Compressed::Sparse, 92 + 22));
        let found = read([1, 22, 0, 0, 0], false, xml).unwrap();
        assert_eq!((found.was_running, found.compressed), (false, Compressed::Raw));
    }

    #[test]
    fn what_is_written_is_read() {
        let written = LibvirtHeader::write(true, "<domain/>");
        let (begins, mut rest) = written.split_first_chunk().unwrap();
        let found = LibvirtHeader::read(begins, &mut rest).unwrap();
        assert_eq!((found.xml.as_str(), found.was_running), ("<domain/>", true));
        assert_eq!(found.compressed, Compressed::Raw);
        assert!(rest.is_empty() && found.stream_at == written.len() as u64);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let says = |words, rest: &[u8]| read(words, false, rest).unwrap_err();
        assert!(says([3, 9, 1, 0, 0], b"").contains("version 3"));
        assert!(says([2, 0, 1, 0, 0], b"").contains("0 bytes"));
        assert!(says([2, u32::MAX, 1, 0, 0], b"").contains("4294967295 bytes"));
        assert!(says([2, 9, 1, 0, 10], b"<domain/>").contains("10 of 9 bytes"));
        assert!(says([2, 9, 1, 7, 0], b"<domain/>").contains("number 7"));
        assert!(says([2, 12, 1, 0, 0], b"<domain/>").contains("after 9 of 12 bytes"));
        assert!(says([2, 4, 1, 0, 0], b"QEVM").contains("something else"));
        let unfinished = LibvirtHeader::read(&MAGIC_PARTIAL, &mut &b""[..]).unwrap_err();
        assert!(unfinished.contains("never finished"));
    }
}
