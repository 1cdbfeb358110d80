//! Where the bytes of images lie: anything of which ranges can be read.
//!
//! Everything that reads images goes through [`Store`] and so doesn't know files.
//! [`file::FileStore`] is one implementation; images in repositories have another
//! (`far`).

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::Path;

use crate::image::format::error::ImageError;

pub(super) mod file;

/// One object that holds an image, for example a file. Its contents don't change while it
/// is open.
///
/// Several threads read at once. Errors of reading are bare causes: the reading side adds
/// the object's [name](Store::name), the position, and which part of the image lies there.
pub(crate) trait Store: Send + Sync {
    /// What error messages call the object: a file's path, an object's URL.
    fn name(&self) -> &str;

    /// Length in bytes.
    fn len(&self) -> u64;

    /// Fills `buffer` with the bytes from `position` on, counted from the object's start.
    /// A page fault may wait for it: it takes no lock that others hold while they read,
    /// and allocates nothing where the bytes are local.
    ///
    /// # Errors
    /// Whatever keeps the bytes from being read, among it [`io::ErrorKind::UnexpectedEof`]
    /// when the object ends before `buffer` is full. `buffer` then holds anything.
    fn read_at(&self, buffer: &mut [u8], position: u64) -> io::Result<()>;

    /// Looks for another object, to which the image in this one refers: in one place after
    /// the other, the likeliest first, as the iterator is advanced. `relative` is its path
    /// as seen from this object, `absolute` its path when the reference was written.
    fn neighbours<'a>(
        &'a self,
        relative: &str,
        absolute: &str,
    ) -> Box<dyn Iterator<Item = Neighbour> + 'a>;

    /// Looks whether another object lies under its name by now, and reads from that one from then
    /// on if it passes for the same: of the same length, and accepted by `is_same`. Reads under
    /// way are not disturbed.
    fn look_again(&self, is_same: &dyn Fn(&dyn Store) -> bool) {
        let _ = is_same;
    }

    /// Whether its bytes come from afar: reading takes long, and many readers at a time are no slower
    /// than one.
    fn is_far(&self) -> bool {
        false
    }

    /// Tells that these bytes are going to be read, in this order. An object that is far away has them
    /// fetched; returns at once.
    fn will_read(&self, ranges: Vec<Range<u64>>) {
        let _ = ranges;
    }

    /// The file that the object is, if it is one. For what needs a file and not only its
    /// bytes: to map it, to find its holes, to put others beside it.
    fn file(&self) -> Option<(&Path, &File)> {
        None
    }
}

/// A place where a neighbouring object was looked for.
pub(crate) struct Neighbour {
    /// What error messages call the place.
    pub name: String,
    /// What is there.
    pub store: Result<Box<dyn Store>, ImageError>,
}
