//! Mamba-2 and gated delta nets between their projections, with gradients. Forward they are the packed kernels; backward,
//! every group of heads of every sequence by itself: its states are made again, in pieces of [`PIECE`] tokens, from those
//! that were kept where the pieces begin.

mod delta_net;
mod mamba2;

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

pub use delta_net::DeltaNet;
pub(super) use delta_net::delta_net;
pub use mamba2::Mamba;
pub(super) use mamba2::mamba;

use candle_core::{Result, bail};

use super::norm::Norm;
use crate::backend::Batch;
use crate::backend::cpu::elementwise::exp;
use crate::backend::cpu::isa::{Isa, multiversion};

/// Tokens whose states are there at a time.
const PIECE: usize = 64;
/// Partial sums of what is added along a state.
const LANES: usize = 16;

/// The rows of each sequence of a batch that begins with its first token: gradients are of whole sequences.
fn sequences(batch: &Batch) -> Result<Vec<Range<usize>>> {
    let mut end = 0;
    let mut out = Vec::with_capacity(batch.spans.len());
    for span in &batch.spans {
        if span.start > 0 {
            bail!("gradients of recurrent layers are of whole sequences; one goes on at token {}", span.start)
        }
        out.push(end..end + span.len);
        end += span.len;
    }
    Ok(out)
}

/// The states of one head through a sequence: those before each piece of [`PIECE`] tokens.
struct States {
    tokens: usize,
    /// Values in one.
    size: usize,
    kept: Vec<f32>,
}

/// What is asked of a token on the way back through its piece, the `index`-th there.
enum Way<'a> {
    /// The state after it, of the one before, once more.
    Again { index: usize, before: &'a [f32], after: &'a mut [f32] },
    /// The gradients of the token, last tokens first.
    Back { index: usize, before: &'a [f32], after: &'a [f32] },
}

impl States {
    /// Goes from zeros through `tokens` tokens: `advance` gives the state after a token of the one before.
    fn forth(tokens: usize, size: usize, mut advance: impl FnMut(usize, &[f32], &mut [f32])) -> Self {
        let mut kept = Vec::with_capacity(tokens.div_ceil(PIECE) * size);
        let (mut now, mut next) = (vec![0.0; size], vec![0.0; size]);
        for token in 0..tokens {
            if token % PIECE == 0 {
                kept.extend_from_slice(&now);
            }
            advance(token, &now, &mut next);
            std::mem::swap(&mut now, &mut next);
        }
        Self { tokens, size, kept }
    }

    /// Goes back through all tokens, piece by piece: forth through the piece once more, then back.
    fn back(&self, mut at: impl FnMut(usize, Way<'_>)) {
        let size = self.size;
        let mut states = vec![0.0; (PIECE.min(self.tokens) + 1) * size];
        for (piece, kept) in self.kept.chunks_exact(size.max(1)).enumerate().rev() {
            let first = piece * PIECE;
            let count = PIECE.min(self.tokens - first);
            states[..size].copy_from_slice(kept);
            for index in 0..count {
                let (before, after) = states.split_at_mut((index + 1) * size);
                let (before, after) = (&before[index * size..], &mut after[..size]);
                at(first + index, Way::Again { index, before, after });
            }
            for index in (0..count).rev() {
                let (before, after) = states[index * size..(index + 2) * size].split_at(size);
                at(first + index, Way::Back { index, before, after });
            }
        }
    }
}

/// What a forward pass gave, until candle takes it.
struct Given(Mutex<Vec<f32>>);

impl Given {
    fn new(values: Vec<f32>) -> Self {
        Self(Mutex::new(values))
    }

    fn take(&self) -> Vec<f32> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
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
#[inline(always)]
fn silu(x: f32) -> (f32, f32) {
    let sigmoid = 1.0 / (1.0 + exp(-x));
    (x * sigmoid, sigmoid * (1.0 + x * (1.0 - sigmoid)))
}

multiversion! {
    fn silu_of(x: &[f32], out: &mut [f32]) {
        out.iter_mut().zip(x).for_each(|(o, x)| *o = silu(*x).0);
    }
}

multiversion! {
    /// Turns dL/d(silu(x)) into dL/dx.
    fn multiply_by_slope(x: &[f32], grad: &mut [f32]) {
        grad.iter_mut().zip(x).for_each(|(g, x)| *g *= silu(*x).1);
    }
}

/// Some channels of the causal depthwise convolution over one sequence, and the silu of it.
struct Convolved {
    /// How many.
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
                out.iter_mut().zip(taps).zip(input).for_each(|((o, w), x)| *o += w * x);
            }
        }
        let mut after = vec![0.0; before.len()];
        silu_of(Isa::detect(), &before, &mut after);
        Self { count, taps, input, before, after }
    }

    /// Of dL/d(after).
    fn gradient(&self, mut grad: Vec<f32>) -> ConvolvedGradient {
        let count = self.count;
        let kernel = self.taps.len() / count.max(1);
        multiply_by_slope(Isa::detect(), &self.before, &mut grad);
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
