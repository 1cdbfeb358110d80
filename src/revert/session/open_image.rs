//! An image that a session is brought back from.

use std::sync::Arc;

use crate::image::Image;
use crate::page::PageSource;

/// An image that is open, and what its pages are read by.
#[derive(Clone)]
pub(crate) struct OpenImage {
    pub image: Arc<Image>,
    pub pages: Arc<dyn PageSource>,
}

impl From<Arc<Image>> for OpenImage {
    /// With its pages read by itself.
    fn from(image: Arc<Image>) -> OpenImage {
        OpenImage { pages: Arc::new(Arc::clone(&image)), image }
    }
}
