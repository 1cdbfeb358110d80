//! Recipes of docs/test-farms.md, as other programs start QEMU.

use std::io::{ErrorKind, Read};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Stdio};

use crate::clones::by_clone;
use crate::harness::{Dir, send_signal, text, wait_gone};
use crate::ports::free_port;
use crate::support::{
    Arch, Disk, Qemu, Result, SOON, artifact, deps, query_status, spawn_bound, wait_for,
};
use crate::tests_on_both;

tests_on_both! {
    a_router_of_vrnetlabs_is_cloned_and_goes_back
}

/// The ports of a node of vrnetlab's: its monitor, its console, what is forwarded to it, and its
/// card's socket.
struct Ports {
    monitor: u16,
    console: u16,
    ssh: u16,
    card: u16,
}

/// A node, until it is dropped.
struct Node(Child);

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// QEMU as vrnetlab starts it for a router, with a second monitor. The kernel stands for the
/// router's own disk.
fn node(dir: &Dir, qemu: Qemu, ports: &Ports, qmp: &Path) -> Result<Node> {
    let disk = dir.path("router-overlay.img");
    Disk::new("disk", &disk).make_ext4(16)?;
    let Ports { monitor, console, ssh, card } = ports;
    let file = |name| artifact(deps().join(name)).map(|path| path.display().to_string());
    let pairs = [
        ("-display", "none".to_owned()),
        ("-machine", "pc".into()),
        ("-monitor", format!("tcp:0.0.0.0:{monitor},server,nowait")),
        ("-serial", format!("telnet:0.0.0.0:{console},server,nowait")),
        ("-m", "160".into()),
        ("-cpu", "qemu64".into()),
        ("-smp", "1".into()),
        ("-drive", format!("if=ide,format=raw,file={}", text(&disk))),
        ("-qmp", format!("unix:{},server,nowait", text(qmp))),
        ("-device", "pci-bridge,chassis_nr=1,id=pci.1".into()),
        ("-device", "e1000,netdev=p00,mac=0C:00:11:22:33:00".into()),
        (
            "-netdev",
            format!(
                "user,id=p00,net=10.0.0.0/24,host=10.0.0.2,dns=10.0.0.3,dhcpstart=10.0.0.15,\
                 hostfwd=tcp:0.0.0.0:{ssh}-10.0.0.15:22,tftp=/tftpboot"
            ),
        ),
        ("-device", "e1000,netdev=p01,mac=0C:00:11:22:33:01,bus=pci.1,addr=0x2".into()),
        ("-netdev", format!("socket,id=p01,listen=:{card}")),
        ("-kernel", file("vmlinuz")?),
        ("-initrd", file("initramfs.cpio")?),
        // The tests' guest wants a second serial port.
        ("-serial", "null".into()),
        ("-append", "console=ttyS0 quiet no_timer_check oracle.fill_mib=48".into()),
    ];
    let mut command = qemu.command_for(Arch::X86_64)?;
    command.args(pairs.into_iter().flat_map(|(name, value)| [name.to_owned(), value]));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    Ok(Node(spawn_bound(command)?))
}

/// A console by telnet.
struct Console {
    stream: TcpStream,
    said: Vec<u8>,
}

impl Console {
    fn open(port: u16) -> Result<Console> {
        let stream =
            wait_for(SOON, "a console", || Ok(TcpStream::connect(("127.0.0.1", port)).ok()))?;
        stream.set_nonblocking(true)?;
        Ok(Console { stream, said: Vec::new() })
    }

    /// Waits for a heartbeat: its number, with no page bad by then.
    fn beat(&mut self) -> Result<u64> {
        self.said.clear();
        wait_for(SOON * 10, "a heartbeat", || {
            let mut bytes = [0; 4096];
            match self.stream.read(&mut bytes) {
                Ok(0) => return Err("the console was closed".into()),
                Ok(count) => self.said.extend_from_slice(&bytes[..count]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
            let text = String::from_utf8_lossy(&self.said).into_owned();
            // Whole lines only, at either end.
            let lines = text.split_inclusive('\n').skip(1).filter(|line| line.ends_with('\n'));
            let beats = lines.filter_map(|line| line.trim().strip_prefix("BEAT "));
            match beats.last().map(|beat| beat.split(' ').collect::<Vec<_>>()) {
                Some(beat) if beat[3] == "0" => Ok(Some(beat[0].parse()?)),
                Some(beat) => Err(format!("{beat:?}").into()),
                None => Ok(None),
            }
        })
    }
}

/// The router is saved when it has come up, goes on, and is taken back; two others of it come up at
/// once beside it.
fn a_router_of_vrnetlabs_is_cloned_and_goes_back(dir: &Dir, qemu: Qemu) -> Result<()> {
    let ports = Ports {
        monitor: free_port()?,
        console: free_port()?,
        ssh: free_port()?,
        card: free_port()?,
    };
    let socket = dir.path("qmp.sock");
    let router = node(dir, qemu, &ports, &socket)?;
    let mut console = Console::open(ports.console)?;
    console.beat()?;
    let image = dir.path("router.snap");
    let save = ["save", "--qmp", text(&socket), text(&image), "--resettable", "--detach"];
    let saved = dir.snapback(&save).succeed()?;

    let own = dir.path("{name}");
    let clones = ["--count", "2", "--name", "r{n}", "--dir", text(&own)];
    let reverted = dir.snapback(&["revert", text(&image)]).with(&clones).succeed()?;
    let mut taken = Vec::new();
    for (name, event) in by_clone(&reverted, "running") {
        let at = |old: u16| event["ports"][old.to_string()].as_u64().map(|port| port as u16);
        let mut new = Vec::new();
        for old in [ports.monitor, ports.console, ports.ssh, ports.card] {
            new.push(at(old).ok_or_else(|| format!("no port for {old}: {event}"))?);
        }
        Console::open(new[1])?.beat()?;
        assert_eq!(query_status(&dir.path(name).join("qmp.sock"))?, "running");
        taken.extend(new);
        let pid = event["pid"].as_u64().ok_or("no process")? as u32;
        send_signal(pid, libc::SIGTERM);
        wait_gone(pid)?;
    }
    taken.sort_unstable();
    taken.dedup();
    assert_eq!(taken.len(), 8, "{taken:?}");

    let before = console.beat()?;
    dir.snapback(&["reset", "--in-place", "--qmp", text(&socket)]).succeed()?;
    let after = wait_for(SOON, "an earlier heartbeat", || {
        let beat = console.beat()?;
        Ok((beat < before).then_some(beat))
    })?;
    assert!(after < before);
    drop(router);
    let tracker = saved.event("detached")?["server_pid"].as_u64().ok_or("no process")? as u32;
    wait_gone(tracker)
}
