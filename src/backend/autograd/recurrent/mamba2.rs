//! Mamba-2: h ← exp(A Δ) h + Δ x Bᵀ, y = h C + D x, and the grouped norm of y · silu(z).

use std::ops::Range;
use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::{Convolved, ConvolvedGradient, Given, LANES, States, Way, add, columns, put, sequences, silu};
use crate::backend::autograd::{Norm, host};
use crate::backend::cpu::isa::{Isa, multiversion};
use crate::backend::cpu::recurrent::{Mamba2, RecurrentStates, softplus};
use crate::backend::{BackendError, Batch, Mamba2Shape, Mamba2Weights};

/// A Mamba-2 mixer without its projections. Clones share its parameters.
#[derive(Clone, Debug)]
pub struct Mamba(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    shape: Mamba2Shape,
    conv1d: Norm,
    conv1d_bias: Option<Norm>,
    a_log: Norm,
    d: Norm,
    dt_bias: Norm,
    norm: Norm,
}

impl Mamba {
    pub(in crate::backend::autograd) fn new(
        shape: Mamba2Shape,
        weights: Mamba2Weights,
    ) -> std::result::Result<Self, BackendError> {
        // Checks the lengths.
        Mamba2::new(shape, weights.clone())?;
        let Mamba2Weights { conv1d, conv1d_bias, a_log, d, dt_bias, norm } = weights;
        let [conv1d, a_log, d, dt_bias, norm] = [conv1d, a_log, d, dt_bias, norm].map(Norm::new);
        Ok(Self(Arc::new(Inner { shape, conv1d, conv1d_bias: conv1d_bias.map(Norm::new), a_log, d, dt_bias, norm })))
    }

    /// Its parameters, by the ends of their tensors' names.
    pub fn vectors(&self) -> impl Iterator<Item = (&'static str, &Norm)> {
        let i = &*self.0;
        let bias = i.conv1d_bias.as_ref().map(|bias| ("conv1d.bias", bias));
        let others = [("A_log", &i.a_log), ("D", &i.d), ("dt_bias", &i.dt_bias), ("norm.weight", &i.norm)];
        std::iter::once(("conv1d.weight", &i.conv1d)).chain(bias).chain(others)
    }

    fn weights(&self) -> Mamba2Weights {
        let i = &*self.0;
        let values = |v: &Norm| v.weight().to_vec();
        Mamba2Weights {
            conv1d: values(&i.conv1d),
            conv1d_bias: i.conv1d_bias.as_ref().map(values),
            a_log: values(&i.a_log),
            d: values(&i.d),
            dt_bias: values(&i.dt_bias),
            norm: values(&i.norm),
        }
    }
}

/// What out_proj reads, [T, inner], of what in_proj gave. `states`: as [`Mamba2::run_batch`] has them.
pub(in crate::backend::autograd) fn mamba(
    x: &Tensor,
    mixer: &Mamba,
    batch: &Batch,
    states: Option<(&mut RecurrentStates, usize)>,
) -> Result<Tensor> {
    let (shape, weights, x) = (mixer.0.shape, mixer.weights(), x.contiguous()?);
    let mut out = vec![0.0; batch.tokens.len() * shape.inner()];
    host::with(&x, |x| {
        let run = Mamba2::new(shape, weights.clone()).and_then(|m| m.run_batch(x, batch, states, &mut out));
        run.map_err(candle_core::Error::wrap)
    })?;
    x.apply_op1(Scan { mixer: mixer.clone(), weights, batch: batch.clone(), out: Given::new(out) })
}

struct Scan {
    mixer: Mamba,
    /// As they were when the forward pass ran.
    weights: Mamba2Weights,
    batch: Batch,
    out: Given,
}

/// Gradients of one group of heads of one sequence.
struct Piece {
    /// Of columns of what in_proj gave: [tokens, columns] of z, of x, B and C, and of time steps.
    z: Vec<f32>,
    parts: [ConvolvedGradient; 3],
    steps: Vec<f32>,
    /// Of the heads.
    a_log: Vec<f32>,
    d: Vec<f32>,
    dt_bias: Vec<f32>,
    norm: Vec<f32>,
}

impl Scan {
    fn shape(&self) -> &Mamba2Shape {
        &self.mixer.0.shape
    }

    /// First channels and numbers of channels of a group's x, B and C.
    fn channels(&self, group: usize) -> [(usize, usize); 3] {
        let Mamba2Shape { groups, state, .. } = *self.shape();
        let (inner, width) = (self.shape().inner(), self.shape().inner() / groups);
        [(group * width, width), (inner + group * state, state), (inner + (groups + group) * state, state)]
    }

    fn backward(&self, x: &[f32], grad: &[f32], rows: &Range<usize>, group: usize) -> Piece {
        let shape @ &Mamba2Shape { heads, head_dim, groups, state, kernel, .. } = self.shape();
        let (inner, projected, isa) = (shape.inner(), shape.projected(), Isa::detect());
        let (tokens, width, own_heads) = (rows.len(), inner / groups, heads / groups);
        let weights = &self.weights;
        let [xs, b, c] = self.channels(group).map(|(first, count)| {
            let input = columns(x, projected, rows, inner + first, count);
            Convolved::new(input, &weights.conv1d, weights.conv1d_bias.as_deref(), kernel, first, count)
        });
        let first_head = group * own_heads;
        let raw = columns(x, projected, rows, inner + shape.channels() + first_head, own_heads);
        let (low, high) = shape.time_step_limit;
        let size = head_dim * state;

        let of_token = |t: usize| t * state..(t + 1) * state;
        let of_head = |t: usize, h: usize| t * width + h * head_dim..t * width + (h + 1) * head_dim;
        // Of a head and token: Δ and exp(A Δ).
        let step = |h: usize, t: usize| -> (f32, f32) {
            let a = -libm::expf(weights.a_log[first_head + h]);
            let step = softplus(raw[t * own_heads + h] + weights.dt_bias[first_head + h]);
            let step = if step < low { low } else { step };
            let step = if step > high { high } else { step };
            (step, libm::expf(a * step))
        };
        let mut y = vec![0.0; tokens * width];
        let forth = |h: usize| {
            States::forth(tokens, size, |t, now, next| {
                let (x, y) = (&xs.after[of_head(t, h)], &mut y[of_head(t, h)]);
                advance(isa, now, next, step(h, t), x, &b.after[of_token(t)]);
                read(isa, next, &c.after[of_token(t)], y);
                y.iter_mut().zip(x).for_each(|(y, x)| *y += weights.d[first_head + h] * x);
            })
        };
        let states: Vec<States> = (0..own_heads).map(forth).collect();

        let z = columns(x, projected, rows, group * width, width);
        let mut piece = Piece {
            z: vec![0.0; z.len()],
            parts: [(); 3].map(|()| ConvolvedGradient { input: Vec::new(), weight: Vec::new(), bias: Vec::new() }),
            steps: vec![0.0; raw.len()],
            a_log: vec![0.0; own_heads],
            d: vec![0.0; own_heads],
            dt_bias: vec![0.0; own_heads],
            norm: vec![0.0; width],
        };
        // y becomes its gradient.
        let own_norm = &weights.norm[group * width..(group + 1) * width];
        let grad = columns(grad, inner, rows, group * width, width);
        let rows_of = |t: usize| t * width..(t + 1) * width;
        for t in 0..tokens {
            let (z, grad) = (&z[rows_of(t)], &grad[rows_of(t)]);
            let (y, dz) = (&mut y[rows_of(t)], &mut piece.z[rows_of(t)]);
            gated_norm_gradient(isa, z, own_norm, shape.eps, grad, y, dz, &mut piece.norm);
        }

        let (mut dx, mut db, mut dc) = (vec![0.0; y.len()], vec![0.0; b.after.len()], vec![0.0; c.after.len()]);
        for (h, states) in states.iter().enumerate() {
            let (a, d) = (-libm::expf(weights.a_log[first_head + h]), weights.d[first_head + h]);
            let mut d_state = vec![0.0; size];
            states.back(|t, way| {
                let (x, b) = (&xs.after[of_head(t, h)], &b.after[of_token(t)]);
                let (before, state) = match way {
                    Way::Again { before, after, .. } => return advance(isa, before, after, step(h, t), x, b),
                    Way::Back { before, after, .. } => (before, after),
                };
                let ((step, decay), dy) = (step(h, t), &y[of_head(t, h)]);
                let token = Token { before, state, step, decay, x, dy, b, c: &c.after[of_token(t)] };
                let dx = &mut dx[of_head(t, h)];
                let (mut by_step, mut by_decay) = (0.0, 0.0);
                let (db, dc) = (&mut db[of_token(t)], &mut dc[of_token(t)]);
                retreat(isa, &token, &mut d_state, dx, db, dc, &mut by_step, &mut by_decay);
                for ((dx, x), dy) in dx.iter_mut().zip(x).zip(dy) {
                    *dx += d * dy;
                    piece.d[h] += x * dy;
                }
                // exp(A Δ) by A and by Δ; A = -exp(A_log).
                piece.a_log[h] += by_decay * decay * step * a;
                let input = raw[t * own_heads + h] + weights.dt_bias[first_head + h];
                let free = softplus(input);
                if free >= low && free <= high {
                    let slope = 1.0 / (1.0 + libm::expf(-input));
                    let own = (by_step + by_decay * decay * a) * slope;
                    piece.steps[t * own_heads + h] = own;
                    piece.dt_bias[h] += own;
                }
            });
        }
        piece.parts = [xs.gradient(dx), b.gradient(db), c.gradient(dc)];
        piece
    }
}

impl CustomOp1 for Scan {
    fn name(&self) -> &'static str {
        "mamba2"
    }

    fn cpu_fwd(&self, _: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(self.out.take()), Shape::from((layout.dims()[0], self.shape().inner()))))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let shape @ &Mamba2Shape { heads, groups, kernel, .. } = self.shape();
        let (inner, projected, own_heads) = (shape.inner(), shape.projected(), heads / groups);
        let width = inner / groups;
        let sequences = sequences(&self.batch)?;
        let tasks: Vec<_> = sequences.iter().flat_map(|rows| (0..groups).map(move |g| (rows, g))).collect();
        let dx = host::with(x, |x| {
            host::with(grad, |grad| {
                let pieces: Vec<Piece> = tasks.par_iter().map(|(rows, g)| self.backward(x, grad, rows, *g)).collect();
                let mut dx = vec![0.0; x.len()];
                let i = &*self.mixer.0;
                // In order: the same for any number of threads.
                for ((rows, group), piece) in tasks.iter().zip(&pieces) {
                    put(&mut dx, projected, rows, group * width, width, &piece.z);
                    for ((first, count), part) in self.channels(*group).into_iter().zip(&piece.parts) {
                        put(&mut dx, projected, rows, inner + first, count, &part.input);
                        add(&i.conv1d, first * kernel, &part.weight);
                        i.conv1d_bias.iter().for_each(|bias| add(bias, first, &part.bias));
                    }
                    let first = group * own_heads;
                    put(&mut dx, projected, rows, inner + shape.channels() + first, own_heads, &piece.steps);
                    add(&i.a_log, first, &piece.a_log);
                    add(&i.d, first, &piece.d);
                    add(&i.dt_bias, first, &piece.dt_bias);
                    add(&i.norm, group * width, &piece.norm);
                }
                Ok(dx)
            })
        })?;
        Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
    }
}

multiversion! {
    /// `next` = decay · now + step · x · bᵀ, [head_dim, state]; `factors` are step and decay.
    fn advance(now: &[f32], next: &mut [f32], factors: (f32, f32), x: &[f32], b: &[f32]) {
        let (step, decay) = factors;
        let rows = now.chunks_exact(b.len()).zip(next.chunks_exact_mut(b.len())).zip(x);
        for ((now, next), x) in rows {
            let gain = step * x;
            for ((next, now), b) in next.iter_mut().zip(now).zip(b) {
                *next = now.mul_add(decay, gain * b);
            }
        }
    }
}

multiversion! {
    /// y = state · c.
    fn read(state: &[f32], c: &[f32], y: &mut [f32]) {
        for (row, y) in state.chunks_exact(c.len()).zip(y) {
            let mut lanes = [0.0f32; LANES];
            for (row, c) in row.chunks(LANES).zip(c.chunks(LANES)) {
                for ((lane, s), c) in lanes.iter_mut().zip(row).zip(c) {
                    *lane = s.mul_add(*c, *lane);
                }
            }
            *y = lanes.iter().sum();
        }
    }
}

/// One token of one head.
struct Token<'a> {
    /// States before and after it, [head_dim, state].
    before: &'a [f32],
    state: &'a [f32],
    step: f32,
    decay: f32,
    /// [head_dim].
    x: &'a [f32],
    dy: &'a [f32],
    /// [state].
    b: &'a [f32],
    c: &'a [f32],
}

multiversion! {
    /// Takes dL/d(state after the token but for what y reads) to that of the state before, and adds to what it depends on:
    /// of the step but for its decay, and of the decay.
    fn retreat(
        t: &Token<'_>,
        d_state: &mut [f32],
        dx: &mut [f32],
        db: &mut [f32],
        dc: &mut [f32],
        by_step: &mut f32,
        by_decay: &mut f32,
    ) {
        let width = t.b.len();
        let mut along = [0.0f32; LANES];
        for (p, dx) in dx.iter_mut().enumerate() {
            let (x, dy) = (t.x[p], t.dy[p]);
            let gain = t.step * x;
            let row = p * width..(p + 1) * width;
            let states = t.before[row.clone()].chunks(LANES).zip(t.state[row.clone()].chunks(LANES));
            let rows = d_state[row].chunks_mut(LANES).zip(states);
            let shared = t.b.chunks(LANES).zip(t.c.chunks(LANES)).zip(db.chunks_mut(LANES).zip(dc.chunks_mut(LANES)));
            let mut written = [0.0f32; LANES];
            for ((d_state, (before, state)), ((b, c), (db, dc))) in rows.zip(shared) {
                for l in 0..d_state.len() {
                    let d = dy.mul_add(c[l], d_state[l]);
                    dc[l] = dy.mul_add(state[l], dc[l]);
                    db[l] = gain.mul_add(d, db[l]);
                    written[l] = d.mul_add(b[l], written[l]);
                    along[l] = d.mul_add(before[l], along[l]);
                    d_state[l] = d * t.decay;
                }
            }
            let written: f32 = written.iter().sum();
            *dx += t.step * written;
            *by_step += x * written;
        }
        *by_decay += along.iter().sum::<f32>();
    }
}

multiversion! {
    /// Of out = rms(y · silu(z)) · weight over one group of one token: `y` becomes dL/dy.
    fn gated_norm_gradient(
        z: &[f32],
        weight: &[f32],
        eps: f32,
        grad: &[f32],
        y: &mut [f32],
        dz: &mut [f32],
        d_weight: &mut [f32],
    ) {
        let (mut square, mut along) = (0.0f32, 0.0f32);
        for (((y, z), g), w) in y.iter().zip(z).zip(grad).zip(weight) {
            let r = y * silu(*z).0;
            square += r * r;
            along += r * g * w;
        }
        let n = weight.len() as f32;
        let inverse = 1.0 / (square / n + eps).sqrt();
        let pull = along * inverse * inverse * inverse / n;
        let values = y.iter_mut().zip(z).zip(grad.iter().zip(weight)).zip(dz.iter_mut().zip(d_weight));
        for (((y, z), (g, w)), (dz, dw)) in values {
            let (gate, slope) = silu(*z);
            let r = *y * gate;
            *dw += g * r * inverse;
            let dr = g * w * inverse - r * pull;
            *dz = dr * *y * slope;
            *y = dr * gate;
        }
    }
}
