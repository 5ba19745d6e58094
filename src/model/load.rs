//! From a checkpoint to a decoder: each part by its Hugging Face name.

use std::collections::HashMap;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use super::blocks::Blocks;
use super::config::{
    AttentionConfig, DeltaConfig, InputsConfig, LatentConfig, MambaConfig, MixerConfig, MixtureConfig, MlpConfig,
    ModelConfig, QkNorm, SharedConfig,
};
use super::decoder::{Decoder, LoadError};
use super::layer::{Attention, DeltaNet, Inputs, Latent, Layer, Mamba, Mixer, Mixture, Mlp, Step};
use crate::backend::{
    self, AttentionShape, Backend, BackendError, DeltaNetShape, DeltaNetWeights, LayerCache, Mamba2Shape,
    Mamba2Weights, Named, RecurrentShape, Rotation, Run, Stored,
};
use crate::checkpoint::resolve::LinearRole;
use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::formats::kv::KvFormat;
use crate::formats::linear::LinearTensors;
use crate::logits::RouterScores;

use super::rope::Rope;

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

    /// The values of a tensor that is no linear's, row-major.
    ///
    /// # Errors
    /// Anything wrong with the tensor.
    fn vector(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, CheckpointError>;

    /// How an attention module's keys and values are kept, where the model fixes that.
    ///
    /// # Errors
    /// Anything wrong with their scales.
    fn kv(&self, module: &str) -> Result<Option<KvFormat>, CheckpointError>;

    /// The same source for as long as someone needs it: where experts are read again when they are used. `None`: it cannot be kept.
    fn kept(&self) -> Option<Arc<dyn Source + Send + Sync>> {
        None
    }

    /// Called when a part is loaded: what it was made of is not needed any more.
    fn part_done(&self) {}

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

    fn vector(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, CheckpointError> {
        self.floats(name, shape)
    }

    fn kv(&self, module: &str) -> Result<Option<KvFormat>, CheckpointError> {
        Ok(self.kv_scales(module)?.map(|s| KvFormat::Fp8 { k_scale: s.k, v_scale: s.v }))
    }

    fn kept(&self) -> Option<Arc<dyn Source + Send + Sync>> {
        Some(Arc::new(self.clone()))
    }

    fn part_done(&self) {
        self.tensors.release_pages();
    }

    fn finish(&self) -> Result<(), CheckpointError> {
        Checkpoint::finish(self)?;
        self.tensors.release_pages();
        Ok(())
    }
}

impl<B: Backend> Blocks<B> {
    /// Loads the decoder layers `range` of `source`, and nothing else of it. Whether all else in it is used is not looked at.
    ///
    /// # Errors
    /// Anything wrong with those layers, or a format without a kernel.
    pub fn load(backend: B, source: &dyn Source, range: Range<usize>) -> Result<Self, LoadError> {
        let config = source.config()?;
        Loader::new(&backend, source, &config).blocks(range, &mut |_, _| {})?.on(backend, config)
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
        let layers = 0..config.layers.len();
        let decoder = Self::load_layers(backend, source, config, layers, progress)?;
        source.finish()?;
        Ok(decoder)
    }

    /// Loads what stands before and behind the layers: a decoder without any.
    ///
    /// # Errors
    /// As [`Blocks::load`].
    pub fn load_ends(backend: B, source: &dyn Source) -> Result<Self, LoadError> {
        let config = source.config()?;
        Self::load_layers(backend, source, config, 0..0, &mut |_, _| {})
    }

    fn load_layers(
        backend: B,
        source: &dyn Source,
        config: ModelConfig,
        range: Range<usize>,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Self, LoadError> {
        let loader = Loader::new(&backend, source, &config);
        let embedding = loader.linear(config.names.embedding)?;
        source.part_done();
        // The largest parts first: what they are made of is in memory beside them until they are done.
        let head = (!config.tied_embeddings).then(|| loader.linear(config.names.head)).transpose()?;
        source.part_done();
        let norm = loader.norm(&format!("{}.weight", config.names.norm))?;
        let blocks = loader.blocks(range, progress)?.on(backend, config)?;
        Ok(Self { blocks, embedding, norm, head })
    }
}

/// Layers that are loaded, and what they need of the backend.
struct Loaded<B: Backend> {
    folder: PathBuf,
    first: usize,
    layers: Vec<Layer<B>>,
    caches: Vec<(LayerCache, Option<KvFormat>)>,
    recurrent: Vec<RecurrentShape>,
}

impl<B: Backend> Loaded<B> {
    fn on(self, backend: B, config: ModelConfig) -> Result<Blocks<B>, LoadError> {
        let rotation = |(rope, turned): &(Rope, usize)| Rotation {
            frequencies: rope.frequencies(*turned),
            factor: rope.attention_factor(),
        };
        let ropes = config.ropes.iter().map(|r| backend.load_rope(rotation(r))).collect::<Result<_, _>>()?;
        let Self { folder, first, layers, caches, recurrent } = self;
        Ok(Blocks {
            config,
            folder,
            backend: Arc::new(backend),
            first,
            layers,
            ropes: Arc::new(ropes),
            caches,
            recurrent,
        })
    }
}

/// A linear of a source that is kept.
struct Kept {
    source: Arc<dyn Source + Send + Sync>,
    name: Box<str>,
    role: LinearRole,
}

impl Stored for Kept {
    fn with(&self, take: &mut dyn FnMut(LinearTensors<'_>) -> backend::Result<()>) -> backend::Result<()> {
        let gone = |e: CheckpointError| BackendError::Failed { context: "an expert", message: e.to_string() };
        take(self.source.linear(&self.name, self.role).map_err(gone)?)?;
        self.source.part_done();
        Ok(())
    }
}

/// Finds each part of the model in its source by its Hugging Face name.
struct Loader<'a, B: Backend> {
    backend: &'a B,
    source: &'a dyn Source,
    kept: Option<Arc<dyn Source + Send + Sync>>,
    config: &'a ModelConfig,
    roles: HashMap<String, LinearRole>,
    shapes: HashMap<String, Vec<usize>>,
    /// What the layers so far keep of every token, and of every sequence.
    caches: Vec<(LayerCache, Option<KvFormat>)>,
    recurrent: Vec<RecurrentShape>,
}

impl<'a, B: Backend> Loader<'a, B> {
    fn new(backend: &'a B, source: &'a dyn Source, config: &'a ModelConfig) -> Self {
        Self {
            backend,
            source,
            kept: source.kept(),
            config,
            roles: config.modules().into_iter().map(|m| (m.name, m.role)).collect(),
            shapes: config.vectors().into_iter().collect(),
            caches: Vec::new(),
            recurrent: Vec::new(),
        }
    }

    /// The layers `range`; `progress` sees how many of the model's are done.
    fn blocks(mut self, range: Range<usize>, progress: &mut dyn FnMut(usize, usize)) -> Result<Loaded<B>, LoadError> {
        let first = range.start;
        let mut layers = Vec::new();
        for index in range {
            if index >= self.config.layers.len() {
                return Err(self.unlisted(&self.config.in_layer(index, "")).into());
            }
            layers.push(self.layer(index)?);
            self.source.part_done();
            progress(index + 1, self.config.layers.len());
        }
        Ok(Loaded { folder: self.source.place(), first, layers, caches: self.caches, recurrent: self.recurrent })
    }

    fn unlisted(&self, name: &str) -> CheckpointError {
        CheckpointError::MissingTensor {
            folder: self.source.place(),
            tensor: name.into(),
            why: "the decoder asks for a part that the architecture does not list".into(),
        }
    }

    fn linear(&self, name: &str) -> Result<Named<B::Linear>, LoadError> {
        let role = self.roles.get(name).ok_or_else(|| self.unlisted(name))?;
        let linear = self.backend.load_linear(self.source.linear(name, *role)?)?;
        Ok(Named::new(name, linear))
    }

    /// A linear of an expert. It is looked at now, whenever it is packed.
    fn expert_linear(&self, name: &str) -> Result<Named<B::Linear>, LoadError> {
        let role = *self.roles.get(name).ok_or_else(|| self.unlisted(name))?;
        let stored = |source: &Arc<dyn Source + Send + Sync>| -> Box<dyn Stored> {
            Box::new(Kept { source: source.clone(), name: name.into(), role })
        };
        let linear = self.backend.load_expert(self.source.linear(name, role)?, self.kept.as_ref().map(stored))?;
        Ok(Named::new(name, linear))
    }

    fn values(&self, name: &str) -> Result<Vec<f32>, LoadError> {
        let shape = self.shapes.get(name).ok_or_else(|| self.unlisted(name))?;
        Ok(self.source.vector(name, shape)?)
    }

    fn vector(&self, name: &str) -> Result<Named<B::Vector>, LoadError> {
        Ok(Named::new(name, self.backend.load_vector(self.values(name)?)?))
    }

    /// A norm's factors.
    fn norm(&self, name: &str) -> Result<Named<B::Vector>, LoadError> {
        let mut values = self.values(name)?;
        if self.config.offset_norms {
            values.iter_mut().for_each(|w| *w += 1.0);
        }
        Ok(Named::new(name, self.backend.load_vector(values)?))
    }

    fn layer(&mut self, index: usize) -> Result<Layer<B>, LoadError> {
        let config = self.config;
        let mut steps = Vec::new();
        for step in &config.layers[index].steps {
            let norm = self.norm(&config.in_layer(index, &format!("{}.weight", step.norm)))?;
            let at = config.in_layer(index, step.at);
            let mixer = match &step.mixer {
                MixerConfig::Attention(a) => Mixer::Attention(Box::new(self.attention(index, &at, a)?)),
                MixerConfig::Mamba(m) => Mixer::Mamba(Box::new(self.mamba(&at, m)?)),
                MixerConfig::DeltaNet(d) => Mixer::DeltaNet(Box::new(self.delta_net(&at, d)?)),
                MixerConfig::Mlp(m) => Mixer::Mlp(self.mlp(&at, m)?),
                MixerConfig::Mixture(m) => Mixer::Mixture(Box::new(self.mixture(&at, m)?)),
            };
            let after =
                step.after.map(|after| self.norm(&config.in_layer(index, &format!("{after}.weight")))).transpose()?;
            steps.push(Step { norm, mixer, after });
        }
        Ok(Layer { steps })
    }

    fn attention(&mut self, layer: usize, at: &str, a: &AttentionConfig) -> Result<Attention<B>, LoadError> {
        let format = self.source.kv(at)?;
        let &AttentionConfig { kv_heads, head_dim, .. } = a;
        let value_dim = a.value_dim();
        self.caches.push((LayerCache { format: KvFormat::F32, kv_heads, head_dim, value_dim }, format));
        let linear = |part: &str| self.linear(&format!("{at}.{part}_proj"));
        let norm = |part: &str| self.norm(&format!("{at}.{part}_norm.weight"));
        Ok(Attention {
            inputs: self.inputs(at, a)?,
            o: linear("o")?,
            norms: if a.qk_norm == QkNorm::None { None } else { Some([norm("q")?, norm("k")?]) },
            sinks: a.sinks.then(|| self.vector(&format!("{at}.sinks"))).transpose()?,
            shape: AttentionShape {
                layer,
                cache: self.caches.len() - 1,
                heads: a.heads,
                kv_heads: a.kv_heads,
                head_dim: a.head_dim,
                window: a.window,
                rope: a.rope,
                scale: a.scale,
                growth: a.growth,
            },
        })
    }

    fn inputs(&self, at: &str, a: &AttentionConfig) -> Result<Inputs<B>, LoadError> {
        let linear = |part: &str| self.linear(&format!("{at}.{part}"));
        let (d, q, kv) = (a.head_dim, a.heads * a.head_dim, a.kv_heads * a.head_dim);
        Ok(match a.inputs {
            InputsConfig::Separate => {
                let qkv = [linear("q_proj")?, linear("k_proj")?, linear("v_proj")?];
                if !a.gated {
                    return Ok(Inputs::Separate(qkv));
                }
                let halves = |first| (0..a.heads).map(|h| Run::of(0, 2 * h * d + first, d)).collect();
                Inputs::Gated(qkv, [halves(0), halves(d)])
            }
            InputsConfig::Fused => {
                let runs = [Run::of(0, 0, q), Run::of(0, q, kv), Run::of(0, q + kv, kv)].map(|run| vec![run]);
                Inputs::Fused(linear("qkv_proj")?, runs)
            }
            InputsConfig::Latent(l) => {
                let norm = |part: &str| self.norm(&format!("{at}.{part}.weight"));
                let q_narrow = match l.q_rank {
                    Some(_) => Some((linear("q_a_proj")?, norm("q_a_layernorm")?)),
                    None => None,
                };
                Inputs::Latent(Latent {
                    q: linear(if q_narrow.is_some() { "q_b_proj" } else { "q_proj" })?,
                    q_narrow,
                    kv_narrow: linear("kv_a_proj_with_mqa")?,
                    kv_norm: norm("kv_a_layernorm")?,
                    kv: linear("kv_b_proj")?,
                    runs: latent_runs(a.heads, &l),
                })
            }
        })
    }

    fn mamba(&mut self, at: &str, m: &MambaConfig) -> Result<Mamba<B>, LoadError> {
        let shape = Mamba2Shape {
            heads: m.heads,
            head_dim: m.head_dim,
            groups: m.groups,
            state: m.state,
            kernel: m.kernel,
            eps: self.config.rms_eps,
            time_step_limit: m.step_limit,
        };
        let values = |part: &str| self.values(&format!("{at}.{part}"));
        let weights = Mamba2Weights {
            conv1d: values("conv1d.weight")?,
            conv1d_bias: m.convolution_bias.then(|| values("conv1d.bias")).transpose()?,
            a_log: values("A_log")?,
            d: values("D")?,
            dt_bias: values("dt_bias")?,
            norm: values("norm.weight")?,
        };
        let mixer = Named::new(at, self.backend.load_mamba(shape, weights)?);
        let (input, output) = (self.linear(&format!("{at}.in_proj"))?, self.linear(&format!("{at}.out_proj"))?);
        self.recurrent.push(shape.kept());
        Ok(Mamba { input, output, mixer, cache: self.recurrent.len() - 1 })
    }

    fn delta_net(&mut self, at: &str, d: &DeltaConfig) -> Result<DeltaNet<B>, LoadError> {
        let shape = DeltaNetShape {
            key_heads: d.key_heads,
            value_heads: d.value_heads,
            key_dim: d.key_dim,
            value_dim: d.value_dim,
            kernel: d.kernel,
            eps: self.config.rms_eps,
        };
        let values = |part: &str| self.values(&format!("{at}.{part}"));
        let weights = DeltaNetWeights {
            conv1d: values("conv1d.weight")?,
            a_log: values("A_log")?,
            dt_bias: values("dt_bias")?,
            norm: values("norm.weight")?,
        };
        let mixer = Named::new(at, self.backend.load_delta_net(shape, weights)?);
        let linear = |part: &str| self.linear(&format!("{at}.{part}"));
        let inputs = [linear("in_proj_qkv")?, linear("in_proj_z")?, linear("in_proj_b")?, linear("in_proj_a")?];
        let output = linear("out_proj")?;
        self.recurrent.push(shape.kept());
        Ok(DeltaNet { inputs, output, mixer, cache: self.recurrent.len() - 1 })
    }

    fn mlp(&self, at: &str, m: &MlpConfig) -> Result<Mlp<B>, LoadError> {
        Self::mlp_of(m, |part| self.linear(&format!("{at}.{part}")))
    }

    fn mlp_of(
        m: &MlpConfig,
        linear: impl Fn(&str) -> Result<Named<B::Linear>, LoadError>,
    ) -> Result<Mlp<B>, LoadError> {
        let gate = m.names.gate.map(&linear).transpose()?;
        Ok(Mlp { gate, up: linear(m.names.up)?, down: linear(m.names.down)?, activation: m.activation })
    }

    fn mixture(&self, at: &str, m: &MixtureConfig) -> Result<Mixture<B>, LoadError> {
        let linear = |part: &str| self.linear(&format!("{at}.{part}"));
        let experts = (0..m.experts).map(|e| {
            let expert = Self::mlp_of(&m.expert, |part| self.expert_linear(&format!("{at}.experts.{e}.{part}")));
            self.source.part_done();
            expert
        });
        let mut rule = m.rule.clone();
        if let (Some(correction), RouterScores::Sigmoid { bias, .. }) = (m.correction, &mut rule.scores) {
            *bias = Some(self.values(&format!("{at}.{correction}"))?.into());
        }
        let shared = |s: &SharedConfig| -> Result<_, LoadError> {
            Ok((self.mlp(&format!("{at}.{}", s.at), &s.mlp)?, s.gate.map(linear).transpose()?))
        };
        Ok(Mixture {
            router: linear(m.router)?,
            experts: experts.collect::<Result<_, _>>()?,
            rule,
            latent: match m.latent {
                Some(_) => Some([linear("fc1_latent_proj")?, linear("fc2_latent_proj")?]),
                None => None,
            },
            shared: m.shared.as_ref().map(shared).transpose()?,
        })
    }
}

/// Columns of q, k, v and of what both of the last come of, in latent attention: what turns stands first in each head, halves
/// of it beside each other.
fn latent_runs(heads: usize, l: &LatentConfig) -> [Vec<Run>; 4] {
    let (still, value) = (l.still, l.value_dim);
    let turned = |source: usize, first: usize| -> Vec<Run> {
        match l.interleaved {
            false => vec![Run::of(source, first, l.turned)],
            true => {
                let pairs = (0..l.turned).step_by(2);
                pairs.clone().chain(pairs.map(|i| i + 1)).map(|i| Run::of(source, first + i, 1)).collect()
            }
        }
    };
    let (mut q, mut k, mut v) = (Vec::new(), Vec::new(), Vec::new());
    for head in 0..heads {
        let own = head * (still + l.turned);
        q.extend(turned(0, own + still));
        q.push(Run::of(0, own, still));
        let own = head * (still + value);
        k.extend(turned(1, l.kv_rank));
        k.push(Run::of(0, own, still));
        v.push(Run::of(0, own + still, value));
    }
    [q, k, v, vec![Run::of(0, 0, l.kv_rank)]]
}
