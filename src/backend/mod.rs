//! The seam between the decoder and what computes it: about twelve fused operations.
//!
//! `cpu` runs packed weights, `autograd` runs candle tensors; a CUDA backend implements the same trait.

pub mod autograd;
pub mod cpu;
pub mod observe;

use std::path::PathBuf;

use crate::formats::kv::KvFormat;
use crate::formats::linear::LinearTensors;
use crate::formats::{all_finite, squares_finite};

/// Tokens of KV cache in one page. A page's keys are stored with the 16 tokens side by side, one per SIMD lane.
pub const PAGE: usize = 16;

/// Version of what is computed: to be raised with every change that changes a bit of any logits, or the tokens that a text
/// becomes. Results that are kept on disk are kept under it, so that another version's are never given out as this one's;
/// `tests/determinism.rs` fails when bits change and this does not.
pub const NUMERICS_VERSION: u32 = 1;

/// Why a backend could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// This combination of weight and activation format has no kernel here.
    #[error("module `{module}`: {backend} has no kernel for {what}")]
    Unsupported { module: String, backend: &'static str, what: String },
    /// A token id outside the vocabulary.
    #[error("token id {token} is outside the vocabulary of {vocab}")]
    TokenOutOfRange { token: u32, vocab: usize },
    /// The KV cache has fewer pages than the batch names.
    #[error("the KV cache holds {capacity} tokens; the batch needs {needed}")]
    CacheTooSmall { capacity: usize, needed: usize },
    /// The model computes NaN or an infinity. Weights are finite (the loader sees to that) and nothing here masks logits, so
    /// a number that is none, -inf included, always comes of an overflow or a wrong scale.
    #[error(
        "{}: the model computes what is no number: {place} is {value} (everything before it is finite); a weight or a \
         scale there is wrong, or overflows", model.display()
    )]
    NotFinite { model: PathBuf, place: String, value: f32 },
    /// The backend's own library failed.
    #[error("{context}: {message}")]
    Failed { context: &'static str, message: String },
}

/// Result of a backend operation.
pub type Result<T> = std::result::Result<T, BackendError>;

/// New tokens of one sequence within a batch.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    /// Which sequence, for backends that keep state per sequence.
    pub slot: usize,
    /// Position of the first new token, i.e. how many are already in the cache.
    pub start: usize,
    /// New tokens.
    pub len: usize,
    /// Pages of the cache that hold this sequence's tokens, in order; enough for `start + len`.
    pub pages: Vec<u32>,
}

/// One forward pass: the new tokens of some sequences, one span after the other.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Batch {
    pub tokens: Vec<u32>,
    pub spans: Vec<Span>,
}

impl Batch {
    /// Position of every token in its sequence.
    pub fn positions(&self) -> impl Iterator<Item = usize> {
        self.spans.iter().flat_map(|s| s.start..s.start + s.len)
    }
}

/// Rotations of one forward pass, each [tokens, head_dim / 2].
#[derive(Clone, Debug)]
pub struct RopeTable {
    pub half: usize,
    pub cos: Vec<f32>,
    pub sin: Vec<f32>,
}

impl RopeTable {
    /// Angles `position · frequency` rounded to f32 as transformers has them; their cosine and sine correctly rounded,
    /// then times `factor` (YaRN's, else 1).
    #[must_use]
    pub fn new(frequencies: &[f32], factor: f32, positions: impl Iterator<Item = usize>) -> Self {
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        for position in positions {
            for &f in frequencies {
                let (s, c) = libm::sincos(f64::from(position as f32 * f));
                cos.push(c as f32 * factor);
                sin.push(s as f32 * factor);
            }
        }
        Self { half: frequencies.len(), cos, sin }
    }
}

/// Shape of one attention layer.
#[derive(Clone, Copy, Debug)]
pub struct AttentionShape {
    /// Index of the layer in the cache.
    pub layer: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Keys at least this many positions back are not seen.
    pub window: Option<usize>,
}

impl AttentionShape {
    /// What scores are multiplied by: 1/√head_dim.
    #[must_use]
    pub fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }
}

/// What a KV cache must hold.
#[derive(Clone, Debug)]
pub struct CacheLayout {
    /// One format per layer.
    pub formats: Vec<KvFormat>,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Pages of [`PAGE`] tokens.
    pub pages: usize,
}

/// How probable a token is where it stands.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenScore {
    /// Natural log of its probability.
    pub log_prob: f64,
    /// Whether no token is more probable, and none as probable has a lower id.
    pub is_greedy: bool,
}

/// Experts chosen for one token: (expert, weight), ascending by expert, so that sums do not depend on the batch.
pub type Routing = Vec<(usize, f32)>;

/// The operations a decoder is made of. Activations are [tokens, features], f32 in value whatever the storage.
pub trait Backend {
    type Tensor;
    type Linear;
    type Norm;
    type Cache;

    /// Takes a linear layer's tensors over, in whatever layout the kernels want.
    ///
    /// # Errors
    /// When there is no kernel for the combination of formats.
    fn load_linear(&self, tensors: LinearTensors<'_>) -> Result<Self::Linear>;

    /// The module that `linear` is, `model.layers.0.mlp.up_proj`.
    fn module<'a>(&self, linear: &'a Self::Linear) -> &'a str;

    /// Takes a norm's weight over, [features].
    fn load_norm(&self, weight: Vec<f32>) -> Result<Self::Norm>;

    /// An empty KV cache.
    fn new_cache(&self, layout: &CacheLayout) -> Result<Self::Cache>;

    /// Rows `tokens` of `table`, a linear's weight [vocab, features].
    fn embed(&self, table: &Self::Linear, tokens: &[u32]) -> Result<Self::Tensor>;

    /// RMS norm over each run of `weight`'s length: whole tokens, or single heads.
    fn rms_norm(&self, x: &Self::Tensor, weight: &Self::Norm, eps: f32) -> Result<Self::Tensor>;

    /// x · Wᵀ + bias for several weights that read the same input, which is quantized once.
    fn linears(&self, x: &Self::Tensor, weights: &[&Self::Linear]) -> Result<Vec<Self::Tensor>>;

    /// Rotates q and k, writes k and v to the cache, and attends causally: q [T, heads·d], k and v [T, kv_heads·d].
    #[allow(clippy::too_many_arguments)]
    fn attention(
        &self,
        q: Self::Tensor,
        k: Self::Tensor,
        v: Self::Tensor,
        shape: &AttentionShape,
        rope: &RopeTable,
        cache: &mut Self::Cache,
        batch: &Batch,
    ) -> Result<Self::Tensor>;

    /// Makes the sequence `to` begin with the first `to.start` tokens of the sequence `from`. Their whole pages are in
    /// both lists; the page in which the two part is copied.
    fn fork(&self, cache: &mut Self::Cache, from: &Span, to: &Span) -> Result<()>;

    /// x + y.
    fn add(&self, x: Self::Tensor, y: &Self::Tensor) -> Result<Self::Tensor>;

    /// silu(gate) · up.
    fn silu_mul(&self, gate: Self::Tensor, up: &Self::Tensor) -> Result<Self::Tensor>;

    /// Softmax over each row's router logits and its `top_k` experts, their weights rescaled to one if `normalize`.
    fn route(&self, logits: &Self::Tensor, top_k: usize, normalize: bool) -> Result<Vec<Routing>>;

    /// The given rows of x, in the given order.
    fn select_rows(&self, x: &Self::Tensor, rows: &[usize]) -> Result<Self::Tensor>;

    /// `sum` with `weights[i] · y[i]` added to row `rows[i]`.
    fn add_rows(&self, sum: Self::Tensor, y: &Self::Tensor, rows: &[usize], weights: &[f32]) -> Result<Self::Tensor>;

    /// A tensor of zeros of the shape of x.
    fn zeros_like(&self, x: &Self::Tensor) -> Result<Self::Tensor>;

    /// How probable token `picks[i].1` is under the softmax of row `picks[i].0` of `logits`.
    fn score(&self, logits: &Self::Tensor, picks: &[(usize, u32)]) -> Result<Vec<TokenScore>>;

    /// Whether no value is NaN or infinite.
    fn is_finite(&self, x: &Self::Tensor) -> Result<bool> {
        Ok(all_finite(&self.to_host(x)?))
    }

    /// Whether a norm over each row of `width` values divides by a finite number.
    fn squares_finite(&self, x: &Self::Tensor, width: usize) -> Result<bool> {
        Ok(squares_finite(&self.to_host(x)?, width))
    }

    /// Values, row-major.
    fn to_host(&self, x: &Self::Tensor) -> Result<Vec<f32>>;
}

/// What [`Backend::score`] is of one row, in f64.
pub(crate) fn score_row(logits: &[f32], token: u32) -> TokenScore {
    let target = logits[token as usize];
    let max = logits.iter().fold(f32::NEG_INFINITY, |m, &v| m.max(v));
    let total: f64 = logits.iter().map(|&v| f64::from(v - max).exp()).sum();
    let is_greedy = logits.iter().position(|&v| v == max) == Some(token as usize);
    TokenScore { log_prob: f64::from(target - max) - total.ln(), is_greedy }
}

/// Softmax over one row of router logits and its `top_k` experts (ties go to the lower index), ascending by expert.
pub(crate) fn route_row(logits: &[f32], top_k: usize, normalize: bool) -> Routing {
    let max = logits.iter().fold(f32::NEG_INFINITY, |m, &v| m.max(v));
    let weights: Vec<f32> = logits.iter().map(|&v| libm::expf(v - max)).collect();
    let total: f32 = weights.iter().sum();
    let mut chosen: Routing = weights.iter().map(|w| w / total).enumerate().collect();
    chosen.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    chosen.truncate(top_k);
    if normalize {
        let kept: f32 = chosen.iter().map(|c| c.1).sum();
        chosen.iter_mut().for_each(|c| c.1 /= kept);
    }
    chosen.sort_by_key(|c| c.0);
    chosen
}
