//! A guest of another architecture: QEMU's board `virt` with two 64-bit ARM processors, on
//! which Debian's arm64 kernel runs (`tests/arm64`).

use std::fs;
use std::process::Command;
use std::time::Instant;

use crate::clocks::{clocks, now};
use crate::harness::{Dir, Reverted, check, text};
use crate::support::{Guest, GuestOptions, Qemu, Result, SOON, cont, pmemsave, stop, wait_until};
use crate::{tests, tests_on_both_at_length};

tests_on_both_at_length! {
    a_guest_is_saved_and_reverted_by_both_ways
}

tests! {
    a_guest_on_shared_memory_is_exported_and_imported
}

/// The least time between the moment and the reverts, in seconds: enough to be told from
/// what the clocks may be off.
const MEANWHILE: f64 = 6.0;

/// How far the machine's clock may be off, in seconds: it shows full ones.
const OFF: f64 = 2.5;

/// Where main memory begins.
const RAM: u64 = 1 << 30;

fn a_guest_is_saved_and_reverted_by_both_ways(dir: &Dir, qemu: Qemu) -> Result<()> {
    let mut guest = Guest::boot(&GuestOptions::arm64(qemu))?;
    let (nonce, sum) = (guest.oracle.nonce()?, guest.oracle.sum()?);
    assert_eq!(sum.split(' ').count(), 17, "{sum}");
    let before = guest.oracle.uptime_ms()?;
    let saved = dir.save(&guest, "vm.snap").succeed()?;
    let after = guest.oracle.uptime_ms()?;
    let moment = saved.event("moment")?["unix_us"].as_f64().ok_or("no moment")? / 1e6;
    check(&mut guest)?;
    wait_until(SOON, "some time to pass", || now() > moment + MEANWHILE)?;

    // A revert that maps memory is there from 8.1 on.
    let image = dir.path("vm.snap");
    let flat = dir.path("flat.snap");
    dir.snapback(&["flatten", text(&image), text(&flat), "--layout", "flat"]).succeed()?;
    let ways = [("uffd", &image, "now"), ("socket", &image, "keep"), ("map", &flat, "keep")];
    for (way, image, rtc) in ways.into_iter().take(if qemu == Qemu::V7 { 2 } else { 3 }) {
        let to = dir.make(way)?;
        let (start, since) = (now(), Instant::now());
        let revert = dir.revert(image, &guest.dir, &to).with(&["--place", way, "--rtc", rtc]);
        let mut reverted = Reverted::of(revert, &to)?;
        // Its time goes on from the moment, and not from when it was reverted.
        let uptime = reverted.oracle.uptime_ms()?;
        let latest = after + since.elapsed().as_millis() as u64;
        assert!((before..=latest).contains(&uptime), "{before} {uptime} {latest}");
        let (_, machine) = clocks(&mut reverted)?;
        match rtc {
            "now" => assert!(start - OFF < machine && machine < now() + OFF, "{machine} {start}"),
            _ => {
                let latest = moment + since.elapsed().as_secs_f64() + OFF;
                assert!(moment - OFF < machine && machine < latest, "{machine} {moment}");
            }
        }
        // Both while memory comes and when all is there.
        reverted.check(&nonce)?;
        assert_eq!(reverted.resident()?.event("placing")?["way"], way);
        reverted.check(&nonce)?;
        assert_eq!(reverted.oracle.sum()?, sum);
    }
    Ok(())
}

/// A paused guest, whose memory can be compared byte by byte. It is given by a backend, under
/// the name that the board has for it.
fn a_guest_on_shared_memory_is_exported_and_imported(dir: &Dir) -> Result<()> {
    let memory_backend = Some("memory-backend-memfd,share=on".to_string());
    let options = GuestOptions { memory_backend, ..GuestOptions::arm64(Qemu::V7) };
    let mut guest = Guest::boot(&options)?;
    let nonce = guest.oracle.nonce()?;
    stop(&guest.qmp_path)?;
    dir.save(&guest, "vm.snap").succeed()?;
    let (image, core, flat, real) =
        (dir.path("vm.snap"), dir.path("core"), dir.path("flat"), dir.path("real"));
    pmemsave(&guest.qmp_path, RAM, options.mib << 20, &real)?;
    let real = fs::read(&real)?;

    dir.snapback(&["export", text(&image), "--to", "flat", text(&flat)]).succeed()?;
    assert!(fs::read(flat.join("mach-virt.ram.ram"))? == real, "plain memory is another");
    let ended = dir.snapback(&["export", text(&image), "--to", "elf", text(&core)]).succeed()?;
    assert!(ended.event("note")?["what"].to_string().contains("virt.flash0"), "{:?}", ended.said);
    let readelf = Command::new("readelf").args(["-hlnW", text(&core)]).output()?;
    let said = String::from_utf8_lossy(&readelf.stdout).into_owned();
    assert!(readelf.status.success() && readelf.stderr.is_empty(), "{readelf:?}");
    for part in ["AArch64", "NT_PRSTATUS", "VMCOREINFO"] {
        assert!(said.contains(part), "no {part} in {said}");
    }
    let words = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let loads: Vec<_> = said
        .lines()
        .map(words)
        .filter(|words| words.first().is_some_and(|word| word == "LOAD"))
        .collect();
    assert_eq!(loads.len(), 1, "{said}");
    assert_eq!(loads[0][3..5], ["0x0000000040000000", "0x10000000"], "{said}");
    let offset = usize::from_str_radix(loads[0][1].trim_start_matches("0x"), 16)?;
    assert!(fs::read(&core)?[offset..] == real, "the core's memory is another");

    // Back by way of QEMU's own format.
    let (stream, imported) = (dir.path("stream"), dir.path("imported.snap"));
    dir.snapback(&["export", text(&image), "--to", "stream", text(&stream)]).succeed()?;
    let command = format!("/proc/{}/cmdline", guest.pid);
    let import = dir.snapback(&["import", text(&stream), text(&imported)]);
    import.with(&["--command", &command]).succeed()?;
    let mut reverted = dir.reverted(&imported, &guest.dir, "reverted")?;
    reverted.resident()?;
    let again = dir.path("again");
    pmemsave(&reverted.qmp_path, RAM, options.mib << 20, &again)?;
    assert!(fs::read(&again)? == real, "memory is another after a revert");
    cont(&reverted.qmp_path)?;
    reverted.check(&nonce)?;
    cont(&guest.qmp_path)?;
    check(&mut guest)
}
