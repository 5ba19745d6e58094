//! From a checkpoint to a decoder: each part by its Hugging Face name.

use std::collections::HashMap;
use std::sync::Arc;

use super::config::ModelConfig;
use super::decoder::{Decoder, LoadError};
use super::layer::{Attention, Layer, Mixer, Mlp, Step};
use crate::backend::{AttentionShape, Backend, Choice, LayerCache, Named, Rotation};
use crate::checkpoint::resolve::LinearRole;
use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::formats::kv::KvFormat;

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
        let (mut layers, mut caches) = (Vec::new(), Vec::new());
        for index in 0..config.layers {
            let prefix = format!("model.layers.{index}");
            layers.push(loader.layer(index, &prefix)?);
            let scales = checkpoint.kv_scales(&format!("{prefix}.self_attn"))?;
            let format = scales.map(|s| KvFormat::Fp8 { k_scale: s.k, v_scale: s.v });
            let shape = LayerCache { format: KvFormat::F32, kv_heads: config.kv_heads, head_dim: config.head_dim };
            caches.push((shape, format));
            checkpoint.tensors.release_pages();
            progress(index + 1, config.layers);
        }
        let norm = loader.norm("model.norm.weight", config.hidden)?;
        let head = (!config.tied_embeddings).then(|| loader.linear("lm_head")).transpose()?;
        checkpoint.finish()?;
        checkpoint.tensors.release_pages();
        let frequencies = config.rope.frequencies(config.head_dim);
        let rope = backend.load_rope(Rotation { frequencies, factor: config.rope.attention_factor() })?;
        Ok(Self {
            folder: checkpoint.tensors.folder().into(),
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

/// Finds each part of the model in the checkpoint by its Hugging Face name.
struct Loader<'a, B: Backend> {
    backend: &'a B,
    checkpoint: &'a Checkpoint,
    config: &'a ModelConfig,
    roles: HashMap<String, LinearRole>,
}

impl<B: Backend> Loader<'_, B> {
    fn linear(&self, name: &str) -> Result<Named<B::Linear>, LoadError> {
        let role = self.roles.get(name).ok_or_else(|| CheckpointError::MissingTensor {
            folder: self.checkpoint.tensors.folder().into(),
            tensor: name.into(),
            why: "the decoder asks for a module that the architecture does not list".into(),
        })?;
        let linear = self.backend.load_linear(self.checkpoint.linear(name, *role)?)?;
        Ok(Named::new(name, linear))
    }

    fn norm(&self, name: &str, length: usize) -> Result<Named<B::Norm>, LoadError> {
        let norm = self.backend.load_norm(self.checkpoint.floats(name, &[length])?)?;
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
