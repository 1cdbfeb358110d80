//! The same delta of a guest whose writes were tracked since the parent, and of one of which nobody
//! knows what it has written, in turn.

use std::ffi::OsStr;
use std::path::Path;

use serde_json::Value;
use snapback::page::PAGE_SIZE;

use crate::guests::{Reverted, event, events, snapback};
use crate::support::{Fill, Guest, GuestOptions, Qemu, Result, percentile};

const MIB: f64 = (1 << 20) as f64;

/// What is measured.
pub struct Plan {
    pub qemu: Qemu,
    /// RAM of the guest.
    pub mib: u64,
    /// What it rewrites between its revert and its save, in MiB.
    pub written: Vec<u64>,
    /// Saves of each kind.
    pub saves: usize,
    /// How the images are compressed.
    pub compress: String,
}

/// What was seen of saves of one kind.
#[derive(Default)]
struct Row {
    saved: Vec<f64>,
    pause: Vec<f64>,
    changed: Vec<f64>,
    looked_at: Vec<f64>,
    image: Vec<f64>,
}

pub fn run(plan: &Plan, folder: &Path) -> Result<()> {
    let parent = folder.join("parent.snap");
    let fill = Fill::Percent(75);
    let options =
        GuestOptions { qemu: plan.qemu, mib: plan.mib, fill, writers: 0, ..Default::default() };
    let guest = Guest::boot(&options)?;
    let compress = ["--compress", &plan.compress];
    crate::guests::save(&guest, &parent, &compress)?;
    let from = guest.dir.clone();
    drop(guest);
    println!(
        "A guest of {} MiB, 75 % filled, {:?}, {}. Median [least..most] of {}.\n",
        plan.mib, plan.qemu, plan.compress, plan.saves
    );
    println!(
        "| rewritten, MiB | | to the whole image, ms | pause, ms | of it `changed_ms` | looked at, MiB | image, MB |"
    );
    println!("|---|---|---|---|---|---|---|");
    for written in &plan.written {
        let mut rows = [Row::default(), Row::default()];
        for number in 0..plan.saves {
            for (row, is_tracked) in rows.iter_mut().zip([true, false]) {
                let place = folder.join(format!("{written}-{number}-{is_tracked}"));
                let mut guest =
                    Reverted::start(&parent, &from, &place, &["--resettable"], "resettable")?;
                guest.guest.oracle.ask(&format!("sweep 0 {}", written << 8))?;
                if !is_tracked {
                    guest.server.kill()?;
                    guest.server.wait()?;
                }
                row.add(&save(&guest, &parent, &place.join("child.snap"), plan)?, is_tracked)?;
            }
        }
        for (row, name) in rows.iter_mut().zip(["tracked", "compared"]) {
            row.print(*written, name);
        }
    }
    snapback(&["verify".as_ref(), parent.as_os_str()])
}

/// Saves a guest on top of its parent, and returns what the program told.
fn save(guest: &Reverted, parent: &Path, image: &Path, plan: &Plan) -> Result<Vec<Value>> {
    let options = ["save", "--json", "--memory-only", "--compress", &plan.compress, "--parent"];
    let mut words = options.map(OsStr::new).to_vec();
    words.extend([parent.as_ref(), "--qmp".as_ref(), guest.socket.as_os_str(), image.as_ref()]);
    events(&words)
}

impl Row {
    fn add(&mut self, events: &[Value], is_tracked: bool) -> Result<()> {
        let (moment, saved) = (event(events, "moment")?, event(events, "saved")?);
        let number = |value: &Value| value.as_f64().ok_or_else(|| format!("{events:?}"));
        let since = &saved["changed_since"];
        if (since["by"] == "write_protection") != is_tracked {
            return Err(format!("{since} where that was not meant").into());
        }
        let unread = since["pages"].as_f64().unwrap_or(0.0);
        let pages = number(&saved["pages"])? + number(&saved["zero_pages"])? - unread;
        self.saved.push(number(&saved["ms"])?);
        self.pause.push(number(&moment["pause_ms"])?);
        self.changed.push(number(&moment["pause_parts"]["changed_ms"])?);
        self.looked_at.push(pages * PAGE_SIZE as f64 / MIB);
        self.image.push(number(&saved["image_bytes"])? / 1e6);
        Ok(())
    }

    fn print(&mut self, written: u64, name: &str) {
        let show = |times: &mut Vec<f64>, decimals: usize| {
            let [least, median, most] = [0, 50, 100].map(|share| percentile(times, share));
            format!("{median:.decimals$} [{least:.decimals$}..{most:.decimals$}]")
        };
        println!(
            "| {written} | {name} | {} | {} | {} | {} | {} |",
            show(&mut self.saved, 0),
            show(&mut self.pause, 1),
            show(&mut self.changed, 1),
            show(&mut self.looked_at, 0),
            show(&mut self.image, 1),
        );
    }
}
