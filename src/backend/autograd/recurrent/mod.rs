//! Mamba-2 and gated delta nets between their projections, with gradients. Forward they are the packed kernels; backward,
//! every group of heads of every sequence by itself: its states are made again, in pieces of [`PIECE`] tokens, from those
//! that were kept where the pieces begin.

mod delta_net;
mod mamba2;

use std::ops::Range;

pub use delta_net::DeltaNet;
pub(super) use delta_net::delta_net;
pub use mamba2::Mamba;
pub(super) use mamba2::mamba;

use candle_core::{Result, bail};

use super::norm::Norm;
use crate::backend::Batch;
use crate::backend::cpu::elementwise::exp;

/// Tokens whose states are there at a time.
const PIECE: usize = 64;
/// Partial sums of what is added along a state.
const LANES: usize = 16;

/// Rows of each sequence of a batch. Training begins all of them with their first token, and keeps no state.
fn sequences(batch: &Batch) -> Result<Vec<Range<usize>>> {
    let mut end = 0;
    let mut out = Vec::with_capacity(batch.spans.len());
    for span in &batch.spans {
        if span.start > 0 {
            bail!(
                "a sequence goes on at token {}: recurrent layers are trained on whole sequences and keep no state here",
                span.start
            )
        }
        out.push(end..end + span.len);
        end += span.len;
    }
    Ok(out)
}

/// `count` columns from `first` on of the rows `rows` of x, [rows, count].
fn columns(x: &[f32], width: usize, rows: &Range<usize>, first: usize, count: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(rows.len() * count);
    for row in x[rows.start * width..rows.end * width].chunks_exact(width) {
        out.extend_from_slice(&row[first..first + count]);
    }
    out
}

/// Puts `part` [rows, count] where [`columns`] takes it from.
fn put(x: &mut [f32], width: usize, rows: &Range<usize>, first: usize, count: usize, part: &[f32]) {
    let to = x[rows.start * width..rows.end * width].chunks_exact_mut(width);
    to.zip(part.chunks_exact(count)).for_each(|(row, part)| row[first..first + count].copy_from_slice(part));
}

/// Adds `part` to the gradient of `vector` from `first` on, if it is trained.
fn add(vector: &Norm, first: usize, part: &[f32]) {
    if let Some(sum) = vector.gradient().as_mut() {
        sum[first..].iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
    }
}

/// silu(x), and its slope.
fn silu(x: f32) -> (f32, f32) {
    let sigmoid = 1.0 / (1.0 + exp(-x));
    (x * sigmoid, sigmoid * (1.0 + x * (1.0 - sigmoid)))
}

/// Some channels of the causal depthwise convolution over one sequence, and the silu of it.
struct Convolved {
    /// First channel, and how many.
    first: usize,
    count: usize,
    /// [kernel, count].
    taps: Vec<f32>,
    /// [tokens, count]: what went in, what came out before silu, and after.
    input: Vec<f32>,
    before: Vec<f32>,
    after: Vec<f32>,
}

/// Gradients of a [`Convolved`]: of its inputs, weights [count, kernel], and biases.
struct ConvolvedGradient {
    input: Vec<f32>,
    weight: Vec<f32>,
    bias: Vec<f32>,
}

impl Convolved {
    /// `weight` [channels, kernel] and `bias` [channels] are those of all channels.
    fn new(input: Vec<f32>, weight: &[f32], bias: Option<&[f32]>, kernel: usize, first: usize, count: usize) -> Self {
        let own = &weight[first * kernel..(first + count) * kernel];
        let taps: Vec<f32> = (0..kernel).flat_map(|j| (0..count).map(move |c| own[c * kernel + j])).collect();
        let mut before = vec![0.0; input.len()];
        for (token, out) in before.chunks_exact_mut(count).enumerate() {
            if let Some(bias) = bias {
                out.copy_from_slice(&bias[first..first + count]);
            }
            for (j, taps) in taps.chunks_exact(count).enumerate() {
                let Some(row) = (token + j + 1).checked_sub(kernel) else { continue };
                let input = &input[row * count..][..count];
                out.iter_mut().zip(taps).zip(input).for_each(|((o, w), x)| *o = w.mul_add(*x, *o));
            }
        }
        let after = before.iter().map(|x| silu(*x).0).collect();
        Self { first, count, taps, input, before, after }
    }

    /// Of dL/d(after).
    fn gradient(&self, mut grad: Vec<f32>) -> ConvolvedGradient {
        let count = self.count;
        let kernel = self.taps.len() / count.max(1);
        grad.iter_mut().zip(&self.before).for_each(|(g, x)| *g *= silu(*x).1);
        let mut input = vec![0.0; grad.len()];
        let (mut taps, mut bias) = (vec![0.0; self.taps.len()], vec![0.0; count]);
        for (token, grad) in grad.chunks_exact(count).enumerate() {
            bias.iter_mut().zip(grad).for_each(|(b, g)| *b += g);
            for (j, (w, dw)) in self.taps.chunks_exact(count).zip(taps.chunks_exact_mut(count)).enumerate() {
                let Some(row) = (token + j + 1).checked_sub(kernel) else { continue };
                let own = row * count..(row + 1) * count;
                let both = input[own.clone()].iter_mut().zip(&self.input[own]);
                for ((dx, x), ((w, dw), g)) in both.zip(w.iter().zip(dw).zip(grad)) {
                    *dx += w * g;
                    *dw += x * g;
                }
            }
        }
        let weight = (0..count).flat_map(|c| (0..kernel).map(move |j| (j, c))).map(|(j, c)| taps[j * count + c]);
        ConvolvedGradient { input, weight: weight.collect(), bias }
    }
}
