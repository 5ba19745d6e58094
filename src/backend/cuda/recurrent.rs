//! Mamba-2 and the gated delta net between their projections (kernels/recurrent.cu). The bits of the CPU's, but for the norms.

use std::sync::{Arc, Mutex, PoisonError};

use super::driver::{Args, Device, Memory};
use super::{CudaBackend, CudaCache, CudaPass, CudaTensor};
use crate::backend::cpu::recurrent::{DeltaNet, Mamba2};
use crate::backend::{
    BackendError, Batch, DeltaInputs, DeltaNetShape, DeltaNetWeights, Mamba2Shape, Mamba2Weights, Result,
};

/// Threads of a block, and rows of states that it has.
const MIXER: usize = 128;
const STATE_ROWS: usize = 8;
/// As in recurrent.cu.
const MAX_STATE: usize = 256;

/// A Mamba-2 mixer on the device, without its projections.
#[derive(Debug)]
pub struct CudaMamba {
    shape: Mamba2Shape,
    /// [kernel, channels].
    taps: Memory,
    bias: Option<Memory>,
    /// Each head's -exp(A_log), D and dt_bias.
    heads: Memory,
    norm: Memory,
}

/// A gated delta net on the device, without its projections.
#[derive(Debug)]
pub struct CudaDeltaNet {
    shape: DeltaNetShape,
    taps: Memory,
    /// Each value head's -exp(A_log) and dt_bias.
    heads: Memory,
    norm: Memory,
}

/// The sequences of a pass as kernels read them: [spans, 4] first row, tokens, whether it begins, slot; the span of each token.
#[derive(Debug)]
pub(super) struct OfBatch {
    spans: Memory,
    span_of: Memory,
    count: usize,
    /// One past the highest slot.
    slots: usize,
}

/// Made when the first layer asks.
#[derive(Debug, Default)]
pub(super) struct Spans(Mutex<Option<Arc<OfBatch>>>);

fn failed(message: String) -> BackendError {
    BackendError::Failed { context: "recurrent states", message }
}

impl Spans {
    fn get(&self, device: &Arc<Device>, batch: &Batch) -> Result<Arc<OfBatch>> {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(of_batch) = &*held {
            return Ok(of_batch.clone());
        }
        let mut slots: Vec<u32> = batch.spans.iter().map(|s| s.slot).collect();
        slots.sort_unstable();
        if let Some(pair) = slots.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(failed(format!("two sequences share slot {}", pair[0])));
        }
        let (mut spans, mut span_of) = (Vec::new(), Vec::new());
        for (i, span) in batch.spans.iter().enumerate() {
            spans.extend([span_of.len() as i32, span.len as i32, i32::from(span.start == 0), span.slot as i32]);
            span_of.resize(span_of.len() + span.len, i as i32);
        }
        let of_batch = Arc::new(OfBatch {
            spans: device.upload(&spans)?,
            span_of: device.upload(&span_of)?,
            count: batch.spans.len(),
            slots: slots.last().map_or(0, |s| *s as usize + 1),
        });
        *held = Some(of_batch.clone());
        Ok(of_batch)
    }
}

/// [channels, kernel] to [kernel, channels].
fn taps(conv1d: &[f32], kernel: usize, channels: usize) -> Vec<f32> {
    (0..kernel).flat_map(|j| (0..channels).map(move |c| conv1d[c * kernel + j])).collect()
}

fn check_width(context: &'static str, width: usize) -> Result<()> {
    if width <= MAX_STATE {
        return Ok(());
    }
    let message = format!("the CUDA backend has kernels for states of up to {MAX_STATE} values a row, not {width}");
    Err(BackendError::Failed { context, message })
}

impl CudaMamba {
    /// Takes the weights over.
    ///
    /// # Errors
    /// As the CPU's mixer, a state that is too wide, or not enough memory.
    pub(super) fn load(device: &Arc<Device>, shape: Mamba2Shape, weights: Mamba2Weights) -> Result<Self> {
        // The CPU's mixer checks shape and lengths.
        Mamba2::new(shape, weights.clone())?;
        check_width("mamba2", shape.state)?;
        let heads: Vec<f32> =
            (0..shape.heads).flat_map(|h| [-libm::expf(weights.a_log[h]), weights.d[h], weights.dt_bias[h]]).collect();
        Ok(Self {
            shape,
            taps: device.upload(&taps(&weights.conv1d, shape.kernel, shape.channels()))?,
            bias: weights.conv1d_bias.map(|bias| device.upload(&bias)).transpose()?,
            heads: device.upload(&heads)?,
            norm: device.upload(&weights.norm)?,
        })
    }
}

impl CudaDeltaNet {
    /// Takes the weights over.
    ///
    /// # Errors
    /// As the CPU's mixer, keys that are too wide, or not enough memory.
    pub(super) fn load(device: &Arc<Device>, shape: DeltaNetShape, weights: DeltaNetWeights) -> Result<Self> {
        DeltaNet::new(shape, weights.clone())?;
        check_width("gated delta net", shape.key_dim)?;
        let pairs = weights.a_log.iter().zip(&weights.dt_bias);
        let heads: Vec<f32> = pairs.flat_map(|(a_log, dt_bias)| [-libm::expf(*a_log), *dt_bias]).collect();
        Ok(Self {
            shape,
            taps: device.upload(&taps(&weights.conv1d, shape.kernel, shape.channels()))?,
            heads: device.upload(&heads)?,
            norm: device.upload(&weights.norm)?,
        })
    }
}

/// Where a convolution's inputs stand: rows of `width`, `channels` from column `first` on.
struct Inputs<'a> {
    rows: &'a CudaTensor,
    first: usize,
    channels: usize,
    kernel: usize,
}

impl CudaBackend {
    /// Leaves in each slot's tail what the next token's convolution reads.
    fn keep_tail(&self, inputs: &Inputs<'_>, tails: &Memory, spans: &OfBatch) -> Result<()> {
        if inputs.kernel < 2 {
            return Ok(());
        }
        let args = Args::new()
            .memory(&inputs.rows.data)
            .memory(tails)
            .memory(&spans.spans)
            .int(inputs.rows.columns)
            .int(inputs.first)
            .int(inputs.channels)
            .int(inputs.kernel - 1);
        self.launch("keep_tail", [spans.count, inputs.channels.div_ceil(MIXER), 1], MIXER as u32, args)
    }

    /// The pass's spans, all of which have a slot in the cache.
    fn spans(&self, pass: &CudaPass, cache: &CudaCache) -> Result<Arc<OfBatch>> {
        let spans = pass.spans.get(&self.device, &pass.batch)?;
        if spans.slots > cache.slots() {
            return Err(failed(format!("slot {} of {} recurrent states", spans.slots - 1, cache.slots())));
        }
        Ok(spans)
    }

    /// Whether `x`, which `name` is, has `columns` columns and a row for each token.
    fn expect(&self, name: &str, x: &CudaTensor, columns: usize, pass: &CudaPass) -> Result<()> {
        let tokens = pass.batch.tokens.len();
        if (x.rows, x.columns) == (tokens, columns) {
            return Ok(());
        }
        Err(failed(format!("{name}: {} x {} values where {tokens} x {columns} were expected", x.rows, x.columns)))
    }

    /// [`crate::backend::Backend::mamba`].
    pub(super) fn run_mamba(
        &self,
        x: CudaTensor,
        mixer: &CudaMamba,
        layer: usize,
        pass: &CudaPass,
        cache: &CudaCache,
    ) -> Result<CudaTensor> {
        let shape = &mixer.shape;
        let &Mamba2Shape { heads, head_dim, groups, state, kernel, eps, time_step_limit: (low, high) } = shape;
        let (inner, channels) = (shape.inner(), shape.channels());
        self.expect("what in_proj gave", &x, shape.projected(), pass)?;
        let (spans, kept) = (self.spans(pass, cache)?, cache.recurrent(layer, shape.kept())?);
        let x = self.settle(x)?;
        let (conv, y, out) = (self.empty(x.rows, channels)?, self.empty(x.rows, inner)?, self.empty(x.rows, inner)?);
        let steps = self.device.take(8 * x.rows * heads)?;
        let args = Args::new()
            .memory(&x.data)
            .memory(&kept.tails)
            .memory(&mixer.taps)
            .optional(mixer.bias.as_ref())
            .memory(&mixer.heads)
            .float(low)
            .float(high)
            .memory(&spans.spans)
            .memory(&spans.span_of)
            .memory(&conv.data)
            .memory(&steps)
            .int(inner)
            .int(channels)
            .int(heads)
            .int(kernel);
        self.launch("mamba_convolve", [x.rows, (channels + heads).div_ceil(MIXER), 1], MIXER as u32, args)?;
        self.keep_tail(&Inputs { rows: &x, first: inner, channels, kernel }, &kept.tails, &spans)?;
        let args = Args::new()
            .memory(&conv.data)
            .memory(&steps)
            .memory(&mixer.heads)
            .memory(&kept.states)
            .memory(&spans.spans)
            .memory(&y.data)
            .int(heads)
            .int(head_dim)
            .int(groups)
            .int(state);
        self.launch("mamba_scan", [head_dim.div_ceil(STATE_ROWS), heads, spans.count], MIXER as u32, args)?;
        let args = Args::new()
            .memory(&y.data)
            .memory(&x.data)
            .memory(&mixer.norm)
            .float(eps)
            .memory(&out.data)
            .int(inner)
            .int(inner / groups)
            .int(x.columns);
        self.launch("mamba_norm", [x.rows, groups, 1], MIXER as u32, args)?;
        Ok(out)
    }

    /// [`crate::backend::Backend::delta_net`].
    pub(super) fn run_delta_net(
        &self,
        inputs: DeltaInputs<CudaTensor>,
        mixer: &CudaDeltaNet,
        layer: usize,
        pass: &CudaPass,
        cache: &CudaCache,
    ) -> Result<CudaTensor> {
        let shape = &mixer.shape;
        let &DeltaNetShape { key_heads, value_heads, key_dim, value_dim, kernel, eps } = shape;
        let (inner, channels) = (shape.inner(), shape.channels());
        let DeltaInputs { qkv, z, a, b } = inputs;
        self.expect("what in_proj_qkv gave", &qkv, channels, pass)?;
        self.expect("what in_proj_z gave", &z, inner, pass)?;
        self.expect("what in_proj_a gave", &a, value_heads, pass)?;
        self.expect("what in_proj_b gave", &b, value_heads, pass)?;
        let (spans, kept) = (self.spans(pass, cache)?, cache.recurrent(layer, shape.kept())?);
        let (qkv, z, a, b) = (self.settle(qkv)?, self.settle(z)?, self.settle(a)?, self.settle(b)?);
        let tokens = qkv.rows;
        let (conv, y, out) = (self.empty(tokens, channels)?, self.empty(tokens, inner)?, self.empty(tokens, inner)?);
        let steps = self.device.take(8 * tokens * value_heads)?;
        let args = Args::new()
            .memory(&qkv.data)
            .memory(&a.data)
            .memory(&b.data)
            .memory(&kept.tails)
            .memory(&mixer.taps)
            .memory(&mixer.heads)
            .memory(&spans.spans)
            .memory(&spans.span_of)
            .memory(&conv.data)
            .memory(&steps)
            .int(channels)
            .int(value_heads)
            .int(kernel);
        self.launch("delta_convolve", [tokens, (channels + value_heads).div_ceil(MIXER), 1], MIXER as u32, args)?;
        self.keep_tail(&Inputs { rows: &qkv, first: 0, channels, kernel }, &kept.tails, &spans)?;
        let args = Args::new()
            .memory(&conv.data)
            .int(tokens)
            .int(channels)
            .int(2 * key_heads)
            .int(key_heads)
            .int(key_dim)
            .float(1.0 / (key_dim as f32).sqrt());
        self.launch("delta_unit", [(tokens * 2 * key_heads).div_ceil(STATE_ROWS), 1, 1], MIXER as u32, args)?;
        let args = Args::new()
            .memory(&conv.data)
            .memory(&steps)
            .memory(&kept.states)
            .memory(&spans.spans)
            .memory(&y.data)
            .int(key_heads)
            .int(value_heads)
            .int(key_dim)
            .int(value_dim);
        let grid = [value_dim.div_ceil(STATE_ROWS), value_heads, spans.count];
        self.launch("delta_scan", grid, MIXER as u32, args)?;
        let args = Args::new()
            .memory(&y.data)
            .memory(&z.data)
            .memory(&mixer.norm)
            .float(eps)
            .memory(&out.data)
            .int(tokens * value_heads)
            .int(value_dim);
        self.launch("delta_norm", [(tokens * value_heads).div_ceil(MIXER / 32), 1, 1], MIXER as u32, args)?;
        Ok(out)
    }
}
