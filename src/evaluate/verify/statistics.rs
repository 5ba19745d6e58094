//! Means and how sure they are, of values of which neighbours are not independent.

/// Neighbouring values that count as one.
const BLOCK: usize = 16;

/// The mean; `None` of nothing.
pub fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (sum, n) = values.fold((0.0, 0usize), |(sum, n), v| (sum + v, n + 1));
    (n > 0).then(|| sum / n as f64)
}

/// The root of the mean of squares; `None` of nothing.
pub fn root_mean_square(values: impl Iterator<Item = f64>) -> Option<f64> {
    mean(values.map(|v| v * v)).map(f64::sqrt)
}

/// The standard error of the mean of all values of `runs`. Within a run, blocks of 16 values are taken as one, because what
/// goes wrong at a token is seen at the next ones too.
pub fn standard_error<R: Iterator<Item = f64>>(runs: impl Iterator<Item = R>) -> f64 {
    let runs: Vec<Vec<f64>> = runs.map(Iterator::collect).collect();
    let n = runs.iter().map(Vec::len).sum::<usize>();
    let Some(mean) = mean(runs.iter().flatten().copied()) else { return 0.0 };
    let blocks = runs.iter().flat_map(|run| run.chunks(BLOCK));
    let squares: f64 = blocks.map(|block| block.iter().map(|v| v - mean).sum::<f64>().powi(2)).sum();
    squares.sqrt() / n as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_that_go_together_count_as_one() {
        let alone: Vec<f64> = (0..4096).map(|i| f64::from((i * 7919 % 4096) as u16) / 4096.0 - 0.5).collect();
        let error = standard_error(std::iter::once(alone.iter().copied()));
        let independent = root_mean_square(alone.iter().copied()).unwrap() / 64.0;
        assert!(error < 2.0 * independent && error > independent / 8.0, "{error} {independent}");
        let together: Vec<f64> = (0..4096).map(|i| alone[i / 16 * 16]).collect();
        let error = standard_error(std::iter::once(together.iter().copied()));
        assert!((2.5..6.0).contains(&(error / independent)), "{error} {independent}");
        assert_eq!(standard_error(std::iter::empty::<std::iter::Empty<f64>>()), 0.0);
        assert_eq!((mean(std::iter::empty()), root_mean_square([3.0, -3.0].into_iter())), (None, Some(3.0)));
    }
}
