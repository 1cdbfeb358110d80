//! Answering a fault allocates nothing: it must not wait for memory of our own. This test is
//! alone in its program, since every allocation of the program counts.

#[path = "harness/mod.rs"]
mod harness;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use harness::{Backing, Engine, Pattern, Ram, write_image};
use snapback::image::Compression;
use snapback::page::{Page, PageSource};

/// The system's allocator, with a count of what it is asked for.
struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: it does what the system's allocator does.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promises are those that the system's allocator asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as above; what is given back came from there.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

#[test]
fn an_answer_allocates_nothing() {
    let folder = tempfile::tempdir().unwrap();
    for (name, compression) in [("plain", Compression::None), ("zstd", Compression::Zstd(1))] {
        let ram = Arc::new(Ram::new(&[(Backing::Anonymous, 8192)]).unwrap());
        let pattern = Pattern::new(ram.blocks(), 4);
        let image = write_image(&pattern, &folder.path().join(name), compression);
        let pages = ram.pages();
        // What the image keeps of its index is there from now on.
        pages.iter().for_each(|page| _ = image.locate(*page).unwrap());
        let mut engine = Engine::new(&ram, Arc::new(image));
        engine.start_fault_handler();
        let touch = |page: &Page| ram.word(*page, 0).load(Ordering::Relaxed);
        // The decompressor makes its room at the first chunk.
        pages[..64].iter().for_each(|page| _ = touch(page));
        let (before, asked) = (ALLOCATIONS.load(Ordering::Relaxed), engine.memory.counts());
        pages[64..].iter().step_by(4).for_each(|page| _ = touch(page));
        let allocated = ALLOCATIONS.load(Ordering::Relaxed) - before;
        let answered = engine.memory.counts().requests - asked.requests;
        assert!(answered > 1000, "{answered} answers");
        assert_eq!(allocated, 0, "in {answered} answers from the {name} image");
        for report in engine.stop_fault_handlers() {
            report.unwrap();
        }
    }
}
