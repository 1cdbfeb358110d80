//! Two benches beside each other: what has changed, and how sure that is.

use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::Serialize;
use serde_json::Value;

use super::record::RECORD;
use super::state::TOLERATED;
use super::stats::Spread;
use super::{METRICS, Metric};
use crate::kind::{Details, ErrorKind};

/// So many times both sides are drawn anew from their own runs.
const DRAWS: usize = 10_000;

/// The share of the draws that the interval holds which is told, and of that by which is judged: of
/// twenty quantities that have not changed, one has the first beside no change by chance.
const TOLD: f64 = 0.95;
const JUDGED: f64 = 0.99;

/// With fewer runs on a side, nothing is judged.
const RUNS: usize = 10;

/// Why two benches can't be compared.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CompareError {
    /// A file can't be read.
    #[error("reading `{}` failed: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file is not what `bench --save` writes.
    #[error("`{}` is not what `bench --save` writes: {why}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
}

impl CompareError {
    /// What kind of error it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            CompareError::Read { source, .. } => ErrorKind::of_io(source),
            CompareError::Format { .. } => ErrorKind::InputInvalid,
        }
    }

    /// What it is about.
    pub fn details(&self) -> Details {
        let (CompareError::Read { path, .. } | CompareError::Format { path, .. }) = self;
        Details::new(&self.to_string(), Some(path), None)
    }
}

/// What may be said of a quantity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// It has become less.
    Less,
    /// It has become more.
    More,
    /// Neither can be said.
    Open,
}

/// A quantity of a way on both sides.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
pub struct Change {
    /// The way.
    pub way: String,
    /// Whether the files were in the page cache.
    pub cache: String,
    /// The quantity.
    pub quantity: &'static str,
    /// Runs of the first side.
    pub base_runs: usize,
    /// Runs of the second.
    pub new_runs: usize,
    /// The median of the first side.
    pub base: f64,
    /// The median of the second.
    pub new: f64,
    /// The second median divided by the first, less 1.
    pub change: f64,
    /// The lower end of the interval of 95 % of the change.
    pub low: f64,
    /// The upper end.
    pub high: f64,
    /// What may be said.
    pub verdict: Verdict,
}

/// Two benches beside each other.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
pub struct Comparison {
    /// What differs between the two beside the program.
    pub warnings: Vec<String>,
    /// Each way, with each state of the page cache, and each quantity that both have.
    pub changes: Vec<Change>,
}

/// Compares two files of `bench --save`.
///
/// # Errors
/// When one of them can't be read.
pub fn compare(base: &Path, new: &Path) -> Result<Comparison, CompareError> {
    let (base, new) = (Saved::read(base)?, Saved::read(new)?);
    let spoilt = [&base, &new].into_iter().any(|side| side.spoilt().is_some());
    let mut changes = Vec::new();
    for (way, cache) in base.kinds() {
        for metric in METRICS {
            let of = |side: &Saved| side.values(&way, &cache, metric.key);
            let change = change(&way, &cache, metric, &of(&base), &of(&new));
            // What others did to one side is no change of the program's.
            let judged = |change: Change| match spoilt {
                true => Change { verdict: Verdict::Open, ..change },
                false => change,
            };
            changes.extend(change.map(judged));
        }
    }
    Ok(Comparison { warnings: warnings(&base, &new), changes })
}

/// A file of `bench --save`.
struct Saved {
    value: Value,
}

impl Saved {
    fn read(path: &Path) -> Result<Saved, CompareError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| CompareError::Read { path: path.to_owned(), source })?;
        let wrong = |why: String| CompareError::Format { path: path.to_owned(), why };
        let value: Value = serde_json::from_str(&text).map_err(|error| wrong(error.to_string()))?;
        match (&value["record"], value["runs"].is_array()) {
            (Value::String(record), true) if record == RECORD => Ok(Saved { value }),
            (record, _) => Err(wrong(format!("`record` is {record}, and not \"{RECORD}\""))),
        }
    }

    fn runs(&self) -> impl Iterator<Item = &Value> {
        self.value["runs"].as_array().into_iter().flatten()
    }

    /// The ways with each state of the page cache, as they took turns.
    fn kinds(&self) -> Vec<(String, String)> {
        let mut kinds = Vec::new();
        for run in self.runs() {
            let text = |key: &str| run[key].as_str().unwrap_or_default().to_owned();
            let kind = (text("way"), text("cache"));
            if !kinds.contains(&kind) {
                kinds.push(kind);
            }
        }
        kinds
    }

    /// The share of the processors that others had meanwhile, where that spoils all figures.
    fn spoilt(&self) -> Option<f64> {
        let share = |pointer| self.value.pointer(pointer).and_then(Value::as_f64);
        let others = share("/state/others_share").unwrap_or_default();
        let all = others + share("/state/stolen_share").unwrap_or_default();
        (all > TOLERATED).then_some(all)
    }

    fn values(&self, way: &str, cache: &str, key: &str) -> Vec<f64> {
        let runs = self.runs().filter(|run| run["way"] == way && run["cache"] == cache);
        runs.filter_map(|run| run[key].as_f64()).filter(|value| value.is_finite()).collect()
    }
}

/// What has to be the same for a change to be the program's.
fn warnings(base: &Saved, new: &Saved) -> Vec<String> {
    const SAME: [(&str, &str); 8] = [
        ("/host/cpu", "the processor"),
        ("/host/cpus", "the number of processors"),
        ("/host/kernel", "the kernel"),
        ("/subject/identity", "the image"),
        ("/subject/qemu", "QEMU"),
        ("/state/governor", "the processors' governor"),
        ("/state/huge_pages", "transparent huge pages"),
        ("/state/pinned", "the processors that it was pinned to"),
    ];
    let differ = SAME.iter().filter_map(|(pointer, what)| {
        let (one, other) = (base.value.pointer(pointer)?, new.value.pointer(pointer)?);
        (one != other).then(|| format!("{what} differs: {one}, then {other}"))
    });
    let loaded =
        [("the first", base), ("the second", new)].into_iter().filter_map(|(which, side)| {
            let percent = side.spoilt()? * 100.0;
            Some(format!(
                "during {which} others had {percent:.0} % of the processors: nothing is judged"
            ))
        });
    differ.chain(loaded).collect()
}

fn change(way: &str, cache: &str, metric: &Metric, base: &[f64], new: &[f64]) -> Option<Change> {
    let (base_spread, new_spread) =
        (Spread::of(base.iter().copied())?, Spread::of(new.iter().copied())?);
    // A quantity that is 0 has no relative change.
    if base_spread.median <= 0.0 {
        return None;
    }
    let changes = draws(base, new);
    let [low, high] = interval(&changes, TOLD)?;
    let judged = interval(&changes, JUDGED)?;
    let verdict = match judged {
        _ if base.len() < RUNS || new.len() < RUNS => Verdict::Open,
        [_, high] if high < 0.0 => Verdict::Less,
        [low, _] if low > 0.0 => Verdict::More,
        _ => Verdict::Open,
    };
    Some(Change {
        way: way.to_owned(),
        cache: cache.to_owned(),
        quantity: metric.key,
        base_runs: base.len(),
        new_runs: new.len(),
        base: base_spread.median,
        new: new_spread.median,
        change: new_spread.median / base_spread.median - 1.0,
        low,
        high,
        verdict,
    })
}

/// The changes of the median between runs that are drawn from each side, with replacement: the
/// bootstrap. Sorted.
fn draws(base: &[f64], new: &[f64]) -> Vec<f64> {
    // The same files give the same interval.
    let mut random = Random(0x5eed);
    let mut drawn = Vec::new();
    let mut changes: Vec<f64> = (0..DRAWS)
        .filter_map(|_| {
            let base = median_of_draw(base, &mut drawn, &mut random);
            let new = median_of_draw(new, &mut drawn, &mut random);
            (base > 0.0).then(|| new / base - 1.0)
        })
        .collect();
    changes.sort_by(f64::total_cmp);
    changes
}

fn median_of_draw(values: &[f64], drawn: &mut Vec<f64>, random: &mut Random) -> f64 {
    drawn.clear();
    drawn.extend((0..values.len()).map(|_| values[random.below(values.len())]));
    let middle = drawn.len() / 2;
    let (below, upper, _) = drawn.select_nth_unstable_by(middle, f64::total_cmp);
    match values.len() % 2 {
        1 => *upper,
        _ => (below.iter().copied().fold(f64::NEG_INFINITY, f64::max) + *upper) / 2.0,
    }
}

/// The ends between which that share of the sorted values lies.
fn interval(sorted: &[f64], share: f64) -> Option<[f64; 2]> {
    let last = sorted.len().checked_sub(1)? as f64;
    let at = |place: f64| sorted[(place * last).round() as usize];
    Some([at((1.0 - share) / 2.0), at((1.0 + share) / 2.0)])
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        // The product's upper half is below the limit, and even enough for limits as small as these.
        ((u128::from(z ^ (z >> 31)) * limit as u128) >> 64) as usize
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn saved(times: &[f64], kernel: &str) -> tempfile::NamedTempFile {
        saved_beside(0.0, times, kernel)
    }

    fn saved_beside(others: f64, times: &[f64], kernel: &str) -> tempfile::NamedTempFile {
        let runs: Vec<Value> = times
            .iter()
            .map(|ms| json!({ "way": "uffd", "cache": "warm", "running_ms": ms, "faults": 0 }))
            .collect();
        let file = tempfile::NamedTempFile::new().unwrap();
        let record = json!({
            "record": RECORD, "host": { "kernel": kernel }, "runs": runs,
            "state": { "others_share": others },
        });
        std::fs::write(file.path(), record.to_string()).unwrap();
        file
    }

    fn spread(middle: f64, runs: usize) -> Vec<f64> {
        (0..runs).map(|run| middle + (run % 5) as f64 * 0.1 - 0.2).collect()
    }

    #[test]
    fn a_clear_change_is_judged_and_noise_is_not() {
        let base = saved(&spread(10.0, 20), "a");
        let slower = compare(base.path(), saved(&spread(12.0, 20), "a").path()).unwrap();
        let [change] = &slower.changes[..] else { panic!("{slower:?}") };
        assert_eq!((change.verdict, change.base, change.new), (Verdict::More, 10.0, 12.0));
        assert!((change.change - 0.2).abs() < 1e-9 && change.low > 0.15 && change.high < 0.25);

        let same = compare(base.path(), saved(&spread(10.0, 20), "a").path()).unwrap();
        assert_eq!(same.changes[0].verdict, Verdict::Open);
        assert!(same.changes[0].low <= 0.0 && same.changes[0].high >= 0.0, "{same:?}");
        let spoilt = saved_beside(0.3, &spread(12.0, 20), "a");
        let spoilt = compare(base.path(), spoilt.path()).unwrap();
        assert_eq!((spoilt.changes[0].verdict, spoilt.warnings.len()), (Verdict::Open, 1));
        let faster = compare(base.path(), saved(&spread(9.0, 20), "a").path()).unwrap();
        assert_eq!(faster.changes[0].verdict, Verdict::Less);
    }

    #[test]
    fn few_runs_are_not_judged_and_another_machine_is_told() {
        let (base, new) = (saved(&spread(10.0, 9), "a"), saved(&spread(20.0, 9), "b"));
        let comparison = compare(base.path(), new.path()).unwrap();
        assert_eq!(comparison.changes[0].verdict, Verdict::Open);
        assert!(comparison.warnings[0].contains("kernel"), "{comparison:?}");
    }

    #[test]
    fn what_is_no_record_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for text in ["", "{}", "{\"record\": \"snapback bench 9\", \"runs\": []}"] {
            std::fs::write(file.path(), text).unwrap();
            let refused = compare(file.path(), file.path());
            assert!(matches!(refused, Err(CompareError::Format { .. })), "{refused:?}");
        }
    }

    #[test]
    fn intervals_hold_the_share_they_say() {
        let sorted: Vec<f64> = (0..=1000).map(f64::from).collect();
        assert_eq!(interval(&sorted, 0.95), Some([25.0, 975.0]));
        assert_eq!(interval(&[], 0.95), None);
    }
}
