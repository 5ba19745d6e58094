//! From a checkpoint to a decoder: each part by its Hugging Face name.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use super::config::ModelConfig;
use super::decoder::{Decoder, LoadError};
use super::layer::{Attention, Layer, Mixer, Mlp, Step};
use crate::backend::{AttentionShape, Backend, Choice, LayerCache, Named, Rotation};
use crate::checkpoint::resolve::LinearRole;
use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::formats::kv::KvFormat;
use crate::formats::linear::LinearTensors;

/// Where the parts of a model come from, by their Hugging Face names.
pub trait Source {
    /// The folder, or another name, for messages.
    fn place(&self) -> PathBuf;

    /// # Errors
    /// A configuration that says of no model that is known here.
    fn config(&self) -> Result<ModelConfig, CheckpointError>;

    /// # Errors
    /// Anything wrong with the module's tensors.
    fn linear(&self, name: &str, role: LinearRole) -> Result<LinearTensors<'_>, CheckpointError>;

    /// Weights of a norm, [length].
    ///
    /// # Errors
    /// Anything wrong with the tensor.
    fn norm(&self, name: &str, length: usize) -> Result<Vec<f32>, CheckpointError>;

    /// How an attention module's keys and values are kept, where the model fixes that.
    ///
    /// # Errors
    /// Anything wrong with their scales.
    fn kv(&self, module: &str) -> Result<Option<KvFormat>, CheckpointError>;

    /// Called when a layer is loaded.
    fn layer_done(&self) {}

    /// Called when all is loaded.
    ///
    /// # Errors
    /// Names what was not used.
    fn finish(&self) -> Result<(), CheckpointError>;
}

impl Source for Checkpoint {
    fn place(&self) -> PathBuf {
        self.tensors.folder().into()
    }

    fn config(&self) -> Result<ModelConfig, CheckpointError> {
        ModelConfig::read(&self.config)?.untied_where_stored(self)
    }

    fn linear(&self, name: &str, role: LinearRole) -> Result<LinearTensors<'_>, CheckpointError> {
        Checkpoint::linear(self, name, role)
    }

    fn norm(&self, name: &str, length: usize) -> Result<Vec<f32>, CheckpointError> {
        self.floats(name, &[length])
    }

    fn kv(&self, module: &str) -> Result<Option<KvFormat>, CheckpointError> {
        Ok(self.kv_scales(module)?.map(|s| KvFormat::Fp8 { k_scale: s.k, v_scale: s.v }))
    }

    fn layer_done(&self) {
        self.tensors.release_pages();
    }

    fn finish(&self) -> Result<(), CheckpointError> {
        Checkpoint::finish(self)?;
        self.tensors.release_pages();
        Ok(())
    }
}

impl<B: Backend> Decoder<B> {
    /// Loads the model of `source`; every tensor in it is used, or the error names it.
    ///
    /// # Errors
    /// Anything wrong with the checkpoint, or a format without a kernel.
    pub fn load(backend: B, source: &dyn Source) -> Result<Self, LoadError> {
        Self::load_with_progress(backend, source, &mut |_, _| {})
    }

    /// As [`Self::load`]; calls `progress(layers done, layers)`.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn load_with_progress(
        backend: B,
        source: &dyn Source,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Self, LoadError> {
        let config = source.config()?;
        let roles = config.modules().into_iter().map(|m| (m.name, m.role)).collect();
        let loader = Loader { backend: &backend, source, config: &config, roles };
        let embedding = loader.linear("model.embed_tokens")?;
        let (mut layers, mut caches) = (Vec::new(), Vec::new());
        for index in 0..config.layers {
            let prefix = format!("model.layers.{index}");
            layers.push(loader.layer(index, &prefix)?);
            let format = source.kv(&format!("{prefix}.self_attn"))?;
            let shape = LayerCache {
                format: KvFormat::F32,
                kv_heads: config.kv_heads,
                head_dim: config.head_dim,
                value_dim: config.head_dim,
            };
            caches.push((shape, format));
            source.layer_done();
            progress(index + 1, config.layers);
        }
        let norm = loader.norm("model.norm.weight", config.hidden)?;
        let head = (!config.tied_embeddings).then(|| loader.linear("lm_head")).transpose()?;
        source.finish()?;
        let frequencies = config.rope.frequencies(config.head_dim);
        let rope = backend.load_rope(Rotation { frequencies, factor: config.rope.attention_factor() })?;
        Ok(Self {
            folder: source.place(),
            backend: Arc::new(backend),
            embedding,
            layers,
            norm,
            head,
            ropes: Arc::new(vec![rope]),
            caches,
            config,
        })
    }
}

/// Finds each part of the model in its source by its Hugging Face name.
struct Loader<'a, B: Backend> {
    backend: &'a B,
    source: &'a dyn Source,
    config: &'a ModelConfig,
    roles: HashMap<String, LinearRole>,
}

impl<B: Backend> Loader<'_, B> {
    fn linear(&self, name: &str) -> Result<Named<B::Linear>, LoadError> {
        let role = self.roles.get(name).ok_or_else(|| CheckpointError::MissingTensor {
            folder: self.source.place(),
            tensor: name.into(),
            why: "the decoder asks for a module that the architecture does not list".into(),
        })?;
        let linear = self.backend.load_linear(self.source.linear(name, *role)?)?;
        Ok(Named::new(name, linear))
    }

    fn norm(&self, name: &str, length: usize) -> Result<Named<B::Norm>, LoadError> {
        let norm = self.backend.load_norm(self.source.norm(name, length)?)?;
        Ok(Named::new(name, norm))
    }

    fn layer(&self, index: usize, prefix: &str) -> Result<Layer<B>, LoadError> {
        let norm = |part: &str| self.norm(&format!("{prefix}.{part}.weight"), self.config.hidden);
        let attention = Step {
            norm: norm("input_layernorm")?,
            mixer: Mixer::Attention(Box::new(self.attention(index, &format!("{prefix}.self_attn"))?)),
        };
        let ffn = Step { norm: norm("post_attention_layernorm")?, mixer: self.ffn(index, &format!("{prefix}.mlp"))? };
        Ok(Layer { steps: vec![attention, ffn] })
    }

    fn attention(&self, index: usize, prefix: &str) -> Result<Attention<B>, LoadError> {
        let c = self.config;
        let linear = |part: &str| self.linear(&format!("{prefix}.{part}"));
        let norm = |part: &str| self.norm(&format!("{prefix}.{part}.weight"), c.head_dim);
        Ok(Attention {
            q: linear("q_proj")?,
            k: linear("k_proj")?,
            v: linear("v_proj")?,
            o: linear("o_proj")?,
            heads: if c.qk_norm { Some([norm("q_norm")?, norm("k_norm")?]) } else { None },
            shape: AttentionShape {
                layer: index,
                heads: c.heads,
                kv_heads: c.kv_heads,
                head_dim: c.head_dim,
                window: c.windows[index],
                rope: Some(0),
                scale: 1.0 / (c.head_dim as f32).sqrt(),
            },
        })
    }

    fn ffn(&self, index: usize, prefix: &str) -> Result<Mixer<B>, LoadError> {
        let c = self.config;
        let Some(moe) = c.moe.filter(|_| c.is_moe(index)) else {
            return Ok(Mixer::Mlp(self.mlp(prefix)?));
        };
        let router = self.linear(&format!("{prefix}.gate"))?;
        let experts = (0..moe.experts).map(|e| self.mlp(&format!("{prefix}.experts.{e}")));
        let choice = Choice { top_k: moe.top_k, normalize: moe.normalize };
        Ok(Mixer::Mixture { router, experts: experts.collect::<Result<_, _>>()?, choice })
    }

    fn mlp(&self, prefix: &str) -> Result<Mlp<B>, LoadError> {
        let linear = |part: &str| self.linear(&format!("{prefix}.{part}_proj"));
        Ok(Mlp { gate: linear("gate")?, up: linear("up")?, down: linear("down")? })
    }
}
