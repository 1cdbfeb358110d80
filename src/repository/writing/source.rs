//! Which files a snapshot consists of.

use std::collections::HashSet;
use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::iter;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::cut::How;
use crate::identity::Identity;
use crate::image::{Image, Manifest};
use crate::machine::DiskRole;
use crate::memory::working_set;
use crate::repository::error::RepositoryError;
use crate::repository::format::manifest::Role;
use crate::repository::format::map::{Inline, MAX_INLINE};

/// A file that is to be pushed.
pub struct Source {
    pub role: Role,
    /// Its absolute path.
    pub path: PathBuf,
    pub file: File,
    pub len: u64,
    /// The image that it is, if it is one.
    pub image: Option<Identity>,
    /// What goes into extents.
    pub ranges: Vec<Range<u64>>,
    pub how: How,
    /// Whether it is compressed already.
    pub packed: bool,
    /// What goes into the map.
    pub inline: Vec<Inline>,
}

/// The files of the snapshot in an image, with what the image says. Without `disks`, memory alone.
pub fn sources(path: &Path, disks: bool) -> Result<(Manifest, Vec<Source>), RepositoryError> {
    let image = Image::open(path)?;
    let mut sources = Vec::new();
    let shapes = image.shapes()?;
    for (number, ((path, file), shape)) in image.files().zip(shapes).enumerate() {
        let io = |error| RepositoryError::io("reading", path, error);
        let file = file.try_clone().map_err(io)?;
        let role = if number == 0 { Role::Image } else { Role::Parent };
        // All that is needed to open an image; only what is read of a parent.
        let behind = shape.data.end..shape.len;
        let small = behind.end - behind.start + shape.data.start <= MAX_INLINE;
        let mut inline = Vec::new();
        for part in [0..shape.data.start, behind] {
            let len = (part.end - part.start) as usize;
            if small && len > 0 {
                let mut bytes = vec![0; len];
                file.read_exact_at(&mut bytes, part.start).map_err(io)?;
                inline.push(Inline { offset: part.start, bytes });
            }
        }
        let stored = if small { shape.data } else { 0..shape.len };
        sources.push(Source {
            role,
            path: absolute(path)?,
            file,
            len: shape.len,
            image: Some(shape.identity),
            ranges: iter::once(stored).collect(),
            how: if shape.flat { How::Blocks } else { How::Content },
            packed: !shape.flat,
            inline,
        });
    }
    let manifest = image.manifest().clone();
    let beside = working_set::path_for(path);
    if beside.is_file() {
        sources.push(plain(Role::WorkingSet, &beside)?);
    }
    if !disks {
        return Ok((manifest, sources));
    }
    let mut seen = HashSet::new();
    for disk in &manifest.machine.disks {
        if !matches!(disk.role, DiskRole::Captured | DiskRole::ReadOnly) {
            continue;
        }
        for file in &disk.chain {
            if !seen.insert(&file.path) {
                continue;
            }
            // The files of a captured disk are those of the moment, or this is no snapshot.
            if disk.role == DiskRole::Captured {
                crate::guest::check_unchanged(disk, file, Path::new(&file.path))
                    .map_err(|error| RepositoryError::Disk(Box::new(error)))?;
            }
            match plain(Role::Disk, Path::new(&file.path)) {
                // What is only read, such as a CD, may have been taken away.
                Err(error) if disk.role == DiskRole::ReadOnly => tracing::warn!("{error}"),
                source => sources.push(source?),
            }
        }
    }
    Ok((manifest, sources))
}

/// A file of which nothing is known.
fn plain(role: Role, path: &Path) -> Result<Source, RepositoryError> {
    let io = |error| RepositoryError::io("reading", path, error);
    let mut file = File::open(path).map_err(io)?;
    // Of a block device its metadata tell no length.
    let len = file.seek(SeekFrom::End(0)).map_err(io)?;
    Ok(Source {
        role,
        path: absolute(path)?,
        file,
        len,
        image: None,
        ranges: iter::once(0..len).collect(),
        how: How::Blocks,
        packed: false,
        inline: Vec::new(),
    })
}

fn absolute(path: &Path) -> Result<PathBuf, RepositoryError> {
    std::path::absolute(path).map_err(|error| RepositoryError::io("looking at", path, error))
}

/// The name that a machine was given on its command line.
pub fn machine_name(argv: &[String]) -> Option<String> {
    let at = argv.iter().position(|word| word == "-name" || word == "--name")?;
    let value = argv.get(at + 1)?;
    let mut parts = value.split(',');
    let first = parts.next().filter(|part| !part.contains('='));
    let guest = value.split(',').find_map(|part| part.strip_prefix("guest="));
    guest.or(first).filter(|name| !name.is_empty()).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::machine_name;

    #[test]
    fn the_name_of_a_machine_is_that_of_its_command_line() {
        let name = |value: &str| machine_name(&["qemu".into(), "-name".into(), value.into()]);
        assert_eq!(name("web1").as_deref(), Some("web1"));
        assert_eq!(name("guest=web1,debug-threads=on").as_deref(), Some("web1"));
        assert_eq!(name("process=x,guest=web1").as_deref(), Some("web1"));
        assert_eq!(name("process=x"), None);
        assert_eq!(machine_name(&["-name".into()]), None);
    }
}
