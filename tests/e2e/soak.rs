//! Many reverts in a row, by the program and by the library in this process: nothing that stays
//! grows. `make soak` runs it; SNAPBACK_SOAK sets the number of reverts.

use std::fs;
use std::path::Path;
use std::time::Instant;

use snapback::runs::RunOptions;
use snapback::{Cancellation, RevertOptions, revert};

use crate::harness::{Dir, Reverted, wait_gone};
use crate::shared::{Shared, shared};
use crate::support::{Attached, Pidfd, Qemu, Result, SOON, resident_kib};

/// Reverts where no other number is asked for.
const MANY: u64 = 1000;

/// Reverts after which everything is as large as it gets, and between two lines of the report.
const WARM: u64 = 50;

/// How much this process may grow beyond what it has then, in KiB: heaps are never quite even.
const SLACK_KIB: u64 = 8 << 10;

/// Threads that may be there for a moment: a runtime keeps those that blocked for a while.
const SLACK_THREADS: usize = 4;

/// The memory of every how many-th guest is checked.
const CHECKED: u64 = 25;

/// What could grow.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    /// Descriptors of this process.
    descriptors: usize,
    /// Threads of this process.
    threads: usize,
    /// Resident memory of this process.
    kib: u64,
    /// Processes of the reverts.
    processes: usize,
    /// Files in the folders of the reverts and of their records.
    files: usize,
}

impl Sizes {
    fn now(dir: &Dir) -> Result<Sizes> {
        let count = |path: &str| fs::read_dir(path).map(Iterator::count);
        Ok(Sizes {
            descriptors: count("/proc/self/fd")?,
            threads: count("/proc/self/task")?,
            kib: resident_kib(std::process::id())?,
            processes: dir.processes().len(),
            files: dir.names(".")?.len() + dir.recorded()?.len(),
        })
    }
}

/// Open files of the whole host (`fs.file-nr`, proc_sys_fs(5)), which others open too.
fn open_files() -> Result<String> {
    let numbers = fs::read_to_string("/proc/sys/fs/file-nr")?;
    Ok(format!("{} open files", numbers.split_whitespace().next().ok_or("no number")?))
}

#[test]
#[ignore = "it takes many minutes: `make soak`"]
fn a_thousand_reverts_leave_nothing() -> Result<()> {
    crate::harness::in_a_folder(soak)
}

fn soak(dir: &Dir) -> Result<()> {
    let asked = std::env::var("SNAPBACK_SOAK").ok().and_then(|number| number.parse().ok());
    let count: u64 = asked.unwrap_or(MANY);
    let runtime = tokio::runtime::Runtime::new()?;
    let shared = shared(Qemu::V10)?;
    let start = Instant::now();
    let mut warm = None;
    for number in 1..=count {
        let to = dir.make(&format!("reverted-{number}"))?;
        let mut guest = match number % 2 {
            0 => by_program(dir, shared, &to)?,
            _ => runtime.block_on(by_library(shared, &to))?,
        };
        if number % CHECKED == 0 {
            let verdict = guest.oracle.check()?;
            assert!(verdict.ok(), "{verdict:?}");
        }
        let pid = guest.pid;
        Pidfd::open(pid)?.kill()?;
        drop(guest);
        wait_gone(pid)?;
        fs::remove_dir_all(to)?;
        if number % WARM == 0 {
            let now = Sizes::now(dir)?;
            let seconds = start.elapsed().as_secs();
            println!(
                "{number:>5} reverts, {seconds:>5} s: {now:?}, {} on this host",
                open_files()?
            );
            let first = *warm.get_or_insert(now);
            let grown = now.descriptors > first.descriptors
                || now.threads > first.threads + SLACK_THREADS
                || now.kib > first.kib + SLACK_KIB
                || now.processes > first.processes
                || now.files > first.files;
            assert!(!grown, "{first:?} has become {now:?}");
        }
    }
    Ok(())
}

/// A guest that has all its memory, by the program.
fn by_program(dir: &Dir, shared: &Shared, to: &Path) -> Result<Attached> {
    let mut reverted = Reverted::of(dir.revert(&shared.image, &shared.from, to), to)?;
    reverted.log.wait_beat(0, SOON)?;
    reverted.resident()?;
    Ok(reverted.into_guest())
}

/// The same by the library.
async fn by_library(shared: &Shared, to: &Path) -> Result<Attached> {
    let mut options = RevertOptions::new(&shared.image);
    let pair = (crate::harness::text(&shared.from), crate::harness::text(to));
    options.rewrite.paths.push((pair.0.into(), pair.1.into()));
    options.run = Some(RunOptions::new());
    let reverted = revert(&options, Cancellation::new(), |_| {}).await?;
    Attached::to(reverted.pid as u32, to)
}
