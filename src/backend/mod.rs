//! The seam between a model and what computes it. What a device could do in one kernel is one operation here; those that
//! are made of others have that as their default, which defines what the fused kernel gives.
//!
//! `cpu` runs packed weights, `autograd` runs candle tensors; a CUDA backend implements the same trait.

pub mod autograd;
pub mod cpu;
pub mod cuda;
mod either;
mod exchange;
pub mod observe;
#[cfg(feature = "parallel")]
pub mod parallel;
mod pass;
pub mod rounded;
mod shapes;

use std::ops::Deref;
use std::path::PathBuf;
use std::sync::Arc;

use recoup_ground::divergence::{Pair, RowError, compare_rows};

pub use self::cpu::recurrent::{DeltaNetShape, DeltaNetWeights, Mamba2Shape, Mamba2Weights, RecurrentShape};
pub use self::either::Either;
pub use self::pass::{Batch, HostPass, PAGE, RopeRows, RopeTable, Rotation, Span};
pub use self::shapes::*;
use crate::formats::linear::LinearTensors;
use crate::formats::{all_finite, squares_finite};
use crate::logits::{
    Draw, RankedScore, RouterRule, Routing, Sampled, SamplingError, Scratch, TokenScore, most_probable, rank_of,
};
use crate::ranks::Link;

/// Version of what is computed: to be raised with every change that changes a bit of any logits, or the tokens that a text
/// becomes. Results that are kept on disk are kept under it, so that another version's are never given out as this one's;
/// `tests/library/backend/determinism.rs` fails when bits change and this does not.
pub const NUMERICS_VERSION: u32 = 2;

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

/// A part of a model and its Hugging Face name: a linear and its module, a norm and its tensor. Clones share the part.
#[derive(Debug)]
pub struct Named<T> {
    pub name: Arc<str>,
    part: Arc<T>,
}

impl<T> Named<T> {
    /// `part` under the name `name`.
    #[must_use]
    pub fn new(name: impl Into<Arc<str>>, part: T) -> Self {
        Self { name: name.into(), part: Arc::new(part) }
    }
}

impl<T> Clone for Named<T> {
    fn clone(&self) -> Self {
        Self { name: self.name.clone(), part: self.part.clone() }
    }
}

impl<T> Deref for Named<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.part
    }
}

/// The tensors of a linear where they are stored, to be had as often as they are wanted.
pub trait Stored: Send + Sync {
    /// Gives them to `take`.
    ///
    /// # Errors
    /// When they cannot be read any more, and what `take` gives.
    fn with(&self, take: &mut dyn FnMut(LinearTensors<'_>) -> Result<()>) -> Result<()>;
}

/// What is to be added to the residual stream.
pub enum Update<'a, B: Backend> {
    /// The product of a mixer's last linear, not computed yet.
    Product { input: B::Tensor, weight: &'a B::Linear },
    /// A sum that is ready.
    Ready(B::Tensor),
}

/// The operations a decoder is made of. Activations are [tokens, features], f32 in value whatever the storage.
///
/// Weights that are spread over ranks (`parallel`) are never split along what is summed over.
pub trait Backend: Send + Sync + Sized {
    type Tensor: Clone + Send;
    type Linear: Send + Sync;
    /// Numbers that are no matrix: a norm's weight, a layer's sinks.
    type Vector: Send + Sync;
    /// A Mamba-2 mixer, and a gated delta net, without their products.
    type Mamba: Send + Sync;
    type DeltaNet: Send + Sync;
    type Cache: Send;
    /// A rotation, ready for every position.
    type Rope: Send + Sync;
    /// What a forward pass needs in every layer.
    type Pass: Send + Sync;

    /// `cpu`, for messages.
    fn name(&self) -> &'static str;

    // What happens at load.

    /// Takes a linear layer's tensors over, in whatever layout the kernels want.
    ///
    /// # Errors
    /// When there is no kernel for the combination of formats.
    fn load_linear(&self, tensors: LinearTensors<'_>) -> Result<Self::Linear>;

    /// Takes over a linear of an expert, of which few are used at a time: `stored` gives the same tensors again, so that a backend
    /// need not keep them. One that keeps everything does as with any other.
    ///
    /// # Errors
    /// As [`Backend::load_linear`].
    #[allow(unused_variables)]
    fn load_expert(&self, tensors: LinearTensors<'_>, stored: Option<Box<dyn Stored>>) -> Result<Self::Linear> {
        self.load_linear(tensors)
    }

    /// Input features of a linear.
    fn inputs(&self, linear: &Self::Linear) -> usize;

    /// Whether a linear's products are of integers, which some units multiply faster than floats.
    fn multiplies_integers(&self, _linear: &Self::Linear) -> bool {
        false
    }

    /// Bytes that a linear's weight takes in memory; of an expert that is not always there, while it is.
    fn resident_bytes(&self, linear: &Self::Linear) -> usize;

    /// Takes numbers over.
    fn load_vector(&self, values: Vec<f32>) -> Result<Self::Vector>;

    /// Takes the numbers of a Mamba-2 mixer over.
    fn load_mamba(&self, shape: Mamba2Shape, weights: Mamba2Weights) -> Result<Self::Mamba>;

    /// Takes the numbers of a gated delta net over.
    fn load_delta_net(&self, shape: DeltaNetShape, weights: DeltaNetWeights) -> Result<Self::DeltaNet>;

    /// Takes a rotation over.
    fn load_rope(&self, rotation: Rotation) -> Result<Self::Rope>;

    /// An empty cache.
    fn new_cache(&self, layout: &CacheLayout) -> Result<Self::Cache>;

    /// Makes the cache one of `pages` pages and `slots` slots, where it has fewer; what it holds stays.
    fn grow(&self, cache: &mut Self::Cache, pages: usize, slots: usize) -> Result<()>;

    /// Makes what recurrent layers keep in slot `to` what they keep in slot `from`.
    fn copy_state(&self, cache: &mut Self::Cache, from: u32, to: u32) -> Result<()>;

    /// Makes the sequence `to` begin with the first `to.start` tokens of the sequence `from`. Their whole pages are in
    /// both lists; the page in which the two part is copied.
    fn fork(&self, cache: &mut Self::Cache, from: &Span, to: &Span) -> Result<()>;

    // What happens in a pass.

    /// Gets what every layer needs of `batch` to where it computes, once for the pass; `ropes` are the model's rotations.
    fn prepare(&self, batch: &Batch, ropes: &[&Self::Rope]) -> Result<Self::Pass>;

    /// Rows of `table`, a linear's weight [vocab, features]: one for each of the pass's tokens.
    fn embed(&self, table: &Self::Linear, pass: &Self::Pass) -> Result<Self::Tensor>;

    /// RMS norm over each run of `weight`'s length: whole tokens, or single heads.
    fn rms_norm(&self, x: &Self::Tensor, weight: &Self::Vector, eps: f32) -> Result<Self::Tensor>;

    /// x · Wᵀ + bias for several weights that read the same input, which is quantized once.
    fn linears(&self, x: &Self::Tensor, weights: &[&Self::Linear]) -> Result<Vec<Self::Tensor>>;

    /// Rotates q and k, writes k and v to the cache, and attends causally: q [T, heads·d], k [T, kv_heads·d],
    /// v [T, kv_heads·value_dim] to [T, heads·value_dim].
    #[allow(clippy::too_many_arguments)]
    fn attention(
        &self,
        q: Self::Tensor,
        k: Self::Tensor,
        v: Self::Tensor,
        sinks: Option<&Self::Vector>,
        shape: &AttentionShape,
        pass: &Self::Pass,
        cache: &mut Self::Cache,
    ) -> Result<Self::Tensor>;

    /// Keys [T, kv_heads·d] as [`Self::attention`] gives them to the cache, rotated; on the host, for observers.
    fn rotated(&self, k: &Self::Tensor, shape: &AttentionShape, pass: &Self::Pass) -> Result<Vec<f32>>;

    /// x + y.
    fn add(&self, x: Self::Tensor, y: &Self::Tensor) -> Result<Self::Tensor>;

    /// silu(gate) · up.
    fn silu_mul(&self, gate: Self::Tensor, up: &Self::Tensor) -> Result<Self::Tensor>;

    /// The experts of each row's router logits.
    fn route(&self, logits: &Self::Tensor, rule: &RouterRule) -> Result<Vec<Routing>>;

    /// The given rows of x, in the given order.
    fn select_rows(&self, x: &Self::Tensor, rows: &[usize]) -> Result<Self::Tensor>;

    /// `sum` with `weights[i] · y[i]` added to row `rows[i]`.
    fn add_rows(&self, sum: Self::Tensor, y: &Self::Tensor, rows: &[usize], weights: &[f32]) -> Result<Self::Tensor>;

    /// A tensor of zeros of the shape of x.
    fn zeros_like(&self, x: &Self::Tensor) -> Result<Self::Tensor>;

    // What a kernel may do at once.

    /// `x` with `update` added.
    fn residual(&self, x: Self::Tensor, update: Update<'_, Self>) -> Result<Self::Tensor> {
        let y = match update {
            Update::Product { input, weight } => one(self.linears(&input, &[weight])?)?,
            Update::Ready(y) => y,
        };
        self.add(x, &y)
    }

    /// `x` with `update` added, and the norm of that, which `readers` are going to read: it may be quantized for them
    /// already.
    #[allow(unused_variables)]
    fn residual_norm(
        &self,
        x: Self::Tensor,
        update: Update<'_, Self>,
        norm: &Self::Vector,
        eps: f32,
        readers: &[&Self::Linear],
    ) -> Result<(Self::Tensor, Self::Tensor)> {
        let x = self.residual(x, update)?;
        let normed = self.rms_norm(&x, norm, eps)?;
        Ok((x, normed))
    }

    /// [`Self::attention`] of queries and keys that are normed first, head by head.
    #[allow(clippy::too_many_arguments)]
    fn normed_attention(
        &self,
        mut q: Self::Tensor,
        mut k: Self::Tensor,
        v: Self::Tensor,
        heads: HeadParameters<'_, Self>,
        shape: &AttentionShape,
        pass: &Self::Pass,
        cache: &mut Self::Cache,
    ) -> Result<Self::Tensor> {
        if let Some(norms) = heads.norms {
            q = self.rms_norm(&q, norms.q, norms.eps)?;
            k = self.rms_norm(&k, norms.k, norms.eps)?;
        }
        self.attention(q, k, v, heads.sinks, shape, pass, cache)
    }

    /// What a feed-forward's last linear reads: activation(gate x, up x).
    fn expanded(&self, x: &Self::Tensor, ffn: &Ffn<'_, Self::Linear>) -> Result<Self::Tensor> {
        expanded_by_parts(self, x, ffn)
    }

    /// The weighted sum of what each token's experts make of its row of `x`, added in the order of experts; its row of
    /// `routed` is what the router reads.
    fn mixture(
        &self,
        x: &Self::Tensor,
        routed: &Self::Tensor,
        router: &Self::Linear,
        experts: &[Ffn<'_, Self::Linear>],
        rule: &RouterRule,
    ) -> Result<Self::Tensor> {
        mixture_by_expert(self, x, routed, router, experts, rule)
    }

    // What only some architectures need.

    /// activation(x, up); of x alone where it has no gate.
    fn activate(&self, x: Self::Tensor, up: Option<&Self::Tensor>, activation: Activation) -> Result<Self::Tensor>;

    /// x · sigmoid(gate), `gate` of x's shape or with one value a row.
    fn gate(&self, x: Self::Tensor, gate: &Self::Tensor) -> Result<Self::Tensor>;

    /// x · factor.
    fn scale(&self, x: Self::Tensor, factor: f32) -> Result<Self::Tensor>;

    /// The runs, side by side, of every row.
    fn rearrange(&self, sources: &[&Self::Tensor], runs: &[Run]) -> Result<Self::Tensor>;

    /// A Mamba-2 mixer between its two products, x [T, inner | channels | heads] → [T, inner]: convolution, recurrence, and
    /// the norm over what z gates. Reads and leaves the state that recurrent layer `layer` of the cache keeps in each span's
    /// slot; a span that starts at 0 begins anew.
    fn mamba(
        &self,
        x: Self::Tensor,
        mixer: &Self::Mamba,
        layer: usize,
        pass: &Self::Pass,
        cache: &mut Self::Cache,
    ) -> Result<Self::Tensor>;

    /// A gated delta net between its products, → [T, value heads · value_dim]; state as in [`Backend::mamba`].
    fn delta_net(
        &self,
        inputs: DeltaInputs<Self::Tensor>,
        mixer: &Self::DeltaNet,
        layer: usize,
        pass: &Self::Pass,
        cache: &mut Self::Cache,
    ) -> Result<Self::Tensor>;

    // What is read off logits [rows, vocab].

    /// How probable token `picks[i].1` is under the softmax of row `picks[i].0`.
    fn score(&self, logits: &Self::Tensor, picks: &[(usize, u32)]) -> Result<Vec<TokenScore>>;

    /// How probable token `tokens[i]` is under the softmax of row `i`, as [`Backend::score`] says it, its rank, and the
    /// `count` most probable tokens there.
    fn score_ranked(&self, logits: &Self::Tensor, tokens: &[u32], count: usize) -> Result<Vec<RankedScore>> {
        score_ranked_on_host(self, logits, tokens, count)
    }

    /// The token that `draws[i]` chooses from row `i`: [`Draw::choose`] to the last bit.
    fn sample(
        &self,
        logits: &Self::Tensor,
        draws: &[Draw<'_>],
        scratch: &mut Scratch,
    ) -> Result<Vec<std::result::Result<Sampled, SamplingError>>> {
        let host = self.to_host(logits)?;
        Ok(sample_rows(&host, draws, scratch))
    }

    /// [`Backend::sample`], with log-probabilities as [`Backend::score`] has them: a token is as probable where it was drawn as
    /// where it is given, to the last bit.
    fn sample_scored(
        &self,
        logits: &Self::Tensor,
        draws: &[Draw<'_>],
        scratch: &mut Scratch,
    ) -> Result<Vec<std::result::Result<Sampled, SamplingError>>> {
        let mut sampled = self.sample(logits, draws, scratch)?;
        let told = |s: &&mut Sampled| s.logprob.is_some();
        let picks_of = |(row, s): (usize, &Sampled)| {
            let tokens = std::iter::once(s.token).chain(s.top_logprobs.iter().map(|top| top.0));
            tokens.map(|token| (row, token)).collect::<Vec<_>>()
        };
        let rows = sampled.iter().enumerate().filter_map(|(row, s)| Some((row, s.as_ref().ok()?)));
        let picks: Vec<(usize, u32)> = rows.filter(|(_, s)| s.logprob.is_some()).flat_map(picks_of).collect();
        if picks.is_empty() {
            return Ok(sampled);
        }
        let mut scores = self.score(logits, &picks)?.into_iter().map(|score| score.log_prob as f32);
        for s in sampled.iter_mut().filter_map(|s| s.as_mut().ok()).filter(told) {
            s.logprob = scores.next();
            s.top_logprobs.iter_mut().zip(&mut scores).for_each(|(top, score)| top.1 = score);
        }
        Ok(sampled)
    }

    /// Losses and divergence of row `i` of `model` from row `i` of `baseline`, where `targets[i]` is the right token; of
    /// each row the first `vocab` logits count.
    fn compare(
        &self,
        baseline: &Self::Tensor,
        model: &Self::Tensor,
        vocab: usize,
        targets: &[u32],
    ) -> Result<Vec<std::result::Result<Pair, RowError>>> {
        let (baseline, model) = (self.to_host(baseline)?, self.to_host(model)?);
        let row = |logits: &[f32]| (logits.len() / targets.len().max(1)).max(1);
        let rows = baseline.chunks(row(&baseline)).zip(model.chunks(row(&model)));
        Ok(rows.zip(targets).map(|((a, b), t)| compare_rows(&a[..vocab], &b[..vocab], *t as usize)).collect())
    }

    /// Whether no value is NaN or infinite.
    fn is_finite(&self, x: &Self::Tensor) -> Result<bool> {
        Ok(all_finite(&self.to_host(x)?))
    }

    /// Whether a norm over each row of `width` values divides by a finite number.
    fn squares_finite(&self, x: &Self::Tensor, width: usize) -> Result<bool> {
        Ok(squares_finite(&self.to_host(x)?, width))
    }

    // What goes between ranks, over the host where a device knows no better.

    /// The same backend as one of the ranks of `world`, of which `team` are those of its stage; all of them call it at the same time.
    ///
    /// # Errors
    /// When it cannot reach the others.
    #[allow(unused_variables)]
    fn joined(self, world: &dyn Link, team: &dyn Link) -> Result<Self> {
        Ok(self)
    }

    /// Other ranks are lost, or wait for what never comes: nothing of them is to be waited for, now or when this is put away.
    fn abandon(&self) {}

    /// By what its tensors get to other ranks, in words, where that is worth a word.
    fn exchanges_by(&self) -> Option<String> {
        None
    }

    /// What all ranks of `link` have, one after the other, at each of them: this one the rows of `own`, rank r `rows[r]` rows of
    /// `columns`.
    ///
    /// # Errors
    /// The backend's own.
    fn spread_rows(
        &self,
        link: &dyn Link,
        own: &[Self::Tensor],
        rows: &[usize],
        columns: usize,
    ) -> Result<Self::Tensor> {
        exchange::spread_rows(self, link, own, rows, columns)
    }

    /// What all ranks of `link` have of the columns of a tensor, side by side at each of them; `pieces[r]`: the first column of rank
    /// r's, and how many. A tensor of `shape`, rows and columns.
    ///
    /// # Errors
    /// The backend's own.
    fn spread_columns(
        &self,
        link: &dyn Link,
        own: Option<&Self::Tensor>,
        pieces: &[(usize, usize)],
        shape: (usize, usize),
    ) -> Result<Self::Tensor> {
        exchange::spread_columns(self, link, own, pieces, shape)
    }

    /// Gives rank `to` of `link` a tensor.
    ///
    /// # Errors
    /// The backend's own.
    fn give(&self, link: &dyn Link, to: usize, x: &Self::Tensor) -> Result<()> {
        exchange::give(self, link, to, x)
    }

    /// Takes the tensor of `rows` rows and `columns` columns that rank `from` of `link` gives.
    ///
    /// # Errors
    /// The backend's own.
    fn take(&self, link: &dyn Link, from: usize, shape: (usize, usize)) -> Result<Self::Tensor> {
        exchange::take(self, link, from, shape)
    }

    // To and from the host.

    /// A tensor of `data`, row-major in rows of `columns`.
    ///
    /// # Errors
    /// When `data` is not a whole number of rows.
    fn tensor(&self, data: Vec<f32>, columns: usize) -> Result<Self::Tensor>;

    /// Values, row-major.
    fn to_host(&self, x: &Self::Tensor) -> Result<Vec<f32>>;
}

/// [`Backend::expanded`], one operation after the other.
fn expanded_by_parts<B: Backend>(backend: &B, x: &B::Tensor, ffn: &Ffn<'_, B::Linear>) -> Result<B::Tensor> {
    let [gate, up] = match ffn.gate {
        Some(gate) => exactly(backend.linears(x, &[gate, ffn.up])?)?,
        None => {
            let up = one(backend.linears(x, &[ffn.up])?)?;
            if !ffn.activation.is_gated() {
                return backend.activate(up, None, ffn.activation);
            }
            let half = backend.inputs(ffn.down);
            [backend.rearrange(&[&up], &[Run::of(0, 0, half)])?, backend.rearrange(&[&up], &[Run::of(0, half, half)])?]
        }
    };
    match ffn.activation {
        Activation::Silu => backend.silu_mul(gate, &up),
        other => backend.activate(gate, Some(&up), other),
    }
}

/// [`Backend::mixture`], one expert after the other.
fn mixture_by_expert<B: Backend>(
    backend: &B,
    x: &B::Tensor,
    routed: &B::Tensor,
    router: &B::Linear,
    experts: &[Ffn<'_, B::Linear>],
    rule: &RouterRule,
) -> Result<B::Tensor> {
    let routing = backend.route(&one(backend.linears(routed, &[router])?)?, rule)?;
    let mut takers: Vec<(Vec<usize>, Vec<f32>)> = vec![Default::default(); experts.len()];
    for (row, chosen) in routing.iter().enumerate() {
        for &(expert, weight) in chosen {
            takers[expert].0.push(row);
            takers[expert].1.push(weight);
        }
    }
    let mut sum = backend.zeros_like(x)?;
    for (expert, (rows, weights)) in experts.iter().zip(&takers).filter(|(_, (rows, _))| !rows.is_empty()) {
        let h = backend.expanded(&backend.select_rows(x, rows)?, expert)?;
        let y = one(backend.linears(&h, &[expert.down])?)?;
        sum = backend.add_rows(sum, &y, rows, weights)?;
    }
    Ok(sum)
}

/// [`Backend::score_ranked`], ranks found on the host.
fn score_ranked_on_host<B: Backend>(
    backend: &B,
    logits: &B::Tensor,
    tokens: &[u32],
    count: usize,
) -> Result<Vec<RankedScore>> {
    let host = backend.to_host(logits)?;
    let vocab = host.len() / tokens.len().max(1);
    if let Some(&token) = tokens.iter().find(|t| **t as usize >= vocab) {
        return Err(BackendError::TokenOutOfRange { token, vocab });
    }
    let rows = || host.chunks(vocab.max(1)).zip(tokens.iter().copied());
    let tops: Vec<Vec<u32>> = rows().map(|(row, _)| most_probable(row, count)).collect();
    let of_row = |(row, (&token, top)): (usize, (&u32, &Vec<u32>))| {
        std::iter::once(token).chain(top.iter().copied()).map(|t| (row, t)).collect::<Vec<_>>()
    };
    let picks: Vec<(usize, u32)> = tokens.iter().zip(&tops).enumerate().flat_map(of_row).collect();
    let mut scores = backend.score(logits, &picks)?.into_iter().map(|s| s.log_prob);
    let mut next = || scores.next().unwrap_or(f64::NAN);
    let ranked = |((row, token), top): ((&[f32], u32), &Vec<u32>)| RankedScore {
        log_prob: next(),
        rank: rank_of(row, token),
        top: top.iter().map(|&t| (t, next())).collect(),
    };
    Ok(rows().zip(&tops).map(ranked).collect())
}

/// [`Backend::sample`] of logits on the host.
fn sample_rows(
    logits: &[f32],
    draws: &[Draw<'_>],
    scratch: &mut Scratch,
) -> Vec<std::result::Result<Sampled, SamplingError>> {
    let vocab = logits.len() / draws.len().max(1);
    let rows = logits.chunks(vocab.max(1)).zip(draws);
    rows.map(|(row, draw)| draw.choose(row, scratch)).collect()
}

/// The only one of the tensors that a backend gave for one weight.
pub(crate) fn one<T>(tensors: Vec<T>) -> Result<T> {
    exactly::<T, 1>(tensors).map(|[t]| t)
}

/// The tensors that a backend gave for `N` weights.
pub(crate) fn exactly<T, const N: usize>(tensors: Vec<T>) -> Result<[T; N]> {
    tensors.try_into().map_err(|t: Vec<T>| BackendError::Failed {
        context: "linears",
        message: format!("the backend returned {} tensors for {N} weights", t.len()),
    })
}
