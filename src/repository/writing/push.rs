//! `push`: a snapshot put into a repository.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use super::commit::{commit, put_maps};
use super::cut::{Piece, cut};
use super::known::{Known, Place};
use super::packer::Packer;
use super::source::{Source, machine_name, sources};
use crate::repository::Moved;
use crate::repository::error::RepositoryError;
use crate::repository::format::ids::{ExtentId, MapId, PackId, SnapshotId, random};
use crate::repository::format::manifest::{FileRef, SnapshotManifest, is_name};
use crate::repository::format::map::{Extent, FileMap, MAX_MAP};
use crate::repository::lease::{Held, Lease, host};
use crate::repository::marks::{Marked, marked};
use crate::repository::reading::repository::Repository;

/// The most time between two tellings of progress.
const TOLD_EVERY: Duration = Duration::from_millis(100);
/// After so many pieces in a row that did not become shorter, only each of so many is tried.
const GIVEN_UP: u32 = 16;
/// What is pushed.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct PushOptions {
    /// The image.
    pub image: PathBuf,
    /// The machine's name, in place of that of its command line or of the image's file.
    pub machine: Option<String>,
    /// Tags.
    pub tags: BTreeSet<String>,
    /// Leave the disks out.
    pub no_disks: bool,
    /// How it is to be reverted at another site: options by name.
    pub profile: std::collections::BTreeMap<String, Vec<String>>,
}

impl PushOptions {
    /// Pushes this image with its disks.
    pub fn new(image: impl Into<PathBuf>) -> PushOptions {
        PushOptions {
            image: image.into(),
            machine: None,
            tags: BTreeSet::new(),
            no_disks: false,
            profile: Default::default(),
        }
    }
}

/// A snapshot that is in the repository.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Pushed {
    /// Its manifest.
    pub manifest: SnapshotManifest,
    /// Whether it was there before, and nothing was done.
    pub was_there: bool,
}

/// Pushes a snapshot: what is there already is not sent again, and nobody sees it before it is whole.
/// A push that was killed is continued by the next one.
///
/// # Errors
/// When files can't be read, have changed since the snapshot, or the store fails; when keys are trusted and
/// none signs; when the snapshot is there already, and not signed with one of these. What was sent
/// stays there for the next push, until a prune removes it.
pub fn push(
    repository: &Repository,
    options: &PushOptions,
    mut on_progress: impl FnMut(Moved),
) -> Result<Pushed, RepositoryError> {
    repository.access.check_signs()?;
    let (image, files) = sources(&options.image, !options.no_disks)?;
    let machine = options.machine.clone().or_else(|| machine_name(&image.machine.argv));
    let stem = || options.image.file_stem().map(|stem| stem.to_string_lossy().into_owned());
    let machine = machine.or_else(stem).unwrap_or_default();
    check_words(&machine, &options.tags)?;
    let memory = image.blocks.iter().map(|block| block.len).sum();
    let manifest = SnapshotManifest {
        id: SnapshotId(*image.identity.as_bytes()),
        machine,
        moment_unix_us: image.moment_unix_us,
        pushed_unix_us: now_us(),
        tags: options.tags.clone(),
        host: host(),
        created_by: concat!("snapback ", env!("CARGO_PKG_VERSION")).into(),
        parents: image.layers.iter().map(|layer| SnapshotId(*layer.identity.as_bytes())).collect(),
        memory,
        bytes: files.iter().map(|file| file.len).sum(),
        stored: 0,
        own: 0,
        profile: options.profile.clone(),
        files: Vec::new(),
        packs: BTreeSet::new(),
        used: Vec::new(),
        draft: None,
        seal: repository.signing.own_seal(),
    };
    let key = repository.manifest_key(&manifest);
    // A tag of what is not there yet is nothing to anybody.
    for tag in &options.tags {
        repository.remote.put(&repository.tag_key(manifest.id, tag), bytes::Bytes::new())?;
    }
    if let Some(there) = repository.find(&manifest)? {
        let manifest = repository.was_there(repository.manifest(&there)?)?;
        return Ok(Pushed { manifest, was_there: true });
    }
    let lease = Held::put(repository, &Lease::new(true))?;
    let (manifest, was_there) = lease.while_held(|| {
        commit(repository, &key, &lease, |gone| {
            let pushing = Pushing::new(repository, gone, &manifest, &mut on_progress)?;
            pushing.all(&files, manifest.clone())
        })
    })?;
    Ok(Pushed { manifest, was_there })
}

/// Refuses what could not be asked for by name later.
pub fn check_words(machine: &str, tags: &BTreeSet<String>) -> Result<(), RepositoryError> {
    if !is_name(machine) {
        let problem = "it is empty, too long, or has an `@` or `/`: choose another with";
        let problem =
            format!("`{machine}` is no name of a machine: {problem} `PushOptions::machine`");
        return Err(RepositoryError::Options(problem));
    }
    match tags.iter().find(|tag| !is_name(tag) || *tag == "latest") {
        Some(tag) => Err(RepositoryError::Options(format!("`{tag}` is no tag"))),
        None => Ok(()),
    }
}

/// Refuses a map that could not be read again.
fn check_map(file: &Source, map: &FileMap) -> Result<(), RepositoryError> {
    match map.encoded_len() > MAX_MAP {
        true => Err(RepositoryError::Options(format!(
            "{} has more data than one file of a repository can have, about 2 TB: keep this disk \
             elsewhere",
            file.path.display()
        ))),
        false => Ok(()),
    }
}

pub fn now_us() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

/// A push under way.
struct Pushing<'a> {
    repository: &'a Repository,
    known: Known,
    packer: Packer<'a>,
    /// Images that are there, by the snapshots of this machine.
    images: HashMap<SnapshotId, FileRef>,
    /// What is not to be referred to.
    without: Marked,
    on_progress: &'a mut dyn FnMut(Moved),
    moved: Moved,
    told: Instant,
}

/// What has become of a piece.
enum Done {
    Zeros,
    Known(ExtentId, Place),
    New(ExtentId, Vec<u8>),
}

impl<'a> Pushing<'a> {
    fn new(
        repository: &'a Repository,
        gone: &HashSet<PackId>,
        manifest: &SnapshotManifest,
        on_progress: &'a mut dyn FnMut(Moved),
    ) -> Result<Pushing<'a>, RepositoryError> {
        // Behind our lease: what is marked later is not removed before we are done.
        let mut without = marked(repository)?;
        without.packs.extend(gone);
        let known = Known::read(repository, &without.packs)?;
        let images = images_there(repository, manifest)?;
        Ok(Pushing {
            repository,
            known,
            packer: Packer::new(repository),
            images,
            without,
            on_progress,
            moved: Moved::default(),
            told: Instant::now(),
        })
    }

    /// Pushes all files. Returns the manifest with them, and the packs that went away meanwhile.
    fn all(
        mut self,
        files: &[Source],
        mut manifest: SnapshotManifest,
    ) -> Result<(SnapshotManifest, Vec<PackId>), RepositoryError> {
        self.moved.total = files.iter().map(|file| file.len).sum();
        let (mut maps, mut new) = (Vec::new(), Vec::new());
        for file in files {
            let (id, map) = match self.there(file)? {
                Some(there) => {
                    self.moved.done += file.len;
                    there
                }
                None => {
                    let map = self.one(file)?;
                    self.packer.end_file()?;
                    check_map(file, &map)?;
                    let body = map.encode();
                    let id = self.repository.keys.map_id(&body);
                    new.push((id, body));
                    (id, map)
                }
            };
            let path = file.path.to_string_lossy().into_owned();
            manifest.files.push(FileRef::new(file.role, path, file.len, id, file.image));
            maps.push(map);
        }
        let maps: Vec<&FileMap> = maps.iter().collect();
        let missing = put_maps(self.repository, self.packer, &mut manifest, &maps, new)?;
        (self.on_progress)(Moved { sent: manifest.own, ..self.moved });
        Ok((manifest, missing))
    }

    /// The map of an image that is there already.
    fn there(&self, file: &Source) -> Result<Option<(MapId, FileMap)>, RepositoryError> {
        let identity = file.image.map(|identity| SnapshotId(*identity.as_bytes()));
        let Some(there) = identity.and_then(|identity| self.images.get(&identity)) else {
            return Ok(None);
        };
        if there.len != file.len || self.without.maps.contains(&there.map) {
            return Ok(None);
        }
        let map = self.repository.map(there)?;
        let is_kept = map.packs().iter().all(|pack| !self.without.packs.contains(pack));
        Ok(is_kept.then_some((there.map, map)))
    }

    /// Pushes one file.
    fn one(&mut self, file: &Source) -> Result<FileMap, RepositoryError> {
        let io = |error| RepositoryError::io("reading", &file.path, error);
        let mut map = FileMap {
            salt: random(),
            len: file.len,
            extents: Vec::new(),
            inline: file.inline.clone(),
        };
        let before = self.moved.done;
        let misses = AtomicU32::new(if file.packed { GIVEN_UP } else { 0 });
        let cut = cut(&file.file, &file.ranges, file.how, |window, pieces| {
            if self.repository.access.cancel().is_requested() {
                return Err(Stop::Failed(RepositoryError::Interrupted));
            }
            let done = self.look_at(window, pieces, &misses);
            for (piece, done) in pieces.iter().zip(done) {
                let (id, place) = match done {
                    Done::Zeros => continue,
                    Done::Known(id, place) => (id, place),
                    Done::New(id, stored) => (id, self.add(id, &stored, piece.len)?),
                };
                let Place { pack, at, stored, raw } = place;
                map.extents.push(Extent { offset: piece.offset, raw, pack, at, stored, id });
            }
            if let Some(last) = pieces.last() {
                self.moved.done = before + last.offset + last.len as u64;
            }
            self.moved.sent = self.packer.sent();
            self.tell();
            Ok(())
        });
        self.moved.done = before + file.len;
        match cut {
            Ok(()) => Ok(map),
            Err(Stop::Read(error)) => Err(io(error)),
            Err(Stop::Failed(error)) => Err(error),
        }
    }

    fn add(&mut self, id: ExtentId, stored: &[u8], raw: usize) -> Result<Place, RepositoryError> {
        if let Some(place) = self.known.find(&id) {
            return Ok(place);
        }
        let place = self.packer.add(id, stored, raw)?;
        self.known.note(id, place);
        Ok(place)
    }

    /// Hashes pieces, and closes those that are new, on all processors.
    fn look_at(&self, window: &[u8], pieces: &[Piece], misses: &AtomicU32) -> Vec<Done> {
        let (keys, known) = (&self.repository.keys, &self.known);
        let look = |number: usize, piece: &Piece| {
            let raw = &window[piece.at..piece.at + piece.len];
            if raw[0] == 0 && raw[1..] == raw[..raw.len() - 1] {
                return Done::Zeros;
            }
            let id = keys.extent_id(raw);
            if let Some(place) = known.find(&id) {
                return Done::Known(id, place);
            }
            let missed = misses.load(Ordering::Relaxed);
            let compress = missed < GIVEN_UP || number.is_multiple_of(GIVEN_UP as usize);
            let stored = keys.close_extent(&id, raw, compress);
            if compress {
                // A sixteenth less pays for the time that opening it takes.
                let pays = stored.len() + raw.len() / 16 < raw.len() + keys.overhead();
                misses.store(if pays { 0 } else { missed.saturating_add(1) }, Ordering::Relaxed);
            }
            Done::New(id, stored)
        };
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(8);
        let (next, done) = (AtomicUsize::new(0), Mutex::new(Vec::with_capacity(pieces.len())));
        std::thread::scope(|scope| {
            for _ in 0..threads.min(pieces.len()) {
                scope.spawn(|| {
                    let mut mine = Vec::new();
                    loop {
                        let number = next.fetch_add(1, Ordering::Relaxed);
                        let Some(piece) = pieces.get(number) else { break };
                        mine.push((number, look(number, piece)));
                    }
                    done.lock().unwrap_or_else(PoisonError::into_inner).extend(mine);
                });
            }
        });
        let mut done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
        done.sort_by_key(|(number, _)| *number);
        done.into_iter().map(|(_, done)| done).collect()
    }

    /// Tells how far it has come, now and then.
    fn tell(&mut self) {
        if self.told.elapsed() >= TOLD_EVERY {
            self.told = Instant::now();
            (self.on_progress)(self.moved);
        }
    }
}

/// Why cutting a file ended.
enum Stop {
    Read(std::io::Error),
    Failed(RepositoryError),
}

impl From<std::io::Error> for Stop {
    fn from(error: std::io::Error) -> Stop {
        Stop::Read(error)
    }
}

impl From<RepositoryError> for Stop {
    fn from(error: RepositoryError) -> Stop {
        Stop::Failed(error)
    }
}

/// The images of this machine's snapshots that this one refers to, as far as they are there.
fn images_there(
    repository: &Repository,
    manifest: &SnapshotManifest,
) -> Result<HashMap<SnapshotId, FileRef>, RepositoryError> {
    if manifest.parents.is_empty() {
        return Ok(HashMap::new());
    }
    let mut there = repository.snapshots_of(&manifest.machine)?;
    there.retain(|snapshot| manifest.parents.contains(&snapshot.id));
    // Where we sign for what an image consists of, we take it from nobody's word: it is cut anew.
    let mut manifests = repository.manifests_by_anybody(&there)?;
    manifests.retain(|of| repository.signing.relies_on(of.seal));
    let image = |of: SnapshotManifest| Some((of.id, of.image()?.clone()));
    Ok(manifests.into_iter().filter_map(image).collect())
}
