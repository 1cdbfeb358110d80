//! Files that a process in its sandbox may read and can't open, since others have taken their
//! places by now. A process outside opens them.

use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

/// Opens a file outside.
pub type Opener = Arc<dyn Fn(&Path) -> io::Result<File> + Send + Sync>;

/// That of this process, whose sandbox holds for all of it.
static OPENER: Mutex<Option<Opener>> = Mutex::new(None);

/// Has [`open`] ask this opener from now on for what is refused.
pub fn set_opener(opener: Opener) {
    *OPENER.lock().unwrap_or_else(PoisonError::into_inner) = Some(opener);
}

/// Opens a file for reading, by the opener where the sandbox refuses it. A FIFO is not waited for
/// (O_NONBLOCK, fifo(7)).
///
/// # Errors
/// As for open(2), and those of the opener.
pub fn open(path: &Path) -> io::Result<File> {
    match open_here(path) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            let opener = OPENER.lock().unwrap_or_else(PoisonError::into_inner).clone();
            opener.map_or(Err(error), |open| open(path))
        }
        opened => opened,
    }
}

/// As [`open`], as far as this process may.
///
/// # Errors
/// As for open(2).
pub fn open_here(path: &Path) -> io::Result<File> {
    File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)
}
