//! An empty qcow2 overlay over another file. It is written here, without `qemu-img`, because
//! a revert waits for it: starting `qemu-img` takes more than 10 ms for each disk.
//!
//! The format is QEMU's docs/interop/qcow2.txt, version 3; all integers big-endian.

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

/// The longest name of a backing file, in bytes.
const MAX_NAME: usize = 1023;

/// Bytes of the header itself.
const HEADER: usize = 104;

/// The header extension that holds the backing file's format.
const BACKING_FORMAT: u32 = 0xe279_2aca;

/// Writes an empty overlay to an empty file: `size` bytes as the guest sees them, all
/// of them those of the file `backing`, whose format is `format`.
///
/// The file is sparse, and at most 33 MiB long. It is laid out as header, refcount
/// table, one refcount block, L1 table; each begins a cluster.
///
/// # Errors
/// When it can't be written, when the name is too long for a qcow2 file, or when the size is
/// not a multiple of 512 bytes or too large.
pub fn write_overlay(file: &File, size: u64, backing: &str, format: &str) -> io::Result<()> {
    let refuse = |why: &str| Err(io::Error::new(io::ErrorKind::InvalidInput, why));
    if backing.len() > MAX_NAME || format.len() > MAX_NAME {
        return refuse("the name of the file below is longer than qcow2's 1023 bytes");
    }
    let l1_entries = size.div_ceil(L1_COVERS);
    if !size.is_multiple_of(512) || l1_entries * 8 > MAX_L1 {
        return refuse("a disk's size is a multiple of 512 bytes, and at most 2 EiB");
    }
    let (refcount_table, refcount_block, l1_table) = (CLUSTER, 2 * CLUSTER, 3 * CLUSTER);
    let clusters = 3 + (l1_entries * 8).div_ceil(CLUSTER);

    let mut extensions = Vec::new();
    extensions.extend(BACKING_FORMAT.to_be_bytes());
    extensions.extend((format.len() as u32).to_be_bytes());
    extensions.extend(format.as_bytes());
    extensions.resize(extensions.len().next_multiple_of(8), 0);
    extensions.extend([0; 8]);
    let name_at = (HEADER + extensions.len()) as u64;

    let mut header = Vec::with_capacity(HEADER);
    header.extend(b"QFI\xfb");
    header.extend(3u32.to_be_bytes());
    header.extend(name_at.to_be_bytes());
    header.extend((backing.len() as u32).to_be_bytes());
    header.extend(CLUSTER_BITS.to_be_bytes());
    header.extend(size.to_be_bytes());
    header.extend(0u32.to_be_bytes()); // not encrypted
    header.extend((l1_entries as u32).to_be_bytes());
    header.extend(l1_table.to_be_bytes());
    header.extend(refcount_table.to_be_bytes());
    header.extend(1u32.to_be_bytes()); // clusters of the refcount table
    header.extend([0; 4 + 8]); // no snapshots
    header.extend([0; 3 * 8]); // no features: incompatible, compatible, autoclear
    header.extend(4u32.to_be_bytes()); // refcounts of 1 << 4 bits
    header.extend((HEADER as u32).to_be_bytes());
    debug_assert_eq!(header.len(), HEADER);
    header.extend(extensions);
    header.extend(backing.as_bytes());

    // Each cluster that there is, is used once. One block has room for 32768 of them.
    let refcounts: Vec<u8> = (0..clusters).flat_map(|_| 1u16.to_be_bytes()).collect();
    file.set_len(clusters * CLUSTER)?;
    file.write_all_at(&header, 0)?;
    file.write_all_at(&refcount_block.to_be_bytes(), refcount_table)?;
    file.write_all_at(&refcounts, refcount_block)
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
            write_overlay(&File::create(&overlay).unwrap(), size, &base, "raw").unwrap();
            let checked = qemu_img(&["check", "-f", "qcow2", &overlay]);
            assert!(checked.contains("No errors were found"), "{checked}");
            let info = qemu_img(&["info", "--output=json", "-f", "qcow2", &overlay]);
            let info: serde_json::Value = serde_json::from_str(&info).unwrap();
            assert_eq!(info["virtual-size"], size);
            assert_eq!(info["backing-filename"], base.as_str());
            assert_eq!(info["backing-filename-format"], "raw");
        }
        std::fs::write(&base, vec![7; 1 << 20]).unwrap();
        write_overlay(&File::create(&overlay).unwrap(), 1 << 20, &base, "raw").unwrap();
        qemu_img(&["convert", "-f", "qcow2", "-O", "raw", &overlay, &copy]);
        assert_eq!(std::fs::read(&copy).unwrap(), std::fs::read(&base).unwrap());
    }

    #[test]
    fn what_a_qcow2_file_can_not_hold_is_refused() {
        let file = tempfile::tempfile().unwrap();
        assert!(write_overlay(&file, 513, "/base", "raw").is_err());
        assert!(write_overlay(&file, u64::MAX - 511, "/base", "raw").is_err());
        assert!(write_overlay(&file, 512, &"x".repeat(1024), "raw").is_err());
        assert_eq!(file.metadata().unwrap().len(), 0);
    }
}
