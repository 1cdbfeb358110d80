//! Figures, for docs/performance.md: run by name, with `--ignored --nocapture`.

use crate::harness::{Dir, check};
use crate::saving::save;
use crate::support::libvirt::{domain_options, shared_libvirt};
use crate::support::{Fill, Result};

/// How long a domain with two disks stands still, in parts: each save behind the other.
#[test]
#[ignore = "prints figures"]
fn the_pause_of_a_domain() -> Result<()> {
    let mib = std::env::var("SNAPBACK_TEST_PAUSE_MIB").map_or(Ok(2048), |mib| mib.parse())?;
    crate::harness::in_a_folder(|dir: &Dir| {
        let (libvirt, name) = (shared_libvirt()?, "measured");
        let mut options = domain_options(name).with_two_disks();
        options.guest.mib = mib;
        options.guest.fill = Fill::Mib(mib / 2);
        let mut guest = libvirt.boot(&options)?;
        for number in 0..5 {
            let ended = save(dir, libvirt, name, &format!("{number}.snap")).succeed()?;
            let moment = ended.event("moment")?;
            eprintln!("{mib} MiB: {} ms: {}", moment["pause_ms"], moment["pause_parts"]);
        }
        check(&mut guest)
    })
}
