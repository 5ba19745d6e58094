//! The next token from the logits.
//!
//! The order of steps is vLLM's (v1/sample/sampler.py, `Sampler`, as documented for 0.22): log-probabilities of the raw
//! logits; repetition, frequency and presence penalty; greedy choice, or temperature, min-p, top-k, top-p and a draw.
//! Top-p therefore looks at what min-p and top-k left, renormalised. (HF transformers applies min-p last.)
//!
//! Exponentials and logarithms are `libm`'s, written in Rust, and sums run in f64 in the order of token ids: the same
//! logits and seed give the same token on every platform.

use std::hash::{BuildHasher, RandomState};

use super::sampling_params::{SamplingError, SamplingParams};

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

/// A chosen token.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampled {
    /// Its id.
    pub token: u32,
    /// The natural logarithm of its probability under the model's own distribution, before penalties and temperature;
    /// `None` if not asked for.
    pub logprob: Option<f32>,
    /// The same of the most probable tokens, the most probable first (of equal ones the lower id); as many as asked
    /// for. A forbidden token has -inf, which JSON cannot write.
    pub top_logprobs: Vec<(u32, f32)>,
}

/// Memory that a [`Sampler`] works in: one for each thread, so that nothing large is allocated for a token.
#[derive(Debug, Clone, Default)]
pub struct Scratch {
    logits: Vec<f32>,
    /// Times that each token was generated; all zero between calls.
    counts: Vec<u32>,
    candidates: Vec<Candidate>,
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
        if let Some(at) = logits.iter().position(|x| x.is_nan() || *x == f32::INFINITY) {
            return Err(SamplingError::Broken { token: at as u32, logit: logits[at] });
        }
        let most_probable = argmax(logits).ok_or(SamplingError::NothingAllowed { vocab_size: logits.len() })?;

        let token = if self.params.has_penalties() {
            let mut penalised = std::mem::take(&mut scratch.logits);
            penalised.clear();
            penalised.extend_from_slice(logits);
            self.penalise(&mut penalised, history, &mut scratch.counts);
            // Penalties never forbid the last allowed token: they keep finite logits finite.
            let most_probable = argmax(&penalised).unwrap_or(most_probable);
            let token = self.choose(&penalised, most_probable, history, scratch);
            scratch.logits = penalised;
            token
        } else {
            self.choose(logits, most_probable, history, scratch)
        };

        let (mut logprob, mut top_logprobs) = (None, Vec::new());
        if let Some(count) = self.params.logprobs {
            let log_total = log_sum_exp(logits);
            let of = |logit: f32| (f64::from(logit) - log_total) as f32;
            logprob = Some(of(logits[token as usize]));
            keep_largest(logits, count, &mut scratch.largest);
            top_logprobs = (scratch.largest.iter()).map(|&(token, logit)| (token, of(logit))).collect();
        }
        Ok(Sampled { token, logprob, top_logprobs })
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

    /// Repetition penalty as in Keskar et al. 2019 and HF's `RepetitionPenaltyLogitsProcessor`; frequency and presence
    /// penalty as in OpenAI's API. Source of the order: vLLM, v1/sample/ops/penalties.py.
    fn penalise(&self, logits: &mut [f32], history: History, counts: &mut Vec<u32>) {
        let params = &self.params;
        counts.resize(logits.len().max(counts.len()), 0);
        // Ids beyond the vocabulary have no logit; a model has refused them long before.
        let known = |ids: &'_ [u32]| {
            let size = logits.len();
            ids.iter().map(|&id| id as usize).filter(move |&id| id < size).collect::<Vec<usize>>()
        };
        let (prompt, generated) = (known(history.prompt), known(history.generated));

        if params.repetition_penalty != 1.0 {
            for &id in prompt.iter().chain(&generated) {
                // The count marks a token as done: each is penalised once, however often it occurs.
                if counts[id] == 0 {
                    counts[id] = 1;
                    let penalty = params.repetition_penalty;
                    let logit = logits[id];
                    logits[id] = finite(logit, if logit > 0.0 { logit / penalty } else { logit * penalty });
                }
            }
            for &id in prompt.iter().chain(&generated) {
                counts[id] = 0;
            }
        }
        if params.frequency_penalty != 0.0 || params.presence_penalty != 0.0 {
            for &id in &generated {
                counts[id] += 1;
            }
            for &id in &generated {
                let count = std::mem::take(&mut counts[id]);
                if count > 0 {
                    let penalty = params.frequency_penalty * count as f32 + params.presence_penalty;
                    logits[id] = finite(logits[id], logits[id] - penalty);
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
            keep_largest(logits, params.top_k, &mut scratch.largest);
            scratch.largest.last().map_or(f32::NEG_INFINITY, |last| last.1)
        };
        let (max, temperature) = (f64::from(max), f64::from(params.temperature));
        let min_weight = f64::from(params.min_p);
        scratch.candidates.clear();
        for (token, &logit) in logits.iter().enumerate() {
            if logit < at_least {
                continue;
            }
            let weight = libm::exp((f64::from(logit) - max) / temperature);
            // A weight of zero can never be drawn.
            if weight > 0.0 && weight >= min_weight {
                scratch.candidates.push(Candidate { token: token as u32, weight });
            }
        }
        if params.top_p < 1.0 {
            keep_top_p(&mut scratch.candidates, f64::from(params.top_p));
        }
    }
}

/// The token of the largest logit, of equal ones the lowest; `None` if all are -inf.
fn argmax(logits: &[f32]) -> Option<u32> {
    let mut best = (f32::NEG_INFINITY, None);
    for (token, &logit) in logits.iter().enumerate() {
        if logit > best.0 {
            best = (logit, Some(token as u32));
        }
    }
    best.1
}

/// A changed logit, kept from becoming infinite unless it was: only the model and grammars forbid tokens.
fn finite(before: f32, after: f32) -> f32 {
    if before.is_finite() { after.clamp(f32::MIN, f32::MAX) } else { before }
}

/// ln Σ exp(logit); at least one logit must be finite.
fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|&x| libm::exp(f64::from(x) - max)).sum();
    max + libm::log(sum)
}

/// Leaves in `largest` the `count` largest logits with their tokens, the largest first, of equal ones the lower token.
///
/// One pass: a logit is looked at again only if it exceeds the smallest of the best found so far, which few do.
fn keep_largest(logits: &[f32], count: usize, largest: &mut Vec<(u32, f32)>) {
    let order = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    largest.clear();
    if count == 0 {
        return;
    }
    // -0.0 and 0.0 are equal logits, but total_cmp tells them apart.
    let positive_zero = |x: f32| x + 0.0;
    let room = count.saturating_mul(2).max(64);
    let mut threshold = None;
    for (token, &logit) in logits.iter().enumerate() {
        // Tokens come in rising order, so one equal to the threshold comes after those kept.
        if threshold.is_some_and(|threshold| logit <= threshold) {
            continue;
        }
        largest.push((token as u32, positive_zero(logit)));
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
fn keep_top_p(candidates: &mut Vec<Candidate>, top_p: f64) {
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
    let mut around: Vec<Candidate> =
        (candidates.iter().copied()).filter(|candidate| class(candidate.weight) == boundary).collect();
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
/// SplitMix64 (Steele, Lea, Flood 2014) by its counter: draw `i` is `mix(state + (i + 1)·γ)`. The seed is mixed first,
/// so that neighbouring seeds give sequences that have nothing to do with each other.
fn uniform(seed: u64, index: u64) -> f64 {
    let state = split_mix_64(seed, 0);
    (split_mix_64(state, index) >> 11) as f64 / (1u64 << 53) as f64
}

/// The `index`-th output of SplitMix64 started at `state`.
fn split_mix_64(state: u64, index: u64) -> u64 {
    const GAMMA: u64 = 0x9E37_79B9_7F4A_7C15;
    let z = state.wrapping_add(index.wrapping_add(1).wrapping_mul(GAMMA));
    let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}
