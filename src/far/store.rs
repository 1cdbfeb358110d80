//! A file of a repository as what holds an image.

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::file::FarFile;
use crate::image::{ImageError, Neighbour, Store};

/// An image, and the images that it refers to, by the names of their files.
pub struct FarStore {
    pub file: Arc<FarFile>,
    pub others: Arc<HashMap<String, Arc<FarFile>>>,
}

impl Store for FarStore {
    fn name(&self) -> &str {
        self.file.name()
    }

    fn len(&self) -> u64 {
        self.file.len()
    }

    fn read_at(&self, buffer: &mut [u8], position: u64) -> io::Result<()> {
        self.file.read_at(buffer, position)
    }

    /// The snapshot's other images, by the paths that they had.
    fn neighbours<'a>(
        &'a self,
        _relative: &str,
        absolute: &str,
    ) -> Box<dyn Iterator<Item = Neighbour> + 'a> {
        let absolute = absolute.to_owned();
        let of_that_path = self.others.get(&absolute).into_iter();
        // It may have been moved before it was pushed.
        let others = self.others.iter().filter(move |(path, _)| **path != absolute);
        let all = of_that_path.chain(others.map(|(_, file)| file));
        Box::new(all.map(|file| Neighbour {
            name: file.name().to_owned(),
            store: Ok::<Box<dyn Store>, ImageError>(Box::new(FarStore {
                file: Arc::clone(file),
                others: Arc::clone(&self.others),
            })),
        }))
    }

    fn is_far(&self) -> bool {
        true
    }

    fn will_read(&self, ranges: Vec<Range<u64>>) {
        self.file.will_read(&ranges);
    }
}
