//! Which machines go back inside their QEMU: every class of device that set-up can have, and every
//! kind of memory.

use std::fs::File;

use crate::backends::Pool;
use crate::filling::set_balloon;
use crate::harness::{Dir, Reverted, in_a_folder, text};
use crate::hotplug::{MODULES, words};
use crate::resets::{differing, flattened, reset, resettable};
use crate::shared::{MIB, options};
use crate::support::{Guest, GuestOptions, Qemu, Result, SOON, cont, pmemsave, query_status, stop};
use crate::tests_on_both_at_length;

tests_on_both_at_length! {
    a_pc_with_virtio_and_four_vcpus_goes_back
    a_q35_with_usb_sound_and_an_iommu_goes_back
    displays_and_emulated_cards_go_back
    shared_memory_goes_back
    huge_pages_go_back
    what_a_balloon_has_given_back_comes_back
}

/// The same machines where QEMU maps their memory.
#[test]
#[ignore = "the same as with memory that is tracked: `make torture`"]
fn machines_with_mapped_memory_go_back() -> Result<()> {
    for machine in [pc_with_virtio, q35_with_usb, pc_with_displays] {
        in_a_folder(|dir| {
            let mut guest = Guest::boot(&machine(dir, Qemu::V10)?)?;
            let nonce = guest.oracle.nonce()?;
            dir.save(&guest, "vm.snap").succeed()?;
            let from = guest.dir.clone();
            drop(guest.kill());
            let (flat, to) = (flattened(dir, &dir.path("vm.snap"))?, dir.make("reverted")?);
            let revert = dir.revert(&flat, &from, &to).with(&["--place", "map"]);
            goes_back_thrice(dir, resettable(revert, &to)?, &nonce)
        })?;
    }
    Ok(())
}

/// Saves a guest at work, reverts it, and has it go back three times.
fn goes_back(dir: &Dir, options: &GuestOptions) -> Result<()> {
    let mut guest = Guest::boot(options)?;
    let nonce = guest.oracle.nonce()?;
    goes_back_thrice(dir, reverted(dir, guest)?, &nonce)
}

fn goes_back_thrice(dir: &Dir, mut guest: Reverted, nonce: &str) -> Result<()> {
    for _ in 0..3 {
        let beat = guest.log.last_beat().map_or(0, |beat| beat.number);
        guest.log.wait_beat(beat + 10, SOON)?;
        reset(dir, &mut guest)?;
        guest.check(nonce)?;
    }
    Ok(())
}

/// Saves a guest, ends it, and reverts it so that it can be reset.
fn reverted(dir: &Dir, guest: Guest) -> Result<Reverted> {
    dir.save(&guest, "vm.snap").succeed()?;
    let from = guest.dir.clone();
    drop(guest.kill());
    let to = dir.make("reverted")?;
    resettable(dir.revert(&dir.path("vm.snap"), &from, &to), &to)
}

fn a_pc_with_virtio_and_four_vcpus_goes_back(dir: &Dir, qemu: Qemu) -> Result<()> {
    goes_back(dir, &pc_with_virtio(dir, qemu)?)
}

fn pc_with_virtio(dir: &Dir, qemu: Qemu) -> Result<GuestOptions> {
    let file = dir.path("scsi.img");
    File::create(&file)?.set_len(8 << 20)?;
    let mut args = words(
        "-device virtio-scsi-pci,id=scsi0 -device virtio-serial-pci -netdev user,id=n0 \
         -device virtio-net-pci,netdev=n0 -device virtio-balloon-pci -device virtio-rng-pci",
    );
    args.extend(["-drive".into(), format!("if=none,id=d,format=raw,file={}", text(&file))]);
    args.extend(words("-device scsi-hd,drive=d,bus=scsi0.0"));
    Ok(GuestOptions { vcpus: 4, modules: MODULES, args, ..options(qemu) })
}

fn a_q35_with_usb_sound_and_an_iommu_goes_back(dir: &Dir, qemu: Qemu) -> Result<()> {
    goes_back(dir, &q35_with_usb(dir, qemu)?)
}

fn q35_with_usb(_: &Dir, qemu: Qemu) -> Result<GuestOptions> {
    let args = words(
        "-device intel-iommu -device nec-usb-xhci,id=xhci -device usb-tablet -device usb-kbd \
         -audiodev none,id=mute -device intel-hda -device hda-output,audiodev=mute -device virtio-vga -device ich9-ahci",
    );
    Ok(GuestOptions { machine: "q35".into(), args, ..options(qemu) })
}

fn displays_and_emulated_cards_go_back(dir: &Dir, qemu: Qemu) -> Result<()> {
    goes_back(dir, &pc_with_displays(dir, qemu)?)
}

fn pc_with_displays(_: &Dir, qemu: Qemu) -> Result<GuestOptions> {
    let args = words(
        "-vga std -netdev user,id=a -device e1000,netdev=a -netdev user,id=b \
         -device rtl8139,netdev=b -device piix3-usb-uhci -device usb-mouse -audiodev none,id=mute -device AC97,audiodev=mute \
         -device i6300esb -device pvpanic",
    );
    Ok(GuestOptions { args, ..options(qemu) })
}

fn shared_memory_goes_back(dir: &Dir, qemu: Qemu) -> Result<()> {
    let backend = Some("memory-backend-memfd,share=on".to_owned());
    goes_back(dir, &GuestOptions { memory_backend: backend, ..options(qemu) })
}

fn huge_pages_go_back(dir: &Dir, qemu: Qemu) -> Result<()> {
    let _pool = Pool::of(2 * MIB + 16)?;
    let backend = Some("memory-backend-memfd,share=on,hugetlb=on,hugetlbsize=2M".to_owned());
    goes_back(dir, &GuestOptions { memory_backend: backend, ..options(qemu) })
}

/// What was in memory that the guest has given back is there again, although nobody has written to
/// it.
fn what_a_balloon_has_given_back_comes_back(dir: &Dir, qemu: Qemu) -> Result<()> {
    const RAM: u64 = 256;
    let mut guest = Guest::boot(&GuestOptions { mib: RAM, virtio_balloon: true, ..options(qemu) })?;
    let nonce = guest.oracle.nonce()?;
    stop(&guest.qmp_path)?;
    let mut guest = reverted(dir, guest)?;
    for _ in 0..2 {
        cont(&guest.qmp_path)?;
        set_balloon(&guest.qmp_path, RAM - 64)?;
        reset(dir, &mut guest)?;
        assert_eq!(query_status(&guest.qmp_path)?, "paused");
        let memory = dir.path("memory");
        pmemsave(&guest.qmp_path, 0, RAM << 20, &memory)?;
        let wrong = differing(&dir.path("vm.snap"), &memory, RAM << 20)?;
        assert!(wrong.is_empty(), "{wrong:x?}");
    }
    cont(&guest.qmp_path)?;
    guest.check(&nonce)
}
