//! QEMU's own ways of bringing a guest back, from files made of the same image.
//!
//! Each file is made by a QEMU of its own, brought back from the image: after one
//! migration QEMU before 9.0 refuses another. The guest is *not* paused for it, since
//! QEMU would then leave it paused at the other end as well, and a command more would
//! count as time: with the highest `downtime-limit`, QEMU stops the guest by itself
//! after its first tenth of a second.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

use super::runs::{How, Recorder, bring_back};
use super::setup::{Disk, Run, Setup};
use super::{BenchError, Cache, Method, Sample, Skipped};
use crate::cancel::Cancellation;
use crate::guest::{Process, rewrite};
use crate::machine::{DiskRole, QemuVersion};
use crate::qmp::{Events, Qmp};
use crate::revert::Held;

/// How long QEMU may take to write or to load a file.
const TIMEOUT: Duration = Duration::from_secs(1800);

/// How often QEMU is asked how far it is, where no time is taken.
const POLL: Duration = Duration::from_millis(20);

/// The highest bandwidth in bytes a second: no other traffic competes with the migration.
const UNLIMITED: u64 = 1 << 40;

/// The highest `downtime-limit`, in milliseconds (`MAX_MIGRATE_DOWNTIME` in QEMU).
const ANY_DOWNTIME_MS: u64 = 2_000_000;

/// Channels of multifd.
const CHANNELS: u64 = 2;

/// The snapshot's name in qcow2 disks.
const TAG: &str = "snapback-bench";

/// The name under which QEMU is given a file.
const FD_NAME: &str = "snapback-peer";

/// One of QEMU's own ways, ready to be run.
pub(super) struct Peer {
    pub method: Method,
    from: From,
}

/// What it loads.
enum From {
    /// A migration stream, or a mapped-ram file.
    File(PathBuf),
    /// Snapshots in disks, of which each run gets copies.
    Disks(Vec<Disk>),
}

/// Makes the files of all of QEMU's own ways; reports those that don't work here, with the reason.
pub(super) async fn make(
    setup: &Setup<'_>,
    cancel: &Cancellation,
    mut on_making: impl FnMut(Method),
) -> Result<(Vec<Peer>, Vec<Skipped>), BenchError> {
    let (mut peers, mut skipped) = (Vec::new(), Vec::new());
    let stream = setup.beside.path().join("stream");
    on_making(Method::Stream);
    let knows_mapped_ram = make_file(setup, &stream, &[], cancel).await?;
    peers.push(Peer { method: Method::Stream, from: From::File(stream) });

    let mapped = [Method::MappedRam, Method::MappedRamMultifd];
    if knows_mapped_ram {
        // Each is made as it will be loaded.
        for (method, capabilities) in
            mapped.into_iter().zip([&["mapped-ram"][..], &["mapped-ram", "multifd"]])
        {
            let file = setup.beside.path().join(method.name());
            on_making(method);
            make_file(setup, &file, capabilities, cancel).await?;
            peers.push(Peer { method, from: From::File(file) });
        }
    } else {
        let reason = "this QEMU has no mapped-ram, which came with QEMU 9.0";
        skipped.extend(mapped.map(|way| Skipped { way, reason: reason.into() }));
    }

    on_making(Method::LoadVm);
    match make_snapshot(setup, cancel).await? {
        Ok(disks) => peers.push(Peer { method: Method::LoadVm, from: From::Disks(disks) }),
        Err(reason) => skipped.push(Skipped { way: Method::LoadVm, reason }),
    }
    Ok((peers, skipped))
}

/// Saves the guest with QEMU's `migrate` into a file. Returns whether this QEMU has
/// mapped-ram.
async fn make_file(
    setup: &Setup<'_>,
    file: &Path,
    capabilities: &[&str],
    cancel: &Cancellation,
) -> Result<bool, BenchError> {
    let run = setup.run()?;
    let (_, mut held) = bring_back(setup, &run, &How::default(), cancel).await?;
    let written = tokio::select! {
        written = write_file(&held, file, capabilities) => written,
        () = cancel.requested() => Err(BenchError::Interrupted),
    };
    held.process.kill().await;
    written
}

async fn write_file(held: &Held, path: &Path, capabilities: &[&str]) -> Result<bool, BenchError> {
    let qmp = &held.qmp;
    incoming_gone(qmp).await?;
    let known = qmp.migration_capabilities().await?;
    configure(
        qmp,
        capabilities,
        &[("max-bandwidth", UNLIMITED), ("downtime-limit", ANY_DOWNTIME_MS)],
    )
    .await?;
    // Created here, with mode 0600.
    let file = File::options().write(true).create_new(true).mode(0o600).open(path);
    let file =
        file.map_err(|source| BenchError::File { doing: "made", path: path.into(), source })?;
    match has_file_uri(qmp.version()) {
        true => qmp.migrate(&format!("file:{}", path.display())).await?,
        false => {
            qmp.getfd(FD_NAME, file.as_fd()).await?;
            qmp.migrate(&format!("fd:{FD_NAME}")).await?;
        }
    }
    let done = async {
        loop {
            let info = qmp.migration_info().await?;
            match info.status.as_deref() {
                Some("completed") => return Ok(()),
                Some("failed" | "cancelled") => {
                    let said = info.error_desc.unwrap_or_else(|| held.process.log_tail());
                    return Err(BenchError::Peer { doing: "save the guest", said });
                }
                _ => tokio::time::sleep(POLL).await,
            }
        }
    };
    within(done, "save the guest").await?;
    Ok(known.iter().any(|(name, _)| name == "mapped-ram"))
}

/// Turns capabilities on and sets parameters, in which multifd has its channels.
async fn configure(
    qmp: &Qmp,
    capabilities: &[&str],
    parameters: &[(&str, u64)],
) -> Result<(), BenchError> {
    let on: Vec<_> = capabilities.iter().map(|name| (*name, true)).collect();
    if !on.is_empty() {
        qmp.set_migration_capabilities(&on).await?;
    }
    let mut parameters: serde_json::Map<String, Value> =
        parameters.iter().map(|(name, value)| ((*name).to_owned(), json!(value))).collect();
    if capabilities.contains(&"multifd") {
        parameters.insert("multifd-channels".into(), json!(CHANNELS));
    }
    if !parameters.is_empty() {
        qmp.execute("migrate-set-parameters", parameters).await?;
    }
    Ok(())
}

/// Waits until QEMU has cleaned up after its incoming migration: another migration that starts
/// before that fails.
async fn incoming_gone(qmp: &Qmp) -> Result<(), BenchError> {
    let gone = async {
        loop {
            let instances = qmp.execute("query-yank", ()).await?;
            let migrates = |list: &Vec<Value>| list.iter().any(|one| one["type"] == "migration");
            if !instances.as_array().is_some_and(migrates) {
                return Ok(());
            }
            tokio::time::sleep(POLL).await;
        }
    };
    within(gone, "end the migration that brought the guest").await
}

/// Migration to and from a file by its name came with QEMU 8.2.
fn has_file_uri(version: &QemuVersion) -> bool {
    (version.major, version.minor) >= (8, 2)
}

/// Has QEMU save the guest into copies of its disks. Says why where that can't be.
async fn make_snapshot(
    setup: &Setup<'_>,
    cancel: &Cancellation,
) -> Result<Result<Vec<Disk>, String>, BenchError> {
    if setup.machine.disks.iter().any(|disk| disk.role == DiskRole::Captured) {
        return Ok(Err("the guest's disks are frozen, and a snapshot is kept in a disk".into()));
    }
    if setup.disks.is_empty() {
        return Ok(Err("the guest has no writable disk to keep a snapshot in".into()));
    }
    let mut disks = Vec::new();
    for disk in &setup.disks {
        let file = setup.beside.path().join(format!("{}.snapshot", disk.name));
        disk.copy_to(&file)?;
        disks.push(Disk { file, ..disk.clone() });
    }
    let files = disks.iter().map(|disk| disk.file.as_path());
    let run = setup.run_with(&as_rules(&disks, files))?;
    let (_, mut held) = bring_back(setup, &run, &How::default(), cancel).await?;
    let saved = tokio::select! {
        saved = save_snapshot(&held.qmp) => saved,
        () = cancel.requested() => Err(BenchError::Interrupted),
    };
    held.process.kill().await;
    Ok(saved?.map(|()| disks))
}

async fn save_snapshot(qmp: &Qmp) -> Result<Result<(), String>, BenchError> {
    let writable =
        |disk: &crate::qmp::BlockDevice| disk.writable && disk.driver.as_deref() != Some("qcow2");
    if qmp.block_devices().await?.iter().any(writable) {
        return Ok(Err("the guest has a writable disk that is not qcow2".into()));
    }
    incoming_gone(qmp).await?;
    let said = monitor(qmp, &format!("savevm {TAG}")).await?;
    Ok(if said.is_empty() { Ok(()) } else { Err(format!("QEMU's savevm says: {said}")) })
}

/// Has QEMU's human monitor carry out a command. It says nothing when that went well.
async fn monitor(qmp: &Qmp, command: &str) -> Result<String, BenchError> {
    let arguments = json!({ "command-line": command });
    let answer = qmp.with_timeout(TIMEOUT).execute("human-monitor-command", arguments).await?;
    Ok(answer.as_str().unwrap_or_default().trim().to_owned())
}

/// Rules that put each of these files in the place of a disk.
fn as_rules<'a>(
    disks: &[Disk],
    files: impl IntoIterator<Item = &'a Path>,
) -> Vec<(String, String)> {
    let rule = |(disk, file): (&Disk, &Path)| (disk.recorded.clone(), file.display().to_string());
    disks.iter().zip(files).map(rule).collect()
}

/// Measures one run of a peer.
pub(super) async fn measure(
    setup: &Setup<'_>,
    peer: &Peer,
    cache: Cache,
    round: u32,
    cancel: &Cancellation,
) -> Result<Sample, BenchError> {
    let (run, files) = match &peer.from {
        From::File(file) => (setup.run()?, vec![file.clone()]),
        From::Disks(disks) => {
            let mut copies = Vec::new();
            for disk in disks {
                // In the place of the last run's, on the image's file system.
                let copy = setup.beside.path().join(&disk.name);
                disk.copy_to(&copy)?;
                copies.push(copy);
            }
            let rules = as_rules(disks, copies.iter().map(PathBuf::as_path));
            (setup.run_with(&rules)?, copies)
        }
    };
    setup.settle(cache, &files)?;
    let mut recorder = Recorder::new(setup, &run);
    let started = tokio::select! {
        started = start(setup, peer, &run) => started,
        () = cancel.requested() => Err(BenchError::Interrupted),
    };
    let (mut process, qmp) = started?;
    recorder.ready(process.pid());
    let loaded = tokio::select! {
        loaded = load(&qmp, peer, &process) => loaded,
        () = cancel.requested() => Err(BenchError::Interrupted),
    };
    let signs = match loaded {
        Ok(()) => {
            recorder.running_complete();
            recorder.signs(&mut process, cancel).await
        }
        Err(error) => Err(error),
    };
    process.kill().await;
    Ok(recorder.sample(setup, peer.method, cache, round, None, signs?))
}

/// Starts a QEMU that waits for a migration, or, for a snapshot in its disks, one that
/// is paused and waits for nothing.
async fn start(setup: &Setup<'_>, peer: &Peer, run: &Run) -> Result<(Process, Qmp), BenchError> {
    let mut options = run.rewrite(setup.options);
    options.paused = matches!(peer.from, From::Disks(_));
    let mut plan = rewrite(&setup.machine, &options)?;
    if options.paused {
        let at = plan.argv.iter().rposition(|argument| argument == "-incoming");
        at.map(|at| plan.argv.drain(at..at + 2));
    }
    Ok(Process::start(plan).await?)
}

/// Has QEMU load what there is, until the guest runs.
async fn load(qmp: &Qmp, peer: &Peer, process: &Process) -> Result<(), BenchError> {
    // QEMU may be too busy to answer while it loads.
    let qmp = qmp.with_timeout(TIMEOUT);
    let mut events = qmp.events();
    let path = match &peer.from {
        From::File(path) => path,
        From::Disks(_) => {
            let said = monitor(&qmp, &format!("loadvm {TAG}")).await?;
            if !said.is_empty() {
                return Err(BenchError::Peer { doing: "load the snapshot", said });
            }
            qmp.cont().await?;
            return resumed(&mut events, process).await;
        }
    };
    let capabilities: &[&str] = match peer.method {
        Method::MappedRam => &["events", "mapped-ram"],
        Method::MappedRamMultifd => &["events", "mapped-ram", "multifd"],
        _ => &["events"],
    };
    configure(&qmp, capabilities, &[]).await?;
    if has_file_uri(qmp.version()) {
        qmp.migrate_incoming(&format!("file:{}", path.display())).await?;
    } else {
        let file = File::open(path).map_err(|source| BenchError::File {
            doing: "opened",
            path: path.clone(),
            source,
        })?;
        qmp.getfd(FD_NAME, file.as_fd()).await?;
        qmp.migrate_incoming(&format!("fd:{FD_NAME}")).await?;
    }
    resumed(&mut events, process).await
}

async fn resumed(events: &mut Events, process: &Process) -> Result<(), BenchError> {
    let failed =
        |event: &crate::qmp::Event| event.name == "MIGRATION" && event.data["status"] == "failed";
    let said = || BenchError::Peer { doing: "load the guest", said: process.log_tail() };
    match events.wait(|event| event.name == "RESUME" || failed(event), TIMEOUT).await {
        Ok(event) if event.name == "RESUME" => Ok(()),
        // QEMU ends when it fails, or says so.
        Ok(_) => Err(said()),
        Err(_) if !process.log_tail().is_empty() => Err(said()),
        Err(error) => Err(error.into()),
    }
}

/// Gives up after [`TIMEOUT`].
async fn within<T>(
    work: impl Future<Output = Result<T, BenchError>>,
    doing: &'static str,
) -> Result<T, BenchError> {
    let said = || format!("nothing for {} s", TIMEOUT.as_secs());
    let done = tokio::time::timeout(TIMEOUT, work).await;
    done.unwrap_or_else(|_| Err(BenchError::Peer { doing, said: said() }))
}
