//! How far a model's distribution over next tokens is from the baseline's: llama-perplexity's figures, from pairs of
//! rows of logits.
//!
//! Standard errors are clustered by window: tokens of one window share their context, so their errors are not
//! independent. llama-perplexity takes every token as independent; its errors are smaller than ours where they are not.
//! With few windows (below about 30) ours are too small too, as with any clustered error.

mod llama;
mod pass;
mod token_class;
mod token_model;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use self::pass::{Measured, PassError, Said, Windows};
pub use self::token_class::TokenClass;
pub use self::token_model::{TokenModel, TokenReader};

use crate::comparison::{Divergence, Estimate, GroupKl, Histogram, Interval};
use crate::statistics::{Random, Sample, Smoothing, interval, mean_and_standard_error, resample};
use recoup_ground::divergence::{Pair, RowError};

/// Shares at which the percentiles of the divergence are given: llama-perplexity's.
const KL_SHARES: [f64; 11] = [0.0, 0.001, 0.01, 0.05, 0.1, 0.5, 0.9, 0.95, 0.99, 0.999, 1.0];

/// The same for the difference in the right token's probability.
const DELTA_P_SHARES: [f64; 13] = [0.0, 0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 1.0];

/// The histogram's edges: 0, then four to each power of ten from the first exponent to the second. What lies beyond the
/// last one is counted in the last bin.
const HISTOGRAM_EXPONENTS: (i32, i32) = (-7, 3);
const BINS_PER_POWER_OF_TEN: i32 = 4;

/// Sums of the divergence over the tokens of each window, ascending by window: what [`kl_gone`] compares.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct WindowSums(Vec<WindowSum>);

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
struct WindowSum {
    window: usize,
    tokens: usize,
    kl: f64,
}

/// Why there are no figures.
#[derive(Debug, Error, PartialEq)]
#[non_exhaustive]
pub enum DivergenceError {
    #[error("window {window}, position {position}: {source}")]
    Row { window: usize, position: usize, source: RowError },
    #[error(
        "window {window} has {first} tokens from PTQ and {second} from the model, expected the same: compare both on the same text with the same windows"
    )]
    Windows { window: usize, first: usize, second: usize },
    #[error("the perplexity of the {which} is {found}, expected a finite number")]
    Perplexity { which: &'static str, found: f64 },
}

/// One predicted token.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
struct Token {
    window: usize,
    position: usize,
    class: TokenClass,
    pair: Pair,
}

/// The figures of `tokens`, window by window, of two windows at least ([`Divergence::kl_gone`] left empty: see
/// [`kl_gone`]), and the sums by window.
fn figures(model: usize, text: &str, tokens: &[Token]) -> Result<(Divergence, WindowSums), DivergenceError> {
    let windows: Vec<&[Token]> = tokens.chunk_by(|a, b| a.window == b.window).collect();
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
        model,
        text: text.to_owned(),
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
/// is known. The error of a single window is 0.
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
    use recoup_ground::divergence::compare_rows;

    use super::*;

    /// Four windows of five tokens over a vocabulary of eleven: (window, position, baseline, model, target).
    fn small() -> impl Iterator<Item = (usize, usize, Vec<f32>, Vec<f32>, u32)> {
        (0..20usize).map(|i| (i / 5, i % 5)).map(|(w, p)| {
            let base: Vec<f32> = (0..11usize).map(|i| ((i * 7 + p * 5 + w * 3) % 11) as f32 * 0.5).collect();
            let model = base.iter().enumerate().map(|(i, b)| b + ((i * 3 + p + w * 2) % 5) as f32 * 0.25).collect();
            (w, p, base, model, ((w + 2 * p) % 11) as u32)
        })
    }

    fn tokens() -> Vec<Token> {
        let token = |(window, position, base, model, target): (_, _, Vec<f32>, Vec<f32>, u32)| {
            let class = if position == 0 { TokenClass::WordStart } else { TokenClass::Other };
            Token { window, position, class, pair: compare_rows(&base, &model, target as usize).unwrap() }
        };
        small().map(token).collect()
    }

    fn found() -> (Divergence, WindowSums) {
        figures(1, "text", &tokens()).unwrap()
    }

    #[test]
    fn figures_and_clustered_errors_are_those_of_torch_and_statsmodels() {
        // The rows of `small` through torch.log_softmax in float64, then for each figure x by token
        // statsmodels OLS(x, ones).fit(cov_type="cluster", cov_kwds={"groups": window, "use_correction": False}), times
        // sqrt(4 / 3); perplexities and RMS by the delta method; correlation: np.corrcoef of the windows' sums.
        let (d, _) = found();
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
    fn groups_are_means_over_their_own_tokens() {
        let (d, sums) = found();
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
        let pair = compare_rows(&[0.0; 11], &[1.0; 11], 0).unwrap();
        let mut tokens = tokens();
        tokens.push(Token { window: 3, position: 9, class: TokenClass::Number, pair });
        let (d, _) = figures(1, "text", &tokens).unwrap();
        assert!(d.by_class.iter().all(|g| g.group != "number"));
        assert!(d.by_position.iter().all(|g| g.group != "8-15"));
    }

    #[test]
    fn the_block_is_llama_perplexitys() {
        // Python's % with the formats of llama.cpp's tools/perplexity/perplexity.cpp (kl_divergence) on the figures of
        // the test above: `"Mean PPL(Q)                   : %10.6f ± %10.6f" % …` and so on.
        let (d, _) = found();
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
        let of = |keep: fn(&Token) -> bool| {
            figures(1, "text", &tokens().into_iter().filter(keep).collect::<Vec<_>>()).unwrap().1
        };
        let all = found().1;
        let e = kl_gone(&all, &of(|t| (t.window, t.position) != (2, 4)), 0.95, 1000, 1).unwrap_err();
        assert_eq!(e, DivergenceError::Windows { window: 2, first: 5, second: 4 });
        assert!(e.to_string().contains("the same text"), "{e}");
        let e = kl_gone(&all, &of(|t| t.window != 3), 0.95, 1000, 1).unwrap_err();
        assert_eq!(e, DivergenceError::Windows { window: 3, first: 5, second: 0 });
    }

    #[test]
    fn a_hopeless_perplexity_is_refused() {
        let pair = compare_rows(&[0.0, 0.0], &[0.0, 1000.0], 0).unwrap();
        let tokens = [0, 1].map(|window| Token { window, position: 0, class: TokenClass::Other, pair });
        let e = figures(1, "text", &tokens).unwrap_err();
        assert!(e.to_string().contains("the perplexity of the model is inf"), "{e}");
    }
}
