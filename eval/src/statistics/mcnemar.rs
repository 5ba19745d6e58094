//! McNemar's exact test of two models on the same documents, each right or wrong.

/// Two-sided p-value that two models are right equally often, given on how many documents only the one and only the
/// other is right.
///
/// The exact conditional test: twice the binomial tail at 1/2, at most 1. The mid-p version is more powerful but exceeds
/// its level in places (Fagerland, Lydersen and Laake 2013); a recovery report must not call noise a loss, so this one
/// never does.
#[must_use]
pub fn mcnemar(only_first: usize, only_second: usize) -> f64 {
    let n = only_first + only_second;
    let smaller = only_first.min(only_second);
    if 2 * smaller == n {
        return 1.0;
    }
    // ln of C(n, k) 2⁻ⁿ for k = smaller, then the tail relative to that largest term, downwards.
    let log_term =
        (0..smaller).map(|i| ((n - i) as f64 / (i + 1) as f64).ln()).sum::<f64>() - n as f64 * std::f64::consts::LN_2;
    let mut tail = 0.0;
    let mut term = 1.0;
    for k in (0..=smaller).rev() {
        tail += term;
        term *= k as f64 / (n - k + 1) as f64;
        if term < tail * f64::EPSILON {
            break;
        }
    }
    (2.0 * log_term.exp() * tail).min(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn p_values_are_those_of_scipy_and_statsmodels() {
        // scipy.stats.binomtest(a, a + b).pvalue; statsmodels mcnemar([[0, a], [b, 0]], exact=True).pvalue
        let cases = [
            (0, 1, 1.0),
            (0, 6, 0.03125),
            (3, 12, 0.03515625),
            (5, 5, 1.0),
            (40, 71, 0.004195534185394861),
            (900, 1100, 8.45708953550381e-06),
            (10, 400, 2.568662833867262e-104),
        ];
        for (a, b, p) in cases {
            assert!((mcnemar(a, b) / p - 1.0).abs() < 1e-10, "{a} {b}: {} {p}", mcnemar(a, b));
            assert_eq!(mcnemar(a, b), mcnemar(b, a));
        }
    }

    #[test]
    fn models_that_differ_nowhere_have_p_one() {
        assert_eq!(mcnemar(0, 0), 1.0);
    }
}
