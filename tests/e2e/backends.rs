//! Every kind of memory that a guest can have comes back, and by the way that is said.

use std::fs;
use std::sync::{Mutex, PoisonError};

use crate::harness::{Dir, check, text};
use crate::shared::{MIB, options};
use crate::support::{Guest, GuestOptions, Qemu, Result};
use crate::tests_on_both;

tests_on_both! {
    shared_memory_comes_back
    two_nodes_of_one_size_are_told_apart
    blocks_that_look_alike_are_told_apart
    huge_pages_come_back_whole
}

fn shared_memory_comes_back(dir: &Dir, qemu: Qemu) -> Result<()> {
    let backend = Some("memory-backend-memfd,share=on".to_owned());
    comes_back(dir, &GuestOptions { memory_backend: backend, ..options(qemu) })
}

fn two_nodes_of_one_size_are_told_apart(dir: &Dir, qemu: Qemu) -> Result<()> {
    let half = MIB / 2;
    let mut args = Vec::new();
    for id in ["left", "right"] {
        let backend = format!("memory-backend-ram,id={id},size={half}M");
        args.extend(["-object".into(), backend, "-numa".into(), format!("node,memdev={id}")]);
    }
    comes_back(dir, &GuestOptions { args, ..options(qemu) })
}

fn blocks_that_look_alike_are_told_apart(dir: &Dir, qemu: Qemu) -> Result<()> {
    // Two network cards with the same ROM, and two displays whose memory nobody uses.
    let rom = dir.path("card.rom");
    let bytes = (0..64u32 << 10).map(|n| (n.wrapping_mul(n) >> 7) as u8 | 1);
    fs::write(&rom, bytes.collect::<Vec<u8>>())?;
    let card = format!("e1000,romfile={}", text(&rom));
    let display = "secondary-vga,romfile=,vgamem_mb=2";
    let devices = [&card, &card, display, display];
    let args = devices.into_iter().flat_map(|device| ["-device".into(), device.into()]).collect();
    comes_back(dir, &GuestOptions { args, ..options(qemu) })
}

fn huge_pages_come_back_whole(dir: &Dir, qemu: Qemu) -> Result<()> {
    // The pool is the host's, and holds both guests of one of these tests, and two that
    // are about to end.
    static POOL: Mutex<()> = Mutex::new(());
    let _one_at_a_time = POOL.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(_pool) = Pool::of(2 * MIB + 16)? else {
        eprintln!("this host gives no huge pages: not tested");
        return Ok(());
    };
    let backend = Some("memory-backend-memfd,share=on,hugetlb=on,hugetlbsize=2M".to_owned());
    comes_back(dir, &GuestOptions { memory_backend: backend, ..options(qemu) })
}

/// Saves a guest in full swing, reverts it beside the living, and checks both.
fn comes_back(dir: &Dir, options: &GuestOptions) -> Result<()> {
    let mut guest = Guest::boot(&GuestOptions { rate: 0, ..options.clone() })?;
    let nonce = guest.oracle.nonce()?;
    dir.save(&guest, "vm.snap").succeed()?;
    guest.oracle.set_writers(1, 1000)?;
    for way in ["uffd", "socket"] {
        let folder = dir.make(way)?;
        let command = dir.revert(&dir.path("vm.snap"), &guest.dir, &folder);
        let mut reverted = crate::harness::Reverted::of(command.with(&["--place", way]), &folder)?;
        reverted.check(&nonce)?;
        let ended = reverted.resident()?;
        assert_eq!(ended.event("placing")?["way"], way);
        reverted.check(&nonce)?;
    }
    check(&mut guest)
}

/// The host's pool of 2 MiB pages, made larger for a test.
struct Pool {
    before: String,
}

impl Pool {
    const SIZE: &str = "/proc/sys/vm/nr_hugepages";

    /// Room for two guests of so many MiB; nothing where the host can't give it.
    fn of(mib: u64) -> Result<Option<Pool>> {
        let before = fs::read_to_string(Self::SIZE)?.trim().to_owned();
        let wanted = before.parse::<u64>()? + mib;
        if fs::write(Self::SIZE, wanted.to_string()).is_err() {
            return Ok(None);
        }
        let pool = Pool { before };
        let got: u64 = fs::read_to_string(Self::SIZE)?.trim().parse()?;
        Ok((got >= wanted).then_some(pool))
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let _ = fs::write(Self::SIZE, &self.before);
    }
}
