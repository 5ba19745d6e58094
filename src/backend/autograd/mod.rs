//! The decoder's operations on candle tensors: the readable reference, and what training differentiates through.
//!
//! Weights are decoded to f32 [N, K] once, inputs are fake-quantized, and the rest is f32. Only candle operations that
//! record their gradient are used: candle-nn's fused softmax, norm and rotation drop it without a word. candle-core's
//! silu records its own.

mod attention;
mod fake_quantize;

pub use attention::KvCache;
use candle_core::{D, Device, Tensor};

use super::{AttentionShape, Backend, BackendError, Batch, CacheLayout, Result, RopeTable, Routing, Span, TokenScore};
use crate::formats::linear::{ActivationFormat, LinearTensors};
use fake_quantize::FakeQuantize;

/// Runs the decoder on candle tensors.
#[derive(Clone, Debug)]
pub struct AutogradBackend {
    device: Device,
}

/// A linear layer: y = quantized(x · pre_quant_scale) · Wᵀ + bias.
#[derive(Clone, Debug)]
pub struct Linear {
    name: String,
    /// [N, K]
    weight: Tensor,
    /// [N]
    bias: Option<Tensor>,
    /// [K]
    pre_quant_scale: Option<Vec<f32>>,
    activation: ActivationFormat,
}

impl Linear {
    /// W in f32, [N, K].
    #[must_use]
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// x [T, K] as this linear's kernel sees it when deployed.
    fn quantize(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let scaled = match &self.pre_quant_scale {
            None => x.clone(),
            Some(s) => x.broadcast_mul(&Tensor::new(s.as_slice(), x.device())?)?,
        };
        match self.activation {
            ActivationFormat::Float => Ok(scaled),
            format => scaled.contiguous()?.apply_op1(FakeQuantize::Activation(format)),
        }
    }

    fn same_input(&self, other: &Self) -> bool {
        self.activation == other.activation && self.pre_quant_scale == other.pre_quant_scale
    }

    /// `x` is already quantized.
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let y = x.matmul(&self.weight.t()?)?;
        match &self.bias {
            None => Ok(y),
            Some(bias) => y.broadcast_add(bias),
        }
    }
}

impl AutogradBackend {
    /// A backend on the CPU.
    #[must_use]
    pub fn new() -> Self {
        Self { device: Device::Cpu }
    }

    fn vector(&self, values: Vec<f32>) -> candle_core::Result<Tensor> {
        let length = values.len();
        Tensor::from_vec(values, length, &self.device)
    }

    fn indices(&self, rows: impl Iterator<Item = usize>) -> candle_core::Result<Tensor> {
        let rows: Vec<u32> = rows.map(|r| r as u32).collect();
        Tensor::new(rows.as_slice(), &self.device)
    }
}

impl Default for AutogradBackend {
    fn default() -> Self {
        Self::new()
    }
}

/// Says which operation candle failed in.
trait Context<T> {
    fn context(self, context: &'static str) -> Result<T>;
}

impl<T> Context<T> for candle_core::Result<T> {
    fn context(self, context: &'static str) -> Result<T> {
        self.map_err(|e| BackendError::Failed { context, message: e.to_string() })
    }
}

impl Backend for AutogradBackend {
    type Tensor = Tensor;
    type Linear = Linear;
    type Norm = Tensor;
    type Cache = KvCache;

    fn load_linear(&self, tensors: LinearTensors<'_>) -> Result<Linear> {
        let weight = Tensor::from_vec(tensors.decode(), (tensors.n, tensors.k), &self.device).context("weight")?;
        let bias = tensors.bias.map(|b| self.vector(b)).transpose().context("bias")?;
        Ok(Linear {
            name: tensors.name,
            weight,
            bias,
            pre_quant_scale: tensors.pre_quant_scale,
            activation: tensors.activation,
        })
    }

    fn module<'a>(&self, linear: &'a Linear) -> &'a str {
        &linear.name
    }

    fn load_norm(&self, weight: Vec<f32>) -> Result<Tensor> {
        self.vector(weight).context("norm weight")
    }

    fn new_cache(&self, layout: &CacheLayout) -> Result<KvCache> {
        Ok(KvCache::new(layout))
    }

    fn embed(&self, table: &Linear, tokens: &[u32]) -> Result<Tensor> {
        let vocab = table.weight.dim(0).context("embed")?;
        if let Some(&token) = tokens.iter().find(|&&t| t as usize >= vocab) {
            return Err(BackendError::TokenOutOfRange { token, vocab });
        }
        let ids = Tensor::new(tokens, &self.device).context("embed")?;
        table.weight.index_select(&ids, 0).context("embed")
    }

    fn rms_norm(&self, x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
        rms_norm(x, weight, eps).context("rms_norm")
    }

    fn linears(&self, x: &Tensor, weights: &[&Linear]) -> Result<Vec<Tensor>> {
        let mut outputs = Vec::with_capacity(weights.len());
        let mut input: Option<(&Linear, Tensor)> = None;
        for &w in weights {
            let quantized = match &input {
                Some((other, quantized)) if other.same_input(w) => quantized.clone(),
                _ => w.quantize(x).context("quantizing the input of a linear")?,
            };
            outputs.push(w.forward(&quantized).context("linear")?);
            input = Some((w, quantized));
        }
        Ok(outputs)
    }

    fn attention(
        &self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        shape: &AttentionShape,
        rope: &RopeTable,
        cache: &mut KvCache,
        batch: &Batch,
    ) -> Result<Tensor> {
        let rotate = |x: &Tensor, heads| attention::rotate(x, heads, rope);
        let q = rotate(&q, shape.heads).context("rotating queries")?;
        let k = rotate(&k, shape.kv_heads).context("rotating keys")?;
        attention::attend(&q, &k, &v, shape, cache, batch).context("attention")
    }

    fn fork(&self, cache: &mut KvCache, from: &Span, to: &Span) -> Result<()> {
        cache.fork(from.slot, to.slot, to.start).context("fork")
    }

    fn score(&self, logits: &Tensor, picks: &[(usize, u32)]) -> Result<Vec<TokenScore>> {
        let rows = logits.to_vec2::<f32>().context("score")?;
        Ok(picks.iter().map(|&(row, token)| super::score_row(&rows[row], token)).collect())
    }

    fn add(&self, x: Tensor, y: &Tensor) -> Result<Tensor> {
        (x + y).context("add")
    }

    fn silu_mul(&self, gate: Tensor, up: &Tensor) -> Result<Tensor> {
        gate.silu().and_then(|g| g * up).context("silu_mul")
    }

    /// On the host: a router's choice and its weights get no gradient yet.
    fn route(&self, logits: &Tensor, top_k: usize, normalize: bool) -> Result<Vec<Routing>> {
        let rows = logits.to_vec2::<f32>().context("route")?;
        Ok(rows.iter().map(|row| super::route_row(row, top_k, normalize)).collect())
    }

    fn select_rows(&self, x: &Tensor, rows: &[usize]) -> Result<Tensor> {
        self.indices(rows.iter().copied()).and_then(|i| x.index_select(&i, 0)).context("select_rows")
    }

    fn add_rows(&self, sum: Tensor, y: &Tensor, rows: &[usize], weights: &[f32]) -> Result<Tensor> {
        let add = || {
            let weights = Tensor::from_slice(weights, (weights.len(), 1), &self.device)?;
            sum.index_add(&self.indices(rows.iter().copied())?, &y.broadcast_mul(&weights)?, 0)
        };
        add().context("add_rows")
    }

    fn zeros_like(&self, x: &Tensor) -> Result<Tensor> {
        x.zeros_like().context("zeros_like")
    }

    fn to_host(&self, x: &Tensor) -> Result<Vec<f32>> {
        x.flatten_all().and_then(|x| x.to_vec1()).context("to_host")
    }
}

/// x / √(mean x² + eps) · weight over each run of `weight`'s length.
fn rms_norm(x: &Tensor, weight: &Tensor, eps: f32) -> candle_core::Result<Tensor> {
    let runs = x.reshape(((), weight.elem_count()))?;
    let mean_square = runs.sqr()?.mean_keepdim(D::Minus1)?;
    let root = (mean_square + f64::from(eps))?.sqrt()?;
    runs.broadcast_div(&root)?.broadcast_mul(weight)?.reshape(x.shape())
}

/// Softmax over the last dimension. The maximum only keeps exp from overflowing, so it needs no gradient.
fn softmax(x: &Tensor) -> candle_core::Result<Tensor> {
    let max = x.max_keepdim(D::Minus1)?.detach();
    let e = x.broadcast_sub(&max)?.exp()?;
    e.broadcast_div(&e.sum_keepdim(D::Minus1)?)
}
