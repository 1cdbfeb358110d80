//! Medians and spreads.

use schemars::JsonSchema;
use serde::Serialize;

/// How values of one kind are spread.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, JsonSchema)]
pub struct Spread {
    /// How many there are.
    pub n: usize,
    /// The smallest.
    pub min: f64,
    /// The first quartile.
    pub q1: f64,
    /// The median.
    pub median: f64,
    /// The third quartile.
    pub q3: f64,
    /// The largest.
    pub max: f64,
}

impl Spread {
    /// The spread of some values; nothing of none. Values that are no numbers don't
    /// count.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Spread> {
        let mut values: Vec<f64> = values.into_iter().filter(|value| value.is_finite()).collect();
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        let [q1, median, q3] = [0.25, 0.5, 0.75].map(|share| quantile(&values, share));
        Some(Spread { n: values.len(), min, q1, median, q3, max })
    }
}

/// The value below which that share of the sorted values lies, interpolated between
/// neighbours (Hyndman and Fan's type 7, the usual one).
fn quantile(sorted: &[f64], share: f64) -> f64 {
    let place = (sorted.len() - 1) as f64 * share;
    let (below, above) = (place.floor() as usize, place.ceil() as usize);
    sorted[below] + (sorted[above] - sorted[below]) * place.fract()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quartiles_are_interpolated() {
        let spread = Spread::of([4.0, 1.0, 3.0, 2.0]).unwrap();
        let expected = Spread { n: 4, min: 1.0, q1: 1.75, median: 2.5, q3: 3.25, max: 4.0 };
        assert_eq!(spread, expected);
        let spread = Spread::of([5.0, 1.0, 4.0, 2.0, 3.0]).unwrap();
        let expected = Spread { n: 5, min: 1.0, q1: 2.0, median: 3.0, q3: 4.0, max: 5.0 };
        assert_eq!(spread, expected);
    }

    #[test]
    fn few_values_have_a_spread_and_none_have_none() {
        let one = Spread { n: 1, min: 7.0, q1: 7.0, median: 7.0, q3: 7.0, max: 7.0 };
        assert_eq!(Spread::of([7.0]), Some(one));
        assert_eq!(Spread::of([7.0, f64::NAN, f64::INFINITY]), Some(one));
        assert_eq!(Spread::of([f64::NAN]), None);
        assert_eq!(Spread::of([]), None);
    }
}
