//! Shapes of layers, what they keep, and what an operation is told beside its tensors.

use super::{Backend, RecurrentShape};
use crate::formats::kv::KvFormat;
use serde::{Deserialize, Serialize};

/// Shape of one attention layer.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct AttentionShape {
    /// The decoder layer it is in.
    pub layer: usize,
    /// Index among the cache's attention layers.
    pub cache: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Keys at least this many positions back are not seen.
    pub window: Option<usize>,
    /// Which of the model's rotations turns queries and keys; `None`: positions are not told.
    pub rope: Option<usize>,
    /// How queries grow with their position.
    pub growth: Option<QueryGrowth>,
    /// What scores are multiplied by; 1/√head_dim in most models.
    pub scale: f32,
}

/// RMS norms over each head's queries and keys, before they turn; or over whole rows, if they are as long.
pub struct HeadNorms<'a, B: Backend> {
    pub q: &'a B::Vector,
    pub k: &'a B::Vector,
    pub eps: f32,
}

/// What an attention layer has beside its products.
pub struct HeadParameters<'a, B: Backend> {
    pub norms: Option<HeadNorms<'a, B>>,
    /// A score of each head, [heads], that joins the softmax and has no value (gpt-oss).
    pub sinks: Option<&'a B::Vector>,
}

/// What enters a gated delta net, one row a token.
pub struct DeltaInputs<T> {
    /// Queries, keys and values before the convolution, [T, channels].
    pub qkv: T,
    /// The output's gate, [T, value heads · value_dim].
    pub z: T,
    /// How much is written, and forgotten, [T, value heads] each.
    pub b: T,
    pub a: T,
}

/// What one attention layer keeps of every token.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerCache {
    pub format: KvFormat,
    pub kv_heads: usize,
    /// Values of a key.
    pub head_dim: usize,
    /// Values of a value.
    pub value_dim: usize,
}

/// What a cache must hold.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CacheLayout {
    /// Attention layers.
    pub layers: Vec<LayerCache>,
    /// Recurrent layers.
    pub recurrent: Vec<RecurrentShape>,
    /// Pages of [`PAGE`] tokens, of every attention layer.
    pub pages: usize,
    /// Sequences whose state every recurrent layer has room for.
    pub slots: usize,
}

/// What a feed-forward computes of `gate` x and `up` x, or of `up` x alone.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum Activation {
    /// silu(gate) · up.
    Silu,
    /// gelu(gate) · up, by the approximation with tanh.
    GeluTanh,
    /// max(up, 0)², without a gate.
    Relu2,
    /// gate' · sigmoid(1.702 gate') · (up' + 1) with gate' = min(gate, limit), up' = clamp(up, ±limit) (gpt-oss).
    ClampedSwiglu { limit: f32 },
}

/// A feed-forward, or one expert of a mixture: down(activation(gate x, up x)).
#[derive(Clone, Copy, Debug)]
pub struct Ffn<'a, L> {
    /// `None`: the activation has none, or `up` gives both, the gate first.
    pub gate: Option<&'a L>,
    pub up: &'a L,
    pub down: &'a L,
    pub activation: Activation,
}

impl Activation {
    /// Whether it has a gate.
    #[must_use]
    pub fn is_gated(self) -> bool {
        self != Self::Relu2
    }
}

/// Neighbouring columns of one of several tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// Which tensor.
    pub source: usize,
    pub first: usize,
    pub count: usize,
}

impl Run {
    /// `count` columns of tensor `source` from `first` on.
    #[must_use]
    pub fn of(source: usize, first: usize, count: usize) -> Self {
        Self { source, first, count }
    }
}

/// How queries grow with their position p: by 1 + beta · ln(1 + ⌊p / original⌋) (Llama 4, Ministral 3).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct QueryGrowth {
    pub beta: f32,
    pub original: f32,
}

impl QueryGrowth {
    /// What the query at `position` is multiplied by.
    #[must_use]
    pub fn at(self, position: usize) -> f32 {
        1.0 + self.beta * libm::logf(1.0 + (position as f32 / self.original).floor())
    }
}
