//! config.json of a supported architecture, read into types that cannot be wrong: a list of layers, each a list of residual
//! steps. One file for each family of architectures.

mod deepseek;
mod gemma;
mod glm;
mod gpt_oss;
mod keys;
mod layers;
mod llama;
mod minimax;
mod mixtral;
mod nemotron_h;
mod nemotron_nas;
mod phi;
mod qwen3_5;

use crate::backend::Activation;
use crate::checkpoint::Checkpoint;
use crate::checkpoint::error::{CheckpointError, Result};
use crate::checkpoint::json::Object;
use crate::logits::RouterScores;

use self::keys::*;
pub use self::layers::*;
use super::rope::Rope;

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

    /// Whether its files have the experts of a layer in one tensor.
    #[must_use]
    pub fn fuses_experts(&self) -> bool {
        self.architecture == Architecture::GptOss
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
        let plain = self.is_usual()
            && !self.offset_norms
            && self.layers.iter().flat_map(|l| &l.steps).all(alone)
            && self.layers.iter().all(alike);
        let rope = self.ropes.first().filter(|_| plain)?.0;
        let experts = self.mixtures().first().map(|(_, _, m)| m.experts);
        Some(Plain { attention, rope, experts })
    }

    /// Whether attention, feed-forwards and mixtures are as Llama's and Qwen's are.
    fn is_usual(&self) -> bool {
        let mlp = |m: &MlpConfig| m.activation == Activation::Silu && !m.is_fused();
        let mixer = |step: &StepConfig| match &step.mixer {
            MixerConfig::Attention(a) => {
                let turned = a.rope.is_none_or(|r| self.ropes[r].1 == a.head_dim);
                let separate = a.inputs == InputsConfig::Separate && a.value_dim() == a.head_dim;
                turned && separate && !a.sinks && !a.gated && a.qk_norm != QkNorm::Rows && a.growth.is_none()
            }
            MixerConfig::Mlp(m) => mlp(m),
            MixerConfig::Mixture(m) => {
                mlp(&m.expert)
                    && m.rule.scores == RouterScores::Softmax
                    && m.shared.as_ref().is_none_or(|s| s.gate.is_none())
            }
            MixerConfig::Mamba(_) | MixerConfig::DeltaNet(_) => false,
        };
        self.embedding_scale.is_none() && self.layers.iter().flat_map(|l| &l.steps).all(mixer)
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
