//! Guests of a pool taken and released, beside plain reverts of the same image:
//!
//!     cargo bench --features internals --bench pools -- --mib 512,2048 --takes 1000
//!
//! All that docs/performance.md says of pools:
//!
//!     cargo bench --features internals --bench pools -- --mib 512,2048 --takes 1000 \
//!         --cycles 600 --clients 1,2,3,4 --clones 32
//!
//! Boots a guest, saves it, and has `snapback daemon` keep a pool of it. Each take waits until a
//! guest is armed, and is then timed by a client with a connection of its own, from its request
//! until the answer, and by the daemon, from the request until QEMU has told that the guest runs.
//! Prints tables for docs/performance.md.

#[path = "image_sweep/guests.rs"]
mod guests;
#[path = "../tests/support/mod.rs"]
mod support;

use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use clap::Parser;
use guests::{Reverted, load_times, snapback};
use serde_json::{Value, json};
#[cfg(feature = "libvirt")]
use support::libvirt::{Libvirt, domain_options};
use support::{
    Attached, Disk, Fill, Format, Guest, GuestOptions, Qemu, Result, http_request, percentile,
    wait_for,
};

/// Pages of the guest's in a MiB.
const PAGES_A_MIB: u64 = 256;

/// How long a guest may take to be armed.
const PATIENCE: Duration = Duration::from_secs(300);

#[derive(Parser)]
struct Options {
    /// RAM of the guest, in MiB
    #[arg(long, value_delimiter = ',', default_value = "512")]
    mib: Vec<u64>,
    /// How many guests are taken, one after the other
    #[arg(long, default_value_t = 100)]
    takes: usize,
    /// How many guests wait
    #[arg(long, default_value_t = 4)]
    armed: u64,
    /// What is in place while they do
    #[arg(long, default_value = "working_set")]
    preload: String,
    /// Resets through the daemon, and as many bare ones
    #[arg(long, default_value_t = 50)]
    resets: usize,
    /// Plain reverts beside them, QEMU's own loads, and libvirt's own reverts (with the feature `libvirt`)
    #[arg(long, default_value_t = 5)]
    peers: usize,
    /// How long guests are taken and released without a break, in seconds, each of which reads
    /// 64 MiB and writes 4 MiB
    #[arg(long, default_value_t = 0)]
    cycles: u64,
    /// By how many clients at the same time, one after the other
    #[arg(long, value_delimiter = ',', default_value = "1,2,3,4")]
    clients: Vec<usize>,
    /// How many guests the daemon arms at a time
    #[arg(long, default_value_t = 1)]
    arming: usize,
    /// How many guests share memory by mapping: what they have together, and each of its own
    #[arg(long, default_value_t = 0)]
    clones: u64,
    /// Only have guests that share memory taken and released without a break
    #[arg(long, requires_all = ["cycles", "clones"])]
    only_shared: bool,
    /// The QEMU, by its number
    #[arg(long, default_value = "10", value_parser = Qemu::parse)]
    qemu: Qemu,
    /// What `cargo bench` says to every benchmark
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> ExitCode {
    support::exit_code("pools", run())
}

fn run() -> Result<()> {
    let options = Options::parse();
    for mib in &options.mib {
        let folder = tempfile::Builder::new().prefix("snapback-pools-").tempdir()?;
        let image = folder.path().join("vm.snap");
        let recorded = saved(&options, *mib, &image)?;
        println!("A guest of {mib} MiB, {:?}, {} armed:\n", options.qemu, options.armed);
        println!("| what | p50, ms | p99 | most | |\n|---|---|---|---|---|");
        let mut daemon = Daemon::start(folder.path(), options.arming)?;
        if !options.only_shared {
            daemon.pool(&image, &options)?;
            daemon.measure_takes(&options)?;
            daemon.measure_armed(&options)?;
            daemon.measure_resets("p", options.resets)?;
            daemon.cycles("p", &options)?;
        }
        if options.clones > 0 {
            daemon.share(&image, &options)?;
        }
        drop(daemon);
        let mut times = Vec::new();
        for number in 0..options.peers {
            let place = folder.path().join(format!("revert-{number}"));
            times.push(Reverted::start(&image, &recorded, &place, &[], "running")?.told);
        }
        std::fs::remove_dir_all(&recorded)?;
        row("a plain revert, to running", &mut times, "");
        if options.peers > 0 {
            let mut times = loads(&options, *mib, folder.path())?;
            row("`loadvm` (snapshot-load) in a QEMU that is kept", &mut times, "");
            #[cfg(feature = "libvirt")]
            row("`virsh snapshot-revert`", &mut libvirts_reverts(&options, *mib)?, "");
        }
        println!();
    }
    Ok(())
}

fn guest_options(options: &Options, mib: u64) -> GuestOptions {
    GuestOptions {
        qemu: options.qemu,
        mib,
        fill: Fill::Mib((mib / 2).min(1024)),
        beat_ms: 1,
        ..GuestOptions::default()
    }
}

/// Boots a guest and saves it, with nothing to do but heartbeats, and has its working set recorded. Returns where its files
/// were.
fn saved(options: &Options, mib: u64, image: &Path) -> Result<PathBuf> {
    let mut guest = Guest::boot(&guest_options(options, mib))?;
    // It goes on to tell heartbeats.
    guest.oracle.set_writers(0, 0)?;
    let words = ["save".as_ref(), "--qmp".as_ref(), guest.qmp_path.as_os_str(), image.as_os_str()];
    snapback(&words)?;
    let recorded = guest.dir.clone();
    drop(guest.kill());
    // QEMU is started where it was.
    std::fs::create_dir_all(&recorded)?;
    snapback(&[
        "working-set".as_ref(),
        image.as_os_str(),
        "--harvest".as_ref(),
        "--window".as_ref(),
        "3".as_ref(),
    ])?;
    Ok(recorded)
}

/// How long QEMU's own loads of an equal guest take, in milliseconds.
fn loads(options: &Options, mib: u64, folder: &Path) -> Result<Vec<f64>> {
    let disk = Disk { format: Format::Qcow2, ..Disk::new("d0", &folder.join("disk.qcow2")) };
    disk.make(64)?;
    let mut guest = Guest::boot(&GuestOptions {
        virtio_blk: true,
        disks: vec![disk],
        ..guest_options(options, mib)
    })?;
    guest.oracle.set_writers(0, 0)?;
    load_times(&guest.qmp_path, options.peers)
}

/// How long libvirt's reverts of an equal domain to its internal snapshot take, in milliseconds.
#[cfg(feature = "libvirt")]
fn libvirts_reverts(options: &Options, mib: u64) -> Result<Vec<f64>> {
    const NAME: &str = "measured";
    let libvirt = Libvirt::start()?;
    let mut domain = domain_options(NAME).with_two_disks();
    // A raw disk can't have an internal snapshot.
    domain.disks.retain(|disk| disk.target == "sda");
    (domain.guest.mib, domain.guest.fill) = (mib, guest_options(options, mib).fill);
    let mut guest = libvirt.boot(&domain)?;
    guest.oracle.set_writers(0, 0)?;
    // libvirt's, and not ours to kill.
    std::mem::forget(guest);
    libvirt.virsh(&["snapshot-create-as", NAME, "peer"])?;
    let revert = |_| {
        let start = Instant::now();
        libvirt.virsh(&["snapshot-revert", NAME, "peer"])?;
        Ok(ms(start))
    };
    (0..options.peers).map(revert).collect()
}

/// A daemon with one pool. Dropping it ends it and the guests of its pool.
struct Daemon {
    process: Child,
    socket: PathBuf,
    folder: PathBuf,
}

impl Daemon {
    fn start(folder: &Path, arming: usize) -> Result<Daemon> {
        let socket = folder.join("daemon.sock");
        let mut command = Command::new(env!("CARGO_BIN_EXE_snapback"));
        command.args(["daemon", "--json", "--arming", &arming.to_string(), "--state"]);
        command.arg(folder.join("state"));
        command.arg("--listen").arg(format!("unix:{}", socket.display()));
        let mut process = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
        let mut line = String::new();
        BufReader::new(process.stdout.take().ok_or("no output")?).read_line(&mut line)?;
        Ok(Daemon { process, socket, folder: folder.to_owned() })
    }

    fn pool(&mut self, image: &Path, options: &Options) -> Result<()> {
        let pool = json!({
            "name": "p", "image": image, "armed": options.armed, "preload": options.preload,
            // What a guest has not asked for matters to the next one's start alone.
            "fill_delay_ms": 50,
        });
        self.ask("POST", "/v1/pools", &pool.to_string()).map(drop)
    }

    /// One request, by a connection of its own.
    fn ask(&self, method: &str, path: &str, body: &str) -> Result<Value> {
        let (status, body) =
            http_request(UnixStream::connect(&self.socket)?, method, path, "", body)?;
        match status {
            200 | 201 => Ok(serde_json::from_str(&body)?),
            204 => Ok(Value::Null),
            _ => Err(format!("{method} {path}: {status} {body}").into()),
        }
    }

    fn wait_armed(&self, armed: u64) -> Result<()> {
        self.wait_armed_of("p", armed)
    }

    fn wait_armed_of(&self, pool: &str, armed: u64) -> Result<()> {
        let path = format!("/v1/pools/{pool}");
        wait_for(PATIENCE, "armed guests", || {
            let ready = self.ask("GET", &path, "")?["ready"].as_u64();
            Ok((ready >= Some(armed)).then_some(()))
        })
    }

    fn release(&self, guest: &Value) -> Result<()> {
        let id = guest["id"].as_str().ok_or("no id")?;
        self.ask("DELETE", &format!("/v1/guests/{id}"), "").map(drop)
    }

    /// Takes guests, one after the other, each of which is released.
    fn measure_takes(&mut self, options: &Options) -> Result<()> {
        let (mut client, mut daemon, mut beat) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..options.takes {
            self.wait_armed(options.armed)?;
            let start = Instant::now();
            let guest = self.ask("POST", "/v1/pools/p/take", "")?;
            client.push(ms(start));
            daemon.push(guest["ms"].as_f64().ok_or("no time")?);
            let log = Path::new(guest["dir"].as_str().ok_or("no dir")?).join("serial0.log");
            while std::fs::metadata(&log).map_or(0, |file| file.len()) == 0 {
                if start.elapsed() > PATIENCE {
                    return Err("no heartbeat".into());
                }
                std::thread::sleep(Duration::from_micros(100));
            }
            beat.push(ms(start));
            self.release(&guest)?;
        }
        let server = support::resident_kib(self.process.id())? / 1024;
        row("a take, as its client sees it", &mut client, "");
        row("a take, from the request until RESUME", &mut daemon, &format!("daemon {server} MiB"));
        row("the guest's first heartbeat", &mut beat, "");
        Ok(())
    }

    /// What a guest that waits costs.
    fn measure_armed(&mut self, options: &Options) -> Result<()> {
        self.wait_armed(options.armed)?;
        let mut private = Vec::new();
        for pid in children(self.process.id())? {
            if std::fs::read_to_string(format!("/proc/{pid}/comm"))?.starts_with("qemu") {
                private.push(private_kib(pid)? as f64 / 1024.0);
            }
        }
        private.sort_by(f64::total_cmp);
        let most = private.last().ok_or("no guest waits")?;
        println!(
            "| private memory of a QEMU that waits, MiB | {:.0} | | {most:.0} | |",
            private[0]
        );
        Ok(())
    }

    /// Resets a guest through the daemon, and as often without it.
    fn measure_resets(&self, pool: &str, resets: usize) -> Result<()> {
        if resets == 0 {
            return Ok(());
        }
        let take = format!("/v1/pools/{pool}/take");
        let guest = self.ask("POST", &take, r#"{"timeout_s":60}"#)?;
        let path = format!("/v1/guests/{}/reset", guest["id"].as_str().ok_or("no id")?);
        let at = path.trim_end_matches("/reset");
        wait_for(PATIENCE, "its writes to be tracked", || {
            Ok((self.ask("GET", at, "")?["resettable"] == true).then_some(()))
        })?;
        let pid = guest["qemu_pid"].as_u64().ok_or("no process")? as u32;
        let mut attached = Attached::to(pid, Path::new(guest["dir"].as_str().ok_or("no dir")?))?;
        let (mut client, mut bare) = (Vec::new(), Vec::new());
        for _ in 0..resets {
            attached.oracle.ask(&format!("sweep 0 {PAGES_A_MIB}"))?;
            let start = Instant::now();
            let reset = self.ask("POST", &path, "")?;
            client.push(ms(start));
            bare.push(reset["ms"].as_f64().ok_or("no time")?);
        }
        let shares = if pool == "s" { ", shared memory" } else { "" };
        row(&format!("a reset by the daemon, 1 MiB written{shares}"), &mut client, "");
        row("of it the bare reset", &mut bare, "");
        // Dropping what is attached ends its QEMU.
        drop(attached);
        wait_for(PATIENCE, "the guest to be forgotten", || {
            Ok((self.ask("GET", "/v1/guests", "")? == json!([])).then_some(()))
        })
    }

    /// Has clients take guests of a pool, have each work, and release it, without a break: as many
    /// clients as there are to be, one number after the other.
    fn cycles(&self, pool: &str, options: &Options) -> Result<()> {
        if options.cycles == 0 {
            return Ok(());
        }
        for clients in &options.clients {
            self.wait_armed_of(pool, options.armed)?;
            self.cycle(pool, Duration::from_secs(options.cycles), *clients)?;
        }
        Ok(())
    }

    fn cycle(&self, pool: &str, time: Duration, clients: usize) -> Result<()> {
        let (start, before) = (Instant::now(), self.busy()?);
        let one = || -> Result<Vec<Cycle>> {
            let mut cycles = Vec::new();
            while start.elapsed() < time {
                cycles.push(self.one_cycle(pool)?);
            }
            Ok(cycles)
        };
        let cycles: Vec<Cycle> = std::thread::scope(|scope| {
            let clients: Vec<_> =
                (0..clients).map(|_| scope.spawn(|| one().map_err(|e| e.to_string()))).collect();
            let of = |client: std::thread::ScopedJoinHandle<
                '_,
                std::result::Result<Vec<Cycle>, String>,
            >| {
                client.join().map_err(|_| "a client has panicked".to_owned())?
            };
            clients.into_iter().map(of).collect::<std::result::Result<Vec<_>, String>>()
        })?
        .concat();
        let (seconds, after) = (start.elapsed().as_secs_f64(), self.busy()?);
        let each =
            |of: fn(&Cycle) -> f64| cycles.iter().map(of).sum::<f64>() / cycles.len().max(1) as f64;
        let busy = |of: fn(&Busy) -> f64| (of(&after) - of(&before)) / cycles.len().max(1) as f64;
        println!(
            "| {clients} clients{} without a break for {seconds:.0} s: {:.1} takes a second; each waits \
             {:.1} ms for its guest, which works for {:.1} ms, and {:.1} ms for its end | | | | \
             processors, ms a take: {:.0} in all, QEMU until its release {:.0} user and {:.0} system, \
             the daemon {:.0}; idle {:.0}. Daemon {} MiB, {} descriptors |",
            if pool == "s" { ", shared memory," } else { "" },
            cycles.len() as f64 / seconds,
            each(|cycle| cycle.taken),
            each(|cycle| cycle.worked),
            each(|cycle| cycle.released),
            busy(|busy| busy.all),
            each(|cycle| cycle.user),
            each(|cycle| cycle.system),
            busy(|busy| busy.daemon),
            busy(|busy| busy.idle),
            support::resident_kib(self.process.id())? / 1024,
            std::fs::read_dir(format!("/proc/{}/fd", self.process.id()))?.count(),
        );
        Ok(())
    }

    fn one_cycle(&self, pool: &str) -> Result<Cycle> {
        let (read, written) = (64 * PAGES_A_MIB, 4 * PAGES_A_MIB);
        let start = Instant::now();
        let take = format!("/v1/pools/{pool}/take");
        let guest = self.ask("POST", &take, r#"{"timeout_s":60}"#)?;
        let (taken, begun) = (ms(start), Instant::now());
        let pid = guest["qemu_pid"].as_u64().ok_or("no process")? as u32;
        let folder = Path::new(guest["dir"].as_str().ok_or("no dir")?);
        let mut oracle = support::Oracle::connect(&folder.join("serial1.sock"))?;
        oracle.ask(&format!("sweep {read} {written}"))?;
        let worked = ms(begun);
        drop(oracle);
        let [user, system] = processor_ms(pid)?;
        let ended = Instant::now();
        self.release(&guest)?;
        Ok(Cycle { taken, worked, released: ms(ended), user, system })
    }

    /// What processors have done so far.
    fn busy(&self) -> Result<Busy> {
        let stat = std::fs::read_to_string("/proc/stat")?;
        let fields = stat.lines().next().ok_or("no processors")?.split_whitespace().skip(1);
        let ticks: Vec<f64> = fields.filter_map(|field| field.parse().ok()).take(8).collect();
        let [user, nice, system, idle, wait, interrupts, soft, _] = ticks[..] else {
            return Err("/proc/stat is not as expected".into());
        };
        let all = (user + nice + system + interrupts + soft) * TICK_MS;
        let daemon = processor_ms(self.process.id())?.iter().sum();
        Ok(Busy { all, idle: (idle + wait) * TICK_MS, daemon })
    }

    /// What guests have that share memory, each once it has run for a while.
    fn share(&self, image: &Path, options: &Options) -> Result<()> {
        let clones = options.clones;
        let pool = json!({
            "name": "s", "image": image, "armed": options.armed, "max": clones.max(16), "share": true,
        });
        self.ask("POST", "/v1/pools", &pool.to_string())?;
        self.cycles("s", options)?;
        let mut guests = Vec::new();
        for _ in 0..clones {
            guests.push(self.ask("POST", "/v1/pools/s/take", r#"{"timeout_s":300}"#)?);
        }
        // The last one needs its first memory as well.
        for guest in &guests {
            let log = Path::new(guest["dir"].as_str().ok_or("no dir")?).join("serial0.log");
            wait_for(PATIENCE, "heartbeats", || {
                Ok((std::fs::metadata(&log)?.len() > 2000).then_some(()))
            })?;
        }
        let mut private = Vec::new();
        let (mut resident, mut proportional) = (0, 0);
        for guest in &guests {
            let pid = guest["qemu_pid"].as_u64().ok_or("no process")? as u32;
            private.push(private_kib(pid)? as f64 / 1024.0);
            resident += rollup_kib(pid, "Rss:")?;
            proportional += rollup_kib(pid, "Pss:")?;
        }
        let all: f64 = private.iter().sum();
        let more = format!(
            "together {all:.0} MiB; what they share counts {:.0} MiB, and would be {:.0} if each had its own",
            proportional as f64 / 1024.0 - all,
            resident as f64 / 1024.0 - all,
        );
        let what = format!("private memory of each of {clones} QEMUs that share, MiB");
        row(&what, &mut private, &more);
        for guest in &guests {
            self.release(guest)?;
        }
        self.measure_resets("s", options.resets)?;
        self.ask("DELETE", "/v1/pools/s", "").map(drop)
    }
}

/// How long the parts of a cycle took, and what its QEMU took of processors, in milliseconds.
#[derive(Clone)]
struct Cycle {
    taken: f64,
    worked: f64,
    released: f64,
    user: f64,
    system: f64,
}

/// What processors have done, in milliseconds.
struct Busy {
    all: f64,
    idle: f64,
    daemon: f64,
}

/// The kernel counts in these (USER_HZ).
const TICK_MS: f64 = 10.0;

/// What a process has taken of processors, for itself and in the kernel, in milliseconds
/// (proc_pid_stat(5), fields 14 and 15).
fn processor_ms(pid: u32) -> Result<[f64; 2]> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let behind = stat.rsplit_once(") ").ok_or("no name")?.1;
    let field =
        |number: usize| behind.split(' ').nth(number - 3).and_then(|n| n.parse::<f64>().ok());
    let (user, system) = field(14).zip(field(15)).ok_or("no times")?;
    Ok([user * TICK_MS, system * TICK_MS])
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.ask("DELETE", "/v1/pools/p", "");
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = std::fs::remove_dir_all(self.folder.join("state"));
    }
}

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

fn children(of: u32) -> Result<Vec<u32>> {
    let mut children = Vec::new();
    for task in std::fs::read_dir(format!("/proc/{of}/task"))? {
        let text = std::fs::read_to_string(task?.path().join("children"))?;
        children.extend(text.split_whitespace().filter_map(|pid| pid.parse::<u32>().ok()));
    }
    Ok(children)
}

/// Memory that a process shares with nobody, in KiB.
fn private_kib(pid: u32) -> Result<u64> {
    rollup_kib(pid, "Private_")
}

/// What a process has of these kinds of memory together (proc_pid_smaps_rollup(5)), in KiB.
fn rollup_kib(pid: u32, kinds: &str) -> Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let of = |line: &str| line.split_whitespace().nth(1).and_then(|n| n.parse::<u64>().ok());
    Ok(text.lines().filter(|line| line.starts_with(kinds)).filter_map(of).sum())
}

fn row(what: &str, times: &mut [f64], more: &str) {
    if times.is_empty() {
        return;
    }
    let [p50, p99, most] = [50, 99, 100].map(|percent| percentile(times, percent));
    println!("| {what} | {p50:.2} | {p99:.2} | {most:.2} | {more} |");
}
