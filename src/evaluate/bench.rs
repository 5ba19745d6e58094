//! How fast a model answers: time to the first token, time of each further one, and how far both are from what memory and
//! arithmetic of the machine allow.

pub mod devices;
#[cfg(any(feature = "reference", test))]
pub mod reference;
pub mod served;

use std::time::Instant;

use crate::backend::{Backend, Batch, PAGE, Span};
use crate::engine::EngineError;
use crate::formats::kv::KvFormat;
use crate::logits::{Draw, History, Sampled, Sampler, SamplingParams, Scratch};
use crate::model::modules::Part;
use crate::model::{Decoder, ModelConfig, Wanted};

/// Tokens of a prompt that are computed at once, as the engine does.
pub(super) const PIECE: usize = 2048;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Case {
    /// Sequences that are continued together.
    pub batch: usize,
    /// Tokens of each prompt.
    pub prompt: usize,
    /// Tokens that follow.
    pub generate: usize,
}

/// What came of it, in seconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Timing {
    pub case: Case,
    /// From a prompt to its first token, one sequence; the fastest of the repeats.
    pub first_token: f64,
    /// Of one step that gives each sequence a token; the median.
    pub step: f64,
    /// Of ten steps and of a hundred, the slowest.
    pub step_p90: f64,
    pub step_p99: f64,
}

impl Timing {
    /// From the first token's time and that of each step.
    fn of(case: Case, first_token: f64, mut steps: Vec<f64>) -> Self {
        // The first steps of a batch may make buffers, or record a graph.
        steps.drain(..(case.generate / 4).min(4));
        steps.sort_by(f64::total_cmp);
        let at = |share: f64| steps[((steps.len() - 1) as f64 * share).round() as usize];
        Self { case, first_token, step: at(0.5), step_p90: at(0.9), step_p99: at(0.99) }
    }

    /// Tokens per second of a prompt.
    #[must_use]
    pub fn prefill_rate(&self) -> f64 {
        self.case.prompt as f64 / self.first_token
    }

    /// Tokens per second of all sequences together, after the first token.
    #[must_use]
    pub fn rate(&self) -> f64 {
        self.case.batch as f64 / self.step
    }
}

/// What a model takes of a machine.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Load {
    /// Bytes of weights that one sequence's step reads: all but the embedding, of a mixture those experts that it uses.
    pub weights: f64,
    /// Of these, bytes of experts that a sequence uses, and of all experts.
    pub experts: (f64, f64),
    /// Bytes of all weights.
    pub resident: f64,
    /// Bytes of keys and values of a token.
    pub cache: f64,
    /// Multiply-adds of a token in linears, and those of them that are of integers.
    pub products: f64,
    pub integers: f64,
    /// The same of the head, which a prompt needs once.
    pub head: f64,
}

impl Load {
    /// Of `model`, with a cache in `kv`.
    #[must_use]
    pub fn of<B: Backend>(model: &Decoder<B>, kv: KvFormat) -> Self {
        let config = &model.config;
        let mut load = Self { cache: cache_bytes(config, kv), ..Self::default() };
        let mixtures = config.mixtures();
        let share = |layer: usize| {
            let mixture = mixtures.iter().find(|m| m.0 == layer);
            mixture.map_or(1.0, |(_, _, m)| m.rule.top_k as f64 / m.experts as f64)
        };
        let modules = config.modules();
        for (linear, module) in model.linears().zip(&modules) {
            let bytes = model.backend().resident_bytes(linear) as f64;
            let products = (module.role.n * module.role.k) as f64;
            let integers = if model.backend().multiplies_integers(linear) { products } else { 0.0 };
            load.resident += bytes;
            match (module.layer, module.expert) {
                (None, _) if module.part == Part::Embedding && !config.tied_embeddings => {}
                (None, _) => {
                    load.weights += bytes;
                    load.head += products;
                }
                (Some(layer), Some(_)) => {
                    let share = share(layer);
                    load.weights += share * bytes;
                    load.experts = (load.experts.0 + share * bytes, load.experts.1 + bytes);
                    load.products += share * products;
                    load.integers += share * integers;
                }
                _ => {
                    load.weights += bytes;
                    load.products += products;
                    load.integers += integers;
                }
            }
        }
        load
    }

    /// Bytes that a step of `batch` sequences of `context` tokens reads. Of a mixture, the experts that so many sequences are
    /// expected to use when each is as likely as any other.
    #[must_use]
    pub fn step_bytes(&self, batch: usize, context: usize) -> f64 {
        let (one, all) = self.experts;
        let used = if all > 0.0 { all * (1.0 - (1.0 - one / all).powi(batch as i32)) } else { 0.0 };
        self.weights - one + used + (batch * context) as f64 * self.cache
    }

    /// Multiply-adds of a prompt of `tokens`, attention aside.
    #[must_use]
    pub fn prompt_products(&self, tokens: usize) -> f64 {
        tokens as f64 * self.products + self.head
    }

    /// Those of them that are of integers.
    #[must_use]
    pub fn prompt_integers(&self, tokens: usize) -> f64 {
        tokens as f64 * self.integers
    }
}

fn cache_bytes(config: &ModelConfig, kv: KvFormat) -> f64 {
    let element = match kv {
        KvFormat::F32 => 4.0,
        KvFormat::Bf16 => 2.0,
        KvFormat::Fp8 { .. } => 1.0,
    };
    element * config.cache_values() as f64
}

/// Measures one case; `repeats` prompts.
///
/// # Errors
/// A case that the model's positions do not hold, or the backend's own.
pub fn measure<B: Backend>(
    model: &Decoder<B>,
    kv: KvFormat,
    case: Case,
    repeats: usize,
) -> Result<Timing, EngineError> {
    let Case { batch, prompt, generate } = case;
    let each = (prompt + generate).div_ceil(PAGE);
    let mut cache = model.new_cache(batch * each * PAGE, batch, kv)?;
    let pages = |sequence: usize| (sequence * each..(sequence + 1) * each).map(|p| p as u32).collect::<Vec<u32>>();
    let sampler = Sampler::new(SamplingParams::greedy())?;
    let mut scratch = Scratch::default();
    let mut choose = |logits: &B::Tensor, rows: usize| -> Result<Vec<u32>, EngineError> {
        let draws = vec![Draw { sampler: &sampler, history: History::default(), allowed: None }; rows];
        let chosen = model.backend().sample(logits, &draws, &mut scratch)?;
        chosen.into_iter().map(|c| Ok(c.map(|s: Sampled| s.token)?)).collect()
    };
    let mut first_token = f64::INFINITY;
    let mut next = vec![0; batch];
    // Sequence 0 again and again is what is timed; the first time pays for fresh memory.
    for (round, sequence) in (0..=repeats).map(|_| 0).chain(1..batch).enumerate() {
        let start = Instant::now();
        let mut done = 0;
        while done < prompt {
            let len = PIECE.min(prompt - done);
            let tokens = (done..done + len).map(|i| token(sequence, i, model.config.vocab)).collect();
            let pass =
                Batch { tokens, spans: vec![Span { start: done, len, pages: pages(sequence), slot: sequence as u32 }] };
            let logits = model.forward(&pass, &mut cache, Wanted::Last)?;
            done += len;
            if done == prompt {
                next[sequence] = choose(&logits, 1)?[0];
            }
        }
        if (1..=repeats).contains(&round) {
            first_token = first_token.min(start.elapsed().as_secs_f64());
        }
    }
    let mut steps = Vec::with_capacity(generate);
    for at in 0..generate {
        let start = Instant::now();
        let spans = (0..batch).map(|s| Span { start: prompt + at, len: 1, pages: pages(s), slot: s as u32 }).collect();
        let logits = model.forward(&Batch { tokens: next.clone(), spans }, &mut cache, Wanted::Last)?;
        next = choose(&logits, batch)?;
        steps.push(start.elapsed().as_secs_f64());
    }
    Ok(Timing::of(case, first_token, steps))
}

/// Token `i` of the prompt of sequence `sequence`.
fn token(sequence: usize, i: usize, vocab: usize) -> u32 {
    ((i * 7919 + sequence * 104_729 + 13) % vocab) as u32
}
