//! What must hold of images that lie on top of others.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use proptest::collection::vec;
use proptest::prelude::*;
use tempfile::TempDir;

use super::tests::{
    Memory, block, contents, details, expected, names, options, page, read_all, sections,
};
use super::*;
use crate::image::format::layout::*;
use crate::page::{BlockId, Location, PAGE_SIZE, Page, Run};

/// Writes an image of this memory, of one block for each that occurs, on top of another.
pub(super) fn write(
    path: &Path,
    memory: &Memory,
    options: WriterOptions,
    parent: Option<&Arc<Image>>,
) -> Result<Saved, ImageError> {
    let count = memory.keys().map(|page| page.block.index() + 1).max().unwrap_or(0);
    let pages = |n| memory.keys().filter(|page| page.block.index() == n).count() as u64;
    let blocks = (0..count).map(|n| block(&format!("b{n}"), pages(n))).collect();
    let mut writer = match parent {
        Some(parent) => ImageWriter::create_on(path, options, blocks, parent)?,
        None => ImageWriter::create(path, options, blocks)?,
    };
    for (page, seed) in memory {
        writer.page(*page, &contents(*seed))?;
    }
    writer.finish(details(), sections())
}

/// Seeds of pages, each different from all others.
fn memory(pages: u64) -> Memory {
    (0..pages).map(|at| (page(0, at), 2 * at as u32 + 1)).collect()
}

/// A directory with a chain of images, `0.snap` the first.
pub(super) struct Chain {
    directory: TempDir,
    pub memory: Vec<Memory>,
}

impl Chain {
    /// A first image of 40 pages, and on top of it one more for each of these changes:
    /// pages that get a new content.
    pub fn write(changes: &[&[u64]]) -> Chain {
        let directory = tempfile::tempdir().unwrap();
        let mut chain = Chain { directory, memory: vec![memory(40)] };
        let plain = || options(4, Compression::None);
        write(&chain.path(0), &chain.memory[0], plain(), None).unwrap();
        for (n, changed) in changes.iter().enumerate() {
            let mut memory = chain.memory[n].clone();
            let changed = changed.iter().map(|at| (page(0, *at), (n as u32 + 1) * 1000 + 1));
            memory.extend(changed.map(|(page, seed)| (page, seed + 2 * page.number as u32)));
            let parent = Image::open(chain.path(n)).unwrap();
            write(&chain.path(n + 1), &memory, plain(), Some(&parent)).unwrap();
            chain.memory.push(memory);
        }
        chain
    }

    pub fn path(&self, n: usize) -> PathBuf {
        self.directory.path().join(format!("{n}.snap"))
    }

    fn open(&self, n: usize) -> Result<Arc<Image>, ImageError> {
        Image::open(self.path(n))
    }

    /// The nth image is all that it was.
    fn is_whole(&self, n: usize) {
        let image = self.open(n).unwrap();
        assert!(read_all(&image).unwrap() == expected(&self.memory[n]));
        let report = verify_chain(&image, |done, total| assert!(done <= total)).unwrap();
        assert!(report.is_whole(), "{:?}", report.damages);
    }

    /// Why the nth image does not open.
    fn problem(&self, n: usize) -> String {
        let error = self.open(n).err().expect("it opens");
        assert!(matches!(error, ImageError::Layer { .. }), "{error}");
        error.to_string()
    }
}

fn data_len(image: &Image) -> u64 {
    image.own().superblock.region(Region::Data).len
}

#[test]
fn an_image_on_top_holds_the_pages_that_differ_and_no_others() {
    let chain = Chain::write(&[&[0, 1, 6, 39], &[6, 7], &[]]);
    for (n, own) in [40, 4, 2, 0].into_iter().enumerate() {
        chain.is_whole(n);
        assert_eq!(data_len(&chain.open(n).unwrap()), own * PAGE_SIZE as u64);
    }
    let layers = |n: usize| -> Vec<_> {
        let image = chain.open(n).unwrap();
        image.manifest().layers.iter().map(|l| (l.relative.clone(), l.pages)).collect()
    };
    let named = |name: &str, pages| (name.to_owned(), pages);
    assert_eq!(layers(1), [named("0.snap", 36)]);
    assert_eq!(layers(2), [named("1.snap", 3), named("0.snap", 35)]);
    assert_eq!(layers(3), [named("2.snap", 2), named("1.snap", 3), named("0.snap", 35)]);
}

#[test]
fn pages_that_are_known_to_be_the_parents_are_taken_unread() {
    let chain = Chain::write(&[&[6, 7]]);
    // The parent has zeros as well.
    let (parent, child) = (chain.path(2), chain.path(3));
    let mut memory: Memory = chain.memory[1].clone();
    memory.extend([(page(0, 12), 0), (page(0, 13), 0)]);
    let below = chain.open(1).unwrap();
    write(&parent, &memory, options(4, Compression::None), Some(&below)).unwrap();

    let parent = Image::open(&parent).unwrap();
    let blocks = vec![block("b0", 42), block("other", 1)];
    let plain = options(4, Compression::None);
    let mut writer = ImageWriter::create_on(&child, plain, blocks, &parent).unwrap();
    let pages = writer.parent_pages().unwrap();
    for beyond in [page(0, 40), page(1, 0), page(2, 0)] {
        assert_eq!(pages.get(beyond), None);
    }
    // Beside pages that have changed, before and behind these; the last that is said of a page counts.
    memory.extend([(page(0, 5), 99), (page(0, 21), 101), (page(0, 9), 103)]);
    memory.extend([(page(0, 40), 0), (page(0, 41), 105), (page(1, 0), 107)]);
    for (number, seed) in [(5, 99), (8, 109), (12, 111)] {
        writer.page(page(0, number), &contents(seed)).unwrap();
    }
    for (first, end) in [(0, 5), (6, 21), (22, 40)] {
        let run = Run { block: BlockId(0), first, count: end - first };
        let inherited: Vec<_> = run.pages().map_while(|page| pages.get(page)).collect();
        writer.inherit(run, &inherited).unwrap();
    }
    for changed in [page(0, 9), page(0, 21), page(0, 40), page(0, 41), page(1, 0)] {
        writer.page(changed, &contents(memory[&changed])).unwrap();
    }
    let saved = writer.finish(details(), sections()).unwrap();
    let image = Image::open(&child).unwrap();
    assert!(read_all(&image).unwrap() == expected(&memory));
    assert!(verify_chain(&image, |_, _| ()).unwrap().is_whole());
    // Of 43 pages three are zeros, and five are its own; of two more it had others before.
    let counts = (saved.data_pages, saved.zero_pages, saved.parent_pages);
    assert_eq!(counts, (40, 3, 35));
}

#[test]
fn an_image_that_nothing_lies_in_is_not_needed() {
    let chain = Chain::write(&[&[3], &[3]]);
    let layers = chain.open(2).unwrap().manifest().layers.clone();
    assert_eq!(layers.len(), 1);
    fs::remove_file(chain.path(1)).unwrap();
    chain.is_whole(2);

    // Nothing in common: an image like any other.
    let path = chain.directory.path().join("other.snap");
    let other = (0..40).map(|at| (page(0, at), 7001 + 2 * at as u32)).collect();
    let base = chain.open(0).unwrap();
    write(&path, &other, options(4, Compression::None), Some(&base)).unwrap();
    fs::remove_file(chain.path(0)).unwrap();
    let image = Image::open(&path).unwrap();
    assert_eq!(image.own().superblock.incompatible, 0);
    assert!(read_all(&image).unwrap() == expected(&other));
}

#[test]
fn parents_move_with_their_children() {
    let chain = Chain::write(&[&[1], &[2]]);
    let to = chain.directory.path().join("moved");
    fs::create_dir(&to).unwrap();
    for n in 0..3 {
        fs::rename(chain.path(n), to.join(format!("{n}.snap"))).unwrap();
    }
    let image = Image::open(to.join("2.snap")).unwrap();
    assert!(read_all(&image).unwrap() == expected(&chain.memory[2]));
    // A child that goes alone still knows where the others were.
    let to = |n: usize| to.join(format!("{n}.snap"));
    for n in 0..2 {
        fs::rename(to(n), chain.path(n)).unwrap();
    }
    let image = Image::open(to(2)).unwrap();
    assert!(read_all(&image).unwrap() == expected(&chain.memory[2]));
    // By a link elsewhere, too.
    let link = chain.directory.path().join("moved/link");
    std::os::unix::fs::symlink(to(2), &link).unwrap();
    assert!(Image::open(&link).is_ok());
    // What was moved is written down anew.
    let mut memory = chain.memory[2].clone();
    memory.insert(page(0, 9), 9001);
    let last = chain.directory.path().join("last.snap");
    write(&last, &memory, options(4, Compression::None), Some(&image)).unwrap();
    let relative: Vec<_> =
        Image::open(&last).unwrap().manifest().layers.iter().map(|l| l.relative.clone()).collect();
    assert_eq!(relative, ["moved/2.snap", "1.snap", "0.snap"]);
    // A parent that was in another directory is found beside its child, wherever that is.
    let together = tempfile::tempdir().unwrap();
    for from in [&last, &to(2)] {
        fs::rename(from, together.path().join(from.file_name().unwrap())).unwrap();
    }
    let image = Image::open(together.path().join("last.snap")).unwrap();
    assert!(read_all(&image).unwrap() == expected(&memory));
}

#[test]
fn a_missing_or_wrong_parent_is_named() {
    let chain = Chain::write(&[&[1], &[2]]);
    let identity = chain.open(0).unwrap().identity().to_string();
    let away = chain.directory.path().join("away");
    fs::rename(chain.path(0), &away).unwrap();
    for n in [1, 2] {
        let problem = chain.problem(n);
        for part in [&identity, "0.snap does not exist", "put that image back"] {
            assert!(problem.contains(part), "{problem}");
        }
    }
    let overview = inspect(chain.path(2)).unwrap();
    assert_eq!(overview.manifest.layers.len(), 2);
    let found = Path::new(overview.layers[0].as_ref().unwrap());
    assert_eq!(found, chain.path(1).canonicalize().unwrap());
    assert!(overview.layers[1].is_err());

    // Another image of that name.
    write(&chain.path(0), &chain.memory[0], options(4, Compression::None), None).unwrap();
    assert!(chain.problem(1).contains("0.snap is another image ("), "{}", chain.problem(1));
    fs::write(chain.path(0), b"something else").unwrap();
    assert!(chain.problem(1).contains("0.snap can't be used"), "{}", chain.problem(1));
    let bytes = fs::read(&away).unwrap();
    fs::write(chain.path(0), &bytes[..bytes.len() - 1]).unwrap();
    assert!(chain.problem(1).contains("truncated"), "{}", chain.problem(1));
    fs::rename(&away, chain.path(0)).unwrap();
    chain.is_whole(2);
}

#[test]
fn damage_in_a_parent_is_found_and_costs_the_pages_that_lie_there() {
    let chain = Chain::write(&[&[0, 1, 2, 3, 5], &[]]);
    // Pages 0 to 3 and 4 to 7 of the first image, of which the others need 4, 6, 7.
    let file = fs::OpenOptions::new().write(true).open(chain.path(0)).unwrap();
    let image = chain.open(0).unwrap();
    for at in [0, 4] {
        let Location::Stored { chunk, .. } = image.find(page(0, at)).unwrap() else { panic!() };
        let (_, _, entry) = image.chunk(chunk).unwrap();
        file.write_all_at(&[0xee; 9], entry.offset).unwrap();
    }
    for n in [1, 2] {
        let image = chain.open(n).unwrap();
        assert!(verify(&image, |_, _| {}).unwrap().is_whole());
        let report = verify_chain(&image, |_, _| {}).unwrap();
        assert_eq!(report.damages.len(), 2);
        let mut lost: Vec<_> = report.damages.iter().flat_map(|damage| &damage.ranges).collect();
        lost.sort_by_key(|range| range.offset);
        let range = |first: u64, count: u64| DamagedRange {
            block: "b0".into(),
            offset: first * 4096,
            len: count * 4096,
        };
        assert_eq!(lost, [&range(4, 1), &range(6, 2)]);
        let error = report.damages[0].error.to_string();
        assert!(error.contains("0.snap is damaged: chunk"), "{error}");
        let error = read_all(&image).unwrap_err().to_string();
        assert!(error.contains("0.snap is damaged: chunk"), "{error}");
    }

    // Saved on top of it, what can't be read there is stored again.
    let path = chain.directory.path().join("new.snap");
    let parent = chain.open(2).unwrap();
    write(&path, &chain.memory[2], options(4, Compression::None), Some(&parent)).unwrap();
    let image = Image::open(&path).unwrap();
    assert!(read_all(&image).unwrap() == expected(&chain.memory[2]));
    assert_eq!(data_len(&image), 3 * PAGE_SIZE as u64);
}

#[test]
fn an_image_does_not_replace_what_it_refers_to() {
    let chain = Chain::write(&[&[1]]);
    let parent = chain.open(1).unwrap();
    let before = fs::read(chain.path(0)).unwrap();
    let force = || WriterOptions { force: true, ..options(4, Compression::None) };
    for n in [0, 1] {
        let error = write(&chain.path(n), &chain.memory[1], force(), Some(&parent)).unwrap_err();
        assert!(matches!(error, ImageError::Replaces { .. }), "{error}");
        assert!(error.to_string().contains("give it another name"), "{error}");
        assert!(check_parent(&parent, &chain.path(n)).is_err());
        // Nor is it replaced by what is made of it.
        let packed = flatten(&parent, &chain.path(n), Layout::Packed, force(), |_, _| true);
        let flat = flatten(&parent, &chain.path(n), Layout::Flat, force(), |_, _| true);
        for made in [packed, flat] {
            assert!(matches!(made, Err(ImageError::Replaces { .. })), "{made:?}");
        }
    }
    assert_eq!(fs::read(chain.path(0)).unwrap(), before);
    assert_eq!(names(chain.directory.path()).len(), 2);
}

#[test]
fn a_chain_has_a_length_at_which_it_is_flattened() {
    // Each image is synced, which memory takes more lightly than a disk.
    let directory = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    let path = |n: usize| directory.path().join(format!("{n}.snap"));
    let mut memory = memory(300);
    let plain = || options(1, Compression::None);
    write(&path(0), &memory, plain(), None).unwrap();
    for n in 1..=MAX_LAYERS {
        memory.insert(page(0, n as u64), 1001 + 2 * n as u32);
        let parent = Image::open(path(n - 1)).unwrap();
        write(&path(n), &memory, plain(), Some(&parent)).unwrap();
    }
    let longest = Image::open(path(MAX_LAYERS)).unwrap();
    assert_eq!(longest.manifest().layers.len(), MAX_LAYERS);
    assert!(read_all(&longest).unwrap() == expected(&memory));
    assert!(verify_chain(&longest, |_, _| {}).unwrap().is_whole());
    let error = write(&path(999), &memory, plain(), Some(&longest)).unwrap_err();
    assert!(error.to_string().contains("snapback flatten"), "{error}");

    let flat = path(1000);
    let mut told = (0, 0);
    let saved = flatten(
        &longest,
        &flat,
        Layout::Packed,
        options(16, Compression::Zstd(1)),
        |done, total| {
            told = (done, total);
            true
        },
    )
    .unwrap();
    assert_eq!((told, saved.data_pages, saved.parent_pages), ((300, 300), 300, 0));
    drop(longest);
    for n in 0..=MAX_LAYERS {
        fs::remove_file(path(n)).unwrap();
    }
    let image = Image::open(&flat).unwrap();
    assert!(read_all(&image).unwrap() == expected(&memory));
    assert_eq!(image.sections().unwrap(), sections());
    assert_eq!(image.manifest().machine, details().machine);
    assert_eq!(image.manifest().pause_us, details().pause_us);
}

#[test]
fn a_flattening_can_be_ended() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("0.snap");
    write(
        &path,
        &(0..5000).map(|at| (page(0, at), 1)).collect(),
        options(4, Compression::None),
        None,
    )
    .unwrap();
    let image = Image::open(&path).unwrap();
    let to = directory.path().join("flat.snap");
    let ended = flatten(&image, &to, Layout::Packed, options(4, Compression::None), |_, _| false);
    assert!(matches!(ended, Err(ImageError::Interrupted(_))));
    assert_eq!(names(directory.path()), ["0.snap"]);
}

/// A list of layers that breaks a rule, in a manifest whose checksum is right.
#[test]
fn hostile_lists_of_layers_are_refused() {
    type Change = fn(&mut Manifest);
    let changes: [(Change, u64, &str); 5] = [
        (|m| m.layers.push(m.layers[0].clone()), LAYERS, "twice"),
        (|m| m.layers[0].identity = m.identity, LAYERS, "to itself"),
        (|m| m.layers = vec![m.layers[0].clone(); 256], LAYERS, "more than 255"),
        (|_| {}, 0, "the superblock to none"),
        (|m| m.layers.clear(), LAYERS, "layer 1, of 0"),
    ];
    for (change, feature, problem) in changes {
        let chain = Chain::write(&[&[1]]);
        let image = chain.open(1).unwrap();
        let mut manifest = image.manifest().clone();
        change(&mut manifest);
        let manifest = serde_json::to_vec(&manifest).unwrap();
        let mut superblock = image.own().superblock.clone();
        superblock.incompatible = feature;
        superblock.regions[Region::Manifest as usize] = Extent {
            offset: superblock.file_len,
            len: manifest.len() as u64,
            checksum: Region::Manifest.checksum(superblock.identity, &manifest),
        };
        superblock.file_len += manifest.len() as u64;
        let mut bytes = fs::read(chain.path(1)).unwrap();
        bytes.extend(&manifest);
        bytes[..SUPERBLOCK_BYTES].copy_from_slice(&superblock.encode());
        fs::write(chain.path(1), bytes).unwrap();
        let error = match chain.open(1) {
            Err(error) => error.to_string(),
            Ok(image) => {
                assert!(!verify(&image, |_, _| {}).unwrap().is_whole());
                read_all(&image).unwrap_err().to_string()
            }
        };
        assert!(error.contains(problem), "{error}");
    }
}

// The files of old.

/// The images that are checked in: a parent with chunks that occur again and again, and
/// a child.
const CHECKED_IN: [&str; 2] = ["v1-parent.snap", "v1-child.snap"];

/// What they hold.
fn checked_in_memory() -> [Memory; 2] {
    let parent: Memory = (0..40).map(|at| (page(0, at), 2 * (at as u32 % 8))).collect();
    let mut child = parent.clone();
    child.extend([(page(0, 3), 1000), (page(0, 17), 1002), (page(0, 8), 2), (page(0, 9), 0)]);
    [parent, child]
}

/// Images of version 1 open for ever, those that refer to others as well.
#[test]
fn the_chain_of_version_1_opens() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    let images = CHECKED_IN.map(|name| Image::open(directory.join(name)).unwrap());
    for (image, memory) in images.iter().zip(checked_in_memory()) {
        assert!(read_all(image).unwrap() == expected(&memory));
        let report = verify_chain(image, |_, _| {}).unwrap();
        assert!(report.is_whole(), "{:?}", report.damages);
        assert_eq!(image.sections().unwrap(), sections());
    }
    let [parent, child] = images;
    // Two groups of four pages that differ, five times each.
    assert_eq!((parent.chunk_count(), child.chunk_count()), (2, 3));
    assert_eq!(child.manifest().layers[0].identity, parent.identity());
    assert_eq!(child.manifest().layers[0].pages, 32);
}

/// Makes them. Only for a new version, under new names, by way of a directory whose name
/// may stand in them: `cargo test --lib make_the_checked_in_chain -- --ignored`
#[test]
#[ignore = "makes tests/data/v1-*.snap, which exist"]
fn make_the_checked_in_chain() {
    let directory = std::env::temp_dir().join("snapback-data");
    fs::create_dir_all(&directory).unwrap();
    let [parent, child] = CHECKED_IN.map(|name| directory.join(name));
    let [first, second] = checked_in_memory();
    let options = || options(4, Compression::Zstd(3));
    write(&parent, &first, options(), None).unwrap();
    write(&child, &second, options(), Some(&Image::open(&parent).unwrap())).unwrap();
    let to = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    for (name, from) in CHECKED_IN.iter().zip([parent, child]) {
        fs::copy(from, to.join(name)).unwrap();
    }
    fs::remove_dir_all(directory).unwrap();
}

/// One image of a chain: how it is written, and what changes in it.
#[derive(Debug, Clone)]
struct Step {
    chunk_pages: usize,
    compression: Compression,
    workers: usize,
    changes: Vec<(bool, prop::sample::Index, u32)>,
    /// Pages of the second block, whose number may change.
    more: u64,
}

fn any_step() -> impl Strategy<Value = Step> {
    let seed = prop_oneof![Just(0u32), 1..30u32];
    (
        (0..7u32).prop_map(|shift| 1 << shift),
        prop_oneof![Just(Compression::None), Just(Compression::Zstd(1))],
        1..4usize,
        vec((any::<bool>(), any::<prop::sample::Index>(), seed), 0..60),
        0..40u64,
    )
        .prop_map(|(chunk_pages, compression, workers, changes, more)| Step {
            chunk_pages,
            compression,
            workers,
            changes,
            more,
        })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(48) })]

    #[test]
    fn every_image_of_a_chain_gives_what_was_written(steps in vec(any_step(), 1..6)) {
        let directory = tempfile::tempdir().unwrap();
        let mut parent: Option<Arc<Image>> = None;
        let mut memory: Memory = (0..100).map(|at| (page(0, at), at as u32 % 7)).collect();
        for (n, step) in steps.iter().enumerate() {
            memory.retain(|page, _| page.block.0 == 0 || page.number < step.more);
            for at in 0..step.more {
                memory.entry(page(1, at)).or_insert(3);
            }
            let places: Vec<Page> = memory.keys().copied().collect();
            for (_, at, seed) in &step.changes {
                memory.insert(places[at.index(places.len())], *seed);
            }
            let path = directory.path().join(format!("{n}.snap"));
            let options = WriterOptions { workers: step.workers, ..options(step.chunk_pages, step.compression) };
            let saved = write(&path, &memory, options, parent.as_ref()).unwrap();
            let image = Image::open(&path).unwrap();
            prop_assert!(read_all(&image).unwrap() == expected(&memory));
            let report = verify_chain(&image, |_, _| {}).unwrap();
            prop_assert!(report.is_whole(), "{:?}", report.damages);
            let elsewhere = image.manifest().layers.iter().map(|layer| layer.pages).sum::<u64>();
            prop_assert_eq!(saved.parent_pages, elsewhere);
            // Whatever did not change lies elsewhere.
            if let Some(parent) = &parent {
                let before = read_all(parent).unwrap();
                let now = expected(&memory);
                let same = now.iter().filter(|(page, bytes)| {
                    bytes.iter().any(|byte| *byte != 0) && before.get(page) == Some(bytes)
                });
                prop_assert_eq!(saved.parent_pages, same.count() as u64);
            }
            parent = Some(image);
        }
    }
}
