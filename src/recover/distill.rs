//! The whole model at once: distillation from the teacher's next-token distributions (QAD), cross-entropy with the text
//! (QAT), or both.
//!
//! The graph is cut between blocks: each block's output is a leaf for the next, and gradients are handed back block by
//! block. With recomputation a block's graph lives only while its gradient is taken.

use std::ops::ControlFlow;

use candle_core::{Tensor, Var};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::block::{cache, worth};
use super::data::{Data, Order, batch, next_tokens};
use super::optimizer::{AdamW, cosine_at};
use super::parameter::Rates;
use super::schedule::Schedule;
use super::student::Student;
use super::{During as _, RecoverError, Result};
use crate::backend::autograd::loss::{self, LossSums, Objective, Teacher};
use crate::backend::autograd::{AutogradBackend, Linear};
use crate::backend::{Backend as _, Batch};
use crate::corpus::Row;
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
    /// Weight of the mean relative squared error of what leaves each block.
    pub hidden: f32,
    pub temperature: f32,
    pub top_k: Option<usize>,
    /// What is watched and kept is a running mean of the masters, of which this share stays at each step; 0: the masters.
    pub average: f32,
    /// Trains what is no matrix as well: norms, sinks, a mixer's own numbers.
    pub norms: bool,
    /// Rate of those, where it is not that of the weights.
    pub norm_lr: Option<f32>,
    /// Trains block scales as well, where they are E4M3 codes.
    pub scales: bool,
    /// Rate of their logarithms.
    pub scale_lr: Option<f32>,
    /// Only what codes are multiplied by is learned; what weights are divided by stays.
    pub dual: bool,
    /// Trains the quantized weights.
    pub weights: bool,
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
            hidden: 0.0,
            temperature: 1.0,
            top_k: None,
            average: 0.0,
            norms: false,
            norm_lr: None,
            scales: false,
            scale_lr: None,
            dual: false,
            weights: true,
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

    /// The rates of a step where that of weights is `rate`.
    fn rates(&self, rate: f32) -> Rates {
        let share = rate / self.learning_rate;
        let own = |own: Option<f32>, other: f32| own.map_or(other, |own| own * share);
        let all = Rates::of(rate);
        Rates { weights: rate, scales: own(self.scale_lr, all.scales), norms: own(self.norm_lr, all.norms) }
    }
}

/// One step as the curve records it; losses are means over its learned tokens, in nats.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Point {
    pub step: usize,
    pub learning_rate: f32,
    pub kl: f64,
    pub cross_entropy: f64,
    /// Mean relative squared error of what leaves each block, where that is part of the loss.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hidden: Option<f64>,
    pub gradient_norm: f64,
}

/// Learning rates end at this share of their peak.
const FLOOR: f32 = 0.1;

/// Trains all quantized weights from step `from` (the first is 0) to `options.steps`; `each` sees every step, and ends
/// the training with `Break`. The student's optimizer must be ready ([`Student::train`]).
///
/// # Errors
/// When a KL is asked for without a teacher, a loss is no number, or from `each`.
pub fn train(
    student: &mut Student,
    teacher: Option<&Decoder<AutogradBackend>>,
    data: &Data,
    options: &Options,
    from: usize,
    each: &mut dyn FnMut(&Point, &Student) -> Result<ControlFlow<()>>,
) -> Result<()> {
    let schedule = &mut Schedule::new(options.steps, Vec::new());
    train_as(student, teacher, data, options, from, schedule, &mut |point, student, _| each(point, student))
}

/// What sees every step, may cut the schedule, and ends the training with `Break`.
pub type Each<'e> = dyn FnMut(&Point, &Student, &mut Schedule) -> Result<ControlFlow<()>> + 'e;

/// [`train`], for as many steps as the schedule has, which `each` may cut.
///
/// # Errors
/// As [`train`].
pub fn train_as(
    student: &mut Student,
    teacher: Option<&Decoder<AutogradBackend>>,
    data: &Data,
    options: &Options,
    from: usize,
    schedule: &mut Schedule,
    each: &mut Each<'_>,
) -> Result<()> {
    let batches = options.accumulate.max(1);
    let team = student.team.clone();
    if let Some(team) = &team {
        team.begin(student, options, from)?;
    }
    let mut order = Order::new(data.rows.len(), options.seed);
    order.take(from * batches * options.sequences);
    let mut step = from;
    while step < schedule.end(step) {
        let chosen: Vec<Vec<&Row>> =
            (0..batches).map(|_| order.take(options.sequences).into_iter().map(|r| &data.rows[r]).collect()).collect();
        let learned = |rows: &Vec<&Row>| next_tokens(rows).1.iter().map(|w| f64::from(*w)).sum::<f64>();
        let total: f64 = chosen.iter().map(learned).sum();
        let position = schedule.position(step);
        let (mut sums, mut hidden) = (LossSums::default(), 0.0);
        let parts = match &team {
            Some(team) => team.gradients(student, teacher, &chosen, total, options)?,
            None => {
                let part =
                    |rows: &Vec<&Row>| student.apart(|| gradients(&student.decoder, teacher, rows, total, options));
                chosen.iter().map(part).collect::<Result<_>>()?
            }
        };
        for (part, errors) in parts {
            hidden += errors / batches as f64;
            sums.weight += part.weight;
            sums.kl += part.kl;
            sums.cross_entropy += part.cross_entropy;
        }
        let norm = team.as_ref().map_or_else(|| student.gradient_norm(), |team| team.gradient_norm(student));
        let rate = cosine_at(options.learning_rate, position, options.steps, options.warmup, FLOOR);
        let weight = sums.weight.max(1.0);
        let point = Point {
            step: step + 1,
            learning_rate: rate,
            kl: sums.kl / weight,
            cross_entropy: sums.cross_entropy / weight,
            hidden: (options.hidden > 0.0).then_some(hidden),
            gradient_norm: norm,
        };
        for (what, value) in [("loss", point.kl + point.cross_entropy + hidden), ("gradient", norm)] {
            if !value.is_finite() {
                return Err(RecoverError::NotFinite { what: what.into(), step: step + 1, value });
            }
        }
        let (rates, factor) = (options.rates(rate), options.adam.clipping(norm));
        match &team {
            Some(team) => team.step(student, options, step + 1, (rates, factor)),
            None => student.step(&options.adam, step + 1, options.steps, rates, factor),
        }
        if options.average > 0.0 {
            student.average(options.average);
        }
        step += 1;
        if each(&point, student, schedule)?.is_break() {
            break;
        }
    }
    if let Some(team) = &team {
        team.rest();
    }
    Ok(())
}

/// Adds one batch's gradients, of the sum over its learned tokens divided by `total`, to those of the student's weights.
/// Gives the sums, and the mean relative squared error of what leaves each block (0 where that is not asked for).
///
/// # Errors
/// As [`train`].
pub fn gradients(
    student: &Decoder<AutogradBackend>,
    teacher: Option<&Decoder<AutogradBackend>>,
    rows: &[&Row],
    total: f64,
    options: &Options,
) -> Result<(LossSums, f64)> {
    let part = batch(rows);
    let pass = student.pass(&part)?;
    let (targets, weights) = next_tokens(rows);
    let mut states = Vec::new();
    let reference = match teacher.filter(|_| options.kl != 0.0 || options.hidden != 0.0) {
        None => None,
        Some(t) => {
            let own = t.pass(&part)?;
            let mut x = t.embed(&own)?;
            let mut cache = cache(t)?;
            for index in 0..t.config.layers.len() {
                x = t.block(index, x, &own, &mut cache)?;
                if options.hidden != 0.0 {
                    states.push(t.backend().to_host(&x)?);
                }
            }
            if !t.backend().is_finite(&x)? {
                // Says which module; the student's own losses are looked at by who asks for gradients.
                t.hidden(&part, &mut cache)?;
            }
            Some((t.backend().to_host(&t.final_norm(&x)?)?, t.head()))
        }
    };
    let reference = reference.as_ref().map(|(hidden, head)| Teacher { hidden, head });
    let mut kept: Vec<(Var, Option<Tensor>)> = Vec::new();
    let mut x = student.embed(&pass)?;
    for index in 0..student.config.layers.len() {
        let leaf = Var::from_tensor(&x).during("forward")?;
        // A detached tensor records nothing.
        let input = if options.recompute { leaf.as_detached_tensor() } else { leaf.as_tensor().clone() };
        let out = student.block(index, input, &pass, &mut cache(student)?)?;
        x = out.detach();
        kept.push((leaf, (!options.recompute).then_some(out)));
    }
    let leaf = Var::from_tensor(&x).during("head")?;
    let normed = student.final_norm(leaf.as_tensor())?;
    let rows =
        loss::Rows { hidden: &normed, head: student.head(), teacher: reference, targets: &targets, weights: &weights };
    let (loss, sums) = loss::next_token(&rows, total, &options.objective()).during("loss")?;
    let mut gradient = taken(&loss, &leaf)?;
    let mut hidden = 0.0;
    while let Some((leaf, out)) = kept.pop() {
        let out = match out {
            Some(out) => out,
            None => {
                let index = kept.len();
                student.block(index, leaf.as_tensor().clone(), &pass, &mut cache(student)?)?
            }
        };
        let mut values = student.backend().to_host(&gradient)?;
        if let Some(target) = states.get(kept.len()) {
            let share = 1.0 / (part.tokens.len() * states.len()) as f64;
            let weight = f64::from(options.hidden) / options.accumulate as f64;
            let out = student.backend().to_host(&out)?;
            hidden += share * add_hidden_gradient(&mut values, &out, target, student.config.hidden, weight * share);
        }
        let seed = loss::given(&out, 0.0, values).during("backward")?;
        gradient = taken(&seed, &leaf)?;
    }
    if student.embedding().gradient().is_some() {
        // What entered the first block is the rows looked up, times the model's factor.
        let mut rows = student.backend().to_host(&gradient)?;
        let factor = student.config.embedding_scale.unwrap_or(1.0);
        rows.iter_mut().for_each(|g| *g *= factor);
        student.embedding().add_row_gradient(&part.tokens, &rows);
    }
    Ok((sums, hidden))
}

/// Adds the gradient of `share` · Σ |x - target|² · [`worth`] over tokens, the worth of each seen as a constant; gives the
/// sum.
fn add_hidden_gradient(gradient: &mut [f32], x: &[f32], target: &[f32], width: usize, share: f64) -> f64 {
    let worth = worth(x, target, width);
    let tokens = gradient.par_chunks_mut(width).zip(x.par_chunks(width)).zip(target.par_chunks(width)).zip(worth);
    let sums = tokens.map(|(((gradient, x), target), worth)| {
        let factor = (2.0 * share * f64::from(worth)) as f32;
        let mut sum = 0.0;
        for ((g, x), t) in gradient.iter_mut().zip(x).zip(target) {
            let error = x - t;
            *g += factor * error;
            sum += f64::from(error * error);
        }
        sum * f64::from(worth)
    });
    sums.collect::<Vec<f64>>().iter().sum()
}

/// dL/d(leaf).
fn taken(loss: &Tensor, leaf: &Var) -> Result<Tensor> {
    let mut store = loss.backward().during("backward")?;
    match store.remove(leaf.as_tensor()) {
        Some(gradient) => Ok(gradient),
        None => leaf.as_tensor().zeros_like().during("backward"),
    }
}

/// Text that is watched while training, and never trained on.
pub struct Watched {
    pub name: String,
    rows: Vec<Row>,
    /// What enters the teacher's head, for every row.
    reference: Option<Vec<Vec<f32>>>,
}

impl Watched {
    /// Runs the teacher, if there is one, over `rows`.
    ///
    /// # Errors
    /// The backend's own failure.
    pub fn new(name: String, rows: Vec<Row>, teacher: Option<&Decoder<AutogradBackend>>) -> Result<Self> {
        let reference = match teacher {
            None => None,
            Some(t) => {
                let one = |row: &Row| -> Result<Vec<f32>> { Ok(t.backend().to_host(&entering_head(t, row)?)?) };
                Some(rows.iter().map(one).collect::<Result<_>>()?)
            }
        };
        Ok(Self { name, rows, reference })
    }

    /// `rows` of which the teacher's head got `reference`.
    pub(super) fn seen(name: String, rows: Vec<Row>, reference: Vec<Vec<f32>>) -> Self {
        Self { name, rows, reference: Some(reference) }
    }

    pub(super) fn rows(&self) -> &[Row] {
        &self.rows
    }

    /// Mean per learned token, in nats: KL(teacher ‖ student), or without a teacher the cross-entropy with the text.
    ///
    /// # Errors
    /// The backend's own failure.
    pub fn loss(&self, student: &Decoder<AutogradBackend>, teacher: Option<&Decoder<AutogradBackend>>) -> Result<f64> {
        self.loss_of(&mut |row| entering_head(student, row), student.head(), teacher.map(Decoder::head))
    }

    /// The same of a student of which `entering` gives what its head gets of each row, in order.
    pub(super) fn loss_of(
        &self,
        entering: &mut dyn FnMut(&Row) -> Result<Tensor>,
        head: &Linear,
        teacher: Option<&Linear>,
    ) -> Result<f64> {
        let parts: Vec<LossPart> =
            (0..self.rows.len()).map(|i| self.part(i, entering, head, teacher)).collect::<Result<_>>()?;
        Ok(mean(&parts))
    }

    /// What row `i` adds to the loss.
    fn part(
        &self,
        i: usize,
        entering: &mut dyn FnMut(&Row) -> Result<Tensor>,
        head: &Linear,
        teacher: Option<&Linear>,
    ) -> Result<LossPart> {
        let kl = if teacher.is_some() { 1.0 } else { 0.0 };
        let objective = Objective { kl, cross_entropy: 1.0 - kl, temperature: 1.0, top_k: None };
        let row = &self.rows[i];
        let (targets, weights) = next_tokens(&[row]);
        let hidden = self.reference.as_ref().map(|r| r[i].as_slice());
        let reference = teacher.zip(hidden).map(|(head, hidden)| Teacher { hidden, head });
        let own = entering(row)?;
        let rows = loss::Rows { hidden: &own, head, teacher: reference, targets: &targets, weights: &weights };
        let part = loss::measure(&rows, &objective).during("evaluation")?;
        Ok((part.weight, if teacher.is_some() { part.kl } else { part.cross_entropy }))
    }

    /// What every `of`-th row from `first` on adds to [`Self::loss`].
    pub(super) fn parts(
        &self,
        (first, of): (usize, usize),
        student: &Decoder<AutogradBackend>,
        teacher: Option<&Decoder<AutogradBackend>>,
    ) -> Result<Vec<LossPart>> {
        let head = teacher.map(Decoder::head);
        let entering = &mut |row: &Row| entering_head(student, row);
        (first..self.rows.len()).step_by(of).map(|i| self.part(i, entering, student.head(), head)).collect()
    }
}

/// The weight of a row's learned tokens, and the sum of their losses.
pub(super) type LossPart = (f64, f64);

/// The mean loss of a token.
pub(super) fn mean(parts: &[LossPart]) -> f64 {
    let sum = |of: fn(&LossPart) -> f64| parts.iter().fold(0.0, |sum, part| sum + of(part));
    sum(|p| p.1) / sum(|p| p.0).max(1.0)
}

fn entering_head(decoder: &Decoder<AutogradBackend>, row: &Row) -> Result<Tensor> {
    let part: Batch = batch(&[row]);
    Ok(decoder.final_norm(&decoder.hidden(&part, &mut cache(decoder)?)?)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gradient_of_hidden_states_is_that_of_finite_differences() {
        let width = 3;
        let (x, target) = (vec![1.0, -2.0, 0.5, 900.0, 3.0, 1.0], vec![1.5, -1.0, 0.25, 1.0, 2.0, 1.0]);
        let mut gradient = vec![0.25; x.len()];
        let sum = add_hidden_gradient(&mut gradient, &x, &target, width, 0.5);
        let worth = worth(&x, &target, width);
        let loss = |x: &[f32]| -> f64 {
            let token = |t: usize| -> f64 {
                (t * width..(t + 1) * width).map(|i| f64::from(x[i] - target[i]).powi(2)).sum::<f64>()
                    * f64::from(worth[t])
            };
            (0..2).map(token).sum()
        };
        assert!((sum - loss(&x)).abs() < 1e-6 && (loss(&x[..]) < 4.3), "one token cannot drown the rest: {sum}");
        for i in 0..x.len() {
            let step = 1e-2f32;
            let (mut more, mut less) = (x.clone(), x.clone());
            (more[i], less[i]) = (more[i] + step, less[i] - step);
            let slope = 0.5 * (loss(&more) - loss(&less)) / f64::from(more[i] - less[i]);
            assert!((slope - f64::from(gradient[i] - 0.25)).abs() < 1e-4, "{i}: {slope} {}", gradient[i]);
        }
    }
}
