//! What a guest is given of its own once it runs.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::clocks::now;
use crate::clones::{by_clone, running};
use crate::harness::{Dir, Reverted, text, wait_gone};
use crate::shared::shared;
use crate::support::{Contact, Guest, GuestOptions, Qemu, Result, SOON, debian, qmp, wait_for};
use crate::{tests, tests_on_both, tests_on_both_at_length};

tests_on_both! {
    a_hook_is_told_whose_guest_runs
}

tests_on_both_at_length! {
    a_guest_finds_its_new_generation_id
    an_agent_makes_each_clone_its_own
    cards_get_addresses_of_their_own
}

tests! {
    a_hook_that_fails_leaves_its_guest_running
    a_hook_that_hangs_is_ended_by_an_interrupt
    an_agent_without_a_channel_is_refused
    a_generation_id_is_only_for_guests_that_have_one
}

/// What a hook has found in its environment.
fn variable(found: &Path, name: &str) -> Result<String> {
    let found = fs::read_to_string(found)?;
    let value = found.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
    Ok(value.ok_or_else(|| format!("no {name}: {found}"))?.to_owned())
}

fn a_hook_is_told_whose_guest_runs(dir: &Dir, qemu: Qemu) -> Result<()> {
    let shared = shared(qemu)?;
    let hook = "kill -0 $SNAPBACK_PID && test -S \"$SNAPBACK_QMP\" && \
                env >\"$SNAPBACK_DIR/found\"";
    let args = ["--count", "2", "--name", "w{n}", "--hook-running", hook];
    let ended = dir.snapback(&["revert", text(&shared.image)]).with(&args).succeed()?;
    let hooks = by_clone(&ended, "hook");
    assert_eq!(hooks.keys().collect::<Vec<_>>(), [&"w1", &"w2"], "{ended:?}");
    assert!(hooks.values().all(|event| event["failed"].is_null()), "{ended:?}");
    let told = by_clone(&ended, "running");
    for (name, mut clone) in running(dir, &ended)? {
        let own = dir.path(&name).canonicalize()?;
        let found = |variable_name: &str| variable(&own.join("found"), variable_name);
        assert_eq!(found("SNAPBACK_CLONE")?, name);
        assert_eq!(Path::new(&found("SNAPBACK_DIR")?).canonicalize()?, own);
        assert_eq!(found("SNAPBACK_PID")?, clone.pid.to_string());
        let socket = found("SNAPBACK_QMP")?;
        assert_eq!(Path::new(&socket).canonicalize()?, own.join("qmp.sock"));
        assert_eq!(told[name.as_str()]["qmp"], socket);
        assert_eq!(found("SNAPBACK_PORTS")?, "{}");
        clone.check(&shared.nonce)?;
    }
    Ok(())
}

fn a_hook_that_fails_leaves_its_guest_running(dir: &Dir) -> Result<()> {
    let shared = shared(Qemu::V10)?;
    for (name, more) in [("here", &[][..]), ("detached", &["--detach"])] {
        let to = dir.make(name)?;
        let revert = dir.revert(&shared.image, &shared.from, &to);
        let ended = revert.with(&["--hook-running", "sleep 1; exit 7"]).with(more).end()?;
        assert_eq!(ended.code, Some(1), "{ended:?}");
        let told = ended.failure()?;
        assert!(told.contains("--hook-running `sleep 1; exit 7`: exit status: 7"), "{told}");
        assert_eq!(ended.event("error")?["code"], "hook_failed");
        assert!(ended.event("hook")?["failed"].is_string(), "{ended:?}");
        let pid = ended.event("running")?["pid"].as_u64().ok_or("no process")?;
        Reverted::alone(pid as u32, &to)?.check(&shared.nonce)?;
    }
    Ok(())
}

fn a_hook_that_hangs_is_ended_by_an_interrupt(dir: &Dir) -> Result<()> {
    let shared = shared(Qemu::V10)?;
    let to = dir.make("new")?;
    let hook = format!("echo $$ >{}; exec sleep 1000", text(&dir.path("hook")));
    let revert = dir.revert(&shared.image, &shared.from, &to).with(&["--hook-running", &hook]);
    let mut revert = revert.start()?;
    let pid = revert.wait("running")?["pid"].as_u64().ok_or("no process")?;
    let mut guest = Reverted::alone(pid as u32, &to)?;
    // By then the process that waits for the hook is in its sandbox.
    revert.wait("resident")?;
    let hook: u32 = fs::read_to_string(dir.path("hook"))?.trim().parse()?;
    revert.signal(libc::SIGINT);
    let ended = revert.end()?;
    assert_eq!(ended.code, Some(130), "{ended:?}");
    assert!(ended.failure()?.contains("SIGTERM"), "{ended:?}");
    wait_gone(hook)?;
    guest.check(&shared.nonce)
}

/// The generation ID that a Debian guest finds in its memory, where its ACPI tables (the name VGIA
/// in QEMU's SSDT) say, as hexadecimal digits in that order. Its page lies behind the memory that
/// the kernel uses, so that /dev/mem shows it, by mmap(2) alone.
fn generation_in_guest(guest: &mut Contact) -> Result<String> {
    const READ: &str = "t=$(grep -la VGIA /sys/firmware/acpi/tables/SSDT*) && \
        at=$(grep -abo VGIA $t | head -n 1 | cut -d: -f1) && \
        perl -e 'open F, \"<\", \"/dev/mem\" or die; \
        $at = syscall 9, 0, 4096, 1, 1, fileno F, $ARGV[0] + 0; die $! if $at == -1; \
        print unpack \"x40 H32\", unpack \"P56\", pack \"Q\", $at' \
        $(od -An -tu4 -j$((at + 5)) -N4 $t)";
    debian::run(&mut guest.oracle, READ)
}

/// The generation ID that QEMU gives its guest, as the guest's memory has it: the first three
/// numbers of it begin with their last byte.
fn generation_of_qemu(guest: &Contact) -> Result<String> {
    let answer = qmp(&guest.qmp_path, "query-vm-generation-id", json!({}))?;
    let guid = answer["guid"].as_str().ok_or("no generation ID")?;
    let parts: Vec<&str> = guid.split('-').collect();
    let [a, b, c, d, e] = parts[..] else { return Err(format!("{guid} is no GUID").into()) };
    let backwards = |digits: &str| -> String {
        (0..digits.len()).step_by(2).rev().map(|at| &digits[at..at + 2]).collect()
    };
    Ok([backwards(a), backwards(b), backwards(c), d.to_owned(), e.to_owned()].concat())
}

fn a_guest_finds_its_new_generation_id(dir: &Dir, qemu: Qemu) -> Result<()> {
    let disk = debian::make_disk(&dir.path("disk.qcow2"))?;
    let device = "vmgenid,guid=324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87";
    let args = ["-device", device].map(String::from).into();
    let mut guest = Guest::boot(&GuestOptions { args, ..debian::options(qemu, disk) })?;
    const OLD: &str = "af6e4e32d1d1f64bbf41b9bb6c91fb87";
    assert_eq!(
        (generation_in_guest(&mut guest)?.as_str(), generation_of_qemu(&guest)?.as_str()),
        (OLD, OLD)
    );
    dir.save(&guest, "vm.snap").succeed()?;

    let mut seen = vec![OLD.to_owned()];
    for place in ["uffd", "socket", "eager"] {
        let to = dir.make(place)?;
        let revert = dir.revert(&dir.path("vm.snap"), &guest.dir, &to);
        let args = ["--ephemeral", "--place", place, "--vmgenid", "new"];
        let mut reverted = Reverted::of(revert.with(&args), &to)?;
        let early = generation_in_guest(&mut reverted)?;
        reverted.resident()?;
        let late = generation_in_guest(&mut reverted)?;
        let given = generation_of_qemu(&reverted)?;
        assert_eq!((&early, &late), (&given, &given), "{place}");
        assert!(!seen.contains(&given), "{place}: {seen:?}");
        seen.push(given);
    }
    let mut same = dir.reverted(&dir.path("vm.snap"), &guest.dir, "same")?;
    assert_eq!(generation_in_guest(&mut same)?, OLD);
    same.resident().map(drop)
}

fn a_generation_id_is_only_for_guests_that_have_one(dir: &Dir) -> Result<()> {
    let shared = shared(Qemu::V10)?;
    let revert = dir.snapback(&["revert", text(&shared.image), "--name", "w"]);
    let ended = revert.with(&["--vmgenid", "new"]).end()?;
    assert_eq!(
        (ended.code, &ended.event("error")?["code"]),
        (Some(3), &"device_not_replayable".into())
    );
    let told = ended.failure()?;
    assert!(told.contains("--vmgenid new") && told.contains("vmgenid,guid=auto"), "{told}");
    assert!(!dir.path("w").exists());
    Ok(())
}

/// A Debian guest whose agent answers by a channel of its own, and whose clock is years behind.
pub fn with_agent(dir: &Dir, qemu: Qemu, more: &[&str]) -> Result<Guest> {
    let disk = debian::make_disk(&dir.path("disk.qcow2"))?;
    let args = [
        "-device",
        "virtio-serial-pci",
        "-chardev",
        "socket,id=agent,path=agent.sock,server=on,wait=off",
        "-device",
        "virtserialport,chardev=agent,name=org.qemu.guest_agent.0",
    ];
    let args = args.iter().chain(more).map(|arg| arg.to_string()).collect();
    let modules = "virtio_console,failover,net_failover,virtio_net";
    let mut guest = Guest::boot(&GuestOptions { args, modules, ..debian::options(qemu, disk) })?;
    let agent = "qemu-ga -m virtio-serial -p $(ls /dev/vport*p*) -t /run -f /run/agent.pid";
    debian::run(&mut guest.oracle, &format!("setsid {agent} >/run/agent.log 2>&1 &"))?;
    wait_for(SOON, "the agent to be connected", || {
        let chardevs = qmp(&guest.qmp_path, "query-chardev", json!({}))?;
        let mut chardevs = chardevs.as_array().into_iter().flatten();
        let opened =
            |chardev: &Value| chardev["label"] == "agent" && chardev["frontend-open"] == true;
        Ok(chardevs.any(opened).then_some(()))
    })?;
    debian::run(&mut guest.oracle, "hostname original && date -s @1000000000")?;
    Ok(guest)
}

fn an_agent_makes_each_clone_its_own(dir: &Dir, qemu: Qemu) -> Result<()> {
    let mut guest = with_agent(dir, qemu, &[])?;
    dir.save(&guest, "vm.snap").succeed()?;
    let image = dir.path("vm.snap");
    let tasks = [
        "--agent-set-time",
        "--agent-exec",
        "hostname {name}",
        "--agent-exec",
        "echo {n} {dir} >/run/whose",
    ];
    let clones = ["--ephemeral", "--count", "2", "--name", "w{n}"];
    let revert = dir.snapback(&["revert", text(&image)]).with(&clones).with(&tasks);
    let ended = revert.succeed()?;
    let before = now();
    for (name, mut clone) in running(dir, &ended)? {
        let of_clone = |event: &&Value| event["event"] == "agent" && event["clone"] == name;
        let told: Vec<&Value> = ended.events.iter().filter(of_clone).collect();
        let did: Vec<_> = told.iter().filter_map(|event| event["did"].as_str()).collect();
        assert_eq!(did[..2], ["guest-set-time", &format!("hostname {name}")], "{ended:?}");
        assert_eq!((did.len(), &told[2]["left"]), (3, &json!(0)), "{ended:?}");
        assert!(told.iter().all(|event| event["failed"].is_null()), "{ended:?}");
        assert_eq!(debian::run(&mut clone.oracle, "hostname")?, name);
        let whose = debian::run(&mut clone.oracle, "cat /run/whose")?;
        assert_eq!(whose, format!("{} {name}", &name[1..]));
        let time: f64 = debian::run(&mut clone.oracle, "date +%s")?.parse()?;
        assert!((before - 60.0..now() + 2.0).contains(&time), "{time} {before}");
    }
    assert_eq!(debian::run(&mut guest.oracle, "hostname")?, "original");

    for (name, more) in [("here", &[][..]), ("detached", &["--detach"])] {
        let to = dir.make(name)?;
        let tasks = ["--agent-exec", "echo no >&2; exit 4", "--agent-exec", "hostname later"];
        let revert = dir.snapback(&["revert", text(&image), "--ephemeral", "--dir", text(&to)]);
        let ended = revert.with(&tasks).with(more).end()?;
        assert_eq!((ended.code, &ended.event("error")?["code"]), (Some(1), &json!("agent_failed")));
        let told = ended.failure()?;
        assert!(told.contains("exit status 4: no"), "{told}");
        let pid = ended.event("running")?["pid"].as_u64().ok_or("no process")?;
        let mut guest = Reverted::alone(pid as u32, &to)?;
        assert_eq!(debian::run(&mut guest.oracle, "hostname")?, "original");
    }
    Ok(())
}

fn an_agent_without_a_channel_is_refused(dir: &Dir) -> Result<()> {
    let shared = shared(Qemu::V10)?;
    let revert = dir.snapback(&["revert", text(&shared.image), "--name", "w"]);
    let ended = revert.with(&["--agent-exec", "hostname {name}"]).end()?;
    assert_eq!((ended.code, &ended.event("error")?["code"]), (Some(3), &json!("options_invalid")));
    let told = ended.failure()?;
    assert!(told.contains("org.qemu.guest_agent.0") && told.contains("--agent"), "{told}");
    assert!(!dir.path("w").exists());
    Ok(())
}

/// What the guest needs of ip(8), which it doesn't have: `ip link set dev IF address MAC`, and `up`
/// (netdevice(7): SIOCSIFHWADDR, SIOCSIFFLAGS with IFF_UP).
const IP: &str = "socket S, 2, 2, 0; my (undef, undef, undef, $if, $what, $mac) = @ARGV; \
    $mac =~ tr/://d; exit !($what eq q(up) ? ioctl S, 0x8914, pack q(a16 S x14), $if, 1 : \
    ioctl S, 0x8924, pack q(a16 S H12 x8), $if, 1, $mac)";

/// The address that QEMU's card takes packets for.
pub fn address_of_card(guest: &Contact) -> Result<String> {
    let filters = qmp(&guest.qmp_path, "query-rx-filter", json!({}))?;
    Ok(filters[0]["main-mac"].as_str().ok_or("no card")?.to_owned())
}

/// The address of that guest's card.
pub const OLD: &str = "52:54:00:ab:cd:01";

/// What a guest sees of its card: the address, and whether the cable is plugged in.
pub const SEES: &str = "cat /sys/class/net/eth0/address /sys/class/net/eth0/carrier";

/// A guest with an agent and a network card.
pub fn with_card(dir: &Dir, qemu: Qemu) -> Result<Guest> {
    let card = format!("virtio-net-pci,netdev=n0,id=net0,romfile=,mac={OLD}");
    let mut guest = with_agent(dir, qemu, &["-netdev", "user,id=n0", "-device", &card])?;
    let ip = "/usr/local/bin/ip";
    let install = format!("printf '#!/usr/bin/perl\\n%s\\n' '{IP}' >{ip} && chmod +x {ip}");
    debian::run(&mut guest.oracle, &install)?;
    debian::run(&mut guest.oracle, "ip link set dev eth0 up")?;
    assert_eq!(debian::run(&mut guest.oracle, SEES)?, format!("{OLD}\n1"));
    Ok(guest)
}

fn cards_get_addresses_of_their_own(dir: &Dir, qemu: Qemu) -> Result<()> {
    let guest = with_card(dir, qemu)?;
    let sees = SEES;
    dir.save(&guest, "vm.snap").succeed()?;
    let image = dir.path("vm.snap");
    let revert = || dir.snapback(&["revert", text(&image), "--ephemeral", "--mac", "new"]);

    let mut seen = vec![OLD.to_owned()];
    let ended = revert().with(&["--count", "2", "--name", "w{n}"]).succeed()?;
    for mut clone in running(dir, &ended)?.into_values() {
        let address = address_of_card(&clone)?;
        assert_eq!(debian::run(&mut clone.oracle, sees)?, format!("{address}\n1"));
        assert!(!seen.contains(&address), "{seen:?}");
        assert!(ended.said.iter().any(|line| line.contains(&address)), "{ended:?}");
        seen.push(address);
    }

    // A guest whose agent can't be reached keeps its address, and stays unplugged.
    let to = dir.make("alone")?;
    let ended = revert().with(&["--dir", text(&to), "--agent", "/nonexistent/agent"]).end()?;
    assert_eq!((ended.code, &ended.event("error")?["code"]), (Some(1), &json!("agent_failed")));
    let pid = ended.event("running")?["pid"].as_u64().ok_or("no process")?;
    let mut alone = Reverted::alone(pid as u32, &to)?;
    assert_eq!(debian::run(&mut alone.oracle, sees)?, format!("{OLD}\n0"));
    Ok(())
}
