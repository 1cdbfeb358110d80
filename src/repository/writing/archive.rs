//! `pack` and `unpack`: a snapshot in one file, with its memory and its disks. It is a repository that
//! nobody writes to any more.

use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use super::push::{PushOptions, push};
use crate::image::Target;
use crate::repository::Moved;
use crate::repository::access::Access;
use crate::repository::error::RepositoryError;
use crate::repository::format::manifest::SnapshotManifest;
use crate::repository::keeping::copy::copy;
use crate::repository::reading::pull::{PullOptions, Pulled, pull};
use crate::repository::reading::repository::Repository;
use crate::repository::remote::{Address, Remote};
use crate::repository::signing::Signing;
use crate::repository::wrapping::Recipients;

/// How much is written at once.
const BUFFER: usize = 1 << 20;

/// What is packed.
pub enum PackSource<'a> {
    /// An image with its disks.
    Files(&'a PushOptions),
    /// A snapshot of a repository.
    Snapshot(&'a Repository, &'a SnapshotManifest),
}

/// Where a packed snapshot goes to, or comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PackedAt {
    /// A file.
    File(PathBuf),
    /// Standard output, or standard input.
    Standard,
}

/// How a file is packed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PackOptions {
    /// Whom it is encrypted to.
    pub recipients: Recipients,
    /// Replace an existing file.
    pub force: bool,
}

/// Packs a snapshot. A file has its name when it is whole.
///
/// # Errors
/// When something can't be read or written, or it would not be encrypted though a key is given.
pub fn pack(
    source: PackSource<'_>,
    to: &PackedAt,
    access: &Access,
    options: &PackOptions,
    on_progress: impl FnMut(Moved),
) -> Result<SnapshotManifest, RepositoryError> {
    let io = |error| RepositoryError::io("writing", name(to), error);
    options.recipients.check(access)?;
    let signing = Signing::read(access)?;
    let (target, writer): (_, Box<dyn Write + Send>) = match to {
        PackedAt::Standard => (None, Box::new(io::stdout())),
        PackedAt::File(path) => {
            let target = Target::create(path, options.force)?;
            let file = target.file().try_clone().map_err(io)?;
            (Some(target), Box::new(file))
        }
    };
    let writer = BufWriter::with_capacity(BUFFER, writer);
    let remote = Remote::packed(name(to).display().to_string(), Box::new(writer), &access.reach)?;
    let packed = Repository::init_on(remote, access, signing, &options.recipients)?;
    let manifest = match source {
        PackSource::Files(options) => push(&packed, options, on_progress)?.manifest,
        PackSource::Snapshot(from, manifest) => copy(from, manifest, &packed, on_progress)?.0,
    };
    packed.remote.finish().map_err(io)?;
    drop(packed);
    if let Some(target) = target {
        target.commit()?;
    }
    Ok(manifest)
}

/// Brings the snapshot in a packed file back as files. What comes from standard input is kept in a
/// file without a name beside them meanwhile: what it is of stands at its end.
///
/// # Errors
/// When the file is none, or something can't be read or written.
pub fn unpack(
    from: &PackedAt,
    access: &Access,
    options: &PullOptions,
    on_progress: impl FnMut(Moved) + Send,
) -> Result<Pulled, RepositoryError> {
    let (_spool, path) = match from {
        PackedAt::File(path) => {
            let found = std::fs::metadata(path);
            let found = found.map_err(|error| RepositoryError::io("reading", path, error))?;
            if !found.is_file() {
                let problem = "it is no file".to_owned();
                return Err(RepositoryError::Packed { path: path.clone(), problem });
            }
            (None, path.clone())
        }
        PackedAt::Standard => {
            let spool = spool(&options.image, access)?;
            let path = format!("/proc/self/fd/{}", spool.file().as_raw_fd()).into();
            (Some(spool), path)
        }
    };
    let packed = Repository::open(&Address::Directory(path.clone()), access)?;
    let mut manifests = packed.manifests()?;
    let wrong = |problem: &str| RepositoryError::Packed { path, problem: problem.into() };
    match (manifests.pop(), manifests.is_empty()) {
        (Some(manifest), true) => pull(&packed, manifest, options, on_progress),
        (None, _) => Err(wrong("it holds no snapshot")),
        (Some(_), false) => Err(wrong("it holds several snapshots: name it with `--repo`")),
    }
}

/// Keeps standard input in a file without a name.
fn spool(beside: &Path, access: &Access) -> Result<Target, RepositoryError> {
    // It never gets that name.
    let target = Target::create(&beside.with_extension("packed"), true)?;
    let io = |error| RepositoryError::io("writing", target.path(), error);
    let (mut input, mut file): (_, &File) = (io::stdin().lock(), target.file());
    let mut buffer = vec![0; BUFFER];
    loop {
        if access.cancel().is_requested() {
            return Err(RepositoryError::Interrupted);
        }
        match input.read(&mut buffer).map_err(io)? {
            0 => return Ok(target),
            len => file.write_all(&buffer[..len]).map_err(io)?,
        }
    }
}

fn name(at: &PackedAt) -> &Path {
    match at {
        PackedAt::File(path) => path,
        PackedAt::Standard => Path::new("-"),
    }
}
