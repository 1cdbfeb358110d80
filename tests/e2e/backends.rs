//! Every kind of memory that a guest can have comes back, and by the way that is said.

use std::fs;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::bare::Bare;
use crate::harness::{Dir, check, text};
use crate::shared::{MIB, options};
use crate::support::{Guest, GuestOptions, Qemu, Result, query_status};
use crate::{tests_on_both, tests_on_both_at_length};

tests_on_both! {
    shared_memory_comes_back
    memory_in_a_file_on_a_disk_is_refused_before_a_pause
}

tests_on_both_at_length! {
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
    // For both guests, and two that are about to end.
    let _pool = Pool::of(2 * MIB + 16)?;
    let backend = Some("memory-backend-memfd,share=on,hugetlb=on,hugetlbsize=2M".to_owned());
    comes_back(dir, &GuestOptions { memory_backend: backend, ..options(qemu) })
}

fn memory_in_a_file_on_a_disk_is_refused_before_a_pause(dir: &Dir, qemu: Qemu) -> Result<()> {
    let memory = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let memory = tempfile::NamedTempFile::new_in(memory)?;
    let backend =
        format!("memory-backend-file,id=m,size=64M,share=on,mem-path={}", text(memory.path()));
    let args = ["-object", &backend, "-machine", "memory-backend=m"];
    let bare = Bare::start(dir, qemu, &args)?;
    let image = dir.path("vm.snap");
    let save = dir.snapback(&["save", "--qmp", text(&bare.socket), text(&image)]);
    let refusal = save.fail()?;
    assert!(refusal.contains("`m`") && refusal.contains(text(memory.path())), "{refusal}");
    assert_eq!(query_status(&bare.socket)?, "running");
    assert!(bare.query("query-migrate")?.get("status").is_none());
    assert!(!image.exists());
    Ok(())
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
pub struct Pool {
    before: String,
    /// The pool is the host's: one test at a time has it.
    _alone: MutexGuard<'static, ()>,
}

impl Pool {
    const SIZE: &str = "/proc/sys/vm/nr_hugepages";

    /// Room for two guests of so many MiB.
    pub fn of(mib: u64) -> Result<Pool> {
        static ALONE: Mutex<()> = Mutex::new(());
        let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let before = fs::read_to_string(Self::SIZE)?.trim().to_owned();
        let pool = Pool { before, _alone };
        let wanted = pool.before.parse::<u64>()? + mib;
        let mut got = 0;
        // Pages of 2 MiB may have to be put together first, and files' pages be given up for them.
        for make_room in ["/proc/sys/vm/compact_memory", "/proc/sys/vm/drop_caches"] {
            let _ = fs::write(make_room, "1");
            fs::write(Self::SIZE, wanted.to_string())
                .map_err(|e| format!("{}: {e}; this test needs root", Self::SIZE))?;
            got = fs::read_to_string(Self::SIZE)?.trim().parse()?;
            if got >= wanted {
                return Ok(pool);
            }
        }
        Err(format!("the host gives {got} huge pages where {wanted} are needed").into())
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let _ = fs::write(Self::SIZE, &self.before);
    }
}
