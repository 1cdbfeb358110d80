//! Questions and their answers, one line each; tests/guest/README.md lists them.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::clock;
use crate::config::Load;
use crate::devices::{self, Held};
use crate::disk::Disk;
use crate::load::Writers;
use crate::records::Records;
use crate::region::Region;

/// Most writers that can be asked for.
const MAX_WRITERS: u64 = 64;

/// Everything that questions are about.
pub struct Oracle {
    pub region: Arc<Region>,
    pub writers: Writers,
    /// Milliseconds between two heartbeats, 0 for none; the heart reads it.
    pub beat_ms: Arc<AtomicU64>,
    /// Time that filling the region took.
    pub fill: Duration,
    /// The writer of records, when there is one.
    pub records: Option<Records>,
    /// Memory that was asked to be held.
    pub held: Option<Held>,
}

/// A question that has no answer.
struct Unanswerable(String);

impl<T: fmt::Display> From<T> for Unanswerable {
    fn from(reason: T) -> Unanswerable {
        Unanswerable(reason.to_string())
    }
}

/// 128 bits in hexadecimal.
pub fn hex(nonce: [u64; 2]) -> String {
    format!("{:016x}{:016x}", nonce[0], nonce[1])
}

/// Milliseconds of the guest's CLOCK_MONOTONIC.
pub fn uptime_ms() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call writes one timespec, which `now` is. It can't fail: the
    // clock exists and the pointer is good.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) };
    now.tv_sec as u64 * 1000 + now.tv_nsec as u64 / 1_000_000
}

impl Oracle {
    /// Answers one question. A first word `#…` is a tag, and comes back before the
    /// answer: whoever asks knows which answer is theirs.
    pub fn answer(&mut self, line: &str) -> String {
        let (tag, question) = match line.split_once(' ') {
            Some((tag, rest)) if tag.starts_with('#') => (format!("{tag} "), rest),
            _ => (String::new(), line),
        };
        let words: Vec<&str> = question.split_whitespace().collect();
        match self.reply(&words) {
            Ok(reply) => format!("{tag}{reply}"),
            Err(Unanswerable(reason)) => format!("{tag}error {reason}"),
        }
    }

    fn reply(&mut self, words: &[&str]) -> Result<String, Unanswerable> {
        Ok(match words {
            ["ping"] => "pong".into(),
            ["nonce"] => hex(self.region.nonce()),
            ["uptime"] => uptime_ms().to_string(),
            ["check"] => self.check(),
            ["sum"] => self.sum()?,
            ["stats"] => self.stats(),
            ["writers", count, rate] => self.load(number(count)?, number(rate)?, 0)?,
            ["writers", count, rate, hot] => {
                self.load(number(count)?, number(rate)?, number(hot)?)?
            }
            ["beat", interval] => {
                self.beat_ms.store(number(interval)?, Ordering::Relaxed);
                "ok".into()
            }
            ["idle"] => {
                self.writers.stop();
                self.beat_ms.store(0, Ordering::Relaxed);
                "ok".into()
            }
            ["sweep", read, rewritten] => {
                let (read, rewritten) = (number(read)?, number(rewritten)?);
                self.page(read.max(rewritten), "page")?;
                (0..rewritten).for_each(|page| self.region.rewrite(page));
                format!("ok read={:x}", self.region.touch(0..read))
            }
            ["zero", first, end] => {
                let (first, end) = (number(first)?, self.page(number(end)?, "end")?);
                format!("ok zeroed={}", self.region.zero(first..end))
            }
            ["damage", page, word] => {
                let page = number(page)?;
                self.page(page.saturating_add(1), "page")?;
                self.region.damage(page, number(word)? as usize);
                "ok".into()
            }
            ["disk", "write", path, pages, seed] => {
                self.disk(path, pages, seed)?.write()?;
                "ok".into()
            }
            ["disk", "check", path, pages, seed] => match self.disk(path, pages, seed)?.check()? {
                None => "ok".into(),
                Some(page) => format!("bad first={page}"),
            },
            ["records", "start", device, pause_ms] => self.start_records(device, pause_ms)?,
            ["records"] => {
                self.records.as_ref().ok_or("no writer of records")?.acknowledged().to_string()
            }
            ["records", "check"] => self.records.as_ref().ok_or("no writer of records")?.check()?,
            ["records", "stop"] => {
                let records = self.records.take().ok_or("no writer of records")?;
                format!("ok acknowledged={}", records.stop()?)
            }
            ["devices"] => devices::list()?,
            ["cpus"] => devices::online_cpus()?.to_string(),
            ["memory"] => devices::online_memory()?.to_string(),
            ["hold", mib, seed] => {
                self.held = Some(Held::new(number(mib)?, number(seed)?));
                "ok".into()
            }
            ["held"] => format!("wrong={}", self.held.as_ref().ok_or("nothing held")?.wrong()),
            ["random"] => devices::random()?,
            ["say", port, line] => {
                devices::say(port, line)?;
                "ok".into()
            }
            ["arp", card] => match devices::arp(card)? {
                true => "ok".into(),
                false => return Err("nobody has answered".into()),
            },
            ["time"] => format!("wall_ms={} rtc_s={}", clock::wall_ms(), clock::rtc_seconds()?),
            _ => return Err("unknown question".into()),
        })
    }

    fn check(&self) -> String {
        let census = self.region.check();
        // A page that writers met and nobody repaired is as bad as one found now.
        let seen = self.region.counters().bad.load(Ordering::Relaxed);
        format!(
            "check {} pages={} zero={} bad={} seen_bad={seen} generation_sum={}",
            if census.bad == 0 && seen == 0 { "ok" } else { "bad" },
            census.pages,
            census.zero,
            census.bad,
            census.generation_sum,
        )
    }

    fn sum(&self) -> Result<String, Unanswerable> {
        if self.writers.load().writers > 0 {
            return Err("writers are running: ask `writers 0 0` first".into());
        }
        let census = self.region.digest();
        Ok(format!("sum {:016x} generation_sum={}", census.digest, census.generation_sum))
    }

    fn stats(&self) -> String {
        let (counters, load) = (self.region.counters(), self.writers.load());
        format!(
            "stats uptime_ms={} fill_ms={} pages={} verified={} rewritten={} bad={} writers={} rate={} hot_pages={}",
            uptime_ms(),
            self.fill.as_millis(),
            self.region.pages(),
            counters.verified.load(Ordering::Relaxed),
            counters.rewritten.load(Ordering::Relaxed),
            counters.bad.load(Ordering::Relaxed),
            load.writers,
            load.rate,
            load.hot_pages,
        )
    }

    fn load(&mut self, writers: u64, rate: u64, hot_pages: u64) -> Result<String, Unanswerable> {
        if writers > MAX_WRITERS {
            return Err(format!("more than {MAX_WRITERS} writers").into());
        }
        self.writers.stop();
        self.writers = Writers::start(&self.region, Load { writers, rate, hot_pages });
        Ok("ok".into())
    }

    /// Passes on a number of pages which the region has.
    fn page(&self, number: u64, name: &str) -> Result<u64, Unanswerable> {
        if number > self.region.pages() {
            return Err(format!("{name} is outside of {} pages", self.region.pages()).into());
        }
        Ok(number)
    }

    fn start_records(&mut self, device: &str, pause_ms: &str) -> Result<String, Unanswerable> {
        if self.records.is_some() {
            return Err("there is a writer of records".into());
        }
        let pause = Duration::from_millis(number(pause_ms)?);
        let (records, ledger) = Records::start(device, pause, self.region.nonce())?;
        self.records = Some(records);
        Ok(format!("ok ledger={ledger}"))
    }

    fn disk<'a>(&self, path: &'a str, pages: &str, seed: &str) -> Result<Disk<'a>, Unanswerable> {
        Ok(Disk { path, pages: number(pages)?, seed: [number(seed)?, 0] })
    }
}

fn number(word: &str) -> Result<u64, Unanswerable> {
    word.parse().map_err(|_| Unanswerable(format!("{word} is not a number")))
}
