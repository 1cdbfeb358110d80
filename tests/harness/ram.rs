//! Memory of this process that stands for a guest's.

use std::fs;
use std::io;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use snapback::host::uffd::Uffd;
use snapback::page::{Block, BlockId, PAGE_SIZE, Page, PageBytes};

/// What a block's memory is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backing {
    /// Private and anonymous, as a guest's memory is by default.
    Anonymous,
    /// A shared mapping of a memfd, as `memory-backend-memfd` makes it.
    Memfd,
    /// Private pages of 2 MiB from hugetlbfs.
    Huge,
}

impl Backing {
    /// Size of its pages in bytes.
    pub fn page_size(self) -> u64 {
        match self {
            Backing::Huge => 2 << 20,
            _ => PAGE_SIZE as u64,
        }
    }
}

/// One mapping, unmapped on drop.
struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: a mapping may be touched and unmapped by any thread; its memory is only given
// out as atomics.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(backing: Backing, len: usize) -> io::Result<Mapping> {
        let anonymous = libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let (flags, fd) = match backing {
            Backing::Anonymous => (libc::MAP_PRIVATE | anonymous, -1),
            Backing::Huge => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB, -1),
            Backing::Memfd => (libc::MAP_SHARED, memfd(len)?),
        };
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping where the kernel finds room; it replaces nothing.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), len, access, flags, fd, 0) };
        let error = io::Error::last_os_error();
        if fd >= 0 {
            // SAFETY: ours, and not used any more; the mapping keeps the memory.
            unsafe { libc::close(fd) };
        }
        if start == libc::MAP_FAILED {
            return Err(error);
        }
        let start = NonNull::new(start.cast()).ok_or(error)?;
        let mapping = Mapping { start, len };
        // Whether a huge page arises from small ones is left to no chance.
        // SAFETY: advice on a mapping of ours; it changes no content.
        unsafe { libc::madvise(mapping.start.as_ptr().cast(), len, libc::MADV_NOHUGEPAGE) };
        Ok(mapping)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: ours as a whole, and no reference into it outlives it.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

fn memfd(len: usize) -> io::Result<i32> {
    // SAFETY: the name is a C string.
    let fd = unsafe { libc::memfd_create(c"harness".as_ptr(), libc::MFD_CLOEXEC) };
    // SAFETY: it changes the length of a file that only we have.
    match fd >= 0 && unsafe { libc::ftruncate(fd, len as i64) } == 0 {
        true => Ok(fd),
        false => Err(io::Error::last_os_error()),
    }
}

/// A machine's memory, one mapping a block.
pub struct Ram {
    blocks: Vec<Block>,
    mappings: Vec<Mapping>,
}

impl Ram {
    /// Memory of so many target pages for each block.
    pub fn new(blocks: &[(Backing, u64)]) -> io::Result<Ram> {
        let mapping =
            |(backing, pages): &(Backing, u64)| Mapping::new(*backing, *pages as usize * PAGE_SIZE);
        let block = |(n, (backing, pages)): (usize, &(Backing, u64))| Block {
            name: format!("{backing:?} {n}"),
            len: pages * PAGE_SIZE as u64,
            page_size: backing.page_size(),
        };
        Ok(Ram {
            blocks: blocks.iter().enumerate().map(block).collect(),
            mappings: blocks.iter().map(mapping).collect::<io::Result<_>>()?,
        })
    }

    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    pub fn address(&self, block: BlockId) -> u64 {
        self.mappings[block.index()].start.as_ptr() as u64
    }

    pub fn register(&self, uffd: &Uffd) {
        for (mapping, block) in self.mappings.iter().zip(&self.blocks) {
            // SAFETY: the mapping is ours, and is read by threads only that may wait.
            unsafe { uffd.register(mapping.start.as_ptr() as u64, block.len) }.unwrap();
        }
    }

    /// All pages.
    pub fn pages(&self) -> Vec<Page> {
        let blocks = self.blocks.iter().enumerate();
        let pages = blocks.flat_map(|(n, block)| {
            (0..block.pages()).map(move |number| Page { block: BlockId(n as u16), number })
        });
        pages.collect()
    }

    /// One word of a page. Whoever reads or writes it waits where it is missing.
    pub fn word(&self, page: Page, index: usize) -> &AtomicU64 {
        assert!(page.number < self.blocks[page.block.index()].pages() && index < PAGE_SIZE / 8);
        let start = self.mappings[page.block.index()].start;
        // SAFETY: within the mapping, which is only ever touched through atomics.
        unsafe { start.byte_add(page.offset() as usize + index * 8).cast().as_ref() }
    }

    /// The bytes of a page.
    pub fn read(&self, page: Page) -> PageBytes {
        let mut bytes = [0; PAGE_SIZE];
        for (index, word) in bytes.chunks_exact_mut(8).enumerate() {
            word.copy_from_slice(&self.word(page, index).load(Ordering::Relaxed).to_le_bytes());
        }
        bytes
    }

    /// Gives memory back: it reads as zeros from then on.
    pub fn give_back(&self, first: Page, pages: u64) {
        assert!(first.number + pages <= self.blocks[first.block.index()].pages());
        let address = self.address(first.block) + first.offset();
        // SAFETY: memory of ours, touched only through atomics.
        let done = unsafe {
            libc::madvise(address as *mut _, pages as usize * PAGE_SIZE, libc::MADV_DONTNEED)
        };
        assert_eq!(done, 0, "{}", io::Error::last_os_error());
    }
}

/// Huge pages that this host has set aside for a test; fewer again on drop.
pub struct HugePages {
    count: u64,
    /// Keeps two tests of one process from counting each other's.
    _alone: std::sync::MutexGuard<'static, ()>,
}

const NR_HUGEPAGES: &str = "/proc/sys/vm/nr_hugepages";

impl HugePages {
    /// Sets aside so many pages of 2 MiB; says why where that can't be.
    pub fn new(count: u64) -> Result<HugePages, String> {
        static ALONE: std::sync::Mutex<()> = std::sync::Mutex::new(());
        let alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let before = HugePages::available().map_err(|e| format!("{NR_HUGEPAGES}: {e}"))?;
        let wanted = before + count;
        fs::write(NR_HUGEPAGES, wanted.to_string()).map_err(|e| format!("{NR_HUGEPAGES}: {e}"))?;
        let now = HugePages::available().map_err(|e| format!("{NR_HUGEPAGES}: {e}"))?;
        let pages = HugePages { count: now.saturating_sub(before), _alone: alone };
        match now >= wanted {
            true => Ok(pages),
            false => Err(format!("the host has room for {now} huge pages, not for {wanted}")),
        }
    }

    fn available() -> io::Result<u64> {
        fs::read_to_string(NR_HUGEPAGES)?.trim().parse().map_err(io::Error::other)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        if let Ok(now) = HugePages::available() {
            let _ = fs::write(NR_HUGEPAGES, now.saturating_sub(self.count).to_string());
        }
    }
}
