//! Measurements of one figure, and how they are shown.

/// Measurements of one figure.
#[derive(Debug, Clone, Default)]
pub struct Samples(Vec<f64>);

impl Samples {
    pub fn push(&mut self, value: f64) {
        let at = self.0.partition_point(|other| *other <= value);
        self.0.insert(at, value);
    }

    /// The value below which that share of the measurements lies, interpolated.
    /// None where nothing was measured.
    fn quantile(&self, share: f64) -> Option<f64> {
        let last = self.0.len().checked_sub(1)?;
        let place = share * last as f64;
        let (below, above) = (place.floor() as usize, place.ceil() as usize);
        Some(self.0[below] + (self.0[above] - self.0[below]) * (place - below as f64))
    }

    pub fn median(&self) -> Option<f64> {
        self.quantile(0.5)
    }

    pub fn max(&self) -> Option<f64> {
        self.0.last().copied()
    }

    /// `median [quartiles] min..max`; a dash where nothing was measured.
    pub fn show(&self, decimals: usize) -> String {
        let at = |share| self.quantile(share).map(|value| format!("{value:.decimals$}"));
        match (at(0.5), at(0.25), at(0.75), at(0.0), at(1.0)) {
            (Some(median), Some(q1), Some(q3), Some(min), Some(max)) => {
                format!("{median} [{q1} {q3}] {min}..{max}")
            }
            _ => "-".into(),
        }
    }
}
