//! Decoder layers: all of a model's, or some of them.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use super::config::ModelConfig;
use super::layer::{Inputs, Layer, Mixer, Mixture, Mlp, Step};
use crate::backend::{
    self, Backend, BackendError, Batch, CacheLayout, DeltaInputs, HeadNorms, HeadParameters, LayerCache, Named, PAGE,
    RecurrentShape, Update, exactly, one,
};
use crate::formats::kv::KvFormat;

/// Layers of a decoder on backend `B`: what stands between embedding and head.
pub struct Blocks<B: Backend> {
    /// Of the whole model, whichever layers are here.
    pub config: ModelConfig,
    /// Where it was loaded from, for messages.
    pub(super) folder: PathBuf,
    pub(super) backend: Arc<B>,
    /// The number of the first of `layers`.
    pub(super) first: usize,
    pub(super) layers: Vec<Layer<B>>,
    pub(super) ropes: Arc<Vec<B::Rope>>,
    /// What each of the layers caches, and the format if the checkpoint says it; else it is left to the caller.
    pub(super) caches: Vec<(LayerCache, Option<KvFormat>)>,
    /// What recurrent ones keep of each sequence.
    pub(super) recurrent: Vec<RecurrentShape>,
}

/// Queries, keys, values, and what gates the output.
type AttentionInputs<T> = (T, T, T, Option<T>);

impl<B: Backend> Blocks<B> {
    /// The backend they run on.
    #[must_use]
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// These layers, each made into another by `layer`, on a backend over the same memory.
    pub(super) fn map<C>(&self, backend: Arc<C>, layer: impl Fn(&Layer<B>) -> Layer<C>) -> Blocks<C>
    where
        C: Backend<Rope = B::Rope>,
    {
        Blocks {
            config: self.config.clone(),
            folder: self.folder.clone(),
            backend,
            first: self.first,
            layers: self.layers.iter().map(layer).collect(),
            ropes: self.ropes.clone(),
            caches: self.caches.clone(),
            recurrent: self.recurrent.clone(),
        }
    }

    fn numbered(&self) -> impl Iterator<Item = (usize, &Layer<B>)> {
        (self.first..).zip(&self.layers)
    }

    /// Every linear of these layers in the order of the forward pass.
    pub fn layer_linears(&self) -> impl Iterator<Item = &Named<B::Linear>> {
        self.layers.iter().flat_map(Layer::linears)
    }

    /// Every norm or other vector and the decoder layer it is in.
    pub fn layer_vectors(&self) -> impl Iterator<Item = (usize, &Named<B::Vector>)> {
        self.numbered().flat_map(|(i, layer)| layer.vectors().into_iter().map(move |n| (i, n)))
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
        self.numbered().flat_map(|(i, layer)| layer.steps.iter().map(move |s| (i, &s.mixer)))
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
    pub(super) fn run(
        &self,
        range: Range<usize>,
        mut x: B::Tensor,
        pass: &B::Pass,
        cache: &mut B::Cache,
    ) -> backend::Result<B::Tensor> {
        let b = &*self.backend;
        let own = range.start.checked_sub(self.first).zip(range.end.checked_sub(self.first));
        let layers = own.and_then(|(from, to)| self.layers.get(from..to)).ok_or_else(|| BackendError::Failed {
            context: "block",
            message: format!("there are no layers {range:?} of {:?}", self.first..self.first + self.layers.len()),
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

    /// Puts `linear` in the place of the module `name`; whether one of these layers has one.
    pub fn replace(&mut self, name: &str, linear: B::Linear) -> bool {
        let slot = self.layers.iter_mut().flat_map(Layer::linears_mut).find(|l| *l.name == *name);
        let Some(slot) = slot else { return false };
        *slot = Named::new(name, linear);
        true
    }
}
