//! What a configuration says of one layer.

use crate::backend::{Activation, QueryGrowth};
use crate::logits::RouterRule;

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
    pub(super) const PROJ: Self = Self { gate: Some("gate_proj"), up: "up_proj", down: "down_proj" };
    pub(super) const UNGATED: Self = Self { gate: None, up: "up_proj", down: "down_proj" };
    pub(super) const FUSED: Self = Self { gate: None, up: "gate_up_proj", down: "down_proj" };
    pub(super) const W: Self = Self { gate: Some("w1"), up: "w3", down: "w2" };
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
