//! Guests and images that several tests use: booting takes seconds.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use tempfile::TempDir;

use crate::clocks::{clocks, now};
use crate::harness::{check, in_a_folder, text};
use crate::support::{Fill, Guest, GuestOptions, Qemu, Result, cont, stop};

/// A guest that lives as long as this program, and an image of it.
pub struct Shared {
    /// The image.
    pub image: PathBuf,
    /// The folder of the guest's files.
    pub from: PathBuf,
    /// The nonce of the guest.
    pub nonce: String,
    /// How far its time was ahead of the host's when it was saved, in seconds.
    pub ahead: f64,
}

/// What is to be dropped before this program ends: statics are not.
struct Kept {
    guest: Guest,
    _folder: TempDir,
}

static KEPT: [Mutex<Option<Kept>>; 2] = [const { Mutex::new(None) }; 2];

/// RAM of the guests, in MiB.
pub const MIB: u64 = 160;

/// A guest as tests like it: small, writing, and 48 MiB of it incompressible.
pub fn options(qemu: Qemu) -> GuestOptions {
    GuestOptions {
        qemu,
        mib: MIB,
        fill: Fill::Mib(64),
        random_percent: 75,
        writers: 2,
        ..GuestOptions::default()
    }
}

/// An image that is there for everybody to read.
pub fn shared(qemu: Qemu) -> Result<&'static Shared> {
    static SHARED: [OnceLock<std::result::Result<Shared, String>>; 2] =
        [const { OnceLock::new() }; 2];
    let made = SHARED[qemu as usize].get_or_init(|| make(qemu).map_err(|e| e.to_string()));
    made.as_ref().map_err(|e| e.clone().into())
}

/// The guest of that image, for one test at a time, which runs only meanwhile: under TCG it takes a good part
/// of a processor. It has to be left as it was.
pub struct Borrowed(MutexGuard<'static, Option<Kept>>);

pub fn borrow(qemu: Qemu) -> Result<Borrowed> {
    shared(qemu)?;
    // A test that failed may have left the guest in disorder; the next will tell.
    let borrowed = Borrowed(KEPT[qemu as usize].lock().unwrap_or_else(PoisonError::into_inner));
    cont(&borrowed.qmp_path)?;
    Ok(borrowed)
}

impl Drop for Borrowed {
    fn drop(&mut self) {
        // It may have ended with the test that failed.
        let _ = stop(&self.qmp_path);
    }
}

impl std::ops::Deref for Borrowed {
    type Target = Guest;
    fn deref(&self) -> &Guest {
        &self.0.as_ref().unwrap().guest
    }
}

impl std::ops::DerefMut for Borrowed {
    fn deref_mut(&mut self) -> &mut Guest {
        &mut self.0.as_mut().unwrap().guest
    }
}

fn make(qemu: Qemu) -> Result<Shared> {
    extern "C" fn drop_all() {
        for kept in &KEPT {
            drop(kept.lock().unwrap_or_else(PoisonError::into_inner).take());
        }
    }
    static AT_EXIT: OnceLock<()> = OnceLock::new();
    // SAFETY: the function lives as long as the program, and does not unwind.
    AT_EXIT.get_or_init(|| assert_eq!(unsafe { libc::atexit(drop_all) }, 0));

    let folder = tempfile::Builder::new().prefix("snapback-e2e-shared-").tempdir()?;
    let image = folder.path().join("vm.snap");
    let mut guest = Guest::boot(&options(qemu))?;
    in_a_folder(|dir| {
        let args = ["save", "--qmp", text(&guest.qmp_path), text(&image)];
        dir.snapback(&args).succeed().map(drop)
    })?;
    check(&mut guest)?;
    let nonce = guest.oracle.nonce()?;
    let ahead = clocks(&mut guest)?.0 - now();
    stop(&guest.qmp_path)?;
    let shared = Shared { image, from: guest.dir.clone(), nonce, ahead };
    *KEPT[qemu as usize].lock().unwrap_or_else(PoisonError::into_inner) =
        Some(Kept { guest, _folder: folder });
    Ok(shared)
}

/// A copy of the shared image that a test may change.
pub fn copy(qemu: Qemu, to: &Path) -> Result<&'static Shared> {
    let shared = shared(qemu)?;
    std::fs::copy(&shared.image, to)?;
    Ok(shared)
}
