//! What of the host a reverted guest takes: ports, network backends, log files.

use std::net::{TcpListener, TcpStream, UdpSocket};
use std::process::{Child, Command, Stdio};

use super::start::ports::NewPort;
use super::tests::machine;
use super::{GuestError, Note, RewriteOptions, StartPlan, rewrite};

fn plan(args: &[&str], options: &RewriteOptions) -> Result<StartPlan, GuestError> {
    rewrite(&machine(args), options)
}

/// The rewritten arguments without `-incoming defer`, and what was noted.
fn rewritten(args: &[&str], options: &RewriteOptions) -> (Vec<String>, Vec<Note>) {
    let StartPlan { argv, notes, .. } = plan(args, options).unwrap();
    (argv[1..argv.len() - 2].to_vec(), notes)
}

fn with_ports(ports: &[(u16, NewPort)]) -> RewriteOptions {
    RewriteOptions { ports: ports.to_vec(), ..Default::default() }
}

fn with_netdev(id: &str, spec: &str) -> RewriteOptions {
    RewriteOptions { netdevs: vec![(id.into(), spec.into())], ..Default::default() }
}

#[track_caller]
fn refused(args: &[&str], options: &RewriteOptions, names: &[&str]) {
    let error = plan(args, options).unwrap_err().to_string();
    names.iter().for_each(|name| assert!(error.contains(name), "{name}: {error}"));
}

#[test]
fn ports_are_replaced_everywhere_and_told() {
    let args = ["-netdev", "user,id=n,hostfwd=tcp::61-:22,hostfwd=udp::61-:53", "-vnc", ":1", "-s"];
    let options = with_ports(&[(61, NewPort::Number(62)), (5901, NewPort::Number(5999))]);
    let options = RewriteOptions { extra: vec!["-gdb".into(), "tcp::61".into()], ..options };
    let (line, notes) = rewritten(&args, &options);
    // What the caller adds stays as it is.
    assert_eq!(
        line.join(" "),
        "-netdev user,id=n,hostfwd=tcp::62-:22,hostfwd=udp::62-:53 -vnc :99 -s -gdb tcp::61"
    );
    assert_eq!(notes.len(), 2, "{notes:?}");
    assert_eq!(notes[1].what, "replaced -vnc :1 by -vnc :99");
    assert_eq!(notes[1].why, "`RewriteOptions::ports` 5901=5999");
    // Two ports can be swapped.
    let args = ["-vnc", ":1", "-spice", "port=5902"];
    let options = with_ports(&[(5901, NewPort::Number(5902)), (5902, NewPort::Number(5901))]);
    assert_eq!(rewritten(&args, &options).0, ["-vnc", ":2", "-spice", "port=5901"]);
}

#[test]
fn a_free_port_is_chosen_and_told() {
    let args = ["-netdev", "user,id=n,hostfwd=tcp::61-:22,hostfwd=tcp::63-:23"];
    let options = with_ports(&[(61, NewPort::Free), (63, NewPort::Free)]);
    let plan = plan(&args, &options).unwrap();
    let (first, second) = (plan.reach.ports[&61], plan.reach.ports[&63]);
    assert!(first != second && first > 1023, "{:?}", plan.reach.ports);
    let expected = format!("user,id=n,hostfwd=tcp::{first}-:22,hostfwd=tcp::{second}-:23");
    assert_eq!(plan.argv[2], expected);
}

#[test]
fn rules_that_can_not_be_followed_are_refused() {
    let args = ["-vnc", ":1", "-netdev", "user,id=n"];
    let number = NewPort::Number;
    refused(&args, &with_ports(&[(80, number(81))]), &["::ports` 80=", "5901"]);
    refused(&[], &with_ports(&[(80, number(81))]), &["none"]);
    refused(&args, &with_ports(&[(5901, number(0))]), &["5901=0"]);
    refused(&args, &with_ports(&[(5901, number(80))]), &["5901=80", "5900"]);
    refused(&args, &with_ports(&[(5901, number(5902)), (5901, number(5903))]), &["another rule"]);
    refused(&args, &with_netdev("m", "user"), &["::netdevs` m=", "ids are: n"]);
    refused(&args, &with_netdev("n", "restrict=on"), &["n=restrict=on", "type"]);
    refused(&["-nic", "user,id=n"], &with_netdev("n", r#"{"type":"user"}"#), &["JSON"]);
}

#[test]
fn backends_of_cards_are_replaced_and_the_cards_kept() {
    let card = ["-device", "virtio-net-pci,netdev=n,mac=52:54:00:11:22:33"];
    for (old, new, expected) in [
        ("user,id=n,hostfwd=tcp::61-:22", "user", "user,id=n"),
        ("tap,id=n,fd=24", "tap,ifname=no-such-tap", "tap,ifname=no-such-tap,id=n"),
        ("tap,fds=3:4,id=n,vhostfds=5:6", "user,id=other", "user,id=n"),
        (r#"{"type":"tap","fd":"24","id":"n"}"#, "user", "user,id=n"),
        ("socket,id=n,connect=h:1", "hubport,hubid=7", "hubport,hubid=7,id=n"),
        ("user,id=n", r#"{"type":"user"}"#, r#"{"id":"n","type":"user"}"#),
    ] {
        let args = ["-netdev", old, card[0], card[1]];
        let (line, notes) = rewritten(&args, &with_netdev("n", new));
        assert_eq!(line, ["-netdev", expected, card[0], card[1]]);
        assert!(notes[0].what.starts_with(&format!("replaced -netdev {old} by ")), "{notes:?}");
    }
    let nic = ["-nic", "tap,fd=3,id=n,model=e1000,mac=52:54:00:11:22:33"];
    let expected = ["-nic", "user,id=n,model=e1000,mac=52:54:00:11:22:33"];
    assert_eq!(rewritten(&nic, &with_netdev("n", "user")).0, expected);
    let old = ["-net", "nic,model=e1000", "-net", "tap,id=n,fd=3"];
    let expected = ["-net", "nic,model=e1000", "-net", "user,id=n"];
    assert_eq!(rewritten(&old, &with_netdev("n", "user")).0, expected);
}

#[test]
fn the_state_of_a_user_network_finds_a_place() {
    let args = ["-netdev", "user,id=n", "-netdev", "user,id=m", "-device", "e1000,netdev=n"];
    let (line, _) = rewritten(&args, &with_netdev("n", "hubport,hubid=7"));
    assert_eq!(
        line[..4],
        ["-netdev", "user,restrict=on,id=snapback-n", "-netdev", "hubport,hubid=7,id=n"]
    );
    assert_eq!(line[4..], args[2..]);
}

#[test]
fn the_chardev_of_a_replaced_backend_goes() {
    let chardev = "socket,id=c,fd=7";
    let args = ["-chardev", chardev, "-netdev", "vhost-user,id=n,chardev=c"];
    assert_eq!(rewritten(&args, &with_netdev("n", "user")).0, ["-netdev", "user,id=n"]);
    let shared = ["-chardev", "null,id=c", "-netdev", "vhost-user,id=n,chardev=c", "-serial"];
    let (line, _) = rewritten(&[&shared[..], &["chardev:c"]].concat(), &with_netdev("n", "user"));
    assert_eq!(line, ["-chardev", "null,id=c", "-netdev", "user,id=n", "-serial", "chardev:c"]);
}

#[test]
fn a_descriptor_of_a_card_names_the_option_that_replaces_it() {
    for args in [
        ["-netdev", "tap,id=net0,fd=24"],
        ["-netdev", r#"{"type":"tap","fds":"24:25","id":"net0"}"#],
        ["-nic", "tap,fd=24,id=net0"],
    ] {
        refused(
            &args,
            &Default::default(),
            &[args[1], "`RewriteOptions::netdevs` net0=SPEC", "or"],
        );
    }
    let error = plan(&["-add-fd", "fd=3,set=1"], &Default::default()).unwrap_err().to_string();
    assert!(!error.contains("netdevs") && error.contains("snapback serve"), "{error}");
}

#[test]
fn bound_ports_are_refused_by_name() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let us = format!("process {}", std::process::id());
    let remedy = format!("`RewriteOptions::ports` {port}=NEW");
    for (option, value) in [
        ("-netdev", format!("user,id=n,hostfwd=tcp::{port}-:22")),
        (
            "-netdev",
            format!(r#"{{"type":"user","id":"n","hostfwd":[{{"str":"tcp::{port}-:22"}}]}}"#),
        ),
        ("-serial", format!("tcp:localhost:{port},server=on,wait=off")),
        ("-chardev", format!("socket,id=c,host=0.0.0.0,port={port},server=on,wait=off")),
        ("-gdb", format!("tcp::{port}")),
        ("-vnc", format!("127.0.0.1:{}", port.checked_sub(5900).unwrap())),
        ("-spice", format!("port={port}")),
        ("-netdev", format!("socket,id=n,listen=:{port}")),
    ] {
        let named = [&value[..], "TCP", &us, &remedy];
        refused(&[option, &value], &Default::default(), &named);
        // The way out that the error names is one.
        rewritten(&[option, &value], &with_ports(&[(port, NewPort::Free)]));
    }
    // Another address, another protocol, a client.
    let forward = format!("user,id=n,hostfwd=tcp:127.0.0.2:{port}-:22,hostfwd=udp::{port}-:53");
    rewritten(&["-netdev", &forward], &Default::default());
    rewritten(&["-serial", &format!("tcp:localhost:{port}")], &Default::default());
    // A monitor gives way.
    let monitor = format!("tcp::{port},server=on,wait=off");
    assert!(rewritten(&["-monitor", &monitor], &Default::default()).0.is_empty());
    let isolated = RewriteOptions { isolated: true, ..Default::default() };
    rewritten(&["-netdev", &format!("user,id=n,hostfwd=tcp::{port}-:22"), "-s"], &isolated);
    drop(listener);
    // A process that another test has just forked may hold it still.
    while TcpStream::connect(("127.0.0.1", port)).is_ok() {
        std::thread::yield_now();
    }
    rewritten(&["-spice", &format!("port={port}")], &Default::default());

    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = socket.local_addr().unwrap().port();
    let forward = format!("user,id=n,hostfwd=udp::{port}-:53");
    refused(&["-nic", &forward], &Default::default(), &["UDP", &us]);
}

/// A process with these arguments behind its name, which ends when dropped.
struct Other(Child);

impl Other {
    fn with(arguments: &[&str]) -> Other {
        let mut command = Command::new("/bin/sh");
        // The shell waits for its input to end.
        command.args(["-c", "read line", "qemu"]).args(arguments).stdin(Stdio::piped());
        Other(command.spawn().unwrap())
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_vsock_address_of_another_process_is_refused_by_name() {
    let other = Other::with(&["-device", "vhost-vsock-pci,id=v,guest-cid=4000000001"]);
    let name = format!("process {}", other.0.id());
    let device = |cid: u32| format!("vhost-vsock-pci,id=v0,guest-cid={cid}");
    let json = r#"{"driver":"vhost-vsock-pci","id":"v0","guest-cid":4000000001}"#;
    let taken = device(4_000_000_001);
    let remedy = "-set device.v0.guest-cid=N";
    // The process may not have become the other program yet.
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
    while plan(&["-device", &taken], &Default::default()).is_ok()
        && std::time::Instant::now() < deadline
    {}
    refused(&["-device", &taken], &Default::default(), &["4000000001", &name, remedy]);
    refused(&["-device", json], &Default::default(), &["4000000001", &name, "snapback serve"]);
    rewritten(&["-device", &device(4_000_000_002)], &Default::default());
    let extra = vec!["-set".into(), "device.v0.guest-cid=4000000003".into()];
    let options = RewriteOptions { extra, ..Default::default() };
    rewritten(&["-device", &taken], &options);
    drop(other);
    rewritten(&["-device", &taken], &Default::default());
}

#[test]
fn logs_are_appended_to_unless_they_are_to_be_truncated() {
    let logs: [(&[&str], &[&str]); 8] = [
        (
            &["-serial", "null", "-serial", "file:/nonexistent/a,b"],
            &[
                "-serial",
                "null",
                "-chardev",
                "file,id=serial1,path=/nonexistent/a,,b,append=on",
                "-serial",
                "chardev:serial1",
            ],
        ),
        (
            &["-serial", "mon:file:/nonexistent/a"],
            &[
                "-chardev",
                "file,id=serial0,path=/nonexistent/a,append=on,mux=on",
                "-serial",
                "chardev:serial0",
                "-mon",
                "serial0",
            ],
        ),
        (
            &["-debugcon", "file:/nonexistent/a"],
            &[
                "-chardev",
                "file,id=debugcon,path=/nonexistent/a,append=on",
                "-debugcon",
                "chardev:debugcon",
            ],
        ),
        (
            &["-chardev", "file,id=c,path=/nonexistent/a"],
            &["-chardev", "file,id=c,path=/nonexistent/a,append=on"],
        ),
        (
            &[
                "-chardev",
                r#"{"backend":{"data":{"out":"/nonexistent/a"},"type":"file"},"id":"c"}"#,
            ],
            &[
                "-chardev",
                r#"{"backend":{"data":{"append":true,"out":"/nonexistent/a"},"type":"file"},"id":"c"}"#,
            ],
        ),
        (
            &["-chardev", "pty,id=c,logfile=/nonexistent/a"],
            &["-chardev", "pty,id=c,logfile=/nonexistent/a,logappend=on"],
        ),
        (
            &["-serial", "tcp:h:1,logfile=/nonexistent/a"],
            &["-serial", "tcp:h:1,logfile=/nonexistent/a,logappend=on"],
        ),
        (
            &["-parallel", "file:/nonexistent/a"],
            &[
                "-chardev",
                "file,id=parallel0,path=/nonexistent/a,append=on",
                "-parallel",
                "chardev:parallel0",
            ],
        ),
    ];
    let truncated = RewriteOptions { truncate_logs: true, ..Default::default() };
    for (args, expected) in logs {
        let (line, notes) = rewritten(args, &Default::default());
        assert_eq!(line, expected);
        let [note] = &notes[..] else { panic!("{notes:?}") };
        assert!(note.what.contains("/nonexistent/a"), "{note:?}");
        assert!(note.why.contains("`RewriteOptions::truncate_logs`"), "{note:?}");
        let (line, notes) = rewritten(args, &truncated);
        assert_eq!((line, notes.len()), (args.iter().map(|arg| arg.to_string()).collect(), 0));
    }
    for kept in ["file:/dev/null", "null", "pty"] {
        let (line, notes) = rewritten(&["-serial", kept], &Default::default());
        assert_eq!((line[1].as_str(), notes.len()), (kept, 0));
    }
    for kept in ["file,id=c,path=/nonexistent/a,append=off", "file,id=c,path=/nonexistent/a,append"]
    {
        assert_eq!(rewritten(&["-chardev", kept], &Default::default()).0, ["-chardev", kept]);
    }
}
