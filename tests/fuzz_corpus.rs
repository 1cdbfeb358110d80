//! The fuzz targets, run on the inputs that are kept of them: seeds, and what once went
//! wrong. `fuzz/README.md` says how to look for more.

#[path = "../fuzz/targets.rs"]
mod targets;

use std::fs;
use std::path::Path;

fn run(target: &str, read: fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let mut count = 0;
    for entry in fs::read_dir(&folder).unwrap() {
        let bytes = fs::read(entry.unwrap().path()).unwrap();
        read(&bytes);
        // Each cut short, too: an end at any place is an error and nothing worse.
        for len in (0..bytes.len()).step_by(1 + bytes.len() / 64) {
            read(&bytes[..len]);
        }
        count += 1;
    }
    assert!(count > 0, "{} is empty", folder.display());
}

#[test]
fn images() {
    run("image", targets::image);
}

#[test]
fn streams() {
    run("stream", targets::stream);
}

#[test]
fn mapped_ram_files() {
    run("mapped_ram", targets::mapped_ram);
}

#[test]
fn headers_of_libvirt() {
    run("libvirt", targets::libvirt);
}
