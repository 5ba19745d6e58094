//! Sum, activation functions and gates with their gradients, each one pass over memory.

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::host;
use crate::backend::Activation;
use crate::backend::cpu::elementwise::{self, exp};
use crate::backend::cpu::isa::{Isa, multiversion};

/// x + y.
pub(super) struct Add;

impl CustomOp2 for Add {
    fn name(&self) -> &'static str {
        "add"
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout, y: &CpuStorage, ly: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, y) = (host::values(x, lx)?, host::values(y, ly)?);
        let mut out = x.to_vec();
        let chunks = out.par_chunks_mut(CHUNK).zip(y.par_chunks(CHUNK));
        chunks.for_each(|(out, y)| out.iter_mut().zip(y).for_each(|(x, y)| *x += y));
        Ok((CpuStorage::F32(out), lx.shape().clone()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((Some(grad.clone()), Some(grad.clone())))
    }
}

/// Values that one task takes at a time.
const CHUNK: usize = 1 << 13;

/// activation(gate, up) of one that has a gate.
pub(super) struct Gated(pub(super) Activation);

impl Gated {
    fn apply(&self, gate: &mut [f32], up: &[f32]) {
        match self.0 {
            Activation::GeluTanh => elementwise::gelu_tanh_mul(Isa::detect(), gate, up),
            Activation::ClampedSwiglu { limit } => elementwise::clamped_swiglu(Isa::detect(), gate, up, limit),
            Activation::Silu | Activation::Relu2 => elementwise::silu_mul(Isa::detect(), gate, up),
        }
    }

    fn gradient(&self, gate: &[f32], up: &[f32], grad: &[f32], d_gate: &mut [f32], d_up: &mut [f32]) {
        let isa = Isa::detect();
        match self.0 {
            Activation::GeluTanh => gelu_tanh_mul_gradient(isa, gate, up, grad, d_gate, d_up),
            Activation::ClampedSwiglu { limit } => clamped_swiglu_gradient(isa, gate, up, limit, grad, d_gate, d_up),
            Activation::Silu | Activation::Relu2 => silu_mul_gradient(isa, gate, up, grad, d_gate, d_up),
        }
    }
}

impl CustomOp2 for Gated {
    fn name(&self) -> &'static str {
        "gated activation"
    }

    fn cpu_fwd(&self, gate: &CpuStorage, lg: &Layout, up: &CpuStorage, lu: &Layout) -> Result<(CpuStorage, Shape)> {
        let (gate, up) = (host::values(gate, lg)?, host::values(up, lu)?);
        let mut out = gate.to_vec();
        out.par_chunks_mut(CHUNK).zip(up.par_chunks(CHUNK)).for_each(|(out, up)| self.apply(out, up));
        Ok((CpuStorage::F32(out), lg.shape().clone()))
    }

    fn bwd(&self, gate: &Tensor, up: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (d_gate, d_up) = host::with(gate, |gate| {
            host::with(up, |up| {
                host::with(grad, |grad| {
                    let (mut d_gate, mut d_up) = (vec![0.0; gate.len()], vec![0.0; gate.len()]);
                    d_gate
                        .par_chunks_mut(CHUNK)
                        .zip(d_up.par_chunks_mut(CHUNK))
                        .zip(gate.par_chunks(CHUNK).zip(up.par_chunks(CHUNK)))
                        .zip(grad.par_chunks(CHUNK))
                        .for_each(|(((d_gate, d_up), (gate, up)), grad)| self.gradient(gate, up, grad, d_gate, d_up));
                    Ok((d_gate, d_up))
                })
            })
        })?;
        let tensor = |v| Tensor::from_vec(v, gate.shape(), gate.device());
        Ok((Some(tensor(d_gate)?), Some(tensor(d_up)?)))
    }
}

/// max(x, 0)².
pub(super) struct Relu2;

impl CustomOp1 for Relu2 {
    fn name(&self) -> &'static str {
        "relu2"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let mut out = host::values(x, layout)?.to_vec();
        out.par_chunks_mut(CHUNK).for_each(|out| elementwise::relu2(Isa::detect(), out));
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let dx = host::with(x, |x| {
            host::with(grad, |grad| {
                let mut dx = x.to_vec();
                let chunks = dx.par_chunks_mut(CHUNK).zip(grad.par_chunks(CHUNK));
                chunks.for_each(|(dx, grad)| dx.iter_mut().zip(grad).for_each(|(d, g)| *d = 2.0 * d.max(0.0) * g));
                Ok(dx)
            })
        })?;
        Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
    }
}

/// x · sigmoid(gate): x [rows, columns], gate the same or [rows, 1].
pub(super) struct Gate;

impl CustomOp2 for Gate {
    fn name(&self) -> &'static str {
        "gate"
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout, gate: &CpuStorage, lg: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, gate) = (host::values(x, lx)?, host::values(gate, lg)?);
        let mut out = x.to_vec();
        if gate.len() == x.len() {
            let chunks = out.par_chunks_mut(CHUNK).zip(gate.par_chunks(CHUNK));
            chunks.for_each(|(out, gate)| elementwise::sigmoid_mul(Isa::detect(), out, gate));
        } else {
            let columns = lx.dims().last().copied().unwrap_or(1).max(1);
            elementwise::sigmoid_mul_rows(Isa::detect(), &mut out, gate, columns);
        }
        Ok((CpuStorage::F32(out), lx.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, gate: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (dx, d_gate) = host::with(x, |x| {
            host::with(gate, |gate| {
                host::with(grad, |grad| {
                    let columns = (x.len() / gate.len().max(1)).max(1);
                    let (mut dx, mut d_gate) = (vec![0.0; x.len()], vec![0.0; gate.len()]);
                    dx.par_chunks_mut(CHUNK * columns)
                        .zip(d_gate.par_chunks_mut(CHUNK))
                        .zip(x.par_chunks(CHUNK * columns).zip(gate.par_chunks(CHUNK)))
                        .zip(grad.par_chunks(CHUNK * columns))
                        .for_each(|(((dx, d_gate), (x, gate)), grad)| {
                            gate_gradient(Isa::detect(), x, gate, columns, grad, dx, d_gate);
                        });
                    Ok((dx, d_gate))
                })
            })
        })?;
        let tensor = |v, like: &Tensor| Tensor::from_vec(v, like.shape(), like.device());
        Ok((Some(tensor(dx, x)?), Some(tensor(d_gate, gate)?)))
    }
}

multiversion! {
    /// Of x · sigmoid(gate), each gate that of `columns` values.
    fn gate_gradient(x: &[f32], gate: &[f32], columns: usize, grad: &[f32], dx: &mut [f32], d_gate: &mut [f32]) {
        let rows = x.chunks_exact(columns).zip(grad.chunks_exact(columns)).zip(dx.chunks_exact_mut(columns));
        for (((x, grad), dx), (gate, d_gate)) in rows.zip(gate.iter().zip(d_gate)) {
            let sigmoid = 1.0 / (1.0 + exp(-*gate));
            let mut along = 0.0;
            for ((x, g), dx) in x.iter().zip(grad).zip(dx) {
                along += g * x;
                *dx = g * sigmoid;
            }
            *d_gate = along * sigmoid * (1.0 - sigmoid);
        }
    }
}

multiversion! {
    fn silu_mul_gradient(gate: &[f32], up: &[f32], grad: &[f32], d_gate: &mut [f32], d_up: &mut [f32]) {
        let values = gate.iter().zip(up).zip(grad);
        for (((g, u), grad), (d_gate, d_up)) in values.zip(d_gate.iter_mut().zip(d_up)) {
            let sigmoid = 1.0 / (1.0 + exp(-g));
            *d_up = grad * g * sigmoid;
            *d_gate = grad * u * sigmoid * (1.0 + g * (1.0 - sigmoid));
        }
    }
}

multiversion! {
    /// gelu(x) = x · sigmoid(2y), y = √(2/π) · (x + 0.044715 x³).
    fn gelu_tanh_mul_gradient(gate: &[f32], up: &[f32], grad: &[f32], d_gate: &mut [f32], d_up: &mut [f32]) {
        const TWICE: f32 = 1.595_769;
        let values = gate.iter().zip(up).zip(grad);
        for (((g, u), grad), (d_gate, d_up)) in values.zip(d_gate.iter_mut().zip(d_up)) {
            let sigmoid = 1.0 / (1.0 + exp(-TWICE * (0.044_715 * g * g * g + g)));
            let slope = TWICE * (3.0 * 0.044_715 * g * g + 1.0);
            *d_up = grad * g * sigmoid;
            *d_gate = grad * u * sigmoid * (1.0 + g * slope * (1.0 - sigmoid));
        }
    }
}

multiversion! {
    /// Nothing where a value is clamped.
    fn clamped_swiglu_gradient(
        gate: &[f32], up: &[f32], limit: f32, grad: &[f32], d_gate: &mut [f32], d_up: &mut [f32]
    ) {
        const ALPHA: f32 = 1.702;
        let values = gate.iter().zip(up).zip(grad);
        for (((gate, up), grad), (d_gate, d_up)) in values.zip(d_gate.iter_mut().zip(d_up)) {
            let (g, u) = (gate.min(limit), up.clamp(-limit, limit));
            let sigmoid = 1.0 / (1.0 + exp(-ALPHA * g));
            let slope = sigmoid * (1.0 + ALPHA * g * (1.0 - sigmoid));
            *d_up = if *up == u { grad * g * sigmoid } else { 0.0 };
            *d_gate = if *gate == g { grad * (u + 1.0) * slope } else { 0.0 };
        }
    }
}
