//! Mamba-2 between its input and output projections: convolution, selective state space, gate and grouped norm.
//!
//! Source: Hugging Face transformers, models/nemotron_h; vLLM, layers/mamba/mamba_mixer2.py.

use super::super::buffer::BufferPool;
use super::super::isa::Isa;
use super::{RecurrentShape, RecurrentSpan, RecurrentStates};
use crate::backend::BackendError;

/// Shape of one Mamba-2 mixer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Mamba2Shape {
    pub heads: usize,
    pub head_dim: usize,
    /// Groups of heads that share B and C.
    pub groups: usize,
    /// Values of state for each of a head's dimensions (ssm_state_size).
    pub state: usize,
    /// Taps of the convolution.
    pub kernel: usize,
    /// Of the norm.
    pub eps: f32,
    /// What a time step is clamped to; (0, ∞): not at all.
    pub time_step_limit: (f32, f32),
}

impl Mamba2Shape {
    /// Width of what goes to out_proj.
    #[must_use]
    pub fn inner(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Channels of the convolution: x, B and C.
    #[must_use]
    pub fn channels(&self) -> usize {
        self.inner() + 2 * self.groups * self.state
    }

    /// Width of what comes from in_proj: z, the convolution's channels, a time step for each head.
    #[must_use]
    pub fn projected(&self) -> usize {
        self.inner() + self.channels() + self.heads
    }

    /// What is kept of a sequence; the state is [heads, head_dim, state].
    #[must_use]
    pub fn kept(&self) -> RecurrentShape {
        RecurrentShape {
            tail: self.kernel.saturating_sub(1),
            channels: self.channels(),
            state: self.inner() * self.state,
        }
    }
}

/// Tensors of a Mamba-2 mixer beside its projections, as a checkpoint has them.
#[derive(Clone, Debug)]
pub struct Mamba2Weights {
    /// [channels, kernel].
    pub conv1d: Vec<f32>,
    /// [channels].
    pub conv1d_bias: Option<Vec<f32>>,
    /// [heads], as are `d` and `dt_bias`.
    pub a_log: Vec<f32>,
    pub d: Vec<f32>,
    pub dt_bias: Vec<f32>,
    /// [inner].
    pub norm: Vec<f32>,
}

/// A Mamba-2 mixer without its projections.
#[derive(Clone, Debug)]
pub struct Mamba2 {
    shape: Mamba2Shape,
}

impl Mamba2 {
    /// Takes the weights over.
    ///
    /// # Errors
    /// When the shape is none or a tensor has another number of values.
    pub fn new(shape: Mamba2Shape, _weights: Mamba2Weights) -> Result<Self, BackendError> {
        Ok(Self { shape })
    }

    /// Its shape.
    #[must_use]
    pub fn shape(&self) -> &Mamba2Shape {
        &self.shape
    }

    /// What out_proj reads, `out` [T, inner], of what in_proj gave, `rows` [T, [`Mamba2Shape::projected`]]; the spans' tails
    /// and states in `layer` move on. Runs on the threads of the rayon pool it is called in.
    ///
    /// # Errors
    /// When the lengths don't fit, the spans are not all of the rows in order, or a slot isn't there or named twice.
    #[allow(clippy::too_many_arguments)]
    pub(in crate::backend) fn run(
        &self,
        _isa: Isa,
        _buffers: &BufferPool,
        _rows: &[f32],
        _spans: &[RecurrentSpan],
        _states: &mut RecurrentStates,
        _layer: usize,
        _out: &mut [f32],
    ) -> Result<(), BackendError> {
        Err(BackendError::Failed { context: "mamba2", message: "not there yet".into() })
    }
}
