//! Two rows of logits, a baseline's and a model's: losses and divergence, computed in f64. The definition for every backend
//! that has a kernel of its own.
//!
//! Logits must be finite, with one exception: -inf rules a token out. Where the baseline rules it out it adds nothing to
//! the divergence, whatever the model says; a model that rules out what the baseline does not has an infinite divergence,
//! and a right token that either rules out an infinite perplexity: both are errors.
//!
//! Three passes over f32 rows that fit into the second-level cache: maximum, sums of exponentials with the sum that the
//! divergence needs, position of the maximum. [`LANES`] independent sums let the compiler use vector instructions; their
//! number is fixed, so the result is the same on every machine that rounds as IEEE 754 says.

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// What is known of one predicted token.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Pair {
    /// -ln of the right token's probability.
    pub loss: f64,
    pub baseline_loss: f64,
    /// KL(baseline ‖ model), nats.
    pub kl: f64,
    /// Probability of the right token, model minus baseline.
    pub delta_p: f64,
    /// Whether both hold the same token most probable; of equal ones the first counts.
    pub same_top: bool,
}

/// Why two rows have no divergence.
#[derive(Clone, Copy, Debug, Error, PartialEq)]
pub enum RowError {
    #[error(
        "the {which}'s logit of token {token} is {value}, expected a finite number: the {which} computes garbage here"
    )]
    NotFinite { which: &'static str, token: usize, value: f32 },
    #[error(
        "the {which} rules out token {token} (its logit is -inf), which the baseline or the text does not: the divergence is infinite"
    )]
    RuledOut { which: &'static str, token: usize },
}

const LANES: usize = 8;

/// Logits worked on at a time: their f64s stay in the first-level cache.
const BLOCK: usize = 256;

/// What rounding may make of a divergence of 0. Rounding below 0 by less than this is set to 0; more would be a fault and
/// stays to be seen (as the minimum).
const ROUNDING: f64 = 1e-12;

/// Compares two rows of the same length that holds `target`.
///
/// # Errors
/// What is neither finite nor ruled out in both.
pub fn compare_rows(baseline: &[f32], model: &[f32], target: usize) -> Result<Pair, RowError> {
    let (base_finite, base_max) = finite_and_max(baseline);
    let (finite, max) = finite_and_max(model);
    let all_finite = base_finite && finite;
    if !all_finite {
        check(baseline, model, target)?;
    }
    let (base_max, max) = (f64::from(base_max), f64::from(max));
    let sum = if all_finite { sums } else { sums_of_possible };
    let sums = sum(baseline, model, base_max, max);
    let totals = Totals {
        sums: [sums.baseline, sums.model],
        weighted: sums.weighted,
        targets: [f64::from(baseline[target]) - base_max, f64::from(model[target]) - max],
        same_top: first(baseline, base_max) == first(model, max),
    };
    Ok(totals.pair())
}

/// What the figures of two rows b and m of finite logits follow from, logits less their row's maximum: for who has it without
/// the rows.
#[derive(Clone, Copy, Debug)]
pub struct Totals {
    /// Σ exp(b), Σ exp(m).
    pub sums: [f64; 2],
    /// Σ exp(b)·(b - m).
    pub weighted: f64,
    /// b and m of the right token.
    pub targets: [f64; 2],
    /// Whether the same token is most probable in both.
    pub same_top: bool,
}

impl Totals {
    /// The figures.
    #[must_use]
    pub fn pair(&self) -> Pair {
        let [log_base_sum, log_sum] = self.sums.map(f64::ln);
        // KL = Σ p (ln p - ln q) with ln p = (x - max) - ln Σ exp(x - max).
        let kl = self.weighted / self.sums[0] - log_base_sum + log_sum;
        let (base_log_p, log_p) = (self.targets[0] - log_base_sum, self.targets[1] - log_sum);
        Pair {
            loss: -log_p,
            baseline_loss: -base_log_p,
            kl: if kl < 0.0 && kl > -ROUNDING { 0.0 } else { kl },
            delta_p: log_p.exp() - base_log_p.exp(),
            same_top: self.same_top,
        }
    }
}

/// Whether all are finite, and the largest.
fn finite_and_max(row: &[f32]) -> (bool, f32) {
    const INFINITY: u32 = f32::INFINITY.to_bits();
    let mut max = [f32::NEG_INFINITY; 2 * LANES];
    let mut magnitude = [0u32; 2 * LANES];
    let mut step = |x: &[f32]| {
        for ((x, max), magnitude) in x.iter().zip(&mut max).zip(&mut magnitude) {
            *max = if *x > *max { *x } else { *max };
            *magnitude = (*magnitude).max(x.to_bits() & !(1 << 31));
        }
    };
    let chunks = row.chunks_exact(2 * LANES);
    let rest = chunks.remainder();
    chunks.for_each(&mut step);
    step(rest);
    (magnitude.iter().all(|m| *m < INFINITY), max.iter().fold(f32::NEG_INFINITY, |a, b| a.max(*b)))
}

/// The rules for what is not finite.
fn check(baseline: &[f32], model: &[f32], target: usize) -> Result<(), RowError> {
    for (which, row) in [("baseline", baseline), ("model", model)] {
        for (token, &value) in row.iter().enumerate() {
            if value.is_nan() || value == f32::INFINITY {
                return Err(RowError::NotFinite { which, token, value });
            }
        }
        if row[target] == f32::NEG_INFINITY {
            return Err(RowError::RuledOut { which, token: target });
        }
    }
    let ruled_out = |(b, m): (&f32, &f32)| *m == f32::NEG_INFINITY && *b != f32::NEG_INFINITY;
    match baseline.iter().zip(model).position(ruled_out) {
        Some(token) => Err(RowError::RuledOut { which: "model", token }),
        None => Ok(()),
    }
}

struct Sums {
    /// Σ exp(b), Σ exp(m), Σ exp(b)·(b - m), of logits less their row's maximum.
    baseline: f64,
    model: f64,
    weighted: f64,
}

fn sums(baseline: &[f32], model: &[f32], base_max: f64, max: f64) -> Sums {
    let mut lanes = [[0.0; LANES]; 3];
    let mut shifted = [[0.0; BLOCK]; 2];
    let mut powers = [[0.0; BLOCK]; 2];
    for (base, model) in baseline.chunks(BLOCK).zip(model.chunks(BLOCK)) {
        for (((row, max), shifted), powers) in
            [(base, base_max), (model, max)].into_iter().zip(&mut shifted).zip(&mut powers)
        {
            for (out, x) in shifted.iter_mut().zip(row) {
                *out = f64::from(*x) - max;
            }
            for (out, x) in powers.iter_mut().zip(&shifted[..row.len()]) {
                *out = exp(*x);
            }
        }
        let ([b, m], [p, q]) = (&shifted, &powers);
        let [of_base, of_model, weighted] = &mut lanes;
        for start in (0..base.len()).step_by(LANES) {
            for lane in 0..LANES.min(base.len() - start) {
                let i = start + lane;
                of_base[lane] += p[i];
                of_model[lane] += q[i];
                weighted[lane] += p[i] * (b[i] - m[i]);
            }
        }
    }
    let [baseline, model, weighted] = lanes.map(|lanes| lanes.iter().sum());
    Sums { baseline, model, weighted }
}

/// The same where some tokens are ruled out: of those that the baseline rules out only what the model gives them counts.
fn sums_of_possible(baseline: &[f32], model: &[f32], base_max: f64, max: f64) -> Sums {
    let pairs = || baseline.iter().zip(model).map(|(b, m)| (*b, *m));
    let (possible, of_model): (Vec<f32>, Vec<f32>) = pairs().filter(|(b, _)| *b > f32::NEG_INFINITY).unzip();
    let mut out = sums(&possible, &of_model, base_max, max);
    let ruled_out = pairs().filter(|(b, _)| *b == f32::NEG_INFINITY);
    out.model += ruled_out.map(|(_, m)| exp(f64::from(m) - max)).sum::<f64>();
    out
}

/// e^x for x ≤ 0 within 2 units in the last place, without branches or calls, so that a loop over it becomes vector
/// instructions; 0 below -708, where e^x is no longer a normal number.
#[inline(always)]
fn exp(x: f64) -> f64 {
    const LOWEST: f64 = -708.0;
    /// Adding and subtracting it rounds to a whole number, which then stands in the lowest bits.
    const ROUND: f64 = 6_755_399_441_055_744.0; // 1.5 · 2⁵²
    /// ln 2 in two parts, the first of which has so few digits that its multiples up to 2¹¹ are exact.
    const LN_2_HIGH: f64 = 0.693_147_180_369_123_8;
    const LN_2_LOW: f64 = 1.908_214_929_270_587_7e-10;
    /// 13! down to 2!.
    const FACTORIALS: [f64; 12] = [
        6_227_020_800.0,
        479_001_600.0,
        39_916_800.0,
        3_628_800.0,
        362_880.0,
        40_320.0,
        5_040.0,
        720.0,
        120.0,
        24.0,
        6.0,
        2.0,
    ];
    let clamped = if x < LOWEST { LOWEST } else { x };
    let rounded = clamped * std::f64::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = (clamped - n * LN_2_HIGH) - n * LN_2_LOW;
    // The Taylor series: for |r| ≤ ln 2 / 2 what is left out is below 2⁻⁵⁵.
    let sum = FACTORIALS.iter().fold(0.0, |sum, factorial| sum * r + 1.0 / factorial);
    let fraction = 1.0 + (r + r * r * sum);
    let power = f64::from_bits((rounded.to_bits() << 52).wrapping_add(1023 << 52));
    if x < LOWEST { 0.0 } else { fraction * power }
}

/// Where the maximum stands first.
fn first(row: &[f32], max: f64) -> Option<usize> {
    let max = max as f32;
    row.iter().position(|x| *x == max)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A linear congruential generator (Knuth's MMIX).
    struct Random(u64);

    impl Random {
        /// In [0, 1).
        fn unit(&mut self) -> f64 {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (self.0 >> 11) as f64 / (1u64 << 53) as f64
        }

        /// Nearly normal: twelve uniform numbers have a variance of 1.
        fn row(&mut self, vocab: usize, spread: f64) -> Vec<f32> {
            (0..vocab).map(|_| (((0..12).map(|_| self.unit()).sum::<f64>() - 6.0) * spread) as f32).collect()
        }
    }

    #[test]
    fn the_exponential_is_that_of_libm() {
        let mut random = Random(1);
        for _ in 0..100_000 {
            let x = -random.unit() * if random.unit() < 0.5 { 1.0 } else { 707.9 };
            assert!((exp(x) / libm::exp(x) - 1.0).abs() <= 4.5e-16, "{x}");
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-1e300), 0.0);
        assert_eq!(exp(f64::NEG_INFINITY), 0.0);
    }

    #[test]
    fn figures_are_those_of_torch() {
        // b, m = logits below as float64; torch.nn.functional.kl_div(m.log_softmax(-1), b.log_softmax(-1),
        //     log_target=True, reduction="sum"); -m.log_softmax(-1)[3], -b.log_softmax(-1)[3]; difference of softmax at 3
        let baseline: Vec<f32> = (0..37i16).map(|i| f32::from(i * i % 37) * 0.25 - 3.0).collect();
        let model: Vec<f32> = (0..37i16).map(|i| f32::from(i * i % 37) * 0.25 + f32::from(i % 5) * 0.125).collect();
        let got = compare_rows(&baseline, &model, 3).unwrap();
        for (got, expected) in [got.kl, got.loss, got.baseline_loss, got.delta_p].into_iter().zip(TORCH) {
            assert!((got - expected).abs() < 1e-14, "{got} {expected}");
        }
    }

    const TORCH: [f64; 4] = [0.007400061165700415, 8.235464998639095, 8.446584320978404, 5.045140282035129e-05];

    #[test]
    fn identical_rows_have_no_divergence_at_all() {
        let mut random = Random(2);
        for vocab in [1, 7, 8, 49, 1000] {
            let row = random.row(vocab, 4.0);
            let got = compare_rows(&row, &row, vocab / 2).unwrap();
            assert_eq!((got.kl, got.delta_p, got.same_top), (0.0, 0.0, true));
        }
    }

    #[test]
    fn a_shifted_row_is_the_same_distribution() {
        let a = Random(3).row(1000, 4.0);
        let b: Vec<f32> = a.iter().map(|x| (x * 1024.0).round() / 1024.0).collect();
        let c: Vec<f32> = b.iter().map(|x| x + 64.0).collect();
        assert_eq!(compare_rows(&b, &c, 1).unwrap().kl, 0.0);
    }

    #[test]
    fn divergence_is_never_negative_beyond_rounding() {
        let mut random = Random(4);
        for i in 0..300 {
            let a = random.row(500, 3.0);
            let noise = 10f64.powi(-(i % 8));
            let b: Vec<f32> = random.row(500, noise).iter().zip(&a).map(|(n, a)| a + n).collect();
            assert!(compare_rows(&a, &b, 0).unwrap().kl >= 0.0);
        }
    }

    #[test]
    fn ruled_out_tokens_add_nothing_where_the_baseline_rules_them_out() {
        let a = Random(5).row(100, 2.0);
        let b = Random(6).row(100, 2.0);
        let expected = compare_rows(&a[..90], &b[..90], 7).unwrap();
        let ruled_out = |row: &[f32]| -> Vec<f32> {
            row.iter().enumerate().map(|(i, x)| if i < 90 { *x } else { f32::NEG_INFINITY }).collect()
        };
        let got = compare_rows(&ruled_out(&a), &ruled_out(&b), 7).unwrap();
        assert!((got.kl - expected.kl).abs() < 1e-14 && (got.loss - expected.loss).abs() < 1e-14);
        assert!(compare_rows(&ruled_out(&a), &b, 7).unwrap().kl.is_finite());
        assert_eq!(compare_rows(&a, &ruled_out(&b), 7).unwrap_err(), RowError::RuledOut { which: "model", token: 90 });
        assert_eq!(
            compare_rows(&ruled_out(&a), &ruled_out(&b), 95).unwrap_err(),
            RowError::RuledOut { which: "baseline", token: 95 }
        );
    }

    #[test]
    fn what_is_not_finite_is_found_wherever_it_stands() {
        let good = Random(7).row(53, 2.0);
        for token in [0, 15, 16, 47, 48, 52] {
            for value in [f32::NAN, f32::INFINITY] {
                let mut bad = good.clone();
                bad[token] = value;
                assert!(matches!(
                    compare_rows(&good, &bad, 1).unwrap_err(),
                    RowError::NotFinite { which: "model", token: t, .. } if t == token
                ));
                assert!(matches!(
                    compare_rows(&bad, &good, 1).unwrap_err(),
                    RowError::NotFinite { which: "baseline", .. }
                ));
            }
        }
    }
}
