//! A backend that shows every linear's input to an observer on the way: calibration, per-layer checks.
//!
//! Operations that are made of others run as these, so that everything is seen.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use recoup_ground::divergence::{Pair, RowError};

use super::{
    Activation, AttentionShape, Backend, Batch, CacheLayout, DeltaInputs, DeltaNetShape, DeltaNetWeights, Mamba2Shape,
    Mamba2Weights, Named, Result, Rotation, Run, Span,
};
use crate::formats::linear::LinearTensors;
use crate::logits::{Draw, RouterRule, Routing, Sampled, SamplingError, Scratch, TokenScore};

/// What is shown on the way.
pub trait Observer {
    /// One linear's module name and its input, [tokens, K] row-major, before any quantization.
    fn input(&mut self, module: &str, x: &[f32]);

    /// Whether [`Self::cached`] is to be called.
    fn wants_cached(&self) -> bool {
        false
    }

    /// Whether [`Self::output`] and [`Self::attended`] are to be called.
    fn wants_outputs(&self) -> bool {
        false
    }

    /// What a linear or the embedding gives, [tokens, N] row-major.
    fn output(&mut self, _module: &str, _y: &[f32]) {}

    /// What a layer's attention gives, before its output projection, [tokens, heads · head_dim] row-major.
    fn attended(&mut self, _layer: usize, _y: &[f32]) {}

    /// A layer's keys (after RoPE) and values, [tokens, heads · head_dim] row-major, before the cache stores them.
    fn cached(&mut self, _layer: usize, _keys: &[f32], _values: &[f32]) {}
}

impl<F: FnMut(&str, &[f32])> Observer for F {
    fn input(&mut self, module: &str, x: &[f32]) {
        self(module, x);
    }
}

/// One that others hold too, to ask it afterwards what it saw.
impl<O: Observer> Observer for Arc<Mutex<O>> {
    fn input(&mut self, module: &str, x: &[f32]) {
        held(self).input(module, x);
    }

    fn wants_cached(&self) -> bool {
        held(self).wants_cached()
    }

    fn wants_outputs(&self) -> bool {
        held(self).wants_outputs()
    }

    fn output(&mut self, module: &str, y: &[f32]) {
        held(self).output(module, y);
    }

    fn attended(&mut self, layer: usize, y: &[f32]) {
        held(self).attended(layer, y);
    }

    fn cached(&mut self, layer: usize, keys: &[f32], values: &[f32]) {
        held(self).cached(layer, keys, values);
    }
}

/// What others hold too; one that panicked in between has left it whole.
pub fn held<T: ?Sized>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Finds the first module that does not compute finite numbers.
#[derive(Default)]
pub struct FirstBroken(Option<(String, f32)>);

impl FirstBroken {
    /// Where the numbers end, "what comes out of `model.layers.2.mlp.down_proj`", and the first value that is none.
    #[must_use]
    pub fn found(&self) -> Option<(String, f32)> {
        self.0.clone()
    }

    fn look(&mut self, side: &str, module: &str, values: &[f32]) {
        if self.0.is_none()
            && let Some(value) = values.iter().find(|v| !v.is_finite())
        {
            self.0 = Some((format!("what {side} {module}"), *value));
        }
    }
}

impl Observer for FirstBroken {
    fn input(&mut self, module: &str, x: &[f32]) {
        self.look("enters", &format!("`{module}`"), x);
    }

    fn wants_outputs(&self) -> bool {
        true
    }

    fn output(&mut self, module: &str, y: &[f32]) {
        self.look("comes out of", &format!("`{module}`"), y);
    }

    fn attended(&mut self, layer: usize, y: &[f32]) {
        self.look("comes out of", &format!("the attention of layer {layer}"), y);
    }
}

/// `inner` with an observer: any, behind one type, since whatever is generic over backends is compiled again for each.
pub struct Observed<B> {
    inner: Arc<B>,
    observer: Mutex<Box<dyn Observer + Send>>,
}

impl<B> Observed<B> {
    /// Wraps `inner`.
    pub fn new(inner: B, observer: impl Observer + Send + 'static) -> Self {
        Self::shared(Arc::new(inner), Box::new(observer))
    }

    /// Wraps a backend that others use too.
    pub fn shared(inner: Arc<B>, observer: Box<dyn Observer + Send>) -> Self {
        Self { inner, observer: Mutex::new(observer) }
    }
}

impl<B: Backend> Observed<B> {
    fn wants_outputs(&self) -> bool {
        held(&self.observer).wants_outputs()
    }

    fn output(&self, module: &str, y: &B::Tensor) -> Result<()> {
        let host = self.inner.to_host(y)?;
        held(&self.observer).output(module, &host);
        Ok(())
    }
}

impl<B: Backend> Backend for Observed<B> {
    type Tensor = B::Tensor;
    type Linear = Named<B::Linear>;
    type Vector = B::Vector;
    type Mamba = B::Mamba;
    type DeltaNet = B::DeltaNet;
    type Cache = B::Cache;
    type Rope = B::Rope;
    type Pass = B::Pass;

    fn linears(&self, x: &B::Tensor, weights: &[&Named<B::Linear>]) -> Result<Vec<B::Tensor>> {
        let host = self.inner.to_host(x)?;
        weights.iter().for_each(|w| held(&self.observer).input(&w.name, &host));
        let inner: Vec<&B::Linear> = weights.iter().map(|w| &***w).collect();
        let outputs = self.inner.linears(x, &inner)?;
        if self.wants_outputs() {
            for (w, y) in weights.iter().zip(&outputs) {
                self.output(&w.name, y)?;
            }
        }
        Ok(outputs)
    }

    fn load_linear(&self, tensors: LinearTensors<'_>) -> Result<Named<B::Linear>> {
        let name = tensors.name.clone();
        Ok(Named::new(name, self.inner.load_linear(tensors)?))
    }

    fn inputs(&self, linear: &Named<B::Linear>) -> usize {
        self.inner.inputs(linear)
    }

    fn multiplies_integers(&self, linear: &Named<B::Linear>) -> bool {
        self.inner.multiplies_integers(linear)
    }

    fn resident_bytes(&self, linear: &Named<B::Linear>) -> usize {
        self.inner.resident_bytes(linear)
    }

    fn name(&self) -> &'static str {
        self.inner.name()
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

    fn embed(&self, table: &Named<B::Linear>, pass: &B::Pass) -> Result<B::Tensor> {
        let embedded = self.inner.embed(table, pass)?;
        if self.wants_outputs() {
            self.output(&table.name, &embedded)?;
        }
        Ok(embedded)
    }

    fn rms_norm(&self, x: &B::Tensor, weight: &B::Vector, eps: f32) -> Result<B::Tensor> {
        self.inner.rms_norm(x, weight, eps)
    }

    fn attention(
        &self,
        q: B::Tensor,
        k: B::Tensor,
        v: B::Tensor,
        sinks: Option<&B::Vector>,
        shape: &AttentionShape,
        pass: &B::Pass,
        cache: &mut B::Cache,
    ) -> Result<B::Tensor> {
        if held(&self.observer).wants_cached() {
            let (keys, values) = (self.inner.rotated(&k, shape, pass)?, self.inner.to_host(&v)?);
            held(&self.observer).cached(shape.layer, &keys, &values);
        }
        let mixed = self.inner.attention(q, k, v, sinks, shape, pass, cache)?;
        if self.wants_outputs() {
            let host = self.inner.to_host(&mixed)?;
            held(&self.observer).attended(shape.layer, &host);
        }
        Ok(mixed)
    }

    fn rotated(&self, k: &B::Tensor, shape: &AttentionShape, pass: &B::Pass) -> Result<Vec<f32>> {
        self.inner.rotated(k, shape, pass)
    }

    fn add(&self, x: B::Tensor, y: &B::Tensor) -> Result<B::Tensor> {
        self.inner.add(x, y)
    }

    fn silu_mul(&self, gate: B::Tensor, up: &B::Tensor) -> Result<B::Tensor> {
        self.inner.silu_mul(gate, up)
    }

    fn route(&self, logits: &B::Tensor, rule: &RouterRule) -> Result<Vec<Routing>> {
        self.inner.route(logits, rule)
    }

    fn activate(&self, x: B::Tensor, up: Option<&B::Tensor>, activation: Activation) -> Result<B::Tensor> {
        self.inner.activate(x, up, activation)
    }

    fn gate(&self, x: B::Tensor, gate: &B::Tensor) -> Result<B::Tensor> {
        self.inner.gate(x, gate)
    }

    fn scale(&self, x: B::Tensor, factor: f32) -> Result<B::Tensor> {
        self.inner.scale(x, factor)
    }

    fn rearrange(&self, sources: &[&B::Tensor], runs: &[Run]) -> Result<B::Tensor> {
        self.inner.rearrange(sources, runs)
    }

    fn mamba(
        &self,
        x: B::Tensor,
        mixer: &B::Mamba,
        layer: usize,
        pass: &B::Pass,
        cache: &mut B::Cache,
    ) -> Result<B::Tensor> {
        self.inner.mamba(x, mixer, layer, pass, cache)
    }

    fn delta_net(
        &self,
        inputs: DeltaInputs<B::Tensor>,
        mixer: &B::DeltaNet,
        layer: usize,
        pass: &B::Pass,
        cache: &mut B::Cache,
    ) -> Result<B::Tensor> {
        self.inner.delta_net(inputs, mixer, layer, pass, cache)
    }

    fn select_rows(&self, x: &B::Tensor, rows: &[usize]) -> Result<B::Tensor> {
        self.inner.select_rows(x, rows)
    }

    fn add_rows(&self, sum: B::Tensor, y: &B::Tensor, rows: &[usize], weights: &[f32]) -> Result<B::Tensor> {
        self.inner.add_rows(sum, y, rows, weights)
    }

    fn zeros_like(&self, x: &B::Tensor) -> Result<B::Tensor> {
        self.inner.zeros_like(x)
    }

    fn score(&self, logits: &B::Tensor, picks: &[(usize, u32)]) -> Result<Vec<TokenScore>> {
        self.inner.score(logits, picks)
    }

    fn sample(
        &self,
        logits: &B::Tensor,
        draws: &[Draw<'_>],
        scratch: &mut Scratch,
    ) -> Result<Vec<std::result::Result<Sampled, SamplingError>>> {
        self.inner.sample(logits, draws, scratch)
    }

    fn compare(
        &self,
        baseline: &B::Tensor,
        model: &B::Tensor,
        vocab: usize,
        targets: &[u32],
    ) -> Result<Vec<std::result::Result<Pair, RowError>>> {
        self.inner.compare(baseline, model, vocab, targets)
    }

    fn is_finite(&self, x: &B::Tensor) -> Result<bool> {
        self.inner.is_finite(x)
    }

    fn squares_finite(&self, x: &B::Tensor, width: usize) -> Result<bool> {
        self.inner.squares_finite(x, width)
    }

    fn tensor(&self, data: Vec<f32>, columns: usize) -> Result<B::Tensor> {
        self.inner.tensor(data, columns)
    }

    fn to_host(&self, x: &B::Tensor) -> Result<Vec<f32>> {
        self.inner.to_host(x)
    }
}
