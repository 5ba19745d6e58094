//! The decoder's operations on candle tensors with gradients: what training differentiates through.
//!
//! Each operation is one custom operation of candle with its own backward pass (candle-nn's fused ones drop the gradient
//! without a word). Weights and inputs have the values they have when deployed; a weight's gradient is summed in its
//! [`Linear`] or [`Norm`], not in candle's store, so that it is written once.

mod attention;
pub mod dense;
mod elementwise;
mod gpu;
mod host;
mod linear;
pub mod loss;
mod mixture;
pub mod multiplier;
mod norm;
pub mod operand;
mod recurrent;
pub mod recycle;

pub use attention::KvCache;
use candle_core::{Device, Tensor};
pub use linear::Linear;
pub use norm::Norm;
pub use recurrent::{DeltaNet, Mamba};

use self::multiplier::Multiplier;
use self::operand::Precision;
use super::{
    Activation, AttentionShape, Backend, BackendError, Batch, CacheLayout, DeltaInputs, DeltaNetShape, DeltaNetWeights,
    Ffn, HostPass, Mamba2Shape, Mamba2Weights, Result, RopeTable, Rotation, Run, Span, one,
};
use crate::formats::linear::{ActivationFormat, LinearTensors};
use crate::logits::{RouterRule, Routing, TokenScore, score_row};

/// Runs the decoder on candle tensors.
#[derive(Clone, Debug)]
pub struct AutogradBackend {
    device: Device,
    precision: Precision,
    multiplier: Multiplier,
}

impl AutogradBackend {
    /// A backend on the CPU in f32: the reference.
    #[must_use]
    pub fn new() -> Self {
        Self::with_precision(Precision::F32)
    }

    /// A backend on the CPU whose products have operands of the given precision.
    #[must_use]
    pub fn with_precision(precision: Precision) -> Self {
        Self::multiplied_by(Multiplier::Cpu, precision)
    }

    /// A backend whose linears are multiplied by `multiplier`; all else is computed on the CPU.
    #[must_use]
    pub fn multiplied_by(multiplier: Multiplier, precision: Precision) -> Self {
        Self { device: Device::Cpu, precision, multiplier }
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
    type Vector = Norm;
    type Mamba = Mamba;
    type DeltaNet = DeltaNet;
    type Cache = KvCache;
    type Rope = RopeTable;
    type Pass = HostPass;

    fn load_linear(&self, tensors: LinearTensors<'_>) -> Result<Linear> {
        if tensors.rotation.is_some() || matches!(tensors.activation, ActivationFormat::FpQuant { .. }) {
            let what = "fp_quant's rotated inputs: they are computed, not trained".into();
            return Err(BackendError::Unsupported { module: tensors.name, backend: "autograd", what });
        }
        Ok(Linear::new(tensors, self.precision, self.multiplier.clone()))
    }

    fn inputs(&self, linear: &Linear) -> usize {
        linear.k()
    }

    fn resident_bytes(&self, linear: &Linear) -> usize {
        4 * linear.n() * linear.k()
    }

    fn name(&self) -> &'static str {
        "training"
    }

    fn load_vector(&self, values: Vec<f32>) -> Result<Norm> {
        Ok(Norm::new(values))
    }

    fn load_mamba(&self, shape: Mamba2Shape, weights: Mamba2Weights) -> Result<Mamba> {
        Mamba::new(shape, weights)
    }

    fn load_delta_net(&self, shape: DeltaNetShape, weights: DeltaNetWeights) -> Result<DeltaNet> {
        DeltaNet::new(shape, weights)
    }

    fn load_rope(&self, rotation: Rotation) -> Result<RopeTable> {
        Ok(RopeTable::new(rotation))
    }

    fn new_cache(&self, layout: &CacheLayout) -> Result<KvCache> {
        Ok(KvCache::new(layout))
    }

    fn grow(&self, cache: &mut KvCache, pages: usize, slots: usize) -> Result<()> {
        cache.grow(pages);
        cache.states.grow(slots);
        Ok(())
    }

    fn copy_state(&self, cache: &mut KvCache, from: u32, to: u32) -> Result<()> {
        cache.states.copy(from as usize, to as usize)
    }

    fn fork(&self, cache: &mut KvCache, from: &Span, to: &Span) -> Result<()> {
        cache.fork(from, to).context("fork")
    }

    fn prepare(&self, batch: &Batch, ropes: &[&RopeTable]) -> Result<HostPass> {
        Ok(HostPass::new(batch, ropes))
    }

    fn embed(&self, table: &Linear, pass: &HostPass) -> Result<Tensor> {
        let tokens = &pass.batch.tokens;
        let (vocab, width) = (table.n(), table.k());
        if let Some(&token) = tokens.iter().find(|&&t| t as usize >= vocab) {
            return Err(BackendError::TokenOutOfRange { token, vocab });
        }
        let rows: Vec<f32> = tokens.iter().flat_map(|t| table.weight_row(*t as usize)).collect();
        Tensor::from_vec(rows, (tokens.len(), width), &self.device).context("embed")
    }

    fn rms_norm(&self, x: &Tensor, weight: &Norm, eps: f32) -> Result<Tensor> {
        norm::rms_norm(x, weight, eps).context("rms_norm")
    }

    fn linears(&self, x: &Tensor, weights: &[&Linear]) -> Result<Vec<Tensor>> {
        let mut outputs = Vec::with_capacity(weights.len());
        let mut last = None;
        for &w in weights {
            let input = match last {
                Some((other, input)) if w.same_input(other) => input,
                _ => w.quantize(x).context("quantizing the input of a linear")?,
            };
            outputs.push(w.forward(x, input.clone()).context("linear")?);
            last = Some((w, input));
        }
        Ok(outputs)
    }

    fn attention(
        &self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Option<&Norm>,
        shape: &AttentionShape,
        pass: &HostPass,
        cache: &mut KvCache,
    ) -> Result<Tensor> {
        attention::attend(&q, &k, &v, sinks, shape, pass, cache).context("attention")
    }

    fn rotated(&self, k: &Tensor, shape: &AttentionShape, pass: &HostPass) -> Result<Vec<f32>> {
        let mut k = self.to_host(k)?;
        attention::rotate(&mut k, shape, pass, 1.0);
        Ok(k)
    }

    fn score(&self, logits: &Tensor, picks: &[(usize, u32)]) -> Result<Vec<TokenScore>> {
        let rows = logits.to_vec2::<f32>().context("score")?;
        Ok(picks.iter().map(|&(row, token)| score_row(&rows[row], token)).collect())
    }

    fn add(&self, x: Tensor, y: &Tensor) -> Result<Tensor> {
        let add = || x.contiguous()?.apply_op2(&y.contiguous()?, elementwise::Add);
        add().context("add")
    }

    fn silu_mul(&self, gate: Tensor, up: &Tensor) -> Result<Tensor> {
        self.activate(gate, Some(up), Activation::Silu)
    }

    fn activate(&self, x: Tensor, up: Option<&Tensor>, activation: Activation) -> Result<Tensor> {
        let apply = || match up.filter(|_| activation.is_gated()) {
            Some(up) => x.contiguous()?.apply_op2(&up.contiguous()?, elementwise::Gated(activation)),
            None => x.contiguous()?.apply_op1(elementwise::Relu2),
        };
        apply().context("activation")
    }

    fn gate(&self, x: Tensor, gate: &Tensor) -> Result<Tensor> {
        let apply = || x.contiguous()?.apply_op2(&gate.contiguous()?, elementwise::Gate);
        apply().context("gate")
    }

    fn scale(&self, x: Tensor, factor: f32) -> Result<Tensor> {
        x.affine(f64::from(factor), 0.0).context("scale")
    }

    fn rearrange(&self, sources: &[&Tensor], runs: &[Run]) -> Result<Tensor> {
        let pick = || {
            if let [Run { source, first, count }] = *runs {
                return sources[source].narrow(1, first, count)?.contiguous();
            }
            let widths = sources.iter().map(|s| s.dim(1)).collect::<candle_core::Result<Vec<usize>>>()?;
            let before = |source: usize| widths[..source].iter().sum::<usize>();
            let columns = runs.iter().flat_map(|r| (0..r.count).map(|i| before(r.source) + r.first + i));
            Tensor::cat(sources, 1)?.index_select(&self.indices(columns)?, 1)
        };
        pick().context("rearrange")
    }

    fn mamba(&self, x: Tensor, mixer: &Mamba, layer: usize, pass: &HostPass, cache: &mut KvCache) -> Result<Tensor> {
        recurrent::mamba(&x, mixer, &pass.batch, cache.states_of(layer)).context("mamba2")
    }

    fn delta_net(
        &self,
        inputs: DeltaInputs<Tensor>,
        mixer: &DeltaNet,
        layer: usize,
        pass: &HostPass,
        cache: &mut KvCache,
    ) -> Result<Tensor> {
        recurrent::delta_net(&inputs, mixer, &pass.batch, cache.states_of(layer)).context("gated delta net")
    }

    fn route(&self, logits: &Tensor, rule: &RouterRule) -> Result<Vec<Routing>> {
        let rows = logits.to_vec2::<f32>().context("route")?;
        Ok(rows.iter().map(|row| rule.route(row)).collect())
    }

    /// As the default, with a gradient for the router.
    fn mixture(
        &self,
        x: &Tensor,
        routed: &Tensor,
        router: &Linear,
        experts: &[Ffn<'_, Linear>],
        rule: &RouterRule,
    ) -> Result<Tensor> {
        let logits = one(self.linears(routed, &[router])?)?;
        let routing = self.route(&logits, rule)?;
        // Rows that an expert takes, and where in the weights [rows, top_k] its own are.
        let mut takers: Vec<(Vec<usize>, Vec<usize>)> = vec![Default::default(); experts.len()];
        let choices = routing.iter().enumerate().flat_map(|(row, chosen)| chosen.iter().map(move |c| (row, c.0)));
        for (place, (row, expert)) in choices.enumerate() {
            takers[expert].0.push(row);
            takers[expert].1.push(place);
        }
        let (mut parts, mut rows, mut places) = (Vec::new(), Vec::new(), Vec::new());
        for (expert, (own, weights)) in experts.iter().zip(takers).filter(|(_, (rows, _))| !rows.is_empty()) {
            let h = self.expanded(&self.select_rows(x, &own)?, expert)?;
            parts.push(one(self.linears(&h, &[expert.down])?)?);
            rows.extend(own);
            places.extend(weights);
        }
        let sum = self.zeros_like(x)?;
        if parts.is_empty() {
            return Ok(sum);
        }
        let add = || {
            let weights = mixture::weights(&logits, rule, &routing)?.flatten_all()?;
            let weights = weights.index_select(&self.indices(places.into_iter())?, 0)?.unsqueeze(1)?;
            let parts = Tensor::cat(&parts, 0)?.broadcast_mul(&weights)?;
            sum.index_add(&self.indices(rows.into_iter())?, &parts, 0)
        };
        add().context("mixture")
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

    fn tensor(&self, data: Vec<f32>, columns: usize) -> Result<Tensor> {
        let rows = data.len() / columns.max(1);
        Tensor::from_vec(data, (rows, columns), &self.device).context("tensor")
    }

    fn to_host(&self, x: &Tensor) -> Result<Vec<f32>> {
        x.flatten_all().and_then(|x| x.to_vec1()).context("to_host")
    }
}
