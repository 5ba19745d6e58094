//! Keys that configurations of many architectures share, read and checked.

use std::ops::RangeInclusive;

use super::{Architecture, FfnNames, LayerConfig, MixtureConfig, MlpConfig, ModelConfig, Names};
use crate::checkpoint::error::Result;
use crate::checkpoint::json::Object;
use crate::logits::{RouterRule, RouterScores};
use crate::model::rope::Rope;

/// Bounds on what a configuration may ask for, checked before anything is allocated. The largest models known stay well
/// below each of them.
pub(super) mod limit {
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

/// What every configuration has.
pub(super) struct Common {
    pub hidden: usize,
    pub vocab: usize,
    pub heads: usize,
    pub tied_embeddings: bool,
    pub eos_tokens: Vec<u32>,
}

impl Common {
    pub fn read(c: &Object) -> Result<Self> {
        Ok(Self {
            hidden: width(c, "hidden_size")?,
            vocab: c.required_integer("vocab_size", 1..=limit::VOCAB)?,
            heads: c.required_integer("num_attention_heads", 1..=limit::HEADS)?,
            tied_embeddings: c.bool_or("tie_word_embeddings", false)?,
            eos_tokens: c.token_ids("eos_token_id")?,
        })
    }

    /// The model of these layers, with the names that most have. `eps`: of its norms, where the configuration does not say.
    pub fn model(
        self,
        c: &Object,
        architecture: Architecture,
        eps: f32,
        max_positions: usize,
        ropes: Vec<(Rope, usize)>,
        layers: Vec<LayerConfig>,
    ) -> Result<ModelConfig> {
        Ok(ModelConfig {
            architecture,
            names: Names::PLAIN,
            hidden: self.hidden,
            vocab: self.vocab,
            max_positions,
            rms_eps: c.positive_f32("rms_norm_eps")?.unwrap_or(eps),
            ropes,
            layers,
            offset_norms: false,
            embedding_scale: None,
            tied_embeddings: self.tied_embeddings,
            eos_tokens: self.eos_tokens,
        })
    }
}

pub(super) const HEAD_COUNT: RangeInclusive<usize> = 1..=limit::HEADS;
pub(super) const HEAD_DIM: RangeInclusive<usize> = 1..=limit::HEAD_DIM;

pub(super) fn width(c: &Object, key: &str) -> Result<usize> {
    c.required_integer(key, 1..=limit::WIDTH)
}

pub(super) fn layer_count(c: &Object) -> Result<usize> {
    c.required_integer("num_hidden_layers", 1..=limit::LAYERS)
}

/// Heads of keys, `heads` where the key is null and `absent` where it is not there.
pub(super) fn kv_heads(c: &Object, heads: usize, absent: Option<usize>) -> Result<usize> {
    let kv_heads = match c.integer("num_key_value_heads", HEAD_COUNT)? {
        Some(n) => n,
        // Absent is the class's default; null is one for each head.
        None if c.has("num_key_value_heads") => heads,
        None => absent.unwrap_or(heads),
    };
    if !heads.is_multiple_of(kv_heads) {
        return Err(c.error("num_key_value_heads", format!("a divisor of num_attention_heads = {heads}")));
    }
    Ok(kv_heads)
}

/// Width of a head, hidden_size / num_attention_heads where nothing says it.
pub(super) fn head_dim(c: &Object, hidden: usize, heads: usize, absent: Option<usize>) -> Result<usize> {
    match c.integer("head_dim", HEAD_DIM)? {
        Some(d) => Ok(d),
        None if absent.is_some() && !c.has("head_dim") => Ok(absent.unwrap_or_default()),
        None if hidden.is_multiple_of(heads) && hidden / heads <= limit::HEAD_DIM => Ok(hidden / heads),
        None => Err(c.error("num_attention_heads", format!("a divisor of hidden_size = {hidden}"))),
    }
}

/// The one value that is computed here.
pub(super) fn only(c: &Object, key: &str, values: &[&str]) -> Result<()> {
    match c.string(key)?.is_some_and(|v| !values.contains(&v)) {
        true => Err(c.error(key, format!("{:?}", values[0]))),
        false => Ok(()),
    }
}

/// Experts of each of `mixtures` layers.
pub(super) fn expert_count(c: &Object, key: &str, mixtures: usize) -> Result<usize> {
    let experts = c.required_integer(key, 1..=limit::EXPERTS)?;
    if experts * mixtures > limit::ALL_EXPERTS {
        let most = limit::ALL_EXPERTS;
        return Err(c.error(key, format!("at most {most} experts in all {mixtures} layers together")));
    }
    Ok(experts)
}

/// Positions, by the class's default where the file does not say.
pub(super) fn positions(c: &Object, absent: usize) -> Result<usize> {
    Ok(c.integer("max_position_embeddings", 1..=limit::POSITIONS)?.unwrap_or(absent))
}

/// A mixture with scores by sigmoid, corrected to choose by, in groups: DeepSeek-V3's, of which others have made theirs.
pub(super) fn corrected(c: &Object, mixtures: usize, names: FfnNames) -> Result<MixtureConfig> {
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
pub(super) fn layer_kinds(c: &Object, key: &str, layers: usize) -> Result<Vec<String>> {
    let kinds = c.strings(key)?;
    if kinds.len() != layers {
        return Err(c.error(key, format!("one entry for each of the {layers} layers")));
    }
    Ok(kinds)
}
