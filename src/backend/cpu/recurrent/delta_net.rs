//! The gated delta net between its input projections and out_proj: convolution, delta rule, norm and gate.
//!
//! Source: Hugging Face transformers, models/qwen3_5.

use super::super::buffer::BufferPool;
use super::super::isa::Isa;
use super::{RecurrentShape, RecurrentSpan, RecurrentStates};
use crate::backend::BackendError;

/// Shape of one gated delta net.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DeltaNetShape {
    pub key_heads: usize,
    /// A multiple of `key_heads`: value head h uses key head h / (value_heads / key_heads).
    pub value_heads: usize,
    pub key_dim: usize,
    pub value_dim: usize,
    /// Taps of the convolution.
    pub kernel: usize,
    /// Of the norm over each head's output.
    pub eps: f32,
}

impl DeltaNetShape {
    /// Width of z and of what goes to out_proj.
    #[must_use]
    pub fn inner(&self) -> usize {
        self.value_heads * self.value_dim
    }

    /// Channels of the convolution: q, k and v.
    #[must_use]
    pub fn channels(&self) -> usize {
        2 * self.key_heads * self.key_dim + self.inner()
    }

    /// What is kept of a sequence; the state is [value_heads, value_dim, key_dim].
    #[must_use]
    pub fn kept(&self) -> RecurrentShape {
        RecurrentShape {
            tail: self.kernel.saturating_sub(1),
            channels: self.channels(),
            state: self.inner() * self.key_dim,
        }
    }
}

/// Tensors of a gated delta net beside its projections, as a checkpoint has them.
#[derive(Clone, Debug)]
pub struct DeltaNetWeights {
    /// [channels, kernel].
    pub conv1d: Vec<f32>,
    /// [value_heads], as is `dt_bias`.
    pub a_log: Vec<f32>,
    pub dt_bias: Vec<f32>,
    /// [value_dim].
    pub norm: Vec<f32>,
}

/// What the input projections gave.
#[derive(Clone, Copy, Debug)]
pub struct DeltaNetInputs<'a> {
    /// [T, channels].
    pub qkv: &'a [f32],
    /// [T, inner].
    pub z: &'a [f32],
    /// [T, value_heads], as is `b`.
    pub a: &'a [f32],
    pub b: &'a [f32],
}

/// A gated delta net without its projections.
#[derive(Clone, Debug)]
pub struct DeltaNet {
    shape: DeltaNetShape,
}

impl DeltaNet {
    /// Takes the weights over.
    ///
    /// # Errors
    /// When the shape is none or a tensor has another number of values.
    pub fn new(shape: DeltaNetShape, _weights: DeltaNetWeights) -> Result<Self, BackendError> {
        Ok(Self { shape })
    }

    /// Its shape.
    #[must_use]
    pub fn shape(&self) -> &DeltaNetShape {
        &self.shape
    }

    /// What out_proj reads, `out` [T, inner]; the spans' tails and states in `layer` move on. Runs on the threads of the
    /// rayon pool it is called in.
    ///
    /// # Errors
    /// When the lengths don't fit, the spans are not all of the rows in order, or a slot isn't there or named twice.
    #[allow(clippy::too_many_arguments)]
    pub(in crate::backend) fn run(
        &self,
        _isa: Isa,
        _buffers: &BufferPool,
        _inputs: DeltaNetInputs<'_>,
        _spans: &[RecurrentSpan],
        _states: &mut RecurrentStates,
        _layer: usize,
        _out: &mut [f32],
    ) -> Result<(), BackendError> {
        Err(BackendError::Failed { context: "gated delta net", message: "not there yet".into() })
    }
}
