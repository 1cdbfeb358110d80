//! The frozen files of a snapshot's disks: where they are now, and whether they are unchanged.
//! A guest's memory caches their content; on other content it would destroy its file systems.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use crate::guest::GuestError;
use crate::guest::disks::stamp::stamp;
use crate::machine::{Disk, DiskFile, DiskRole, FileStamp};

/// A disk's file as the caller gives it: `(name, file)`.
pub(in crate::guest) type Given = (String, PathBuf);

/// The files of a captured disk, the topmost first, each located and checked. `moved` applies
/// the caller's path rules to a recorded path.
pub(in crate::guest) fn chain(
    disk: &Disk,
    given: Option<&Path>,
    moved: impl Fn(&str) -> String,
) -> Result<Vec<DiskFile>, GuestError> {
    let mut chain = disk.chain.clone();
    for (at, file) in chain.iter_mut().enumerate() {
        let (path, trust) = match given.filter(|_| at == 0) {
            Some(path) => (path.to_owned(), Trust::Content),
            // A copy may have been moved with its image, and its time with it.
            None if at == 0 && disk.is_copied() => (moved(&file.path).into(), Trust::Either),
            None => whereabouts(&file.path, &moved),
        };
        check(disk, file, &path, trust, at == 0)?;
        let path = path.to_str().ok_or_else(|| GuestError::Path {
            what: "disk",
            path: path.clone(),
            problem: "it is not UTF-8".to_owned(),
        })?;
        file.path = path.to_owned();
    }
    Ok(chain)
}

/// Checks the files of a disk that the guest only reads, which QEMU opens where the
/// rewritten command line names them.
pub(in crate::guest) fn check_read_only(
    disk: &Disk,
    moved: impl Fn(&str) -> String,
) -> Result<(), GuestError> {
    disk.chain.iter().try_for_each(|file| {
        let path = PathBuf::from(moved(&file.path));
        // Its modification time may have changed without its content, which alone counts.
        check(disk, file, &path, Trust::Either, false)
    })
}

/// Checks that every file which the caller gives belongs to a captured disk of the image.
pub(in crate::guest) fn check_names(disks: &[Disk], given: &[Given]) -> Result<(), GuestError> {
    let captured = || disks.iter().filter(|disk| disk.role == DiskRole::Captured);
    match given.iter().find(|(name, _)| !captured().any(|disk| disk.is_called(name))) {
        None => Ok(()),
        Some((name, _)) => {
            let known: Vec<String> = captured().map(Disk::describe).collect();
            let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
            Err(GuestError::NoSuchDisk { name: name.clone(), known })
        }
    }
}

/// What must agree for a file to count as unchanged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Trust {
    /// It is where it was: length and time of the last change, without reading it.
    Time,
    /// It is a copy, or was moved: length and samples of its content.
    Content,
    /// The one or, failing that, the other.
    Either,
}

/// Where a recorded file is now. A path rule may not be about the disks: if its result does not
/// exist, the recorded path counts.
fn whereabouts(recorded: &str, moved: &impl Fn(&str) -> String) -> (PathBuf, Trust) {
    let elsewhere = moved(recorded);
    match elsewhere != recorded && Path::new(&elsewhere).exists() {
        true => (elsewhere.into(), Trust::Content),
        false => (recorded.into(), Trust::Time),
    }
}

/// Checks that a file of a disk is what it was at the moment.
///
/// # Errors
/// When it has changed, is missing, or can't be read.
pub fn check_unchanged(disk: &Disk, file: &DiskFile, path: &Path) -> Result<(), GuestError> {
    check(disk, file, path, Trust::Either, false)
}

fn check(
    disk: &Disk,
    file: &DiskFile,
    path: &Path,
    trust: Trust,
    on_top: bool,
) -> Result<(), GuestError> {
    let advice = || match on_top {
        true => format!("`RewriteOptions::disks` {}=PATH", name(disk)),
        false => format!("`RewriteOptions::paths` {}=NEW", file.path),
    };
    let unusable = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => GuestError::DiskMissing {
            disk: disk.describe(),
            path: path.to_owned(),
            advice: advice(),
        },
        _ => GuestError::DiskUnreadable { disk: disk.describe(), path: path.to_owned(), source },
    };
    let changed = |how: String| GuestError::DiskChanged {
        disk: disk.describe(),
        path: path.to_owned(),
        how,
        advice: advice(),
    };
    let meta = fs::metadata(path).map_err(unusable)?;
    let Some(recorded) = file.stamp else { return Ok(()) };
    if trust != Trust::Content && meta.is_file() && recorded.mtime_ns != 0 {
        match difference(&recorded, meta.len(), mtime_ns(&meta)) {
            None => return Ok(()),
            Some(how) if trust == Trust::Time => return Err(changed(how)),
            Some(_) => {}
        }
    }
    let found = stamp(path).map_err(unusable)?;
    if found.len != recorded.len {
        return Err(changed(format!("it has {} bytes, not {}", found.len, recorded.len)));
    }
    match found.fingerprint == recorded.fingerprint {
        true => Ok(()),
        false => Err(changed("its content is another".to_owned())),
    }
}

fn difference(recorded: &FileStamp, len: u64, mtime_ns: i64) -> Option<String> {
    if len != recorded.len {
        return Some(format!("it has {len} bytes, not {}", recorded.len));
    }
    (mtime_ns != recorded.mtime_ns).then(|| {
        format!("it was written to at {}, not last at {}", utc(mtime_ns), utc(recorded.mtime_ns))
    })
}

/// As a [`FileStamp`] has it.
fn mtime_ns(meta: &fs::Metadata) -> i64 {
    let nanos = i128::from(meta.mtime()) * 1_000_000_000 + i128::from(meta.mtime_nsec());
    nanos.clamp(i64::MIN.into(), i64::MAX.into()) as i64
}

fn utc(unix_ns: i64) -> String {
    let since = Duration::from_nanos(unix_ns.unsigned_abs());
    let time = match unix_ns < 0 {
        true => SystemTime::UNIX_EPOCH.checked_sub(since),
        false => SystemTime::UNIX_EPOCH.checked_add(since),
    };
    time.map_or("an unknown time".into(), |t| humantime::format_rfc3339_millis(t).to_string())
}

/// A name by which the caller can refer to a disk.
pub(in crate::guest) fn name(disk: &Disk) -> String {
    let made_up = disk.chain.first().map(|file| &file.node);
    let names = [disk.node.as_ref(), Some(&disk.device), disk.qdev.as_ref(), made_up];
    let name = names.into_iter().flatten().find(|name| !name.is_empty());
    name.map_or_else(|| "disk".to_owned(), String::clone)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(files: &[&Path]) -> Disk {
        let file = |path: &&Path| DiskFile {
            node: "#block1".into(),
            path: path.to_str().unwrap().into(),
            format: "raw".into(),
            stamp: Some(stamp(path).unwrap()),
        };
        Disk {
            device: "drive0".into(),
            qdev: Some("/machine/peripheral/vda/virtio-backend".into()),
            role: DiskRole::Captured,
            chain: files.iter().map(file).collect(),
            ..Disk::default()
        }
    }

    fn stays(path: &str) -> String {
        path.to_owned()
    }

    fn refusal(result: Result<Vec<DiskFile>, GuestError>) -> String {
        result.unwrap_err().to_string()
    }

    #[test]
    fn a_disk_is_found_where_it_was_moved_or_is_given() {
        let directory = tempfile::tempdir().unwrap();
        let (old, base, new) = (
            directory.path().join("old"),
            directory.path().join("base"),
            directory.path().join("new"),
        );
        fs::write(&old, "content").unwrap();
        fs::write(&base, "below").unwrap();
        let disk = disk(&[&old, &base]);
        assert_eq!(chain(&disk, None, stays).unwrap(), disk.chain);
        // A rule that leads to nothing leaves the disk where it was.
        let rule = |path: &str| path.replace("/old", "/new");
        assert_eq!(chain(&disk, None, rule).unwrap(), disk.chain);
        fs::copy(&old, &new).unwrap();
        let moved = chain(&disk, None, rule).unwrap();
        assert_eq!(Path::new(&moved[0].path), new);
        assert_eq!(chain(&disk, Some(&new), stays).unwrap(), moved);
        assert_eq!(moved[1], disk.chain[1]);
        for name in ["drive0", "vda", "#block1", "/machine/peripheral/vda/virtio-backend"] {
            assert!(disk.is_called(name), "{name}");
        }
        assert!(!disk.is_called("") && !disk.is_called("drive1"));
    }

    #[test]
    fn a_changed_or_missing_disk_is_refused_by_name() {
        let directory = tempfile::tempdir().unwrap();
        let (file, base) = (directory.path().join("file"), directory.path().join("base"));
        fs::write(&file, "content").unwrap();
        fs::write(&base, "below").unwrap();
        let disk = disk(&[&file, &base]);

        // The same content, written again: that it is the same can't be known.
        let later = SystemTime::now() + Duration::from_secs(2);
        fs::File::options().write(true).open(&file).unwrap().set_modified(later).unwrap();
        let refused = refusal(chain(&disk, None, stays));
        assert!(refused.contains("drive0") && refused.contains("was written to"), "{refused}");
        assert!(refused.contains("`RewriteOptions::disks` drive0=PATH"), "{refused}");
        // Of one that is only read, samples say enough.
        check_read_only(&disk, stays).unwrap();
        // Naming the file accepts what samples don't show.
        chain(&disk, Some(&file), stays).unwrap();
        fs::write(&file, "Content").unwrap();
        let refused = refusal(chain(&disk, Some(&file), stays));
        assert!(refused.contains("its content is another"), "{refused}");
        fs::write(&file, "longer content").unwrap();
        let refused = refusal(chain(&disk, None, stays));
        assert!(refused.contains("14 bytes, not 7"), "{refused}");
        fs::remove_file(&file).unwrap();
        let refused = refusal(chain(&disk, None, stays));
        assert!(refused.contains("is not there") && refused.contains("::disks`"), "{refused}");

        let disk = self::disk(&[&base]);
        fs::remove_file(&base).unwrap();
        let error = check_read_only(&disk, stays).unwrap_err().to_string();
        assert!(error.contains("::paths`"), "{error}");
    }

    #[test]
    fn a_name_of_no_disk_is_refused_with_those_there_are() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        fs::write(&file, "content").unwrap();
        let disks = [disk(&[&file])];
        check_names(&disks, &[("vda".into(), file.clone())]).unwrap();
        let error = check_names(&disks, &[("vdb".into(), file)]).unwrap_err().to_string();
        assert!(error.contains("vdb") && error.contains("drive0"), "{error}");
    }
}
