//! The other images that an image refers to: found again when it is opened, and named
//! when one is written.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::image::format::error::ImageError;
use crate::image::format::layout::MAX_LAYERS;
use crate::image::format::manifest::{LayerRef, Manifest};
use crate::image::read::image::{Image, read_manifest};
use crate::image::read::layer::Layer;
use crate::image::write::target::check_replaces_none;

/// An image looked at from outside: what it says of itself, and which of the images that
/// it refers to are there.
#[derive(Debug)]
pub struct Overview {
    /// What the image says of itself.
    pub manifest: Manifest,
    /// Length of its own file in bytes.
    pub file_len: u64,
    /// For each of the manifest's layers: where it was found, or why it was not.
    pub layers: Vec<Result<PathBuf, ImageError>>,
}

/// Looks at an image. Images that it refers to may be missing, unlike for
/// [`Image::open`].
///
/// # Errors
/// When the image itself can't be read, is none, or is damaged.
pub fn look(path: impl AsRef<Path>) -> Result<Overview, ImageError> {
    let own = Layer::open(path.as_ref())?;
    let manifest = read_manifest(&own)?;
    let found = |wanted| find(&own.path, wanted).map(|layer| layer.path);
    let layers = manifest.layers.iter().map(found).collect();
    Ok(Overview { layers, file_len: own.superblock.file_len, manifest })
}

/// Opens the images that the one at `path` refers to.
pub(in crate::image) fn open_layers(
    path: &Path,
    wanted: &[LayerRef],
) -> Result<Vec<Layer>, ImageError> {
    wanted.iter().map(|wanted| find(path, wanted)).collect()
}

/// Finds one of the images that the one at `path` refers to: as seen from the folder in
/// which that lies now, or where it was then, or in that folder itself.
fn find(path: &Path, wanted: &LayerRef) -> Result<Layer, ImageError> {
    let folder = fs::canonicalize(path).ok();
    let folder = folder.as_deref().unwrap_or(path).parent().unwrap_or(Path::new("."));
    let absolute = PathBuf::from(&wanted.absolute);
    let beside = absolute.file_name().map(|name| folder.join(name));
    let mut places = vec![folder.join(&wanted.relative)];
    for place in [Some(absolute), beside].into_iter().flatten() {
        // `..` goes through links as the file system does; equal texts mean equal places.
        if !places.contains(&place) {
            places.push(place);
        }
    }
    let mut found = Vec::new();
    for place in places {
        match open_as(&place, wanted) {
            Ok(layer) => return Ok(layer),
            Err(why) => found.push(format!("{} {why}", place.display())),
        }
    }
    Err(ImageError::Layer {
        path: path.to_owned(),
        identity: wanted.identity,
        problem: format!(
            "{}; put that image back into one of these places (where it lies relative to {} \
             goes first)",
            found.join(", "),
            path.display()
        ),
    })
}

/// Opens that image there, or says what is there instead.
fn open_as(place: &Path, wanted: &LayerRef) -> Result<Layer, String> {
    let layer = Layer::open(place).map_err(|error| match error {
        ImageError::Io { error, .. } if error.kind() == io::ErrorKind::NotFound => {
            "does not exist".to_owned()
        }
        other => format!("can't be used ({other})"),
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

impl Image {
    /// Whether what is written to `target` replaces neither this image nor one that it
    /// refers to.
    ///
    /// # Errors
    /// [`ImageError::Replaces`] when it would.
    pub fn check_not_replaced(&self, target: &Path) -> Result<(), ImageError> {
        let files = self.layers().iter().map(|layer| (layer.path.as_path(), &layer.file));
        check_replaces_none(target, files)
    }
}

/// What an image that is to be called `target` will write of `parent` and of all that
/// this refers to: `parent` first, then the others in its order.
///
/// # Errors
/// When `target` would replace one of them, when they are too many, or when a path
/// can't be written down.
pub(in crate::image) fn refer_to(
    parent: &Image,
    target: &Path,
) -> Result<Vec<LayerRef>, ImageError> {
    let refused = |problem: String| {
        let path = parent.path().to_owned();
        ImageError::Parent { path, problem }
    };
    let layers = parent.layers();
    if layers.len() > MAX_LAYERS {
        let problem = format!(
            "it refers to {} images, and a chain has {MAX_LAYERS} at most: make one image of it \
             first (snapback flatten)",
            layers.len() - 1
        );
        return Err(refused(problem));
    }
    let folder = match target.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let folder = fs::canonicalize(folder)
        .map_err(|e| ImageError::io("look for the folder of", target, e))?;
    parent.check_not_replaced(target)?;
    let mut refs = Vec::with_capacity(layers.len());
    for layer in layers {
        let path = &layer.path;
        let absolute = fs::canonicalize(path).map_err(|e| ImageError::io("look for", path, e))?;
        let relative = pathdiff::diff_paths(&absolute, &folder);
        let text = |path: Option<PathBuf>| {
            path.and_then(|path| path.into_os_string().into_string().ok()).ok_or_else(|| {
                refused(format!("the path {} is not UTF-8: rename it", absolute.display()))
            })
        };
        refs.push(LayerRef {
            identity: layer.superblock.identity,
            file_len: layer.superblock.file_len,
            relative: text(relative)?,
            absolute: text(Some(absolute.clone()))?,
            pages: 0,
        });
    }
    Ok(refs)
}

/// Whether an image that is to be called `target` can be written on top of `parent`.
///
/// # Errors
/// See [`ImageError::Parent`] and [`ImageError::Replaces`].
pub fn check_parent(parent: &Image, target: &Path) -> Result<(), ImageError> {
    refer_to(parent, target).map(drop)
}
