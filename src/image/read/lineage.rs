//! The other images that an image refers to, found when it is opened.

use std::path::Path;

use crate::image::format::error::ImageError;
use crate::image::format::manifest::{LayerRef, Manifest};
use crate::image::read::layer::Layer;
use crate::image::store::file::FileStore;
use crate::image::store::{Neighbour, Store};

/// An image looked at from outside: what it says of itself, and which of the images that
/// it refers to are there.
#[derive(Debug)]
#[non_exhaustive]
pub struct Overview {
    /// What the image says of itself.
    pub manifest: Manifest,
    /// Length of its own file in bytes.
    pub file_len: u64,
    /// For each of the manifest's layers: the name of what was found, a file's path, or why
    /// it was not found.
    pub layers: Vec<Result<String, ImageError>>,
}

/// Looks at an image. Images that it refers to may be missing, unlike for
/// [`Image::open`](crate::image::Image::open).
///
/// # Errors
/// When the image itself can't be read, is none, or is damaged.
pub fn inspect(path: impl AsRef<Path>) -> Result<Overview, ImageError> {
    let own = Layer::open(Box::new(FileStore::open(path.as_ref())?))?;
    let manifest = own.manifest()?;
    let found = |wanted| find(&own, wanted).map(|layer| layer.name().to_owned());
    let layers = manifest.layers.iter().map(found).collect();
    Ok(Overview { layers, file_len: own.superblock.file_len, manifest })
}

/// Opens the images that `own` refers to.
///
/// # Errors
/// [`ImageError::Layer`], which says where one was looked for and what was found there.
pub(in crate::image) fn open_layers(
    own: &Layer,
    wanted: &[LayerRef],
) -> Result<Vec<Layer>, ImageError> {
    wanted.iter().map(|wanted| find(own, wanted)).collect()
}

/// Finds one of the images that `own` refers to.
fn find(own: &Layer, wanted: &LayerRef) -> Result<Layer, ImageError> {
    let mut found = Vec::new();
    for Neighbour { name, store } in own.store.neighbours(&wanted.relative, &wanted.absolute) {
        match open_as(store, wanted) {
            Ok(layer) => return Ok(layer),
            Err(why) => found.push(format!("{name} {why}")),
        }
    }
    Err(ImageError::Layer {
        image: own.name().to_owned(),
        identity: wanted.identity,
        problem: format!(
            "{}; put that image back into one of these places (where it lies relative to {} \
             goes first)",
            found.join(", "),
            own.name()
        ),
    })
}

/// Opens that image there, or says what is there instead.
fn open_as(store: Result<Box<dyn Store>, ImageError>, wanted: &LayerRef) -> Result<Layer, String> {
    let layer = store.and_then(Layer::open).map_err(|error| match error.is_not_found() {
        true => "does not exist".to_owned(),
        false => format!("can't be used ({error})"),
    })?;
    let superblock = &layer.superblock;
    if superblock.identity != wanted.identity {
        return Err(format!("is another image ({})", superblock.identity));
    }
    if superblock.file_len != wanted.file_len {
        let (now, then) = (superblock.file_len, wanted.file_len);
        return Err(format!("has changed ({now} bytes, not {then})"));
    }
    Ok(layer)
}
