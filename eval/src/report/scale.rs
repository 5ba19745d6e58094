//! Axes: from data to positions, and where the ticks go.

/// A linear or logarithmic axis from data to user units of the drawing.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Scale {
    low: f64,
    high: f64,
    from: f64,
    to: f64,
    logarithmic: bool,
}

impl Scale {
    /// Data from `low` to `high` onto `from` to `to`. An empty range is widened.
    pub(super) fn linear((low, high): (f64, f64), from: f64, to: f64) -> Self {
        let (low, high) = if low.is_finite() && high.is_finite() { (low.min(high), low.max(high)) } else { (0.0, 1.0) };
        let high = if high > low { high } else { low + low.abs().max(1.0) * 0.1 };
        Self { low, high, from, to, logarithmic: false }
    }

    /// As `linear`, by the logarithm; both ends must be positive, or the range is 0.1 to 1.
    pub(super) fn logarithmic((low, high): (f64, f64), from: f64, to: f64) -> Self {
        let (low, high) = if low > 0.0 && high > low && high.is_finite() { (low, high) } else { (0.1, 1.0) };
        Self { low, high, from, to, logarithmic: true }
    }

    /// Position of a value; beyond the ends, the end.
    pub(super) fn at(&self, value: f64) -> f64 {
        let (v, low, high) = (value.clamp(self.low, self.high), self.low, self.high);
        let share = if self.logarithmic { (v / low).ln() / (high / low).ln() } else { (v - low) / (high - low) };
        self.from + share * (self.to - self.from)
    }

    pub(super) fn holds(&self, value: f64) -> bool {
        value >= self.low && value <= self.high
    }

    /// About `count` round values inside: 1, 2 or 5 times a power of ten apart, or powers of ten.
    pub(super) fn ticks(&self, count: usize) -> Vec<f64> {
        if self.logarithmic {
            let (first, last) = (self.low.log10().ceil() as i32, self.high.log10().floor() as i32);
            let step = usize::try_from(last - first).unwrap_or(0) / count.max(1) + 1;
            return (first..=last).step_by(step).map(|e| 10f64.powi(e)).filter(|&t| self.holds(t)).collect();
        }
        let step = round_step((self.high - self.low) / count.max(1) as f64);
        let first = (self.low / step - 1e-9).ceil() as i64;
        let last = (self.high / step + 1e-9).floor() as i64;
        (first..=last.min(first + 100)).map(|i| i as f64 * step).collect()
    }
}

/// `low` and `high` moved outwards to multiples of a round step.
pub(super) fn rounded((low, high): (f64, f64), count: usize) -> (f64, f64) {
    if !(low.is_finite() && high.is_finite() && high > low) {
        return (low, high);
    }
    let step = round_step((high - low) / count.max(1) as f64);
    ((low / step + 1e-9).floor() * step, (high / step - 1e-9).ceil() * step)
}

/// Smallest and largest of the finite values.
pub(super) fn range(values: impl IntoIterator<Item = f64>) -> Option<(f64, f64)> {
    values.into_iter().filter(|v| v.is_finite()).fold(None, |range, v| match range {
        None => Some((v, v)),
        Some((low, high)) => Some((v.min(low), v.max(high))),
    })
}

/// How a tick is written: as many digits as its neighbours need.
pub(super) fn tick_text(tick: f64, ticks: &[f64]) -> String {
    let step = match ticks {
        [a, b, ..] => (b - a).abs().min(if *a > 0.0 { *a } else { f64::INFINITY }),
        _ => tick.abs(),
    };
    let decimals = if step > 0.0 { (-(step.log10() + 1e-9).floor()).clamp(0.0, 9.0) as usize } else { 0 };
    super::numbers::fixed(tick, decimals)
}

/// How a power of ten on a logarithmic axis is written.
pub(super) fn power_text(tick: f64) -> String {
    let exponent = tick.log10().round() as i32;
    if (-3..=4).contains(&exponent) {
        return super::numbers::fixed(tick, usize::try_from(-exponent).unwrap_or(0));
    }
    let digits: String = exponent
        .to_string()
        .chars()
        .map(|c| match c {
            '-' => '⁻',
            '0' => '⁰',
            '1' => '¹',
            '2' => '²',
            '3' => '³',
            '4' => '⁴',
            '5' => '⁵',
            '6' => '⁶',
            '7' => '⁷',
            '8' => '⁸',
            _ => '⁹',
        })
        .collect();
    format!("10{digits}")
}

fn round_step(raw: f64) -> f64 {
    if !(raw.is_finite() && raw > 0.0) {
        return 1.0;
    }
    let power = 10f64.powf(raw.log10().floor());
    let step = [1.0, 2.0, 5.0].into_iter().find(|s| s * power >= raw * 0.999_999);
    step.unwrap_or(10.0) * power
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_inside() {
        assert_eq!(Scale::linear((83.0, 104.0), 0.0, 1.0).ticks(5), [85.0, 90.0, 95.0, 100.0]);
        assert_eq!(Scale::logarithmic((2e-3, 30.0), 0.0, 1.0).ticks(6), [0.01, 0.1, 1.0, 10.0]);
        let ticks = Scale::linear((0.0, 0.47), 0.0, 1.0).ticks(5);
        let texts: Vec<String> = ticks.iter().map(|t| tick_text(*t, &ticks)).collect();
        assert_eq!(texts, ["0.0", "0.1", "0.2", "0.3", "0.4"]);
    }

    #[test]
    fn positions_stay_on_the_axis_whatever_the_data() {
        let s = Scale::linear((0.0, 10.0), 100.0, 200.0);
        assert_eq!([s.at(-5.0), s.at(5.0), s.at(50.0)], [100.0, 150.0, 200.0]);
        let log = Scale::logarithmic((0.01, 1.0), 0.0, 100.0);
        assert!((log.at(0.1) - 50.0).abs() < 1e-9);
        assert_eq!(log.at(0.0), 0.0);
        for degenerate in [(1.0, 1.0), (f64::NAN, 1.0), (0.0, 0.0), (f64::INFINITY, f64::NEG_INFINITY)] {
            assert!(Scale::linear(degenerate, 0.0, 1.0).at(0.5).is_finite());
            assert!(Scale::logarithmic(degenerate, 0.0, 1.0).at(0.5).is_finite());
            assert!(Scale::linear(degenerate, 0.0, 1.0).ticks(5).len() < 50);
        }
    }

    #[test]
    fn powers_of_ten_are_written_out_while_they_are_short() {
        assert_eq!(power_text(0.001), "0.001");
        assert_eq!(power_text(1e-5), "10⁻⁵");
        assert_eq!(power_text(1000.0), "1,000");
    }
}
