//! A guest goes back to its image inside its own QEMU, again and again.

use crate::harness::{Dir, Reverted, Running, Snapback, text};
use crate::shared::shared;
use crate::support::{Qemu, Result, SOON, SerialLog};
use crate::tests_on_both;

tests_on_both! {
    a_guest_is_reset_again_and_again
}

/// A revert of the shared guest whose `reset` is to be had.
pub fn resettable(command: Snapback, folder: &std::path::Path) -> Result<Reverted> {
    let mut guest = Reverted::of(command.with(&["--resettable"]), folder)?;
    server(&mut guest)?.wait("resettable")?;
    Ok(guest)
}

fn server(guest: &mut Reverted) -> Result<&mut Running> {
    Ok(guest.server.as_mut().ok_or("its server has been waited for")?)
}

/// Has a guest reset in place. Returns how long the server says that it took, and the pages.
pub fn reset(dir: &Dir, guest: &mut Reverted) -> Result<(f64, u64)> {
    let socket = guest.dir.join("qmp.sock");
    let ended = dir.snapback(&["reset", "--in-place", "--qmp", text(&socket)]).succeed()?;
    let event = ended.event("reset")?;
    assert_eq!(event["how"], "in_place", "{ended:?}");
    let took = event["took_ms"].as_f64().ok_or("no time")?;
    Ok((took, event["pages"].as_u64().ok_or("no pages")?))
}

fn a_guest_is_reset_again_and_again(dir: &Dir, qemu: Qemu) -> Result<()> {
    let shared = shared(qemu)?;
    let to = dir.make("reverted")?;
    let mut guest = resettable(dir.revert(&shared.image, &shared.from, &to), &to)?;
    let first = guest.log.wait_beat(0, SOON)?;
    for round in 0..10 {
        let last = guest.log.wait_beat(first.number + 30 + round, SOON)?;
        let (took, pages) = reset(dir, &mut guest)?;
        println!("reset {round}: {pages} pages in {took:.1} ms");
        guest.log = SerialLog::from_now(&to.join("serial0.log"));
        let beat = guest.log.wait_beat(0, SOON)?;
        assert!(beat.number < last.number, "{beat:?}, after {last:?}");
        guest.check(&shared.nonce)?;
    }
    Ok(())
}
