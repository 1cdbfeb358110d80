//! What is fuzzed: each function reads hostile bytes as one format, and must come to an
//! end without a panic, in bounded memory. `fuzz_targets` and `tests/fuzz_corpus.rs`
//! call the same functions.

use std::fs::File;
use std::io::{Cursor, Read, Seek, Write};
use std::os::fd::{AsRawFd, FromRawFd};

use snapback::exchange::LibvirtHeader;
use snapback::image::{Image, verify};
use snapback::page::{BlockId, Location, Page, PageSource};
use snapback::wire::{ReturnPath, StreamReader};

/// Bytes that a superblock and each table piece end with: their checksum.
const CHECKED: usize = 4096;

/// An image: opened, verified as a whole, and some of its pages read.
///
/// Damage is found by its checksums long before it could do harm. So that the code
/// behind them is reached too, an odd first byte has the superblock's checksum set
/// right; the byte itself is none of the image's.
pub fn image(data: &[u8]) {
    let Some((first, bytes)) = data.split_first() else { return };
    let mut bytes = bytes.to_vec();
    if first & 1 == 1 && bytes.len() >= CHECKED {
        let checksum = xxh3(&bytes[..CHECKED - 8]);
        bytes[CHECKED - 8..CHECKED].copy_from_slice(&checksum.to_le_bytes());
    }
    let Some(file) = in_memory(&bytes) else { return };
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let Ok(image) = Image::open(&path) else { return };
    let _ = verify(&image, |_, _| {});
    let _ = image.sections();
    let Ok(mut reader) = image.reader() else { return };
    let pages = image.blocks().iter().map(|block| block.pages()).collect::<Vec<_>>();
    for (index, pages) in pages.into_iter().enumerate().take(8) {
        for number in (0..pages).take(64).chain([pages, u64::MAX]) {
            let page = Page { block: BlockId(index as u16), number };
            if let Ok(Location::Stored { chunk, .. }) = image.locate(page) {
                let _ = reader.read(chunk);
            }
        }
    }
}

/// A migration stream from a pipe, and the return path.
pub fn stream(data: &[u8]) {
    let mut stream = StreamReader::new(data);
    while let Ok(Some(_)) = stream.next_item() {}
    let mut path = ReturnPath::new(data);
    while let Ok(Some(_)) = path.next_message() {}
}

/// A migration stream in a file: with the mark of mapped-ram, what it passes over.
pub fn mapped_ram(data: &[u8]) {
    let mut stream = StreamReader::of_file(Cursor::new(data));
    while let Ok(Some(_)) = stream.next_item() {}
    let _ = (stream.config(), stream.machine_type().len());
}

/// The header of a guest that libvirt saved.
pub fn libvirt(data: &[u8]) {
    let Some((begins, mut rest)) = data.split_first_chunk::<16>() else { return };
    if !LibvirtHeader::starts_with(begins) {
        return;
    }
    if LibvirtHeader::read(begins, &mut rest).is_ok() {
        // What is left begins with the stream.
        let mut stream = Vec::new();
        let _ = rest.take(64).read_to_end(&mut stream);
    }
}

/// A file without a name.
fn in_memory(bytes: &[u8]) -> Option<File> {
    // SAFETY: the name is a C string, and memfd_create(2) keeps no pointer to it.
    let fd = unsafe { libc::memfd_create(c"fuzz".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return None;
    }
    // SAFETY: the kernel has just given us this descriptor; nobody else owns it.
    let mut file = unsafe { File::from_raw_fd(fd) };
    file.write_all(bytes).ok()?;
    file.rewind().ok()?;
    Some(file)
}

fn xxh3(bytes: &[u8]) -> u64 {
    xxhash_rust::xxh3::xxh3_64(bytes)
}
