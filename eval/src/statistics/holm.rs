//! Holm's correction for many comparisons.

/// Holm's step-down adjusted p-values, in the order given: rejecting where they are at most α keeps the probability of
/// any false rejection at α, whatever the dependence (Holm 1979; R's `p.adjust(p, "holm")`).
#[must_use]
pub fn holm(p_values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..p_values.len()).collect();
    order.sort_by(|&a, &b| p_values[a].total_cmp(&p_values[b]));
    let mut adjusted = vec![0.0; p_values.len()];
    let mut floor = 0.0f64;
    for (rank, i) in order.into_iter().enumerate() {
        floor = floor.max(p_values[i] * (p_values.len() - rank) as f64).min(1.0);
        adjusted[i] = floor;
    }
    adjusted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adjusted_values_are_those_of_statsmodels() {
        // statsmodels.stats.multitest.multipletests([0.01, 0.04, 0.03, 0.005, 0.6], method="holm")[1]
        let got = holm(&[0.01, 0.04, 0.03, 0.005, 0.6]);
        for (a, b) in got.iter().zip([0.04, 0.09, 0.09, 0.025, 0.6]) {
            assert!((a - b).abs() < 1e-15, "{got:?}");
        }
        assert!(holm(&[]).is_empty());
        assert_eq!(holm(&[0.9, 0.8]), [1.0, 1.0]);
    }
}
