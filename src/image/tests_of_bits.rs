//! Every bit of an image is accounted for.

use std::fs;
use std::ops::Range;
use std::sync::Arc;

use super::tests::{block, contents, details, options, page, read_all, sections};
use super::tests_of_stores::Bucket;
use super::*;
use crate::image::format::layout::{Codec, Region, SUPERBLOCK_BYTES};
use crate::page::{ChunkId, PAGE_SIZE};

/// Pages with a chunk of each kind: plain, compressed with several kinds of zstd blocks, and
/// none.
fn pages() -> Vec<[u8; PAGE_SIZE]> {
    let mut text = [0; PAGE_SIZE];
    let words = [&b"snapshot "[..], b"revert ", b"page ", b"fault ", b"guest "];
    let mut at = 0;
    for n in 0usize.. {
        let word = words[n * n % 11 % words.len()];
        if at + word.len() > PAGE_SIZE {
            break;
        }
        text[at..at + word.len()].copy_from_slice(word);
        text[at] = (n % 251) as u8;
        at += word.len();
    }
    vec![contents(1), text, contents(6), contents(0)]
}

/// The bytes of a small image.
fn image() -> Vec<u8> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vm.snap");
    let blocks = vec![block("pc.ram", pages().len() as u64)];
    let mut writer = ImageWriter::create(&path, options(1, Compression::Zstd(3)), blocks).unwrap();
    for (number, bytes) in pages().iter().enumerate() {
        writer.page(page(0, number as u64), bytes).unwrap();
    }
    writer.finish(details(), sections()).unwrap();
    fs::read(path).unwrap()
}

/// Whether opening or checking an image finds fault with these bytes; if not, all that it gives
/// is as it was written.
fn is_noticed(bucket: &Arc<Bucket>, bytes: &[u8], what: &str) -> bool {
    let Ok(image) = bucket.try_put(bytes) else { return true };
    if !verify(&image, |_, _| {}).unwrap().is_whole() {
        return true;
    }
    let read = read_all(&image).unwrap_or_else(|error| panic!("{what} is not noticed: {error}"));
    assert!(read.values().eq(pages().iter()), "{what} changes a page unnoticed");
    assert!(image.sections().unwrap() == sections(), "{what} changes a section unnoticed");
    false
}

/// The bytes of the file in which a flip may go unnoticed, since nothing is ever read of them
/// or they mean nothing: what lies between regions, and zstd frames but for their headers.
fn may_be_ignored(image: &Arc<Image>) -> Vec<Range<u64>> {
    let mut regions: Vec<_> = Region::ALL
        .iter()
        .map(|region| image.own().superblock.region(*region))
        .map(|extent| extent.offset..extent.end().unwrap())
        .collect();
    regions.sort_by_key(|region| region.start);
    let mut ignored = Vec::new();
    let mut end = SUPERBLOCK_BYTES as u64;
    for region in regions {
        if region.start > end {
            ignored.push(end..region.start);
        }
        end = end.max(region.end);
    }
    for number in 0..image.chunk_count() {
        let (_, _, entry) = image.chunk(ChunkId(number)).unwrap();
        if entry.codec == Codec::Zstd {
            let header = 5;
            ignored.push(entry.offset + header..entry.offset + u64::from(entry.stored_len));
        }
    }
    ignored
}

/// The bits that are flipped of the byte at this place: all of the superblock's; of another one, since a
/// checksum is over many, unless all are asked for, as `make torture` does.
fn bits(at: usize) -> Range<u8> {
    let all = at < SUPERBLOCK_BYTES || std::env::var_os("SNAPBACK_TEST_EVERY_BIT").is_some();
    let one = (at % 8) as u8;
    if all { 0..8 } else { one..one + 1 }
}

/// Flips bits of every byte, and returns those that go unnoticed.
fn flip_all() -> (Vec<(u64, u8)>, Arc<Image>) {
    let bytes = image();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let unnoticed = std::thread::scope(|scope| {
        let flip = |first: usize| {
            let mut bytes = bytes.clone();
            scope.spawn(move || {
                let bucket = Bucket::empty();
                let mut unnoticed = Vec::new();
                for at in (first..bytes.len()).step_by(threads) {
                    for bit in bits(at) {
                        bytes[at] ^= 1 << bit;
                        if !is_noticed(&bucket, &bytes, &format!("bit {bit} of byte {at}")) {
                            unnoticed.push((at as u64, bit));
                        }
                        bytes[at] ^= 1 << bit;
                    }
                }
                unnoticed
            })
        };
        let flipping: Vec<_> = (0..threads).map(flip).collect();
        flipping.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    (unnoticed, Bucket::empty().put(&bytes))
}

#[test]
fn every_flipped_bit_is_noticed_or_changes_nothing() {
    let (unnoticed, image) = flip_all();
    let ignored = may_be_ignored(&image);
    for (at, bit) in &unnoticed {
        let known = ignored.iter().any(|range| range.contains(at));
        assert!(known, "bit {bit} of byte {at} goes unnoticed: {ignored:x?}");
    }
    println!("{} bits go unnoticed, which change nothing", unnoticed.len());
}
