//! The memory engine at work on memory of this process: real userfaultfds, real pages
//! that are missing, real threads that wait for them. Only the guest is not one.

#![allow(dead_code, unused_imports)] // each test and benchmark uses a part

mod ram;
mod source;

use std::sync::Arc;
use std::thread::{self, JoinHandle};

use snapback::cancel::Cancellation;
use snapback::host::uffd::Uffd;
use snapback::memory::{
    FaultHandler, FaultReport, FillOptions, Memory, MemoryError, Pace, prefetch,
};
use snapback::page::{BlockId, PageSource};
use snapback::transport::DirectTransport;

pub use ram::{Backing, HugePages, Ram};
pub use source::{Pattern, write_image};

/// Memory being brought back, and the threads that answer faults on it.
///
/// Dropped, it stops those threads and closes the userfaultfd; the kernel then lets
/// everybody go who waits for memory, and what is missing reads as zeros.
pub struct Engine {
    pub memory: Arc<Memory>,
    pub uffd: Arc<Uffd>,
    ram: Arc<Ram>,
    handlers: Vec<RunningFaultHandler>,
}

struct RunningFaultHandler {
    cancel: Cancellation,
    thread: JoinHandle<Result<FaultReport, MemoryError>>,
}

impl Engine {
    /// Registers all of `ram` with a new userfaultfd; from now on,
    /// whoever touches it waits for `source`'s pages.
    pub fn new(ram: &Arc<Ram>, source: Arc<dyn PageSource>) -> Engine {
        let uffd = Arc::new(Uffd::create().unwrap());
        ram.register(&uffd);
        let memory = Memory::new(source, Box::new(Engine::transport(ram, &uffd)));
        Engine { memory: Arc::new(memory), uffd, ram: Arc::clone(ram), handlers: Vec::new() }
    }

    fn transport(ram: &Arc<Ram>, uffd: &Arc<Uffd>) -> DirectTransport {
        let address = |n| Some(ram.address(BlockId(n as u16)));
        let addresses = (0..ram.blocks().len()).map(address).collect();
        // SAFETY: the addresses are where the blocks lie, registered as a whole with this
        // userfaultfd.
        unsafe { DirectTransport::new(Arc::clone(uffd), addresses) }
    }

    /// Starts one more thread that answers faults.
    pub fn start_fault_handler(&mut self) {
        let transport = Engine::transport(&self.ram, &self.uffd);
        let cancel = Cancellation::new();
        let handler = FaultHandler::new(Arc::clone(&self.memory), &transport, &cancel).unwrap();
        let named = thread::Builder::new().name("fault-handler".into());
        let thread = named.spawn(move || handler.run()).unwrap();
        self.handlers.push(RunningFaultHandler { cancel, thread });
    }

    /// Brings all memory, with so many threads.
    pub fn fill(&self, threads: usize, pace: &Pace) -> Result<(), MemoryError> {
        let options = FillOptions { threads, ..FillOptions::default() };
        prefetch(&self.memory, &options, pace).map(drop)
    }

    /// Stops the threads that answer faults, and says how they fared.
    pub fn stop_fault_handlers(&mut self) -> Vec<Result<FaultReport, MemoryError>> {
        for handler in &self.handlers {
            handler.cancel.request();
        }
        self.join_fault_handlers()
    }

    /// Waits until the threads that answer faults end by themselves.
    pub fn join_fault_handlers(&mut self) -> Vec<Result<FaultReport, MemoryError>> {
        self.handlers.drain(..).map(|handler| handler.thread.join().unwrap()).collect()
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        for handler in self.handlers.drain(..) {
            handler.cancel.request();
            let _ = handler.thread.join();
        }
    }
}

/// Numbers that look random, the same every time (xorshift64*).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        (self.next() >> 16) % end
    }

    /// The numbers below `end` in a random order.
    pub fn order(&mut self, end: u64) -> Vec<u64> {
        let mut numbers: Vec<u64> = (0..end).collect();
        for i in (1..numbers.len()).rev() {
            numbers.swap(i, self.below(i as u64 + 1) as usize);
        }
        numbers
    }
}
