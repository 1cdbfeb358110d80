//! Devices that were plugged in and out while the guest ran: they come back with it, or are
//! refused by name before anything is touched.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::bare::Bare;
use crate::harness::{Dir, in_a_folder, print_times, text};
use crate::shared::options;
use crate::support::{
    Contact, Error, Guest, GuestOptions, Pidfd, Qemu, Qmp, Result, SOON, qmp, run, wait_for,
    wait_until,
};
use crate::{tests_on_both, tests_on_both_at_length};

tests_on_both! {
    what_can_not_be_brought_back_is_refused_by_name
}

tests_on_both_at_length! {
    devices_come_back_as_they_were_plugged
    devices_on_root_ports_come_back_and_virtio_mem_is_refused
    a_guest_that_would_not_run_again_is_not_proved
}

/// What the guest's devices need, each behind those that it needs.
pub const MODULES: &str = "virtio,virtio_ring,virtio_pci_legacy_dev,virtio_pci_modern_dev,virtio_pci,\
                       virtio_blk,scsi_common,scsi_mod,sd_mod,virtio_scsi,failover,net_failover,\
                       virtio_net,virtio_console,virtio-rng";

/// Room for vCPUs and memory, controllers, and a network card.
const COLD: &str = "-smp maxcpus=4 -m 256,slots=4,maxmem=2G -device virtio-scsi-pci,id=scsi0 \
                    -device virtio-serial-pci,id=vser -device nec-usb-xhci,id=xhci \
                    -netdev user,id=n0 -device virtio-net-pci,netdev=n0,id=nic0 \
                    -device virtio-balloon-pci";

pub fn words(args: &str) -> Vec<String> {
    args.split_whitespace().map(str::to_owned).collect()
}

/// Where the guest finds its disks: one from the start, by a `-drive` that has no device, and
/// two plugged ones.
const DISKS: [&str; 3] = ["vda", "vdb", "sda"];

fn boot(dir: &Dir, qemu: Qemu) -> Result<Guest> {
    let file = dir.path("cold.img");
    File::create(&file)?.set_len(8 << 20)?;
    let mut args = words(COLD);
    args.extend(["-drive".into(), format!("if=virtio,format=raw,file={}", text(&file))]);
    Guest::boot(&GuestOptions { modules: MODULES, args, ..options(qemu) })
}

fn device_add(socket: &Path, arguments: Value) -> Result<()> {
    qmp(socket, "device_add", arguments).map(drop)
}

/// Opens a new file of 8 MiB as a node of this name.
fn add_node(dir: &Dir, socket: &Path, name: &str, format: &str) -> Result<()> {
    let file = dir.path(&format!("{name}.img"));
    run(Command::new("qemu-img").args(["create", "-q", "-f", format, text(&file), "8M"]))?;
    let node = json!({
        "driver": format, "node-name": name, "file": { "driver": "file", "filename": file },
    });
    qmp(socket, "blockdev-add", node).map(drop)
}

fn add_object(socket: &Path, object: Value) -> Result<()> {
    qmp(socket, "object-add", object).map(drop)
}

/// Plugs a vCPU into the first free place.
fn add_cpu(socket: &Path, id: &str) -> Result<()> {
    let places = qmp(socket, "query-hotpluggable-cpus", json!({}))?;
    let free = |place: &&Value| place.get("qom-path").is_none();
    let free = places.as_array().and_then(|list| list.iter().rev().find(free));
    let place = free.ok_or("there is no free place")?;
    let mut arguments = place["props"].clone();
    arguments["driver"] = place["type"].clone();
    arguments["id"] = json!(id);
    device_add(socket, arguments)
}

/// Unplugs a device and waits until the guest has let go of it.
fn unplug(socket: &Path, id: &str) -> Result<()> {
    let mut connection = Qmp::connect(socket)?;
    connection.execute("device_del", json!({ "id": id }))?;
    wait_for(SOON, "a device to go", || {
        let left = connection.execute("qom-list", json!({ "path": "/machine/peripheral" }))?;
        let is_there = left.as_array().is_some_and(|list| list.iter().any(|d| d["name"] == id));
        Ok((!is_there).then_some(()))
    })
}

/// One part of the guest's answer to `devices`.
fn part(answer: &str, name: &str) -> Result<Vec<String>> {
    let found = answer.split(' ').find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
    Ok(found.ok_or("no such part")?.split(',').map(str::to_owned).collect())
}

/// Waits until the guest has found what was plugged in; gives its answer.
fn wait_devices(guest: &mut Contact, disks: usize, cards: usize) -> Result<String> {
    wait_for(SOON, "the guest to find its devices", || {
        let answer = guest.oracle.ask("devices")?;
        let ports = part(&answer, "ports")?;
        let found = part(&answer, "disks")?.len() >= disks
            && part(&answer, "net")?.len() == cards + 1
            && ports.iter().any(|port| !port.is_empty());
        Ok(found.then_some(answer))
    })
}

/// A tap of the test's own, if this host lets us make one. Tests of both QEMUs run at once.
fn tap(qemu: Qemu) -> Option<String> {
    let opened = File::options().read(true).write(true).open("/dev/net/tun");
    opened.ok().map(|_| format!("snap{}q{}", std::process::id(), qemu.version().0))
}

/// Waits until the tap is gone with its QEMU, all of whose threads have to end first.
fn wait_free_tap(qemu: Qemu) -> Result<()> {
    let Some(name) = tap(qemu) else { return Ok(()) };
    wait_until(SOON, "the tap to go", || !Path::new("/sys/class/net").join(&name).exists())
}

/// Plugs in one of each kind.
fn plug_all(dir: &Dir, guest: &Contact, qemu: Qemu) -> Result<()> {
    let socket = guest.qmp_path.as_path();
    qmp(socket, "netdev_add", json!({ "type": "user", "id": "n1" }))?;
    device_add(
        socket,
        json!({ "driver": "virtio-net-pci", "id": "vn", "netdev": "n1", "mac": "52:54:00:00:00:99" }),
    )?;
    qmp(socket, "netdev_add", json!({ "type": "user", "id": "n2", "restrict": true }))?;
    device_add(socket, json!({ "driver": "e1000", "netdev": "n2", "id": "en", "romfile": "" }))?;
    if let Some(name) = tap(qemu) {
        let arguments = json!({
            "type": "tap", "id": "t0", "ifname": name, "script": "no", "downscript": "no",
        });
        qmp(socket, "netdev_add", arguments)?;
        device_add(socket, json!({ "driver": "virtio-net-pci", "id": "tn", "netdev": "t0" }))?;
    }
    add_node(dir, socket, "blk", "raw")?;
    device_add(
        socket,
        json!({ "driver": "virtio-blk-pci", "id": "vb", "drive": "blk", "serial": "hot" }),
    )?;
    add_node(dir, socket, "scsi", "qcow2")?;
    device_add(
        socket,
        json!({ "driver": "scsi-hd", "id": "sh", "drive": "scsi", "bus": "scsi0.0" }),
    )?;
    add_node(dir, socket, "stick", "raw")?;
    device_add(
        socket,
        json!({ "driver": "usb-storage", "id": "us", "drive": "stick", "bus": "xhci.0" }),
    )?;
    add_object(
        socket,
        json!({ "qom-type": "memory-backend-ram", "id": "m1", "size": 128_u64 << 20 }),
    )?;
    device_add(socket, json!({ "driver": "pc-dimm", "id": "dimm1", "memdev": "m1" }))?;
    add_cpu(socket, "cpu1")?;
    let address = json!({ "type": "unix", "data": { "path": guest.dir.join("port.sock") } });
    let data = json!({ "addr": address, "server": true, "wait": false });
    qmp(
        socket,
        "chardev-add",
        json!({ "id": "c1", "backend": { "type": "socket", "data": data } }),
    )?;
    device_add(
        socket,
        json!({ "driver": "virtserialport", "id": "vp", "chardev": "c1", "name": "test.port" }),
    )?;
    add_object(
        socket,
        json!({ "qom-type": "rng-random", "id": "r1", "filename": "/dev/urandom" }),
    )?;
    // Without an id.
    device_add(socket, json!({ "driver": "virtio-rng-pci", "rng": "r1" }))
}

/// Shows that the guest can use what it has.
fn use_all(guest: &mut Contact, seed: u32) -> Result<()> {
    let answer = guest.oracle.ask("devices")?;
    // The card on the user network answers, the one on the tap leads nowhere.
    let cards = part(&answer, "net")?;
    let mut answers = Vec::new();
    for card in cards.iter().filter(|card| *card != "lo") {
        if guest.oracle.ask(&format!("arp {card}")).is_ok_and(|answer| answer == "ok") {
            answers.push(card);
            break;
        }
    }
    assert_eq!(answers.len(), 1, "nobody answers by {cards:?}");
    for (device, seed) in DISKS.into_iter().zip(seed..) {
        let checked = guest.oracle.ask(&format!("disk check /dev/{device} 64 {seed}"))?;
        assert_eq!(checked, "ok", "{device}");
    }
    assert_eq!(guest.oracle.ask("held")?, "wrong=0");
    assert_eq!(guest.oracle.ask("cpus")?, "2");
    assert_eq!(guest.oracle.ask("random")?.len(), 32);
    let port = UnixStream::connect(guest.dir.join("port.sock"))?;
    port.set_read_timeout(Some(SOON))?;
    assert_eq!(guest.oracle.ask("say test.port hello")?, "ok");
    let mut said = String::new();
    BufReader::new(port).read_line(&mut said)?;
    assert_eq!(said, "hello\n");
    Ok(())
}

fn write_disks(guest: &mut Contact, seed: u32) -> Result<()> {
    for (device, seed) in DISKS.into_iter().zip(seed..) {
        guest.oracle.ask(&format!("disk write /dev/{device} 64 {seed}"))?;
    }
    Ok(())
}

/// The image's record of what was plugged in and out.
fn record(dir: &Dir, image: &Path) -> Result<Value> {
    let info = dir.snapback(&["info", text(image)]).succeed()?;
    Ok(info.events[0]["hotplug"].clone())
}

fn ids(list: &Value) -> Vec<&str> {
    let mut ids: Vec<&str> =
        list.as_array().into_iter().flatten().filter_map(|d| d["id"].as_str()).collect();
    ids.sort();
    ids
}

fn devices_come_back_as_they_were_plugged(dir: &Dir, qemu: Qemu) -> Result<()> {
    let mut guest = boot(dir, qemu)?;
    let nonce = guest.oracle.nonce()?;
    plug_all(dir, &guest, qemu)?;
    let cards = if tap(qemu).is_some() { 3 } else { 2 };
    wait_devices(&mut guest, DISKS.len(), cards)?;
    wait_for(SOON, "the guest to find its vCPU", || {
        Ok((guest.oracle.ask("cpus")? == "2").then_some(()))
    })?;
    guest.oracle.ask("memory")?;
    guest.oracle.ask("hold 64 7")?;

    // One that comes and goes, and one that was there from the start.
    let socket = guest.qmp_path.clone();
    let pci = |guest: &mut Contact| -> Result<usize> {
        Ok(part(&guest.oracle.ask("devices")?, "pci")?.len())
    };
    let before = pci(&mut guest)?;
    device_add(&socket, json!({ "driver": "virtio-rng-pci", "id": "gone", "rng": "r1" }))?;
    // A guest lets go only of what it has found.
    wait_for(SOON, "the guest to find it", || Ok((pci(&mut guest)? > before).then_some(())))?;
    unplug(&socket, "gone")?;
    unplug(&socket, "nic0")?;
    wait_devices(&mut guest, DISKS.len(), cards - 1)?;
    write_disks(&mut guest, 1)?;
    let found = guest.oracle.ask("devices")?;

    let image = dir.path("vm.snap");
    let ended = dir.save(&guest, "vm.snap").with(&["--prove"]).succeed()?;
    assert_eq!(ended.steps(), ["checked", "ready", "moment", "saved", "proved"]);
    assert!(ended.event("proved")?["running_ms"].as_f64().is_some_and(|ms| ms > 0.0));
    use_all(&mut guest, 1)?;
    write_disks(&mut guest, 5)?;

    let record = record(dir, &image)?;
    let mut expected = vec!["cpu1", "dimm1", "en", "sh", "us", "vb", "vn", "vp"];
    expected.extend(tap(qemu).map(|_| "tn"));
    let added = ids(&record["added"]);
    assert_eq!(added.len(), expected.len() + 1, "{added:?}");
    assert!(expected.iter().all(|id| added.contains(id)), "{added:?}");
    assert_eq!(record["removed"], json!(["-device virtio-net-pci,netdev=n0,id=nic0"]));

    // A tap serves one guest at a time.
    let from = guest.dir.clone();
    let folder = guest.kill();
    wait_free_tap(qemu)?;
    let mut reverted = dir.reverted(&image, &from, "first")?;
    assert_eq!(reverted.oracle.ask("devices")?, found);
    use_all(&mut reverted, 1)?;
    reverted.check(&nonce)?;
    reverted.resident()?;

    // The reverted guest has them on its command line, and more may come and go.
    unplug(&reverted.qmp_path, "vb")?;
    reverted.oracle.ask("disk write /dev/sda 64 9")?;
    let again = dir.path("again.snap");
    dir.save(&reverted, "again.snap").succeed()?;
    let from = reverted.dir.clone();
    drop(reverted);
    wait_free_tap(qemu)?;
    let mut third = dir.reverted(&again, &from, "second")?;
    assert_eq!(part(&third.oracle.ask("devices")?, "disks")?, ["sda", "vda"]);
    assert_eq!(third.oracle.ask("disk check /dev/sda 64 9")?, "ok");
    assert_eq!(third.oracle.ask("held")?, "wrong=0");
    third.check(&nonce)?;
    drop(folder);
    Ok(())
}

fn what_can_not_be_brought_back_is_refused_by_name(dir: &Dir, qemu: Qemu) -> Result<()> {
    let args = ["-device", "virtio-serial-pci,id=vser"];
    let bare = Bare::start(dir, qemu, &args)?;
    let log = dir.path("port.log");
    let backend = json!({ "type": "file", "data": { "out": log } });
    qmp(&bare.socket, "chardev-add", json!({ "id": "c9", "backend": backend }))?;
    let port = json!({ "driver": "virtserialport", "id": "vp", "chardev": "c9", "name": "x" });
    device_add(&bare.socket, port)?;
    device_add(&bare.socket, json!({ "driver": "e1000", "id": "en" }))?;

    let image = dir.path("vm.snap");
    let save = || dir.snapback(&["save", "--qmp", text(&bare.socket), text(&image)]);
    for refusal in [save().fail()?, {
        let ended = dir.snapback(&["check", "--qmp", text(&bare.socket)]).end()?;
        let item = ended.events.iter().find(|event| event["item"] == "hotplug");
        item.ok_or("not checked")?["says"].to_string()
    }] {
        let names = ["vp (virtserialport)", "`c9` (file)", "--allow-missing-device vp"];
        assert!(names.iter().all(|name| refusal.contains(name)), "{refusal}");
        assert!(!refusal.contains("en ("), "{refusal}");
    }
    assert!(!image.exists());
    let refusal = save().with(&["--allow-missing-device", "nobody"]).fail()?;
    assert!(refusal.contains("nobody") && refusal.contains("vp"), "{refusal}");

    let ended = save().with(&["--allow-missing-device", "vp"]).succeed()?;
    assert!(ended.event("warning")?["says"].to_string().contains("vp (virtserialport)"));
    let record = record(dir, &image)?;
    assert_eq!((ids(&record["missing"]), ids(&record["added"])), (vec!["vp"], vec!["en"]));

    // It can be given by hand.
    let revert = || dir.snapback(&["revert", text(&image)]);
    revert().fail()?;
    let by_hand = ["--", "-chardev", "null,id=c9", "-device", "virtserialport,chardev=c9,name=x"];
    let ended = revert().with(&by_hand).succeed()?;
    kill(&ended.event("running")?["pid"])
}

fn kill(pid: &Value) -> Result<()> {
    Pidfd::open(pid.as_u64().ok_or("no process")? as u32)?.kill()
}

fn devices_on_root_ports_come_back_and_virtio_mem_is_refused(dir: &Dir, qemu: Qemu) -> Result<()> {
    let args = "-machine q35 -m slots=2,maxmem=1G -device pcie-root-port,id=rp0,chassis=1 \
                -device pcie-root-port,id=rp1,chassis=2";
    let args = words(args);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let bare = Bare::start(dir, qemu, &args)?;
    device_add(&bare.socket, json!({ "driver": "virtio-scsi-pci", "id": "hba", "bus": "rp0" }))?;
    add_node(dir, &bare.socket, "d", "raw")?;
    device_add(&bare.socket, json!({ "driver": "scsi-hd", "drive": "d", "bus": "hba.0" }))?;
    let image = dir.path("vm.snap");
    let save = || dir.snapback(&["save", "--qmp", text(&bare.socket), text(&image)]);
    save().with(&["--prove"]).succeed()?.event("proved")?;

    let backend = json!({ "qom-type": "memory-backend-ram", "id": "vm", "size": 64_u64 << 20 });
    add_object(&bare.socket, backend)?;
    let device = json!({
        "driver": "virtio-mem-pci", "id": "vmem", "bus": "rp1", "memdev": "vm",
        "requested-size": 32_u64 << 20,
    });
    device_add(&bare.socket, device)?;
    let refusal = save().with(&["--force"]).fail()?;
    assert!(refusal.contains("device vmem (virtio-mem)"), "{refusal}");
    Ok(())
}

fn a_guest_that_would_not_run_again_is_not_proved(dir: &Dir, qemu: Qemu) -> Result<()> {
    let bare = Bare::start(dir, qemu, &["-device", "virtio-serial-pci,id=vser"])?;
    let backend = json!({ "type": "file", "data": { "out": dir.path("port.log") } });
    qmp(&bare.socket, "chardev-add", json!({ "id": "c9", "backend": backend }))?;
    device_add(&bare.socket, json!({ "driver": "virtserialport", "id": "vp", "chardev": "c9" }))?;
    let image = dir.path("vm.snap");
    let save = dir.snapback(&["save", "--qmp", text(&bare.socket), text(&image)]);
    let message = save.with(&["--prove", "--allow-missing-device", "vp"]).fail()?;
    assert!(message.contains("is whole, but"), "{message}");
    dir.snapback(&["verify", text(&image)]).succeed().map(drop)
}

/// Prints what docs/performance.md tells of plugged devices and of `save --prove`: on a
/// machine that does nothing else,
/// `cargo test --release --test e2e -- --ignored --nocapture figures_of_plugged_devices`.
#[test]
#[ignore = "it measures"]
fn figures_of_plugged_devices() -> Result<()> {
    for qemu in Qemu::ALL {
        in_a_folder(|dir| time_until_running(dir, qemu))?;
        in_a_folder(|dir| time_to_prove(dir, qemu))?;
    }
    Ok(())
}

/// The time until a guest without a kernel runs, without and with five plugged devices, by
/// turns: the median and the least.
fn time_until_running(dir: &Dir, qemu: Qemu) -> Result<()> {
    const REVERTS: usize = 21;
    let bare = Bare::start(dir, qemu, &[])?;
    let save = |image: &Path| {
        dir.snapback(&["save", "--qmp", text(&bare.socket), text(image)]).succeed().map(drop)
    };
    let images = [dir.path("none.snap"), dir.path("five.snap")];
    save(&images[0])?;
    for number in 0..5 {
        let (netdev, id) = (format!("n{number}"), format!("nic{number}"));
        qmp(&bare.socket, "netdev_add", json!({ "type": "user", "id": netdev }))?;
        let driver = ["virtio-net-pci", "e1000"][number % 2];
        let device = json!({ "driver": driver, "id": id, "netdev": netdev });
        device_add(&bare.socket, device)?;
    }
    save(&images[1])?;
    let mut times = [Vec::new(), Vec::new()];
    for _ in 0..REVERTS {
        for (image, times) in images.iter().zip(&mut times) {
            let ended = dir.snapback(&["revert", text(image)]).succeed()?;
            let running = ended.event("running")?;
            kill(&running["pid"])?;
            times.push(running["ms"].as_f64().ok_or("no time")?);
        }
    }
    for (devices, times) in ["no", "five"].iter().zip(&mut times) {
        print_times(&format!("{qemu:?}, {devices} plugged devices"), times);
    }
    Ok(())
}

/// What `--prove` adds to a save of a guest of 2 GiB that has filled its memory.
fn time_to_prove(dir: &Dir, qemu: Qemu) -> Result<()> {
    let guest = Guest::boot(&GuestOptions { qemu, mib: 2048, ..GuestOptions::default() })?;
    let ended = dir.save(&guest, "vm.snap").with(&["--prove"]).succeed()?;
    let ms = |name: &str| Ok::<_, Error>(ended.event(name)?["ms"].as_f64().ok_or("no time")?);
    let (saved, proved) = (ms("saved")?, ms("proved")?);
    println!("{qemu:?}, 2 GiB: saved after {saved:.0} ms, proved after {proved:.0} ms");
    Ok(())
}
