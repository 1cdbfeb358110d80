//! A store in one file: read at any place, written from its beginning to its end.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path as FilePath;
use std::sync::{Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::stream::{self, BoxStream};
use futures_util::{FutureExt, StreamExt};
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload,
    ObjectMeta, ObjectStore, PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult,
    Result,
};

use crate::repository::error::RepositoryError;
use crate::repository::format::packed::{
    Directory, HEAD, TAIL, check_head, directory, directory_place, head, read_directory,
};

/// What nobody needs in a file that one process writes.
const LEFT_OUT: &str = "leases/";

/// A file that is read.
pub struct PackedFile {
    file: File,
    objects: Directory,
}

/// A file, or a pipe, that is written.
pub struct PackedWriter(Mutex<Writing>);

struct Writing {
    to: Box<dyn Write + Send>,
    at: u64,
    objects: Directory,
}

impl PackedFile {
    /// Opens a file.
    pub fn open(path: &FilePath) -> Result<PackedFile, RepositoryError> {
        let io = |error| RepositoryError::io("reading", path, error);
        let wrong = |problem| RepositoryError::Packed { path: path.to_owned(), problem };
        let mut file = File::open(path).map_err(io)?;
        let len = file.metadata().map_err(io)?.len();
        let mut begin = [0; HEAD];
        if len < (HEAD + TAIL) as u64 {
            return Err(wrong("it is too short".into()));
        }
        file.read_exact(&mut begin).map_err(io)?;
        check_head(&begin).map_err(wrong)?;
        let mut tail = [0; TAIL];
        file.read_exact_at(&mut tail, len - TAIL as u64).map_err(io)?;
        let place = directory_place(&tail, len).map_err(wrong)?;
        let mut bytes = vec![0; (place.end - place.start) as usize];
        file.read_exact_at(&mut bytes, place.start).map_err(io)?;
        let objects = read_directory(&bytes, place.start).map_err(wrong)?;
        Ok(PackedFile { file, objects })
    }
}

impl PackedWriter {
    /// Begins a file.
    pub fn new(mut to: Box<dyn Write + Send>) -> io::Result<PackedWriter> {
        to.write_all(&head())?;
        let writing = Writing { to, at: HEAD as u64, objects: Directory::new() };
        Ok(PackedWriter(Mutex::new(writing)))
    }

    /// Ends it.
    pub fn finish(&self) -> io::Result<()> {
        let mut writing = self.lock();
        let bytes = directory(&writing.objects, writing.at);
        writing.to.write_all(&bytes).and_then(|()| writing.to.flush())
    }

    fn lock(&self) -> MutexGuard<'_, Writing> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for PackedFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PackedFile")
    }
}

impl fmt::Debug for PackedWriter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PackedWriter")
    }
}

impl fmt::Display for PackedFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a packed file")
    }
}

impl fmt::Display for PackedWriter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a packed file")
    }
}

fn missing(path: &Path) -> Error {
    Error::NotFound { path: path.to_string(), source: "it is not there".into() }
}

fn unsupported(operation: &str) -> Error {
    Error::NotImplemented { operation: operation.into(), implementer: "a packed file".into() }
}

fn failed(error: io::Error) -> Error {
    Error::Generic { store: "packed file", source: Box::new(error) }
}

fn meta(path: &Path, place: &Range<u64>) -> ObjectMeta {
    ObjectMeta {
        location: path.clone(),
        last_modified: Default::default(),
        size: place.end - place.start,
        e_tag: None,
        version: None,
    }
}

/// The answer to a request for the bytes of an object, which `read` reads.
fn answer(
    path: &Path,
    place: &Range<u64>,
    options: GetOptions,
    read: impl FnOnce(Range<u64>) -> io::Result<Vec<u8>>,
) -> Result<GetResult> {
    let meta = meta(path, place);
    let range = match &options.range {
        None => 0..meta.size,
        Some(range) => {
            let range = range.as_range(meta.size);
            range.map_err(|e| Error::Generic { store: "packed file", source: Box::new(e) })?
        }
    };
    let bytes = match options.head {
        true => Vec::new(),
        false => read(place.start + range.start..place.start + range.end).map_err(failed)?,
    };
    let payload = stream::once(async move { Ok(Bytes::from(bytes)) }).boxed();
    Ok(GetResult {
        payload: GetResultPayload::Stream(payload),
        meta,
        range,
        attributes: Default::default(),
        extensions: Default::default(),
    })
}

/// What lies under a prefix.
fn list(objects: &Directory, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
    let under = prefix.map(|prefix| format!("{prefix}/")).unwrap_or_default();
    let found = objects.iter().filter(|(key, _)| key.starts_with(&under));
    let found: Vec<Result<ObjectMeta>> =
        found.map(|(key, place)| Ok(meta(&Path::from(key.as_str()), place))).collect();
    stream::iter(found).boxed()
}

#[async_trait]
impl ObjectStore for PackedFile {
    async fn put_opts(&self, _: &Path, _: PutPayload, _: PutOptions) -> Result<PutResult> {
        Err(unsupported("writing"))
    }

    async fn put_multipart_opts(
        &self,
        _: &Path,
        _: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        Err(unsupported("writing"))
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        let place = self.objects.get(location.as_ref()).ok_or_else(|| missing(location))?;
        answer(location, place, options, |range| {
            let mut bytes = vec![0; (range.end - range.start) as usize];
            self.file.read_exact_at(&mut bytes, range.start).map(|()| bytes)
        })
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        locations.map(|_| Err(unsupported("removing"))).boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        list(&self.objects, prefix)
    }

    async fn list_with_delimiter(&self, _: Option<&Path>) -> Result<ListResult> {
        Err(unsupported("listing with a delimiter"))
    }

    async fn copy_opts(&self, _: &Path, _: &Path, _: CopyOptions) -> Result<()> {
        Err(unsupported("copying"))
    }
}

#[async_trait]
impl ObjectStore for PackedWriter {
    async fn put_opts(
        &self,
        location: &Path,
        payload: PutPayload,
        options: PutOptions,
    ) -> Result<PutResult> {
        let key = location.to_string();
        let mut writing = self.lock();
        if options.mode == PutMode::Create && writing.objects.contains_key(&key) {
            let (path, source) = (key, "it is there".into());
            return Err(Error::AlreadyExists { path, source });
        }
        if !key.starts_with(LEFT_OUT) {
            let start = writing.at;
            for part in &payload {
                writing.to.write_all(part).map_err(failed)?;
                writing.at += part.len() as u64;
            }
            let place = start..writing.at;
            writing.objects.insert(key, place);
        }
        Ok(PutResult { e_tag: None, version: None, extensions: Default::default() })
    }

    async fn put_multipart_opts(
        &self,
        _: &Path,
        _: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        Err(unsupported("writing in parts"))
    }

    /// It tells what is there; its bytes are gone.
    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        let place = self.lock().objects.get(location.as_ref()).cloned();
        let place = place.ok_or_else(|| missing(location))?;
        match options.head {
            true => answer(location, &place, options, |_| Ok(Vec::new())),
            false => Err(unsupported("reading what is being written")),
        }
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        // Only names are removed: no more than a draft of an index, and that before its turn ends.
        let gone: BTreeSet<String> = locations
            .filter_map(|path| async move { path.ok().map(|path| path.to_string()) })
            .collect::<BTreeSet<_>>()
            .now_or_never()
            .unwrap_or_default();
        self.lock().objects.retain(|key, _| !gone.contains(key));
        stream::iter(gone.into_iter().map(|key| Ok(Path::from(key)))).boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        list(&self.lock().objects, prefix)
    }

    async fn list_with_delimiter(&self, _: Option<&Path>) -> Result<ListResult> {
        Err(unsupported("listing with a delimiter"))
    }

    async fn copy_opts(&self, _: &Path, _: &Path, _: CopyOptions) -> Result<()> {
        Err(unsupported("copying"))
    }
}
