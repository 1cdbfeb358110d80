//! Landlock for all threads of a process.
//!
//! landlock_restrict_self(2) restricts the thread that calls it (and, from Linux 7.0 on, others
//! if asked to). So every thread is sent a signal, whose handler makes the call: glibc changes
//! the user of a process in the same way (nptl(7)). Threads that start later inherit what
//! their creator has.

use std::collections::HashSet;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, IntoRawFd};
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long threads may take to answer. They do within microseconds, unless the kernel holds
/// them in a read of a disk that has died.
const PATIENCE: Duration = Duration::from_secs(2);

/// Threads that can be restricted at once.
const MOST: usize = 512;

/// The ruleset that the handler enforces.
static RULESET: AtomicI32 = AtomicI32::new(-1);

/// The threads that have answered, in order: their ids, negative where the kernel refused.
static ANSWERS: [AtomicI32; MOST] = [const { AtomicI32::new(0) }; MOST];
static NEXT: AtomicUsize = AtomicUsize::new(0);

/// Restricts the calling thread.
pub(super) fn restrict(ruleset: BorrowedFd<'_>) -> io::Result<()> {
    match restrict_by(ruleset.as_raw_fd()) {
        true => Ok(()),
        false => Err(io::Error::last_os_error()),
    }
}

/// Restricts the calling thread. It makes system calls only, so that a signal handler may call
/// it.
fn restrict_by(ruleset: i32) -> bool {
    // SAFETY: prctl(2) with PR_SET_NO_NEW_PRIVS and landlock_restrict_self(2) take numbers.
    unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
            && libc::syscall(libc::SYS_landlock_restrict_self, ruleset, 0) == 0
    }
}

extern "C" fn answer(_signal: libc::c_int) {
    // SAFETY: errno is the thread's own; what the signal has interrupted finds it unchanged.
    let errno = unsafe { *libc::__errno_location() };
    let done = restrict_by(RULESET.load(Ordering::Acquire));
    // SAFETY: gettid(2) takes nothing.
    let thread = unsafe { libc::gettid() };
    if let Some(slot) = ANSWERS.get(NEXT.fetch_add(1, Ordering::AcqRel)) {
        slot.store(if done { thread } else { -thread }, Ordering::Release);
    }
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
}

/// Restricts every thread of this process. One that answers too late is restricted then: the
/// handler stays, and so does a copy of the ruleset.
pub(super) fn restrict_all(ruleset: BorrowedFd<'_>) -> io::Result<()> {
    // The handler has one ruleset at a time.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let kept = ruleset.try_clone_to_owned()?.into_raw_fd();
    NEXT.store(0, Ordering::Release);
    ANSWERS.iter().for_each(|slot| slot.store(0, Ordering::Release));
    RULESET.store(kept, Ordering::Release);
    // Nobody else uses this one: the C library keeps the first real-time signals to itself,
    // and SIGRTMIN counts from behind them (signal(7)).
    let signal = libc::SIGRTMIN() + 7;
    handle(signal)?;
    ask_others(signal)?;
    // Last: this thread reads which threads there are.
    restrict(ruleset)
}

/// Has [`answer`] handle a signal.
fn handle(signal: libc::c_int) -> io::Result<()> {
    // SAFETY: an action of zeros is a valid one; its parts are set below.
    let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    action.sa_sigaction = answer as extern "C" fn(libc::c_int) as libc::sighandler_t;
    action.sa_flags = libc::SA_RESTART | libc::SA_ONSTACK;
    // SAFETY: the action outlives the call; its handler is async-signal-safe
    // (signal-safety(7)): it makes system calls and uses atomics.
    match unsafe { libc::sigaction(signal, &raw const action, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Sends every other thread the signal, and waits until all that there are have answered.
fn ask_others(signal: libc::c_int) -> io::Result<()> {
    let process = std::process::id() as i32;
    let deadline = Instant::now() + PATIENCE;
    let mut asked = HashSet::new();
    loop {
        // Taken before the list: a thread that is started by one that has not answered yet is
        // on the list of a later round.
        let answered = answers();
        if let Some(refused) = answered.iter().find(|id| **id < 0) {
            return Err(io::Error::other(format!("thread {} can't be restricted", -refused)));
        }
        let threads = other_threads()?;
        let Some(silent) = threads.iter().find(|thread| !answered.contains(thread)) else {
            return Ok(());
        };
        if Instant::now() > deadline {
            return Err(io::Error::other(format!("thread {silent} does not answer")));
        }
        for thread in threads.iter().filter(|thread| asked.insert(**thread)) {
            // SAFETY: tgkill(2) takes numbers, and the signal is handled. It fails where the
            // thread has ended.
            unsafe { libc::syscall(libc::SYS_tgkill, process, *thread, signal) };
        }
        std::thread::yield_now();
    }
}

fn answers() -> HashSet<i32> {
    ANSWERS.iter().map(|slot| slot.load(Ordering::Acquire)).filter(|id| *id != 0).collect()
}

fn other_threads() -> io::Result<Vec<i32>> {
    // SAFETY: gettid(2) takes nothing.
    let this = unsafe { libc::gettid() };
    let entries = std::fs::read_dir("/proc/self/task")?;
    let ids = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().parse().ok()));
    let others = ids.filter_map(io::Result::transpose);
    others.filter(|id| id.as_ref().ok() != Some(&this)).collect()
}
