//! What guests at work get done while they are saved.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::guests::Kind;
use crate::support::{Guest, Qemu, Result, cont, debian, stop};
use crate::ways::{Times, Way, ms};

/// Pages that a guest at work rewrites again and again: 128 MiB.
const HOT_PAGES: u64 = 32 << 10;

/// How long a guest at work is watched: no save takes as long.
const WINDOW: Duration = Duration::from_secs(8);

/// RAM of a guest with a database.
const MIB: u64 = 512;

/// How much memory guests rewrite, each saved by its way, and how much alone.
///
/// # Errors
/// When one is lost, or a save fails.
pub fn rewriting(guests: [&mut Guest; 3], folder: &Path, runs: usize) -> Result<()> {
    let mut work = Work("pages a second that a guest rewrites", Vec::new());
    for (guest, way) in guests.into_iter().zip(Way::all(folder, "none")) {
        guest.oracle.ask(&format!("writers 1 0 {HOT_PAGES}"))?;
        let mut done = Done::default();
        for _ in 0..runs {
            done.measure(guest, &way, |guest| guest.oracle.stat("rewritten"))?;
        }
        guest.oracle.set_writers(0, 0)?;
        work.1.push((way.name, done));
    }
    work.print();
    Ok(())
}

/// How many transactions of pgbench guests commit, each saved by its way with zstd:1, in turn, and how long
/// that takes; one works at a time.
///
/// # Errors
/// When one does not get to work or is lost, or a save fails.
pub fn transacting(qemu: Qemu, folder: &Path, runs: usize) -> Result<()> {
    let mut works = Vec::new();
    for (number, way) in Way::all(folder, "zstd:1").into_iter().enumerate() {
        let own = folder.join(number.to_string());
        fs::create_dir(&own)?;
        let guest = Kind::Debian.at_work(qemu, MIB, &own)?;
        stop(&guest.qmp_path)?;
        works.push((guest, way, Done::default()));
    }
    for _ in 0..runs {
        for (guest, way, done) in &mut works {
            cont(&guest.qmp_path)?;
            done.measure(guest, way, |guest| debian::transactions(&mut guest.oracle))?;
            stop(&guest.qmp_path)?;
        }
    }
    let done = works.into_iter().map(|(_, way, done)| (way.name, done));
    let mut work = Work("transactions of pgbench a second", done.collect());
    work.print();
    println!(
        "\n| a save of that guest (`--compress zstd:1`; QEMU's own is not compressed) | ms |\n|---|---|"
    );
    for (name, done) in &mut work.1 {
        done.saves.line(name);
    }
    Ok(())
}

/// What guests did, by the way they were saved.
struct Work(&'static str, Vec<(&'static str, Done)>);

impl Work {
    fn print(&mut self) {
        println!(
            "\n| {} in {} s | with a save | of what it does alone |\n|---|---|---|",
            self.0,
            WINDOW.as_secs(),
        );
        for (name, Done { alone, meanwhile, .. }) in &mut self.1 {
            let share = meanwhile.median() / alone.median();
            let (median, [least, most]) = (meanwhile.median(), meanwhile.ends());
            println!("| {name} | {median:.0} [{least:.0}..{most:.0}] | {share:.2} |");
        }
    }
}

/// What a guest did alone and while it was saved, a second, and how long the saves took, in milliseconds.
#[derive(Default)]
struct Done {
    alone: Times,
    meanwhile: Times,
    saves: Times,
}

impl Done {
    fn measure(
        &mut self,
        guest: &mut Guest,
        way: &Way,
        count: impl Fn(&mut Guest) -> Result<u64>,
    ) -> Result<()> {
        self.alone.push(rate(guest, &count, |_| Ok(()))?);
        let saves = &mut self.saves;
        self.meanwhile.push(rate(guest, &count, |guest| {
            saves.push(ms(way.save(guest)?.0));
            Ok(())
        })?);
        Ok(())
    }
}

/// How much is counted a second from when something is begun, for as long as is measured.
fn rate(
    guest: &mut Guest,
    count: impl Fn(&mut Guest) -> Result<u64>,
    begin: impl FnOnce(&Guest) -> Result<()>,
) -> Result<f64> {
    let (before, begun) = (count(guest)?, Instant::now());
    begin(guest)?;
    std::thread::sleep(WINDOW.saturating_sub(begun.elapsed()));
    let done = count(guest)? - before;
    Ok(done as f64 / begun.elapsed().as_secs_f64())
}
