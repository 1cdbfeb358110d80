//! What of the host a reverted guest takes beside its living original: ports, networks, logs.

use std::fs;
use std::net::{TcpListener, TcpStream};

use crate::bare::Bare;
use crate::harness::{Dir, Ended, Reverted, check, text, wait_gone};
use crate::shared::options;
use crate::support::{Guest, GuestOptions, Pidfd, Qemu, Result};
use crate::{tests_on_both, tests_on_both_at_length};

tests_on_both! {
    a_guest_with_ports_comes_back_beside_the_living
    a_tap_in_use_is_refused_and_replaced
}

tests_on_both_at_length! {
    a_user_network_becomes_a_tap
    a_log_goes_on
}

pub fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// A guest with a port that is forwarded to it, and a serial port that listens on another.
pub fn with_ports(qemu: Qemu, forward: u16, serial: u16) -> Result<Guest> {
    let args = [
        "-netdev",
        &format!("user,id=net0,hostfwd=tcp:127.0.0.1:{forward}-:22"),
        "-device",
        "e1000,netdev=net0,romfile=",
        "-serial",
        &format!("tcp:127.0.0.1:{serial},server=on,wait=off"),
    ];
    let args = args.map(String::from).into();
    Guest::boot(&GuestOptions { args, ..options(qemu) })
}

fn a_guest_with_ports_comes_back_beside_the_living(dir: &Dir, qemu: Qemu) -> Result<()> {
    let (forward, serial) = (free_port()?, free_port()?);
    let mut guest = with_ports(qemu, forward, serial)?;
    let nonce = guest.oracle.nonce()?;
    dir.save(&guest, "vm.snap").succeed()?;

    let folder = dir.make("reverted")?;
    let revert = || dir.revert(&dir.path("vm.snap"), &guest.dir, &folder);
    let refusal = revert().fail()?;
    let named = [format!("--port {forward}=NEW"), format!("process {}", guest.pid)];
    named.iter().for_each(|name| assert!(refusal.contains(name), "{refusal}"));
    let refusal = revert().with(&["--port", &format!("{forward}=auto")]).fail()?;
    assert!(refusal.contains(&format!("--port {serial}=NEW")), "{refusal}");
    let refusal = revert().with(&["--port", "1=auto"]).fail()?;
    assert!(refusal.contains(&forward.to_string()), "{refusal}");

    let elsewhere = free_port()?;
    let rules = [format!("{forward}=auto"), format!("{serial}={elsewhere}")];
    let command = revert().with(&["--port", &rules[0], "--port", &rules[1]]);
    let mut server = command.start()?;
    let running = server.wait("running")?;
    let chosen = running["ports"][forward.to_string()].as_u64().ok_or("the port is not told")?;
    assert_eq!(running["ports"][serial.to_string()], elsewhere);
    let pid = running["pid"].as_u64().ok_or("no process")? as u32;
    let mut reverted = Reverted::take(server, pid, &folder)?;
    for port in [forward, serial, chosen as u16, elsewhere] {
        TcpStream::connect(("127.0.0.1", port)).map_err(|e| format!("port {port}: {e}"))?;
    }
    reverted.resident()?;
    reverted.check(&nonce)?;
    check(&mut guest)
}

fn a_tap_in_use_is_refused_and_replaced(dir: &Dir, qemu: Qemu) -> Result<()> {
    let tap = format!("sb{}v{}", std::process::id() % 1_000_000, qemu as usize);
    let network = format!("tap,id=net0,ifname={tap},script=no,downscript=no");
    let args = ["-netdev", &network, "-device", "e1000,netdev=net0,romfile="];
    let bare = Bare::start(dir, qemu, &args)?;
    let image = dir.path("vm.snap");
    dir.snapback(&["save", "--qmp", text(&bare.socket), text(&image)]).succeed()?;

    let refusal = dir.snapback(&["revert", text(&image)]).fail()?;
    let named = [tap, "--netdev net0=SPEC".into(), format!("process {}", bare.pid())];
    named.iter().for_each(|name| assert!(refusal.contains(name), "{refusal}"));
    let ended = revert_and_end(dir, &[text(&image), "--netdev", "net0=user"])?;
    let note = &ended.event("note")?["what"];
    assert!(note.as_str().is_some_and(|note| note.ends_with("by -netdev user,id=net0")), "{note}");
    drop(bare);
    revert_and_end(dir, &[text(&image)]).map(drop)
}

fn a_user_network_becomes_a_tap(dir: &Dir, qemu: Qemu) -> Result<()> {
    let args = ["-netdev", "user,id=net0", "-device", "virtio-net-pci,netdev=net0,romfile="];
    let bare = Bare::start(dir, qemu, &args)?;
    let image = dir.path("vm.snap");
    dir.snapback(&["save", "--qmp", text(&bare.socket), text(&image)]).succeed()?;
    let tap = format!("su{}v{}", std::process::id() % 1_000_000, qemu as usize);
    let network = format!("net0=tap,ifname={tap},script=no,downscript=no");
    revert_and_end(dir, &[text(&image), "--netdev", &network]).map(drop)
}

fn a_log_goes_on(dir: &Dir, qemu: Qemu) -> Result<()> {
    let log = dir.path("serial,log");
    let bare = Bare::start(dir, qemu, &["-serial", &format!("file:{}", text(&log))])?;
    let image = dir.path("vm.snap");
    dir.snapback(&["save", "--qmp", text(&bare.socket), text(&image)]).succeed()?;
    drop(bare);
    fs::write(&log, "before\n")?;
    let ended = revert_and_end(dir, &[text(&image)])?;
    assert!(ended.said.iter().any(|line| line.contains("--truncate-logs")), "{ended:?}");
    assert!(fs::read_to_string(&log)?.starts_with("before\n"));
    revert_and_end(dir, &[text(&image), "--truncate-logs"])?;
    assert!(!fs::read_to_string(&log)?.contains("before"));
    Ok(())
}

/// Reverts an image to its end, and ends the guest.
fn revert_and_end(dir: &Dir, args: &[&str]) -> Result<Ended> {
    let ended = dir.snapback(&[&["revert"], args].concat()).succeed()?;
    let pid = ended.event("running")?["pid"].as_u64().ok_or("no process")? as u32;
    Pidfd::open(pid)?.kill()?;
    wait_gone(pid)?;
    Ok(ended)
}
