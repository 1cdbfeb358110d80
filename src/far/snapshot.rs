//! A snapshot of a repository, opened from afar.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::again::FarAgain;
use super::cache::Cache;
use super::fetch::Fetchers;
use super::file::{FarFile, Origin};
use super::latency::Latency;
use super::nbd::Exports;
use super::options::FarOptions;
use super::store::FarStore;
use super::watch::{Answering, Watch};
use crate::image::Image;
use crate::repository::{
    FileMap, FileRef, Held, Lease, Repository, RepositoryError, Role, SnapshotId, SnapshotManifest,
    StoreWait,
};

/// How long the end of a session waits for its lease to be removed. One that stays ends by itself.
const LEASE_END: Duration = Duration::from_secs(2);

/// A snapshot that is read from its repository as it is needed.
#[derive(Clone)]
pub struct FarSnapshot {
    shared: Arc<Shared>,
}

struct Shared {
    name: String,
    options: FarOptions,
    manifest: SnapshotManifest,
    image: Arc<Image>,
    /// The files of the image and of its parents.
    memory: Vec<Arc<FarFile>>,
    disks: Vec<FarDisk>,
    origin: Arc<Origin>,
    /// The socket that its disks have been served by already, where another process has opened it before.
    socket: Option<PathBuf>,
    /// What serves its disks, once somebody reads them.
    exports: Mutex<Option<Exports>>,
    lease: Mutex<Option<(Sender<()>, Receiver<()>)>>,
}

/// A file of a disk.
#[derive(Clone)]
pub struct FarDisk {
    /// The path that it had where it was pushed, as the image's record names it.
    pub path: String,
    /// The name of its export.
    pub export: String,
    file: Arc<FarFile>,
}

impl fmt::Debug for FarSnapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("FarSnapshot").field(&self.shared.name).finish()
    }
}

impl FarSnapshot {
    /// Finds a snapshot and opens its image. Blocks for a few round trips.
    ///
    /// # Errors
    /// When the repository can't be reached, has no such snapshot, or is damaged; when the cache can't
    /// be made.
    pub fn open(options: &FarOptions) -> Result<FarSnapshot, RepositoryError> {
        FarSnapshot::find(options, |repository| repository.resolve(&options.name), None)
    }

    /// Opens a snapshot again that another process has opened; its disks will be served where that has served
    /// them. `tell` is told when the store is waited for.
    ///
    /// # Errors
    /// As [`FarSnapshot::open`].
    pub(crate) fn open_again(
        again: &FarAgain,
        tell: impl Fn(StoreWait) + Send + Sync + 'static,
    ) -> Result<FarSnapshot, RepositoryError> {
        let (options, socket) = (again.options(tell)?, again.socket.clone());
        FarSnapshot::find(&options, |_| Ok(again.manifest.clone()), socket)
    }

    /// How another process opens it again.
    pub(crate) fn again(&self) -> FarAgain {
        let exports = self.shared.exports.lock().unwrap_or_else(PoisonError::into_inner);
        let socket = exports.as_ref().map(|exports| exports.socket().to_owned());
        FarAgain::new(&self.shared.options, &self.shared.manifest, socket)
    }

    fn find(
        options: &FarOptions,
        manifest: impl FnOnce(&Repository) -> Result<SnapshotManifest, RepositoryError>,
        socket: Option<PathBuf>,
    ) -> Result<FarSnapshot, RepositoryError> {
        let cache = options.cache.clone();
        let made = Cache::open(cache.clone());
        let cache = made.map_err(|e| RepositoryError::io("making", cache.directory, e))?;
        let watch = Arc::new(Watch::default());
        let hears = Arc::clone(&watch);
        let access = options.access.clone().also_tells(move |wait| hears.hear(wait));
        let repository = Repository::open(&options.repository, &access)?;
        let manifest = manifest(&repository)?;
        let fetchers = Fetchers::start();
        let fetchers =
            fetchers.map_err(|e| RepositoryError::io("starting threads for", "fetching", e))?;
        let (latency, fetched) = (Latency::default(), AtomicU64::new(0));
        let origin = Arc::new(Origin { repository, cache, fetchers, latency, watch, fetched });
        let lease = hold(&origin, &manifest);
        let name = format!("{}/{}", origin.repository.name(), options.name);

        let files = open_files(&origin, &manifest, &name)?;
        let of_role = |role: Role| {
            let named =
                manifest.files.iter().zip(&files).filter(move |(file, _)| file.role == role);
            named.map(|(file, far)| (file.path.clone(), Arc::clone(far)))
        };
        let problem = |problem: &str| RepositoryError::Damaged {
            repository: origin.repository.name().to_owned(),
            object: options.name.to_string(),
            problem: problem.to_owned(),
        };
        let (_, file) = of_role(Role::Image).next().ok_or_else(|| problem("it has no image"))?;
        let memory = of_role(Role::Image).chain(of_role(Role::Parent));
        let memory = memory.map(|(_, file)| file).collect();
        let others: HashMap<String, Arc<FarFile>> = of_role(Role::Parent).collect();
        let image = Image::open_in(Box::new(FarStore { file, others: Arc::new(others) }))?;
        let disks = of_role(Role::Disk).enumerate();
        let disks = disks.map(|(number, (path, file))| FarDisk {
            path,
            export: format!("disk{number}"),
            file,
        });
        let disks = disks.collect();
        if let Some((_, set)) = of_role(Role::WorkingSet).next() {
            bring_working_set(&origin, &manifest, &set);
        }
        let shared = Shared {
            name,
            manifest,
            image,
            memory,
            disks,
            origin,
            options: options.clone(),
            socket,
            exports: Mutex::new(None),
            lease: Mutex::new(Some(lease)),
        };
        Ok(FarSnapshot { shared: Arc::new(shared) })
    }

    /// The repository and the snapshot, as they were named.
    pub fn name(&self) -> &str {
        &self.shared.name
    }

    /// The snapshot's id.
    pub fn id(&self) -> SnapshotId {
        self.shared.manifest.id
    }

    /// The machine's name.
    pub fn machine(&self) -> &str {
        &self.shared.manifest.machine
    }

    /// How it is to be reverted at another site: options by name.
    pub fn profile(&self) -> &BTreeMap<String, Vec<String>> {
        &self.shared.manifest.profile
    }

    /// The image. Its pages are fetched when they are read.
    pub fn image(&self) -> &Arc<Image> {
        &self.shared.image
    }

    /// The file of its working set: what guests of it ask for first. It is recorded there, too.
    pub fn working_set(&self) -> PathBuf {
        working_set_path(&self.shared.origin, &self.shared.manifest)
    }

    /// The files of its disks.
    pub fn disks(&self) -> &[FarDisk] {
        &self.shared.disks
    }

    /// Whether its store answers, as it is now and from now on.
    pub(crate) fn answering(&self) -> tokio::sync::watch::Receiver<Answering> {
        self.shared.origin.watch.receiver()
    }

    /// About how many bytes of its memory are not here yet, as they are stored.
    pub(crate) fn missing(&self) -> u64 {
        self.shared.memory.iter().map(|file| file.missing()).sum()
    }

    /// Bytes that were fetched so far.
    pub fn fetched(&self) -> u64 {
        self.shared.origin.fetched.load(Ordering::Relaxed)
    }

    /// Serves its disks by NBD on a socket of their own, until the last of these snapshots is dropped.
    /// Returns the socket: the same by which another process has served them before.
    ///
    /// # Errors
    /// When the socket can't be made.
    pub fn serve_disks(&self) -> io::Result<PathBuf> {
        let mut exports = self.shared.exports.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(exports) = &*exports {
            return Ok(exports.socket().to_owned());
        }
        let files = self.shared.disks.iter();
        let files = files.map(|disk| (disk.export.clone(), Arc::clone(&disk.file))).collect();
        let watch = Arc::clone(&self.shared.origin.watch);
        let (socket, patience) = (self.shared.socket.clone(), self.shared.options.patience);
        let started = exports.insert(Exports::start(files, watch, patience, socket)?);
        Ok(started.socket().to_owned())
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let mut lease = self.lease.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((end, ended)) = lease.take() {
            drop(end);
            let _ = ended.recv_timeout(LEASE_END);
        }
    }
}

/// Keeps a prune from what the snapshot consists of, in a thread of its own, until the sender is
/// dropped. Who may only read goes without.
fn hold(origin: &Arc<Origin>, manifest: &SnapshotManifest) -> (Sender<()>, Receiver<()>) {
    let ((end, ends), (done, ended)) = (channel::<()>(), channel());
    let lease = Lease::reading(manifest);
    let origin = Arc::clone(origin);
    let keep = move || {
        match Held::put(&origin.repository, &lease) {
            Ok(held) => _ = held.while_held(|| Ok(_ = ends.recv())),
            Err(error) => {
                tracing::info!("no lease: a prune would not know of this reader: {error}");
            }
        }
        drop(done);
    };
    if let Err(error) = std::thread::Builder::new().name("lease".into()).spawn(keep) {
        tracing::info!("no lease: {error}");
    }
    (end, ended)
}

/// Reads what each file of a snapshot consists of, all at once.
fn open_files(
    origin: &Arc<Origin>,
    manifest: &SnapshotManifest,
    name: &str,
) -> Result<Vec<Arc<FarFile>>, RepositoryError> {
    let open = |file: &FileRef| {
        let map = open_map(origin, file)?;
        Ok(Arc::new(FarFile::new(format!("{name}/{}", file.name()), Arc::clone(origin), map)))
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> =
            manifest.files.iter().map(|file| scope.spawn(move || open(file))).collect();
        let opened = threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        opened.collect()
    })
}

/// What a file consists of, from the cache where it is there.
fn open_map(origin: &Origin, file: &FileRef) -> Result<FileMap, RepositoryError> {
    let Origin { repository, cache, .. } = origin;
    let name = format!("{}.map", file.map);
    let kept = cache.find(&name).and_then(|kept| repository.map_in(file, &kept).ok());
    if let Some(map) = kept {
        return Ok(map);
    }
    let stored = repository.fetch_map(file.map)?;
    let map = repository.map_in(file, &stored)?;
    cache.keep(&name, &stored);
    Ok(map)
}

fn working_set_path(origin: &Origin, manifest: &SnapshotManifest) -> PathBuf {
    origin.cache.path(&format!("{}.working-set", manifest.id))
}

/// Brings the working set, unless guests here have shown theirs already. It is a hint: without it, the
/// guest waits more often.
fn bring_working_set(origin: &Origin, manifest: &SnapshotManifest, set: &FarFile) {
    /// The longest that is brought.
    const MOST: u64 = 64 << 20;
    let path = working_set_path(origin, manifest);
    if path.exists() || set.len() > MOST {
        return;
    }
    let mut bytes = vec![0; set.len() as usize];
    let brought = set.read_at(&mut bytes, 0).and_then(|()| {
        let new = path.with_extension("new");
        fs::write(&new, &bytes)?;
        fs::rename(&new, &path)
    });
    if let Err(error) = brought {
        tracing::info!("reverting without the working set of {}: {error}", set.name());
    }
}
