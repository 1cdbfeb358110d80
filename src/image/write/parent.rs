//! The image on top of which another is written, and all that it refers to: how the new
//! image names them.

use std::fs;
use std::path::{Path, PathBuf};

use crate::host::paths::parent_directory;
use crate::image::format::error::ImageError;
use crate::image::format::layout::MAX_LAYERS;
use crate::image::format::manifest::LayerRef;
use crate::image::read::image::Image;
use crate::image::write::target::check_replaces_none;

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
        let parent = parent.name().to_owned();
        ImageError::Parent { parent, problem }
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
    check_replaces_none(target, parent.files())?;
    let directory = parent_directory(target);
    let directory = fs::canonicalize(directory)
        .map_err(|e| ImageError::io("look for the directory of", target, e))?;
    let mut refs = Vec::with_capacity(layers.len());
    for layer in layers {
        let Some((path, _)) = layer.store.file() else {
            return Err(refused(format!("{} is not a file: copy it to one", layer.name())));
        };
        let absolute = fs::canonicalize(path).map_err(|e| ImageError::io("look for", path, e))?;
        let relative = pathdiff::diff_paths(&absolute, &directory);
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
