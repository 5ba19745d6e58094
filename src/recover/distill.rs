//! The whole model at once: distillation from the teacher's next-token distributions (QAD), cross-entropy with the text
//! (QAT), or both.
//!
//! The graph is cut between blocks: each block's output is a leaf for the next, and gradients are handed back block by
//! block. With recomputation a block's graph lives only while its gradient is taken.

use candle_core::{Tensor, Var};
use serde::{Deserialize, Serialize};

use super::block::cache;
use super::data::{Data, Order, batch};
use super::optimizer::{AdamW, cosine};
use super::student::Student;
use super::{During as _, RecoverError, Result};
use crate::backend::autograd::AutogradBackend;
use crate::backend::autograd::loss::{self, LossSums, Objective, Teacher};
use crate::backend::{Backend as _, Batch};
use crate::model::Decoder;

/// How the whole model is trained.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Options {
    pub learning_rate: f32,
    pub steps: usize,
    pub warmup: usize,
    /// Sequences that go through the model at once.
    pub sequences: usize,
    /// Batches whose gradients are summed for one step.
    pub accumulate: usize,
    /// Weight of KL(teacher ‖ student).
    pub kl: f32,
    /// Weight of the cross-entropy with the text.
    pub cross_entropy: f32,
    pub temperature: f32,
    pub top_k: Option<usize>,
    /// Computes each block's forward pass twice instead of keeping its activations.
    pub recompute: bool,
    pub seed: u64,
    pub adam: AdamW,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            learning_rate: 1e-4,
            steps: 100,
            warmup: 5,
            sequences: 4,
            accumulate: 1,
            kl: 1.0,
            cross_entropy: 0.0,
            temperature: 1.0,
            top_k: None,
            recompute: false,
            seed: 0,
            adam: AdamW::default(),
        }
    }
}

impl Options {
    fn objective(&self) -> Objective {
        Objective { kl: self.kl, cross_entropy: self.cross_entropy, temperature: self.temperature, top_k: self.top_k }
    }
}

/// One step as the curve records it; losses are means over its tokens, in nats.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Point {
    pub step: usize,
    pub learning_rate: f32,
    pub kl: f64,
    pub cross_entropy: f64,
    pub gradient_norm: f64,
}

/// Learning rates end at this share of their peak.
const FLOOR: f32 = 0.1;

/// Trains all quantized weights for `options.steps` steps; `each` sees every step.
///
/// # Errors
/// When there is no data, a KL is asked for without a teacher, or a loss is no number.
pub fn train(
    student: &mut Student,
    teacher: Option<&Decoder<AutogradBackend>>,
    data: &Data,
    options: &Options,
    each: &mut dyn FnMut(&Point, &Student) -> Result<()>,
) -> Result<Vec<Point>> {
    student.train(|_| true);
    let mut order = Order::new(data.sequences.len(), options.seed);
    let mut curve = Vec::new();
    for step in 0..options.steps {
        let mut sums = LossSums::default();
        for _ in 0..options.accumulate.max(1) {
            let chosen = order.take(options.sequences);
            let sequences: Vec<&[u32]> = chosen.iter().map(|s| data.sequences[*s].as_slice()).collect();
            let part = gradients(&student.decoder, teacher, &sequences, options)?;
            sums.weight += part.weight;
            sums.kl += part.kl;
            sums.cross_entropy += part.cross_entropy;
        }
        let norm = student.gradient_norm() / options.accumulate.max(1) as f64;
        let rate = cosine(options.learning_rate, step, options.steps, options.warmup, FLOOR);
        let weight = sums.weight.max(1.0);
        let point = Point {
            step: step + 1,
            learning_rate: rate,
            kl: sums.kl / weight,
            cross_entropy: sums.cross_entropy / weight,
            gradient_norm: norm,
        };
        for (what, value) in [("loss", point.kl + point.cross_entropy), ("gradient", norm)] {
            if !value.is_finite() {
                return Err(RecoverError::NotFinite { what, step: step + 1, value, last_good: step });
            }
        }
        let factor = options.adam.clipping(norm) / options.accumulate.max(1) as f32;
        student.step(&options.adam, step + 1, rate, factor);
        curve.push(point);
        each(&point, student)?;
    }
    student.train(|_| false);
    Ok(curve)
}

/// Adds the gradients of one batch to the student's weights: of the mean objective over its tokens.
///
/// # Errors
/// As [`train`].
pub fn gradients(
    student: &Decoder<AutogradBackend>,
    teacher: Option<&Decoder<AutogradBackend>>,
    sequences: &[&[u32]],
    options: &Options,
) -> Result<LossSums> {
    let part = batch(sequences);
    let rope = student.rope(&part);
    let (targets, weights) = next_tokens(sequences);
    let reference = match teacher.filter(|_| options.kl != 0.0) {
        None => None,
        Some(t) => {
            let hidden = t.hidden(&part, &mut cache(t, &part)?)?;
            Some((t.backend().to_host(&t.final_norm(&hidden)?)?, t.head()))
        }
    };
    let reference = reference.as_ref().map(|(hidden, head)| Teacher { hidden, head });
    let mut kept: Vec<(Var, Option<Tensor>)> = Vec::new();
    let mut x = student.embed(&part)?;
    for index in 0..student.config.layers {
        let leaf = Var::from_tensor(&x).during("forward")?;
        // A detached tensor records nothing.
        let input = if options.recompute { leaf.as_detached_tensor() } else { leaf.as_tensor().clone() };
        let out = student.block(index, input, &rope, &mut cache(student, &part)?, &part)?;
        x = out.detach();
        kept.push((leaf, (!options.recompute).then_some(out)));
    }
    let leaf = Var::from_tensor(&x).during("head")?;
    let normed = student.final_norm(leaf.as_tensor())?;
    let (total, sums) = loss::next_token(&normed, student.head(), reference, &targets, &weights, &options.objective())
        .during("loss")?;
    let mut gradient = taken(&total, &leaf)?;
    while let Some((leaf, out)) = kept.pop() {
        let out = match out {
            Some(out) => out,
            None => {
                let index = kept.len();
                student.block(index, leaf.as_tensor().clone(), &rope, &mut cache(student, &part)?, &part)?
            }
        };
        let seed = loss::given(&out, 0.0, student.backend().to_host(&gradient)?).during("backward")?;
        gradient = taken(&seed, &leaf)?;
    }
    Ok(sums)
}

/// dL/d(leaf).
fn taken(loss: &Tensor, leaf: &Var) -> Result<Tensor> {
    let mut store = loss.backward().during("backward")?;
    match store.remove(leaf.as_tensor()) {
        Some(gradient) => Ok(gradient),
        None => leaf.as_tensor().zeros_like().during("backward"),
    }
}

/// For every row the token that follows in its sequence, and 1; a sequence's last row has none, and 0.
fn next_tokens(sequences: &[&[u32]]) -> (Vec<u32>, Vec<f32>) {
    let (mut targets, mut weights) = (Vec::new(), Vec::new());
    for s in sequences {
        targets.extend(s.iter().skip(1).chain(s.first()));
        weights.extend(std::iter::repeat_n(1.0, s.len().saturating_sub(1)).chain((!s.is_empty()).then_some(0.0)));
    }
    (targets, weights)
}

/// Mean KL and cross-entropy over sequences, without gradients.
///
/// # Errors
/// The backend's own failure.
pub fn evaluate(
    student: &Decoder<AutogradBackend>,
    teacher: &Decoder<AutogradBackend>,
    sequences: &[Vec<u32>],
) -> Result<LossSums> {
    let objective = Objective { kl: 1.0, cross_entropy: 0.0, temperature: 1.0, top_k: None };
    let mut sums = LossSums::default();
    for s in sequences {
        let part: Batch = batch(&[s]);
        let (targets, weights) = next_tokens(&[s]);
        let hidden = |d: &Decoder<AutogradBackend>| -> Result<Tensor> {
            Ok(d.final_norm(&d.hidden(&part, &mut cache(d, &part)?)?)?)
        };
        let reference = teacher.backend().to_host(&hidden(teacher)?)?;
        let reference = Teacher { hidden: &reference, head: teacher.head() };
        let own = hidden(student)?;
        let (_, part) = loss::next_token(&own, student.head(), Some(reference), &targets, &weights, &objective)
            .during("evaluation")?;
        sums.weight += part.weight;
        sums.kl += part.kl;
        sums.cross_entropy += part.cross_entropy;
    }
    Ok(sums)
}
