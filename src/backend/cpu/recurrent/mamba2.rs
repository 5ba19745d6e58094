//! Mamba-2 between its input and output projections: convolution, selective state space, gate and grouped norm.
//!
//! Source: Hugging Face transformers, models/nemotron_h; vLLM, layers/mamba/mamba_mixer2.py.

use super::super::buffer::BufferPool;
use super::super::elementwise::{LANES, exp, sum_of_squares, tree_sum};
use super::super::isa::{Isa, multiversion};
use super::super::threads::Threads;
use super::convolution::{Convolution, Inputs};
use super::{
    Places, ROWS, RecurrentShape, RecurrentSpan, RecurrentStates, TOKENS, cover, expect, pieces, softplus, spans, whole,
};
use crate::backend::{BackendError, Batch};
use serde::{Deserialize, Serialize};

/// Names the mixer in errors.
const CONTEXT: &str = "mamba2";

/// Shape of one Mamba-2 mixer.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Mamba2Shape {
    pub heads: usize,
    pub head_dim: usize,
    /// Groups of heads that share B and C.
    pub groups: usize,
    /// Values of state for each of a head's dimensions (ssm_state_size).
    pub state: usize,
    /// Taps of the convolution.
    pub kernel: usize,
    /// Of the norm.
    pub eps: f32,
    /// What a time step is clamped to; (0, ∞): not at all.
    pub time_step_limit: (f32, f32),
}

impl Mamba2Shape {
    /// Width of what goes to out_proj.
    #[must_use]
    pub fn inner(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Channels of the convolution: x, B and C.
    #[must_use]
    pub fn channels(&self) -> usize {
        self.inner() + 2 * self.groups * self.state
    }

    /// Width of what comes from in_proj: z, the convolution's channels, a time step for each head.
    #[must_use]
    pub fn projected(&self) -> usize {
        self.inner() + self.channels() + self.heads
    }

    /// What is kept of a sequence; the state is [heads, head_dim, state].
    #[must_use]
    pub fn kept(&self) -> RecurrentShape {
        RecurrentShape {
            tail: self.kernel.saturating_sub(1),
            channels: self.channels(),
            state: self.inner() * self.state,
        }
    }
}

/// Tensors of a Mamba-2 mixer beside its projections, as a checkpoint has them.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Mamba2Weights {
    /// [channels, kernel].
    pub conv1d: Vec<f32>,
    /// [channels].
    pub conv1d_bias: Option<Vec<f32>>,
    /// [heads], as are `d` and `dt_bias`.
    pub a_log: Vec<f32>,
    pub d: Vec<f32>,
    pub dt_bias: Vec<f32>,
    /// [inner].
    pub norm: Vec<f32>,
}

/// A Mamba-2 mixer without its projections.
#[derive(Clone, Debug)]
pub struct Mamba2 {
    shape: Mamba2Shape,
    convolution: Convolution,
    /// Each head's -exp(A_log), D and dt_bias.
    heads: Vec<[f32; 3]>,
    norm: Vec<f32>,
}

impl Mamba2 {
    /// Takes the weights over.
    ///
    /// # Errors
    /// When the shape is none or a tensor has another number of values.
    pub fn new(shape: Mamba2Shape, weights: Mamba2Weights) -> Result<Self, BackendError> {
        let Mamba2Shape { heads, head_dim, groups, state, kernel, .. } = shape;
        if [heads, head_dim, groups, state, kernel].contains(&0) || !heads.is_multiple_of(groups) {
            return Err(BackendError::Failed { context: CONTEXT, message: format!("no shape of a mixer: {shape:?}") });
        }
        let Mamba2Weights { conv1d, conv1d_bias, a_log, d, dt_bias, norm } = weights;
        let parts = [(heads, head_dim), (2 * groups, state)];
        let convolution = Convolution::new(CONTEXT, kernel, &parts, &conv1d, conv1d_bias)?;
        for (name, values) in [("A_log", &a_log), ("D", &d), ("dt_bias", &dt_bias)] {
            expect(CONTEXT, name, values.len(), heads)?;
        }
        expect(CONTEXT, "norm.weight", norm.len(), shape.inner())?;
        let heads = (0..heads).map(|h| [-libm::expf(a_log[h]), d[h], dt_bias[h]]).collect();
        Ok(Self { shape, convolution, heads, norm })
    }

    /// Its shape.
    #[must_use]
    pub fn shape(&self) -> &Mamba2Shape {
        &self.shape
    }

    /// What out_proj reads, `out` [T, inner], of what in_proj gave, `rows` [T, [`Mamba2Shape::projected`]]; the spans' tails
    /// and states in `layer` move on.
    ///
    /// # Errors
    /// When the lengths don't fit, the spans are not all of the rows in order, or a slot isn't there or named twice.
    #[allow(clippy::too_many_arguments)]
    pub(in crate::backend::cpu) fn run(
        &self,
        isa: Isa,
        threads: &Threads,
        buffers: &BufferPool,
        rows: &[f32],
        spans: &[RecurrentSpan],
        states: &mut RecurrentStates,
        layer: usize,
        out: &mut [f32],
    ) -> Result<(), BackendError> {
        let shape = &self.shape;
        let Mamba2Shape { heads, head_dim, groups, state, .. } = *shape;
        let (inner, channels, width) = (shape.inner(), shape.channels(), shape.projected());
        let tokens = rows.len() / width;
        expect(CONTEXT, "what in_proj gave", rows.len(), tokens * width)?;
        expect(CONTEXT, "what out_proj reads", out.len(), tokens * inner)?;
        cover(CONTEXT, spans, tokens)?;
        let mut slots = states.of_spans(layer, shape.kept(), spans)?;

        // Of each span x [heads, T, head_dim], B and C [groups, T, state].
        let mut parts = buffers.take(tokens * channels);
        let inputs = Inputs { rows, width, first: inner };
        self.convolution.run(isa, threads, inputs, spans, &mut slots, &mut parts, |_, _| {});

        let mut tasks = Vec::with_capacity(spans.len() * heads);
        let mut rest = &mut parts[..];
        for (span, slot) in spans.iter().zip(slots) {
            let len = span.rows.len();
            let own = rest.split_off_mut(..len * channels).unwrap_or_default();
            let (x, shared) = own.split_at_mut(len * inner);
            let (b, c) = shared.split_at(len * groups * state);
            let mut states = slot.state.chunks_exact_mut(head_dim * state);
            let mut x = x.chunks_exact_mut((len * head_dim).max(1));
            for (h, &[a, d, dt_bias]) in self.heads.iter().enumerate() {
                let Some(state_of_head) = states.next() else { continue };
                let of_group = h / (heads / groups) * len * state..(h / (heads / groups) + 1) * len * state;
                let head = Head {
                    shape,
                    starts: span.starts,
                    steps: Steps { rows, width, column: inner + channels + h, first: span.rows.start },
                    b: &b[of_group.clone()],
                    c: &c[of_group],
                    a,
                    d,
                    dt_bias,
                };
                tasks.push((head, x.next().unwrap_or_default(), state_of_head));
            }
        }
        let least = pieces(tasks.len(), tokens * inner * state);
        threads.pieces(&mut tasks, least, |_, tasks| {
            tasks.iter_mut().for_each(|(head, x, state)| scan(isa, head, x, state))
        });

        let places = Places::new(spans, channels, 0);
        let least = pieces(tokens, tokens * inner);
        let of_rows = rows;
        threads.pieces(out, least * inner, |piece, rows| {
            for (i, out) in rows.chunks_exact_mut(inner).enumerate() {
                let row = piece * least + i;
                places.gather(&parts, row, head_dim, out);
                gated_norm(isa, &of_rows[row * width..][..inner], &self.norm, inner / groups, shape.eps, out);
            }
        });
        Ok(())
    }

    /// As [`Self::run`] on the best instruction set and the threads of the rayon pool it is called in, of a batch. `states`: those of sequences, and the layer; `None`: all begin
    /// here and nothing is kept.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub(in crate::backend) fn run_batch(
        &self,
        rows: &[f32],
        batch: &Batch,
        states: Option<(&mut RecurrentStates, usize)>,
        out: &mut [f32],
    ) -> Result<(), BackendError> {
        let (isa, threads, buffers) = (Isa::detect(), Threads::ambient(), BufferPool::default());
        match states {
            Some((states, layer)) => self.run(isa, &threads, &buffers, rows, &spans(batch), states, layer, out),
            None => {
                let (spans, mut states) = whole(CONTEXT, self.shape.kept(), batch)?;
                self.run(isa, &threads, &buffers, rows, &spans, &mut states, 0, out)
            }
        }
    }
}

/// Where a head's time steps stand among the projected rows.
struct Steps<'a> {
    rows: &'a [f32],
    width: usize,
    column: usize,
    /// Row of the span's first token.
    first: usize,
}

/// One head of one span.
struct Head<'a> {
    shape: &'a Mamba2Shape,
    starts: bool,
    steps: Steps<'a>,
    /// [tokens, state], as is `c`.
    b: &'a [f32],
    c: &'a [f32],
    /// -exp(A_log).
    a: f32,
    d: f32,
    dt_bias: f32,
}

multiversion! {
    /// Replaces `x` [tokens, head_dim] by y, and carries `state` [head_dim, state] on.
    fn scan(t: &Head<'_>, x: &mut [f32], state: &mut [f32]) {
        let Mamba2Shape { head_dim, state: width, time_step_limit: (low, high), .. } = *t.shape;
        if t.starts {
            state.fill(0.0);
        }
        for (block, x) in x.chunks_mut(TOKENS * head_dim).enumerate() {
            let (mut steps, mut decays) = ([0.0f32; TOKENS], [0.0f32; TOKENS]);
            let count = x.len() / head_dim;
            for i in 0..count {
                let row = t.steps.first + block * TOKENS + i;
                let step = softplus(t.steps.rows[row * t.steps.width + t.steps.column] + t.dt_bias);
                let step = if step < low { low } else { step };
                steps[i] = if step > high { high } else { step };
                decays[i] = libm::expf(t.a * steps[i]);
            }
            let of_block = block * TOKENS * width..(block * TOKENS + count) * width;
            let (b, c) = (&t.b[of_block.clone()], &t.c[of_block]);
            let tokens = Tokens { steps: &steps[..count], decays: &decays, b, c, d: t.d, head_dim, width };
            for (rows, state) in state.chunks_mut(ROWS * width).enumerate() {
                carry(&tokens, rows * ROWS, x, state);
            }
        }
    }
}

/// Some consecutive tokens of one head.
struct Tokens<'a> {
    steps: &'a [f32],
    decays: &'a [f32; TOKENS],
    /// [tokens, width], as is `c`.
    b: &'a [f32],
    c: &'a [f32],
    d: f32,
    head_dim: usize,
    width: usize,
}

/// Takes the rows of a state from dimension `first` of the head on, [rows, width], through some tokens.
#[inline(always)]
fn carry(t: &Tokens<'_>, first: usize, x: &mut [f32], state: &mut [f32]) {
    let width = t.width;
    for (i, (&step, &decay)) in t.steps.iter().zip(t.decays).enumerate() {
        let (b, b_rest) = t.b[i * width..(i + 1) * width].as_chunks::<LANES>();
        let (c, c_rest) = t.c[i * width..(i + 1) * width].as_chunks::<LANES>();
        let x = &mut x[i * t.head_dim + first..];
        for (x, row) in x.iter_mut().zip(state.chunks_exact_mut(width)) {
            let gain = step * *x;
            let (runs, rest) = row.as_chunks_mut::<LANES>();
            let mut sums = [0.0f32; LANES];
            for ((state, b), c) in runs.iter_mut().zip(b).zip(c) {
                // A copy: what may overlap isn't turned into SIMD.
                let mut held = *state;
                for l in 0..LANES {
                    held[l] = held[l].mul_add(decay, gain * b[l]);
                    sums[l] = held[l].mul_add(c[l], sums[l]);
                }
                *state = held;
            }
            for (((state, b), c), sum) in rest.iter_mut().zip(b_rest).zip(c_rest).zip(&mut sums) {
                *state = state.mul_add(decay, gain * b);
                *sum = state.mul_add(*c, *sum);
            }
            *x = t.d.mul_add(*x, tree_sum(sums));
        }
    }
}

multiversion! {
    /// `out = rms(out · silu(z)) · weight`, the norm over each run of `group` values.
    fn gated_norm(z: &[f32], weight: &[f32], group: usize, eps: f32, out: &mut [f32]) {
        for ((out, z), weight) in out.chunks_exact_mut(group).zip(z.chunks_exact(group)).zip(weight.chunks_exact(group)) {
            for (o, z) in out.iter_mut().zip(z) {
                *o *= z / (1.0 + exp(-z));
            }
            let inverse = 1.0 / (sum_of_squares(out) / group as f32 + eps).sqrt();
            for (o, w) in out.iter_mut().zip(weight) {
                *o = *o * inverse * w;
            }
        }
    }
}
