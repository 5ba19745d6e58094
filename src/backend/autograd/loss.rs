//! Losses, computed at once with their gradients: the vocabulary is too wide to keep its logits.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::host;
use super::linear::{Input, Linear};
use crate::backend::cpu::elementwise::exp;
use crate::backend::cpu::isa::{Isa, multiversion};

/// A scalar that is known, with its known gradient.
struct Given {
    value: f32,
    gradient: Vec<f32>,
}

impl CustomOp1 for Given {
    fn name(&self) -> &'static str {
        "loss"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![self.value]), ().into()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let factor = grad.to_scalar::<f32>()?;
        let gradient = self.gradient.iter().map(|g| g * factor).collect();
        Ok(Some(Tensor::from_vec(gradient, x.shape(), x.device())?))
    }
}

/// A scalar of the given value whose gradient with respect to `x` is `gradient`: where a backward pass starts.
///
/// # Errors
/// When `gradient` has not the length of `x`.
pub fn given(x: &Tensor, value: f32, gradient: Vec<f32>) -> Result<Tensor> {
    if gradient.len() != x.elem_count() {
        bail!("a gradient of {} values for a tensor of {}", gradient.len(), x.elem_count());
    }
    x.contiguous()?.apply_op1(Given { value, gradient })
}

/// Mean over rows of `weights[row] · |x - target|²`; x and target [rows, features].
///
/// # Errors
/// When the shapes do not fit.
pub fn squared_error(x: &Tensor, target: &[f32], weights: &[f32]) -> Result<(Tensor, f64)> {
    let rows = weights.len();
    if x.elem_count() != target.len() || rows == 0 || !target.len().is_multiple_of(rows) {
        bail!("{} values for a target of {} in {rows} rows", x.elem_count(), target.len());
    }
    let n = target.len() / rows;
    let (gradient, sums) = host::with(x, |x| {
        let mut gradient = vec![0.0; x.len()];
        let each = gradient.par_chunks_mut(n).zip(x.par_chunks(n)).zip(target.par_chunks(n)).zip(weights);
        let sums: Vec<f64> = each
            .map(|(((gradient, x), t), w)| {
                let mut sum = 0.0f64;
                for ((g, x), t) in gradient.iter_mut().zip(x).zip(t) {
                    let e = x - t;
                    *g = 2.0 * w * e / rows as f32;
                    sum += f64::from(e * e);
                }
                sum * f64::from(*w)
            })
            .collect();
        Ok((gradient, sums))
    })?;
    let loss = sums.iter().sum::<f64>() / rows as f64;
    Ok((given(x, loss as f32, gradient)?, loss))
}

/// What logits are trained towards.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Objective {
    /// Weight of KL(teacher ‖ student).
    pub kl: f32,
    /// Weight of the cross-entropy with the text's next token.
    pub cross_entropy: f32,
    /// What logits are divided by in the KL; the loss is multiplied by its square, so that gradients keep their size.
    pub temperature: f32,
    /// The teacher's most probable tokens that the KL tells apart; all others count as one. `None`: the whole vocabulary.
    pub top_k: Option<usize>,
}

/// Sums over rows, in nats.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LossSums {
    /// Total weight of the rows.
    pub weight: f64,
    pub kl: f64,
    pub cross_entropy: f64,
}

/// The teacher's side: what enters its head, [rows, features], and the head.
#[derive(Clone, Copy)]
pub struct Teacher<'a> {
    pub hidden: &'a [f32],
    pub head: &'a Linear,
}

/// Rows whose logits are in memory at a time.
pub const ROWS: usize = 128;

/// Rows of which the next token is predicted.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    /// What enters `head`, [rows, features].
    pub hidden: &'a Tensor,
    pub head: &'a Linear,
    pub teacher: Option<Teacher<'a>>,
    /// The next tokens, [rows].
    pub targets: &'a [u32],
    /// [rows]; those of weight 0 take no part.
    pub weights: &'a [f32],
}

/// The objective summed over rows by their weights and divided by `total`. The head's own gradient is added if it is
/// trained; the returned scalar's is that of what enters it.
///
/// # Errors
/// When shapes do not fit or a KL is asked for without a teacher.
pub fn next_token(rows: &Rows<'_>, total: f64, objective: &Objective) -> Result<(Tensor, LossSums)> {
    let Rows { hidden, head, .. } = *rows;
    let mut gradient = Vec::with_capacity(hidden.elem_count());
    let scale = if total > 0.0 { (1.0 / total) as f32 } else { 0.0 };
    let sums = each_chunk(rows, scale, objective, &mut |x, input, logits| {
        let mut dx = head.backward(logits, input)?;
        head.straight_through(x, &mut dx);
        gradient.append(&mut dx);
        Ok(())
    })?;
    let loss = f64::from(objective.kl) * sums.kl + f64::from(objective.cross_entropy) * sums.cross_entropy;
    Ok((given(hidden, (loss * f64::from(scale)) as f32, gradient)?, sums))
}

/// The sums of [`next_token`] without gradients.
///
/// # Errors
/// As [`next_token`].
pub fn measure(rows: &Rows<'_>, objective: &Objective) -> Result<LossSums> {
    each_chunk(rows, 0.0, objective, &mut |_, _, _| Ok(()))
}

/// What sees some rows: what enters the head, that quantized, and the gradient of the logits.
type Chunk<'f> = dyn FnMut(&[f32], &Input, &[f32]) -> Result<()> + 'f;

/// Losses of all rows; calls `f` with a few rows at a time and `scale` times their gradient.
fn each_chunk(rows: &Rows<'_>, scale: f32, objective: &Objective, f: &mut Chunk<'_>) -> Result<LossSums> {
    let Rows { hidden, head, teacher, targets, weights } = *rows;
    let (rows, k) = hidden.dims2()?;
    let vocab = head.n();
    if targets.len() != rows || weights.len() != rows {
        bail!("{} targets and {} weights for {rows} rows", targets.len(), weights.len());
    }
    if objective.kl != 0.0 && teacher.is_none() {
        bail!("a KL needs a teacher");
    }
    if let Some(t) = targets.iter().find(|t| **t as usize >= vocab) {
        bail!("target {t} is outside the vocabulary of {vocab}");
    }
    let total: f64 = weights.iter().map(|w| f64::from(*w)).sum();
    let mut sums = LossSums { weight: total, ..LossSums::default() };
    host::with(hidden, |hidden| {
        for (chunk, x) in hidden.chunks(ROWS * k).enumerate() {
            let from = chunk * ROWS;
            let count = x.len() / k;
            let input = head.quantize_values(x);
            let mut logits = head.multiply(&input)?;
            let reference = teacher.map(|t| {
                let width = t.head.k();
                t.head.multiply(&t.head.quantize_values(&t.hidden[from * width..(from + count) * width]))
            });
            let reference = reference.transpose()?;
            let each = logits.par_chunks_mut(vocab).enumerate().map(|(i, row)| {
                let reference = reference.as_ref().map(|r| &r[i * vocab..(i + 1) * vocab]);
                let weight = weights[from + i];
                if weight == 0.0 {
                    row.fill(0.0);
                    return (0.0, 0.0);
                }
                let (kl, ce) = row_gradient(row, reference, targets[from + i] as usize, objective, weight * scale);
                (f64::from(weight) * kl, f64::from(weight) * ce)
            });
            let losses: Vec<(f64, f64)> = each.collect();
            sums.kl += losses.iter().map(|l| l.0).sum::<f64>();
            sums.cross_entropy += losses.iter().map(|l| l.1).sum::<f64>();
            f(x, &input, &logits)?;
        }
        Ok(())
    })?;
    Ok(sums)
}

/// KL (at the objective's temperature, times its square) and cross-entropy of one row of logits, which becomes `scale`
/// times the gradient of the objective.
fn row_gradient(
    logits: &mut [f32],
    teacher: Option<&[f32]>,
    target: usize,
    objective: &Objective,
    scale: f32,
) -> (f64, f64) {
    let isa = Isa::detect();
    let mut p = vec![0.0; logits.len()];
    let mut log_total = 0.0f64;
    softmax(isa, logits, 1.0, &mut p, &mut log_total);
    let cross_entropy = log_total - f64::from(logits[target]);
    let Some(teacher) = teacher.filter(|_| objective.kl != 0.0) else {
        let factor = scale * objective.cross_entropy;
        logits.iter_mut().zip(&p).for_each(|(g, p)| *g = factor * p);
        logits[target] -= factor;
        return (0.0, cross_entropy);
    };
    let heat = objective.temperature;
    let (mut hot, mut q) = (Vec::new(), vec![0.0; logits.len()]);
    let (mut log_student, mut log_teacher) = (log_total, 0.0);
    if heat != 1.0 {
        hot = vec![0.0; logits.len()];
        softmax(isa, logits, 1.0 / heat, &mut hot, &mut log_student);
    }
    let student = if heat == 1.0 { &p } else { &hot };
    softmax(isa, teacher, 1.0 / heat, &mut q, &mut log_teacher);
    let square = f64::from(heat) * f64::from(heat);
    let kl;
    match objective.top_k.filter(|k| *k < logits.len()) {
        None => {
            let mut along = 0.0;
            mean_difference(isa, &q, teacher, logits, &mut along);
            kl = (along / f64::from(heat) - (log_teacher - log_student)).max(0.0);
            let (a, b) = (scale * objective.kl * heat, scale * objective.cross_entropy);
            for (((g, s), q), p) in logits.iter_mut().zip(student).zip(&q).zip(&p) {
                *g = a * (s - q) + b * p;
            }
        }
        Some(count) => {
            let mut order: Vec<u32> = (0..q.len() as u32).collect();
            let by = |a: &u32, b: &u32| q[*b as usize].total_cmp(&q[*a as usize]).then(a.cmp(b));
            order.select_nth_unstable_by(count, by);
            let mut top = order[..count].to_vec();
            top.sort_unstable();
            let mass = |v: &[f32]| top.iter().map(|i| f64::from(v[*i as usize])).sum::<f64>();
            let (rest_q, rest_s) = ((1.0 - mass(&q)).max(0.0), (1.0 - mass(student)).max(1e-12));
            let term = |i: &u32| {
                let i = *i as usize;
                let log_q = f64::from(teacher[i] / heat) - log_teacher;
                f64::from(q[i]) * (log_q - (f64::from(logits[i] / heat) - log_student))
            };
            let rest = if rest_q > 0.0 { rest_q * (rest_q / rest_s).ln() } else { 0.0 };
            kl = (top.iter().map(term).sum::<f64>() + rest).max(0.0);
            let (a, b) = (scale * objective.kl * heat, scale * objective.cross_entropy);
            let shrink = (1.0 - rest_q / rest_s) as f32;
            let kept: Vec<f32> = top.iter().map(|i| student[*i as usize] - q[*i as usize]).collect();
            for ((g, s), p) in logits.iter_mut().zip(student).zip(&p) {
                *g = a * s * shrink + b * p;
            }
            for (i, kept) in top.iter().zip(kept) {
                logits[*i as usize] = a * kept + b * p[*i as usize];
            }
        }
    }
    logits[target] -= scale * objective.cross_entropy;
    (kl * square, cross_entropy)
}

multiversion! {
    /// `p` = softmax(x · factor), `log_total` = log Σ exp(x · factor).
    fn softmax(x: &[f32], factor: f32, p: &mut [f32], log_total: &mut f64) {
        let max = x.iter().fold(f32::NEG_INFINITY, |m, v| m.max(*v));
        let mut total = 0.0f64;
        for (x, p) in x.chunks(1024).zip(p.chunks_mut(1024)) {
            let mut lanes = [0.0f32; 16];
            for (x, p) in x.chunks(16).zip(p.chunks_mut(16)) {
                for ((x, p), lane) in x.iter().zip(p).zip(&mut lanes) {
                    *p = exp((x - max) * factor);
                    *lane += *p;
                }
            }
            total += f64::from(lanes.iter().sum::<f32>());
        }
        let inverse = (1.0 / total) as f32;
        p.iter_mut().for_each(|p| *p *= inverse);
        *log_total = f64::from(max * factor) + total.ln();
    }
}

multiversion! {
    /// Σ q · (a - b).
    fn mean_difference(q: &[f32], a: &[f32], b: &[f32], sum: &mut f64) {
        for ((q, a), b) in q.chunks(1024).zip(a.chunks(1024)).zip(b.chunks(1024)) {
            let mut lanes = [0.0f32; 16];
            for ((q, a), b) in q.chunks(16).zip(a.chunks(16)).zip(b.chunks(16)) {
                for (((q, a), b), lane) in q.iter().zip(a).zip(b).zip(&mut lanes) {
                    *lane += q * (a - b);
                }
            }
            *sum += f64::from(lanes.iter().sum::<f32>());
        }
    }
}
