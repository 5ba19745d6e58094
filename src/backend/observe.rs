//! A backend that shows every linear's input to an observer on the way: calibration, per-layer checks.

use std::sync::{Arc, Mutex, PoisonError};

use super::{AttentionShape, Backend, Batch, CacheLayout, Result, RopeTable, Routing, Span, TokenScore};
use crate::formats::linear::LinearTensors;

/// `k` [tokens, heads · 2 · half] after RoPE.
fn rotated(k: &[f32], rope: &RopeTable) -> Vec<f32> {
    let half = rope.half;
    let tokens = (rope.cos.len() / half.max(1)).max(1);
    let mut out = k.to_vec();
    for (t, row) in out.chunks_mut(k.len() / tokens).enumerate() {
        let (cos, sin) = (&rope.cos[t * half..][..half], &rope.sin[t * half..][..half]);
        for head in row.chunks_mut(2 * half) {
            let (a, b) = head.split_at_mut(half);
            for i in 0..half {
                (a[i], b[i]) = (a[i] * cos[i] - b[i] * sin[i], b[i] * cos[i] + a[i] * sin[i]);
            }
        }
    }
    out
}

/// What is shown on the way.
pub trait Observer {
    /// One linear's module name and its input, [tokens, K] row-major, before any quantization.
    fn input(&mut self, module: &str, x: &[f32]);

    /// Whether [`Self::cached`] is to be called.
    fn wants_cached(&self) -> bool {
        false
    }

    /// Whether [`Self::output`] is to be called.
    fn wants_outputs(&self) -> bool {
        false
    }

    /// What a module gives, [tokens, N] row-major: a linear by its name, the embedding, a layer's attention.
    fn output(&mut self, _module: &str, _y: &[f32]) {}

    /// A layer's keys (after RoPE) and values, [tokens, heads · head_dim] row-major, before the cache stores them.
    fn cached(&mut self, _layer: usize, _keys: &[f32], _values: &[f32]) {}
}

impl<F: FnMut(&str, &[f32])> Observer for F {
    fn input(&mut self, module: &str, x: &[f32]) {
        self(module, x);
    }
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
            self.0 = Some((format!("what {side} `{module}`"), *value));
        }
    }
}

impl Observer for FirstBroken {
    fn input(&mut self, module: &str, x: &[f32]) {
        self.look("enters", module, x);
    }

    fn wants_outputs(&self) -> bool {
        true
    }

    fn output(&mut self, module: &str, y: &[f32]) {
        self.look("comes out of", module, y);
    }
}

/// `inner` with an observer.
pub struct Observed<B, O> {
    inner: Arc<B>,
    observer: Mutex<O>,
}

impl<B, O> Observed<B, O> {
    /// Wraps `inner`.
    pub fn new(inner: B, observer: O) -> Self {
        Self::shared(Arc::new(inner), observer)
    }

    /// Wraps a backend that others use too.
    pub fn shared(inner: Arc<B>, observer: O) -> Self {
        Self { inner, observer: Mutex::new(observer) }
    }

    /// Access to what was observed.
    pub fn with_observer<T>(&self, f: impl FnOnce(&mut O) -> T) -> T {
        f(&mut self.observer.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl<B: Backend, O: Observer> Observed<B, O> {
    fn wants_outputs(&self) -> bool {
        self.with_observer(|o| o.wants_outputs())
    }

    fn output(&self, module: &str, y: &B::Tensor) -> Result<()> {
        let host = self.inner.to_host(y)?;
        self.with_observer(|o| o.output(module, &host));
        Ok(())
    }
}

impl<B: Backend, O: Observer> Backend for Observed<B, O> {
    type Tensor = B::Tensor;
    type Linear = B::Linear;
    type Norm = B::Norm;
    type Cache = B::Cache;

    fn linears(&self, x: &B::Tensor, weights: &[&B::Linear]) -> Result<Vec<B::Tensor>> {
        let host = self.inner.to_host(x)?;
        self.with_observer(|o| weights.iter().for_each(|w| o.input(self.inner.module(w), &host)));
        let outputs = self.inner.linears(x, weights)?;
        if self.wants_outputs() {
            for (w, y) in weights.iter().zip(&outputs) {
                self.output(self.inner.module(w), y)?;
            }
        }
        Ok(outputs)
    }

    fn load_linear(&self, tensors: LinearTensors<'_>) -> Result<B::Linear> {
        self.inner.load_linear(tensors)
    }

    fn module<'a>(&self, linear: &'a B::Linear) -> &'a str {
        self.inner.module(linear)
    }

    fn load_norm(&self, weight: Vec<f32>) -> Result<B::Norm> {
        self.inner.load_norm(weight)
    }

    fn new_cache(&self, layout: &CacheLayout) -> Result<B::Cache> {
        self.inner.new_cache(layout)
    }

    fn embed(&self, table: &B::Linear, tokens: &[u32]) -> Result<B::Tensor> {
        let embedded = self.inner.embed(table, tokens)?;
        if self.wants_outputs() {
            self.output(self.inner.module(table), &embedded)?;
        }
        Ok(embedded)
    }

    fn rms_norm(&self, x: &B::Tensor, weight: &B::Norm, eps: f32) -> Result<B::Tensor> {
        self.inner.rms_norm(x, weight, eps)
    }

    fn attention(
        &self,
        q: B::Tensor,
        k: B::Tensor,
        v: B::Tensor,
        shape: &AttentionShape,
        rope: &RopeTable,
        cache: &mut B::Cache,
        batch: &Batch,
    ) -> Result<B::Tensor> {
        if self.with_observer(|o| o.wants_cached()) {
            let (keys, values) = (rotated(&self.inner.to_host(&k)?, rope), self.inner.to_host(&v)?);
            self.with_observer(|o| o.cached(shape.layer, &keys, &values));
        }
        let mixed = self.inner.attention(q, k, v, shape, rope, cache, batch)?;
        if self.wants_outputs() {
            self.output(&format!("model.layers.{}.self_attn", shape.layer), &mixed)?;
        }
        Ok(mixed)
    }

    fn fork(&self, cache: &mut B::Cache, from: &Span, to: &Span) -> Result<()> {
        self.inner.fork(cache, from, to)
    }

    fn score(&self, logits: &B::Tensor, picks: &[(usize, u32)]) -> Result<Vec<TokenScore>> {
        self.inner.score(logits, picks)
    }

    fn add(&self, x: B::Tensor, y: &B::Tensor) -> Result<B::Tensor> {
        self.inner.add(x, y)
    }

    fn silu_mul(&self, gate: B::Tensor, up: &B::Tensor) -> Result<B::Tensor> {
        self.inner.silu_mul(gate, up)
    }

    fn route(&self, logits: &B::Tensor, top_k: usize, normalize: bool) -> Result<Vec<Routing>> {
        self.inner.route(logits, top_k, normalize)
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

    fn is_finite(&self, x: &B::Tensor) -> Result<bool> {
        self.inner.is_finite(x)
    }

    fn squares_finite(&self, x: &B::Tensor, width: usize) -> Result<bool> {
        self.inner.squares_finite(x, width)
    }

    fn to_host(&self, x: &B::Tensor) -> Result<Vec<f32>> {
        self.inner.to_host(x)
    }
}
