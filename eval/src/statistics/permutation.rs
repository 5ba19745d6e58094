//! The paired permutation test: would the difference be this large if the models' labels were exchanged at random?

use super::random::Random;

/// With at most this many documents that differ, all 2ⁿ exchanges are tried.
const EXACT_AT_MOST: usize = 16;

/// Sums within this relative distance are ties: they differ by rounding only.
const TIE: f64 = 1e-10;

const FLIPS_AT_A_TIME: usize = 64;

/// Two-sided p-value that two models score the same, from the documents' differences: each document's sign is flipped
/// with probability 1/2. Documents with several repeats are flipped as one.
///
/// Exact where few documents differ; otherwise (b + 1) / (m + 1) for b of m = `flips` random flips that are as extreme
/// as what was observed (Phipson and Smyth 2010), which never falls below 1 / (m + 1).
#[must_use]
pub fn paired_permutation(differences: impl Iterator<Item = f64>, flips: usize, random: &mut Random) -> f64 {
    let differences: Vec<f64> = differences.filter(|d| *d != 0.0).collect();
    let observed = differences.iter().sum::<f64>().abs();
    let limit = observed - TIE * differences.iter().map(|d| d.abs()).sum::<f64>();
    let tables: Vec<[f64; 256]> = differences.chunks(8).map(signed_sums).collect();
    if differences.len() <= EXACT_AT_MOST {
        let all = 1u32 << differences.len();
        let extreme = (0..all)
            .filter(|signs| {
                let sum: f64 = tables.iter().enumerate().map(|(i, t)| t[(signs >> (8 * i) & 0xff) as usize]).sum();
                sum.abs() >= limit
            })
            .count();
        return extreme as f64 / f64::from(all);
    }
    let mut extreme = 0;
    let mut done = 0;
    while done < flips {
        // Many flips at a time, so that a table is in the first-level cache for all of them.
        let mut sums = [0.0f64; FLIPS_AT_A_TIME];
        let sums = &mut sums[..FLIPS_AT_A_TIME.min(flips - done)];
        for tables in tables.chunks(8) {
            let signs: [u64; FLIPS_AT_A_TIME] = std::array::from_fn(|_| random.bits());
            for (i, table) in tables.iter().enumerate() {
                for (sum, signs) in sums.iter_mut().zip(signs) {
                    *sum += table[(signs >> (8 * i) & 0xff) as usize];
                }
            }
        }
        extreme += sums.iter().filter(|sum| sum.abs() >= limit).count();
        done += sums.len();
    }
    (extreme + 1) as f64 / (flips + 1) as f64
}

/// The sum of up to eight differences under each choice of their signs, bit i choosing that of the i-th.
fn signed_sums(differences: &[f64]) -> [f64; 256] {
    std::array::from_fn(|signs| {
        differences.iter().enumerate().map(|(i, d)| if signs >> i & 1 == 1 { -d } else { *d }).sum()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn p_values_are_those_of_scipy() {
        // scipy.stats.permutation_test((d,), np.sum, permutation_type="samples", n_resamples=np.inf).pvalue
        let cases: [(&[f64], f64); 3] = [
            (&[0.3, -0.1, 0.25, 0.5, 0.125, -0.0625, 0.4], 0.078125),
            (&[1.0, 1.0, 1.0, 1.0, -1.0, 1.0, 1.0, 1.0, 1.0, -1.0], 0.109375),
            (&[2.5, -1.5, 0.5, 0.75], 0.625),
        ];
        for (d, p) in cases {
            let got = paired_permutation(d.iter().copied(), 0, &mut Random::new(1));
            assert!((got - p).abs() < 1e-12, "{d:?}: {got} {p}");
        }
    }

    #[test]
    fn random_flips_come_close_to_all_of_them() {
        // scipy as above for the 18 differences 0.1, 0.2, -0.3, 0.4, 0.5, -0.6, …
        let d = (1..=18).map(|i| 0.1 * f64::from(i) * if i % 3 == 0 { -1.0 } else { 1.0 });
        let got = paired_permutation(d, 100_000, &mut Random::new(7));
        assert!((got - EXACT_18).abs() < 5.0 * (EXACT_18 * (1.0 - EXACT_18) / 1e5).sqrt(), "{got}");
    }

    const EXACT_18: f64 = 0.34654998779296875;

    #[test]
    fn no_p_value_is_below_one_over_the_number_of_flips() {
        let p = paired_permutation(std::iter::repeat_n(1.0, 100), 99, &mut Random::new(1));
        assert_eq!(p, 0.01);
        assert_eq!(paired_permutation(std::iter::repeat_n(0.0, 100), 99, &mut Random::new(1)), 1.0);
    }
}
