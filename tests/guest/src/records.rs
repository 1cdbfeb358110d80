//! Numbered records, appended to a file on a journalled file system with an fsync
//! after each; how far that has come is kept in memory. Whoever holds a disk and the
//! memory of one moment can tell from the two whether they belong together.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::content::{mix, xorshift};
use crate::disk::Aligned;

/// Where the file system is mounted, and the file on it.
const MOUNT: &str = "/records";
const FILE: &str = "/records/records";

/// Bytes of a record: a disk's sector.
const RECORD_BYTES: usize = 512;

/// The first word of the ledger ("snapledg" in ASCII, big-endian).
const MAGIC: u64 = 0x736e_6170_6c65_6467;

const PAGE_BYTES: usize = 4096;

/// How far the writer has come, in a page of memory of its own that is found from
/// outside by its physical address: five little-endian words, the last two of which
/// are `started` and `acknowledged`.
///
/// `started` is set before a record is written, `acknowledged` when its fsync has
/// returned. So at any moment the disk holds `acknowledged` records at least and
/// `started` at most, and the two differ by one at most.
#[derive(Clone, Copy)]
struct Ledger {
    page: *mut AtomicU64,
}

// SAFETY: the page is never unmapped, and all access to it is atomic.
unsafe impl Send for Ledger {}

impl Ledger {
    fn map(nonce: [u64; 2]) -> io::Result<Ledger> {
        // A locked page still may be moved to make large ones: not here.
        fs::write("/proc/sys/vm/compact_unevictable_allowed", "0")?;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_LOCKED;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let page =
            unsafe { libc::mmap(std::ptr::null_mut(), PAGE_BYTES, protection, flags, -1, 0) };
        if page == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let ledger = Ledger { page: page.cast() };
        for (at, word) in [MAGIC, nonce[0], nonce[1], 0, 0].into_iter().enumerate() {
            ledger.word(at).store(word, Ordering::SeqCst);
        }
        Ok(ledger)
    }

    fn word(&self, at: usize) -> &AtomicU64 {
        assert!(at < PAGE_BYTES / size_of::<AtomicU64>());
        // SAFETY: within the page, aligned, and mapped for as long as the program runs.
        unsafe { &*self.page.add(at) }
    }

    fn started(&self) -> &AtomicU64 {
        self.word(3)
    }

    fn acknowledged(&self) -> &AtomicU64 {
        self.word(4)
    }

    /// Where the page is in the machine's memory (Linux, admin-guide/mm/pagemap).
    fn physical_address(&self) -> io::Result<u64> {
        const PRESENT: u64 = 1 << 63;
        const FRAME: u64 = (1 << 55) - 1;
        let mut entry = [0; 8];
        let at = self.page as u64 / PAGE_BYTES as u64 * entry.len() as u64;
        File::open("/proc/self/pagemap")?.read_exact_at(&mut entry, at)?;
        match u64::from_le_bytes(entry) {
            entry if entry & PRESENT != 0 && entry & FRAME != 0 => {
                Ok((entry & FRAME) * PAGE_BYTES as u64)
            }
            _ => Err(io::Error::other("the ledger's page is nowhere")),
        }
    }
}

/// What the writer is asked between two records.
enum Order {
    Check(Sender<io::Result<String>>),
}

/// A writer at work. Dropping it ends the writer; the file system stays mounted.
pub struct Records {
    ledger: Ledger,
    orders: Sender<Order>,
    thread: Option<JoinHandle<u64>>,
}

impl Records {
    /// Mounts the ext4 file system on `device` and starts to write records there, one
    /// every `pause` at the most. Tells the physical address of the ledger.
    pub fn start(device: &str, pause: Duration, nonce: [u64; 2]) -> io::Result<(Records, u64)> {
        fs::create_dir_all(MOUNT)?;
        mount(device)?;
        let file = OpenOptions::new().append(true).create_new(true).open(FILE)?;
        let ledger = Ledger::map(nonce)?;
        let address = ledger.physical_address()?;
        let (orders, received) = channel();
        let thread = thread::spawn(move || write(file, ledger, pause, nonce, &received));
        Ok((Records { ledger, orders, thread: Some(thread) }, address))
    }

    /// How many records have been acknowledged.
    pub fn acknowledged(&self) -> u64 {
        self.ledger.acknowledged().load(Ordering::SeqCst)
    }

    /// Reads all records back from the device, between two of them.
    pub fn check(&self) -> io::Result<String> {
        let gone = |_| io::Error::other("the writer has ended");
        let (reply, answer) = channel();
        self.orders.send(Order::Check(reply)).map_err(|_| io::Error::other("no writer"))?;
        answer.recv().map_err(gone)?
    }

    /// Ends the writer and unmounts. Tells how many records there are.
    pub fn stop(self) -> io::Result<u64> {
        let Records { orders, thread, .. } = self;
        drop(orders);
        // A writer that panicked has taken the guest down with it.
        let records = thread.and_then(|thread| thread.join().ok()).unwrap_or_default();
        // SAFETY: the path is a C string.
        match unsafe { libc::umount2(c"/records".as_ptr(), 0) } {
            0 => Ok(records),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

fn mount(device: &str) -> io::Result<()> {
    let device = CString::new(device)?;
    let place = CString::new(MOUNT)?;
    // SAFETY: all strings end in NUL and live on; the options are a C string.
    let done = unsafe {
        let options = c"errors=remount-ro".as_ptr().cast();
        libc::mount(device.as_ptr(), place.as_ptr(), c"ext4".as_ptr(), libc::MS_NOATIME, options)
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The writer's whole life. A file system that fails takes the guest down, loudly.
fn write(
    mut file: File,
    ledger: Ledger,
    pause: Duration,
    nonce: [u64; 2],
    orders: &Receiver<Order>,
) -> u64 {
    loop {
        match orders.try_recv() {
            Ok(Order::Check(reply)) => {
                // Who asked may have gone.
                let _ = reply.send(check(ledger.acknowledged().load(Ordering::SeqCst), nonce));
            }
            Err(TryRecvError::Disconnected) => {
                return ledger.acknowledged().load(Ordering::SeqCst);
            }
            Err(TryRecvError::Empty) => {
                let number = ledger.acknowledged().load(Ordering::SeqCst) + 1;
                ledger.started().store(number, Ordering::SeqCst);
                let written = file.write_all(&record(number, nonce)).and_then(|()| file.sync_all());
                written.unwrap_or_else(|e| panic!("writing record {number}: {e}"));
                ledger.acknowledged().store(number, Ordering::SeqCst);
                thread::sleep(pause);
            }
        }
    }
}

/// Compares the file, as the device has it, with what it should hold.
fn check(acknowledged: u64, nonce: [u64; 2]) -> io::Result<String> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(FILE)?;
    let mut buffer = Aligned::new();
    let (mut number, mut at) = (0, 0);
    loop {
        let got = file.read_at(buffer.bytes(), at)?;
        at += got as u64;
        for found in buffer.bytes()[..got].chunks(RECORD_BYTES) {
            number += 1;
            if found != record(number, nonce) {
                return Ok(format!("bad first={number} acknowledged={acknowledged}"));
            }
        }
        if got < PAGE_BYTES {
            break;
        }
    }
    let verdict = if number == acknowledged { "ok" } else { "bad" };
    Ok(format!("{verdict} on_disk={number} acknowledged={acknowledged}"))
}

/// What a record holds: its number, the nonce, and words that follow from both.
fn record(number: u64, nonce: [u64; 2]) -> [u8; RECORD_BYTES] {
    let mut record = [0; RECORD_BYTES];
    let mut state = mix(mix(number ^ nonce[0]) ^ nonce[1]) | 1;
    for (at, bytes) in record.chunks_exact_mut(8).enumerate() {
        let word = match at {
            0 => number,
            1 => nonce[0],
            2 => nonce[1],
            _ => {
                state = xorshift(state);
                state
            }
        };
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    record
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_told_from_its_neighbour_and_another_guests() {
        assert_ne!(record(1, [7, 9]), record(2, [7, 9]));
        assert_ne!(record(1, [7, 9]), record(1, [7, 10]));
        assert_eq!(record(3, [7, 9])[..8], 3u64.to_le_bytes());
    }
}
