//! Objects in a store, read and written with retries, a limit to their time, and typed errors.
//!
//! The callers are plain threads; a small runtime of our own does the waiting. Nobody outside this
//! directory sees the store's library.

mod address;
mod connect;
mod credentials;
mod directory;
mod failure;
mod http;
mod packed;
mod retry;
mod webdav;

use std::io::{self, Write};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};
use object_store::path::Path;
use object_store::{GetOptions, ObjectStore, ObjectStoreExt, PutMode, PutPayload};
use tokio::runtime::{Handle, Runtime};

pub use self::address::Address;
use self::directory::Directory;
use self::packed::PackedWriter;
use self::retry::Retry;
pub use self::retry::StoreWait;
use crate::cancel::Cancellation;
use crate::repository::error::{RepositoryError, StoreError, StoreFailure};

/// How many requests are under way at once.
const REQUESTS: usize = 32;
/// How many objects are removed by one request, and how many such requests are under way at once.
const REMOVED_AT_ONCE: usize = 1000;
const REMOVALS: usize = 4;
/// How long a last request may take.
const LAST_TRY: Duration = Duration::from_secs(3);
/// How many listings are under way at once.
const LISTED_AT_ONCE: usize = 64;

/// How a store is reached, and for how long it is tried.
#[derive(Clone)]
#[non_exhaustive]
pub struct Reach {
    /// How long a request is tried again before it fails.
    pub patience: Duration,
    /// Told when requests wait for the store, and when it answers again.
    pub on_wait: Option<Arc<dyn Fn(StoreWait) + Send + Sync>>,
    /// Ends what waits for the store.
    pub cancel: Cancellation,
}

impl Default for Reach {
    fn default() -> Reach {
        Reach { patience: Duration::from_secs(120), on_wait: None, cancel: Cancellation::new() }
    }
}

/// An object, as it is listed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listing {
    /// Its key.
    pub key: String,
    /// Its length.
    pub len: u64,
    /// When it was put, in milliseconds since 1970, by the store's clock: whole seconds, since some
    /// requests tell no more, and times are compared.
    pub put_ms: i64,
}

/// A store, or a part of one.
pub struct Remote {
    store: Arc<dyn ObjectStore>,
    /// The same, where it is a file that is being written.
    writer: Option<Arc<PackedWriter>>,
    /// The same, where it is a directory.
    directory: Option<Directory>,
    /// Whether it may not mind the condition that nothing is there, as servers of WebDAV that know of none.
    careless: bool,
    prefix: Path,
    retry: Arc<Retry>,
    runtime: Option<Runtime>,
}

impl Remote {
    /// The store at an address. Nothing is asked of it yet, but that a directory is there; `create`
    /// makes it.
    pub fn connect(
        address: &Address,
        reach: &Reach,
        create: bool,
    ) -> Result<Remote, RepositoryError> {
        let (store, prefix) = connect::connect(address, create)?;
        let mut remote = Remote::of(address.to_string(), store, prefix, reach)?;
        if let Address::Directory(path) = address {
            remote.directory = path.is_dir().then(|| Directory(path.clone()));
        }
        remote.careless = address.is_http();
        Ok(remote)
    }

    /// A store in one file that is written from its beginning to its end.
    pub fn packed(
        name: String,
        to: Box<dyn Write + Send>,
        reach: &Reach,
    ) -> Result<Remote, RepositoryError> {
        let writer = PackedWriter::new(to).map_err(|e| RepositoryError::io("writing", &name, e))?;
        let writer = Arc::new(writer);
        let store: Arc<dyn ObjectStore> = Arc::<PackedWriter>::clone(&writer);
        let mut remote = Remote::of(name, store, Path::default(), reach)?;
        remote.writer = Some(writer);
        Ok(remote)
    }

    /// Ends a file that is written.
    pub fn finish(&self) -> io::Result<()> {
        self.writer.as_ref().map_or(Ok(()), |writer| writer.finish())
    }

    fn of(
        name: String,
        store: Arc<dyn ObjectStore>,
        prefix: Path,
        reach: &Reach,
    ) -> Result<Remote, RepositoryError> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("store")
            .enable_all()
            .build()
            .map_err(|e| RepositoryError::io("starting threads for", &name, e))?;
        let retry = Arc::new(Retry::new(name, reach.clone(), REQUESTS));
        let (writer, directory, careless) = (None, None, false);
        Ok(Remote { store, writer, directory, careless, prefix, retry, runtime: Some(runtime) })
    }

    /// Its address, without credentials.
    pub fn name(&self) -> &str {
        self.retry.name()
    }

    fn handle(&self) -> &Handle {
        // It is taken by `drop` alone.
        self.runtime.as_ref().expect("there until it is dropped").handle()
    }

    fn path(&self, key: &str) -> Path {
        key.split('/').fold(self.prefix.clone(), |path, part| path.join(part))
    }

    /// Reads an object as a whole.
    pub fn get(&self, key: &str) -> Result<Bytes, StoreError> {
        self.handle().block_on(self.fetch(key, None))
    }

    /// Reads several at once. The answers come in the order of the questions.
    pub fn get_ranges(&self, wanted: Vec<(String, Range<u64>)>) -> Result<Vec<Bytes>, StoreError> {
        self.handle().block_on(
            stream::iter(wanted)
                .map(|(key, range)| async move { self.fetch(&key, Some(range)).await })
                .buffered(REQUESTS)
                .try_collect(),
        )
    }

    /// Reads many objects at once, in any order; `take` is given each as it arrives. Those that have been
    /// removed meanwhile are left out.
    pub fn get_each(
        &self,
        keys: Vec<String>,
        mut take: impl FnMut(&str, Bytes) -> Result<(), RepositoryError>,
    ) -> Result<(), RepositoryError> {
        self.handle().block_on(async {
            let mut answers = stream::iter(keys)
                .map(|key| async move {
                    let answer = self.fetch(&key, None).await;
                    (key, answer)
                })
                .buffer_unordered(REQUESTS);
            while let Some((key, answer)) = answers.next().await {
                match answer {
                    Err(StoreError { failure: StoreFailure::NotFound, .. }) => {}
                    answer => take(&key, answer?)?,
                }
            }
            Ok(())
        })
    }

    async fn fetch(&self, key: &str, range: Option<Range<u64>>) -> Result<Bytes, StoreError> {
        let path = self.path(key);
        let len = range.as_ref().map_or(1 << 20, |range| range.end - range.start);
        self.retry
            .run("reading", key, len, || {
                let (path, range) = (path.clone(), range.clone());
                async move {
                    let options = GetOptions {
                        range: range.clone().map(Into::into),
                        ..GetOptions::default()
                    };
                    let answer = self.store.get_opts(&path, options).await?;
                    let due = answer.range.end - answer.range.start;
                    let bytes = answer.bytes().await?;
                    let due = range.map_or(due, |range| range.end - range.start);
                    match bytes.len() as u64 == due {
                        true => Ok(bytes),
                        false => Err(failure::cut_short(bytes.len() as u64, due)),
                    }
                }
            })
            .await
    }

    /// Puts an object, in place of one that is there.
    pub fn put(&self, key: &str, bytes: impl Into<Bytes>) -> Result<(), StoreError> {
        self.handle().block_on(store(&self.store, &self.retry, self.path(key), key, bytes.into()))
    }

    /// Begins to put objects, one behind the other: the answer comes from what is returned.
    pub fn begin_puts(&self, objects: Vec<(String, Bytes)>) -> Pending {
        let (to, retry) = (Arc::clone(&self.store), Arc::clone(&self.retry));
        let handle = self.handle().clone();
        let objects = objects.into_iter().map(|(key, bytes)| (self.path(&key), key, bytes));
        let objects: Vec<_> = objects.collect();
        let task = handle.spawn(async move {
            for (path, key, bytes) in objects {
                store(&to, &retry, path, &key, bytes).await?;
            }
            Ok(())
        });
        Pending { handle, task }
    }

    /// Puts an object unless there is one. Tells whether it was put, be it by an earlier try.
    pub fn create(&self, key: &str, bytes: impl Into<Bytes>) -> Result<bool, StoreError> {
        let bytes = bytes.into();
        // The answer to a try of ours may have been lost: then it is there, byte for byte.
        let is_ours = || self.get(key).map(|there| there == bytes);
        // Looking is the best that can be done where there are no conditions.
        if self.careless && self.head(key)?.is_some() {
            return is_ours();
        }
        match self.put_unless_there(key, bytes.clone()) {
            Ok(()) => Ok(true),
            Err(error) if error.failure == StoreFailure::Exists => is_ours(),
            Err(error) if failure::is_unsupported(&error) => match self.head(key)? {
                None => self.put(key, bytes.clone()).map(|()| true),
                Some(_) => is_ours(),
            },
            Err(error) => Err(error),
        }
    }

    /// Whether the store minds the condition that nothing is there: so that of two who put the same object at
    /// once, one is told. An object of this key is put, and removed again.
    pub fn minds_conditions(&self, key: &str) -> Result<bool, StoreError> {
        self.put(key, Bytes::new())?;
        let again = self.put_unless_there(key, Bytes::new());
        self.try_delete(key);
        match again {
            Ok(()) => Ok(false),
            Err(error) if error.failure == StoreFailure::Exists => Ok(true),
            Err(error) if failure::is_unsupported(&error) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn put_unless_there(&self, key: &str, bytes: Bytes) -> Result<(), StoreError> {
        let path = self.path(key);
        self.handle().block_on(
            self.retry.run("writing", key, bytes.len() as u64, || {
                let (path, payload) = (path.clone(), PutPayload::from_bytes(bytes.clone()));
                async move {
                    self.store.put_opts(&path, payload, PutMode::Create.into()).await.map(drop)
                }
            }),
        )
    }

    /// What a listing would tell of an object, if it is there.
    pub fn head(&self, key: &str) -> Result<Option<Listing>, StoreError> {
        let path = self.path(key);
        let found = self.handle().block_on(self.retry.run("looking for", key, 0, || {
            let path = path.clone();
            async move { self.store.head(&path).await }
        }));
        match found {
            Ok(meta) => Ok(Some(self.listing(&meta))),
            Err(error) if error.failure == StoreFailure::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Which of these are there. They are asked for at once.
    pub fn exist(&self, keys: Vec<String>) -> Result<Vec<bool>, StoreError> {
        self.handle().block_on(
            stream::iter(keys)
                .map(|key| async move {
                    let path = self.path(&key);
                    let run = self.retry.run("looking for", &key, 0, || {
                        let path = path.clone();
                        async move { self.store.head(&path).await }
                    });
                    match run.await {
                        Ok(_) => Ok(true),
                        Err(error) if error.failure == StoreFailure::NotFound => Ok(false),
                        Err(error) => Err(error),
                    }
                })
                .buffered(REQUESTS)
                .try_collect(),
        )
    }

    /// Removes an object, if it is there.
    pub fn delete(&self, key: &str) -> Result<(), StoreError> {
        self.delete_all(vec![key.to_owned()])
    }

    /// Tries once to remove an object, even for somebody who was told to stop.
    pub fn try_delete(&self, key: &str) {
        let path = self.path(key);
        let removed = async { tokio::time::timeout(LAST_TRY, self.store.delete(&path)).await };
        match self.handle().block_on(removed) {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!("{}", failure::judge(&error).problem),
            Err(_) => tracing::debug!("`{key}` was not removed in time"),
        }
    }

    /// Removes objects, those that are there: many in one request where the store can.
    pub fn delete_all(&self, keys: Vec<String>) -> Result<(), StoreError> {
        let keys = match &self.directory {
            // What is left tells why.
            Some(directory) => directory.remove(keys),
            None => keys,
        };
        let paths: Vec<Path> = keys.iter().map(|key| self.path(key)).collect();
        let some = paths.chunks(REMOVED_AT_ONCE).zip(keys.chunks(REMOVED_AT_ONCE));
        self.handle().block_on(stream::iter(some).map(Ok).try_for_each_concurrent(
            REMOVALS,
            |(paths, keys)| async move {
                let remove = || async move {
                    let paths = stream::iter(paths.to_vec()).map(Ok).boxed();
                    let mut removed = self.store.delete_stream(paths);
                    while let Some(one) = removed.next().await {
                        match one {
                            Ok(_) | Err(object_store::Error::NotFound { .. }) => {}
                            Err(error) => return Err(error),
                        }
                    }
                    Ok(())
                };
                self.retry.run("removing", &keys[0], paths.len() as u64 * 4096, remove).await
            },
        ))
    }

    /// Lists all objects whose keys begin with this and a `/`, in the order of their keys.
    pub fn list(&self, under: &str) -> Result<Vec<Listing>, StoreError> {
        let mut found = self.handle().block_on(self.list_one(under))?;
        found.sort_by(|a, b| a.key.cmp(&b.key));
        Ok(found)
    }

    /// Lists under several at once.
    pub fn list_each(&self, under: Vec<String>) -> Result<Vec<Listing>, StoreError> {
        let quickly = self.directory.as_ref().and_then(|directory| directory.list(&under));
        let mut found: Vec<Listing> = match quickly {
            Some(found) => found,
            None => self.handle().block_on(
                stream::iter(under)
                    .map(|under| async move { self.list_one(&under).await })
                    .buffer_unordered(LISTED_AT_ONCE)
                    .try_concat(),
            )?,
        };
        found.sort_by(|a, b| a.key.cmp(&b.key));
        Ok(found)
    }

    async fn list_one(&self, under: &str) -> Result<Vec<Listing>, StoreError> {
        let path = self.path(under);
        self.retry
            .run("listing", under, 1 << 20, || {
                let path = path.clone();
                async move {
                    let found = self.store.list(Some(&path));
                    found.map_ok(|meta| self.listing(&meta)).try_collect::<Vec<_>>().await
                }
            })
            .await
    }

    fn listing(&self, meta: &object_store::ObjectMeta) -> Listing {
        let mut parts = meta.location.parts();
        self.prefix.parts().for_each(|_| drop(parts.next()));
        let key = parts.map(|part| part.as_ref().to_owned()).collect::<Vec<_>>().join("/");
        Listing { key, len: meta.size, put_ms: meta.last_modified.timestamp() * 1000 }
    }
}

async fn store(
    to: &Arc<dyn ObjectStore>,
    retry: &Retry,
    path: Path,
    key: &str,
    bytes: Bytes,
) -> Result<(), StoreError> {
    retry
        .run("writing", key, bytes.len() as u64, || {
            let (path, payload) = (path.clone(), PutPayload::from_bytes(bytes.clone()));
            async move { to.put(&path, payload).await.map(drop) }
        })
        .await
}

impl Drop for Remote {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // Whoever drops it may be a task, which must not wait.
            runtime.shutdown_background();
        }
    }
}

/// An object that is being put.
pub struct Pending {
    handle: Handle,
    task: tokio::task::JoinHandle<Result<(), StoreError>>,
}

impl Pending {
    /// Whether the answer is there.
    pub fn is_done(&self) -> bool {
        self.task.is_finished()
    }

    /// Waits for the answer.
    pub fn wait(self) -> Result<(), StoreError> {
        let ended = self.handle.block_on(self.task);
        ended.unwrap_or_else(|e| std::panic::resume_unwind(e.into_panic()))
    }
}
