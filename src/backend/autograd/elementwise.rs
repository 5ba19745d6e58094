//! Norm and activation function with their gradients, each one pass over memory.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::host;
use crate::backend::cpu::elementwise::{self, exp};
use crate::backend::cpu::isa::{Isa, multiversion};

/// Rows that one task takes at a time.
const ROWS: usize = 16;

/// x / √(mean x² + eps) · weight over each run of `weight`'s length.
pub(super) struct RmsNorm {
    pub eps: f32,
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms_norm"
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout, w: &CpuStorage, lw: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, w) = (host::values(x, lx)?, host::values(w, lw)?);
        let mut out = vec![0.0; x.len()];
        let rows = out.par_chunks_mut(ROWS * w.len()).zip(x.par_chunks(ROWS * w.len()));
        rows.for_each(|(out, x)| elementwise::rms_norm(Isa::detect(), x, w, self.eps, out));
        Ok((CpuStorage::F32(out), lx.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, w: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (dx, dw) = host::with(x, |x| {
            host::with(w, |w| {
                host::with(grad, |grad| {
                    let n = w.len();
                    let mut dx = vec![0.0; x.len()];
                    let chunks = dx.par_chunks_mut(ROWS * n).zip(x.par_chunks(ROWS * n)).zip(grad.par_chunks(ROWS * n));
                    // Partial sums of dw by chunk, added in order: the same for any number of threads.
                    let parts: Vec<Vec<f32>> = chunks
                        .map(|((dx, x), grad)| {
                            let mut dw = vec![0.0; n];
                            rms_norm_gradient(Isa::detect(), x, w, grad, self.eps, dx, &mut dw);
                            dw
                        })
                        .collect();
                    let mut dw = vec![0.0f32; n];
                    parts.iter().for_each(|part| dw.iter_mut().zip(part).for_each(|(d, p)| *d += p));
                    Ok((dx, dw))
                })
            })
        })?;
        let dx = Tensor::from_vec(dx, x.shape(), x.device())?;
        Ok((Some(dx), Some(Tensor::from_vec(dw, w.shape(), w.device())?)))
    }
}

multiversion! {
    fn rms_norm_gradient(x: &[f32], w: &[f32], grad: &[f32], eps: f32, dx: &mut [f32], dw: &mut [f32]) {
        let n = w.len();
        for ((x, g), dx) in x.chunks_exact(n).zip(grad.chunks_exact(n)).zip(dx.chunks_exact_mut(n)) {
            let mut square = [0.0f32; 16];
            let mut along = [0.0f32; 16];
            for ((x, g), w) in x.chunks(16).zip(g.chunks(16)).zip(w.chunks(16)) {
                for (i, ((x, g), w)) in x.iter().zip(g).zip(w).enumerate() {
                    square[i] += x * x;
                    along[i] += x * g * w;
                }
            }
            let mean = square.iter().sum::<f32>() / n as f32;
            let inverse = 1.0 / (mean + eps).sqrt();
            let pull = along.iter().sum::<f32>() * inverse * inverse * inverse / n as f32;
            for ((((dx, x), g), w), dw) in dx.iter_mut().zip(x).zip(g).zip(w).zip(dw.iter_mut()) {
                *dx = g * w * inverse - x * pull;
                *dw += g * x * inverse;
            }
        }
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
