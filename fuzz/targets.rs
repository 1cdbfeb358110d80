//! What is fuzzed: each function reads hostile bytes as one format, and must come to an
//! end without a panic, in bounded memory. `fuzz_targets` and `tests/fuzz_corpus.rs`
//! call the same functions.

use std::fs::File;
use std::io::{Cursor, Read, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use snapback::exchange::{LibvirtHeader, read_memory};
use snapback::host::packets;
use snapback::host::shared_memory::SharedMemory;
use snapback::image::{Image, inspect, verify_chain, verify_flat};
use snapback::keeper::{Ledger, Message};
use snapback::memory::WorkingSet;
use snapback::page::{BlockId, Location, Page, PageSource};
use snapback::qmp::{Qmp, QmpError};
use snapback::revert::{Rights, run_broker};
use snapback::wire::{Item, ReturnPath, StreamBlock, StreamReader};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

/// An image: opened, with those that it refers to, verified as a whole, and some of its
/// pages read.
///
/// Damage is found by checksums long before it could do harm. So that the code behind
/// them is reached too, the first byte, which is none of the image's, has some of them set
/// right: bit 0 the superblock's, bit 1 those of the manifest and of the sections, bit 2
/// those of the tables' pieces, bit 3 those of plain chunks.
pub fn image(data: &[u8]) {
    let Some((_file, image)) = open_image(data) else { return };
    let _ = verify_chain(&image, |_, _| {});
    let _ = verify_flat(&image);
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

/// Opens it. Its path leads to the file as long as that is open.
pub fn open_image(data: &[u8]) -> Option<(File, Arc<Image>)> {
    let (first, bytes) = data.split_first()?;
    let mut bytes = bytes.to_vec();
    set_right(&mut bytes, *first);
    let file = in_memory(&bytes)?;
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let _ = inspect(&path);
    Some((file, Image::open(&path).ok()?))
}

/// Length in bytes of a superblock, and of a piece of a table. Their last eight are their
/// checksum.
const CHECKED: usize = 4096;
/// Where the superblock has the identity, and where its records of regions begin.
const IDENTITY: usize = 40;
const REGIONS: usize = 72;
/// Numbers of regions (docs/format.md).
const CHUNK_TABLE: usize = 1;
const PAGE_INDEX: usize = 2;
const WHOLE_REGIONS: std::ops::Range<usize> = 3..7;

/// Sets checksums of an image right, as far as its regions lie within it.
fn set_right(bytes: &mut [u8], which: u8) {
    if bytes.len() < CHECKED {
        return;
    }
    let word = |bytes: &[u8], at: usize| u64::from_le_bytes(*bytes[at..].first_chunk().unwrap());
    let region = |bytes: &[u8], number: usize| {
        let at = REGIONS + 24 * number;
        let start = usize::try_from(word(bytes, at)).ok()?;
        let end = start.checked_add(usize::try_from(word(bytes, at + 8)).ok()?)?;
        (start >= CHECKED && end <= bytes.len()).then_some(start..end)
    };
    let identity = bytes[IDENTITY..IDENTITY + 16].to_vec();
    let seed = |number: usize| xxh3_64(&[&identity[..], &[number as u8]].concat());
    if which & 8 != 0
        && let Some(table) = region(bytes, CHUNK_TABLE)
    {
        for piece in table.step_by(CHECKED) {
            for entry in (piece..).step_by(24).take(170) {
                let Some(raw) = bytes.get(entry..entry + 24) else { continue };
                let (start, len, plain) =
                    (word(raw, 0) as usize, word(raw, 8) as u32, raw[12] == 0);
                let end = start.saturating_add(len as usize);
                if plain && let Some(chunk) = bytes.get(start..end) {
                    let checksum = xxh3_64(chunk).to_le_bytes();
                    bytes[entry + 16..entry + 24].copy_from_slice(&checksum);
                }
            }
        }
    }
    for number in [CHUNK_TABLE, PAGE_INDEX].into_iter().filter(|_| which & 4 != 0) {
        let Some(table) = region(bytes, number) else { continue };
        for (piece, bytes) in (0..).zip(bytes[table].chunks_exact_mut(CHECKED)) {
            let (entries, checksum) = bytes.split_at_mut(CHECKED - 8);
            let seed = seed(number).wrapping_add(piece);
            checksum.copy_from_slice(&xxh3_64_with_seed(entries, seed).to_le_bytes());
        }
    }
    for number in WHOLE_REGIONS.filter(|_| which & 2 != 0) {
        let Some(place) = region(bytes, number) else { continue };
        let checksum = xxh3_64_with_seed(&bytes[place], seed(number)).to_le_bytes();
        bytes[REGIONS + 24 * number + 16..][..8].copy_from_slice(&checksum);
    }
    if which & 1 != 0 {
        let checksum = xxh3_64(&bytes[..CHECKED - 8]);
        bytes[CHECKED - 8..CHECKED].copy_from_slice(&checksum.to_le_bytes());
    }
}

/// A migration stream from a pipe.
pub fn stream(data: &[u8]) {
    let mut stream = StreamReader::new(data);
    while let Ok(Some(_)) = stream.next_item() {}
}

/// The return path: what QEMU tells a postcopy source.
pub fn return_path(data: &[u8]) {
    let mut path = ReturnPath::new(data);
    while let Ok(Some(_)) = path.next_message() {
        assert!(path.at() <= data.len() as u64);
    }
}

/// QEMU's control socket: a line each for the greeting and the answers, with events between
/// them. Answers to commands have the command's number set, as far as they are objects.
pub fn qmp(data: &[u8]) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let Ok(runtime) = runtime else { return };
    runtime.block_on(async {
        let Ok((ours, theirs)) = UnixStream::pair() else { return };
        let _ = tokio::join!(say(data, theirs), ask(ours));
    });
}

/// Speaks as QEMU: a line for the greeting, and one for each command, events not counted. It
/// hangs up when there are no more, or behind something that is no answer: nobody waits for that.
async fn say(data: &[u8], socket: UnixStream) -> std::io::Result<()> {
    let (commands, mut answers) = socket.into_split();
    let mut commands = BufReader::new(commands).lines();
    let mut lines = data.split_inclusive(|byte| *byte == b'\n');
    let mut id = Value::Null;
    loop {
        loop {
            let Some(line) = lines.next() else { return Ok(()) };
            let mut said = serde_json::from_slice::<Value>(line).unwrap_or_default();
            let is_event = said.get("event").is_some();
            if let Some(fields) = said.as_object_mut().filter(|_| !is_event && !id.is_null()) {
                fields.insert("id".into(), id.take());
                answers.write_all(format!("{said}\n").as_bytes()).await?;
            } else {
                answers.write_all(line).await?;
            }
            match said {
                Value::Object(_) if is_event => {}
                Value::Object(_) => break,
                _ => return Ok(()),
            }
        }
        let Some(command) = commands.next_line().await? else { return Ok(()) };
        id = serde_json::from_str::<Value>(&command)
            .map_or(Value::Null, |asked| asked["id"].clone());
    }
}

/// Asks all that is asked of a QEMU.
async fn ask(socket: UnixStream) -> Result<(), QmpError> {
    const PATIENCE: Duration = Duration::from_millis(5);
    let qmp = Qmp::over(socket, PATIENCE).await?.with_timeout(PATIENCE);
    let mut events = qmp.events();
    let _ = (qmp.status().await, qmp.machine_type().await, qmp.migration_info().await);
    let _ = (qmp.migration_capabilities().await, qmp.ram_blocks().await);
    let _ = (qmp.block_nodes().await, qmp.block_edges().await, qmp.block_devices().await);
    let _ = (qmp.job("commit").await, qmp.qom_children("/machine").await);
    let _ = (qmp.device_properties("e1000").await, qmp.qom_value("/machine", "rtc-time").await);
    let _ = (qmp.networks().await, qmp.host_forwards().await, qmp.usb_ports().await);
    let _ = (qmp.chardevs().await, qmp.cpu_slots().await);
    drop(qmp);
    while events.next().await.is_ok() {}
    Ok(())
}

/// What a keeper is told, and the shared memory that it and a new server are given.
pub fn keeper(data: &[u8]) {
    for bytes in data.chunks(8) {
        let _ = Message::parse(bytes);
    }
    let Ok(memory) = SharedMemory::create(c"fuzz", data.len().max(1) as u64) else { return };
    let Ok(fd) = memory.write(data, 0).and_then(|()| memory.as_fd().try_clone_to_owned()) else {
        return;
    };
    let Ok(ledger) = Ledger::open(fd) else { return };
    let _ = (ledger.details(), ledger.claim_words().words().len());
    let _ = (ledger.direct(), ledger.last_block(), ledger.restarts(), ledger.qemu());
    let _ = (ledger.is_running(), ledger.is_torn(), ledger.died_ms_ago());
}

/// What a server that was taken over sends to its broker, which holds rights that the server has
/// given up: questions, each behind its length. Whatever they are, one file is opened, and one is
/// replaced, by a whole working set.
pub fn broker(data: &[u8]) {
    let Ok(folder) = tempfile::tempdir() else { return };
    let [granted, set, other] = ["granted", "set", "other"].map(|name| folder.path().join(name));
    if [&granted, &other].iter().any(|file| std::fs::write(file, "before").is_err()) {
        return;
    }
    let mut rights = Rights::default();
    rights.working_set = Some(set.clone());
    rights.files = vec![granted.clone()];
    let Ok((ours, theirs)) = packets::pair() else { return };
    let broker = std::thread::spawn(move || run_broker(theirs, &rights));
    let mut rest = data;
    while let Some((len, bytes)) = rest.split_first_chunk() {
        let len = usize::from(u16::from_le_bytes(*len)).min(bytes.len());
        let (packet, behind) = bytes.split_at(len);
        rest = behind;
        // A broker that has hung up takes no more; one that answers is let go on.
        if packets::send(ours.as_fd(), packet, None).is_err()
            || !matches!(packets::receive(&ours, &mut [0; 32]), Ok((1.., _)))
        {
            break;
        }
    }
    drop(ours);
    broker.join().expect("the broker panicked");
    for file in [&granted, &other] {
        assert!(std::fs::read(file).is_ok_and(|now| now == b"before"), "{file:?} was written");
    }
    if let Ok(stored) = std::fs::read(&set) {
        WorkingSet::decode(&stored).expect("what was stored is no working set");
    }
    for entry in std::fs::read_dir(folder.path()).into_iter().flatten().flatten() {
        assert!([&granted, &set, &other].contains(&&entry.path()), "{entry:?} was made");
    }
}

/// A migration stream in a file: with the mark of mapped-ram, what it passes over, and then
/// its bitmaps and pages, which are written to an image that is never finished.
pub fn mapped_ram(data: &[u8]) {
    let mut stream = StreamReader::of_file(Cursor::new(data));
    let has_places = |blocks: &[StreamBlock]| blocks.iter().all(|block| block.mapped.is_some());
    let mapped = matches!(stream.next_item(), Ok(Some(Item::Blocks(found))) if has_places(found));
    while let Ok(Some(_)) = stream.next_item() {}
    let _ = (stream.config(), stream.machine_type().len());
    // Others may claim any amount of memory, which is the target `stream`'s concern.
    if let Some(file) = in_memory(data).filter(|_| mapped) {
        let image = std::env::temp_dir().join("snapback-fuzz.snap");
        let _ = read_memory(&file, Path::new("fuzz"), &image);
    }
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

/// The formats of a repository: maps, indexes, footers of packs, closed objects, the directory of a
/// packed file, manifests, extents, names. The first byte says which.
pub fn repository(data: &[u8]) {
    snapback::repository::read_hostile(data);
}

/// A file without a name.
fn in_memory(bytes: &[u8]) -> Option<File> {
    // SAFETY: the name is a C string, and memfd_create(2) keeps no pointer to it.
    let fd = unsafe {
        libc::memfd_create(c"fuzz".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING)
    };
    if fd < 0 {
        return None;
    }
    // SAFETY: the kernel has just given us this descriptor; nobody else owns it.
    let mut file = unsafe { File::from_raw_fd(fd) };
    file.write_all(bytes).ok()?;
    file.rewind().ok()?;
    Some(file)
}
