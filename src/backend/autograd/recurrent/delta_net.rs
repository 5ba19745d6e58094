//! Gated delta nets: S ← α S, S ← S + β (v - S k) kᵀ, o = S q with q and k of unit length, and rms(o) · silu(z).

use std::ops::Range;
use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::{Convolved, ConvolvedGradient, Given, LANES, PIECE, States, Way, add, columns, put, sequences, silu};
use crate::backend::autograd::{Norm, host};
use crate::backend::cpu::isa::{Isa, multiversion};
use crate::backend::cpu::recurrent::{DeltaNet as Kernel, DeltaNetInputs, RecurrentStates, softplus};
use crate::backend::{BackendError, Batch, DeltaInputs, DeltaNetShape, DeltaNetWeights};

/// Added to squared lengths of queries and keys, as the forward kernel does.
const EPS: f32 = 1e-6;

/// A gated delta net without its projections. Clones share its parameters.
#[derive(Clone, Debug)]
pub struct DeltaNet(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    shape: DeltaNetShape,
    conv1d: Norm,
    a_log: Norm,
    dt_bias: Norm,
    norm: Norm,
}

impl DeltaNet {
    pub(in crate::backend::autograd) fn new(
        shape: DeltaNetShape,
        weights: DeltaNetWeights,
    ) -> std::result::Result<Self, BackendError> {
        // Checks the lengths.
        Kernel::new(shape, weights.clone())?;
        let DeltaNetWeights { conv1d, a_log, dt_bias, norm } = weights;
        let [conv1d, a_log, dt_bias, norm] = [conv1d, a_log, dt_bias, norm].map(Norm::new);
        Ok(Self(Arc::new(Inner { shape, conv1d, a_log, dt_bias, norm })))
    }

    /// Its parameters, by the ends of their tensors' names.
    pub fn vectors(&self) -> impl Iterator<Item = (&'static str, &Norm)> {
        let i = &*self.0;
        [("conv1d.weight", &i.conv1d), ("A_log", &i.a_log), ("dt_bias", &i.dt_bias), ("norm.weight", &i.norm)]
            .into_iter()
    }

    fn weights(&self) -> DeltaNetWeights {
        let i = &*self.0;
        let values = |v: &Norm| v.weight().to_vec();
        DeltaNetWeights {
            conv1d: values(&i.conv1d),
            a_log: values(&i.a_log),
            dt_bias: values(&i.dt_bias),
            norm: values(&i.norm),
        }
    }
}

/// What out_proj reads, [T, value heads · value_dim]. `states`: as [`Kernel::run_batch`] has them.
pub(in crate::backend::autograd) fn delta_net(
    inputs: &DeltaInputs<Tensor>,
    mixer: &DeltaNet,
    batch: &Batch,
    states: Option<(&mut RecurrentStates, usize)>,
) -> Result<Tensor> {
    let (shape, weights) = (mixer.0.shape, mixer.weights());
    let mut out = vec![0.0; batch.tokens.len() * shape.inner()];
    let host = |x: &Tensor| host::with(x, |x| Ok(x.to_vec()));
    let (qkv, z, a, b) = (host(&inputs.qkv)?, host(&inputs.z)?, host(&inputs.a)?, host(&inputs.b)?);
    let rows = DeltaNetInputs { qkv: &qkv, z: &z, a: &a, b: &b };
    let run = Kernel::new(shape, weights.clone()).and_then(|k| k.run_batch(rows, batch, states, &mut out));
    run.map_err(candle_core::Error::wrap)?;
    let scan = Scan { mixer: mixer.clone(), weights, batch: batch.clone(), out: Given::new(out) };
    // candle's operations have three inputs at most.
    Tensor::cat(&[&inputs.qkv, &inputs.z, &inputs.a, &inputs.b], 1)?.contiguous()?.apply_op1(scan)
}

struct Scan {
    mixer: DeltaNet,
    /// As they were when the forward pass ran.
    weights: DeltaNetWeights,
    batch: Batch,
    out: Given,
}

/// Gradients of the value heads of one key head of one sequence.
struct Piece {
    /// Of columns of the inputs: [tokens, columns] of q, k and v, of z, a and b.
    parts: [ConvolvedGradient; 3],
    z: Vec<f32>,
    a: Vec<f32>,
    b: Vec<f32>,
    /// Of the heads.
    a_log: Vec<f32>,
    dt_bias: Vec<f32>,
    /// Of the norm that all heads share.
    norm: Vec<f32>,
}

impl Scan {
    fn shape(&self) -> &DeltaNetShape {
        &self.mixer.0.shape
    }

    /// First columns of z, a and b, and the number of all.
    fn places(&self) -> [usize; 4] {
        let shape = self.shape();
        let z = shape.channels();
        let a = z + shape.inner();
        [z, a, a + shape.value_heads, a + 2 * shape.value_heads]
    }

    /// First channels and numbers of channels of a key head's q, k and v.
    fn channels(&self, head: usize) -> [(usize, usize); 3] {
        let DeltaNetShape { key_heads, value_heads, key_dim, value_dim, .. } = *self.shape();
        let width = value_heads / key_heads * value_dim;
        let values = 2 * key_heads * key_dim;
        [(head * key_dim, key_dim), ((key_heads + head) * key_dim, key_dim), (values + head * width, width)]
    }

    fn backward(&self, x: &[f32], grad: &[f32], rows: &Range<usize>, key_head: usize) -> Piece {
        let shape = self.shape();
        let DeltaNetShape { key_heads, value_heads, key_dim, value_dim, kernel, eps } = *shape;
        let isa = Isa::detect();
        let (tokens, own_heads) = (rows.len(), value_heads / key_heads);
        let (first_head, width, size) = (key_head * own_heads, own_heads * value_dim, value_dim * key_dim);
        let [z_place, a_place, b_place, all] = self.places();
        let weights = &self.weights;
        let [q_part, k_part, v_part] = self.channels(key_head).map(|(first, count)| {
            Convolved::new(columns(x, all, rows, first, count), &weights.conv1d, None, kernel, first, count)
        });
        let scale = 1.0 / (key_dim as f32).sqrt();
        let (q, k) = (unit(&q_part.after, key_dim, scale), unit(&k_part.after, key_dim, 1.0));
        let raw_a = columns(x, all, rows, a_place + first_head, own_heads);
        let raw_b = columns(x, all, rows, b_place + first_head, own_heads);
        let z = columns(x, all, rows, z_place + first_head * value_dim, width);
        let grad = columns(grad, shape.inner(), rows, first_head * value_dim, width);

        let key = |t: usize| t * key_dim..(t + 1) * key_dim;
        let value = |t: usize, h: usize| t * width + h * value_dim..t * width + (h + 1) * value_dim;
        // Of a head and token: β and α.
        let rates = |h: usize, t: usize| -> (f32, f32) {
            let at = t * own_heads + h;
            let a = -libm::expf(weights.a_log[first_head + h]);
            let decay = libm::expf(a * softplus(raw_a[at] + weights.dt_bias[first_head + h]));
            (1.0 / (1.0 + libm::expf(-raw_b[at])), decay)
        };
        let mut out = Piece {
            parts: [(); 3].map(|()| ConvolvedGradient { input: Vec::new(), weight: Vec::new(), bias: Vec::new() }),
            z: vec![0.0; z.len()],
            a: vec![0.0; raw_a.len()],
            b: vec![0.0; raw_b.len()],
            a_log: vec![0.0; own_heads],
            dt_bias: vec![0.0; own_heads],
            norm: vec![0.0; value_dim],
        };
        let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; grad.len()]);
        let mut errors = vec![0.0; PIECE * value_dim];
        let of_errors = |index: usize| index * value_dim..(index + 1) * value_dim;
        for h in 0..own_heads {
            // What queries read, and the states before each piece.
            let mut read = vec![0.0; tokens * value_dim];
            let states = States::forth(tokens, size, |t, now, next| {
                let (v, read) = (&v_part.after[value(t, h)], &mut read[t * value_dim..(t + 1) * value_dim]);
                advance(isa, now, next, rates(h, t), &q[key(t)], &k[key(t)], v, read, &mut errors[..value_dim]);
            });
            // What was read becomes its gradient.
            for (t, read) in read.chunks_exact_mut(value_dim).enumerate() {
                let at = value(t, h);
                let dz = &mut out.z[at.clone()];
                gated_norm_gradient(isa, &z[at.clone()], &weights.norm, eps, &grad[at], read, dz, &mut out.norm);
            }
            let a = -libm::expf(weights.a_log[first_head + h]);
            let mut d_state = vec![0.0; size];
            let mut unread = vec![0.0; value_dim];
            states.back(|t, way| {
                let (q, k) = (&q[key(t)], &k[key(t)]);
                let (index, before, state) = match way {
                    Way::Again { index, before, after } => {
                        let (v, errors) = (&v_part.after[value(t, h)], &mut errors[of_errors(index)]);
                        return advance(isa, before, after, rates(h, t), q, k, v, &mut unread, errors);
                    }
                    Way::Back { index, before, after } => (index, before, after),
                };
                let ((beta, decay), errors) = (rates(h, t), &errors[of_errors(index)]);
                let d_read = &read[t * value_dim..(t + 1) * value_dim];
                let token = Token { before, state, beta, decay, q, k, errors, d_read };
                let (mut by_beta, mut by_decay) = (0.0, 0.0);
                let (dq, dk, dv) = (&mut dq[key(t)], &mut dk[key(t)], &mut dv[value(t, h)]);
                retreat(isa, &token, &mut d_state, dq, dk, dv, &mut by_beta, &mut by_decay);
                let at = t * own_heads + h;
                let input = raw_a[at] + weights.dt_bias[first_head + h];
                // α = exp(A · softplus), A = -exp(A_log).
                let exponent = by_decay * decay * a;
                out.a_log[h] += exponent * softplus(input);
                out.a[at] = exponent / (1.0 + libm::expf(-input));
                out.dt_bias[h] += out.a[at];
                out.b[at] = by_beta * beta * (1.0 - beta);
            });
        }
        unit_gradient(&q_part.after, key_dim, scale, &mut dq);
        unit_gradient(&k_part.after, key_dim, 1.0, &mut dk);
        out.parts = [q_part.gradient(dq), k_part.gradient(dk), v_part.gradient(dv)];
        out
    }
}

impl CustomOp1 for Scan {
    fn name(&self) -> &'static str {
        "gated delta net"
    }

    fn cpu_fwd(&self, _: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(self.out.take()), Shape::from((layout.dims()[0], self.shape().inner()))))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let DeltaNetShape { key_heads, value_heads, value_dim, kernel, .. } = *self.shape();
        let [z, a, b, width] = self.places();
        let own_heads = value_heads / key_heads;
        let sequences = sequences(&self.batch)?;
        let tasks: Vec<_> = sequences.iter().flat_map(|rows| (0..key_heads).map(move |h| (rows, h))).collect();
        let dx = host::with(x, |x| {
            host::with(grad, |grad| {
                let pieces: Vec<Piece> = tasks.par_iter().map(|(rows, h)| self.backward(x, grad, rows, *h)).collect();
                let mut dx = vec![0.0; x.len()];
                let i = &*self.mixer.0;
                // In order: the same for any number of threads.
                for ((rows, head), piece) in tasks.iter().zip(&pieces) {
                    for ((first, count), part) in self.channels(*head).into_iter().zip(&piece.parts) {
                        put(&mut dx, width, rows, first, count, &part.input);
                        add(&i.conv1d, first * kernel, &part.weight);
                    }
                    let first = head * own_heads;
                    put(&mut dx, width, rows, z + first * value_dim, own_heads * value_dim, &piece.z);
                    put(&mut dx, width, rows, a + first, own_heads, &piece.a);
                    put(&mut dx, width, rows, b + first, own_heads, &piece.b);
                    add(&i.a_log, first, &piece.a_log);
                    add(&i.dt_bias, first, &piece.dt_bias);
                    add(&i.norm, 0, &piece.norm);
                }
                Ok(dx)
            })
        })?;
        Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
    }
}

/// 1 / the length of x.
fn inverse_length(x: &[f32]) -> f32 {
    1.0 / (x.iter().map(|v| v * v).sum::<f32>() + EPS).sqrt()
}

/// Every run of `width` values at the length `scale`.
fn unit(x: &[f32], width: usize, scale: f32) -> Vec<f32> {
    let run = |x: &[f32]| {
        let factor = inverse_length(x) * scale;
        x.iter().map(move |v| v * factor).collect::<Vec<_>>()
    };
    x.chunks_exact(width).flat_map(run).collect()
}

/// Turns dL/d([`unit`] of x) into dL/dx.
fn unit_gradient(x: &[f32], width: usize, scale: f32, grad: &mut [f32]) {
    for (x, grad) in x.chunks_exact(width).zip(grad.chunks_exact_mut(width)) {
        let inverse = inverse_length(x);
        let along: f32 = x.iter().zip(&*grad).map(|(x, g)| x * g).sum::<f32>() * inverse * inverse;
        grad.iter_mut().zip(x).for_each(|(g, x)| *g = scale * inverse * (*g - x * along));
    }
}

multiversion! {
    /// `next` [value_dim, key_dim] of the state `now` after one token, what its query reads of it, and `errors`: what its
    /// value was off by before. `rates` are β and α.
    fn advance(
        now: &[f32],
        next: &mut [f32],
        rates: (f32, f32),
        q: &[f32],
        k: &[f32],
        v: &[f32],
        read: &mut [f32],
        errors: &mut [f32],
    ) {
        let (beta, decay) = rates;
        let width = k.len();
        let rows = now.chunks_exact(width).zip(next.chunks_exact_mut(width)).zip(v).zip(read.iter_mut().zip(errors));
        for (((now, next), v), (read, error)) in rows {
            let mut lanes = [0.0f32; LANES];
            let runs = next.chunks_mut(LANES).zip(now.chunks(LANES)).zip(k.chunks(LANES));
            for ((next, now), k) in runs {
                for l in 0..next.len() {
                    next[l] = now[l] * decay;
                    lanes[l] = next[l].mul_add(k[l], lanes[l]);
                }
            }
            *error = v - lanes.iter().sum::<f32>();
            let delta = beta * *error;
            let mut lanes = [0.0f32; LANES];
            let runs = next.chunks_mut(LANES).zip(k.chunks(LANES)).zip(q.chunks(LANES));
            for ((next, k), q) in runs {
                for l in 0..next.len() {
                    next[l] = k[l].mul_add(delta, next[l]);
                    lanes[l] = next[l].mul_add(q[l], lanes[l]);
                }
            }
            *read = lanes.iter().sum();
        }
    }
}

/// One token of one value head.
struct Token<'a> {
    /// States before and after it, [value_dim, key_dim].
    before: &'a [f32],
    state: &'a [f32],
    beta: f32,
    decay: f32,
    /// [key_dim].
    q: &'a [f32],
    k: &'a [f32],
    /// [value_dim].
    errors: &'a [f32],
    d_read: &'a [f32],
}

multiversion! {
    /// Takes dL/d(state after the token but for what its query reads) to that of the state before, and adds to what it
    /// depends on.
    fn retreat(
        t: &Token<'_>,
        d_state: &mut [f32],
        dq: &mut [f32],
        dk: &mut [f32],
        dv: &mut [f32],
        by_beta: &mut f32,
        by_decay: &mut f32,
    ) {
        let width = t.k.len();
        let mut along = [0.0f32; LANES];
        for (i, (error, grad)) in t.errors.iter().zip(t.d_read).enumerate() {
            let row = i * width..(i + 1) * width;
            let (before, state, d_state) = (&t.before[row.clone()], &t.state[row.clone()], &mut d_state[row]);
            let delta = t.beta * error;
            // S = α S + δ kᵀ, δ = β (v - α S k).
            let mut lanes = [0.0f32; LANES];
            let inputs = t.q.chunks(LANES).zip(t.k.chunks(LANES)).zip(dq.chunks_mut(LANES).zip(dk.chunks_mut(LANES)));
            for ((d, s), ((q, k), (dq, dk))) in d_state.chunks_mut(LANES).zip(state.chunks(LANES)).zip(inputs) {
                for l in 0..d.len() {
                    d[l] = grad.mul_add(q[l], d[l]);
                    dq[l] = grad.mul_add(s[l], dq[l]);
                    dk[l] = delta.mul_add(d[l], dk[l]);
                    lanes[l] = d[l].mul_add(k[l], lanes[l]);
                }
            }
            let d_delta: f32 = lanes.iter().sum();
            *by_beta += d_delta * error;
            let d_error = t.beta * d_delta;
            dv[i] += d_error;
            let inputs = t.k.chunks(LANES).zip(dk.chunks_mut(LANES));
            for ((d, s), (k, dk)) in d_state.chunks_mut(LANES).zip(before.chunks(LANES)).zip(inputs) {
                for l in 0..d.len() {
                    dk[l] -= d_error * t.decay * s[l];
                    let decayed = d[l] - d_error * k[l];
                    along[l] = decayed.mul_add(s[l], along[l]);
                    d[l] = t.decay * decayed;
                }
            }
        }
        *by_decay += along.iter().sum::<f32>();
    }
}

multiversion! {
    /// Of out = rms(o) · weight · silu(z) of one head of one token: `o` becomes dL/do.
    fn gated_norm_gradient(
        z: &[f32],
        weight: &[f32],
        eps: f32,
        grad: &[f32],
        o: &mut [f32],
        dz: &mut [f32],
        d_weight: &mut [f32],
    ) {
        let n = weight.len() as f32;
        let (mut square, mut along) = (0.0f32, 0.0f32);
        for (((o, z), g), w) in o.iter().zip(z).zip(grad).zip(weight) {
            square += o * o;
            along += o * g * w * silu(*z).0;
        }
        let inverse = 1.0 / (square / n + eps).sqrt();
        let pull = along * inverse * inverse * inverse / n;
        let values = o.iter_mut().zip(z).zip(grad.iter().zip(weight)).zip(dz.iter_mut().zip(d_weight));
        for (((o, z), (g, w)), (dz, dw)) in values {
            let (gate, slope) = silu(*z);
            *dw += g * gate * *o * inverse;
            *dz = g * w * *o * inverse * slope;
            *o = g * w * gate * inverse - *o * pull;
        }
    }
}
