//! A linear layer with the deployed numerics and straight-through gradients.

use std::borrow::Cow;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::host;
use super::multiplier::{Factor, Multiplier};
use super::operand::{Operand, Precision, Scaling, WeightGrid, quantize_input};
use crate::formats::linear::{ActivationFormat, LinearTensors, OutputScale};
use crate::formats::{e4m3, nvfp4};

/// A linear layer: y = quantized(x · pre_quant_scale) · Wᵀ + bias. Clones share the weight.
#[derive(Clone, Debug)]
pub struct Linear(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    name: String,
    grid: RwLock<Arc<WeightGrid>>,
    n: usize,
    k: usize,
    precision: Precision,
    multiplier: Multiplier,
    /// [N, K]
    weight: RwLock<Arc<Factor>>,
    /// What is not in `weight`.
    scale: OutputScale,
    /// [N]
    bias: Option<Vec<f32>>,
    /// [K]
    pre_quant_scale: Option<Vec<f32>>,
    activation: ActivationFormat,
    /// dL/dW [N, K] summed since [`Linear::train`]; `None` while the weight is not trained.
    gradient: Mutex<Option<Vec<f32>>>,
}

impl Linear {
    pub(super) fn new(tensors: LinearTensors<'_>, precision: Precision, multiplier: Multiplier) -> Self {
        let grid = WeightGrid::of(&tensors);
        let weight = Factor::new(grid.operand(precision, &tensors.decode()), grid.n, grid.k);
        Self(Arc::new(Inner {
            scale: grid.outer_scale(precision),
            weight: RwLock::new(Arc::new(weight)),
            n: grid.n,
            k: grid.k,
            grid: RwLock::new(Arc::new(grid)),
            precision,
            multiplier,
            name: tensors.name,
            bias: tensors.bias,
            pre_quant_scale: tensors.pre_quant_scale,
            activation: tensors.activation,
            gradient: Mutex::new(None),
        }))
    }

    /// The module that it is.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Output features.
    #[must_use]
    pub fn n(&self) -> usize {
        self.0.n
    }

    /// Input features.
    #[must_use]
    pub fn k(&self) -> usize {
        self.0.k
    }

    /// The values its weight can take.
    #[must_use]
    pub fn grid(&self) -> Arc<WeightGrid> {
        self.0.grid.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Puts the values of the grid nearest to `master` [N, K] in, and moves `master` within reach of them.
    pub fn set(&self, master: &mut [f32]) {
        let grid = self.grid();
        grid.move_into_reach(master);
        self.put(grid.operand(self.0.precision, master));
    }

    /// Puts other block scales [N, ⌈K/block⌉] in, rounded to E4M3, and the values nearest to `master` under them. Where
    /// weights are not divided by those, `master` is moved within reach of what they are divided by.
    pub fn set_scaled(&self, master: &mut [f32], scales: impl Iterator<Item = f32>) {
        let grid = Arc::new(self.grid().with_block_scales(scales));
        if grid.has_frozen_divisors() {
            grid.move_into_reach(master);
        }
        self.put(grid.operand(self.0.precision, master));
        *self.0.grid.write().unwrap_or_else(PoisonError::into_inner) = grid;
    }

    /// From now on weights are divided by the block scales that it has now, whatever scales it is given.
    pub fn freeze_divisors(&self) {
        let grid = Arc::new(self.grid().with_frozen_divisors());
        *self.0.grid.write().unwrap_or_else(PoisonError::into_inner) = grid;
    }

    /// Puts `values` [N, K] in as they are, on the grid or not.
    pub fn set_values(&self, mut values: Vec<f32>) {
        let (n, k) = (self.n(), self.k());
        assert_eq!(values.len(), n * k, "weights of a linear");
        values.par_chunks_mut(k).enumerate().for_each(|(row, values)| {
            let inverse = 1.0 / self.0.scale.at(row);
            values.iter_mut().for_each(|v| *v *= inverse);
        });
        self.put(Operand::new(self.0.precision, &values));
    }

    fn put(&self, weight: Operand) {
        let weight = Factor::new(weight, self.0.n, self.0.k);
        *self.0.weight.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(weight);
    }

    /// Row `row` of the weight as it takes part in products, in f32.
    #[must_use]
    pub fn weight_row(&self, row: usize) -> Vec<f32> {
        let mut values = self.weight().row(row);
        let scale = self.0.scale.at(row);
        values.iter_mut().for_each(|v| *v *= scale);
        values
    }

    /// Sums the weight's gradient from now on, starting at zero.
    pub fn train(&self) {
        *self.gradient() = Some(vec![0.0; self.0.n * self.0.k]);
    }

    /// Sums no gradient any more.
    pub fn freeze(&self) {
        *self.gradient() = None;
    }

    /// The summed gradient [N, K], `None` if the weight is not trained.
    pub fn gradient(&self) -> MutexGuard<'_, Option<Vec<f32>>> {
        self.0.gradient.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds the gradient of looking rows `tokens` up: dL/dx [tokens, K], if the weight is trained.
    pub fn add_row_gradient(&self, tokens: &[u32], grad: &[f32]) {
        let k = self.0.k;
        if let Some(sum) = self.gradient().as_mut() {
            for (token, grad) in tokens.iter().zip(grad.chunks_exact(k)) {
                let row = &mut sum[*token as usize * k..][..k];
                row.iter_mut().zip(grad).for_each(|(s, g)| *s += g);
            }
        }
    }

    fn weight(&self) -> Arc<Factor> {
        self.0.weight.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether it sees the same quantized input as `other`.
    pub(super) fn same_input(&self, other: &Self) -> bool {
        self.0.activation == other.0.activation && self.0.pre_quant_scale == other.0.pre_quant_scale
    }

    /// x [T, K] as its kernel sees it when deployed.
    pub(super) fn quantize(&self, x: &Tensor) -> Result<Arc<Input>> {
        host::with(x, |x| Ok(Arc::new(self.quantize_values(x))))
    }

    pub(super) fn quantize_values(&self, x: &[f32]) -> Input {
        let (k, format) = (self.0.k, self.0.activation);
        let rows = x.len() / k;
        let (values, scale) = match &self.0.pre_quant_scale {
            None => quantize_input(self.0.precision, format, x, k),
            Some(s) => {
                let mut x = x.to_vec();
                x.par_chunks_mut(k).for_each(|row| row.iter_mut().zip(s).for_each(|(x, s)| *x *= s));
                quantize_input(self.0.precision, format, &x, k)
            }
        };
        Input { values: Factor::new(values, rows, k), scale }
    }

    /// `input` is `x` by [`Self::quantize`].
    pub(super) fn forward(&self, x: &Tensor, input: Arc<Input>) -> Result<Tensor> {
        x.contiguous()?.apply_op1(Multiply { linear: self.clone(), input })
    }

    /// y [T, N] for an input, without a graph.
    pub(super) fn multiply(&self, input: &Input) -> Result<Vec<f32>> {
        let n = self.0.n;
        let (rows, columns) = (Scaling::Rows(&input.scale), Scaling::Columns(&self.0.scale));
        let alpha = rows.scalar().unwrap_or(1.0) * columns.scalar().unwrap_or(1.0);
        let mut y = self.0.multiplier.product(alpha, input.values.as_it_is(), self.weight().transposed())?;
        for scaling in [rows, columns].into_iter().filter(|s| s.scalar().is_none()) {
            scaling.apply(&mut y, n);
        }
        if let Some(bias) = &self.0.bias {
            y.par_chunks_mut(n).for_each(|row| row.iter_mut().zip(bias).for_each(|(y, b)| *y += b));
        }
        Ok(y)
    }

    /// dL/d(quantized x) [T, K] of dL/dy [T, N]; dL/dW is added to the sum, if the weight is trained.
    pub(super) fn backward(&self, grad: &[f32], input: &Input) -> Result<Vec<f32>> {
        let Inner { n, precision, ref multiplier, .. } = *self.0;
        let rows = grad.len() / n;
        let (by_row, by_column) = (Scaling::Rows(&input.scale), Scaling::Columns(&self.0.scale));
        // Gradients are rounded once, and multiplied by what is one number in the product.
        let shared = (by_row.scalar().is_some() || by_column.scalar().is_some())
            .then(|| Factor::new(Operand::new(precision, grad), rows, n));
        let factor = |scaling: &Scaling<'_>| match &shared {
            Some(shared) if scaling.scalar().is_some() => Cow::Borrowed(shared),
            _ => Cow::Owned(Factor::new(Operand::scaled(precision, grad, n, scaling), rows, n)),
        };
        if let Some(sum) = self.gradient().as_mut() {
            let (alpha, grad) = (by_row.scalar().unwrap_or(1.0), factor(&by_row));
            multiplier.add_product(sum, alpha, grad.transposed(), input.values.as_it_is())?;
        }
        let (alpha, grad) = (by_column.scalar().unwrap_or(1.0), factor(&by_column));
        multiplier.product(alpha, grad.as_it_is(), self.weight().as_it_is())
    }

    /// Turns dL/d(quantized x) into dL/dx: straight through, but nothing where |x| exceeds what the calibrated scale
    /// reaches (ModelOpt's rule).
    pub(super) fn straight_through(&self, x: &[f32], dx: &mut [f32]) {
        let reach = match self.0.activation {
            ActivationFormat::Nvfp4 { global_scale } => nvfp4::RANGE * global_scale,
            ActivationFormat::Fp8Static { scale } => e4m3::MAX * scale,
            // Scales that follow x reach all of it.
            _ => f32::INFINITY,
        };
        let k = self.0.k;
        let pre = self.0.pre_quant_scale.as_deref();
        dx.par_chunks_mut(k).zip(x.par_chunks(k)).for_each(|(dx, x)| match pre {
            None => dx.iter_mut().zip(x).for_each(|(d, x)| *d = if x.abs() <= reach { *d } else { 0.0 }),
            Some(pre) => {
                for ((d, x), s) in dx.iter_mut().zip(x).zip(pre) {
                    *d = if (x * s).abs() <= reach { *d * s } else { 0.0 };
                }
            }
        });
    }
}

/// A quantized input, shared by the linears that read it.
#[derive(Debug)]
pub(super) struct Input {
    /// [T, K]
    values: Factor,
    scale: OutputScale,
}

struct Multiply {
    linear: Linear,
    input: Arc<Input>,
}

impl CustomOp1 for Multiply {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(&self, _: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let y = self.linear.multiply(&self.input)?;
        let mut shape = layout.dims().to_vec();
        if let Some(last) = shape.last_mut() {
            *last = self.linear.n();
        }
        Ok((CpuStorage::F32(y), shape.into()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let dx = host::with(grad, |grad| {
            let mut dx = self.linear.backward(grad, &self.input)?;
            host::with(x, |x| {
                self.linear.straight_through(x, &mut dx);
                Ok(())
            })?;
            Ok(dx)
        })?;
        Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
    }
}
