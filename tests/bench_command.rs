//! `snapback bench` on a real guest: are the numbers there, and is nothing left behind?

mod support;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;

use support::{
    Disk, Fill, Format, Guest, GuestOptions, Qemu, Result, SOON, spawn_bound, wait_until,
};

/// A guest that lives on, its image, and a folder for what a bench makes elsewhere.
struct Bench {
    guest: Guest,
    images: TempDir,
    temporary: TempDir,
    disks: TempDir,
}

impl Bench {
    /// A guest with a disk that is part of its image.
    fn new(qemu: Qemu) -> Result<Bench> {
        let bench = Bench::boot(qemu, Format::Raw)?;
        bench.save("vm.snap", &[])?;
        Ok(bench)
    }

    /// A guest with a disk that isn't, and an image on top of another.
    fn of_a_chain(qemu: Qemu) -> Result<Bench> {
        let bench = Bench::boot(qemu, Format::Qcow2)?;
        bench.save("parent.snap", &["--disks", "none"])?;
        let parent = bench.images.path().join("parent.snap").display().to_string();
        bench.save("vm.snap", &["--disks", "none", "--parent", &parent])?;
        Ok(bench)
    }

    fn boot(qemu: Qemu, format: Format) -> Result<Bench> {
        let disks = tempfile::tempdir()?;
        let file = disks.path().join(format!("disk.{}", format.name()));
        let disk = Disk { format, ..Disk::new("disk", &file) };
        disk.make(4)?;
        let guest = Guest::boot(&GuestOptions {
            qemu,
            mib: 128,
            fill: Fill::Percent(50),
            disks: vec![disk],
            ..GuestOptions::default()
        })?;
        // What is cold can't lie in memory.
        let images = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
        Ok(Bench { guest, images, temporary: tempfile::tempdir()?, disks })
    }

    fn save(&self, image: &str, more: &[&str]) -> Result<()> {
        let mut save = Command::new(env!("CARGO_BIN_EXE_snapback"));
        save.arg("save").arg(self.images.path().join(image)).args(more);
        let saved = save.arg("--qmp").arg(&self.guest.qmp_path).output()?;
        assert!(saved.status.success(), "{}", String::from_utf8_lossy(&saved.stderr));
        Ok(())
    }

    /// The program, its command and the image.
    fn command(&self, name: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_snapback"));
        command.arg(name).arg(self.images.path().join("vm.snap"));
        command.env("TMPDIR", self.temporary.path());
        command
    }

    /// Arguments of a bench that watches the living guest's console, as recorded: each
    /// run's own is found by that name.
    fn bench(&self) -> Command {
        let mut command = self.command("bench");
        let console = self.guest.dir.join("serial0.log");
        command
            .args([
                "--json",
                "--warm-up",
                "0",
                "--sign",
                "^BEAT [0-9]+ ",
                "--nth",
                "3",
                "--sign-in",
            ])
            .arg(console);
        command
    }

    /// Nothing but images is there, and no process that was started for a run.
    fn assert_nothing_left(&self) -> Result<()> {
        let images = names_in(self.images.path())?;
        assert!(images.iter().all(|name| name.ends_with(".snap")), "{images:?}");
        assert_eq!(names_in(self.temporary.path())?, [""; 0]);
        // The disk, and where it is frozen the overlay in which the living guest goes on.
        let disks = names_in(self.disks.path())?;
        assert_eq!(disks.len(), 3 - images.len(), "{disks:?}");
        let folder = self.temporary.path().display().to_string();
        wait_until(SOON, "QEMUs to be gone", || {
            fs::read_dir("/proc").is_ok_and(|processes| {
                let command_line = |p: fs::DirEntry| fs::read(p.path().join("cmdline")).ok();
                let mut lines = processes.flatten().filter_map(command_line);
                !lines.any(|line| String::from_utf8_lossy(&line).contains(&folder))
            })
        })
    }
}

fn names_in(folder: &Path) -> Result<Vec<String>> {
    let names = fs::read_dir(folder)?.map(|entry| Ok(entry?.file_name().display().to_string()));
    names.collect()
}

/// Two runs of each way, with peers: every number is there.
fn measures_all_ways(bench: Bench, peers: &[&str], skipped: &[&str]) -> Result<Bench> {
    let report = bench.temporary.path().join("report.html");
    let [saved, csv] = ["runs.json", "runs.csv"].map(|name| bench.temporary.path().join(name));
    let mut command = bench.bench();
    command.args(["--runs", "2", "--peers", "--report"]).arg(&report);
    let done = command.arg("--save").arg(&saved).arg("--csv").arg(&csv).output()?;
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let text = String::from_utf8(done.stdout)?;
    let events: Vec<Value> =
        text.lines().map(serde_json::from_str).collect::<std::result::Result<_, _>>()?;
    let named = |name: &str| events.iter().filter(|e| e["event"] == name).collect::<Vec<_>>();

    let ours = ["uffd", "uffd+ws", "uffd+preload", "socket", "pool"];
    let reset = ["reset"];
    let reset = reset.iter().filter(|way| !skipped.contains(way));
    let ways: Vec<&str> = ours.iter().chain(reset.clone()).chain(peers).copied().collect();
    let runs = named("run");
    let order: Vec<&str> = runs.iter().filter_map(|run| run["way"].as_str()).collect();
    assert_eq!(order, [ways.clone(), ways.clone()].concat(), "the ways take turns");
    for run in &runs {
        assert_eq!(run["cache"], "warm");
        for time in ["start_ms", "running_ms"] {
            assert!(run[time].as_f64().is_some_and(|ms| ms > 0.0), "{time} in {run}");
        }
        // On a loaded machine the guest may be heard before QEMU's word that it runs.
        let [first, nth] = ["first_sign_ms", "nth_sign_ms"].map(|time| run[time].as_f64());
        assert!(first.is_some_and(|ms| ms >= 0.0) && nth >= first, "{run}");
        for number in ["server_cpu_s", "qemu_cpu_s", "running_rss_bytes", "complete_rss_bytes"] {
            assert!(run[number].as_f64().is_some_and(|n| n > 0.0), "{number} in {run}");
        }
        let is_ours = ours.contains(&run["way"].as_str().unwrap_or_default());
        for number in ["faults", "fill_bytes_per_s", "data_bytes_per_s"] {
            assert_eq!(run[number].is_number(), is_ours, "{number} in {run}");
        }
        assert_eq!(run["complete_ms"].as_f64().is_some_and(|ms| ms > 0.0), is_ours, "{run}");
    }
    let found: Vec<&str> = named("skipped").iter().filter_map(|s| s["way"].as_str()).collect();
    assert_eq!(found, skipped);

    let [summary] = named("summary")[..] else { panic!("one summary in {text}") };
    assert_eq!(summary["ways"].as_array().map(Vec::len), Some(ways.len()));
    for way in summary["ways"].as_array().into_iter().flatten() {
        assert_eq!(way["metrics"]["running_ms"]["n"], 2, "{way}");
    }
    // To running, to the first sign, to the third and to complete.
    let ratios = (ours.len() + reset.count()) * peers.len() * 4;
    assert_eq!(summary["ratios"].as_array().map(Vec::len), Some(ratios));
    assert!(summary["subject"]["working_set_pages"].as_u64() > Some(0), "{summary}");

    let page = fs::read_to_string(&report)?;
    assert!(page.contains("<svg") && page.contains("mapped-ram"), "{page}");
    assert!(!page.contains("http"), "it refers to nothing elsewhere");
    fs::remove_file(report)?;
    compares_with_itself(&saved)?;
    // A head, and a line for each run.
    assert_eq!(fs::read_to_string(&csv)?.lines().count(), runs.len() + 1);
    fs::remove_file(saved)?;
    fs::remove_file(csv)?;
    bench.assert_nothing_left()?;
    Ok(bench)
}

/// Nothing has changed, and of two runs nothing is judged.
fn compares_with_itself(saved: &Path) -> Result<()> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_snapback"));
    let done = command.args(["bench", "--json", "--compare"]).args([saved, saved]).output()?;
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let events: Vec<Value> = String::from_utf8(done.stdout)?
        .lines()
        .map(serde_json::from_str)
        .collect::<std::result::Result<_, _>>()?;
    let changes: Vec<&Value> = events.iter().filter(|event| event["event"] == "change").collect();
    assert!(!changes.is_empty());
    for change in changes {
        assert_eq!((&change["change"], &change["verdict"]), (&0.0.into(), &"open".into()));
    }
    Ok(())
}

#[test]
fn measures_all_ways_on_qemu_7() -> Result<()> {
    let skipped = ["mapped-ram", "mapped-ram+multifd", "loadvm"];
    let bench = measures_all_ways(Bench::new(Qemu::V7)?, &["stream"], &skipped)?;

    // And an interrupt in the midst of runs ends it, leaving nothing.
    let mut command = bench.bench();
    command.args(["--runs", "1000"]).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut program = spawn_bound(command)?;
    let stdout = program.stdout.take().ok_or("there is no stdout")?;
    let mut lines = BufReader::new(stdout).lines();
    while !lines.next().ok_or("no run was told")??.contains("\"event\":\"run\"") {}
    kill(Pid::from_raw(program.id() as i32), Signal::SIGINT)?;
    let rest: Vec<String> = lines.collect::<std::result::Result<_, _>>()?;
    assert_eq!(program.wait()?.code(), Some(130));
    let mut said = String::new();
    program.stderr.take().ok_or("there is no stderr")?.read_to_string(&mut said)?;
    assert!(said.contains("interrupted"), "{said}{rest:?}");
    bench.assert_nothing_left()
}

#[test]
fn measures_all_ways_on_qemu_10() -> Result<()> {
    let peers = ["stream", "mapped-ram", "mapped-ram+multifd", "loadvm"];
    let bench = measures_all_ways(Bench::of_a_chain(Qemu::V10)?, &peers, &["reset"])?;

    // Warm and cold, of every file of the chain.
    let done = bench.bench().args(["--runs", "1", "--cold"]).output()?;
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let events: Vec<Value> = String::from_utf8(done.stdout)?
        .lines()
        .map(serde_json::from_str)
        .collect::<std::result::Result<_, _>>()?;
    let runs: Vec<_> = events.iter().filter(|event| event["event"] == "run").collect();
    let caches: Vec<_> = runs.iter().filter_map(|run| run["cache"].as_str()).collect();
    assert_eq!(caches, [["warm"; 5], ["cold"; 5]].concat());
    bench.assert_nothing_left()?;

    // A parent that can't be made cold is told before any run: here, one that is in use.
    let parent = File::open(bench.images.path().join("parent.snap"))?;
    // SAFETY: the mapping is only read, and nobody changes the file.
    let parent = unsafe { memmap2::Mmap::map(&parent)? };
    assert!(parent.iter().map(|byte| u64::from(*byte)).sum::<u64>() > 0);
    let done = bench.bench().args(["--runs", "1", "--cold"]).output()?;
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(!done.status.success() && said.contains("parent.snap"), "{said}");
    bench.assert_nothing_left()
}
