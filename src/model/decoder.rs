//! The decoder of every architecture, written once over [`Backend`].

use std::collections::HashMap;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use super::config::ModelConfig;
use super::layer::{Inputs, Layer, Mixer, Mixture, Mlp, Step};
use crate::backend::observe::{FirstBroken, Observed, Observer, held};
use crate::backend::rounded::{Rounded, Rounding};
use crate::backend::{
    self, Backend, BackendError, Batch, CacheLayout, DeltaInputs, HeadNorms, HeadParameters, LayerCache, Named, PAGE,
    RecurrentShape, Update, exactly, one,
};
use crate::checkpoint::CheckpointError;
use crate::formats::kv::KvFormat;

/// Why a model could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error(transparent)]
    Backend(#[from] BackendError),
}

/// A decoder on backend `B`.
pub struct Decoder<B: Backend> {
    pub config: ModelConfig,
    /// Where it was loaded from, for messages.
    pub(super) folder: PathBuf,
    pub(super) backend: Arc<B>,
    pub(super) embedding: Named<B::Linear>,
    pub(super) layers: Vec<Layer<B>>,
    pub(super) norm: Named<B::Vector>,
    /// `None`: the embedding's weight is the head's.
    pub(super) head: Option<Named<B::Linear>>,
    pub(super) ropes: Arc<Vec<B::Rope>>,
    /// What each layer caches, and the format if the checkpoint says it; else it is left to the caller.
    pub(super) caches: Vec<(LayerCache, Option<KvFormat>)>,
    /// What recurrent layers keep of each sequence.
    pub(super) recurrent: Vec<RecurrentShape>,
}

/// Queries, keys, values, and what gates the output.
type AttentionInputs<T> = (T, T, T, Option<T>);

/// Which tokens of a batch get logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// Every token.
    All,
    /// The last of each span.
    Last,
}

impl<B: Backend> Decoder<B> {
    /// The backend it runs on.
    #[must_use]
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// Every linear, embedding and head included, in the order of the forward pass.
    pub fn linears(&self) -> impl Iterator<Item = &Named<B::Linear>> {
        let layers = self.layers.iter().flat_map(Layer::linears);
        std::iter::once(&self.embedding).chain(layers).chain(&self.head)
    }

    /// Every norm or other vector and the decoder layer it is in (`None`: after the last).
    pub fn vectors(&self) -> impl Iterator<Item = (Option<usize>, &Named<B::Vector>)> {
        let layers = self.layers.iter().enumerate();
        let layers = layers.flat_map(|(i, layer)| layer.vectors().into_iter().map(move |n| (Some(i), n)));
        layers.chain(std::iter::once((None, &self.norm)))
    }

    /// Mamba-2 mixers, under the names of their modules, and the layers they are in.
    pub fn mambas(&self) -> impl Iterator<Item = (usize, &Named<B::Mamba>)> {
        self.mixers().filter_map(|(i, m)| if let Mixer::Mamba(m) = m { Some((i, &m.mixer)) } else { None })
    }

    /// Gated delta nets likewise.
    pub fn delta_nets(&self) -> impl Iterator<Item = (usize, &Named<B::DeltaNet>)> {
        self.mixers().filter_map(|(i, m)| if let Mixer::DeltaNet(d) = m { Some((i, &d.mixer)) } else { None })
    }

    fn mixers(&self) -> impl Iterator<Item = (usize, &Mixer<B>)> {
        let layers = self.layers.iter().enumerate();
        layers.flat_map(|(i, layer)| layer.steps.iter().map(move |s| (i, &s.mixer)))
    }

    /// The embedding.
    #[must_use]
    pub fn embedding(&self) -> &B::Linear {
        &self.embedding
    }

    /// This model with some layers taken from `donor`, a model of the same shape (its quantized form, say): the linears
    /// whose module `swap` names, and the vectors of decoder layers all of whose linears it names. Weights are shared, not
    /// copied.
    #[must_use]
    pub fn graft(&self, donor: &Self, swap: &dyn Fn(&str) -> bool) -> Self {
        let linears: HashMap<&str, &Named<B::Linear>> = donor.linears().map(|l| (&*l.name, l)).collect();
        let vectors: HashMap<&str, &Named<B::Vector>> = donor.vectors().map(|(_, n)| (&*n.name, n)).collect();
        let linear = |own: &Named<B::Linear>| {
            let other = linears.get(&*own.name).filter(|l| swap(&l.name));
            other.map_or_else(|| own.clone(), |l| (*l).clone())
        };
        let layer = |own: &Layer<B>| {
            let all = own.linears().iter().all(|l| swap(&l.name));
            own.map(linear, |n: &Named<B::Vector>| {
                let other = vectors.get(&*n.name).filter(|_| all);
                other.map_or_else(|| n.clone(), |n| (*n).clone())
            })
        };
        Self {
            embedding: linear(&self.embedding),
            layers: self.layers.iter().map(layer).collect(),
            head: self.head.as_ref().map(linear),
            config: self.config.clone(),
            folder: self.folder.clone(),
            backend: self.backend.clone(),
            norm: self.norm.clone(),
            ropes: self.ropes.clone(),
            caches: self.caches.clone(),
            recurrent: self.recurrent.clone(),
        }
    }

    /// This model, its weights shared, with an observer.
    #[must_use]
    pub fn observed(&self, observer: Box<dyn Observer + Send>) -> Decoder<Observed<B>> {
        let linear = |l: &Named<B::Linear>| Named::new(l.name.clone(), l.clone());
        Decoder {
            embedding: linear(&self.embedding),
            layers: self.layers.iter().map(|l| l.map(linear, Named::clone)).collect(),
            norm: self.norm.clone(),
            head: self.head.as_ref().map(linear),
            config: self.config.clone(),
            folder: self.folder.clone(),
            backend: Arc::new(Observed::shared(self.backend.clone(), observer)),
            ropes: self.ropes.clone(),
            caches: self.caches.clone(),
            recurrent: self.recurrent.clone(),
        }
    }

    /// This model, its weights shared, computed with every result rounded.
    #[must_use]
    pub fn rounded(&self, rounding: Rounding) -> Decoder<Rounded<B>> {
        Decoder {
            embedding: self.embedding.clone(),
            layers: self.layers.iter().map(|l| l.map(Named::clone, Named::clone)).collect(),
            norm: self.norm.clone(),
            head: self.head.clone(),
            config: self.config.clone(),
            folder: self.folder.clone(),
            backend: Arc::new(Rounded::shared(self.backend.clone(), rounding)),
            ropes: self.ropes.clone(),
            caches: self.caches.clone(),
            recurrent: self.recurrent.clone(),
        }
    }

    /// A cache for `tokens` tokens of `sequences` sequences in all; `format` where the checkpoint does not fix one.
    ///
    /// # Errors
    /// When the backend cannot make one.
    pub fn new_cache(&self, tokens: usize, sequences: usize, format: KvFormat) -> backend::Result<B::Cache> {
        let layer =
            |&(shape, own): &(LayerCache, Option<KvFormat>)| LayerCache { format: own.unwrap_or(format), ..shape };
        self.backend.new_cache(&CacheLayout {
            layers: self.caches.iter().map(layer).collect(),
            recurrent: self.recurrent.clone(),
            pages: tokens.div_ceil(PAGE),
            slots: sequences,
        })
    }

    /// Bytes of a page of the cache, over all layers, where keys and values are kept as the checkpoint says it, else as `format`.
    #[must_use]
    pub fn page_bytes(&self, format: KvFormat) -> usize {
        let layer = |(shape, own): &(LayerCache, Option<KvFormat>)| {
            shape.kv_heads * (shape.head_dim + shape.value_dim) * PAGE * own.unwrap_or(format).bytes()
        };
        self.caches.iter().map(layer).sum()
    }

    /// Bytes that recurrent layers keep of one sequence; 0 where there are none.
    #[must_use]
    pub fn state_bytes(&self) -> usize {
        self.recurrent.iter().map(RecurrentShape::bytes).sum()
    }

    /// The longest sequence that it is computed for, where RoPE's rule has a bound (dynamic scaling).
    #[must_use]
    pub fn context_bound(&self) -> Option<usize> {
        self.config.ropes.iter().filter_map(|(rope, _)| rope.bound()).min()
    }

    /// How keys and values are kept: as the checkpoint says it, else as `format`.
    #[must_use]
    pub fn cache_format(&self, format: KvFormat) -> KvFormat {
        self.caches.first().and_then(|(_, own)| *own).unwrap_or(format)
    }

    /// What the layers need of `batch`; the same for all of them.
    ///
    /// # Errors
    /// A sequence longer than dynamic RoPE is computed for, or the backend's own failure.
    pub fn pass(&self, batch: &Batch) -> backend::Result<B::Pass> {
        if let Some(bound) = self.context_bound().filter(|&bound| batch.reach() > bound) {
            return Err(BackendError::Failed {
                context: "RoPE",
                message: format!(
                    "a sequence of {} tokens, but this model's dynamic scaling is computed for {bound} at most",
                    batch.reach()
                ),
            });
        }
        self.backend.prepare(batch, &self.ropes.iter().collect::<Vec<_>>())
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
        self.head_logits(&self.final_norm(hidden)?)
    }

    /// Logits [rows, vocab] of what enters the head, [rows, hidden].
    ///
    /// # Errors
    /// As [`Self::logits`].
    pub fn head_logits(&self, normed: &B::Tensor) -> backend::Result<B::Tensor> {
        let logits = one(self.backend.linears(normed, &[self.head()])?)?;
        if self.backend.is_finite(&logits)? {
            return Ok(logits);
        }
        let first = Arc::new(Mutex::new(FirstBroken::default()));
        let watched = self.observed(Box::new(first.clone()));
        watched.backend.linears(normed, &[watched.head()])?;
        Err(self.broken(held(&first).found()))
    }

    fn broken(&self, found: Option<(String, f32)>) -> BackendError {
        let (place, value) = found.unwrap_or_else(|| ("what comes out of the head".into(), f32::NAN));
        BackendError::NotFinite { model: self.folder.clone(), place, value }
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
        let pass = self.pass(batch)?;
        self.blocks(0..self.layers.len(), &|| self.embed(&pass), &pass, cache)
    }

    /// What leaves the last of the decoder layers `range` when what `enter` gives, [tokens, hidden], enters the first.
    ///
    /// A residual stream keeps what is no number, and what is so large that its square is none and a norm makes zeros of it,
    /// so it is looked at once, at the end; where something is, the layers run again to find the first module that gives it
    /// (over the same cache, which changes nothing in what attention keeps; recurrent states have moved on).
    ///
    /// # Errors
    /// As [`Self::block`]; and when what leaves is not finite: with the first module to blame.
    pub fn blocks(
        &self,
        range: Range<usize>,
        enter: &dyn Fn() -> backend::Result<B::Tensor>,
        pass: &B::Pass,
        cache: &mut B::Cache,
    ) -> backend::Result<B::Tensor> {
        let x = self.run(range.clone(), enter()?, pass, cache)?;
        let width = self.config.hidden;
        if self.backend.squares_finite(&x, width)? {
            return Ok(x);
        }
        let first = Arc::new(Mutex::new(FirstBroken::default()));
        let watched = self.observed(Box::new(first.clone()));
        let found = || held(&first).found();
        if range.start == 0 {
            watched.embed(pass)?;
        }
        let mut x = enter()?;
        let mut place = format!("the square of what enters `{}.{}`", self.config.names.layers, range.start);
        for index in range {
            if found().is_some() || !self.backend.squares_finite(&x, width)? {
                break;
            }
            x = watched.block(index, x, pass, cache)?;
            place = format!("the square of what leaves `{}.{index}`", self.config.names.layers);
        }
        Err(self.broken(found().or(Some((place, f32::INFINITY)))))
    }

    /// Embeddings of a pass's tokens, [tokens, hidden].
    ///
    /// # Errors
    /// A token outside the vocabulary, or the backend's own failure.
    pub fn embed(&self, pass: &B::Pass) -> backend::Result<B::Tensor> {
        let embedded = self.backend.embed(&self.embedding, pass)?;
        match self.config.embedding_scale {
            Some(factor) => self.backend.scale(embedded, factor),
            None => Ok(embedded),
        }
    }

    /// What leaves decoder layer `index` when `x` [tokens, hidden] enters it.
    ///
    /// # Errors
    /// No such layer, a cache too small, or the backend's own failure.
    pub fn block(
        &self,
        index: usize,
        x: B::Tensor,
        pass: &B::Pass,
        cache: &mut B::Cache,
    ) -> backend::Result<B::Tensor> {
        self.run(index..index + 1, x, pass, cache)
    }

    /// The layers `range` in a row. What a step adds to the stream is added when the next step's norm reads it, so that a
    /// kernel can do both at once.
    fn run(
        &self,
        range: Range<usize>,
        mut x: B::Tensor,
        pass: &B::Pass,
        cache: &mut B::Cache,
    ) -> backend::Result<B::Tensor> {
        let b = &*self.backend;
        let layers = self.layers.get(range.clone()).ok_or_else(|| BackendError::Failed {
            context: "block",
            message: format!("there are no layers {range:?} of {}", self.layers.len()),
        })?;
        let mut update = None;
        for step in layers.iter().flat_map(|l| &l.steps) {
            let (norm, eps) = (&step.norm, self.config.rms_eps);
            let h = match update.take() {
                None => b.rms_norm(&x, norm, eps)?,
                Some(update) => {
                    let h;
                    (x, h) = b.residual_norm(x, update, norm, eps, &step.mixer.readers())?;
                    h
                }
            };
            update = Some(match (self.mix(step, &h, pass, cache)?, &step.after) {
                (update, None) => update,
                (Update::Ready(y), Some(after)) => Update::Ready(b.rms_norm(&y, after, eps)?),
                (Update::Product { input, weight }, Some(after)) => {
                    Update::Ready(b.rms_norm(&one(b.linears(&input, &[weight])?)?, after, eps)?)
                }
            });
        }
        match update {
            None => Ok(x),
            Some(update) => b.residual(x, update),
        }
    }

    /// What a step adds to the stream, of its normed input.
    fn mix<'a>(
        &'a self,
        step: &'a Step<B>,
        h: &B::Tensor,
        pass: &B::Pass,
        cache: &mut B::Cache,
    ) -> backend::Result<Update<'a, B>> {
        let b = &*self.backend;
        match &step.mixer {
            Mixer::Attention(a) => {
                let (q, k, v, gate) = self.inputs(&a.inputs, h)?;
                let norms = a.norms.as_ref();
                let norms = norms.map(|[q, k]| HeadNorms { q: &**q, k: &**k, eps: self.config.rms_eps });
                let heads = HeadParameters { norms, sinks: a.sinks.as_deref() };
                let mut input = b.normed_attention(q, k, v, heads, &a.shape, pass, cache)?;
                if let Some(gate) = gate {
                    input = b.gate(input, &gate)?;
                }
                Ok(Update::Product { input, weight: &a.o })
            }
            Mixer::Mamba(m) => {
                let x = one(b.linears(h, &[&m.input])?)?;
                let input = b.mamba(x, &m.mixer, m.cache, pass, cache)?;
                Ok(Update::Product { input, weight: &m.output })
            }
            Mixer::DeltaNet(d) => {
                let [qkv, z, write, forget] = exactly(b.linears(h, &d.inputs.each_ref().map(|l| &**l))?)?;
                let inputs = DeltaInputs { qkv, z, b: write, a: forget };
                let input = b.delta_net(inputs, &d.mixer, d.cache, pass, cache)?;
                Ok(Update::Product { input, weight: &d.output })
            }
            Mixer::Mlp(m) => Ok(Update::Product { input: b.expanded(h, &m.ffn())?, weight: &m.down }),
            Mixer::Mixture(m) => Ok(Update::Ready(self.mixture(m, h)?)),
        }
    }

    /// Queries, keys and values of the step's normed input, and what gates the output.
    fn inputs(&self, inputs: &Inputs<B>, h: &B::Tensor) -> backend::Result<AttentionInputs<B::Tensor>> {
        let b = &*self.backend;
        match inputs {
            Inputs::Separate(qkv) => {
                let [q, k, v] = exactly(b.linears(h, &qkv.each_ref().map(|l| &**l))?)?;
                Ok((q, k, v, None))
            }
            Inputs::Gated(qkv, [q_runs, gate_runs]) => {
                let [q, k, v] = exactly(b.linears(h, &qkv.each_ref().map(|l| &**l))?)?;
                Ok((b.rearrange(&[&q], q_runs)?, k, v, Some(b.rearrange(&[&q], gate_runs)?)))
            }
            Inputs::Fused(qkv, [q, k, v]) => {
                let all = one(b.linears(h, &[qkv])?)?;
                let part = |runs| b.rearrange(&[&all], runs);
                Ok((part(q)?, part(k)?, part(v)?, None))
            }
            Inputs::Latent(l) => {
                let eps = self.config.rms_eps;
                let (q, narrow) = match &l.q_narrow {
                    Some((q_narrow, norm)) => {
                        let [q, narrow] = exactly(b.linears(h, &[q_narrow, &l.kv_narrow])?)?;
                        (one(b.linears(&b.rms_norm(&q, norm, eps)?, &[&l.q])?)?, narrow)
                    }
                    None => {
                        let [q, narrow] = exactly(b.linears(h, &[&l.q, &l.kv_narrow])?)?;
                        (q, narrow)
                    }
                };
                let [q_runs, k_runs, v_runs, latent] = &l.runs;
                let latent = b.rms_norm(&b.rearrange(&[&narrow], latent)?, &l.kv_norm, eps)?;
                let kv = one(b.linears(&latent, &[&l.kv])?)?;
                let (q, k) = (b.rearrange(&[&q], q_runs)?, b.rearrange(&[&kv, &narrow], k_runs)?);
                Ok((q, k, b.rearrange(&[&kv], v_runs)?, None))
            }
        }
    }

    /// What a mixture gives of the step's normed input.
    fn mixture(&self, m: &Mixture<B>, h: &B::Tensor) -> backend::Result<B::Tensor> {
        let b = &*self.backend;
        let experts: Vec<_> = m.experts.iter().map(Mlp::ffn).collect();
        let mut sum = match &m.latent {
            None => b.mixture(h, h, &m.router, &experts, &m.rule)?,
            Some([narrow, wide]) => {
                let latent = one(b.linears(h, &[narrow])?)?;
                let sum = b.mixture(&latent, h, &m.router, &experts, &m.rule)?;
                one(b.linears(&sum, &[wide])?)?
            }
        };
        if let Some((shared, gate)) = &m.shared {
            let mut y = one(b.linears(&b.expanded(h, &shared.ffn())?, &[&shared.down])?)?;
            if let Some(gate) = gate {
                y = b.gate(y, &one(b.linears(h, &[gate])?)?)?;
            }
            sum = b.add(sum, &y)?;
        }
        Ok(sum)
    }

    /// Puts `linear` in the place of the module `name`; whether a decoder layer has one.
    pub fn replace(&mut self, name: &str, linear: B::Linear) -> bool {
        let slot = self.layers.iter_mut().flat_map(Layer::linears_mut).find(|l| *l.name == *name);
        let Some(slot) = slot else { return false };
        *slot = Named::new(name, linear);
        true
    }
}
