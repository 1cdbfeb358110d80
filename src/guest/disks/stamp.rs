//! Stamps, by which an unchanged file of a disk is recognised.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use xxhash_rust::xxh3::Xxh3Default;

use crate::guest::GuestError;
use crate::machine::{Disk, DiskRole, FileStamp};

/// Length of a sample in bytes.
const SAMPLE: u64 = 4096;

/// Most samples taken of a file, evenly spaced from its start to its end.
const SAMPLES: u64 = 256;

/// Computes a file's stamp: its length, the time of its last change, and xxh3-64 (seed 0)
/// over its length (u64, little-endian) and its content. Of a file longer than 1 MiB,
/// 256 samples of 4096 bytes stand for its content, at the multiples of 4096 next below
/// `(len - 4096) * n / 255` for n from 0 to 255.
///
/// It reads 1 MiB at most, whatever the file's size.
///
/// # Errors
/// When it can't be read, or is neither a regular file nor a block device.
pub fn stamp(path: &Path) -> io::Result<FileStamp> {
    let mut file = open(path)?;
    let meta = file.metadata()?;
    let (len, mtime_ns) = match meta.file_type() {
        kind if kind.is_file() => {
            let nanos = i128::from(meta.mtime()) * 1_000_000_000 + i128::from(meta.mtime_nsec());
            (meta.len(), nanos.clamp(i64::MIN.into(), i64::MAX.into()) as i64)
        }
        kind if kind.is_block_device() => (file.seek(SeekFrom::End(0))?, 0),
        _ => return Err(io::Error::other("it is neither a regular file nor a block device")),
    };
    let fingerprint = fingerprint(&file, len)?;
    Ok(FileStamp { len, mtime_ns, fingerprint })
}

/// Stamps the files of a disk that must not change any more: a captured one, whose files are
/// flushed to storage first (an image must not survive a crash of the host that they don't), or a
/// read-only one, as far as its files can be read.
///
/// # Errors
/// [`GuestError::DiskUnreadable`] when a file of a captured disk can't be read or flushed.
pub fn stamp_files(disk: &mut Disk) -> Result<(), GuestError> {
    let described = disk.describe();
    for file in &mut disk.chain {
        let path = Path::new(&file.path);
        file.stamp = match disk.role {
            DiskRole::Captured => {
                let stamped = write_out(path).and_then(|()| stamp(path));
                Some(stamped.map_err(|source| GuestError::DiskUnreadable {
                    disk: described.clone(),
                    path: path.to_owned(),
                    source,
                })?)
            }
            DiskRole::ReadOnly => stamp(path).ok(),
            DiskRole::Excluded | DiskRole::Empty => None,
        };
    }
    Ok(())
}

/// Flushes a disk's file from the host's page cache to storage.
///
/// # Errors
/// When it can't be opened or written.
pub fn write_out(path: &Path) -> io::Result<()> {
    open(path)?.sync_data()
}

fn open(path: &Path) -> io::Result<File> {
    // Opening a pipe in its place must not block.
    File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)
}

fn fingerprint(file: &File, len: u64) -> io::Result<u64> {
    let mut hash = Xxh3Default::new();
    hash.update(&len.to_le_bytes());
    if len <= SAMPLES * SAMPLE {
        let mut content = vec![0; len as usize];
        file.read_exact_at(&mut content, 0)?;
        hash.update(&content);
        return Ok(hash.digest());
    }
    let mut sample = [0; SAMPLE as usize];
    for number in 0..SAMPLES {
        // In 128 bits: no length overflows them.
        let at = u128::from(len - SAMPLE) * u128::from(number) / u128::from(SAMPLES - 1);
        let at = at as u64 / SAMPLE * SAMPLE;
        file.read_exact_at(&mut sample, at)?;
        hash.update(&sample);
    }
    Ok(hash.digest())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_copy_has_the_same_fingerprint_and_a_changed_file_another() {
        let directory = tempfile::tempdir().unwrap();
        let (file, copy) = (directory.path().join("disk"), directory.path().join("copy"));
        for len in [0, 1, 4096, 1 << 20, (1 << 20) + 1, (5 << 20) + 513] {
            let mut content: Vec<u8> = (0..len).map(|n| (n % 251) as u8).collect();
            fs::write(&file, &content).unwrap();
            fs::copy(&file, &copy).unwrap();
            let (original, copied) = (stamp(&file).unwrap(), stamp(&copy).unwrap());
            assert_eq!(original, stamp(&file).unwrap());
            assert_eq!((original.len, original.fingerprint), (len as u64, copied.fingerprint));
            let Some(first) = content.first_mut() else { continue };
            *first ^= 1;
            fs::write(&copy, &content).unwrap();
            assert_ne!(stamp(&copy).unwrap().fingerprint, original.fingerprint);
            content.pop();
            fs::write(&file, &content).unwrap();
            assert_ne!(stamp(&file).unwrap().fingerprint, original.fingerprint);
        }
    }

    #[test]
    fn what_is_no_disk_has_no_stamp() {
        let directory = tempfile::tempdir().unwrap();
        assert!(stamp(directory.path()).is_err());
        assert!(stamp(&directory.path().join("missing")).is_err());
        let pipe = directory.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(stamp(&pipe).is_err());
    }
}
