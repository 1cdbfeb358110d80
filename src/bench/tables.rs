//! A summary as tables, for the terminal and the report.

use super::{Cache, METRICS, Method, Metric, Ratio, Spread, Summary, Unit, WaySummary};

/// Quantities that are shown together: one row a way, one column each.
pub struct Table {
    /// What they have in common.
    pub title: String,
    /// The columns' titles, and the state of the page cache that each is for.
    pub columns: Vec<(String, Cache)>,
    /// The rows; a cell is absent where its quantity was not measured.
    pub rows: Vec<(Method, Vec<Option<Cell>>)>,
}

/// A spread, and the unit that its values are in.
#[derive(Debug, Clone, Copy)]
pub struct Cell {
    /// The spread.
    pub spread: Spread,
    /// The unit.
    pub unit: Unit,
}

impl Cell {
    /// The smallest value, first quartile, median, third quartile and largest value, as
    /// shown.
    pub fn show(&self) -> [String; 5] {
        let Spread { min, q1, median, q3, max, .. } = self.spread;
        [min, q1, median, q3, max].map(|value| self.unit.show(value))
    }
}

/// The tables of all quantities that were measured.
pub fn quantities(summary: &Summary) -> Vec<Table> {
    let mut groups: Vec<(&str, Vec<(&Metric, Cache)>)> = Vec::new();
    for metric in METRICS {
        for cache in summary.caches() {
            let known =
                |way: &WaySummary| way.cache == cache && way.metrics.contains_key(metric.key);
            if !summary.ways.iter().any(known) {
                continue;
            }
            match groups.last_mut().filter(|(group, _)| *group == metric.group) {
                Some((_, columns)) => columns.push((metric, cache)),
                None => groups.push((metric.group, vec![(metric, cache)])),
            }
        }
    }
    let table = |(group, columns): (&str, Vec<(&Metric, Cache)>)| {
        let title = |(metric, cache): &(&Metric, Cache)| (title(summary, metric), *cache);
        let row = |way| {
            let cell = |(metric, cache): &(&Metric, Cache)| {
                let spread = *summary.spread(way, *cache, metric.key)?;
                Some(Cell { spread, unit: metric.unit })
            };
            (way, columns.iter().map(cell).collect())
        };
        Table {
            title: group.into(),
            columns: columns.iter().map(title).collect(),
            rows: with_values(summary.methods().into_iter().map(row)),
        }
    };
    groups.into_iter().map(table).collect()
}

/// The tables of ratios: to which point, and one column a peer.
pub fn ratios(summary: &Summary) -> Vec<Table> {
    let table = |compared: &Metric| {
        let ratios = || summary.ratios.iter().filter(|ratio| ratio.to == compared.key);
        let mut kinds: Vec<(Method, Cache)> = Vec::new();
        for ratio in ratios() {
            if !kinds.contains(&(ratio.peer, ratio.cache)) {
                kinds.push((ratio.peer, ratio.cache));
            }
        }
        let row = |way: Method| {
            let cell = |(peer, cache): &(Method, Cache)| {
                let same = |r: &&Ratio| r.way == way && r.peer == *peer && r.cache == *cache;
                Some(Cell { spread: ratios().find(same)?.ratio, unit: Unit::Ratio })
            };
            (way, kinds.iter().map(cell).collect())
        };
        Table {
            title: nth(summary, compared.title),
            columns: kinds.iter().map(|(peer, cache)| (peer.name().into(), *cache)).collect(),
            rows: with_values(summary.methods().into_iter().map(row)),
        }
    };
    summary.subject.compared().iter().map(table).filter(|table| !table.rows.is_empty()).collect()
}

/// The rows that have any value.
fn with_values(
    rows: impl Iterator<Item = (Method, Vec<Option<Cell>>)>,
) -> Vec<(Method, Vec<Option<Cell>>)> {
    rows.filter(|(_, cells)| cells.iter().any(Option::is_some)).collect()
}

/// A quantity's title with its unit.
fn title(summary: &Summary, metric: &Metric) -> String {
    match metric.unit.sign() {
        "" => nth(summary, metric.title),
        unit => format!("{}, {unit}", nth(summary, metric.title)),
    }
}

/// A title in which `Nth` is a number.
fn nth(summary: &Summary, title: &str) -> String {
    match summary.subject.nth {
        Some(nth) => title.replace("Nth sign", &format!("sign {nth}")),
        None => title.into(),
    }
}
