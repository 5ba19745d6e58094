//! config.json of a supported architecture, read into types that cannot be wrong: a list of layers, each a list of residual
//! steps. One file for each family of architectures.

mod deepseek;
mod gemma;
mod glm;
mod gpt_oss;
mod llama;
mod minimax;
mod mixtral;
mod nemotron_h;
mod nemotron_nas;
mod phi;
mod qwen3_5;

use std::ops::RangeInclusive;

use crate::backend::{Activation, Feature, QueryGrowth};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::error::{CheckpointError, Result};
use crate::checkpoint::json::Object;
use crate::logits::{RouterRule, RouterScores};

use super::rope::Rope;

/// Bounds on what a configuration may ask for, checked before anything is allocated. The largest models known stay well
/// below each of them.
mod limit {
    pub const LAYERS: usize = 1024;
    pub const WIDTH: usize = 1 << 18;
    pub const HEADS: usize = 4096;
    pub const HEAD_DIM: usize = 4096;
    pub const VOCAB: usize = 1 << 24;
    pub const POSITIONS: usize = 1 << 28;
    pub const EXPERTS: usize = 4096;
    /// Over all layers (Kimi K2 has 23,040).
    pub const ALL_EXPERTS: usize = 1 << 16;
    /// Width of a causal convolution.
    pub const KERNEL: usize = 64;
    /// Values of one layer's recurrent state.
    pub const STATE: usize = 1 << 28;
}

macro_rules! architectures {
    ($($(#[$doc:meta])* $name:ident = $class:literal, [$($type:literal),+], $read:path;)*) => {
        /// Architectures that the decoder covers.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Architecture {
            $($(#[$doc])* $name,)*
        }

        impl Architecture {
            const ALL: &[(Self, &str, &[&str])] = &[$((Self::$name, $class, &[$($type),+])),*];

            fn read(self, c: &Object) -> Result<ModelConfig> {
                match self {
                    $(Self::$name => $read(c, self),)*
                }
            }
        }
    };
}

// Each with the family name in `architectures`, its names in `model_type`, and the reader of its configuration.
architectures! {
    Llama = "Llama", ["llama"], llama::read;
    Mistral = "Mistral", ["mistral"], llama::read;
    Qwen2 = "Qwen2", ["qwen2"], llama::read;
    Qwen3 = "Qwen3", ["qwen3"], llama::read;
    Qwen3Moe = "Qwen3Moe", ["qwen3_moe"], llama::read;
    /// Nemotron-H, Nemotron Nano 2, Nemotron 3: Mamba-2, attention, feed-forwards and mixtures.
    NemotronH = "NemotronH", ["nemotron_h"], nemotron_h::read;
    /// What a neural architecture search made of Llama: Llama-3_3-Nemotron-Super.
    NemotronNas = "DeciLM", ["nemotron-nas"], nemotron_nas::read;
    GptOss = "GptOss", ["gpt_oss"], gpt_oss::read;
    /// Qwen3.5 and later: gated delta nets and gated attention.
    Qwen3_5 = "Qwen3_5", ["qwen3_5_text", "qwen3_5"], qwen3_5::read;
    Qwen3_5Moe = "Qwen3_5Moe", ["qwen3_5_moe_text", "qwen3_5_moe"], qwen3_5::read;
    Mixtral = "Mixtral", ["mixtral"], mixtral::read;
    /// Mistral with YaRN and queries that grow with their position.
    Ministral3 = "Ministral3", ["ministral3"], llama::read;
    /// Phi-3 and Phi-4: fused projections.
    Phi3 = "Phi3", ["phi3"], phi::read;
    Glm4Moe = "Glm4Moe", ["glm4_moe"], glm::read;
    MiniMaxM2 = "MiniMaxM2", ["minimax_m2"], minimax::read;
    Gemma3 = "Gemma3", ["gemma3_text"], gemma::read;
    /// DeepSeek-V3 and R1, Kimi-K2: latent attention.
    DeepseekV3 = "DeepseekV3", ["deepseek_v3", "kimi_k2"], deepseek::read;
}

/// Where the parts of a model are, by their Hugging Face names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Names {
    pub embedding: &'static str,
    /// Before the number of a layer.
    pub layers: &'static str,
    /// The norm after the last layer.
    pub norm: &'static str,
    pub head: &'static str,
}

impl Names {
    const PLAIN: Self =
        Self { embedding: "model.embed_tokens", layers: "model.layers", norm: "model.norm", head: "lm_head" };
}

/// Shape and constants of one decoder.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    pub architecture: Architecture,
    pub names: Names,
    pub hidden: usize,
    pub vocab: usize,
    pub max_positions: usize,
    pub rms_eps: f32,
    /// Rotations, and how many of a head's dimensions each turns.
    pub ropes: Vec<(Rope, usize)>,
    pub layers: Vec<LayerConfig>,
    /// Whether norms multiply by one more than their weight, but for those of delta nets.
    pub offset_norms: bool,
    /// What embeddings are multiplied by.
    pub embedding_scale: Option<f32>,
    pub tied_embeddings: bool,
    /// From config.json; generation_config.json may say more.
    pub eos_tokens: Vec<u32>,
}

/// What is alike in all layers of a plain decoder.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Plain {
    /// But for its window.
    pub attention: AttentionConfig,
    pub rope: Rope,
    pub experts: Option<usize>,
}

/// One layer: residual steps, none perhaps.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LayerConfig {
    pub steps: Vec<StepConfig>,
}

/// x ← x + mixer(norm(x)), or x ← x + after(mixer(norm(x))).
#[derive(Clone, Debug, PartialEq)]
pub struct StepConfig {
    /// Name of the norm in the layer.
    pub norm: &'static str,
    /// Name of a norm of what the mixer gives.
    pub after: Option<&'static str>,
    /// Name of the mixer in the layer.
    pub at: &'static str,
    pub mixer: MixerConfig,
}

#[derive(Clone, Debug, PartialEq)]
pub enum MixerConfig {
    Attention(AttentionConfig),
    Mamba(MambaConfig),
    DeltaNet(DeltaConfig),
    Mlp(MlpConfig),
    Mixture(MixtureConfig),
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionConfig {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Keys farther back than this many positions (the query's own included) are not attended to.
    pub window: Option<usize>,
    /// Which of the model's rotations.
    pub rope: Option<usize>,
    /// Biases on q, k and v.
    pub qkv_bias: bool,
    /// Bias on the output.
    pub output_bias: bool,
    /// RMS norms of q and k before RoPE.
    pub qk_norm: QkNorm,
    /// Whether each head of q is followed by the gate of its output.
    pub gated: bool,
    /// Whether each head has a score without a value.
    pub sinks: bool,
    /// What scores are multiplied by.
    pub scale: f32,
    /// How queries grow with their position.
    pub growth: Option<QueryGrowth>,
    pub inputs: InputsConfig,
}

impl AttentionConfig {
    /// Attention with a rotation, of the given heads and their width, and nothing more.
    #[must_use]
    pub fn new(heads: usize, kv_heads: usize, head_dim: usize) -> Self {
        Self {
            heads,
            kv_heads,
            head_dim,
            window: None,
            rope: Some(0),
            qkv_bias: false,
            output_bias: false,
            qk_norm: QkNorm::None,
            gated: false,
            sinks: false,
            scale: 1.0 / (head_dim as f32).sqrt(),
            growth: None,
            inputs: InputsConfig::Separate,
        }
    }

    /// Width of a head's values.
    #[must_use]
    pub fn value_dim(&self) -> usize {
        match self.inputs {
            InputsConfig::Latent(latent) => latent.value_dim,
            _ => self.head_dim,
        }
    }
}

/// Norms of queries and keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkNorm {
    None,
    /// Of each head.
    Heads,
    /// Of all heads together.
    Rows,
}

/// Where q, k and v come from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum InputsConfig {
    /// q_proj, k_proj and v_proj.
    Separate,
    /// qkv_proj.
    Fused,
    /// Multi-head latent attention.
    Latent(LatentConfig),
}

/// Multi-head latent attention (DeepSeek): keys and values of all heads come of one narrow vector, and a part of each key
/// that turns with its position is the same for all heads.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LatentConfig {
    /// Width of what queries come of; `None`: the layer's input.
    pub q_rank: Option<usize>,
    /// Width of what keys and values come of.
    pub kv_rank: usize,
    /// Dimensions of a head that turn, and that do not.
    pub turned: usize,
    pub still: usize,
    pub value_dim: usize,
    /// Whether neighbours turn, and not halves.
    pub interleaved: bool,
}

/// Mamba-2.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MambaConfig {
    pub heads: usize,
    pub head_dim: usize,
    pub groups: usize,
    pub state: usize,
    pub kernel: usize,
    pub convolution_bias: bool,
    /// Biases on in_proj and out_proj.
    pub bias: bool,
    /// What steps are clamped to.
    pub step_limit: (f32, f32),
}

impl MambaConfig {
    /// heads · head_dim.
    #[must_use]
    pub fn inner(&self) -> usize {
        self.heads * self.head_dim
    }

    /// What the convolution runs over.
    #[must_use]
    pub fn channels(&self) -> usize {
        self.inner() + 2 * self.groups * self.state
    }
}

/// Gated delta net.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DeltaConfig {
    pub key_heads: usize,
    pub value_heads: usize,
    pub key_dim: usize,
    pub value_dim: usize,
    pub kernel: usize,
}

impl DeltaConfig {
    /// What the convolution runs over: queries, keys and values.
    #[must_use]
    pub fn channels(&self) -> usize {
        2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim
    }
}

/// A feed-forward.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MlpConfig {
    pub width: usize,
    pub activation: Activation,
    pub bias: bool,
    pub names: FfnNames,
}

impl MlpConfig {
    /// A SiLU-gated one by Llama's names.
    #[must_use]
    pub fn silu(width: usize) -> Self {
        Self { width, activation: Activation::Silu, bias: false, names: FfnNames::PROJ }
    }

    /// Whether `up` gives the gate too.
    #[must_use]
    pub fn is_fused(&self) -> bool {
        self.names.gate.is_none() && self.activation.is_gated()
    }
}

/// Names of a feed-forward's linears.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FfnNames {
    /// `None`: there is none, or `up` gives it too.
    pub gate: Option<&'static str>,
    pub up: &'static str,
    pub down: &'static str,
}

impl FfnNames {
    const PROJ: Self = Self { gate: Some("gate_proj"), up: "up_proj", down: "down_proj" };
    const UNGATED: Self = Self { gate: None, up: "up_proj", down: "down_proj" };
    const FUSED: Self = Self { gate: None, up: "gate_up_proj", down: "down_proj" };
    const W: Self = Self { gate: Some("w1"), up: "w3", down: "w2" };
}

/// A mixture of experts.
#[derive(Clone, Debug, PartialEq)]
pub struct MixtureConfig {
    /// The router's name, and whether it has a bias.
    pub router: &'static str,
    pub router_bias: bool,
    pub experts: usize,
    /// How they are chosen; the correction is not in it.
    pub rule: RouterRule,
    /// Name of what is added to scores to choose by, [experts].
    pub correction: Option<&'static str>,
    /// One expert.
    pub expert: MlpConfig,
    /// Width of what experts read and give, where it is not the model's.
    pub latent: Option<usize>,
    pub shared: Option<SharedConfig>,
}

/// An expert that every token goes to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SharedConfig {
    pub at: &'static str,
    pub mlp: MlpConfig,
    /// Name of its gate, one value a token.
    pub gate: Option<&'static str>,
}

impl ModelConfig {
    /// Reads config.json.
    ///
    /// # Errors
    /// Names the key that is missing or out of range, or the architecture that is not supported.
    pub fn read(c: &Object) -> Result<Self> {
        architecture(c)?.read(c)
    }

    /// The same model with a head of its own where a tied checkpoint stores a quantized one.
    ///
    /// # Errors
    /// When a tied checkpoint stores an unquantized head that differs from the embedding, one that is not tied stores
    /// none, or the tensors are of fewer layers.
    pub fn untied_where_stored(mut self, checkpoint: &Checkpoint) -> Result<Self> {
        self.check_layers(checkpoint)?;
        if !self.tied_embeddings
            && !checkpoint.has_linear(self.names.head)
            && checkpoint.has_linear(self.names.embedding)
        {
            return Err(CheckpointError::MissingTensor {
                folder: checkpoint.tensors.folder().into(),
                tensor: format!("{}.weight", self.names.head),
                why:
                    "config.json does not tie it to the embedding; set tie_word_embeddings to true if the model is tied"
                        .into(),
            });
        }
        if !self.tied_embeddings || !checkpoint.has_linear(self.names.head) {
            return Ok(self);
        }
        let tensors = &checkpoint.tensors;
        let table = |module: &str| format!("{module}.weight");
        match (tensors.peek(&table(self.names.head)), tensors.peek(&table(self.names.embedding))) {
            (Some(head), Some(embedding)) if head.is_float() && embedding.is_float() => {
                let same = head.shape == embedding.shape
                    && if head.dtype == embedding.dtype {
                        head.bytes == embedding.bytes
                    } else {
                        head.floats()? == embedding.floats()?
                    };
                if !same {
                    return Err(CheckpointError::Conflict {
                        file: head.file.into(),
                        module: self.names.head.into(),
                        detail: "config.json ties it to the embedding (tie_word_embeddings), but the stored \
                                 `lm_head.weight` is another; set tie_word_embeddings to false, or remove the tensor"
                            .into(),
                    });
                }
                tensors.take(&table(self.names.head));
            }
            _ => self.tied_embeddings = false,
        }
        Ok(self)
    }

    fn check_layers(&self, checkpoint: &Checkpoint) -> Result<()> {
        let prefix = self.names.layers;
        let layer = |name: &str| name.strip_prefix(prefix)?.strip_prefix('.')?.split('.').next()?.parse::<usize>().ok();
        // A last layer without any tensor may be one that does nothing.
        let needed = self.layers.iter().rposition(|l| !l.steps.is_empty()).map_or(0, |last| last + 1);
        match checkpoint.tensors.names().filter_map(layer).max().map(|last| last.saturating_add(1)) {
            // More than that are left over, and named as such.
            Some(stored) if stored < needed => Err(checkpoint.config.error(
                "num_hidden_layers",
                format!("{stored}, the number of layers that tensors are stored of (`{prefix}.{}`)", stored - 1),
            )),
            _ => Ok(()),
        }
    }

    /// Attention of layer `index`, if it has any.
    #[must_use]
    pub fn attention(&self, index: usize) -> Option<&AttentionConfig> {
        self.layers.get(index)?.steps.iter().find_map(|s| match &s.mixer {
            MixerConfig::Attention(a) => Some(a),
            _ => None,
        })
    }

    /// The name of a part of layer `index`: `model.layers.3.self_attn`.
    #[must_use]
    pub fn in_layer(&self, index: usize, part: &str) -> String {
        format!("{}.{index}.{part}", self.names.layers)
    }

    /// Names of the attention modules and the layers they are in.
    #[must_use]
    pub fn attentions(&self) -> Vec<(usize, String, AttentionConfig)> {
        self.mixers(|m| if let MixerConfig::Attention(a) = m { Some(*a) } else { None })
    }

    /// Values that attention layers keep of a token.
    #[must_use]
    pub fn cache_values(&self) -> usize {
        self.attentions().iter().map(|(_, _, a)| a.kv_heads * (a.head_dim + a.value_dim())).sum()
    }

    /// Values that recurrent layers keep of a sequence, in f32.
    #[must_use]
    pub fn state_values(&self) -> usize {
        let of = |m: &MixerConfig| match m {
            MixerConfig::Mamba(m) => Some(m.inner() * m.state + (m.kernel - 1) * m.channels()),
            MixerConfig::DeltaNet(d) => Some(d.value_heads * d.key_dim * d.value_dim + (d.kernel - 1) * d.channels()),
            _ => None,
        };
        self.mixers(of).iter().map(|m| m.2).sum()
    }

    /// Names of the mixtures and the layers they are in.
    #[must_use]
    pub fn mixtures(&self) -> Vec<(usize, String, &MixtureConfig)> {
        self.mixers(|m| if let MixerConfig::Mixture(m) = m { Some(m) } else { None })
    }

    fn mixers<'a, T>(&'a self, of: impl Fn(&'a MixerConfig) -> Option<T>) -> Vec<(usize, String, T)> {
        let mut found = Vec::new();
        for (index, layer) in self.layers.iter().enumerate() {
            found.extend(layer.steps.iter().filter_map(|s| Some((index, self.in_layer(index, s.at), of(&s.mixer)?))));
        }
        found
    }

    /// What is alike in all layers, where each is attention and then a SiLU-gated feed-forward or a mixture of such: what
    /// smoothing and rotating know.
    #[must_use]
    pub fn plain(&self) -> Option<Plain> {
        let attention = AttentionConfig { window: None, ..*self.attention(0)? };
        let alike = |l: &LayerConfig| {
            let same = |s: &StepConfig| match &s.mixer {
                MixerConfig::Attention(a) => AttentionConfig { window: None, ..*a } == attention,
                MixerConfig::Mlp(_) => true,
                MixerConfig::Mixture(m) => m.shared.is_none() && m.latent.is_none(),
                _ => false,
            };
            l.steps.len() == 2 && matches!(l.steps[0].mixer, MixerConfig::Attention(_)) && l.steps.iter().all(same)
        };
        let alone = |s: &StepConfig| s.after.is_none();
        let plain = self.features().is_empty()
            && !self.offset_norms
            && self.layers.iter().flat_map(|l| &l.steps).all(alone)
            && self.layers.iter().all(alike);
        let rope = self.ropes.first().filter(|_| plain)?.0;
        let experts = self.mixtures().first().map(|(_, _, m)| m.experts);
        Some(Plain { attention, rope, experts })
    }

    /// What it needs of a backend that not every decoder needs.
    #[must_use]
    pub fn features(&self) -> Vec<Feature> {
        let mut out = Vec::new();
        let mlp = |m: &MlpConfig| {
            let other = (m.activation != Activation::Silu).then_some(Feature::Activation(m.activation));
            other.into_iter().chain(m.is_fused().then_some(Feature::Rearranged))
        };
        out.extend(self.embedding_scale.map(|_| Feature::EmbeddingScale));
        for step in self.layers.iter().flat_map(|l| &l.steps) {
            match &step.mixer {
                MixerConfig::Attention(a) => {
                    out.extend(a.sinks.then_some(Feature::Sinks));
                    out.extend(a.gated.then_some(Feature::Gate));
                    out.extend((a.inputs != InputsConfig::Separate).then_some(Feature::Rearranged));
                    out.extend((a.value_dim() != a.head_dim).then_some(Feature::ValueWidth));
                    out.extend((a.qk_norm == QkNorm::Rows).then_some(Feature::RowNorms));
                    out.extend(a.growth.map(|_| Feature::QueryGrowth));
                    let turned = a.rope.map(|r| self.ropes[r].1);
                    out.extend(turned.filter(|t| *t != a.head_dim).map(|_| Feature::PartialRotation));
                }
                MixerConfig::Mamba(_) => out.push(Feature::Mamba),
                MixerConfig::DeltaNet(_) => out.push(Feature::DeltaNet),
                MixerConfig::Mlp(m) => out.extend(mlp(m)),
                MixerConfig::Mixture(m) => {
                    out.extend(mlp(&m.expert));
                    out.extend((m.rule.scores != RouterScores::Softmax).then_some(Feature::Router));
                    out.extend(m.shared.and_then(|s| s.gate).map(|_| Feature::Gate));
                }
            }
        }
        out.dedup();
        out
    }
}

impl Architecture {
    /// `LlamaForCausalLM`, or `LlamaModel` as the decoder without a head is saved; `…ForConditionalGeneration` where
    /// images may come in too.
    fn by_class(name: &str) -> Option<Self> {
        let ends = ["ForCausalLM", "ForConditionalGeneration", "Model"];
        let family = ends.iter().find_map(|end| name.strip_suffix(end))?;
        Self::ALL.iter().find(|a| a.1 == family).map(|a| a.0)
    }

    pub(super) fn by_type(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|a| a.2.contains(&name)).map(|a| a.0)
    }

    /// What `architectures` calls it.
    #[must_use]
    pub fn class(self) -> String {
        let family = Self::ALL.iter().find(|a| a.0 == self).map_or("", |a| a.1);
        format!("{family}ForCausalLM")
    }

    /// What `model_type` calls it.
    #[must_use]
    pub fn model_type(self) -> &'static str {
        Self::ALL.iter().find(|a| a.0 == self).map_or("", |a| a.2[0])
    }
}

/// `architectures` and `model_type` must name the same: transformers goes by the second, vLLM by the first.
fn architecture(c: &Object) -> Result<Architecture> {
    let unknown = |found: &str| {
        let classes: Vec<String> = Architecture::ALL.iter().map(|a| a.0.class()).collect();
        CheckpointError::Unknown {
            file: c.file().into(),
            what: "architecture",
            found: found.into(),
            known: classes.join(", ").into(),
        }
    };
    let names = c.strings("architectures")?;
    let by_type = c.string("model_type")?.unwrap_or_default();
    let Some(first) = names.first() else { return Architecture::by_type(by_type).ok_or_else(|| unknown(by_type)) };
    let named = Architecture::by_class(first).ok_or_else(|| unknown(first))?;
    if Architecture::by_type(by_type).is_some_and(|t| t != named) {
        let expected = format!("the type of {first}, which `architectures` names; correct the one that is wrong");
        return Err(c.error("model_type", expected));
    }
    if let Some(other) = names.iter().find(|n| Architecture::by_class(n) != Some(named)) {
        return Err(c.error("architectures", format!("one architecture; {first} and {other} compute different things")));
    }
    Ok(named)
}

/// What every configuration has.
struct Common {
    hidden: usize,
    vocab: usize,
    heads: usize,
    tied_embeddings: bool,
    eos_tokens: Vec<u32>,
}

impl Common {
    fn read(c: &Object) -> Result<Self> {
        Ok(Self {
            hidden: width(c, "hidden_size")?,
            vocab: c.required_integer("vocab_size", 1..=limit::VOCAB)?,
            heads: c.required_integer("num_attention_heads", 1..=limit::HEADS)?,
            tied_embeddings: c.bool_or("tie_word_embeddings", false)?,
            eos_tokens: c.token_ids("eos_token_id")?,
        })
    }
}

const HEAD_COUNT: RangeInclusive<usize> = 1..=limit::HEADS;
const HEAD_DIM: RangeInclusive<usize> = 1..=limit::HEAD_DIM;

fn width(c: &Object, key: &str) -> Result<usize> {
    c.required_integer(key, 1..=limit::WIDTH)
}

fn layer_count(c: &Object) -> Result<usize> {
    c.required_integer("num_hidden_layers", 1..=limit::LAYERS)
}

/// Heads of keys, `heads` where the key is null and `absent` where it is not there.
fn kv_heads(c: &Object, heads: usize, absent: Option<usize>) -> Result<usize> {
    let kv_heads = match c.integer("num_key_value_heads", HEAD_COUNT)? {
        Some(n) => n,
        // Absent is the class's default; null is one for each head.
        None if c.has("num_key_value_heads") => heads,
        None => absent.unwrap_or(heads),
    };
    if heads % kv_heads != 0 {
        return Err(c.error("num_key_value_heads", format!("a divisor of num_attention_heads = {heads}")));
    }
    Ok(kv_heads)
}

/// Width of a head, hidden_size / num_attention_heads where nothing says it.
fn head_dim(c: &Object, hidden: usize, heads: usize, absent: Option<usize>) -> Result<usize> {
    match c.integer("head_dim", HEAD_DIM)? {
        Some(d) => Ok(d),
        None if absent.is_some() && !c.has("head_dim") => Ok(absent.unwrap_or_default()),
        None if hidden % heads == 0 && hidden / heads <= limit::HEAD_DIM => Ok(hidden / heads),
        None => Err(c.error("num_attention_heads", format!("a divisor of hidden_size = {hidden}"))),
    }
}

/// The one value that is computed here.
fn only(c: &Object, key: &str, values: &[&str]) -> Result<()> {
    match c.string(key)?.is_some_and(|v| !values.contains(&v)) {
        true => Err(c.error(key, format!("{:?}", values[0]))),
        false => Ok(()),
    }
}

/// Experts of each of `mixtures` layers.
fn expert_count(c: &Object, key: &str, mixtures: usize) -> Result<usize> {
    let experts = c.required_integer(key, 1..=limit::EXPERTS)?;
    if experts * mixtures > limit::ALL_EXPERTS {
        let most = limit::ALL_EXPERTS;
        return Err(c.error(key, format!("at most {most} experts in all {mixtures} layers together")));
    }
    Ok(experts)
}

/// Positions, by the class's default where the file does not say.
fn positions(c: &Object, absent: usize) -> Result<usize> {
    Ok(c.integer("max_position_embeddings", 1..=limit::POSITIONS)?.unwrap_or(absent))
}

/// A mixture with scores by sigmoid, corrected to choose by, in groups: DeepSeek-V3's, of which others have made theirs.
fn corrected(c: &Object, mixtures: usize, names: FfnNames) -> Result<MixtureConfig> {
    let experts = expert_count(c, "n_routed_experts", mixtures)?;
    let groups = c.integer("n_group", 1..=experts)?.unwrap_or(1);
    if experts % groups != 0 || (groups > 1 && experts / groups < 2) {
        let expected = format!("a divisor of n_routed_experts = {experts} that leaves at least two in a group");
        return Err(c.error("n_group", expected));
    }
    let kept = c.integer("topk_group", 1..=groups)?.unwrap_or(1);
    let top_k = c.required_integer("num_experts_per_tok", 1..=kept * (experts / groups))?;
    let width = width(c, "moe_intermediate_size")?;
    Ok(MixtureConfig {
        router: "gate",
        router_bias: false,
        experts,
        rule: RouterRule {
            top_k,
            scores: RouterScores::Sigmoid { bias: None, groups, top_groups: kept },
            renormalize: c.bool_or("norm_topk_prob", true)?.then_some(1e-20),
            scale: c.positive_f32("routed_scaling_factor")?.unwrap_or(1.0),
        },
        correction: Some("gate.e_score_correction_bias"),
        expert: MlpConfig { names, ..MlpConfig::silu(width) },
        latent: None,
        shared: None,
    })
}

/// Kinds of the layers under `key`, one of each of `layers`.
fn layer_kinds(c: &Object, key: &str, layers: usize) -> Result<Vec<String>> {
    let kinds = c.strings(key)?;
    if kinds.len() != layers {
        return Err(c.error(key, format!("one entry for each of the {layers} layers")));
    }
    Ok(kinds)
}
