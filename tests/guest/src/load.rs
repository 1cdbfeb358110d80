//! Writers that rewrite pages for as long as they are let.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::config::Load;
use crate::content::{mix, xorshift};
use crate::region::Region;

/// The writers that run at present.
pub struct Writers {
    load: Load,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Writers {
    /// Starts writers on random pages of the region.
    pub fn start(region: &Arc<Region>, load: Load) -> Writers {
        let stop = Arc::new(AtomicBool::new(false));
        let threads = (0..load.writers)
            .map(|writer| {
                let (region, stop) = (Arc::clone(region), Arc::clone(&stop));
                thread::spawn(move || rewrite(&region, load, writer, &stop))
            })
            .collect();
        Writers { load, stop, threads }
    }

    /// What they were started to do.
    pub fn load(&self) -> Load {
        self.load
    }

    /// Stops them; the last page has been rewritten when this returns.
    pub fn stop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // A writer that panicked has taken the guest down with it.
            let _ = thread.join();
        }
        self.load.writers = 0;
    }
}

/// A late writer catches up on this much at most.
const LATE: Duration = Duration::from_millis(100);

/// A wait is slept off from this length on: shorter ones add up to one of it.
const NAP: Duration = Duration::from_millis(2);

fn rewrite(region: &Region, load: Load, writer: u64, stop: &AtomicBool) {
    let hot = if load.hot_pages == 0 { region.pages() } else { load.hot_pages.min(region.pages()) };
    let pause = match load.rate {
        0 => Duration::ZERO,
        rate => Duration::from_secs(1) / u32::try_from(rate).unwrap_or(u32::MAX),
    };
    let mut state = mix(region.nonce()[0] ^ writer) | 1;
    let mut due = Instant::now();
    loop {
        due = due.max(Instant::now().checked_sub(LATE).unwrap_or(due)) + pause;
        while !stop.load(Ordering::Relaxed) {
            let ahead = due.saturating_duration_since(Instant::now());
            if ahead < NAP {
                break;
            }
            // In short sleeps, so that a slow writer stops at once.
            thread::sleep(ahead.min(LATE));
        }
        if stop.load(Ordering::Relaxed) {
            return;
        }
        state = xorshift(state);
        region.rewrite((state >> 16) % hot);
    }
}
