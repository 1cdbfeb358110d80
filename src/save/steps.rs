//! Where a test may kill a save.

use nix::sys::signal::{Signal, raise};

/// Marks that a save has just come this far. In builds with debug assertions this process
/// stops there (SIGSTOP) if SNAPBACK_TEST_STOP_AT names the step, or several with commas
/// between them, so that a test can kill it at that very point. In others this does nothing.
pub(super) fn step(name: &str) {
    let is_wanted = |wanted: String| wanted.split(',').any(|wanted| wanted == name);
    if cfg!(debug_assertions) && std::env::var("SNAPBACK_TEST_STOP_AT").is_ok_and(is_wanted) {
        // Fails for signals that don't exist only.
        let _ = raise(Signal::SIGSTOP);
    }
}
