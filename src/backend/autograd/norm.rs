//! RMS norm with its gradients, each one pass over memory.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::host;
use crate::backend::cpu::elementwise;
use crate::backend::cpu::isa::{Isa, multiversion};

/// The weight of a norm, [features]; or other numbers that are no matrix: sinks, a mixer's own. Clones share it.
#[derive(Clone, Debug)]
pub struct Norm(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    weight: RwLock<Arc<Vec<f32>>>,
    /// dL/dw summed since [`Norm::train`]; `None` while the weight is not trained.
    gradient: Mutex<Option<Vec<f32>>>,
}

impl Norm {
    pub(super) fn new(weight: Vec<f32>) -> Self {
        Self(Arc::new(Inner { weight: RwLock::new(Arc::new(weight)), gradient: Mutex::new(None) }))
    }

    /// The weight.
    #[must_use]
    pub fn weight(&self) -> Arc<Vec<f32>> {
        self.0.weight.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Puts another weight in.
    pub fn set(&self, weight: Vec<f32>) {
        *self.0.weight.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(weight);
    }

    /// Sums the weight's gradient from now on, starting at zero.
    pub fn train(&self) {
        *self.gradient() = Some(vec![0.0; self.weight().len()]);
    }

    /// Sums no gradient any more.
    pub fn freeze(&self) {
        *self.gradient() = None;
    }

    /// The summed gradient, `None` if the weight is not trained.
    pub fn gradient(&self) -> MutexGuard<'_, Option<Vec<f32>>> {
        self.0.gradient.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// x / √(mean x² + eps) · weight over each run of the weight's length.
pub(super) fn rms_norm(x: &Tensor, norm: &Norm, eps: f32) -> Result<Tensor> {
    x.contiguous()?.apply_op1(RmsNorm { weight: norm.weight(), norm: norm.clone(), eps })
}

/// Rows that one task takes at a time.
const ROWS: usize = 16;

struct RmsNorm {
    norm: Norm,
    weight: Arc<Vec<f32>>,
    eps: f32,
}

impl CustomOp1 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms_norm"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, w) = (host::values(x, layout)?, &self.weight);
        let mut out = vec![0.0; x.len()];
        let rows = out.par_chunks_mut(ROWS * w.len()).zip(x.par_chunks(ROWS * w.len()));
        rows.for_each(|(out, x)| elementwise::rms_norm(Isa::detect(), x, w, self.eps, out));
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (w, n) = (&self.weight, self.weight.len());
        let dx = host::with(x, |x| {
            host::with(grad, |grad| {
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
                if let Some(sum) = self.norm.gradient().as_mut() {
                    parts.iter().for_each(|part| sum.iter_mut().zip(part).for_each(|(d, p)| *d += p));
                }
                Ok(dx)
            })
        })?;
        Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
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
