//! The decoder of Llama, Mistral, Qwen2, Qwen3 and Qwen3-MoE, written once over [`Backend`].

use std::collections::HashMap;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use super::config::{ModelConfig, Moe};
use crate::backend::observe::{FirstBroken, Observed, Observer};
use crate::backend::{self, AttentionShape, Backend, Batch, CacheLayout, PAGE, RopeTable};
use crate::checkpoint::resolve::LinearRole;
use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::formats::kv::KvFormat;

/// Why a model could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error(transparent)]
    Backend(#[from] backend::BackendError),
}

/// A decoder on backend `B`.
pub struct Decoder<B: Backend> {
    pub config: ModelConfig,
    /// Where it was loaded from, for messages.
    folder: PathBuf,
    backend: Arc<B>,
    embedding: Arc<B::Linear>,
    layers: Vec<Layer<B>>,
    norm: Arc<B::Norm>,
    /// `None`: the embedding's weight is the head's.
    head: Option<Arc<B::Linear>>,
    frequencies: Vec<f32>,
    /// What the checkpoint says of each layer's KV cache; `None` leaves it to the caller.
    kv_formats: Vec<Option<KvFormat>>,
}

struct Layer<B: Backend> {
    input_norm: Arc<B::Norm>,
    q: Arc<B::Linear>,
    k: Arc<B::Linear>,
    v: Arc<B::Linear>,
    o: Arc<B::Linear>,
    q_norm: Option<Arc<B::Norm>>,
    k_norm: Option<Arc<B::Norm>>,
    post_norm: Arc<B::Norm>,
    ffn: Ffn<B>,
    window: Option<usize>,
}

impl<B: Backend> Layer<B> {
    fn for_each_linear(&self, mut f: impl FnMut(&B::Linear)) {
        [&self.q, &self.k, &self.v, &self.o].into_iter().for_each(|l| f(l));
        let mlps = match &self.ffn {
            Ffn::Dense(mlp) => std::slice::from_ref(mlp),
            Ffn::Moe { router, experts, .. } => {
                f(router);
                &experts[..]
            }
        };
        mlps.iter().flat_map(|m| [&m.gate, &m.up, &m.down]).for_each(|l| f(l));
    }
}

impl<B: Backend> Layer<B> {
    fn linears_mut(&mut self) -> Vec<&mut Arc<B::Linear>> {
        let mut all = vec![&mut self.q, &mut self.k, &mut self.v, &mut self.o];
        let mlps = match &mut self.ffn {
            Ffn::Dense(mlp) => std::slice::from_mut(mlp),
            Ffn::Moe { router, experts, .. } => {
                all.push(router);
                &mut experts[..]
            }
        };
        all.extend(mlps.iter_mut().flat_map(|m| [&mut m.gate, &mut m.up, &mut m.down]));
        all
    }
}

enum Ffn<B: Backend> {
    Dense(Mlp<B>),
    Moe { router: Arc<B::Linear>, experts: Vec<Mlp<B>>, moe: Moe },
}

/// Which of two linears, the own one or the donor's.
type Choose<'a, B> =
    dyn Fn(&Arc<<B as Backend>::Linear>, &Arc<<B as Backend>::Linear>) -> Arc<<B as Backend>::Linear> + 'a;

impl<B: Backend> Ffn<B> {
    /// This part with each linear replaced by `choose(own, donor's)`; as it is where the donor's is of another kind.
    fn graft(&self, donor: &Self, choose: &Choose<'_, B>) -> Self {
        let mlp = |own: &Mlp<B>, other: &Mlp<B>| Mlp {
            gate: choose(&own.gate, &other.gate),
            up: choose(&own.up, &other.up),
            down: choose(&own.down, &other.down),
        };
        match (self, donor) {
            (Self::Dense(own), Self::Dense(other)) => Self::Dense(mlp(own, other)),
            (Self::Moe { router, experts, moe }, Self::Moe { router: other_router, experts: other, .. }) => Self::Moe {
                router: choose(router, other_router),
                experts: experts.iter().zip(other).map(|(a, b)| mlp(a, b)).collect(),
                moe: *moe,
            },
            _ => self.graft(self, choose),
        }
    }
}

struct Mlp<B: Backend> {
    gate: Arc<B::Linear>,
    up: Arc<B::Linear>,
    down: Arc<B::Linear>,
}

/// Which tokens of a batch get logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// Every token.
    All,
    /// The last of each span.
    Last,
}

impl<B: Backend> Decoder<B> {
    /// Loads the model of `checkpoint`; every tensor in it is used, or the error names it.
    ///
    /// # Errors
    /// Anything wrong with the checkpoint, or a format without a kernel.
    pub fn load(backend: B, checkpoint: &Checkpoint) -> Result<Self, LoadError> {
        Self::load_with_progress(backend, checkpoint, &mut |_, _| {})
    }

    /// As [`Self::load`]; calls `progress(layers done, layers)`.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn load_with_progress(
        backend: B,
        checkpoint: &Checkpoint,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Self, LoadError> {
        let config = ModelConfig::read(&checkpoint.config)?.untied_where_stored(checkpoint)?;
        let roles = config.modules().into_iter().map(|m| (m.name, m.role)).collect();
        let loader = Loader { backend: &backend, checkpoint, config: &config, roles };
        let embedding = loader.linear("model.embed_tokens")?;
        let mut layers = Vec::new();
        let mut kv_formats = Vec::new();
        for index in 0..config.layers {
            let prefix = format!("model.layers.{index}");
            layers.push(loader.layer(index, &prefix)?);
            let scales = checkpoint.kv_scales(&format!("{prefix}.self_attn"))?;
            kv_formats.push(scales.map(|s| KvFormat::Fp8 { k_scale: s.k, v_scale: s.v }));
            checkpoint.tensors.release_pages();
            progress(index + 1, config.layers);
        }
        let norm = loader.norm("model.norm.weight", config.hidden)?;
        let head = (!config.tied_embeddings).then(|| loader.linear("lm_head")).transpose()?;
        checkpoint.finish()?;
        checkpoint.tensors.release_pages();
        let frequencies = config.rope.frequencies(config.head_dim);
        let folder = checkpoint.tensors.folder().into();
        let backend = Arc::new(backend);
        Ok(Self { folder, backend, embedding, layers, norm, head, frequencies, kv_formats, config })
    }

    /// The backend it runs on.
    #[must_use]
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// Calls `f` with every linear layer, embedding and head included.
    pub fn for_each_linear(&self, mut f: impl FnMut(&B::Linear)) {
        f(&self.embedding);
        self.layers.iter().for_each(|l| l.for_each_linear(&mut f));
        self.head.iter().for_each(|l| f(l));
    }

    /// Calls `f` with every norm, the name of its tensor and the decoder layer it is in (`None`: after the last).
    pub fn for_each_norm(&self, mut f: impl FnMut(String, Option<usize>, &B::Norm)) {
        for (index, layer) in self.layers.iter().enumerate() {
            let mut one = |name: &str, norm| f(format!("model.layers.{index}.{name}.weight"), Some(index), norm);
            one("input_layernorm", &layer.input_norm);
            layer.q_norm.iter().for_each(|n| one("self_attn.q_norm", n));
            layer.k_norm.iter().for_each(|n| one("self_attn.k_norm", n));
            one("post_attention_layernorm", &layer.post_norm);
        }
        f("model.norm.weight".into(), None, &self.norm);
    }

    /// The embedding.
    #[must_use]
    pub fn embedding(&self) -> &B::Linear {
        &self.embedding
    }

    /// This model with some layers taken from `donor`, a model of the same shape (its quantized form, say): the linears
    /// whose module `swap` names, and the norms of decoder layers all of whose linears it names. Weights are shared, not
    /// copied.
    #[must_use]
    pub fn graft(&self, donor: &Self, swap: &dyn Fn(&str) -> bool) -> Self {
        let linear = |own: &Arc<B::Linear>, other: &Arc<B::Linear>| {
            Arc::clone(if swap(self.backend.module(own)) { other } else { own })
        };
        let layer = |own: &Layer<B>, other: &Layer<B>| {
            let mut all = true;
            own.for_each_linear(|l| all &= swap(self.backend.module(l)));
            let norms = if all { other } else { own };
            Layer {
                input_norm: norms.input_norm.clone(),
                post_norm: norms.post_norm.clone(),
                q_norm: norms.q_norm.clone(),
                k_norm: norms.k_norm.clone(),
                q: linear(&own.q, &other.q),
                k: linear(&own.k, &other.k),
                v: linear(&own.v, &other.v),
                o: linear(&own.o, &other.o),
                ffn: own.ffn.graft(&other.ffn, &linear),
                window: own.window,
            }
        };
        Self {
            config: self.config.clone(),
            folder: self.folder.clone(),
            backend: self.backend.clone(),
            embedding: linear(&self.embedding, &donor.embedding),
            layers: self.layers.iter().zip(&donor.layers).map(|(a, b)| layer(a, b)).collect(),
            norm: self.norm.clone(),
            head: match (&self.head, &donor.head) {
                (Some(own), Some(other)) => Some(linear(own, other)),
                (own, _) => own.clone(),
            },
            frequencies: self.frequencies.clone(),
            kv_formats: self.kv_formats.clone(),
        }
    }

    /// This model, its weights shared, with an observer.
    fn observed<O: Observer>(&self, observer: O) -> Decoder<Observed<B, O>> {
        let mlp = |m: &Mlp<B>| Mlp { gate: m.gate.clone(), up: m.up.clone(), down: m.down.clone() };
        let layer = |l: &Layer<B>| Layer {
            input_norm: l.input_norm.clone(),
            q: l.q.clone(),
            k: l.k.clone(),
            v: l.v.clone(),
            o: l.o.clone(),
            q_norm: l.q_norm.clone(),
            k_norm: l.k_norm.clone(),
            post_norm: l.post_norm.clone(),
            ffn: match &l.ffn {
                Ffn::Dense(m) => Ffn::Dense(mlp(m)),
                Ffn::Moe { router, experts, moe } => {
                    Ffn::Moe { router: router.clone(), experts: experts.iter().map(mlp).collect(), moe: *moe }
                }
            },
            window: l.window,
        };
        Decoder {
            config: self.config.clone(),
            folder: self.folder.clone(),
            backend: Arc::new(Observed::shared(self.backend.clone(), observer)),
            embedding: self.embedding.clone(),
            layers: self.layers.iter().map(layer).collect(),
            norm: self.norm.clone(),
            head: self.head.clone(),
            frequencies: self.frequencies.clone(),
            kv_formats: self.kv_formats.clone(),
        }
    }

    /// A KV cache for `tokens` tokens in all; `format` where the checkpoint does not fix one.
    ///
    /// # Errors
    /// When the backend cannot make one.
    pub fn new_cache(&self, tokens: usize, format: KvFormat) -> backend::Result<B::Cache> {
        self.backend.new_cache(&CacheLayout {
            formats: self.kv_formats.iter().map(|f| f.unwrap_or(format)).collect(),
            kv_heads: self.config.kv_heads,
            head_dim: self.config.head_dim,
            pages: tokens.div_ceil(PAGE),
        })
    }

    /// Runs `batch` and returns logits [wanted tokens, vocab].
    ///
    /// # Errors
    /// As [`Self::hidden`].
    pub fn forward(&self, batch: &Batch, cache: &mut B::Cache, wanted: Wanted) -> backend::Result<B::Tensor> {
        let mut x = self.hidden(batch, cache)?;
        if wanted == Wanted::Last {
            let ends = batch.spans.iter().scan(0, |end, s| {
                *end += s.len;
                Some(*end - 1)
            });
            x = self.backend.select_rows(&x, &ends.collect::<Vec<_>>())?;
        }
        self.logits(&x)
    }

    /// Logits [rows, vocab] of rows of [`Self::hidden`].
    ///
    /// # Errors
    /// The backend's own failure, or logits that are not finite.
    pub fn logits(&self, hidden: &B::Tensor) -> backend::Result<B::Tensor> {
        let normed = self.final_norm(hidden)?;
        let logits = one(self.backend.linears(&normed, &[self.head()])?)?;
        if self.backend.is_finite(&logits)? {
            return Ok(logits);
        }
        let watch = Observed::shared(self.backend.clone(), FirstBroken::default());
        watch.linears(&normed, &[self.head()])?;
        Err(self.broken(watch.with_observer(|o| o.found())))
    }

    fn broken(&self, found: Option<(String, f32)>) -> backend::BackendError {
        let (place, value) = found.unwrap_or_else(|| ("what comes out of the head".into(), f32::NAN));
        backend::BackendError::NotFinite { model: self.folder.clone(), place, value }
    }

    /// What enters the head, [rows, hidden], of rows of [`Self::hidden`].
    ///
    /// # Errors
    /// The backend's own failure.
    pub fn final_norm(&self, hidden: &B::Tensor) -> backend::Result<B::Tensor> {
        self.backend.rms_norm(hidden, &self.norm, self.config.rms_eps)
    }

    /// The head; the embedding, where the two are tied.
    #[must_use]
    pub fn head(&self) -> &B::Linear {
        self.head.as_ref().unwrap_or(&self.embedding)
    }

    /// Runs `batch` and returns what leaves the last layer, [tokens, hidden], before the final norm.
    ///
    /// # Errors
    /// A token outside the vocabulary, a cache too small, the backend's own failure, or states that are not finite.
    pub fn hidden(&self, batch: &Batch, cache: &mut B::Cache) -> backend::Result<B::Tensor> {
        self.blocks(0..self.layers.len(), &|| self.embed(batch), &self.rope(batch), cache, batch)
    }

    /// What leaves the last of the decoder layers `range` when what `enter` gives, [tokens, hidden], enters the first.
    ///
    /// A residual stream keeps what is no number, and what is so large that its square is none and a norm makes zeros of it,
    /// so it is looked at once, at the end; where something is, the layers run again (over the same cache, which changes
    /// nothing in it) to find the first module that gives it.
    ///
    /// # Errors
    /// As [`Self::block`]; a sequence longer than dynamic RoPE is computed for; and when what leaves is not finite: with the
    /// first module to blame.
    pub fn blocks(
        &self,
        range: Range<usize>,
        enter: &dyn Fn() -> backend::Result<B::Tensor>,
        rope: &RopeTable,
        cache: &mut B::Cache,
        batch: &Batch,
    ) -> backend::Result<B::Tensor> {
        if let Some(bound) = self.config.rope.bound()
            && let Some(longest) = batch.spans.iter().map(|s| s.start + s.len).max().filter(|&l| l > bound)
        {
            return Err(backend::BackendError::Failed {
                context: "RoPE",
                message: format!(
                    "a sequence of {longest} tokens, but this model's dynamic scaling is computed for {bound} at most"
                ),
            });
        }
        let mut x = enter()?;
        for index in range.clone() {
            x = self.block(index, x, rope, cache, batch)?;
        }
        let width = self.config.hidden;
        if self.backend.squares_finite(&x, width)? {
            return Ok(x);
        }
        let watched = self.observed(FirstBroken::default());
        let found = || watched.backend.with_observer(|o| o.found());
        if range.start == 0 {
            watched.embed(batch)?;
        }
        let mut x = enter()?;
        let mut place = format!("the square of what enters `model.layers.{}`", range.start);
        for index in range {
            if found().is_some() || !self.backend.squares_finite(&x, width)? {
                break;
            }
            x = watched.block(index, x, rope, cache, batch)?;
            place = format!("the square of what leaves `model.layers.{index}`");
        }
        Err(self.broken(found().or(Some((place, f32::INFINITY)))))
    }

    /// Rotations of a batch's positions.
    #[must_use]
    pub fn rope(&self, batch: &Batch) -> RopeTable {
        RopeTable::new(&self.frequencies, self.config.rope.attention_factor(), batch.positions())
    }

    /// Embeddings of a batch's tokens, [tokens, hidden].
    ///
    /// # Errors
    /// A token outside the vocabulary, or the backend's own failure.
    pub fn embed(&self, batch: &Batch) -> backend::Result<B::Tensor> {
        self.backend.embed(&self.embedding, &batch.tokens)
    }

    /// What leaves decoder layer `index` when `x` [tokens, hidden] enters it; `rope` is [`Self::rope`] of `batch`.
    ///
    /// # Errors
    /// No such layer, a cache too small, or the backend's own failure.
    pub fn block(
        &self,
        index: usize,
        x: B::Tensor,
        rope: &RopeTable,
        cache: &mut B::Cache,
        batch: &Batch,
    ) -> backend::Result<B::Tensor> {
        let b = &self.backend;
        let layer = self.layers.get(index).ok_or_else(|| backend::BackendError::Failed {
            context: "block",
            message: format!("there is no layer {index} of {}", self.layers.len()),
        })?;
        let h = b.rms_norm(&x, &layer.input_norm, self.config.rms_eps)?;
        let attention = self.attention(index, layer, &h, rope, cache, batch)?;
        let x = b.add(x, &attention)?;
        let h = b.rms_norm(&x, &layer.post_norm, self.config.rms_eps)?;
        let ffn = self.ffn(&layer.ffn, &h)?;
        b.add(x, &ffn)
    }

    /// Puts `linear` in the place of the one with the same module name; whether a decoder layer has one.
    pub fn replace(&mut self, linear: B::Linear) -> bool {
        let backend = &self.backend;
        let name = backend.module(&linear);
        let slot = self.layers.iter_mut().flat_map(Layer::linears_mut).find(|l| backend.module(l) == name);
        let Some(slot) = slot else { return false };
        *slot = Arc::new(linear);
        true
    }

    fn attention(
        &self,
        index: usize,
        layer: &Layer<B>,
        h: &B::Tensor,
        rope: &RopeTable,
        cache: &mut B::Cache,
        batch: &Batch,
    ) -> backend::Result<B::Tensor> {
        let (b, c) = (&self.backend, &self.config);
        let [mut q, mut k, v] = exactly(b.linears(h, &[&layer.q, &layer.k, &layer.v])?)?;
        if let (Some(q_norm), Some(k_norm)) = (&layer.q_norm, &layer.k_norm) {
            q = b.rms_norm(&q, q_norm, c.rms_eps)?;
            k = b.rms_norm(&k, k_norm, c.rms_eps)?;
        }
        let shape = AttentionShape {
            layer: index,
            heads: c.heads,
            kv_heads: c.kv_heads,
            head_dim: c.head_dim,
            window: layer.window,
        };
        let mixed = b.attention(q, k, v, &shape, rope, cache, batch)?;
        one(b.linears(&mixed, &[&layer.o])?)
    }

    fn ffn(&self, ffn: &Ffn<B>, h: &B::Tensor) -> backend::Result<B::Tensor> {
        let b = &self.backend;
        match ffn {
            Ffn::Dense(mlp) => self.mlp(mlp, h),
            Ffn::Moe { router, experts, moe } => {
                let routing = b.route(&one(b.linears(h, &[router])?)?, moe.top_k, moe.normalize)?;
                let mut sum = b.zeros_like(h)?;
                for (e, expert) in experts.iter().enumerate() {
                    let (mut rows, mut weights) = (Vec::new(), Vec::new());
                    for (row, chosen) in routing.iter().enumerate() {
                        if let Some(&(_, weight)) = chosen.iter().find(|c| c.0 == e) {
                            rows.push(row);
                            weights.push(weight);
                        }
                    }
                    if !rows.is_empty() {
                        let y = self.mlp(expert, &b.select_rows(h, &rows)?)?;
                        sum = b.add_rows(sum, &y, &rows, &weights)?;
                    }
                }
                Ok(sum)
            }
        }
    }

    fn mlp(&self, mlp: &Mlp<B>, h: &B::Tensor) -> backend::Result<B::Tensor> {
        let b = &self.backend;
        let [gate, up] = exactly(b.linears(h, &[&mlp.gate, &mlp.up])?)?;
        let h = b.silu_mul(gate, &up)?;
        one(b.linears(&h, &[&mlp.down])?)
    }
}

fn one<T>(tensors: Vec<T>) -> backend::Result<T> {
    exactly::<T, 1>(tensors).map(|[t]| t)
}

fn exactly<T, const N: usize>(tensors: Vec<T>) -> backend::Result<[T; N]> {
    tensors.try_into().map_err(|t: Vec<T>| backend::BackendError::Failed {
        context: "linears",
        message: format!("the backend returned {} tensors for {N} weights", t.len()),
    })
}

/// Finds each part of the model in the checkpoint by its Hugging Face name.
struct Loader<'a, B: Backend> {
    backend: &'a B,
    checkpoint: &'a Checkpoint,
    config: &'a ModelConfig,
    roles: HashMap<String, LinearRole>,
}

impl<B: Backend> Loader<'_, B> {
    fn linear(&self, name: &str) -> Result<Arc<B::Linear>, LoadError> {
        let role = self.roles.get(name).ok_or_else(|| CheckpointError::MissingTensor {
            folder: self.checkpoint.tensors.folder().into(),
            tensor: name.into(),
            why: "the decoder asks for a module that the architecture does not list".into(),
        })?;
        Ok(Arc::new(self.backend.load_linear(self.checkpoint.linear(name, *role)?)?))
    }

    fn norm(&self, name: &str, length: usize) -> Result<Arc<B::Norm>, LoadError> {
        Ok(Arc::new(self.backend.load_norm(self.checkpoint.floats(name, &[length])?)?))
    }

    fn layer(&self, index: usize, prefix: &str) -> Result<Layer<B>, LoadError> {
        let c = self.config;
        let linear = |part: &str| self.linear(&format!("{prefix}.self_attn.{part}"));
        let head_norm = |part: &str| {
            c.qk_norm.then(|| self.norm(&format!("{prefix}.self_attn.{part}.weight"), c.head_dim)).transpose()
        };
        Ok(Layer {
            input_norm: self.norm(&format!("{prefix}.input_layernorm.weight"), c.hidden)?,
            q: linear("q_proj")?,
            k: linear("k_proj")?,
            v: linear("v_proj")?,
            o: linear("o_proj")?,
            q_norm: head_norm("q_norm")?,
            k_norm: head_norm("k_norm")?,
            post_norm: self.norm(&format!("{prefix}.post_attention_layernorm.weight"), c.hidden)?,
            ffn: self.ffn(index, &format!("{prefix}.mlp"))?,
            window: c.windows[index],
        })
    }

    fn ffn(&self, index: usize, prefix: &str) -> Result<Ffn<B>, LoadError> {
        let c = self.config;
        let Some(moe) = c.moe.filter(|_| c.is_moe(index)) else {
            return Ok(Ffn::Dense(self.mlp(prefix)?));
        };
        let router = self.linear(&format!("{prefix}.gate"))?;
        let experts = (0..moe.experts).map(|e| self.mlp(&format!("{prefix}.experts.{e}")));
        Ok(Ffn::Moe { router, experts: experts.collect::<Result<_, _>>()?, moe })
    }

    fn mlp(&self, prefix: &str) -> Result<Mlp<B>, LoadError> {
        let linear = |part: &str| self.linear(&format!("{prefix}.{part}_proj"));
        Ok(Mlp { gate: linear("gate")?, up: linear("up")?, down: linear("down")? })
    }
}
