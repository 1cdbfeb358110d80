//! Images that are not what was written: refused, or never passed on to a guest.

use std::fs::{self, File, OpenOptions};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::xxh3_64;

use crate::bare::Bare;
use crate::harness::{Dir, Reverted, Running, Snapback, text};
use crate::shared::copy;
use crate::support::{Qemu, Result};
use crate::tests;

tests! {
    a_truncated_image_is_refused
    a_flipped_byte_is_found_wherever_it_is
    a_wrong_page_never_reaches_a_guest
    damaged_tables_and_sections_never_reach_a_guest
    an_image_of_tomorrow_is_refused
    what_is_no_image_is_refused
}

/// A region of an image, as docs/format.md tells where it is.
pub fn region(image: &Path, number: usize) -> Result<Range<u64>> {
    let superblock = superblock(image)?;
    let field = |at: usize| u64::from_le_bytes(superblock[at..at + 8].try_into().unwrap());
    let at = 72 + 24 * number;
    Ok(field(at)..field(at) + field(at + 8))
}

pub const DATA: usize = 0;
const CHUNK_TABLE: usize = 1;
const PAGE_INDEX: usize = 2;
const MANIFEST: usize = 3;
const DEVICES: usize = 5;
const REGIONS: usize = 7;

fn superblock(image: &Path) -> Result<Vec<u8>> {
    let mut superblock = vec![0; 4096];
    File::open(image)?.read_exact_at(&mut superblock, 0)?;
    Ok(superblock)
}

/// Flips bits of one byte; a second time puts it back.
pub fn flip(image: &Path, offset: u64) -> Result<()> {
    let file = OpenOptions::new().read(true).write(true).open(image)?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset)?;
    file.write_all_at(&[byte[0] ^ 0x11], offset)?;
    Ok(())
}

fn a_truncated_image_is_refused(dir: &Dir) -> Result<()> {
    let image = dir.path("vm.snap");
    let shared = copy(Qemu::V7, &image)?;
    let to = dir.make("reverted")?;
    let len = fs::metadata(&image)?.len();
    let middle = (1..8).map(|part| len / 8 * part);
    let mut lengths: Vec<u64> = [len - 1, len - 4096].into_iter().chain(middle.rev()).collect();
    lengths.extend([4097, 4096, 4095, 8, 1, 0]);
    for len in lengths {
        OpenOptions::new().write(true).open(&image)?.set_len(len)?;
        let path = text(&image);
        let mut refusals = vec![dir.snapback(&["info", path]).fail()?];
        refusals.push(dir.snapback(&["verify", path]).fail()?);
        refusals.push(dir.revert(&image, &shared.from, &to).fail()?);
        for refusal in refusals {
            let says = refusal.contains("truncated") || refusal.contains("not a snapback image");
            assert!(says && refusal.contains(path), "{len}: {refusal}");
        }
    }
    assert!(dir.names("reverted")?.is_empty());
    Ok(())
}

fn a_flipped_byte_is_found_wherever_it_is(dir: &Dir) -> Result<()> {
    // A small image: it is read in full for each of many bytes.
    let image = dir.path("vm.snap");
    let original = Bare::start(dir, Qemu::V10, &["-m", "8"])?;
    dir.snapback(&["save", "--qmp", text(&original.socket), text(&image)]).succeed()?;
    let data = region(&image, DATA)?;
    // All over the superblock, and at both ends and within every region.
    let mut places: Vec<u64> = (0..4096).step_by(293).chain([4088, 4095]).collect();
    for number in 0..REGIONS {
        let Range { start, end } = region(&image, number)?;
        // Without a description of the device state its region is empty, and ends the file.
        if start == end {
            continue;
        }
        places.extend([start, end - 1]);
        places.extend((1..5).map(|part| start + (end - start) / 5 * part));
    }
    let path = text(&image);
    for place in places {
        flip(&image, place)?;
        let ended = dir.snapback(&["verify", path]).end()?;
        // Bytes of data that a later copy has replaced are referred to by nothing.
        if ended.code == Some(0) {
            assert!(data.contains(&place), "nobody finds the byte at {place:#x}: {ended:?}");
        } else {
            assert!(ended.failure()?.contains(path), "{place:#x}: {ended:?}");
        }
        flip(&image, place)?;
    }
    dir.snapback(&["verify", path]).succeed()?;
    Ok(())
}

/// Runs a revert that can't come to its end, and interrupts it if it waits for a repair. Returns its
/// error.
fn interrupted_when_damaged(revert: Snapback) -> Result<String> {
    let mut revert = revert.start()?;
    let mut told = revert.wait_any(&["degraded", "stopped", "error"])?;
    // Damage may be met ahead of the guest's first instruction. A guest that does not run yet would
    // be ended for the interrupt alone.
    let runs = |revert: &mut Running| revert.said().iter().any(|line| line.contains("\"running\""));
    if told["event"] == "degraded" && !runs(&mut revert) {
        told = revert.wait_any(&["running", "error"])?;
    }
    if told["event"] != "error" {
        revert.signal(libc::SIGINT);
    }
    revert.end()?.failure()
}

/// Reverts an image that has one byte flipped. If `verify` finds fault with it,
/// the revert must not come to its end, nor QEMU live on.
fn revert_damaged(dir: &Dir, image: &Path, from: &Path, place: u64) -> Result<Option<String>> {
    flip(image, place)?;
    let verified = dir.snapback(&["verify", text(image)]).end()?;
    let name = format!("at-{place}");
    let to = dir.make(&name)?;
    let refusal = match verified.code {
        Some(0) => {
            Reverted::of(dir.revert(image, from, &to), &to)?.resident()?;
            None
        }
        _ => Some(interrupted_when_damaged(dir.revert(image, from, &to))?),
    };
    flip(image, place)?;
    assert!(dir.processes().is_empty(), "{:?}", dir.processes());
    if let Some(refusal) = &refusal {
        assert!(refusal.contains(text(image)), "{refusal}");
        assert_eq!(dir.sockets(&name)?, Vec::<String>::new());
    }
    Ok(refusal)
}

fn a_wrong_page_never_reaches_a_guest(dir: &Dir) -> Result<()> {
    let image = dir.path("vm.snap");
    let shared = copy(Qemu::V7, &image)?;
    let Range { start, end } = region(&image, DATA)?;
    let mut refused = 0;
    for part in 1..6 {
        let place = start + (end - start) / 6 * part;
        if let Some(refusal) = revert_damaged(dir, &image, &shared.from, place)? {
            refused += 1;
            assert!(refusal.contains("of block `pc.ram`"), "{refusal}");
            assert!(refusal.contains("offset 0x") && refusal.contains("chunk"), "{refusal}");
        }
    }
    assert!(refused > 0);
    Ok(())
}

fn damaged_tables_and_sections_never_reach_a_guest(dir: &Dir) -> Result<()> {
    let image = dir.path("vm.snap");
    let shared = copy(Qemu::V10, &image)?;
    for (number, name) in [
        (CHUNK_TABLE, "chunk table"),
        (PAGE_INDEX, "page index"),
        (MANIFEST, "manifest"),
        (DEVICES, "device state"),
    ] {
        let Range { start, end } = region(&image, number)?;
        let refusal = revert_damaged(dir, &image, &shared.from, start + (end - start) / 2)?;
        let refusal = refusal.ok_or("damage that goes unnoticed")?;
        assert!(refusal.contains(name), "{name}: {refusal}");
    }
    Ok(())
}

/// Changes the superblock and makes its checksum right again.
fn forge(image: &Path, offset: usize, byte: u8) -> Result<()> {
    let mut superblock = superblock(image)?;
    superblock[offset] = byte;
    let checksum = xxh3_64(&superblock[..4088]);
    superblock[4088..].copy_from_slice(&checksum.to_le_bytes());
    OpenOptions::new().write(true).open(image)?.write_all_at(&superblock, 0)?;
    Ok(())
}

fn an_image_of_tomorrow_is_refused(dir: &Dir) -> Result<()> {
    let image = dir.path("vm.snap");
    let shared = copy(Qemu::V7, &image)?;
    let to = dir.make("reverted")?;
    for (offset, byte, says) in [(24, 0x40, "features"), (8, 2, "version 2")] {
        forge(&image, offset, byte)?;
        let revert = dir.revert(&image, &shared.from, &to);
        for command in
            [dir.snapback(&["info", text(&image)]), dir.snapback(&["verify", text(&image)]), revert]
        {
            let refusal = command.fail()?;
            assert!(refusal.contains(says) && refusal.contains(text(&image)), "{refusal}");
        }
    }
    assert!(dir.names("reverted")?.is_empty());
    Ok(())
}

fn what_is_no_image_is_refused(dir: &Dir) -> Result<()> {
    let other = dir.path("other");
    fs::write(&other, [0x5a; 10_000])?;
    let unfinished = dir.path("unfinished");
    fs::write(&unfinished, [0; 10_000])?;
    let cases: [(PathBuf, &str); 4] = [
        (dir.path("missing"), "No such file"),
        (dir.make("folder")?, "not a regular file"),
        (other, "not a snapback image"),
        (unfinished, "never finished"),
    ];
    for (path, says) in cases {
        for command in ["info", "verify", "revert"] {
            let refusal = dir.snapback(&[command, text(&path)]).fail()?;
            assert!(refusal.contains(says) && refusal.contains(text(&path)), "{refusal}");
        }
        let serve = ["serve", text(&path), "--to", "unix:nobody.sock"];
        let refusal = dir.snapback(&serve).fail()?;
        assert!(refusal.contains(says), "{refusal}");
    }
    Ok(())
}
