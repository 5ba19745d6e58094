//! Sum and activation function with their gradients, each one pass over memory.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::host;
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

/// silu(gate) · up.
pub(super) struct SiluMul;

/// Values that one task takes at a time.
const CHUNK: usize = 1 << 13;

impl CustomOp2 for SiluMul {
    fn name(&self) -> &'static str {
        "silu_mul"
    }

    fn cpu_fwd(&self, gate: &CpuStorage, lg: &Layout, up: &CpuStorage, lu: &Layout) -> Result<(CpuStorage, Shape)> {
        let (gate, up) = (host::values(gate, lg)?, host::values(up, lu)?);
        let mut out = gate.to_vec();
        let chunks = out.par_chunks_mut(CHUNK).zip(up.par_chunks(CHUNK));
        chunks.for_each(|(out, up)| elementwise::silu_mul(Isa::detect(), out, up));
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
                        .for_each(|(((d_gate, d_up), (gate, up)), grad)| {
                            silu_mul_gradient(Isa::detect(), gate, up, grad, d_gate, d_up);
                        });
                    Ok((d_gate, d_up))
                })
            })
        })?;
        let tensor = |v| Tensor::from_vec(v, gate.shape(), gate.device());
        Ok((Some(tensor(d_gate)?), Some(tensor(d_up)?)))
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
