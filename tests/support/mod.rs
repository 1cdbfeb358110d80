//! Boots the oracle guest on a stock QEMU and talks to it: for tests, benchmarks
//! and the demo. Blocking, and every wait has a timeout.
//!
//! Nothing here uses the crate under test, so what it says is a second opinion.
//! `tests/guest/README.md` tells what the guest does; `make setup guest` builds it.

// Each test program uses a part of this.
#![allow(dead_code, unused_imports)]

pub mod debian;
mod disk;
mod guest;
mod http;
pub mod libvirt;
mod log;
mod oracle;
mod process;
pub mod proxy;
mod qemu;
mod qmp;
pub mod s3;

use std::process::ExitCode;
use std::time::{Duration, Instant};

pub use disk::{Bus, Disk, Format, Given, convert, files, run};
pub use guest::{Attached, Contact, Fill, Guest, GuestOptions, KERNEL};
pub use http::http_request;
pub use log::{Beat, SerialLog};
pub use oracle::{Oracle, Verdict};
pub use process::{Pidfd, huge_bytes, process_gone, resident_kib, spawn_bound};
pub use qemu::{Arch, Qemu, artifact, deps};
pub use qmp::{Qmp, cont, pmemsave, qmp, query_status, stop};

/// What went wrong, in words for whoever reads a failed test.
pub type Error = Box<dyn std::error::Error + Send + Sync>;

/// The result of everything here that can fail.
pub type Result<T> = std::result::Result<T, Error>;

/// Long enough for anything that should happen at once, on a loaded machine.
pub const SOON: Duration = Duration::from_secs(60);

/// Asks a condition again and again until it holds.
///
/// # Errors
/// When `timeout` has passed; `what` names the condition in the message.
pub fn wait_until(timeout: Duration, what: &str, mut holds: impl FnMut() -> bool) -> Result<()> {
    wait_for(timeout, what, || Ok(holds().then_some(())))
}

/// Like [`wait_until`], for something to come about that has a value or an error.
///
/// # Errors
/// When `timeout` has passed, or the first error of `look`.
pub fn wait_for<T>(
    timeout: Duration,
    what: &str,
    mut look: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let start = Instant::now();
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        if start.elapsed() > timeout {
            return Err(format!("waited {timeout:?} in vain for {what}").into());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The time that so many percent of these don't exceed. Sorts them.
pub fn percentile(times: &mut [f64], percent: usize) -> f64 {
    times.sort_by(f64::total_cmp);
    times[(times.len() * percent).div_ceil(100).clamp(1, times.len()) - 1]
}

/// How the program `name` ends, behind a message where it has failed.
pub fn exit_code(name: &str, result: Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{name}: {error}");
            ExitCode::FAILURE
        }
    }
}
