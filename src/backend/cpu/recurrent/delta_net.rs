//! The gated delta net between its input projections and out_proj: convolution, delta rule, norm and gate.
//!
//! Source: Hugging Face transformers, models/qwen3_5.

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
const CONTEXT: &str = "gated delta net";

/// Shape of one gated delta net.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeltaNetShape {
    pub key_heads: usize,
    /// A multiple of `key_heads`: value head h uses key head h / (value_heads / key_heads).
    pub value_heads: usize,
    pub key_dim: usize,
    pub value_dim: usize,
    /// Taps of the convolution.
    pub kernel: usize,
    /// Of the norm over each head's output.
    pub eps: f32,
}

impl DeltaNetShape {
    /// Width of z and of what goes to out_proj.
    #[must_use]
    pub fn inner(&self) -> usize {
        self.value_heads * self.value_dim
    }

    /// Channels of the convolution: q, k and v.
    #[must_use]
    pub fn channels(&self) -> usize {
        2 * self.key_heads * self.key_dim + self.inner()
    }

    /// What is kept of a sequence; the state is [value_heads, value_dim, key_dim].
    #[must_use]
    pub fn kept(&self) -> RecurrentShape {
        RecurrentShape {
            tail: self.kernel.saturating_sub(1),
            channels: self.channels(),
            state: self.inner() * self.key_dim,
        }
    }
}

/// Tensors of a gated delta net beside its projections, as a checkpoint has them.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DeltaNetWeights {
    /// [channels, kernel].
    pub conv1d: Vec<f32>,
    /// [value_heads], as is `dt_bias`.
    pub a_log: Vec<f32>,
    pub dt_bias: Vec<f32>,
    /// [value_dim].
    pub norm: Vec<f32>,
}

/// What the input projections gave.
#[derive(Clone, Copy, Debug)]
pub struct DeltaNetInputs<'a> {
    /// [T, channels].
    pub qkv: &'a [f32],
    /// [T, inner].
    pub z: &'a [f32],
    /// [T, value_heads], as is `b`.
    pub a: &'a [f32],
    pub b: &'a [f32],
}

/// A gated delta net without its projections.
#[derive(Clone, Debug)]
pub struct DeltaNet {
    shape: DeltaNetShape,
    convolution: Convolution,
    /// Each value head's -exp(A_log) and dt_bias.
    heads: Vec<[f32; 2]>,
    norm: Vec<f32>,
}

impl DeltaNet {
    /// Takes the weights over.
    ///
    /// # Errors
    /// When the shape is none or a tensor has another number of values.
    pub fn new(shape: DeltaNetShape, weights: DeltaNetWeights) -> Result<Self, BackendError> {
        let DeltaNetShape { key_heads, value_heads, key_dim, value_dim, kernel, .. } = shape;
        let none = [key_heads, value_heads, key_dim, value_dim, kernel].contains(&0);
        if none || !value_heads.is_multiple_of(key_heads) {
            return Err(BackendError::Failed { context: CONTEXT, message: format!("no shape of a mixer: {shape:?}") });
        }
        let DeltaNetWeights { conv1d, a_log, dt_bias, norm } = weights;
        let parts = [(2 * key_heads, key_dim), (value_heads, value_dim)];
        let convolution = Convolution::new(CONTEXT, kernel, &parts, &conv1d, None)?;
        for (name, values) in [("A_log", &a_log), ("dt_bias", &dt_bias)] {
            expect(CONTEXT, name, values.len(), value_heads)?;
        }
        expect(CONTEXT, "norm.weight", norm.len(), value_dim)?;
        let heads = a_log.iter().zip(dt_bias).map(|(a_log, dt_bias)| [-libm::expf(*a_log), dt_bias]).collect();
        Ok(Self { shape, convolution, heads, norm })
    }

    /// Its shape.
    #[must_use]
    pub fn shape(&self) -> &DeltaNetShape {
        &self.shape
    }

    /// What out_proj reads, `out` [T, inner]; the spans' tails and states in `layer` move on.
    ///
    /// # Errors
    /// When the lengths don't fit, the spans are not all of the rows in order, or a slot isn't there or named twice.
    #[allow(clippy::too_many_arguments)]
    pub(in crate::backend::cpu) fn run(
        &self,
        isa: Isa,
        threads: &Threads,
        buffers: &BufferPool,
        inputs: DeltaNetInputs<'_>,
        spans: &[RecurrentSpan],
        states: &mut RecurrentStates,
        layer: usize,
        out: &mut [f32],
    ) -> Result<(), BackendError> {
        let shape = &self.shape;
        let DeltaNetShape { key_heads, value_heads, key_dim, value_dim, .. } = *shape;
        let (inner, channels) = (shape.inner(), shape.channels());
        let tokens = inputs.qkv.len() / channels;
        expect(CONTEXT, "what in_proj_qkv gave", inputs.qkv.len(), tokens * channels)?;
        expect(CONTEXT, "what in_proj_z gave", inputs.z.len(), tokens * inner)?;
        expect(CONTEXT, "what in_proj_a gave", inputs.a.len(), tokens * value_heads)?;
        expect(CONTEXT, "what in_proj_b gave", inputs.b.len(), tokens * value_heads)?;
        expect(CONTEXT, "what out_proj reads", out.len(), tokens * inner)?;
        cover(CONTEXT, spans, tokens)?;
        let mut slots = states.of_spans(layer, shape.kept(), spans)?;

        // Of each span q and k [key_heads, T, key_dim] and v [value_heads, T, value_dim].
        let mut parts = buffers.take(tokens * channels);
        let columns = Inputs { rows: inputs.qkv, width: channels, first: 0 };
        let query_scale = 1.0 / (key_dim as f32).sqrt();
        self.convolution.run(isa, threads, columns, spans, &mut slots, &mut parts, |part, heads| {
            if part < 2 * key_heads {
                let scale = if part < key_heads { query_scale } else { 1.0 };
                unit(isa, key_dim, scale, heads);
            }
        });

        let mut tasks = Vec::with_capacity(spans.len() * value_heads);
        let mut rest = &mut parts[..];
        for (span, slot) in spans.iter().zip(slots) {
            let len = span.rows.len();
            let own = rest.split_off_mut(..len * channels).unwrap_or_default();
            let (shared, values) = own.split_at_mut(2 * len * key_heads * key_dim);
            let (queries, keys) = shared.split_at(len * key_heads * key_dim);
            let mut states = slot.state.chunks_exact_mut(value_dim * key_dim);
            let mut values = values.chunks_exact_mut((len * value_dim).max(1));
            for (h, &[a, dt_bias]) in self.heads.iter().enumerate() {
                let Some(state) = states.next() else { continue };
                let key_head = h / (value_heads / key_heads);
                let of_head = key_head * len * key_dim..(key_head + 1) * len * key_dim;
                let head = Head {
                    shape,
                    starts: span.starts,
                    gates: [inputs.a, inputs.b],
                    first: span.rows.start * value_heads + h,
                    queries: &queries[of_head.clone()],
                    keys: &keys[of_head],
                    a,
                    dt_bias,
                };
                tasks.push((head, values.next().unwrap_or_default(), state));
            }
        }
        let least = pieces(tasks.len(), tokens * inner * key_dim);
        threads.pieces(&mut tasks, least, |_, tasks| {
            tasks.iter_mut().for_each(|(head, v, state)| scan(isa, head, v, state))
        });

        let places = Places::new(spans, channels, 2 * key_heads * key_dim);
        let least = pieces(tokens, tokens * inner);
        threads.pieces(out, least * inner, |piece, rows| {
            for (i, out) in rows.chunks_exact_mut(inner).enumerate() {
                let row = piece * least + i;
                places.gather(&parts, row, value_dim, out);
                gated_norm(isa, &inputs.z[row * inner..][..inner], &self.norm, shape.eps, out);
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
        inputs: DeltaNetInputs<'_>,
        batch: &Batch,
        states: Option<(&mut RecurrentStates, usize)>,
        out: &mut [f32],
    ) -> Result<(), BackendError> {
        let (isa, threads, buffers) = (Isa::detect(), Threads::ambient(), BufferPool::default());
        match states {
            Some((states, layer)) => self.run(isa, &threads, &buffers, inputs, &spans(batch), states, layer, out),
            None => {
                let (spans, mut states) = whole(CONTEXT, self.shape.kept(), batch)?;
                self.run(isa, &threads, &buffers, inputs, &spans, &mut states, 0, out)
            }
        }
    }
}

/// One value head of one span.
struct Head<'a> {
    shape: &'a DeltaNetShape,
    starts: bool,
    /// What in_proj_a and in_proj_b gave, [T, value_heads], and where this head's of the span's first token stands.
    gates: [&'a [f32]; 2],
    first: usize,
    /// [tokens, key_dim], as are `keys`.
    queries: &'a [f32],
    keys: &'a [f32],
    /// -exp(A_log).
    a: f32,
    dt_bias: f32,
}

multiversion! {
    /// Makes every run of `width` values one of length `scale`; what is all zero stays.
    fn unit(width: usize, scale: f32, x: &mut [f32]) {
        /// Source: transformers, l2norm in models/qwen3_next.
        const EPS: f32 = 1e-6;
        for x in x.chunks_exact_mut(width) {
            let factor = 1.0 / (sum_of_squares(x) + EPS).sqrt() * scale;
            x.iter_mut().for_each(|x| *x *= factor);
        }
    }
}

multiversion! {
    /// Replaces the values `v` [tokens, value_dim] by what their queries read, and carries `state` [value_dim, key_dim] on.
    fn scan(t: &Head<'_>, v: &mut [f32], state: &mut [f32]) {
        let DeltaNetShape { value_heads, key_dim, value_dim, .. } = *t.shape;
        if t.starts {
            state.fill(0.0);
        }
        for (block, v) in v.chunks_mut(TOKENS * value_dim).enumerate() {
            let (mut betas, mut decays) = ([0.0f32; TOKENS], [0.0f32; TOKENS]);
            let count = v.len() / value_dim;
            for i in 0..count {
                let [a, b] = t.gates.map(|gate| gate[t.first + (block * TOKENS + i) * value_heads]);
                betas[i] = 1.0 / (1.0 + libm::expf(-b));
                decays[i] = libm::expf(t.a * softplus(a + t.dt_bias));
            }
            let of_block = block * TOKENS * key_dim..(block * TOKENS + count) * key_dim;
            let (queries, keys) = (&t.queries[of_block.clone()], &t.keys[of_block]);
            let tokens = Tokens { betas: &betas[..count], decays: &decays, queries, keys, key_dim, value_dim };
            for (rows, state) in state.chunks_mut(ROWS * key_dim).enumerate() {
                carry(&tokens, rows * ROWS, v, state);
            }
        }
    }
}

/// Some consecutive tokens of one value head.
struct Tokens<'a> {
    betas: &'a [f32],
    decays: &'a [f32; TOKENS],
    /// [tokens, key_dim], as are `keys`.
    queries: &'a [f32],
    keys: &'a [f32],
    key_dim: usize,
    value_dim: usize,
}

/// Takes the rows of a state from dimension `first` of the values on, at most [`ROWS`] of `key_dim`, through some tokens.
#[inline(always)]
fn carry(t: &Tokens<'_>, first: usize, v: &mut [f32], state: &mut [f32]) {
    let width = t.key_dim;
    for (i, (&beta, &decay)) in t.betas.iter().zip(t.decays).enumerate() {
        let (keys, keys_rest) = t.keys[i * width..(i + 1) * width].as_chunks::<LANES>();
        let (queries, queries_rest) = t.queries[i * width..(i + 1) * width].as_chunks::<LANES>();
        let v = &mut v[i * t.value_dim + first..];
        // What the decayed state holds under the key, of all rows before it changes: their sums don't wait for each other.
        let mut deltas = [0.0f32; ROWS];
        for ((delta, v), row) in deltas.iter_mut().zip(&*v).zip(state.chunks_exact_mut(width)) {
            let (runs, rest) = row.as_chunks_mut::<LANES>();
            let mut sums = [0.0f32; LANES];
            for (state, key) in runs.iter_mut().zip(keys) {
                // A copy: what may overlap isn't turned into SIMD.
                let mut held = *state;
                for l in 0..LANES {
                    held[l] *= decay;
                    sums[l] = held[l].mul_add(key[l], sums[l]);
                }
                *state = held;
            }
            for ((state, key), sum) in rest.iter_mut().zip(keys_rest).zip(&mut sums) {
                *state *= decay;
                *sum = state.mul_add(*key, *sum);
            }
            *delta = beta * (v - tree_sum(sums));
        }
        // What the query reads after the key's value was put right.
        for ((delta, v), row) in deltas.iter().zip(v).zip(state.chunks_exact_mut(width)) {
            let (runs, rest) = row.as_chunks_mut::<LANES>();
            let mut sums = [0.0f32; LANES];
            for ((state, key), query) in runs.iter_mut().zip(keys).zip(queries) {
                let mut held = *state;
                for l in 0..LANES {
                    held[l] = key[l].mul_add(*delta, held[l]);
                    sums[l] = held[l].mul_add(query[l], sums[l]);
                }
                *state = held;
            }
            for (((state, key), query), sum) in rest.iter_mut().zip(keys_rest).zip(queries_rest).zip(&mut sums) {
                *state = key.mul_add(*delta, *state);
                *sum = state.mul_add(*query, *sum);
            }
            *v = tree_sum(sums);
        }
    }
}

multiversion! {
    /// `out = rms(out) · weight · silu(z)`, the norm over each run of `weight.len()` values.
    fn gated_norm(z: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        let width = weight.len();
        for (out, z) in out.chunks_exact_mut(width).zip(z.chunks_exact(width)) {
            let inverse = 1.0 / (sum_of_squares(out) / width as f32 + eps).sqrt();
            for ((o, z), w) in out.iter_mut().zip(z).zip(weight) {
                *o = *o * inverse * w * (z / (1.0 + exp(-z)));
            }
        }
    }
}
