//! Tries again and again to bring memory that could not be read.

use std::time::Duration;

use super::prefetch::{Filler, fill_passed_over};
use super::{Memory, MemoryError, Pace};

/// How often it is tried: seldom enough for a disk that fails, which may take its time for that.
const EVERY: Duration = Duration::from_secs(1);

/// Once a second looks again at where the memory's bytes lie, and brings what the guest waits for
/// if it can be read by now; then also the rest, if nobody else is filling memory any more.
/// Returns when all memory is in place, or `pace` ends it.
///
/// # Errors
/// When memory can be read and not be installed.
pub fn repair(memory: &Memory, pace: &Pace) -> Result<(), MemoryError> {
    while !memory.wait_complete(EVERY) && !pace.is_stopped() {
        memory.source.look_again();
        // Pages are claimed only once their bytes are there: a fault relies on a claim.
        let mut filler = Filler::new(memory, pace, false)?;
        for page in memory.awaited() {
            memory.pass_over(filler.fill(page))?;
        }
        memory.tell_if_over();
        if memory.is_filled() {
            fill_passed_over(memory, pace, false)?;
        }
    }
    memory.tell_if_over();
    Ok(())
}
