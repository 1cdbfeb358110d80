//! Saves that read memory from outside, beside QEMU's stream: compared, page by page, with an image
//! made of the whole stream of the same moment.

use std::fs::{self, File};
use std::io::BufReader;
use std::path::Path;
use std::sync::Arc;

use snapback::image::Image;
use snapback::page::{Location, PAGE_SIZE, Page, PageSource, SourceError};
use snapback::wire::{Item, StreamReader};

use crate::harness::{Dir, check, in_a_folder, text};
use crate::support::{Fill, Guest, GuestOptions, Qemu, Result};
use crate::{tests, tests_on_both, tests_on_both_at_length};

tests_on_both! {
    the_devices_are_those_of_the_moment
}

tests_on_both_at_length! {
    what_is_read_is_what_qemu_sends
}

tests! {
    a_reader_that_ignores_protection_is_caught
}

#[test]
#[ignore = "many minutes: `make torture`"]
fn fifty_saves_of_each_qemu() -> Result<()> {
    [Qemu::V7, Qemu::V10].into_iter().try_for_each(|qemu| in_a_folder(|dir| many_saves(dir, qemu)))
}

/// A guest that rewrites its memory as fast as it can.
fn writing_hard(qemu: Qemu) -> GuestOptions {
    GuestOptions { qemu, fill: Fill::Mib(64), rate: 0, ..GuestOptions::default() }
}

/// Saves the guest, QEMU's stream copied beside. Returns how many pages were read from outside, and
/// how many differ from what the stream brought.
fn saved_both_ways(dir: &Dir, guest: &Guest, faults: &str) -> Result<(u64, u64)> {
    let (image, stream) = (dir.path("vm.snap"), dir.path("stream"));
    let save = dir.save(guest, "vm.snap").with(&["--disks", "none"]);
    let save = save.env("SNAPBACK_TEST_STREAM", text(&stream)).env("SNAPBACK_TEST_FAULTS", faults);
    let direct = save.succeed()?.event("saved")?["direct_pages"].as_u64().ok_or("no pages")?;
    let differing = differing_pages(&Image::open(&image)?, &stream)?;
    fs::remove_file(image)?;
    fs::remove_file(stream)?;
    Ok((direct, differing))
}

/// How many pages of an image are not those of a whole stream.
pub fn differing_pages(image: &Arc<Image>, stream: &Path) -> Result<u64> {
    let mut reader = image.reader()?;
    let mut is_in_image = |page: Page, bytes: &[u8; PAGE_SIZE]| {
        Ok::<_, SourceError>(match image.locate(page)? {
            Location::Zero => *bytes == [0; PAGE_SIZE],
            Location::Stored { chunk, slot } => {
                reader.read(chunk)?[slot * PAGE_SIZE..].starts_with(bytes)
            }
        })
    };
    let (mut came, mut differing, mut ended) = (0, 0, false);
    let mut stream = StreamReader::new(BufReader::new(File::open(stream)?));
    while let Some(item) = stream.next_item()? {
        let same = match item {
            Item::Blocks(_) => continue,
            Item::Page(page, bytes) => is_in_image(page, bytes)?,
            Item::Zero(page) => is_in_image(page, &[0; PAGE_SIZE])?,
            Item::Tail(_) => {
                ended = true;
                continue;
            }
        };
        (came, differing) = (came + 1, differing + u64::from(!same));
    }
    let total: u64 = image.blocks().iter().map(|block| block.pages()).sum();
    assert!(ended && came == total, "{came} of {total} pages came by the stream");
    Ok(differing)
}

/// Saves a guest so often, on a host's kind of memory and with so many processors; then shows that a
/// save whose stream was ended early is as right.
fn is_read_as_qemu_sends(dir: &Dir, qemu: Qemu, saves: usize) -> Result<()> {
    let backends = [None, Some("memory-backend-memfd,share=on".to_string())];
    for (memory_backend, vcpus) in backends.into_iter().zip([1, 4]) {
        let options = GuestOptions { memory_backend, vcpus, writers: 2, ..writing_hard(qemu) };
        let mut guest = Guest::boot(&options)?;
        let nonce = guest.oracle.nonce()?;
        for _ in 0..saves {
            let (direct, differing) = saved_both_ways(dir, &guest, "whole stream")?;
            println!("{qemu:?}, {vcpus} vCPUs: {direct} pages were read from outside");
            assert!(direct > 1000 && differing == 0, "{direct} read, {differing} differ");
        }
        let image = format!("vm{vcpus}.snap");
        dir.save(&guest, &image).succeed()?;
        check(&mut guest)?;
        let mut reverted =
            dir.reverted(&dir.path(&image), &guest.dir, &format!("reverted{vcpus}"))?;
        reverted.check(&nonce)?;
        reverted.resident()?;
    }
    Ok(())
}

fn what_is_read_is_what_qemu_sends(dir: &Dir, qemu: Qemu) -> Result<()> {
    is_read_as_qemu_sends(dir, qemu, 1)
}

fn many_saves(dir: &Dir, qemu: Qemu) -> Result<()> {
    is_read_as_qemu_sends(dir, qemu, 25)
}

fn the_devices_are_those_of_the_moment(dir: &Dir, qemu: Qemu) -> Result<()> {
    if !cfg!(debug_assertions) {
        return Ok(());
    }
    let guest = Guest::boot(&writing_hard(qemu))?;
    let stream = dir.path("stream");
    let save = dir.save(&guest, "vm.snap").env("SNAPBACK_TEST_STREAM", text(&stream));
    save.env("SNAPBACK_TEST_FAULTS", "whole stream,own devices").succeed()?;
    let ours = Image::open(dir.path("vm.snap"))?.sections()?.devices;
    let mut stream = StreamReader::new(BufReader::new(File::open(stream)?));
    while let Some(item) = stream.next_item()? {
        let Item::Tail(mut tail) = item else { continue };
        // QEMU writes down there that it was paused, since we had stopped it.
        snapback::wire::run_state::set_running(&mut tail.devices);
        assert!(ours == tail.devices, "{} bytes, {} in the stream", ours.len(), tail.devices.len());
        return Ok(());
    }
    Err("the stream has no devices".into())
}

fn a_reader_that_ignores_protection_is_caught(dir: &Dir) -> Result<()> {
    if !cfg!(debug_assertions) {
        return Ok(());
    }
    let guest = Guest::boot(&writing_hard(Qemu::V10))?;
    for _ in 0..5 {
        if saved_both_ways(dir, &guest, "whole stream,ignores protection")?.1 > 0 {
            return Ok(());
        }
    }
    Err("the test does not see wrong pages".into())
}
