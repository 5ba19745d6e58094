//! A backend whose results are rounded on the way, to BF16 as engines on GPUs keep them between their kernels: how far
//! valid computations of one model are apart.
//!
//! Values go over the host, which is slow: for experiments on some tokens.

use std::sync::Arc;

use super::{
    Activation, AttentionShape, Backend, Batch, CacheLayout, DeltaInputs, DeltaNetShape, DeltaNetWeights, Mamba2Shape,
    Mamba2Weights, Result, Rotation, Run, Span,
};
use crate::formats::linear::LinearTensors;
use crate::logits::{RouterRule, Routing, TokenScore};

/// How results are rounded: down below a quarter of a step, up above three quarters, and by chance in between.
///
/// Two roundings of other seeds are as far apart as two engines that round to the nearest, each in its own places.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rounding {
    /// Bits of the mantissa that are kept, the leading one not counted: 7 are BF16's, 10 those of f16.
    pub bits: u32,
    /// Chance comes of this and the value, so that a token's results are the same whatever else is in the batch.
    pub seed: u64,
}

impl Rounding {
    /// To BF16.
    #[must_use]
    pub const fn bf16(seed: u64) -> Self {
        Self { bits: 7, seed }
    }

    /// `value`, rounded; what is no number stays, and so do all that [`Rounding::bits`] can hold.
    #[must_use]
    pub fn of(self, value: f32) -> f32 {
        if !value.is_finite() || self.bits >= 23 {
            return value;
        }
        let bits = value.to_bits();
        let step = 1u32 << (23 - self.bits);
        let up = step / 4 + chance(self.seed, bits) % (step / 2).max(1);
        f32::from_bits((bits + up) & !(step - 1))
    }
}

/// Bits that are as good as drawn by chance.
fn chance(seed: u64, bits: u32) -> u32 {
    let mut x = seed.wrapping_mul(0xD6E8_FEB8_6659_FD93) ^ u64::from(bits);
    for _ in 0..2 {
        x = (x ^ (x >> 32)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    }
    (x >> 32) as u32
}

/// `inner` with results rounded.
pub struct Rounded<B> {
    inner: Arc<B>,
    rounding: Rounding,
}

/// A tensor, and how many rows it has.
#[derive(Clone)]
pub struct Rows<T> {
    inner: T,
    rows: usize,
}

impl<B: Backend> Rounded<B> {
    /// Rounds what a backend computes that others use too.
    pub fn shared(inner: Arc<B>, rounding: Rounding) -> Self {
        Self { inner, rounding }
    }

    /// A result of `rows` rows, rounded.
    fn result(&self, x: B::Tensor, rows: usize) -> Result<Rows<B::Tensor>> {
        let mut host = self.inner.to_host(&x)?;
        host.iter_mut().for_each(|v| *v = self.rounding.of(*v));
        let columns = host.len() / rows.max(1);
        Ok(Rows { inner: self.inner.tensor(host, columns)?, rows })
    }
}

impl<B: Backend> Backend for Rounded<B> {
    type Tensor = Rows<B::Tensor>;
    type Linear = B::Linear;
    type Vector = B::Vector;
    type Mamba = B::Mamba;
    type DeltaNet = B::DeltaNet;
    type Cache = B::Cache;
    type Rope = B::Rope;
    type Pass = B::Pass;

    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn load_linear(&self, tensors: LinearTensors<'_>) -> Result<B::Linear> {
        self.inner.load_linear(tensors)
    }

    fn inputs(&self, linear: &B::Linear) -> usize {
        self.inner.inputs(linear)
    }

    fn multiplies_integers(&self, linear: &B::Linear) -> bool {
        self.inner.multiplies_integers(linear)
    }

    fn resident_bytes(&self, linear: &B::Linear) -> usize {
        self.inner.resident_bytes(linear)
    }

    fn load_vector(&self, values: Vec<f32>) -> Result<B::Vector> {
        self.inner.load_vector(values)
    }

    fn load_mamba(&self, shape: Mamba2Shape, weights: Mamba2Weights) -> Result<B::Mamba> {
        self.inner.load_mamba(shape, weights)
    }

    fn load_delta_net(&self, shape: DeltaNetShape, weights: DeltaNetWeights) -> Result<B::DeltaNet> {
        self.inner.load_delta_net(shape, weights)
    }

    fn load_rope(&self, rotation: Rotation) -> Result<B::Rope> {
        self.inner.load_rope(rotation)
    }

    fn new_cache(&self, layout: &CacheLayout) -> Result<B::Cache> {
        self.inner.new_cache(layout)
    }

    fn grow(&self, cache: &mut B::Cache, pages: usize, slots: usize) -> Result<()> {
        self.inner.grow(cache, pages, slots)
    }

    fn copy_state(&self, cache: &mut B::Cache, from: u32, to: u32) -> Result<()> {
        self.inner.copy_state(cache, from, to)
    }

    fn fork(&self, cache: &mut B::Cache, from: &Span, to: &Span) -> Result<()> {
        self.inner.fork(cache, from, to)
    }

    fn prepare(&self, batch: &Batch, ropes: &[&B::Rope]) -> Result<B::Pass> {
        self.inner.prepare(batch, ropes)
    }

    fn embed(&self, table: &B::Linear, pass: &B::Pass) -> Result<Self::Tensor> {
        let embedded = self.inner.embed(table, pass)?;
        let rows = self.inner.to_host(&embedded)?.len() / self.inner.inputs(table).max(1);
        self.result(embedded, rows)
    }

    fn rms_norm(&self, x: &Self::Tensor, weight: &B::Vector, eps: f32) -> Result<Self::Tensor> {
        self.result(self.inner.rms_norm(&x.inner, weight, eps)?, x.rows)
    }

    fn linears(&self, x: &Self::Tensor, weights: &[&B::Linear]) -> Result<Vec<Self::Tensor>> {
        let outputs = self.inner.linears(&x.inner, weights)?;
        outputs.into_iter().map(|y| self.result(y, x.rows)).collect()
    }

    fn attention(
        &self,
        q: Self::Tensor,
        k: Self::Tensor,
        v: Self::Tensor,
        sinks: Option<&B::Vector>,
        shape: &AttentionShape,
        pass: &B::Pass,
        cache: &mut B::Cache,
    ) -> Result<Self::Tensor> {
        self.result(self.inner.attention(q.inner, k.inner, v.inner, sinks, shape, pass, cache)?, q.rows)
    }

    fn rotated(&self, k: &Self::Tensor, shape: &AttentionShape, pass: &B::Pass) -> Result<Vec<f32>> {
        self.inner.rotated(&k.inner, shape, pass)
    }

    fn add(&self, x: Self::Tensor, y: &Self::Tensor) -> Result<Self::Tensor> {
        self.result(self.inner.add(x.inner, &y.inner)?, x.rows)
    }

    fn silu_mul(&self, gate: Self::Tensor, up: &Self::Tensor) -> Result<Self::Tensor> {
        self.result(self.inner.silu_mul(gate.inner, &up.inner)?, gate.rows)
    }

    fn route(&self, logits: &Self::Tensor, rule: &RouterRule) -> Result<Vec<Routing>> {
        self.inner.route(&logits.inner, rule)
    }

    fn activate(&self, x: Self::Tensor, up: Option<&Self::Tensor>, activation: Activation) -> Result<Self::Tensor> {
        self.result(self.inner.activate(x.inner, up.map(|u| &u.inner), activation)?, x.rows)
    }

    fn gate(&self, x: Self::Tensor, gate: &Self::Tensor) -> Result<Self::Tensor> {
        self.result(self.inner.gate(x.inner, &gate.inner)?, x.rows)
    }

    fn scale(&self, x: Self::Tensor, factor: f32) -> Result<Self::Tensor> {
        self.result(self.inner.scale(x.inner, factor)?, x.rows)
    }

    fn rearrange(&self, sources: &[&Self::Tensor], runs: &[Run]) -> Result<Self::Tensor> {
        let rows = sources.first().map_or(0, |s| s.rows);
        let sources: Vec<&B::Tensor> = sources.iter().map(|s| &s.inner).collect();
        Ok(Rows { inner: self.inner.rearrange(&sources, runs)?, rows })
    }

    fn mamba(
        &self,
        x: Self::Tensor,
        mixer: &B::Mamba,
        layer: usize,
        pass: &B::Pass,
        cache: &mut B::Cache,
    ) -> Result<Self::Tensor> {
        self.result(self.inner.mamba(x.inner, mixer, layer, pass, cache)?, x.rows)
    }

    fn delta_net(
        &self,
        inputs: DeltaInputs<Self::Tensor>,
        mixer: &B::DeltaNet,
        layer: usize,
        pass: &B::Pass,
        cache: &mut B::Cache,
    ) -> Result<Self::Tensor> {
        let DeltaInputs { qkv, z, b, a } = inputs;
        let rows = qkv.rows;
        let inputs = DeltaInputs { qkv: qkv.inner, z: z.inner, b: b.inner, a: a.inner };
        self.result(self.inner.delta_net(inputs, mixer, layer, pass, cache)?, rows)
    }

    fn select_rows(&self, x: &Self::Tensor, rows: &[usize]) -> Result<Self::Tensor> {
        Ok(Rows { inner: self.inner.select_rows(&x.inner, rows)?, rows: rows.len() })
    }

    fn add_rows(&self, sum: Self::Tensor, y: &Self::Tensor, rows: &[usize], weights: &[f32]) -> Result<Self::Tensor> {
        self.result(self.inner.add_rows(sum.inner, &y.inner, rows, weights)?, sum.rows)
    }

    fn zeros_like(&self, x: &Self::Tensor) -> Result<Self::Tensor> {
        Ok(Rows { inner: self.inner.zeros_like(&x.inner)?, rows: x.rows })
    }

    fn score(&self, logits: &Self::Tensor, picks: &[(usize, u32)]) -> Result<Vec<TokenScore>> {
        self.inner.score(&logits.inner, picks)
    }

    fn tensor(&self, data: Vec<f32>, columns: usize) -> Result<Self::Tensor> {
        let rows = data.len() / columns.max(1);
        Ok(Rows { inner: self.inner.tensor(data, columns)?, rows })
    }

    fn to_host(&self, x: &Self::Tensor) -> Result<Vec<f32>> {
        self.inner.to_host(&x.inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::{CpuBackend, isa::Isa};

    #[test]
    fn results_are_rounded_and_keep_their_shape() {
        let rounding = Rounding::bf16(1);
        let rounded = Rounded::shared(Arc::new(CpuBackend::new(Isa::detect(), 1).unwrap()), rounding);
        let x = rounded.tensor(vec![1.0, 2.0, 3.003, -4.0, 0.1, 1e-3], 3).unwrap();
        let sum = rounded.add(x.clone(), &x).unwrap();
        let host = rounded.to_host(&sum).unwrap();
        assert_eq!(sum.rows, 2);
        assert_eq!(host, [2.0f32, 4.0, 6.006, -8.0, 0.2, 2e-3].map(|v| rounding.of(v)));
        assert_ne!(host[2], 6.006);
        assert_eq!(rounded.select_rows(&sum, &[1]).unwrap().rows, 1);
    }

    #[test]
    fn seeds_are_as_far_apart_as_engines_that_round_to_the_nearest() {
        let step = 2.0f32.powi(-7);
        let values: Vec<f32> = (0..20_000).map(|i| 1.0 + i as f32 / 20_000.0).collect();
        let square = |of: &dyn Fn(f32) -> f32| {
            values.iter().map(|v| f64::from(of(*v) / step).powi(2)).sum::<f64>() / values.len() as f64
        };
        let (one, other) = (Rounding::bf16(1), Rounding::bf16(2));
        // To the nearest, the mean square of an error is a twelfth of a step's: two that are independent are twice that apart.
        let apart = square(&|v| one.of(v) - other.of(v));
        assert!((apart - 1.0 / 6.0).abs() < 0.01, "{apart}");
        let mean: f64 = values.iter().map(|v| f64::from((one.of(*v) - v) / step)).sum::<f64>() / values.len() as f64;
        assert!(mean.abs() < 0.01, "{mean}");
        for v in [0.0, -0.0, 1.5, f32::INFINITY, f32::NAN, f32::MIN_POSITIVE, -1e-42] {
            let (rounded, exact) = (one.of(v), half::bf16::from_f32(v).to_f32());
            let holds = rounded.to_bits() == v.to_bits() || exact != v && (rounded - v).abs() <= v.abs();
            assert!(holds, "{v}: {rounded}");
        }
        assert_eq!((Rounding { bits: 23, seed: 1 }).of(1.000_000_1), 1.000_000_1);
        assert!((one.of(-3.003) + 3.003).abs() < 2.0 * step && one.of(f32::MAX) >= f32::MAX / 1.01);
    }
}
