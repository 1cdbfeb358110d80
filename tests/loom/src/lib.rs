//! Who takes which page, in every order in which threads can run: two threads that
//! answer faults, one that prefetches, a teardown, and a server in the place of one that died;
//! and in a save QEMU's stream beside a reader from outside.
//!
//! loom runs each model once for every interleaving of the atomics' operations (with at
//! most [`PREEMPTIONS`] forced switches, which finds nearly all there is to find) and for
//! every value that the memory orderings allow a load to see. A page's content is a cell
//! that loom watches: two threads that install one page, or one that reads a page before
//! it is in place, are a data race that it reports.

#![cfg(all(loom, test))]

#[allow(dead_code)]
#[path = "../../../src/memory/claim.rs"]
mod claim;
#[allow(dead_code)]
#[path = "../../../src/page.rs"]
mod page;

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use loom::thread;

use claim::{ClaimMap, Words};
use page::{Block, BlockId, Run};

/// Switches between threads that loom forces in one run.
const PREEMPTIONS: usize = 3;

/// Pages of the block. Four are brought in a model; they lie around the end of the
/// map's first word, so that claims cross it.
const PAGES: u64 = 66;

/// The first of the four.
const FIRST: u64 = 62;

const BLOCK: BlockId = BlockId(0);

fn run(first: u64, count: u64) -> Run {
    Run { block: BLOCK, first, count }
}

fn blocks() -> [Block; 1] {
    [Block { name: "pc.ram".into(), len: PAGES * 4096, page_size: 4096 }]
}

/// Words that outlive the map in them.
#[derive(Clone)]
struct SharedWords(Arc<Vec<AtomicU64>>);

impl SharedWords {
    fn new() -> SharedWords {
        let words = (0..ClaimMap::words_for(&blocks())).map(|_| AtomicU64::new(0));
        SharedWords(Arc::new(words.collect()))
    }
}

impl Words for SharedWords {
    fn words(&self) -> &[AtomicU64] {
        &self.0
    }
}

/// The content of the pages, by which they are installed.
type Content = [UnsafeCell<u32>; (PAGES - FIRST) as usize];

/// The memory of a machine, as small as can be.
struct Machine {
    claims: ClaimMap,
    pages: Arc<Content>,
    /// How often the last page was said to be in place.
    completed: AtomicUsize,
}

// SAFETY: the cells are shared between threads on purpose: loom reports every access
// that the claims don't order.
unsafe impl Sync for Machine {}

impl Machine {
    /// A machine of which all but the last four pages are in place.
    fn new() -> Arc<Machine> {
        Machine::with(ClaimMap::new(&blocks()))
    }

    /// The same with this map, in which every page is absent.
    fn with(claims: ClaimMap) -> Arc<Machine> {
        let before = claims.claim(run(0, FIRST), |got| {
            assert!(!claims.mark_present(got));
            Ok::<(), ()>(())
        });
        assert_eq!(before, Ok(()));
        let pages = Arc::new(std::array::from_fn(|_| UnsafeCell::new(0)));
        Arc::new(Machine { claims, pages, completed: AtomicUsize::new(0) })
    }

    /// The machine in the hands of a new server. The one before it has ended.
    fn taken_over(before: &Machine, words: SharedWords) -> Arc<Machine> {
        let claims = ClaimMap::over(&blocks(), Box::new(words));
        let pages = Arc::clone(&before.pages);
        Arc::new(Machine { claims, pages, completed: AtomicUsize::new(0) })
    }

    /// Settles what the server before had claimed and not finished.
    fn settle(&self) {
        let mut unfinished = Vec::new();
        self.claims.unfinished(BLOCK, |run| unfinished.push(run));
        for page in unfinished.into_iter().flat_map(|run| run.pages()) {
            // SAFETY: the one who had claimed it has ended.
            let arrived = self.cell(page.number).with(|content| unsafe { *content } == 1);
            match arrived {
                true => _ = self.claims.mark_present(Run::single(page)),
                false => self.claims.release(Run::single(page)),
            }
        }
    }

    fn cell(&self, number: u64) -> &UnsafeCell<u32> {
        &self.pages[(number - FIRST) as usize]
    }

    /// Installs pages that were claimed.
    fn install(&self, got: Run) {
        for page in got.pages() {
            // SAFETY: whoever has claimed a page is alone with it; loom checks that.
            self.cell(page.number).with_mut(|content| unsafe { *content += 1 });
        }
        if self.claims.mark_present(got) {
            self.completed.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Claims what is absent of a run, and installs it.
    fn bring(&self, run: Run) {
        let done = self.claims.claim(run, |got| {
            self.install(got);
            Ok::<(), ()>(())
        });
        assert_eq!(done, Ok(()));
    }

    /// Answers a fault, and reads the page if it is in place.
    fn fault(&self, number: u64) {
        self.bring(run(number, 1));
        if self.claims.is_present(BLOCK, number) {
            assert!(self.claims.is_claimed(BLOCK, number));
            // SAFETY: a page that is in place is only read; loom checks that.
            self.cell(number).with(|content| assert_eq!(unsafe { *content }, 1));
        }
    }

    /// What must hold once all threads are through: a page is in place if and only if it
    /// is claimed, it was installed once, and the last page was said to be the last.
    fn check(&self) {
        let mut present = FIRST;
        for number in FIRST..PAGES {
            let here = self.claims.is_present(BLOCK, number);
            assert_eq!(here, self.claims.is_claimed(BLOCK, number), "page {number}");
            // SAFETY: no other thread is left.
            let content = self.cell(number).with(|content| unsafe { *content });
            assert_eq!(content, u32::from(here), "page {number}");
            present += u64::from(here);
        }
        assert_eq!(self.claims.present(), present);
        let complete = usize::from(present == PAGES);
        assert_eq!(self.completed.load(Ordering::Relaxed), complete);
    }
}

fn model(body: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(PREEMPTIONS);
    builder.check(body);
}

#[test]
fn faults_and_prefetch_install_each_page_once_and_one_of_them_the_last() {
    model(|| {
        let machine = Machine::new();
        let faults = [63, 64].map(|number| {
            let machine = Arc::clone(&machine);
            thread::spawn(move || machine.fault(number))
        });
        machine.bring(run(FIRST, 4));
        for thread in faults {
            thread.join().unwrap();
        }
        machine.check();
        assert_eq!(machine.claims.present(), PAGES);
    });
}

/// A page of a guest that is being saved. Its content at the moment is 0, later 1.
struct SavedPage {
    content: AtomicU64,
    protected: AtomicBool,
}

/// A save: QEMU sends a page and takes its protection off; the guest writes to what is not
/// protected; a reader from outside takes what is still protected behind its read. Each captures a
/// page only if the other has not, and either has what it was at the moment.
#[test]
fn stream_and_reader_capture_each_page_once_as_it_was_at_the_moment() {
    model(|| {
        let machine = Machine::new();
        let pages = [(); 2]
            .map(|()| SavedPage { content: AtomicU64::new(0), protected: AtomicBool::new(true) });
        let pages = Arc::new(pages);
        let stream = thread::spawn({
            let (machine, pages) = (Arc::clone(&machine), Arc::clone(&pages));
            move || {
                for (page, number) in pages.iter().zip(FIRST..) {
                    assert_eq!(page.content.load(Ordering::Relaxed), 0);
                    machine.bring(run(number, 1));
                    page.protected.store(false, Ordering::Release);
                }
            }
        });
        let guest = thread::spawn({
            let pages = Arc::clone(&pages);
            move || {
                let page = &pages[0];
                if !page.protected.load(Ordering::Acquire) {
                    page.content.store(1, Ordering::Release);
                }
            }
        });
        for (page, number) in pages.iter().rev().zip([FIRST + 1, FIRST]) {
            let content = page.content.load(Ordering::Acquire);
            if page.protected.load(Ordering::Acquire) {
                assert_eq!(content, 0, "page {number}");
                machine.bring(run(number, 1));
            }
        }
        stream.join().unwrap();
        guest.join().unwrap();
        machine.bring(run(FIRST + 2, 2));
        machine.check();
    });
}

#[test]
fn a_teardown_leaves_each_page_absent_or_in_place() {
    model(|| {
        let machine = Machine::new();
        let stop = Arc::new(AtomicBool::new(false));
        let threads = [
            thread::spawn({
                let machine = Arc::clone(&machine);
                move || machine.fault(63)
            }),
            thread::spawn({
                let machine = Arc::clone(&machine);
                move || machine.fault(63)
            }),
            thread::spawn({
                let (machine, stop) = (Arc::clone(&machine), Arc::clone(&stop));
                move || {
                    for piece in [run(FIRST, 3), run(65, 1)] {
                        if !stop.load(Ordering::Relaxed) {
                            machine.bring(piece);
                        }
                    }
                }
            }),
        ];
        stop.store(true, Ordering::Relaxed);
        for thread in threads {
            thread.join().unwrap();
        }
        machine.check();
    });
}

#[test]
fn pages_that_could_not_be_installed_can_be_claimed_again() {
    model(|| {
        let machine = Machine::new();
        let fault = thread::spawn({
            let machine = Arc::clone(&machine);
            move || machine.fault(63)
        });
        // With page 63 taken, the run falls into two pieces; the first one fails.
        let failed = machine.claims.claim(run(FIRST, 4), |_| Err("the way is closed"));
        let prefetch = thread::spawn({
            let machine = Arc::clone(&machine);
            move || machine.bring(run(64, 2))
        });
        machine.bring(run(FIRST, 4));
        fault.join().unwrap();
        prefetch.join().unwrap();
        assert_eq!(failed, Err("the way is closed"));
        // What the fault found claimed and left alone has been given back, and may have
        // been passed over since.
        machine.bring(run(FIRST, 4));
        machine.check();
        assert_eq!(machine.claims.present(), PAGES);
    });
}

#[test]
fn a_successor_finishes_what_a_server_that_died_had_claimed() {
    model(|| {
        let words = SharedWords::new();
        let first = Machine::with(ClaimMap::over(&blocks(), Box::new(words.clone())));
        let fault = thread::spawn({
            let first = Arc::clone(&first);
            move || first.fault(63)
        });
        // It dies with one page installed and not marked, and the others claimed.
        let claimed = first.claims.claim(run(FIRST, 4), |got| {
            if got.first == FIRST {
                // SAFETY: whoever has claimed a page is alone with it; loom checks that.
                first.cell(FIRST).with_mut(|content| unsafe { *content += 1 });
            }
            Ok::<(), ()>(())
        });
        assert_eq!(claimed, Ok(()));
        fault.join().unwrap();

        let second = Machine::taken_over(&first, words);
        second.settle();
        let fault = thread::spawn({
            let second = Arc::clone(&second);
            move || second.fault(64)
        });
        second.bring(run(FIRST, 4));
        fault.join().unwrap();
        second.check();
        assert_eq!(second.claims.present(), PAGES);
    });
}
