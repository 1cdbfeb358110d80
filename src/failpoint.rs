//! Failpoints: places where a test can stop a save or a revert, to kill it there, or have it do
//! something else than it should, to see that this is noticed.

use std::fs::File;

use nix::sys::signal::{Signal, raise};

/// Marks that this process has just come this far. With debug assertions the process stops here
/// (SIGSTOP) if the environment variable SNAPBACK_TEST_STOP_AT names this failpoint, alone
/// or in a list separated by commas. Without, this does nothing.
pub(crate) fn failpoint(name: &str) {
    if is_listed("SNAPBACK_TEST_STOP_AT", name) {
        // raise(3) fails only for signals that don't exist.
        let _ = raise(Signal::SIGSTOP);
    }
}

/// Whether this is to go another way than it should. Without debug assertions it never is; with
/// them, if the environment variable SNAPBACK_TEST_FAULTS names it in the same manner.
pub(crate) fn fault(name: &str) -> bool {
    is_listed("SNAPBACK_TEST_FAULTS", name)
}

fn is_listed(variable: &str, name: &str) -> bool {
    let is_wanted = |wanted: String| wanted.split(',').any(|wanted| wanted == name);
    cfg!(debug_assertions) && std::env::var(variable).is_ok_and(is_wanted)
}

/// A file to which a save copies QEMU's stream as it comes: with debug assertions, the one that the
/// environment variable SNAPBACK_TEST_STREAM names. What was read from outside is compared with it.
pub(crate) fn copy_of_the_stream() -> Option<File> {
    let name = cfg!(debug_assertions).then(|| std::env::var("SNAPBACK_TEST_STREAM").ok())??;
    File::create(name).ok()
}
