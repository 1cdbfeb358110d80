//! Another system in the oracle's place: the drivers are loaded, the rest is its own.

use std::convert::Infallible;
use std::ffi::CString;
use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::ptr;
use std::thread;
use std::time::Duration;

use crate::Failure;

/// How long a disk may take to appear once its driver is loaded.
const PATIENCE: Duration = Duration::from_secs(10);
const LOOK: Duration = Duration::from_millis(10);

/// Mounts the ext4 file system on `device`, to be written to, makes it the root and
/// goes on as its `/sbin/init`. `/dev` and `/proc` move along. Comes back only with
/// an error.
pub fn switch(device: &str) -> Result<Infallible, Failure> {
    let mut left = PATIENCE;
    while !Path::new(device).exists() {
        left = left.checked_sub(LOOK).ok_or_else(|| format!("there is no {device}"))?;
        thread::sleep(LOOK);
    }
    fs::create_dir_all("/root")?;
    mount(device, "/root", Some("ext4"), 0)?;
    for folder in ["/dev", "/proc"] {
        mount(folder, &format!("/root{folder}"), None, libc::MS_MOVE)?;
    }
    std::env::set_current_dir("/root")?;
    mount(".", "/", None, libc::MS_MOVE)?;
    std::os::unix::fs::chroot(".")?;
    Err(format!("/sbin/init of {device}: {}", Command::new("/sbin/init").exec()).into())
}

fn mount(
    source: &str,
    target: &str,
    kind: Option<&str>,
    flags: libc::c_ulong,
) -> Result<(), Failure> {
    let (from, to) = (CString::new(source)?, CString::new(target)?);
    let kind = kind.map(CString::new).transpose()?;
    let kind = kind.as_ref().map_or(ptr::null(), |kind| kind.as_ptr());
    // SAFETY: the strings end in NUL and live on; no kind is allowed for a move, and
    // no data is passed.
    match unsafe { libc::mount(from.as_ptr(), to.as_ptr(), kind, flags, ptr::null()) } {
        0 => Ok(()),
        _ => Err(format!("mount {source} at {target}: {}", io::Error::last_os_error()).into()),
    }
}
