//! PID 1 of the test guest: an oracle that knows what its memory should hold.
//!
//! It fills memory with pages that it can compute anew, lets writers rewrite them,
//! each verified first, and answers questions. A page that a snapshot or a revert
//! lost, mixed up, zeroed or took from another moment is noticed. See README.md.

mod answers;
mod button;
mod clock;
mod config;
mod content;
mod devices;
mod disk;
mod load;
mod records;
mod region;
mod root;
mod serial;

use std::error::Error;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use answers::{Oracle, hex, uptime_ms};
use config::{Config, Fill};
use content::mix;
use load::Writers;
use region::Region;
use serial::Serial;

/// Memory left to the kernel and to this program beside the region, in bytes.
const RESERVE: u64 = 24 << 20;

/// Reports on bad pages that wait to be printed; more are only counted.
const WAITING_REPORTS: usize = 32;

/// The kernel's console, where heartbeats go.
static CONSOLE: OnceLock<Serial> = OnceLock::new();

type Failure = Box<dyn Error>;

fn main() {
    if std::process::id() != 1 {
        eprintln!("the oracle is PID 1 of a test guest; it does nothing elsewhere");
        std::process::exit(2);
    }
    std::panic::set_hook(Box::new(|info| halt(&format!("{info}").replace('\n', " "))));
    match run() {
        Ok(()) => halt("the questions have ended"),
        Err(reason) => halt(&reason.to_string()),
    }
}

/// Says why, and stops the machine.
fn halt(reason: &str) -> ! {
    if let Some(console) = CONSOLE.get() {
        console.line(format_args!("ORACLE PANIC {reason}"));
    }
    loop {
        // SAFETY: takes no pointer. Should it fail, there is nothing else to do.
        unsafe { libc::reboot(libc::RB_HALT_SYSTEM) };
    }
}

fn run() -> Result<(), Failure> {
    mount(c"devtmpfs", c"/dev")?;
    mount(c"proc", c"/proc")?;
    fs::create_dir_all("/sys")?;
    mount(c"sysfs", c"/sys")?;
    let opened = Serial::open("/dev/ttyS0")?;
    let console = CONSOLE.get_or_init(|| opened);
    let port = Arc::new(Serial::open("/dev/ttyS1")?);

    let config = Config::parse(&fs::read_to_string("/proc/cmdline")?)?;
    for module in &config.modules {
        load_module(module)?;
    }
    if let Some(device) = &config.root {
        match root::switch(device)? {}
    }
    button::heed()?;
    // The region is sized to what is there; let the kernel not doubt it.
    fs::write("/proc/sys/vm/overcommit_memory", "1")?;

    let (reports, waiting) = sync_channel(WAITING_REPORTS);
    let recipe = content::Recipe {
        nonce: nonce()?,
        random_percent: config.random_percent,
        zero_percent: config.zero_percent,
    };
    let region = Arc::new(Region::map(pages_to_fill(config.fill)?, recipe, reports)?);
    let reporter = Arc::clone(&port);
    thread::spawn(move || report(console, &reporter, &waiting));

    let start = Instant::now();
    region.fill();
    let fill = start.elapsed();

    let writers = Writers::start(&region, config.load);
    let beat_ms = Arc::new(AtomicU64::new(config.beat_ms));
    console.line(format_args!(
        "ORACLE READY nonce={} pages={} fill_ms={}",
        hex(region.nonce()),
        region.pages(),
        fill.as_millis(),
    ));
    let (heart_region, heart_ms) = (Arc::clone(&region), Arc::clone(&beat_ms));
    thread::spawn(move || beat(console, &heart_region, &heart_ms));

    let mut oracle = Oracle { region, writers, beat_ms, fill, records: None, held: None };
    let mut lines = port.lines()?;
    loop {
        let line = lines.next()?;
        if !line.is_empty() {
            port.line(format_args!("{}", oracle.answer(&line)));
        }
    }
}

/// Prints what is found bad. The console comes first: at the other port, somebody
/// may be connected who doesn't read.
fn report(console: &Serial, port: &Serial, waiting: &Receiver<String>) {
    for report in waiting {
        console.line(format_args!("ORACLE BAD {report}"));
        port.line(format_args!("ORACLE BAD {report}"));
    }
}

/// Prints `BEAT number uptime_ms verified bad` at the interval asked for.
fn beat(console: &Serial, region: &Region, interval_ms: &AtomicU64) {
    let counters = region.counters();
    let mut due = Instant::now();
    let mut number = 0;
    loop {
        let interval = Duration::from_millis(interval_ms.load(Ordering::Relaxed));
        if interval.is_zero() {
            thread::sleep(Duration::from_millis(50));
            due = Instant::now();
            continue;
        }
        number += 1;
        console.line(format_args!(
            "BEAT {number} {} {} {}",
            uptime_ms(),
            counters.verified.load(Ordering::Relaxed),
            counters.bad.load(Ordering::Relaxed),
        ));
        // Beats that were missed stay missed.
        due = (due + interval).max(Instant::now());
        thread::sleep(due.saturating_duration_since(Instant::now()));
    }
}

/// How many pages the region gets.
fn pages_to_fill(fill: Fill) -> Result<u64, Failure> {
    let meminfo = fs::read_to_string("/proc/meminfo")?;
    let available_kib: u64 = meminfo
        .lines()
        .find_map(|line| {
            line.strip_prefix("MemAvailable:")?.strip_suffix("kB")?.trim().parse().ok()
        })
        .ok_or("/proc/meminfo does not tell MemAvailable")?;
    let usable = (available_kib << 10).saturating_sub(RESERVE);
    let bytes = match fill {
        Fill::Mib(mib) => mib.saturating_mul(1 << 20),
        Fill::Percent(percent) => usable / 100 * percent,
    };
    if bytes > usable {
        let usable = usable >> 20;
        return Err(format!("oracle.fill_mib={} but only {usable} are free", bytes >> 20).into());
    }
    match bytes >> 12 {
        0 => Err("there is no memory to fill".into()),
        pages => Ok(pages),
    }
}

/// 128 bits that differ at every boot. They need not be secret: where the kernel
/// has no good randomness yet, the clocks make up for it.
fn nonce() -> Result<[u64; 2], Failure> {
    let mut nonce = [0u64; 2];
    let len = size_of_val(&nonce);
    // SAFETY: the kernel writes at most `len` bytes, which `nonce` has.
    let got = unsafe { libc::getrandom(nonce.as_mut_ptr().cast(), len, libc::GRND_INSECURE) };
    if got != len as isize {
        return Err("getrandom gave no nonce".into());
    }
    // SAFETY: every x86-64 processor has a time stamp counter.
    let ticks = unsafe { std::arch::x86_64::_rdtsc() };
    let wall = std::time::UNIX_EPOCH.elapsed().unwrap_or_default().as_nanos() as u64;
    Ok([nonce[0] ^ mix(ticks), nonce[1] ^ mix(wall)])
}

fn mount(kind: &'static std::ffi::CStr, place: &'static std::ffi::CStr) -> Result<(), Failure> {
    // SAFETY: all strings end in NUL and live on; no data is passed.
    let done =
        unsafe { libc::mount(kind.as_ptr(), place.as_ptr(), kind.as_ptr(), 0, std::ptr::null()) };
    match done {
        0 => Ok(()),
        _ => Err(format!("mount {kind:?}: {}", std::io::Error::last_os_error()).into()),
    }
}

fn load_module(name: &str) -> Result<(), Failure> {
    let path = format!("/modules/{name}.ko");
    let file = File::open(&path).map_err(|e| format!("{path}: {e}"))?;
    // SAFETY: the descriptor is open and the parameters are an empty C string.
    let done = unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0) };
    match done {
        0 => Ok(()),
        _ => Err(format!("loading {path}: {}", std::io::Error::last_os_error()).into()),
    }
}
