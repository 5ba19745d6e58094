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

use std::collections::BTreeMap;

use thiserror::Error;

pub use self::pass::{PassError, Windows};
pub use self::token_class::TokenClass;

use self::row::{Pair, RowError};
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
    /// Length of each row of logits.
    pub vocab: usize,
}

/// Collects pairs of rows. Several threads may each fill one of their own: once merged, in whatever order, the result is
/// the same to the last bit.
#[derive(Clone, Debug)]
pub struct Accumulator {
    options: Options,
    tokens: Vec<Token>,
}

/// Sums of the divergence over the tokens of each window, ascending by window: what [`kl_gone`] compares.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct WindowSums(Vec<WindowSum>);

#[derive(Clone, Copy, Debug, PartialEq)]
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
        "window {window}, position {position}: {found} logits from the {which}, expected {expected}, one for each token of the vocabulary"
    )]
    Length { window: usize, position: usize, which: &'static str, found: usize, expected: usize },
    #[error(
        "window {window}, position {position}: the right token is {target}, expected one of the vocabulary's {vocab}: do both models have the same tokenizer?"
    )]
    Target { window: usize, position: usize, target: u32, vocab: usize },
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
    #[error("these accumulators are of different models, texts or vocabularies and cannot be merged")]
    Merge,
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

    /// An empty one of the same model and text.
    #[must_use]
    pub fn fresh(&self) -> Self {
        Self::new(self.options.clone())
    }

    /// Adds the prediction of the token `target` of class `class`, which stands at `position` of window `window`: the
    /// rows of logits that predict it, not normalised.
    ///
    /// # Errors
    /// When a row does not have the vocabulary's length, or a logit or the divergence is not finite.
    pub fn push(
        &mut self,
        window: usize,
        position: usize,
        class: TokenClass,
        baseline_logits: &[f32],
        logits: &[f32],
        target: u32,
    ) -> Result<(), DivergenceError> {
        let vocab = self.options.vocab;
        for (which, row) in [("baseline", baseline_logits), ("model", logits)] {
            if row.len() != vocab {
                return Err(DivergenceError::Length { window, position, which, found: row.len(), expected: vocab });
            }
        }
        if target as usize >= vocab {
            return Err(DivergenceError::Target { window, position, target, vocab });
        }
        let pair = row::compare(baseline_logits, logits, target as usize).map_err(|e| match e {
            RowError::NotFinite { which, token, value } => {
                DivergenceError::NotFinite { window, position, which, token, value }
            }
            RowError::RuledOut { which, token } => DivergenceError::RuledOut { window, position, which, token },
        })?;
        self.tokens.push(Token { window, position, class, pair });
        Ok(())
    }

    /// Adds what `other` collected.
    ///
    /// # Errors
    /// When it is of another model, text or vocabulary.
    pub fn merge(&mut self, other: Self) -> Result<(), DivergenceError> {
        if self.options != other.options {
            return Err(DivergenceError::Merge);
        }
        self.tokens.extend(other.tokens);
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
        if windows.iter().filter(holds).nth(1).is_none() {
            return None;
        }
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
