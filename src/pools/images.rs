//! The images of all pools: each is open once, with one cache of chunks.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::config::PoolSettings;
use super::saved::StateDirectory;
use crate::cancel::Cancellation;
use crate::image::journeys::{FlattenOptions, flatten};
use crate::image::{Image, ImageError, Layout};
use crate::memory::{CacheFigures, CachedSource};
use crate::revert::session::OpenImage;

/// An image that guests of one or more pools are brought back from.
pub(super) struct PoolImage {
    image: Arc<Image>,
    pages: Arc<CachedSource<Arc<Image>>>,
}

impl PoolImage {
    /// As a session takes it.
    pub fn open(&self) -> OpenImage {
        OpenImage { image: Arc::clone(&self.image), pages: Arc::clone(&self.pages) as _ }
    }

    /// The memory of its machine, in bytes.
    pub fn ram(&self) -> u64 {
        self.image.manifest().blocks.iter().map(|block| block.len).sum()
    }

    /// What its cache has come to.
    pub fn cache(&self) -> CacheFigures {
        self.pages.figures()
    }
}

/// The images that pools use now, by what tells them apart.
#[derive(Default)]
pub(super) struct Images {
    open: Mutex<HashMap<String, Weak<PoolImage>>>,
    /// The most bytes of chunks that are kept of each.
    cache: u64,
}

impl Images {
    /// With caches of so many bytes.
    pub fn new(cache: u64) -> Images {
        Images { cache, ..Images::default() }
    }

    /// A pool's image, or the flat copy of it that is kept for pools that share memory. Blocks,
    /// for long where a copy is made.
    pub fn of(
        &self,
        settings: &PoolSettings,
        state: &StateDirectory,
    ) -> Result<Arc<PoolImage>, ImageError> {
        let image = open(settings, state)?;
        let identity = image.identity().to_string();
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = open.get(&identity).and_then(Weak::upgrade) {
            return Ok(known);
        }
        let pages = Arc::new(CachedSource::new(Arc::clone(&image), self.cache));
        let new = Arc::new(PoolImage { image, pages });
        open.retain(|_, image| image.strong_count() > 0);
        open.insert(identity, Arc::downgrade(&new));
        Ok(new)
    }
}

fn open(settings: &PoolSettings, state: &StateDirectory) -> Result<Arc<Image>, ImageError> {
    let image = Image::open(&settings.image)?;
    if !settings.share || !image.manifest().flat.is_empty() {
        return Ok(image);
    }
    let copy = state.flat(&image.identity().to_string());
    if !is_file(&copy) {
        let options =
            FlattenOptions { layout: Layout::Flat, ..FlattenOptions::new(&settings.image, &copy) };
        flatten(&options, &Cancellation::new(), |_, _| {})?;
    }
    Image::open(&copy)
}

fn is_file(path: &Path) -> bool {
    path.metadata().is_ok_and(|meta| meta.is_file())
}
