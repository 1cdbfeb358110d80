//! Against a real QEMU where it can be provoked there, against a scripted socket
//! only for faults that a real one never shows.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream as StdStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixListener;

use super::commands::{MigrationInfo, parse_ram_blocks};
use super::event::EVENT_QUEUE;
use super::*;

const LONG: Duration = Duration::from_secs(60);

/// A real QEMU with a control socket in a directory of its own; ended when dropped.
struct RealQemu {
    child: Child,
    directory: TempDir,
}

impl RealQemu {
    async fn start(extra: &[&str]) -> (RealQemu, Qmp) {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("qmp");
        let child = Command::new("qemu-system-x86_64")
            .args(["-S", "-nodefaults", "-display", "none", "-machine", "pc", "-m", "32"])
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", socket.display()))
            .args(extra)
            .stdin(Stdio::null())
            .process_group(0)
            .spawn()
            .unwrap();
        let qemu = RealQemu { child, directory };
        while !socket.exists() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        // The file appears at bind(2), a moment before listen(2).
        let qmp = loop {
            match Qmp::connect(&socket, LONG).await {
                Err(QmpError::Connect { .. }) => tokio::task::yield_now().await,
                other => break other.unwrap(),
            }
        };
        (qemu, qmp)
    }

    fn socket(&self) -> std::path::PathBuf {
        self.directory.path().join("qmp")
    }
}

impl Drop for RealQemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test]
async fn a_real_qemu_answers_what_saving_and_reverting_ask() {
    let disk = tempfile::NamedTempFile::new().unwrap();
    disk.as_file().set_len(1 << 20).unwrap();
    let drive = format!("file={},format=raw,if=virtio,id=disk0", disk.path().display());
    let (qemu, qmp) = RealQemu::start(&["-drive", &drive]).await;

    assert!(qmp.version().major >= 7, "{}", qmp.version());
    assert_eq!(qmp.peer_pid(), Some(qemu.child.id() as i32));
    assert_eq!(qmp.status().await.unwrap(), "prelaunch");
    assert!(qmp.machine_type().await.unwrap().starts_with("pc-i440fx-"));

    let blocks = qmp.ram_blocks().await.unwrap();
    let ram = blocks.iter().find(|block| block.name == "pc.ram").unwrap();
    assert_eq!((ram.page_size, ram.used_len, ram.total_len), (4096, 32 << 20, 32 << 20));
    let tables = blocks.iter().find(|block| block.name == "/rom@etc/acpi/tables").unwrap();
    assert!(tables.used_len < tables.total_len);

    let disks = qmp.block_devices().await.unwrap();
    assert_eq!(disks.len(), 1);
    assert_eq!(disks[0].device, "disk0");
    assert_eq!(disks[0].file.as_deref(), disk.path().to_str());
    assert_eq!(disks[0].driver.as_deref(), Some("raw"));
    assert!(disks[0].writable && disks[0].qdev.is_some() && disks[0].node_name.is_some());

    assert_eq!(qmp.migration_info().await.unwrap(), MigrationInfo::default());
    qmp.set_migration_capabilities(&[("events", true), ("postcopy-ram", true)]).await.unwrap();
    let capabilities = qmp.migration_capabilities().await.unwrap();
    assert!(capabilities.contains(&("postcopy-ram".to_owned(), true)));
    let refused = qmp.set_migration_capabilities(&[("background-snapshot", true)]).await;
    assert!(matches!(refused, Err(QmpError::Command { .. })), "{refused:?}");
    qmp.quit().await.unwrap();
}

#[tokio::test]
async fn blocked_migration_is_told_with_its_reason() {
    let memory = "memory-backend-ram,id=shared,size=1M,share=on";
    let device = "ivshmem-plain,memdev=shared,master=off";
    let (_qemu, qmp) = RealQemu::start(&["-object", memory, "-device", device]).await;
    let reasons = qmp.migration_info().await.unwrap().blocked_reasons;
    assert!(reasons.iter().any(|reason| reason.contains("ivshmem")), "{reasons:?}");
    let error = qmp.migrate_incoming("defer").await.unwrap_err();
    assert!(matches!(&error, QmpError::Command { command, .. } if command == "migrate-incoming"));
}

#[tokio::test]
async fn errors_carry_qemus_class_and_words() {
    let (_qemu, qmp) = RealQemu::start(&[]).await;
    let error = qmp.execute("no-such-command", ()).await.unwrap_err();
    assert!(error.is_command_not_found());
    assert!(error.to_string().contains("no-such-command"), "{error}");
    let error = qmp.closefd("nothing").await.unwrap_err();
    assert!(matches!(error, QmpError::Command { ref class, .. } if class == "GenericError"));
}

#[tokio::test]
async fn a_descriptor_reaches_qemu() {
    let (_qemu, qmp) = RealQemu::start(&[]).await;
    let (ours, theirs) = StdStream::pair().unwrap();
    qmp.getfd("stream", theirs.as_fd()).await.unwrap();
    drop(theirs);
    qmp.migrate("fd:stream").await.unwrap();
    ours.set_nonblocking(true).unwrap();
    let mut ours = UnixStream::from_std(ours).unwrap();
    let mut magic = [0; 4];
    ours.read_exact(&mut magic).await.unwrap();
    assert_eq!(&magic, b"QEVM");
    drop(ours);

    let (_ours, theirs) = StdStream::pair().unwrap();
    qmp.getfd("unused", theirs.as_fd()).await.unwrap();
    qmp.closefd("unused").await.unwrap();
    qmp.migrate_cancel().await.unwrap();
}

#[tokio::test]
async fn events_come_in_order_and_with_their_time() {
    let (_qemu, qmp) = RealQemu::start(&[]).await;
    let mut events = qmp.events();
    qmp.cont().await.unwrap();
    qmp.stop().await.unwrap();
    let resume = events.wait(|event| event.name == "RESUME", LONG).await.unwrap();
    let stop = events.wait(|event| event.name == "STOP", LONG).await.unwrap();
    assert!(resume.timestamp > 0 && resume.timestamp <= stop.timestamp);
    let none = events.wait(|_| true, Duration::from_millis(1)).await;
    assert!(matches!(none, Err(QmpError::EventTimeout { .. })));
}

#[tokio::test]
async fn a_second_client_is_told_that_the_place_is_taken() {
    let (qemu, _qmp) = RealQemu::start(&[]).await;
    let error = Qmp::connect(qemu.socket(), Duration::from_millis(200)).await.unwrap_err();
    assert!(matches!(error, QmpError::NoGreeting { .. }), "{error}");
}

#[tokio::test]
async fn a_human_monitor_is_not_taken_for_qmp() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("hmp");
    let monitor = format!("unix:{},server=on,wait=off", path.display());
    let (_qemu, _qmp) = RealQemu::start(&["-monitor", &monitor]).await;
    let error = Qmp::connect(&path, LONG).await.unwrap_err();
    assert!(matches!(&error, QmpError::NotQmp { got } if got.contains("QEMU")), "{error}");
}

#[tokio::test]
async fn a_pretty_printing_socket_works_too() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("pretty");
    let pretty = format!("unix:{},server=on,wait=off", path.display());
    let (_qemu, _qmp) = RealQemu::start(&["-qmp-pretty", &pretty]).await;
    let qmp = Qmp::connect(&path, LONG).await.unwrap();
    assert_eq!(qmp.status().await.unwrap(), "prelaunch");
    assert!(!qmp.ram_blocks().await.unwrap().is_empty());
}

#[tokio::test]
async fn a_qemu_that_dies_ends_commands_and_events() {
    let (mut qemu, qmp) = RealQemu::start(&[]).await;
    let mut events = qmp.events();
    qemu.child.kill().unwrap();
    loop {
        match events.next().await {
            Ok(_) => {}
            Err(error) => break assert!(matches!(error, QmpError::Gone { .. }), "{error}"),
        }
    }
    assert!(matches!(qmp.status().await, Err(QmpError::Gone { .. })));
    assert!(qmp.ended().is_some());
    assert!(matches!(qmp.events().next().await, Err(QmpError::Gone { .. })));
    qmp.quit().await.unwrap();
}

#[tokio::test]
async fn nobody_listening_is_told_by_path() {
    let error = Qmp::connect("/nonexistent/qmp", LONG).await.unwrap_err();
    assert!(error.to_string().contains("/nonexistent/qmp"), "{error}");
}

// From here on: what a real QEMU never does.

const GREETING: &[u8] =
    b"{\"QMP\":{\"version\":{\"qemu\":{\"micro\":1,\"minor\":2,\"major\":7},\"package\":\"\"},\"capabilities\":[]}}\r\n";

/// Listens, greets as told, answers `qmp_capabilities` when `greeting` is QMP's,
/// then hands the connection to `script`.
async fn scripted<F, T>(greeting: &'static [u8], script: F) -> Result<Qmp, QmpError>
where
    F: FnOnce(UnixStream) -> T + Send + 'static,
    T: Future<Output = ()> + Send,
{
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.write_all(greeting).await.unwrap();
        if greeting == GREETING {
            let mut request = [0; 256];
            let _ = stream.read(&mut request).await.unwrap();
            stream.write_all(b"{\"return\":{},\"id\":1}\r\n").await.unwrap();
        }
        script(stream).await;
    });
    Qmp::connect(&path, Duration::from_millis(500)).await
}

async fn hold(mut stream: UnixStream) {
    let _ = stream.read(&mut [0; 1024]).await;
    let _ = stream.read(&mut [0; 1024]).await;
}

#[tokio::test]
async fn greetings_that_are_not_qmp() {
    let silence = scripted(b"", hold).await.unwrap_err();
    assert!(matches!(silence, QmpError::NoGreeting { .. }), "{silence}");
    let closed = scripted(b"", |_| async {}).await.unwrap_err();
    assert!(matches!(closed, QmpError::ClosedBeforeGreeting { .. }), "{closed}");
    let torn = scripted(b"{\"QMP\":", |_| async {}).await.unwrap_err();
    assert!(matches!(torn, QmpError::ClosedBeforeGreeting { .. }), "{torn}");
    for garbage in [&b"SSH-2.0-OpenSSH_9\r\n"[..], b"\xff\xfe\0\n", b"{\"QMP\":7}\n", b"no newline"]
    {
        let error = scripted(garbage, hold).await.unwrap_err();
        assert!(matches!(error, QmpError::NotQmp { .. }), "{error}");
    }
}

#[tokio::test]
async fn garbage_ends_the_connection_with_its_reason() {
    let qmp = scripted(GREETING, |mut stream| async move {
        let _ = stream.read(&mut [0; 256]).await;
        stream.write_all(b"{\"return\": nonsense}\r\n").await.unwrap();
        hold(stream).await;
    })
    .await
    .unwrap();
    let error = qmp.status().await.unwrap_err();
    assert!(matches!(&error, QmpError::Gone { reason } if reason.contains("nonsense")), "{error}");
}

#[tokio::test]
async fn a_message_without_end_is_cut_off() {
    let qmp = scripted(GREETING, |mut stream| async move {
        let _ = stream.read(&mut [0; 256]).await;
        // Fails once we hang up, which is the point.
        let chunk = vec![b'['; 1 << 20];
        while stream.write_all(&chunk).await.is_ok() {}
    })
    .await
    .unwrap();
    let error = qmp.with_timeout(LONG).status().await.unwrap_err();
    assert!(matches!(&error, QmpError::Gone { reason } if reason.contains("longer")), "{error}");
}

#[tokio::test]
async fn a_close_inside_an_answer_is_not_an_answer() {
    let qmp = scripted(GREETING, |mut stream| async move {
        let _ = stream.read(&mut [0; 256]).await;
        stream.write_all(b"{\"return\": {\"status\"").await.unwrap();
    })
    .await
    .unwrap();
    let error = qmp.status().await.unwrap_err();
    assert!(matches!(&error, QmpError::Gone { reason } if reason.contains("middle")), "{error}");
}

#[tokio::test]
async fn a_late_answer_goes_to_nobody() {
    let qmp = scripted(GREETING, |mut stream| async move {
        // Answers the first command only when the second one has come.
        let mut requests = Vec::new();
        while requests.iter().filter(|&&byte| byte == b'\n').count() < 2 {
            stream.read_buf(&mut requests).await.unwrap();
        }
        stream.write_all(b"{\"return\":{\"status\":\"late\"},\"id\":2}\r\n").await.unwrap();
        stream.write_all(b"{\"return\":{\"status\":\"second\"},\"id\":3}\r\n").await.unwrap();
        hold(stream).await;
    })
    .await
    .unwrap();
    let first = qmp.with_timeout(Duration::from_millis(20)).status().await;
    assert!(matches!(first, Err(QmpError::Timeout { .. })));
    assert_eq!(qmp.status().await.unwrap(), "second");
}

#[tokio::test]
async fn lost_events_are_reported() {
    let qmp = scripted(GREETING, |mut stream| async move {
        let _ = stream.read(&mut [0; 256]).await;
        for _ in 0..EVENT_QUEUE + 5 {
            stream.write_all(b"{\"event\":\"STOP\"}\n").await.unwrap();
        }
        stream.write_all(b"{\"return\":{\"status\":\"x\"},\"id\":2}\r\n").await.unwrap();
        hold(stream).await;
    })
    .await
    .unwrap();
    let mut events = qmp.events();
    qmp.status().await.unwrap();
    assert!(matches!(events.next().await, Err(QmpError::EventsLost(5))));
    assert_eq!(events.next().await.unwrap().name, "STOP");
}

#[test]
fn tables_of_ram_blocks() {
    let nameless = "Block Name PSize Offset Used Total\n  4 KiB 0x0 0x1000 0x1000\n";
    assert_eq!(parse_ram_blocks(nameless), Ok(Vec::new()));
    let blocks = parse_ram_blocks(
        "   Block Name    PSize   Offset   Used   Total\r\n\
         \u{20}  a name with / and 4 KiB    2 MiB  0x0 0x200000 0x400000\r\n\r\n",
    )
    .unwrap();
    assert_eq!(blocks[0].name, "a name with / and 4 KiB");
    assert_eq!((blocks[0].page_size, blocks[0].used_len), (2 << 20, 2 << 20));
    assert_eq!(blocks[0].address, None);
    // QEMU 9 and later add columns.
    let table =
        "Block Name PSize Offset Used Total HVA RO\n pc.ram 4 KiB 0x0 0x1000 0x2000 0x7f00 rw\n";
    let blocks = parse_ram_blocks(table).unwrap();
    assert_eq!((blocks[0].used_len, blocks[0].total_len), (0x1000, 0x2000));
    assert_eq!(blocks[0].address, Some(0x7f00));
    for bad in ["", "nonsense", "Block Name PSize Offset Used Total\n pc.ram 4 KiB 0x0 0x1000"] {
        assert!(parse_ram_blocks(bad).is_err(), "{bad:?}");
    }
}
