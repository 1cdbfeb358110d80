//! Failpoints: places where a test can stop a save or a revert, to kill it there.

use nix::sys::signal::{Signal, raise};

/// Marks that this process has just come this far. With debug assertions the process stops here
/// (SIGSTOP) if the environment variable SNAPBACK_TEST_STOP_AT names this failpoint, alone
/// or in a list separated by commas. Without, this does nothing.
pub(crate) fn failpoint(name: &str) {
    let is_wanted = |wanted: String| wanted.split(',').any(|wanted| wanted == name);
    if cfg!(debug_assertions) && std::env::var("SNAPBACK_TEST_STOP_AT").is_ok_and(is_wanted) {
        // raise(3) fails only for signals that don't exist.
        let _ = raise(Signal::SIGSTOP);
    }
}
