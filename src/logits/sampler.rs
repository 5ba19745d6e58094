//! The next token from the logits.
//!
//! The order of steps is vLLM's (v1/sample/sampler.py, `Sampler`, as documented for 0.22): log-probabilities of the raw
//! logits; what a grammar allows and the bias; repetition, frequency and presence penalty; greedy choice, or temperature, min-p, top-k, top-p and a draw.
//! Top-p therefore looks at what min-p and top-k left, renormalised. (HF transformers applies min-p last.)
//!
//! Exponentials are computed here and logarithms by `libm`, both in plain Rust, and sums run in f64 in the order of
//! token ids: the same logits and seed give the same token on every platform.

use std::hash::{BuildHasher, RandomState};

use super::constraint::TokenSet;
use super::params::{SamplingError, SamplingParams};
use crate::random::SplitMix64;

/// Chooses tokens for one sequence.
///
/// It has no state that changes: the draw for a token depends on the seed and on how many tokens were generated before,
/// so a sequence that is interrupted and computed again gets the same tokens.
#[derive(Debug, Clone)]
pub struct Sampler {
    params: SamplingParams,
    seed: u64,
}

/// The tokens so far. Penalties distinguish the two parts.
#[derive(Debug, Clone, Copy, Default)]
pub struct History<'a> {
    /// Ids of the prompt.
    pub prompt: &'a [u32],
    /// Ids generated since.
    pub generated: &'a [u32],
}

/// One choice to be made: by whom, after which tokens, and of which.
#[derive(Debug, Clone, Copy)]
pub struct Draw<'a> {
    pub sampler: &'a Sampler,
    pub history: History<'a>,
    /// The only tokens that may be chosen; `None`: all.
    pub allowed: Option<&'a TokenSet>,
}

impl Draw<'_> {
    /// Makes the choice, from the row of logits: what every backend's own choice must equal.
    ///
    /// # Errors
    /// As [`Sampler::sample`].
    pub fn choose(&self, logits: &[f32], scratch: &mut Scratch) -> Result<Sampled, SamplingError> {
        self.sampler.sample_among(logits, self.allowed, self.history, scratch)
    }

    /// Whether logits are changed for anything but what was said before.
    pub(crate) fn has_bias(&self) -> bool {
        self.allowed.is_some() || !self.sampler.params.logit_bias.is_empty()
    }
}

/// A chosen token.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampled {
    /// Its id.
    pub token: u32,
    /// The natural logarithm of its probability under the model's own distribution, before penalties and temperature;
    /// `None` if not asked for. An engine tells what the `score` of a backend says of it.
    pub logprob: Option<f32>,
    /// How many tokens are at least as probable under that distribution; 1 is the most probable. `None` if no
    /// log-probability was asked for.
    pub rank: Option<usize>,
    /// The same of the most probable tokens, the most probable first (of equal ones the lower id); as many as asked
    /// for. A forbidden token has -inf, which JSON cannot write.
    pub top_logprobs: Vec<(u32, f32)>,
}

/// Memory that a [`Sampler`] works in: one for each thread, so that nothing large is allocated for a token.
#[derive(Debug, Clone, Default)]
pub struct Scratch {
    logits: Vec<f32>,
    weights: Vec<f64>,
    /// Times that each token was generated; all zero between calls.
    counts: Vec<u32>,
    candidates: Vec<Candidate>,
    /// Candidates that top-p has to sort.
    boundary: Vec<Candidate>,
    largest: Vec<(u32, f32)>,
}

/// A token that may be drawn.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    token: u32,
    /// Probability relative to the most probable token, in [0, 1].
    weight: f64,
}

impl Sampler {
    /// A sampler with these parameters; without a seed it takes a random one.
    ///
    /// # Errors
    /// What [`SamplingParams::validate`] refuses.
    pub fn new(params: SamplingParams) -> Result<Sampler, SamplingError> {
        params.validate()?;
        // The standard library seeds its hash maps from the operating system's randomness.
        let seed = params.seed.unwrap_or_else(|| RandomState::new().hash_one(()));
        Ok(Sampler { params, seed })
    }

    /// The parameters.
    pub fn params(&self) -> &SamplingParams {
        &self.params
    }

    /// The seed in use: the one given, or the random one that repeats this run.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Chooses the token that follows `history`. `logits` has one value for each token of the model's vocabulary; -inf
    /// forbids a token.
    ///
    /// # Errors
    /// [`SamplingError::Broken`] for a logit that is NaN or +inf, [`SamplingError::NothingAllowed`] if all are -inf.
    pub fn sample(&self, logits: &[f32], history: History, scratch: &mut Scratch) -> Result<Sampled, SamplingError> {
        self.sample_among(logits, None, history, scratch)
    }

    /// [`Self::sample`] of the tokens in `allowed`, where it is given: the logits of others count as -inf, but in what is
    /// reported.
    fn sample_among(
        &self,
        logits: &[f32],
        allowed: Option<&TokenSet>,
        history: History,
        scratch: &mut Scratch,
    ) -> Result<Sampled, SamplingError> {
        let broken = |x: &f32| x.is_nan() || *x == f32::INFINITY;
        // Whole runs at a time, which is several times as fast as stopping at the first.
        let any_broken = |run: &[f32]| run.iter().fold(false, |any, x| any | broken(x));
        if logits.chunks(1024).any(any_broken)
            && let Some(at) = logits.iter().position(broken)
        {
            return Err(SamplingError::Broken { token: at as u32, logit: logits[at] });
        }
        let choose = |logits: &[f32], scratch: &mut Scratch| {
            let most_probable = argmax(logits).ok_or(SamplingError::NothingAllowed { vocab_size: logits.len() })?;
            Ok(self.choose(logits, most_probable, history, scratch))
        };
        let token = if self.params.has_penalties() || !self.params.logit_bias.is_empty() || allowed.is_some() {
            let mut changed = std::mem::take(&mut scratch.logits);
            changed.clear();
            changed.extend_from_slice(logits);
            // Bias and penalties never forbid the last allowed token: they keep finite logits finite.
            self.bias(&mut changed);
            if let Some(allowed) = allowed {
                forbid_others(&mut changed, allowed);
            }
            self.penalise(&mut changed, history, &mut scratch.counts);
            let token = choose(&changed, scratch);
            scratch.logits = changed;
            token?
        } else {
            choose(logits, scratch)?
        };

        let (mut logprob, mut rank, mut top_logprobs) = (None, None, Vec::new());
        if let Some(count) = self.params.logprobs {
            let log_total = log_sum_exp(logits, &mut scratch.weights);
            let of = |logit: f32| (f64::from(logit) - log_total) as f32;
            logprob = Some(of(logits[token as usize]));
            rank = Some(rank_of(logits, token));
            keep_largest(tokens(logits), count, &mut scratch.largest);
            top_logprobs = (scratch.largest.iter()).map(|&(token, logit)| (token, of(logit))).collect();
        }
        Ok(Sampled { token, logprob, rank, top_logprobs })
    }

    /// Greedy, or the draw.
    fn choose(&self, logits: &[f32], most_probable: u32, history: History, scratch: &mut Scratch) -> u32 {
        if self.params.is_greedy() {
            return most_probable;
        }
        self.candidates(logits, logits[most_probable as usize], scratch);
        let uniform = uniform(self.seed, history.generated.len() as u64);
        draw(&scratch.candidates, uniform).unwrap_or(most_probable)
    }

    /// As `logit_bias` in OpenAI's API.
    fn bias(&self, logits: &mut [f32]) {
        for &(token, bias) in &self.params.logit_bias {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit = keep_finite(*logit, *logit + bias);
            }
        }
    }

    /// Repetition penalty as in Keskar et al. 2019 and HF's `RepetitionPenaltyLogitsProcessor`; frequency and presence
    /// penalty as in OpenAI's API. Source of the order: vLLM, v1/sample/ops/penalties.py.
    fn penalise(&self, logits: &mut [f32], history: History, counts: &mut Vec<u32>) {
        let params = &self.params;
        let size = logits.len();
        counts.resize(logits.len().max(counts.len()), 0);
        if params.repetition_penalty != 1.0 {
            let all = || in_vocabulary(history.prompt, size).chain(in_vocabulary(history.generated, size));
            for id in all() {
                // The count marks a token as done: each is penalised once, however often it occurs.
                if std::mem::replace(&mut counts[id], 1) == 0 {
                    let (before, penalty) = (logits[id], params.repetition_penalty);
                    let after = if before > 0.0 { before / penalty } else { before * penalty };
                    logits[id] = keep_finite(before, after);
                }
            }
            all().for_each(|id| counts[id] = 0);
        }
        if params.frequency_penalty != 0.0 || params.presence_penalty != 0.0 {
            in_vocabulary(history.generated, size).for_each(|id| counts[id] += 1);
            for id in in_vocabulary(history.generated, size) {
                let count = std::mem::take(&mut counts[id]);
                if count > 0 {
                    let penalty = params.frequency_penalty * count as f32 + params.presence_penalty;
                    logits[id] = keep_finite(logits[id], logits[id] - penalty);
                }
            }
        }
    }

    /// Fills `scratch.candidates` with the tokens that may be drawn, in the order of their ids.
    fn candidates(&self, logits: &[f32], max: f32, scratch: &mut Scratch) {
        let params = &self.params;
        // Top-k before min-p, which saves most exponentials: each keeps a set of most probable tokens, so the two
        // commute.
        let at_least = if params.top_k == 0 || params.top_k >= logits.len() {
            f32::NEG_INFINITY
        } else {
            keep_largest(tokens(logits), params.top_k, &mut scratch.largest);
            scratch.largest.last().map_or(f32::NEG_INFINITY, |last| last.1)
        };
        if at_least == f32::NEG_INFINITY {
            let mut weights = std::mem::take(&mut scratch.weights);
            exponentials(logits, f64::from(max), f64::from(params.temperature), &mut weights);
            self.keep((0..).zip(weights.iter().copied()), scratch);
            scratch.weights = weights;
        } else {
            self.weigh(tokens(logits).filter(|t| t.1 >= at_least), max, scratch);
        }
        if params.top_p < 1.0 {
            let top_p = f64::from(params.top_p);
            keep_top_p(&mut scratch.candidates, top_p, &mut scratch.boundary);
        }
    }

    /// Makes candidates of tokens and their logits, before top-p.
    fn weigh(&self, logits: impl Iterator<Item = (u32, f32)>, max: f32, scratch: &mut Scratch) {
        let (max, temperature) = (f64::from(max), f64::from(self.params.temperature));
        self.keep(logits.map(|(token, logit)| (token, exp((f64::from(logit) - max) / temperature))), scratch);
    }

    /// Makes candidates of tokens and their weights, before top-p.
    fn keep(&self, weights: impl Iterator<Item = (u32, f64)>, scratch: &mut Scratch) {
        let min_weight = f64::from(self.params.min_p);
        scratch.candidates.clear();
        // A weight of zero can never be drawn.
        let kept = weights.filter(|w| w.1 > 0.0 && w.1 >= min_weight);
        scratch.candidates.extend(kept.map(|(token, weight)| Candidate { token, weight }));
    }

    /// What of a row of `vocab` logits decides.
    pub(crate) fn question(&self, vocab: usize, history: History) -> Question {
        let params = &self.params;
        let top_k = if params.top_k < vocab { params.top_k } else { 0 };
        if params.is_greedy() {
            Question::Largest
        } else if top_k > 0 || params.min_p > 0.0 {
            Question::Few { top_k, min_p: params.min_p }
        } else if params.top_p < 1.0 {
            Question::TopP(params.top_p)
        } else {
            Question::At(uniform(self.seed, history.generated.len() as u64))
        }
    }

    /// What [`Self::sample`] chooses of the row that `few` are of, whose largest logit is `max`: where
    /// [`Self::question`] says `Few`, all tokens that top-k and min-p leave, or more; where it says `TopP`, the most
    /// probable ones, and what the weights of all add up to, with how far rounding may have carried that and any sum of
    /// theirs on the way. Ascending by token. `None`: it cannot be told from these.
    pub(crate) fn choose_of(
        &self,
        few: &[(u32, f32)],
        max: f32,
        total: Option<(f64, f64)>,
        history: History,
        scratch: &mut Scratch,
    ) -> Option<u32> {
        let params = &self.params;
        let top_p = f64::from(params.top_p);
        match total {
            Some((total, error)) => {
                self.weigh(few.iter().copied(), max, scratch);
                keep_sure_top_p(&mut scratch.candidates, top_p * total, error, &mut scratch.boundary)?;
            }
            None => {
                let mut at_least = f32::NEG_INFINITY;
                if params.top_k > 0 {
                    keep_largest(few.iter().copied(), params.top_k, &mut scratch.largest);
                    at_least = scratch.largest.last()?.1;
                }
                self.weigh(few.iter().copied().filter(|t| t.1 >= at_least), max, scratch);
                if params.top_p < 1.0 {
                    keep_top_p(&mut scratch.candidates, top_p, &mut scratch.boundary);
                }
            }
        }
        draw(&scratch.candidates, uniform(self.seed, history.generated.len() as u64))
    }

    /// Whether logits are changed for what was said before.
    pub(crate) fn has_penalties(&self) -> bool {
        self.params.has_penalties()
    }
}

/// What of a row of logits, penalties done, decides what a sampler chooses.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Question {
    /// The largest logit.
    Largest,
    /// Those that top-k (0: off) and min-p leave.
    Few { top_k: usize, min_p: f32 },
    /// The most probable ones, and what all weights add up to.
    TopP(f32),
    /// The token at this point, in [0, 1), of all weights laid end to end.
    At(f64),
}

/// How often each token of the vocabulary was generated, of those in the text so far; ascending by token.
pub(crate) fn generated_counts(history: History, vocab: usize) -> Vec<(u32, u32)> {
    let mut all: Vec<(u32, u32)> = in_vocabulary(history.prompt, vocab).map(|id| (id as u32, 0)).collect();
    all.extend(in_vocabulary(history.generated, vocab).map(|id| (id as u32, 1)));
    all.sort_unstable();
    all.dedup_by(|a, b| {
        a.0 == b.0 && {
            b.1 += a.1;
            true
        }
    });
    all
}

/// The log-probability, as [`Sampler::sample`] gives it, of a token with this logit; `largest` and what the
/// exponentials of all less it add up to are the row's. `None`: `error`, how far rounding may have carried the sum for
/// 1 of it, is too large to tell.
pub(crate) fn sure_log_prob(logit: f32, largest: f32, total: f64, error: f64) -> Option<f32> {
    let log_total = f64::from(largest) + libm::log(total);
    let (at, off) = (f64::from(logit) - log_total, error + 1e-15 * (log_total.abs() + f64::from(logit).abs()));
    if logit == f32::NEG_INFINITY {
        return Some(f32::NEG_INFINITY);
    }
    let [low, high] = [at - off, at + off].map(|x| x as f32);
    (low.to_bits() == high.to_bits()).then_some(low)
}

/// The `count` largest of these, as [`Sampler::sample`] orders them.
pub(crate) fn largest_of(few: &[(u32, f32)], count: usize) -> Vec<(u32, f32)> {
    let mut largest = Vec::new();
    keep_largest(few.iter().copied(), count, &mut largest);
    largest
}

/// The `count` most probable tokens of a row, in the same order.
pub(crate) fn most_probable(logits: &[f32], count: usize) -> Vec<u32> {
    let mut largest = Vec::new();
    keep_largest(tokens(logits), count, &mut largest);
    largest.into_iter().map(|t| t.0).collect()
}

/// How many tokens have at least the logit of `token`, itself counted.
pub(crate) fn rank_of(logits: &[f32], token: u32) -> usize {
    let logit = logits[token as usize];
    logits.iter().filter(|other| **other >= logit).count()
}

/// Makes the logits of tokens that are not in `allowed` -inf.
fn forbid_others(logits: &mut [f32], allowed: &TokenSet) {
    let words = allowed.words().iter().copied().chain(std::iter::repeat(0));
    for (logits, word) in logits.chunks_mut(u32::BITS as usize).zip(words).filter(|(_, word)| *word != u32::MAX) {
        let others = logits.iter_mut().enumerate().filter(|(bit, _)| word >> bit & 1 == 0);
        others.for_each(|(_, logit)| *logit = f32::NEG_INFINITY);
    }
}

/// Tokens and their logits.
fn tokens(logits: &[f32]) -> impl Iterator<Item = (u32, f32)> {
    (0..).zip(logits.iter().copied())
}

/// The token of the largest logit, of equal ones the lowest; `None` if all are -inf. No logit is NaN.
fn argmax(logits: &[f32]) -> Option<u32> {
    /// Logits of which the largest is known before it is known where it stands.
    const RUN: usize = 256;
    let mut best = (f32::NEG_INFINITY, &logits[..0], 0);
    for (i, run) in logits.chunks(RUN).enumerate() {
        let (lanes, rest) = run.as_chunks::<16>();
        let mut largest = [f32::NEG_INFINITY; 16];
        for lane in lanes {
            for (largest, x) in largest.iter_mut().zip(lane) {
                *largest = if *x > *largest { *x } else { *largest };
            }
        }
        let largest = largest.iter().chain(rest).fold(f32::NEG_INFINITY, |m, x| if *x > m { *x } else { m });
        if largest > best.0 {
            best = (largest, run, i * RUN);
        }
    }
    best.1.iter().position(|x| *x == best.0).map(|at| (best.2 + at) as u32)
}

/// The ids that have a logit. Others cannot come from a model that computed logits for this history.
fn in_vocabulary(ids: &[u32], size: usize) -> impl Iterator<Item = usize> {
    ids.iter().map(|&id| id as usize).filter(move |&id| id < size)
}

/// A changed logit, kept from becoming infinite unless it was: only the model and grammars forbid tokens.
fn keep_finite(before: f32, after: f32) -> f32 {
    if before.is_finite() { after.clamp(f32::MIN, f32::MAX) } else { before }
}

/// ln Σ exp(logit); at least one logit must be finite.
fn log_sum_exp(logits: &[f32], weights: &mut Vec<f64>) -> f64 {
    let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    exponentials(logits, max, 1.0, weights);
    max + libm::log(weights.iter().sum())
}

/// exp((logit - max) / temperature) of all logits. A loop with nothing else in it, which compilers turn into SIMD.
fn exponentials(logits: &[f32], max: f64, temperature: f64, weights: &mut Vec<f64>) {
    weights.clear();
    weights.extend((logits.iter()).map(|&logit| exp((f64::from(logit) - max) / temperature)));
}

/// e^x for x ≤ 0, to 1e-15 of its value; 0 below -708, where it would be subnormal.
///
/// x = n·ln 2 + r with |r| ≤ ln 2 / 2, and the Taylor series of e^r, whose first term left out is below 1e-17. Only
/// additions and multiplications that round the same everywhere, and no branch.
fn exp(x: f64) -> f64 {
    /// Adding it leaves the nearest integer in the low bits of the mantissa (1.5·2^52).
    const ROUND: f64 = 6_755_399_441_055_744.0;
    /// ln 2 in two parts; the first has enough zero bits at its end to make n times it exact. Source: fdlibm, e_exp.c.
    const LN_2_HIGH: f64 = f64::from_bits(0x3FE6_2E42_FEE0_0000);
    const LN_2_LOW: f64 = f64::from_bits(0x3DEA_39EF_3579_3C76);
    const SMALLEST: f64 = -708.0;
    /// 1 / k! for k = 13 down to 0.
    const INVERSE_FACTORIALS: [f64; 14] = {
        let mut inverse = [1.0; 14];
        let (mut k, mut factorial) = (1, 1.0);
        while k < 14 {
            factorial *= k as f64;
            inverse[13 - k] = 1.0 / factorial;
            k += 1;
        }
        inverse
    };
    let bounded = if x > SMALLEST { x } else { SMALLEST };
    let shifted = bounded * std::f64::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (bounded - n * LN_2_HIGH) - n * LN_2_LOW;
    let mut sum = 0.0;
    for coefficient in INVERSE_FACTORIALS {
        sum = sum * r + coefficient;
    }
    // Times 2^n: n is added to the exponent, above the 52 bits of the mantissa.
    let scaled = f64::from_bits(sum.to_bits().wrapping_add(shifted.to_bits() << 52));
    if x < SMALLEST { 0.0 } else { scaled }
}

/// Leaves in `largest` the `count` largest logits with their tokens, the largest first, of equal ones the lower token.
///
/// One pass: a logit is looked at again only if it exceeds the smallest of the best found so far, which few do.
fn keep_largest(logits: impl Iterator<Item = (u32, f32)>, count: usize, largest: &mut Vec<(u32, f32)>) {
    let order = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    largest.clear();
    if count == 0 {
        return;
    }
    // -0.0 and 0.0 are equal logits, but total_cmp tells them apart.
    let positive_zero = |x: f32| x + 0.0;
    let room = count.saturating_mul(2).max(64);
    let mut threshold = None;
    for (token, logit) in logits {
        // Tokens come in rising order, so one equal to the threshold comes after those kept.
        if threshold.is_some_and(|threshold| logit <= threshold) {
            continue;
        }
        largest.push((token, positive_zero(logit)));
        if largest.len() == room {
            largest.select_nth_unstable_by(count - 1, order);
            largest.truncate(count);
            threshold = Some(largest[count - 1].1);
        }
    }
    largest.sort_unstable_by(order);
    largest.truncate(count);
}

/// Keeps the smallest set of most probable candidates with at least `top_p` of the total weight; of equally probable
/// ones the lower ids. The order stays.
///
/// Only the candidates around the boundary are sorted: weights are first added up in classes of equal binary exponent.
fn keep_top_p(candidates: &mut Vec<Candidate>, top_p: f64, around: &mut Vec<Candidate>) {
    /// Weights of 2^-63 and less share the last class; it is sorted like any other.
    const CLASSES: usize = 64;
    /// The class of a weight in (0, 1]: 0 for 1, then 1 for [1/2, 1), and so on.
    fn class(weight: f64) -> usize {
        const EXPONENT_OF_ONE: u64 = 1023;
        const MANTISSA_BITS: u32 = 52;
        let exponent = weight.to_bits() >> MANTISSA_BITS;
        usize::try_from(EXPONENT_OF_ONE.saturating_sub(exponent)).map_or(CLASSES - 1, |class| class.min(CLASSES - 1))
    }

    let mut mass = [0.0f64; CLASSES];
    for candidate in candidates.iter() {
        mass[class(candidate.weight)] += candidate.weight;
    }
    let wanted = top_p * mass.iter().sum::<f64>();
    let mut before = 0.0;
    let Some(boundary) = mass.iter().position(|&mass| {
        let reached = before + mass >= wanted;
        before += if reached { 0.0 } else { mass };
        reached
    }) else {
        // Rounding: the classes together fall short of their own total.
        return;
    };
    around.clear();
    around.extend((candidates.iter()).filter(|candidate| class(candidate.weight) == boundary));
    around.sort_unstable_by(|a, b| b.weight.total_cmp(&a.weight).then(a.token.cmp(&b.token)));
    let last = around.iter().find(|candidate| {
        before += candidate.weight;
        before >= wanted
    });
    // None by rounding only: then all of the class are needed.
    let Some(&last) = last.or(around.last()) else {
        return;
    };
    candidates.retain(|candidate| {
        candidate.weight > last.weight || (candidate.weight == last.weight && candidate.token <= last.token)
    });
}

/// [`keep_top_p`] where only the most probable candidates are there, and `wanted`, top-p times the weight of all, and
/// their sums are `error` off at most. `None`: the last one needed may be another.
fn keep_sure_top_p(
    candidates: &mut Vec<Candidate>,
    wanted: f64,
    error: f64,
    sorted: &mut Vec<Candidate>,
) -> Option<()> {
    sorted.clear();
    sorted.extend_from_slice(candidates);
    sorted.sort_unstable_by(|a, b| b.weight.total_cmp(&a.weight).then(a.token.cmp(&b.token)));
    let mut sum = 0.0;
    let last = sorted.iter().position(|candidate| {
        sum += candidate.weight;
        sum >= wanted
    })?;
    let last_weight = sorted[last].weight;
    if sum - error < wanted || (last > 0 && sum - last_weight + error >= wanted) {
        return None;
    }
    let last = sorted[last];
    candidates.retain(|candidate| {
        candidate.weight > last.weight || (candidate.weight == last.weight && candidate.token <= last.token)
    });
    Some(())
}

/// The candidate at this point, in [0, 1), of their total weight laid end to end.
fn draw(candidates: &[Candidate], uniform: f64) -> Option<u32> {
    let target = uniform * candidates.iter().map(|c| c.weight).sum::<f64>();
    let mut passed = 0.0;
    let drawn = candidates.iter().find(|candidate| {
        passed += candidate.weight;
        passed > target
    });
    drawn.or(candidates.last()).map(|candidate| candidate.token)
}

/// A number in [0, 1) with 53 random bits for the `index`-th draw with this seed.
///
/// The seed is mixed first, so that neighbouring seeds give sequences that have nothing to do with each other.
fn uniform(seed: u64, index: u64) -> f64 {
    let state = SplitMix64::at(seed, 0);
    (SplitMix64::at(state, index) >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests;
