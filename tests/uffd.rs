//! userfaultfd as the engine uses it: no page is overwritten, no waiting thread is forgotten,
//! a run is installed as a whole, and the end of a process is told apart from other errors.

#[path = "harness/mod.rs"]
mod harness;

use std::io::{BufRead, BufReader, Read};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, IntoRawFd};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;

use harness::{Backing, Engine, Pattern, Ram};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use snapback::host::pidfd::Pidfd;
use snapback::host::uffd::{FaultBuffer, Uffd, UffdError};
use snapback::memory::{Memory, MemoryError, Pace, prefetch};
use snapback::page::{BlockId, PAGE_SIZE, Page};
use snapback::transport::{DirectTransport, TransportError};

const SMALL: u64 = PAGE_SIZE as u64;

fn page(number: u64) -> Page {
    Page { block: BlockId(0), number }
}

/// Eight pages of either kind, registered.
fn registered(backing: Backing) -> (Arc<Ram>, Uffd) {
    let ram = Arc::new(Ram::new(&[(backing, 8)]).unwrap());
    let uffd = Uffd::create().unwrap();
    ram.register(&uffd);
    (ram, uffd)
}

fn bytes(pages: std::ops::Range<u8>) -> Vec<u8> {
    pages.flat_map(|n| [n + 1; PAGE_SIZE]).collect()
}

fn copy(uffd: &Uffd, ram: &Ram, first: u64, bytes: &[u8]) -> Result<(), UffdError> {
    // SAFETY: memory of the test's own.
    unsafe { uffd.copy(ram.address(BlockId(0)) + first * SMALL, bytes, SMALL) }
}

/// Installs a page and wakes nobody, as an installation does that has come between a
/// fault and its answer.
fn copy_silently(uffd: &Uffd, ram: &Ram, number: u64, bytes: &[u8; PAGE_SIZE]) {
    let fd = uffd.as_fd().try_clone_to_owned().unwrap();
    let target = ram.address(BlockId(0)) + number * SMALL;
    // SAFETY: a copy of a userfaultfd, which is nobody else's; `bytes` are copied to memory of
    // the test's own.
    let copied = unsafe {
        let uffd = userfaultfd::Uffd::from_raw_fd(fd.into_raw_fd());
        uffd.copy(bytes.as_ptr().cast(), target as *mut _, PAGE_SIZE, false)
    };
    assert_eq!(copied.unwrap(), PAGE_SIZE);
}

/// The address of the first fault; the test hangs without one.
fn fault(uffd: &Uffd) -> u64 {
    let mut faults = FaultBuffer::default();
    wait_readable(uffd);
    uffd.read_faults(&mut faults).unwrap().next().unwrap().address
}

fn wait_readable(uffd: &Uffd) {
    let mut fds = [PollFd::new(uffd.as_fd(), PollFlags::POLLIN)];
    assert_eq!(poll(&mut fds, PollTimeout::NONE), Ok(1));
}

fn first_words(ram: &Ram) -> Vec<u64> {
    let byte = |n| ram.word(page(n), 0).load(Ordering::Relaxed) & 0xff;
    (0..8).map(byte).collect()
}

#[test]
fn a_page_that_is_there_is_left_alone_and_its_waiters_are_woken() {
    for backing in [Backing::Anonymous, Backing::Memfd] {
        let (ram, uffd) = registered(backing);
        let guest = thread::spawn({
            let ram = Arc::clone(&ram);
            move || ram.word(page(3), 0).load(Ordering::Relaxed) & 0xff
        });
        let address = ram.address(BlockId(0)) + 3 * SMALL;
        assert_eq!(fault(&uffd), address);
        copy_silently(&uffd, &ram, 3, &[77; PAGE_SIZE]);
        copy(&uffd, &ram, 3, &[88; PAGE_SIZE]).unwrap();
        assert_eq!(guest.join().unwrap(), 77);
    }
}

#[test]
fn a_run_with_pages_that_are_there_is_filled_around_them() {
    for backing in [Backing::Anonymous, Backing::Memfd] {
        let (ram, uffd) = registered(backing);
        copy(&uffd, &ram, 2, &[102; PAGE_SIZE]).unwrap();
        copy(&uffd, &ram, 5, &[105; 2 * PAGE_SIZE]).unwrap();
        copy(&uffd, &ram, 0, &bytes(0..8)).unwrap();
        assert_eq!(first_words(&ram), [1, 2, 102, 4, 5, 105, 105, 8]);

        let (ram, uffd) = registered(backing);
        copy(&uffd, &ram, 0, &[100; PAGE_SIZE]).unwrap();
        copy(&uffd, &ram, 7, &[107; PAGE_SIZE]).unwrap();
        // SAFETY: memory of the test's own.
        unsafe { uffd.zero(ram.address(BlockId(0)), 8 * SMALL, SMALL) }.unwrap();
        assert_eq!(first_words(&ram), [100, 0, 0, 0, 0, 0, 0, 107]);
    }
}

#[test]
fn memory_that_is_not_registered_is_gone() {
    let (_registered, uffd) = registered(Backing::Anonymous);
    let other = Ram::new(&[(Backing::Anonymous, 8)]).unwrap();
    let error = copy(&uffd, &other, 1, &bytes(0..2)).unwrap_err();
    let at = other.address(BlockId(0)) + SMALL;
    assert!(matches!(error, UffdError::Gone { address, .. } if address == at), "{error}");
}

/// A process of its own, with memory that is missing.
struct Other {
    process: std::process::Child,
    lines: std::io::Lines<BufReader<std::process::ChildStderr>>,
    uffd: Arc<Uffd>,
    address: u64,
}

const OTHER_PAGES: u64 = 64;

impl Other {
    fn start() -> Other {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "other_process", "--ignored", "--nocapture"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(process.stderr.take().unwrap()).lines();
        let line = lines.next().unwrap().unwrap();
        let (fd, address) = line.split_once(' ').unwrap();
        let pidfd = Pidfd::open(process.id() as i32).unwrap();
        let copied = pidfd.copy_descriptor(fd.parse().unwrap()).unwrap();
        let uffd = Arc::new(Uffd::from_fd(copied));
        Other { process, lines, uffd, address: address.parse().unwrap() }
    }

    fn memory(&self, pattern: &Pattern) -> Arc<Memory> {
        let addresses = vec![Some(self.address)];
        // SAFETY: the other process has told where its only block lies, and lives for
        // this test only.
        let transport = unsafe { DirectTransport::new(Arc::clone(&self.uffd), addresses) };
        Arc::new(Memory::new(Arc::new(pattern.clone()), Box::new(transport)))
    }

    fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn pattern(ram: &Ram) -> Pattern {
    Pattern::new(ram.blocks(), 16).dense()
}

#[test]
#[ignore = "the other process of other tests"]
fn other_process() {
    let ram = Arc::new(Ram::new(&[(Backing::Anonymous, OTHER_PAGES)]).unwrap());
    let uffd = Uffd::create().unwrap();
    ram.register(&uffd);
    eprintln!("{} {}", uffd.as_fd().as_raw_fd(), ram.address(BlockId(0)));
    let right = |page: &Page| ram.read(*page) == pattern(&ram).page(*page);
    let wrong = ram.pages().iter().filter(|page| !right(page)).count();
    eprintln!("{wrong} pages are wrong");
    // Until the other end is closed, or this process is killed.
    let _ = std::io::stdin().read(&mut [0]);
}

#[test]
fn another_process_gets_its_memory_and_its_end_is_told_apart() {
    let model = Ram::new(&[(Backing::Anonymous, OTHER_PAGES)]).unwrap();
    let options = Default::default();

    let mut other = Other::start();
    let memory = other.memory(&pattern(&model));
    prefetch(&memory, &options, &Pace::new(None)).unwrap();
    assert_eq!(other.lines.next().unwrap().unwrap(), "0 pages are wrong");

    let mut other = Other::start();
    let memory = other.memory(&pattern(&model));
    other.kill();
    let error = prefetch(&memory, &options, &Pace::new(None)).unwrap_err();
    let gone = matches!(&error, MemoryError::Install { source: TransportError::Gone(_), .. });
    assert!(gone, "{error}");
    // SAFETY: nobody has this memory any more.
    let error = unsafe { other.uffd.zero(other.address, SMALL, SMALL) }.unwrap_err();
    match error {
        UffdError::Gone { address, source } => {
            assert_eq!((address, source.raw_os_error()), (other.address, Some(libc::ESRCH)));
        }
        error => panic!("{error}"),
    }
}

#[test]
fn an_engine_that_goes_frees_its_guests() {
    let ram = Arc::new(Ram::new(&[(Backing::Anonymous, 8)]).unwrap());
    let engine = Engine::new(&ram, Arc::new(pattern(&ram)));
    let guest = thread::spawn({
        let ram = Arc::clone(&ram);
        move || ram.word(page(0), 0).load(Ordering::Relaxed)
    });
    wait_readable(&engine.uffd);
    drop(engine);
    assert_eq!(guest.join().unwrap(), 0);
}
