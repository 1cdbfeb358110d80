//! An instant revert, shown: boots a guest that fills its memory and rewrites it all
//! the time, saves it while it runs, kills it, brings it back, and has it say itself
//! whether every page of its memory is right. `make demo` sets up and runs this.
//!
//! Nothing is left behind, however it ends.

#[path = "../tests/support/mod.rs"]
mod support;

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use snapback::{
    Cancellation, Progress, RevertEvent, RevertOptions, SaveEvent, SaveOptions, revert, save,
};
use support::{Fill, Guest, GuestOptions, Oracle, Pidfd, Result, SOON, SerialLog};
use tokio::signal::unix::{SignalKind, signal};

/// Characters of a timeline's bar.
const BAR_WIDTH: usize = 40;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("demo: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    // Everything goes into one folder, which is removed at the end.
    let folder = tempfile::Builder::new().prefix("snapback-demo-").tempdir()?;
    tempfile::env::override_temp_dir(folder.path()).map_err(|other| {
        format!("the folder for temporary files is {} already", other.display())
    })?;
    let runtime = tokio::runtime::Runtime::new()?;
    let image = folder.path().join("vm.snap");
    let outcome = runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        // Dropping the story ends what it started.
        tokio::select! {
            told = tell(&image) => told,
            _ = tokio::signal::ctrl_c() => Err("interrupted; everything has been ended and removed".into()),
            _ = terminate.recv() => Err("ended; everything has been ended and removed".into()),
        }
    });
    // After an interrupt some thread may still wait for the guest: it needs no answer.
    runtime.shutdown_background();
    folder.close()?;
    outcome
}

/// The whole story.
async fn tell(image: &Path) -> Result<()> {
    let options = GuestOptions { mib: 512, fill: Fill::Percent(85), ..GuestOptions::default() };
    println!("1. A guest of {} MiB boots on stock QEMU (no KVM: this takes a while)", options.mib);
    let start = Instant::now();
    let (mut guest, before) = blocking(move || {
        let mut guest = Guest::boot(&options)?;
        let before = Witness::ask(&mut guest.oracle)?;
        Ok((guest, before))
    })
    .await?;
    println!(
        "   ready after {:.1} s; it has filled {} pages and keeps rewriting them",
        start.elapsed().as_secs_f64(),
        before.pages,
    );
    println!("   a number drawn at boot is only in its RAM: {}\n", before.nonce);

    println!("2. It is saved while it runs");
    let taken = take(&guest, image).await?;
    let after;
    (guest, after) = blocking(move || {
        let after = Witness::ask(&mut guest.oracle)?;
        Ok((guest, after))
    })
    .await?;
    taken.print(&before, &after);

    println!("3. It is killed: its memory is gone");
    let log_path = guest.dir.join("serial0.log");
    let died_at_beat = guest.log.last_beat().map_or(0, |beat| beat.number);
    println!("   it had reached heartbeat {died_at_beat}\n");
    // The folder stays: the reverted guest makes its sockets and logs in the same place.
    let guest_folder = guest.kill();

    println!("4. It is brought back from the image");
    let log = SerialLog::from_now(&log_path);
    let (back, qemu) = bring_back(image, log).await?;
    back.print(died_at_beat);

    println!("5. Asked itself, with all of its memory walked through");
    let port = guest_folder.path().join("serial1.sock");
    let (nonce, verdict) = blocking(move || {
        let mut oracle = Oracle::connect(&port)?;
        Ok((oracle.nonce()?, oracle.ask_within("check", SOON)?))
    })
    .await?;
    println!("   nonce before   {}", before.nonce);
    println!("   nonce after    {nonce}");
    println!("   the guest says {verdict}");
    drop(qemu);
    if nonce != before.nonce || !verdict.starts_with("check ok ") {
        return Err("this is not the guest that was saved".into());
    }
    println!("   the same guest, every page of it right.");
    Ok(())
}

/// What the guest says of itself.
struct Witness {
    nonce: String,
    pages: u64,
    rewritten: u64,
}

impl Witness {
    fn ask(oracle: &mut Oracle) -> Result<Witness> {
        let (pages, rewritten) = (oracle.stat("pages")?, oracle.stat("rewritten")?);
        Ok(Witness { nonce: oracle.nonce()?, pages, rewritten })
    }
}

/// A save, as it went.
#[derive(Default)]
struct Taken {
    pause_ms: f64,
    moment: Duration,
    whole: Duration,
    data_bytes: u64,
    image_bytes: u64,
}

async fn take(guest: &Guest, image: &Path) -> Result<Taken> {
    let options = SaveOptions::new(&guest.qmp_path, image);
    let mut taken = Taken::default();
    let start = Instant::now();
    save(&options, Cancellation::new(), |event| match event {
        SaveEvent::Moment { pause_ms, .. } => {
            taken.moment = start.elapsed();
            taken.pause_ms = pause_ms.unwrap_or_default();
        }
        SaveEvent::Saved { bytes, image_bytes, .. } => {
            (taken.data_bytes, taken.image_bytes) = (bytes, image_bytes);
        }
        _ => {}
    })
    .await?;
    taken.whole = start.elapsed();
    Ok(taken)
}

impl Taken {
    fn print(&self, before: &Witness, after: &Witness) {
        let lines = Timeline::until(self.whole);
        lines.phase("checks, then the moment", Duration::ZERO, self.moment);
        lines.phase("memory is written, guest runs", self.moment, self.whole);
        println!("   the guest stood still for {:.1} ms in all", self.pause_ms);
        println!(
            "   image: {} MiB for {} MiB of memory that isn't zero, on disk after {:.2} s",
            self.image_bytes >> 20,
            self.data_bytes >> 20,
            self.whole.as_secs_f64(),
        );
        println!(
            "   meanwhile the guest rewrote {} pages, none of which shows in the image\n",
            after.rewritten.saturating_sub(before.rewritten),
        );
    }
}

/// A revert, as it went; times from its beginning.
#[derive(Default)]
struct Back {
    ready: Duration,
    running: Duration,
    beat: Duration,
    beat_number: u64,
    resident: Duration,
    /// Pages of the machine.
    total: u64,
    requests: u64,
}

/// Ends a QEMU when dropped.
struct Ended(Pidfd);

impl Drop for Ended {
    fn drop(&mut self) {
        if let Err(error) = self.0.kill() {
            eprintln!("demo: a QEMU may be left behind: {error}");
        }
    }
}

async fn bring_back(image: &Path, log: SerialLog) -> Result<(Back, Ended)> {
    let options = RevertOptions::new(image);
    let mut back = Back::default();
    let start = Instant::now();
    let first_beat = tokio::task::spawn_blocking(move || {
        let beat = log.wait_beat(0, SOON)?;
        Ok::<_, support::Error>((beat.number, start.elapsed()))
    });
    let reverted = revert(&options, Cancellation::new(), |event| match event {
        RevertEvent::QemuReady { .. } => back.ready = start.elapsed(),
        RevertEvent::Running { .. } => back.running = start.elapsed(),
        RevertEvent::Resident { progress: Progress { total, requests, .. }, .. } => {
            back.resident = start.elapsed();
            (back.total, back.requests) = (total, requests);
        }
        _ => {}
    })
    .await?;
    // From here on QEMU would outlive us.
    let qemu = Ended(Pidfd::open(reverted.pid as u32)?);
    (back.beat_number, back.beat) = first_beat.await??;
    Ok((back, qemu))
}

impl Back {
    fn print(&self, died_at_beat: u64) {
        let end = self.resident.max(self.beat);
        let lines = Timeline::until(end);
        lines.phase("QEMU's own start", Duration::ZERO, self.ready);
        lines.phase("device state; then it RUNS", self.ready, self.running);
        lines.phase("until its first heartbeat", self.running, self.beat);
        lines.phase("memory follows, guest runs", self.running, self.resident);
        println!(
            "   the guest ran {:.1} ms after QEMU was ready, from heartbeat {} on ({died_at_beat} was its last)",
            millis(self.running.saturating_sub(self.ready)),
            self.beat_number,
        );
        println!(
            "   of its {} pages it had to wait for {}; the rest came before it was missed\n",
            self.total, self.requests,
        );
    }
}

/// Prints phases of something, as bars over one scale.
struct Timeline {
    end: Duration,
}

impl Timeline {
    fn until(end: Duration) -> Timeline {
        Timeline { end }
    }

    fn phase(&self, name: &str, from: Duration, to: Duration) {
        let column = |at: Duration| {
            let share = at.as_secs_f64() / self.end.as_secs_f64().max(1e-9);
            (share * BAR_WIDTH as f64).round() as usize
        };
        // Even the shortest phase is seen.
        let first = column(from).min(BAR_WIDTH - 1);
        let last = column(to).clamp(first + 1, BAR_WIDTH);
        let bar: String =
            (0..BAR_WIDTH).map(|i| if (first..last).contains(&i) { '#' } else { '.' }).collect();
        let took = millis(to.saturating_sub(from));
        println!("   {name:<30} {bar} {took:>8.1} ms");
    }
}

/// Runs what waits for the guest on a thread that may wait.
async fn blocking<T: Send + 'static>(
    wait: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(wait).await?
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
