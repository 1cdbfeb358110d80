//! The fuzz targets, run on the inputs that are kept of them: seeds, and what once went
//! wrong. `fuzz/README.md` says how to look for more.

#[path = "../fuzz/targets.rs"]
mod targets;

use std::fs;
use std::path::{Path, PathBuf};

use snapback::exchange::read_memory;
use snapback::image::{
    Details, Image, ImageWriter, Layout, Sections, WriterOptions, flatten, verify_chain,
    verify_flat,
};
use snapback::page::{Block, BlockId, PAGE_SIZE, Page};

fn corpus(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target)
}

fn run(target: &str, read: fn(&[u8])) {
    let folder = corpus(target);
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

/// Makes the seed of the flat layout: four pages, one of them zeros. Whatever a later
/// version of the format changes, the old one stays beside it.
#[test]
#[ignore = "makes fuzz/corpus/image/flat, which exists"]
fn make_the_flat_seed() {
    let folder = tempfile::tempdir().unwrap();
    let [packed, flat] = ["packed", "flat"].map(|name| folder.path().join(name));
    let blocks = ["pc.bios", "pc.ram"].map(|name| Block {
        name: name.into(),
        len: 2 * PAGE_SIZE as u64,
        page_size: PAGE_SIZE as u64,
    });
    let mut writer =
        ImageWriter::create(&packed, WriterOptions::default(), blocks.to_vec()).unwrap();
    for (block, number, fill) in [(0, 0, 1), (0, 1, 2), (1, 0, 0), (1, 1, 3)] {
        let page = Page { block: BlockId(block), number };
        writer.page(page, &[fill; PAGE_SIZE]).unwrap();
    }
    writer.finish(Details::default(), Sections::default()).unwrap();
    let image = Image::open(&packed).unwrap();
    flatten(&image, &flat, Layout::Flat, WriterOptions::default(), |_, _| true).unwrap();
    // Everything is to be set right.
    let seed = [&[0xff][..], &fs::read(flat).unwrap()].concat();
    let to = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/image/flat");
    fs::write(to, seed).unwrap();
}

/// The seeds of images open: what the targets do with them is not the same error each time.
#[test]
fn seeds_of_images_open() {
    for (name, flat, layers) in [("v1", 0, 0), ("flat", 2, 0), ("layered", 0, 1)] {
        let image = targets::open_image(&fs::read(corpus("image").join(name)).unwrap());
        let (_file, image) = image.unwrap_or_else(|| panic!("{name} does not open"));
        assert_eq!((image.manifest().flat.len(), image.manifest().layers.len()), (flat, layers));
        assert!(verify_chain(&image, |_, _| {}).unwrap().is_whole(), "{name}");
        verify_flat(&image).unwrap();
    }
}

/// What a mapped-ram file's bitmap says is read: that of the seeds is whole.
#[test]
fn seeds_of_mapped_ram_are_read() {
    for name in ["small", "two-blocks"] {
        let file = fs::File::open(corpus("mapped_ram").join(name)).unwrap();
        let folder = tempfile::tempdir().unwrap();
        read_memory(&file, Path::new(name), &folder.path().join("vm.snap")).unwrap();
    }
}

#[test]
fn streams() {
    run("stream", targets::stream);
}

#[test]
fn return_paths() {
    run("return_path", targets::return_path);
}

#[test]
fn answers_of_qemu() {
    run("qmp", targets::qmp);
}

#[test]
fn what_a_keeper_is_given() {
    run("keeper", targets::keeper);
}

#[test]
fn what_a_broker_is_asked() {
    run("broker", targets::broker);
}

/// Makes the seeds of the broker: files that it may open and others, a working set in two pieces.
#[test]
#[ignore = "makes fuzz/corpus/broker, which exists"]
fn make_the_seeds_of_the_broker() {
    const OPEN: u8 = 1;
    const TAKE: u8 = 2;
    const STORE: u8 = 3;
    const COLLAPSE: u8 = 4;
    let question = |id: u64, kind: u8, body: &[u8]| {
        let bytes = [&id.to_le_bytes()[..], &[kind], body].concat();
        [&(bytes.len() as u16).to_le_bytes()[..], &bytes].concat()
    };
    let set = {
        let block = Block { name: "pc.ram".into(), len: 1 << 20, page_size: PAGE_SIZE as u64 };
        let pages = (0..9).map(|number| Page { block: BlockId(0), number: 7 * number });
        let image = snapback::Identity::from_bytes([7; 16]);
        snapback::WorkingSet::following(None, image, pages, &[block]).unwrap().encode()
    };
    let (first, second) = set.split_at(set.len() / 2);
    let memory = [0u64, 2 << 20].map(u64::to_le_bytes).concat();
    fs::create_dir_all(corpus("broker")).unwrap();
    for (name, seed) in [
        ("files", [question(1, OPEN, b"/etc/passwd"), question(2, OPEN, b"")].concat()),
        (
            "working-set",
            [question(1, TAKE, first), question(2, TAKE, second), question(3, STORE, &[])].concat(),
        ),
        ("nothing-taken", [question(1, STORE, &[]), question(2, COLLAPSE, &memory)].concat()),
        ("no-question", [question(1, 9, b""), question(2, STORE, &[])].concat()),
    ] {
        fs::write(corpus("broker").join(name), seed).unwrap();
    }
}

#[test]
fn mapped_ram_files() {
    run("mapped_ram", targets::mapped_ram);
}

#[test]
fn what_lies_in_a_repository() {
    run("repository", targets::repository);
    // Each altered in one place, too.
    for (_, seed) in snapback::repository::seeds() {
        for at in 0..seed.len() {
            for bit in [0, 7] {
                let mut altered = seed.clone();
                altered[at] ^= 1 << bit;
                targets::repository(&altered);
            }
        }
    }
}

#[test]
#[ignore = "makes fuzz/corpus/repository, which exists"]
fn make_the_seeds_of_repositories() {
    fs::create_dir_all(corpus("repository")).unwrap();
    for (name, seed) in snapback::repository::seeds() {
        fs::write(corpus("repository").join(name), seed).unwrap();
    }
}

#[test]
fn headers_of_libvirt() {
    run("libvirt", targets::libvirt);
}
