//! Saves: `snapback save` as a program, and QEMU's own background snapshot.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use snapback::qmp::Qmp;

use crate::support::{Result, SOON};

/// How a save went.
pub struct Saved {
    /// From the order until the file is whole and synced.
    pub took: Duration,
    /// How long the guest stood still, in ms.
    pub pause_ms: f64,
}

/// A save by the program.
pub struct OurSave {
    pub saved: Saved,
    /// From the order until the moment of the snapshot is told, in ms.
    pub moment_ms: f64,
    /// Bytes of guest memory that are not zero.
    pub data_bytes: u64,
    /// The program's peak resident memory, in KiB (`ru_maxrss`, getrusage(2)). Not
    /// less than that of this process when it started the program, which shares its
    /// memory until it executes.
    pub peak_kib: u64,
}

/// Saves by the program, compressed so. It syncs the image itself.
pub fn ours(qmp: &Path, image: &Path, compress: &str) -> Result<OurSave> {
    let start = Instant::now();
    let mut child = Command::new(env!("CARGO_BIN_EXE_snapback"))
        .args(["save", "--compress", compress, "--json", "--qmp"])
        .args([qmp, image])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let (mut pause_ms, mut data_bytes, mut moment_ms) = (None, None, 0.0);
    let output = child.stdout.take().ok_or("the program has no output")?;
    for line in BufReader::new(output).lines() {
        let event: Value = serde_json::from_str(&line?)?;
        if event["event"] == "moment" {
            moment_ms = start.elapsed().as_secs_f64() * 1e3;
        }
        pause_ms = event["pause_ms"].as_f64().or(pause_ms);
        data_bytes = event["bytes"].as_u64().or(data_bytes);
    }
    let peak_kib = wait(child.id())?;
    let took = start.elapsed();
    let (Some(pause_ms), Some(data_bytes)) = (pause_ms, data_bytes) else {
        return Err("snapback told of no pause or no end".into());
    };
    Ok(OurSave { saved: Saved { took, pause_ms }, moment_ms, data_bytes, peak_kib })
}

/// Waits for a child that succeeds, and gives its peak resident memory in KiB.
fn wait(pid: u32) -> Result<u64> {
    let mut status = 0;
    // SAFETY: rusage is a struct of integers, for which zeros are a value.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers are to variables of ours that outlive the call.
    let waited = unsafe { libc::wait4(pid as i32, &mut status, 0, &mut usage) };
    if waited < 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    if status != 0 {
        return Err(format!("snapback save failed (wait status {status:#x})").into());
    }
    Ok(usage.ru_maxrss as u64)
}

/// Saves by QEMU: a background snapshot into `cat`, then a sync of the file, as the
/// program does.
pub async fn peer(qmp: &Path, stream: &Path) -> Result<Saved> {
    let qmp = Qmp::connect(qmp, SOON).await?;
    qmp.set_migration_capabilities(&[("background-snapshot", true)]).await?;
    // A background snapshot knows no limit, but what isn't set can't matter.
    qmp.execute("migrate-set-parameters", json!({"max-bandwidth": i64::MAX})).await?;
    let mut events = qmp.events();

    // The second name tells that `cat` has written all.
    let (file, done) = (stream.display(), stream.with_extension("done"));
    let start = Instant::now();
    qmp.migrate(&format!("exec:cat > {file} && ln {file} {}", done.display())).await?;
    let stopped = events.wait(|event| event.name == "STOP", SOON).await?.timestamp;
    let resumed = events.wait(|event| event.name == "RESUME", SOON).await?.timestamp;
    while !done.exists() {
        let info = qmp.migration_info().await?;
        if info.status.as_deref() == Some("failed") {
            return Err(format!("QEMU's own snapshot failed: {:?}", info.error_desc).into());
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    File::open(stream)?.sync_all()?;
    let took = start.elapsed();

    fs::remove_file(done)?;
    wait_over(&qmp).await?;
    qmp.set_migration_capabilities(&[("background-snapshot", false)]).await?;
    Ok(Saved { took, pause_ms: resumed.saturating_sub(stopped) as f64 / 1e3 })
}

/// Waits until QEMU's last migration has ended and been cleaned up: an immediate next
/// one can hang or abort QEMU. What it may still have to yank tells.
pub async fn wait_over(qmp: &Qmp) -> Result<()> {
    let start = Instant::now();
    loop {
        let status = qmp.migration_info().await?.status;
        let yank = qmp.execute("query-yank", ()).await?;
        let instances = yank.as_array().map_or(&[][..], Vec::as_slice);
        let at_it = instances.iter().any(|instance| instance["type"] == "migration");
        if status.is_none_or(|status| status == "completed") && !at_it {
            return Ok(());
        }
        if start.elapsed() > SOON {
            return Err("QEMU's migration does not end".into());
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
