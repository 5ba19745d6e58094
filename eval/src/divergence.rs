//! How far a model's distribution over next tokens is from the baseline's: llama-perplexity's figures, from pairs of
//! rows of logits.
//!
//! Standard errors are clustered by window: tokens of one window share their context, so their errors are not
//! independent. llama-perplexity takes every token as independent; its errors are smaller than ours where they are not.
//! With few windows (below about 30) ours are too small too, as with any clustered error.
//!
//! Logits must be finite, with one exception: -inf rules a token out. Where the baseline rules it out it adds nothing to
//! the divergence, whatever the model says; a model that rules out what the baseline does not has an infinite divergence,
//! and a right token that either rules out an infinite perplexity: both are errors.

mod llama;
mod pass;
mod row;
mod token_class;
mod token_model;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use self::pass::{PassError, Said, Windows};
pub use self::row::{Pair, RowError, compare_rows};
pub use self::token_class::TokenClass;
pub use self::token_model::TokenModel;

use crate::comparison::{Divergence, Estimate, GroupKl, Histogram, Interval};
use crate::statistics::{Random, Sample, Smoothing, interval, mean_and_standard_error, resample};

/// Shares at which the percentiles of the divergence are given: llama-perplexity's.
const KL_SHARES: [f64; 11] = [0.0, 0.001, 0.01, 0.05, 0.1, 0.5, 0.9, 0.95, 0.99, 0.999, 1.0];

/// The same for the difference in the right token's probability.
const DELTA_P_SHARES: [f64; 13] = [0.0, 0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 1.0];

/// The histogram's edges: 0, then four to each power of ten from the first exponent to the second. What lies beyond the
/// last one is counted in the last bin.
const HISTOGRAM_EXPONENTS: (i32, i32) = (-7, 3);
const BINS_PER_POWER_OF_TEN: i32 = 4;

/// Whose divergence it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Index of the model, as [`Divergence::model`].
    pub model: usize,
    /// Name of the text.
    pub text: String,
}

/// Collects pairs of rows, in whatever order: the result is the same to the last bit.
#[derive(Clone, Debug)]
pub struct Accumulator {
    options: Options,
    tokens: Vec<Token>,
}

/// Sums of the divergence over the tokens of each window, ascending by window: what [`kl_gone`] compares.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct WindowSums(Vec<WindowSum>);

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
struct WindowSum {
    window: usize,
    tokens: usize,
    kl: f64,
}

/// Why logits cannot be compared.
#[derive(Debug, Error, PartialEq)]
#[non_exhaustive]
pub enum DivergenceError {
    #[error(
        "window {window}, position {position}: the {which}'s logit of token {token} is {value}, expected a finite number: the {which} computes garbage here"
    )]
    NotFinite { window: usize, position: usize, which: &'static str, token: usize, value: f32 },
    #[error(
        "window {window}, position {position}: the {which} rules out token {token} (its logit is -inf), which the baseline or the text does not: the divergence is infinite"
    )]
    RuledOut { window: usize, position: usize, which: &'static str, token: usize },
    #[error("window {window}, position {position} was pushed twice: give each window an index of its own")]
    Twice { window: usize, position: usize },
    #[error(
        "{found} window(s), expected at least 2: standard errors come from the differences between windows; use a longer text or shorter windows"
    )]
    TooFewWindows { found: usize },
    #[error(
        "window {window} has {first} tokens from PTQ and {second} from the model, expected the same: compare both on the same text with the same windows"
    )]
    Windows { window: usize, first: usize, second: usize },
    #[error("the perplexity of the {which} is {found}, expected a finite number")]
    Perplexity { which: &'static str, found: f64 },
}

/// One predicted token.
#[derive(Clone, Copy, Debug)]
struct Token {
    window: usize,
    position: usize,
    class: TokenClass,
    pair: Pair,
}

impl Accumulator {
    #[must_use]
    pub fn new(options: Options) -> Self {
        Self { options, tokens: Vec::new() }
    }

    /// Adds the prediction of the token of class `class` that stands at `position` of window `window`.
    ///
    /// # Errors
    /// When a logit or the divergence is not finite.
    pub fn push(
        &mut self,
        window: usize,
        position: usize,
        class: TokenClass,
        pair: Result<Pair, RowError>,
    ) -> Result<(), DivergenceError> {
        let pair = pair.map_err(|e| match e {
            RowError::NotFinite { which, token, value } => {
                DivergenceError::NotFinite { window, position, which, token, value }
            }
            RowError::RuledOut { which, token } => DivergenceError::RuledOut { window, position, which, token },
        })?;
        self.tokens.push(Token { window, position, class, pair });
        Ok(())
    }

    /// The figures ([`Divergence::kl_gone`] left empty: see [`kl_gone`]), and the sums by window.
    ///
    /// # Errors
    /// With fewer than two windows, or when a token was pushed twice.
    pub fn finish(mut self) -> Result<(Divergence, WindowSums), DivergenceError> {
        let tokens = &mut self.tokens;
        tokens.sort_by_key(|t| (t.window, t.position));
        if let Some(pair) = tokens.windows(2).find(|t| (t[0].window, t[0].position) == (t[1].window, t[1].position)) {
            return Err(DivergenceError::Twice { window: pair[0].window, position: pair[0].position });
        }
        let tokens = &self.tokens;
        let windows: Vec<&[Token]> = tokens.chunk_by(|a, b| a.window == b.window).collect();
        if windows.len() < 2 {
            return Err(DivergenceError::TooFewWindows { found: windows.len() });
        }
        let mean = |of: &dyn Fn(&Pair) -> f64| mean_over(&windows, &|t| Some(of(&t.pair)));
        let loss = mean(&|p| p.loss);
        let baseline_loss = mean(&|p| p.baseline_loss);
        let log_ratio = mean(&|p| p.loss - p.baseline_loss);
        for (which, found) in [("baseline", baseline_loss.value.exp()), ("model", loss.value.exp())] {
            if !found.is_finite() {
                return Err(DivergenceError::Perplexity { which, found });
            }
        }
        let square = mean(&|p| p.delta_p * p.delta_p);
        let rms = square.value.sqrt();
        let rms_error = if rms > 0.0 { 0.5 / rms * square.standard_error } else { 0.0 };
        let sorted = |of: &dyn Fn(&Pair) -> f64| {
            let mut values: Vec<f64> = tokens.iter().map(|t| of(&t.pair)).collect();
            values.sort_unstable_by(f64::total_cmp);
            values
        };
        let kl = sorted(&|p| p.kl);
        let sums = windows.iter().map(|w| WindowSum {
            window: w[0].window,
            tokens: w.len(),
            kl: w.iter().map(|t| t.pair.kl).sum(),
        });
        let divergence = Divergence {
            model: self.options.model,
            text: self.options.text,
            tokens: tokens.len(),
            perplexity: exponential(loss),
            baseline_perplexity: exponential(baseline_loss),
            perplexity_ratio: exponential(log_ratio),
            log_perplexity_ratio: log_ratio,
            log_perplexity_correlation: correlation(loss, baseline_loss, log_ratio),
            kl: mean(&|p| p.kl),
            kl_gone: None,
            kl_percentiles: percentiles(&kl, &KL_SHARES),
            delta_p: mean(&|p| p.delta_p),
            delta_p_rms: Estimate { value: rms, standard_error: rms_error },
            delta_p_percentiles: percentiles(&sorted(&|p| p.delta_p), &DELTA_P_SHARES),
            same_top: mean(&|p| f64::from(u8::from(p.same_top))),
            kl_histogram: histogram(&kl),
            by_class: groups(&windows, TokenClass::ALL.map(|c| (c, c.to_string())), |t| t.class),
            by_position: groups(&windows, (0..=usize::BITS).map(|b| (b, position_bin(b))), |t| bin_of(t.position)),
        };
        Ok((divergence, WindowSums(sums.collect())))
    }
}

/// 1 - KL of `model` / KL of `ptq`, over the same windows, with the interval of a bootstrap over windows.
///
/// `None` where PTQ's own divergence is not significantly above 0 (it is as the baseline), or fewer than two windows.
///
/// # Errors
/// When the two were not computed over the same windows.
pub fn kl_gone(
    ptq: &WindowSums,
    model: &WindowSums,
    confidence: f64,
    resamples: usize,
    seed: u64,
) -> Result<Option<Interval>, DivergenceError> {
    let mut tokens = BTreeMap::new();
    for (side, sums) in [ptq, model].into_iter().enumerate() {
        for sum in &sums.0 {
            tokens.entry(sum.window).or_insert([0; 2])[side] = sum.tokens;
        }
    }
    if let Some((&window, &[first, second])) = tokens.iter().find(|(_, [a, b])| a != b) {
        return Err(DivergenceError::Windows { window, first, second });
    }
    let mut sample = Sample::new(2);
    for (p, m) in ptq.0.iter().zip(&model.0) {
        sample.push([p.kl, m.kl], p.tokens as f64);
    }
    let drawn = resample(&sample, Smoothing::None, resamples, &mut Random::named(seed, "kl gone"));
    let (whole, part) = (sample.sum(0), sample.sum(1));
    let wholes = drawn.iter().map(|(sums, _)| sums[0]).collect();
    if interval(whole, wholes, sample.documents(), confidence).is_none_or(|w| w.low <= 0.0) {
        return Ok(None);
    }
    let gone = drawn.iter().map(|(sums, _)| if sums[0] > 0.0 { 1.0 - sums[1] / sums[0] } else { f64::NAN }).collect();
    Ok(interval(1.0 - part / whole, gone, sample.documents(), confidence))
}

/// Mean over the tokens for which there is a value, its error clustered by window; of the windows without any, nothing
/// is known. The error is 0 for fewer than two windows: callers see to it that there are more.
fn mean_over(windows: &[&[Token]], value: &dyn Fn(&Token) -> Option<f64>) -> Estimate {
    let clusters: Vec<(f64, f64)> = windows
        .iter()
        .map(|tokens| tokens.iter().filter_map(value).fold((0.0, 0.0), |(sum, n), v| (sum + v, n + 1.0)))
        .filter(|(_, n)| *n > 0.0)
        .collect();
    let (value, error) = mean_and_standard_error(clusters.iter().copied());
    Estimate { value, standard_error: error.unwrap_or(0.0) }
}

/// Mean divergence of each group that occurs in at least two windows: of one window no error can be given.
fn groups<K: PartialEq>(
    windows: &[&[Token]],
    names: impl IntoIterator<Item = (K, String)>,
    key: impl Fn(&Token) -> K,
) -> Vec<GroupKl> {
    let group = |(wanted, group): (K, String)| {
        let holds = |tokens: &&&[Token]| tokens.iter().any(|t| key(t) == wanted);
        windows.iter().filter(holds).nth(1)?;
        let tokens = windows.iter().flat_map(|w| w.iter()).filter(|t| key(t) == wanted).count();
        let kl = mean_over(windows, &|t| (key(t) == wanted).then_some(t.pair.kl));
        Some(GroupKl { group, tokens, kl })
    };
    names.into_iter().filter_map(group).collect()
}

/// Bin of a position: 0 for position 0, b for 2^(b-1) to 2^b - 1.
fn bin_of(position: usize) -> u32 {
    usize::BITS - position.leading_zeros()
}

/// `0`, `1`, `2-3`, `4-7`, …
fn position_bin(bin: u32) -> String {
    match bin {
        0 | 1 => bin.to_string(),
        _ => format!("{}-{}", 1u128 << (bin - 1), (1u128 << bin) - 1),
    }
}

/// e to the power of an estimate.
fn exponential(log: Estimate) -> Estimate {
    let value = log.value.exp();
    Estimate { value, standard_error: value * log.standard_error }
}

/// Correlation of two means from their errors and that of their difference; 0 where one has none.
fn correlation(a: Estimate, b: Estimate, difference: Estimate) -> f64 {
    let [a, b, d] = [a, b, difference].map(|e| e.standard_error);
    if a * b > 0.0 { ((a * a + b * b - d * d) / (2.0 * a * b)).clamp(-1.0, 1.0) } else { 0.0 }
}

/// Values of which the given shares lie below, linear between neighbours, as llama-perplexity and numpy have it.
fn percentiles(sorted: &[f64], shares: &[f64]) -> Vec<(f64, f64)> {
    let last = sorted.len() - 1;
    let at = |share: f64| {
        let place = share * last as f64;
        let below = sorted[place.floor() as usize];
        below + place.fract() * (sorted[(place.floor() as usize + 1).min(last)] - below)
    };
    shares.iter().map(|&s| (s, at(s))).collect()
}

fn histogram(sorted: &[f64]) -> Histogram {
    let (first, last) = HISTOGRAM_EXPONENTS;
    let mut edges = vec![0.0];
    edges.extend(
        (first * BINS_PER_POWER_OF_TEN..=last * BINS_PER_POWER_OF_TEN)
            .map(|i| libm::exp10(f64::from(i) / f64::from(BINS_PER_POWER_OF_TEN))),
    );
    let bins = edges.len() - 1;
    let mut counts = vec![0; bins];
    for kl in sorted {
        counts[edges.partition_point(|e| e <= kl).saturating_sub(1).min(bins - 1)] += 1;
    }
    Histogram { edges, counts }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accumulator() -> Accumulator {
        Accumulator::new(Options { model: 1, text: "text".into() })
    }

    /// Four windows of five tokens over a vocabulary of eleven: (window, position, baseline, model, target).
    fn small() -> impl Iterator<Item = (usize, usize, Vec<f32>, Vec<f32>, u32)> {
        (0..20usize).map(|i| (i / 5, i % 5)).map(|(w, p)| {
            let base: Vec<f32> = (0..11usize).map(|i| ((i * 7 + p * 5 + w * 3) % 11) as f32 * 0.5).collect();
            let model = base.iter().enumerate().map(|(i, b)| b + ((i * 3 + p + w * 2) % 5) as f32 * 0.25).collect();
            (w, p, base, model, ((w + 2 * p) % 11) as u32)
        })
    }

    fn collect(rows: impl Iterator<Item = (usize, usize, Vec<f32>, Vec<f32>, u32)>) -> Accumulator {
        let mut accumulator = accumulator();
        for (w, p, base, model, target) in rows {
            let class = if p == 0 { TokenClass::WordStart } else { TokenClass::Other };
            accumulator.push(w, p, class, compare_rows(&base, &model, target as usize)).unwrap();
        }
        accumulator
    }

    #[test]
    fn figures_and_clustered_errors_are_those_of_torch_and_statsmodels() {
        // The rows of `small` through torch.log_softmax in float64, then for each figure x by token
        // statsmodels OLS(x, ones).fit(cov_type="cluster", cov_kwds={"groups": window, "use_correction": False}), times
        // sqrt(4 / 3); perplexities and RMS by the delta method; correlation: np.corrcoef of the windows' sums.
        let (d, _) = collect(small()).finish().unwrap();
        let expected = [
            (d.kl, 0.049_341_100_450_056_99, 0.003_209_992_816_090_057),
            (d.perplexity, 23.892_483_185_818_804, 4.286_151_701_670_882),
            (d.baseline_perplexity, 21.729_200_137_507_032, 3.815_522_149_586_902_5),
            (d.log_perplexity_ratio, 0.094_906_913_958_531_99, 0.009_758_050_117_484_011),
            (d.delta_p, -0.019_058_279_029_708_216, 0.009_158_721_528_753_397),
            (d.delta_p_rms, 0.051_040_450_259_386_54, 0.012_472_731_184_171_05),
            (d.same_top, 0.8, 0.0),
        ];
        for (i, (got, value, error)) in expected.into_iter().enumerate() {
            assert!(
                (got.value - value).abs() < 1e-12 * value.abs().max(1.0) && (got.standard_error - error).abs() < 1e-12,
                "{i}: {got:?}"
            );
        }
        assert!((d.log_perplexity_correlation - 0.998_717_691_989_188_7).abs() < 1e-9);
        // np.quantile(kl, [0, 0.1, 0.5, 0.99, 1])
        let at = |share: f64| d.kl_percentiles.iter().find(|p| p.0 == share).unwrap().1;
        let quantiles = [(0.0, 0.016_103_327_548_571), (0.1, 0.019_017_547_373_213), (0.5, 0.040_138_516_092_220)];
        for (share, value) in quantiles.into_iter().chain([(0.99, 0.092844563398), (1.0, 0.092_844_563_398_291)]) {
            assert!((at(share) - value).abs() < 1e-12, "{share}: {}", at(share));
        }
        assert_eq!(d.delta_p_percentiles[5].0, 0.25);
        assert!((d.delta_p_percentiles[5].1 + 0.025_793_522_133_989).abs() < 1e-12);
        assert_eq!((d.tokens, d.kl_histogram.counts.iter().sum::<u64>()), (20, 20));
    }

    #[test]
    fn the_result_does_not_depend_on_the_order_of_rows() {
        let whole = collect(small()).finish().unwrap();
        for parts in 1..=4 {
            let mixed = (0..parts).rev().flat_map(|part| small().filter(move |r| r.0 % parts == part));
            assert_eq!(collect(mixed).finish().unwrap(), whole);
        }
        let mut backwards: Vec<_> = small().collect();
        backwards.reverse();
        let again = collect(backwards.into_iter()).finish().unwrap();
        assert_eq!(serde_json::to_string(&again.0).unwrap(), serde_json::to_string(&whole.0).unwrap());
    }

    #[test]
    fn groups_are_means_over_their_own_tokens() {
        let (d, sums) = collect(small()).finish().unwrap();
        let groups: Vec<(&str, usize)> = d.by_class.iter().map(|g| (g.group.as_str(), g.tokens)).collect();
        assert_eq!(groups, [("word start", 4), ("other", 16)]);
        let total: f64 = d.by_class.iter().map(|g| g.kl.value * g.tokens as f64).sum();
        assert!((total - d.kl.value * 20.0).abs() < 1e-12);
        assert!((sums.0.iter().map(|w| w.kl).sum::<f64>() - total).abs() < 1e-12);
        let bins: Vec<(&str, usize)> = d.by_position.iter().map(|g| (g.group.as_str(), g.tokens)).collect();
        assert_eq!(bins, [("0", 4), ("1", 4), ("2-3", 8), ("4-7", 4)]);
        assert!(d.by_class[0].kl.standard_error > 0.0);
    }

    #[test]
    fn a_group_seen_in_one_window_only_is_left_out() {
        let mut accumulator = collect(small());
        accumulator.push(3, 9, TokenClass::Number, compare_rows(&[0.0; 11], &[1.0; 11], 0)).unwrap();
        let (d, _) = accumulator.finish().unwrap();
        assert!(d.by_class.iter().all(|g| g.group != "number"));
        assert!(d.by_position.iter().all(|g| g.group != "8-15"));
    }

    #[test]
    fn the_block_is_llama_perplexitys() {
        // Python's % with the formats of llama.cpp's tools/perplexity/perplexity.cpp (kl_divergence) on the figures of
        // the test above: `"Mean PPL(Q)                   : %10.6f ± %10.6f" % …` and so on.
        let (d, _) = collect(small()).finish().unwrap();
        assert_eq!(d.llama_block(), BLOCK);
    }

    const BLOCK: &str = "\
====== Perplexity statistics ======
Mean PPL(Q)                   :  23.892483 ±   4.286152
Mean PPL(base)                :  21.729200 ±   3.815522
Cor(ln(PPL(Q)), ln(PPL(base))):  99.87%
Mean ln(PPL(Q)/PPL(base))     :   0.094907 ±   0.009758
Mean PPL(Q)/PPL(base)         :   1.099556 ±   0.010730
Mean PPL(Q)-PPL(base)         :   2.163283 ±   0.513258

====== KL divergence statistics ======
Mean    KLD:   0.049341 ±   0.003210
Maximum KLD:   0.092845
99.9%   KLD:   0.092845
99.0%   KLD:   0.092845
95.0%   KLD:   0.092845
90.0%   KLD:   0.085690
Median  KLD:   0.040139
10.0%   KLD:   0.019018
\x205.0%   KLD:   0.016103
\x201.0%   KLD:   0.016103
\x200.1%   KLD:   0.016103
Minimum KLD:   0.016103

====== Token probability statistics ======
Mean    Δp: -1.906 ± 0.916 %
Maximum Δp:  2.361%
99.9%   Δp:  2.358%
99.0%   Δp:  2.330%
95.0%   Δp:  2.207%
90.0%   Δp:  1.730%
75.0%   Δp:  0.496%
Median  Δp: -0.187%
25.0%   Δp: -2.579%
10.0%   Δp: -5.731%
\x205.0%   Δp: -13.144%
\x201.0%   Δp: -15.987%
\x200.1%   Δp: -16.627%
Minimum Δp: -16.698%
RMS Δp    :  5.104 ± 1.247 %
Same top p: 80.000 ± 0.000 %
";

    #[test]
    fn the_histogram_has_a_place_for_every_divergence() {
        let h = histogram(&[0.0, 1e-9, 1.5e-7, 0.5, 1.0, 5e3]);
        assert_eq!(h.edges.len(), h.counts.len() + 1);
        assert_eq!(h.edges[..2], [0.0, 1e-7]);
        assert!(h.edges.windows(2).all(|e| e[0] < e[1]));
        assert_eq!((h.counts[0], h.counts[1], h.counts[h.counts.len() - 1]), (2, 1, 1));
        let bin_of_one = h.edges.iter().position(|e| (e - 1.0).abs() < 1e-12).unwrap();
        assert_eq!((h.counts[bin_of_one - 2], h.counts[bin_of_one]), (1, 1));
    }

    #[test]
    fn the_share_of_divergence_gone_is_paired_over_windows() {
        // The model has 70 % of PTQ's divergence in each window, whatever that is: no uncertainty at all.
        let sums = |factor: f64| {
            WindowSums((0..30).map(|w| WindowSum { window: w, tokens: 8, kl: factor * (1 + w % 7) as f64 }).collect())
        };
        let gone = kl_gone(&sums(1.0), &sums(0.7), 0.95, 1000, 1).unwrap().unwrap();
        assert!((gone.estimate - 0.3).abs() < 1e-12 && gone.high - gone.low < 1e-12, "{gone:?}");
        assert_eq!(kl_gone(&sums(0.0), &sums(0.7), 0.95, 1000, 1).unwrap(), None);
        let one = WindowSums(sums(1.0).0[..1].to_vec());
        assert_eq!(kl_gone(&one, &one, 0.95, 1000, 1).unwrap(), None);
    }

    #[test]
    fn different_windows_are_refused() {
        let a = collect(small()).finish().unwrap().1;
        let b = collect(small().filter(|r| (r.0, r.1) != (2, 4))).finish().unwrap().1;
        let e = kl_gone(&a, &b, 0.95, 1000, 1).unwrap_err();
        assert_eq!(e, DivergenceError::Windows { window: 2, first: 5, second: 4 });
        assert!(e.to_string().contains("the same text"), "{e}");
        let c = collect(small().filter(|r| r.0 != 3)).finish().unwrap().1;
        assert_eq!(
            kl_gone(&a, &c, 0.95, 1000, 1).unwrap_err(),
            DivergenceError::Windows { window: 3, first: 5, second: 0 }
        );
    }

    #[test]
    fn bad_rows_are_refused_with_their_place() {
        let mut a = accumulator();
        let good = [0.0, 1.0, 2.0];
        let mut push = |base: &[f32], model: &[f32], target| {
            a.push(7, 42, TokenClass::Other, compare_rows(base, model, target)).unwrap_err().to_string()
        };
        let nan = push(&good, &[0.0, f32::NAN, 1.0], 0);
        assert!(nan.contains("window 7, position 42: the model's logit of token 1 is NaN"), "{nan}");
        let infinite = push(&[f32::INFINITY, 0.0, 0.0], &good, 0);
        assert!(infinite.contains("the baseline's logit of token 0 is inf"), "{infinite}");
        let ruled_out = push(&good, &[0.0, 1.0, f32::NEG_INFINITY], 0);
        assert!(ruled_out.contains("the model rules out token 2"), "{ruled_out}");
    }

    #[test]
    fn what_cannot_be_summed_up_is_refused() {
        let e = collect(small().filter(|r| r.0 == 0)).finish().unwrap_err();
        assert_eq!(e, DivergenceError::TooFewWindows { found: 1 });
        assert_eq!(collect(std::iter::empty()).finish().unwrap_err(), DivergenceError::TooFewWindows { found: 0 });
        let twice = collect(small().chain(small().filter(|r| (r.0, r.1) == (1, 2))));
        assert_eq!(twice.finish().unwrap_err(), DivergenceError::Twice { window: 1, position: 2 });
        let mut hopeless = accumulator();
        for window in 0..2 {
            hopeless.push(window, 0, TokenClass::Other, compare_rows(&[0.0, 0.0], &[0.0, 1000.0], 0)).unwrap();
        }
        let e = hopeless.finish().unwrap_err();
        assert!(e.to_string().contains("the perplexity of the model is inf"), "{e}");
    }

    #[test]
    fn intervals_cover_at_their_rate_where_tokens_of_a_window_depend_on_each_other() {
        // Windows share a log-normal factor, as texts are easy or hard: the mean's error plus and minus 1.96 must hold
        // the truth in about 95 % of texts; taking tokens as independent does so in far fewer. 40 windows of 16 tokens.
        let mut random = Random::new(11);
        let mut normal = move || crate::statistics::normal_quantile(random.unit().max(1e-12));
        let (trials, windows, tokens) = (400, 40, 16);
        // E exp(0.35 N + 0.5 N') = exp((0.35² + 0.5²) / 2); the model's factor 0.7.
        let truth = (0.372_5f64 / 2.0).exp();
        let (mut clustered, mut independent, mut gone) = (0, 0, 0);
        for trial in 0..trials {
            let mut values = Vec::new();
            let (mut ptq, mut model) = (Vec::new(), Vec::new());
            for window in 0..windows {
                let shared = 0.35 * normal();
                let mut sums = [0.0; 2];
                for _ in 0..tokens {
                    let noise = 0.5 * normal();
                    let kl = (shared + noise).exp();
                    values.push((window, kl));
                    sums[0] += kl;
                    sums[1] += 0.7 * (shared + 0.5 * normal()).exp();
                }
                ptq.push(WindowSum { window, tokens, kl: sums[0] });
                model.push(WindowSum { window, tokens, kl: sums[1] });
            }
            let by_window: Vec<(f64, f64)> =
                values.chunks(tokens).map(|c| (c.iter().map(|v| v.1).sum(), tokens as f64)).collect();
            let (mean, error) = mean_and_standard_error(by_window.iter().copied());
            clustered += usize::from((mean - truth).abs() <= 1.96 * error.unwrap());
            let (mean, error) = mean_and_standard_error(values.iter().map(|v| (v.1, 1.0)));
            independent += usize::from((mean - truth).abs() <= 1.96 * error.unwrap());
            let i = kl_gone(&WindowSums(ptq), &WindowSums(model), 0.95, 500, trial).unwrap().unwrap();
            gone += usize::from(i.low <= 0.3 && 0.3 <= i.high);
        }
        let rate = |hits: usize| hits as f64 / trials as f64;
        println!("clustered {}, independent {}, KL gone {}", rate(clustered), rate(independent), rate(gone));
        assert!(rate(clustered) > 0.91 && rate(gone) > 0.91, "{clustered} {gone}");
        assert!(rate(independent) < 0.85, "{independent}");
    }
}
