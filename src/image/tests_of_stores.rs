//! What must hold of images wherever they lie: here in memory, as in an object store.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::tests::{expected, options, page, read_all};
use super::tests_of_chains::{Chain, write};
use super::*;
use crate::image::store::{Neighbour, Store};
use crate::page::PAGE_SIZE;

/// Objects by their names.
#[derive(Default)]
pub(super) struct Bucket {
    objects: Mutex<HashMap<String, Vec<u8>>>,
    /// Reads from this position on fail.
    readable: AtomicU64,
}

impl Bucket {
    /// One without objects.
    pub fn empty() -> Arc<Bucket> {
        Arc::new(Bucket { readable: u64::MAX.into(), ..Bucket::default() })
    }

    /// The images of a chain under their file names.
    fn of(chain: &Chain) -> Arc<Bucket> {
        let name = |n| format!("{n}.snap");
        let object = |n| (name(n), fs::read(chain.path(n)).unwrap());
        let objects = (0..chain.memory.len()).map(object).collect();
        Arc::new(Bucket { objects: Mutex::new(objects), readable: u64::MAX.into() })
    }

    fn object(self: &Arc<Bucket>, name: &str) -> Result<Box<dyn Store>, ImageError> {
        let found = self.objects.lock().unwrap().get(name).map(Vec::len);
        let name = format!("bucket:{name}");
        match found {
            Some(len) => Ok(Box::new(Object { bucket: Arc::clone(self), name, len: len as u64 })),
            None => {
                let error = io::ErrorKind::NotFound.into();
                Err(ImageError::Read { image: name, position: 0, error })
            }
        }
    }

    /// Puts an image there, and opens it.
    pub fn put(self: &Arc<Bucket>, bytes: &[u8]) -> Arc<Image> {
        self.try_put(bytes).unwrap()
    }

    /// Puts a file there that may be no image, and opens it.
    pub fn try_put(self: &Arc<Bucket>, bytes: &[u8]) -> Result<Arc<Image>, ImageError> {
        self.objects.lock().unwrap().insert("vm.snap".into(), bytes.to_owned());
        self.open("vm.snap")
    }

    pub fn open(self: &Arc<Bucket>, name: &str) -> Result<Arc<Image>, ImageError> {
        Image::open_in(self.object(name)?)
    }
}

struct Object {
    bucket: Arc<Bucket>,
    name: String,
    len: u64,
}

impl Store for Object {
    fn name(&self) -> &str {
        &self.name
    }

    fn len(&self) -> u64 {
        self.len
    }

    fn read_at(&self, buffer: &mut [u8], position: u64) -> io::Result<()> {
        if position >= self.bucket.readable.load(Ordering::Relaxed) {
            return Err(io::Error::other("the network is down"));
        }
        let objects = self.bucket.objects.lock().unwrap();
        let bytes = &objects[self.name.strip_prefix("bucket:").unwrap()];
        let range = position as usize..position as usize + buffer.len();
        buffer.copy_from_slice(bytes.get(range).ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn neighbours<'a>(
        &'a self,
        relative: &str,
        _absolute: &str,
    ) -> Box<dyn Iterator<Item = Neighbour> + 'a> {
        let relative = relative.to_owned();
        Box::new(std::iter::once_with(move || Neighbour {
            name: format!("bucket:{relative}"),
            store: self.bucket.object(&relative),
        }))
    }
}

#[test]
fn a_chain_is_read_from_wherever_it_lies() {
    let chain = Chain::write(&[&[0, 1, 6, 39], &[6, 7]]);
    let bucket = Bucket::of(&chain);
    let image = bucket.open("2.snap").unwrap();
    assert_eq!((image.name(), image.path()), ("bucket:2.snap", None));
    assert_eq!(image.files().count(), 0);
    assert!(read_all(&image).unwrap() == expected(&chain.memory[2]));
    let report = verify_chain(&image, |_, _| {}).unwrap();
    assert!(report.is_whole(), "{:?}", report.damages);

    // It is made one image like any other, in either layout.
    let directory = tempfile::tempdir().unwrap();
    let (packed, flat) = (directory.path().join("packed"), directory.path().join("flat"));
    flatten(&image, &packed, Layout::Packed, options(4, Compression::Zstd(1)), |_, _| true)
        .unwrap();
    flatten(&image, &flat, Layout::Flat, options(4, Compression::None), |_, _| true).unwrap();
    for made in [packed, flat] {
        let made = Image::open(made).unwrap();
        assert!(read_all(&made).unwrap() == expected(&chain.memory[2]));
    }
}

#[test]
fn errors_name_the_object_and_the_position() {
    let chain = Chain::write(&[&[1]]);
    let bucket = Bucket::of(&chain);
    let image = bucket.open("1.snap").unwrap();
    bucket.readable.store(PAGE_SIZE as u64, Ordering::Relaxed);
    let error = read_all(&image).unwrap_err().to_string();
    assert!(error.contains("bucket:1.snap is damaged: page index piece 0"), "{error}");
    assert!(error.contains("at file offset 0x") && error.contains("network is down"), "{error}");
    bucket.readable.store(0, Ordering::Relaxed);
    let error = bucket.open("0.snap").err().unwrap().to_string();
    assert_eq!(error, "cannot read bucket:0.snap at offset 0x0: the network is down");

    bucket.readable.store(u64::MAX, Ordering::Relaxed);
    bucket.objects.lock().unwrap().remove("0.snap");
    let error = bucket.open("1.snap").err().unwrap().to_string();
    for part in ["bucket:1.snap needs image", "bucket:0.snap does not exist"] {
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn what_is_mapped_is_checked_without_a_file_too() {
    let directory = tempfile::tempdir().unwrap();
    let (packed, flat) = (directory.path().join("packed"), directory.path().join("flat"));
    let memory = [(page(0, 0), 1), (page(0, 1), 0), (page(0, 2), 3)].into();
    write(&packed, &memory, options(4, Compression::None), None).unwrap();
    flatten(
        &Image::open(packed).unwrap(),
        &flat,
        Layout::Flat,
        options(4, Compression::None),
        |_, _| true,
    )
    .unwrap();
    let bucket = Arc::new(Bucket { readable: u64::MAX.into(), ..Bucket::default() });
    let mut bytes = fs::read(flat).unwrap();
    let place = bucket.put(&bytes).manifest().flat[0] as usize + PAGE_SIZE;
    verify_flat(&bucket.put(&bytes)).unwrap();
    bytes[place + 7] = 1;
    let error = verify_flat(&bucket.put(&bytes)).unwrap_err().to_string();
    assert!(error.contains("offset 0x1000: it holds data, where zeros are due"), "{error}");
}

#[test]
fn only_a_file_can_be_referred_to() {
    let chain = Chain::write(&[]);
    let image = Bucket::of(&chain).open("0.snap").unwrap();
    let error = check_parent(&image, Path::new("child.snap")).unwrap_err().to_string();
    assert!(error.contains("bucket:0.snap is not a file"), "{error}");
}
