//! A guest of another architecture: QEMU's board `virt` with 64-bit ARM processors, on which
//! Debian's arm64 kernel runs (`tests/arm64`).

use crate::harness::{Dir, Reverted, text};
use crate::support::{Guest, GuestOptions, Qemu, Result};
use crate::tests_on_both;

tests_on_both! {
    a_guest_is_saved_and_reverted_by_both_ways
}

fn a_guest_is_saved_and_reverted_by_both_ways(dir: &Dir, qemu: Qemu) -> Result<()> {
    let mut guest = Guest::boot(&GuestOptions::arm64(qemu))?;
    let nonce = guest.oracle.nonce()?;
    dir.save(&guest, "vm.snap").succeed()?;
    crate::harness::check(&mut guest)?;
    for way in ["uffd", "socket"] {
        let to = dir.make(way)?;
        let revert = dir.revert(&dir.path("vm.snap"), &guest.dir, &to).with(&["--place", way]);
        let mut reverted = Reverted::of(revert, &to)?;
        reverted.check(&nonce)?;
        reverted.resident()?;
        reverted.check(&nonce)?;
    }
    let _ = text;
    Ok(())
}
