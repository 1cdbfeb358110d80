//! The qcow2 files that are written here, without `qemu-img`: overlays, because a revert waits for
//! them, and starting `qemu-img` takes more than 10 ms for each disk; and files that hold nothing
//! but the state of a machine, which `qemu-img` can't make.
//!
//! The format is QEMU's docs/interop/qcow2.txt, version 3; all integers big-endian. Each file is
//! laid out as header, refcount table, one refcount block, L1 table, and, where it has an internal
//! snapshot, the snapshot table, the snapshot's L1 table, its L2 table and its clusters; each begins
//! a cluster.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Cluster size in bits: 64 KiB, QEMU's default.
const CLUSTER_BITS: u32 = 16;
const CLUSTER: u64 = 1 << CLUSTER_BITS;

/// Bytes of the guest's disk that one entry of the L1 table stands for: an L2 table is
/// one cluster of 8-byte entries, each of which stands for a cluster.
const L1_COVERS: u64 = CLUSTER / 8 * CLUSTER;

/// The largest L1 table that QEMU takes, in bytes (`QCOW_MAX_L1_SIZE`).
const MAX_L1: u64 = 32 << 20;

/// Of the L1 table, and of an entry of an L2 table: that nothing else refers to what is there.
const COPIED: u64 = 1 << 63;

/// The longest name of a backing file, in bytes.
const MAX_NAME: usize = 1023;

/// Bytes of the header itself.
const HEADER: usize = 104;

/// Where the fixed parts lie.
const REFCOUNT_TABLE: u64 = CLUSTER;
const REFCOUNT_BLOCK: u64 = 2 * CLUSTER;
const L1_TABLE: u64 = 3 * CLUSTER;

/// The header extension that holds the backing file's format.
const BACKING_FORMAT: u32 = 0xe279_2aca;

/// The file below an overlay.
#[derive(Debug, Clone, Copy)]
pub struct Backing<'a> {
    /// Its path.
    pub path: &'a str,
    /// Its format, such as `raw`.
    pub format: &'a str,
}

/// Writes an empty overlay to an empty file: `size` bytes as the guest sees them, all
/// of them those of the file below. Where a `snapshot` is named, the overlay has an internal
/// snapshot of that name, of its empty state. Where the path of the file below is empty, none is named:
/// whoever opens the overlay has to say what lies below.
///
/// The file is sparse, and at most 66 MiB long.
///
/// # Errors
/// When it can't be written, when a name is too long for a qcow2 file, or when the size is
/// not a multiple of 512 bytes or too large.
pub fn write_overlay(
    file: &File,
    size: u64,
    backing: Backing<'_>,
    snapshot: Option<&str>,
) -> io::Result<()> {
    if backing.path.len() > MAX_NAME || backing.format.len() > MAX_NAME {
        return refuse("the name of the file below is longer than qcow2's 1023 bytes");
    }
    let l1_entries = size.div_ceil(L1_COVERS);
    if !size.is_multiple_of(512) || l1_entries * 8 > MAX_L1 {
        return refuse("a disk's size is a multiple of 512 bytes, and at most 2 EiB");
    }
    let l1_clusters = (l1_entries * 8).div_ceil(CLUSTER);
    let mut clusters = 3 + l1_clusters;
    let snapshot = snapshot.map(|name| {
        let table = clusters;
        clusters += 1 + l1_clusters;
        Snapshot { name, disk_size: size, l1_table: (table + 1) * CLUSTER, l1_entries, state: 0 }
    });
    let table = (3 + l1_clusters) * CLUSTER;
    write_fixed(
        file,
        size,
        Some(backing).filter(|backing| !backing.path.is_empty()),
        l1_entries,
        clusters,
        snapshot.is_some().then_some(table),
    )?;
    match snapshot {
        Some(snapshot) => file.write_all_at(&snapshot.entry(), table),
        None => Ok(()),
    }
}

/// Writes to an empty file a disk that has nothing on it, with one internal `snapshot`, which
/// holds the state of a machine: what QEMU's `snapshot-load` reads.
///
/// QEMU takes a snapshot's state from behind the end of the disk (`qcow2_vm_state_offset`), which
/// begins with an entry of the L1 table.
///
/// # Errors
/// When it can't be written, or the state is larger than the 512 MiB of one L2 table.
pub fn write_state(file: &File, snapshot: &str, state: &[u8]) -> io::Result<()> {
    if state.len() as u64 > L1_COVERS {
        return refuse("the state of the devices is larger than 512 MiB");
    }
    let table = L1_TABLE + CLUSTER;
    let (l1_table, l2_table, data) = (table + CLUSTER, table + 2 * CLUSTER, table + 3 * CLUSTER);
    let data_clusters = (state.len() as u64).div_ceil(CLUSTER);
    let clusters = data / CLUSTER + data_clusters;
    // Of one cluster: the disk takes the first entry of the L1 table, the state the second.
    write_fixed(file, CLUSTER, None, 1, clusters, Some(table))?;
    let snapshot = Snapshot {
        name: snapshot,
        disk_size: CLUSTER,
        l1_table,
        l1_entries: 2,
        state: state.len() as u64,
    };
    file.write_all_at(&snapshot.entry(), table)?;
    file.write_all_at(&(l2_table | COPIED).to_be_bytes(), l1_table + 8)?;
    let entry = |number: u64| ((data + number * CLUSTER) | COPIED).to_be_bytes();
    let entries: Vec<u8> = (0..data_clusters).flat_map(entry).collect();
    file.write_all_at(&entries, l2_table)?;
    file.write_all_at(state, data)
}

/// An entry of the snapshot table.
struct Snapshot<'a> {
    name: &'a str,
    disk_size: u64,
    l1_table: u64,
    l1_entries: u64,
    /// Bytes of the machine's state.
    state: u64,
}

impl Snapshot<'_> {
    fn entry(&self) -> Vec<u8> {
        const ID: &[u8] = b"1";
        let mut entry = Vec::new();
        entry.extend(self.l1_table.to_be_bytes());
        entry.extend((self.l1_entries as u32).to_be_bytes());
        entry.extend((ID.len() as u16).to_be_bytes());
        entry.extend((self.name.len() as u16).to_be_bytes());
        entry.extend([0; 4 + 4 + 8]); // no date, no clock of the machine's
        // The same in the field of 32 bits, which a longer one follows.
        entry.extend(u32::try_from(self.state).unwrap_or(0).to_be_bytes());
        entry.extend(24u32.to_be_bytes());
        entry.extend(self.state.to_be_bytes());
        entry.extend(self.disk_size.to_be_bytes());
        entry.extend(u64::MAX.to_be_bytes()); // no count of instructions
        entry.extend(ID);
        entry.extend(self.name.as_bytes());
        entry
    }
}

/// Writes what every file has: header, refcounts, and an L1 table of zeros. Each cluster that
/// there is, is used once.
fn write_fixed(
    file: &File,
    size: u64,
    backing: Option<Backing<'_>>,
    l1_entries: u64,
    clusters: u64,
    snapshot_table: Option<u64>,
) -> io::Result<()> {
    let mut extensions = Vec::new();
    if let Some(Backing { format, .. }) = backing {
        extensions.extend(BACKING_FORMAT.to_be_bytes());
        extensions.extend((format.len() as u32).to_be_bytes());
        extensions.extend(format.as_bytes());
        extensions.resize(extensions.len().next_multiple_of(8), 0);
    }
    extensions.extend([0; 8]);
    let below = backing.map_or("", |backing| backing.path);
    let name_at = if below.is_empty() { 0 } else { (HEADER + extensions.len()) as u64 };

    let mut header = Vec::with_capacity(HEADER);
    header.extend(b"QFI\xfb");
    header.extend(3u32.to_be_bytes());
    header.extend(name_at.to_be_bytes());
    header.extend((below.len() as u32).to_be_bytes());
    header.extend(CLUSTER_BITS.to_be_bytes());
    header.extend(size.to_be_bytes());
    header.extend(0u32.to_be_bytes()); // not encrypted
    header.extend((l1_entries as u32).to_be_bytes());
    header.extend(L1_TABLE.to_be_bytes());
    header.extend(REFCOUNT_TABLE.to_be_bytes());
    header.extend(1u32.to_be_bytes()); // clusters of the refcount table
    header.extend(u32::from(snapshot_table.is_some()).to_be_bytes());
    header.extend(snapshot_table.unwrap_or(0).to_be_bytes());
    header.extend([0; 3 * 8]); // no features: incompatible, compatible, autoclear
    header.extend(4u32.to_be_bytes()); // refcounts of 1 << 4 bits
    header.extend((HEADER as u32).to_be_bytes());
    debug_assert_eq!(header.len(), HEADER);
    header.extend(extensions);
    header.extend(below.as_bytes());

    // One block has room for 32768 clusters.
    let refcounts: Vec<u8> = (0..clusters).flat_map(|_| 1u16.to_be_bytes()).collect();
    file.set_len(clusters * CLUSTER)?;
    file.write_all_at(&header, 0)?;
    file.write_all_at(&REFCOUNT_BLOCK.to_be_bytes(), REFCOUNT_TABLE)?;
    file.write_all_at(&refcounts, REFCOUNT_BLOCK)
}

fn refuse(why: &str) -> io::Result<()> {
    Err(io::Error::new(io::ErrorKind::InvalidInput, why))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn qemu_img(args: &[&str]) -> String {
        let output = Command::new("qemu-img").args(args).output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned()
            + &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{args:?}: {said}");
        said
    }

    #[test]
    fn qemu_finds_an_overlay_whole_and_what_is_below_in_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
        let (base, overlay, copy) = (path("base, \"é\""), path("overlay"), path("copy"));
        for size in [0, 512, 1 << 20, 513 << 20, (1 << 40) + 512] {
            let content = vec![7; size.min(1 << 20) as usize];
            std::fs::write(&base, content).unwrap();
            File::options().write(true).open(&base).unwrap().set_len(size).unwrap();
            let backing = Backing { path: &base, format: "raw" };
            for snapshot in [None, Some("moment")] {
                write_overlay(&File::create(&overlay).unwrap(), size, backing, snapshot).unwrap();
                let checked = qemu_img(&["check", "-f", "qcow2", &overlay]);
                assert!(checked.contains("No errors were found"), "{checked}");
                let info = qemu_img(&["info", "--output=json", "-f", "qcow2", &overlay]);
                let info: serde_json::Value = serde_json::from_str(&info).unwrap();
                assert_eq!(info["virtual-size"], size);
                assert_eq!(info["backing-filename"], base.as_str());
                assert_eq!(info["backing-filename-format"], "raw");
                assert_eq!(info["snapshots"][0]["name"].as_str(), snapshot);
            }
        }
        std::fs::write(&base, vec![7; 1 << 20]).unwrap();
        let backing = Backing { path: &base, format: "raw" };
        write_overlay(&File::create(&overlay).unwrap(), 1 << 20, backing, None).unwrap();
        qemu_img(&["convert", "-f", "qcow2", "-O", "raw", &overlay, &copy]);
        assert_eq!(std::fs::read(&copy).unwrap(), std::fs::read(&base).unwrap());
    }

    #[test]
    fn what_a_qcow2_file_can_not_hold_is_refused() {
        let file = tempfile::tempfile().unwrap();
        let backing = Backing { path: "/base", format: "raw" };
        assert!(write_overlay(&file, 513, backing, None).is_err());
        assert!(write_overlay(&file, u64::MAX - 511, backing, None).is_err());
        let long = "x".repeat(1024);
        assert!(write_overlay(&file, 512, Backing { path: &long, ..backing }, None).is_err());
        assert_eq!(file.metadata().unwrap().len(), 0);
    }

    #[test]
    fn qemu_finds_a_state_file_whole_and_the_state_in_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state").to_str().unwrap().to_owned();
        for len in [1, 700_000] {
            write_state(&File::create(&path).unwrap(), "moment", &vec![7; len]).unwrap();
            let checked = qemu_img(&["check", "-f", "qcow2", &path]);
            assert!(checked.contains("No errors were found"), "{checked}");
            let info = qemu_img(&["info", "--output=json", "-f", "qcow2", &path]);
            let info: serde_json::Value = serde_json::from_str(&info).unwrap();
            let snapshot = &info["snapshots"][0];
            assert_eq!(snapshot["name"], "moment");
            assert_eq!(snapshot["vm-state-size"], len);
        }
    }
}
