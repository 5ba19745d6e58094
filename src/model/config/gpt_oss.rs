//! gpt-oss: attention with sinks, every other layer under a window, and mixtures of experts with clamped SwiGLU. Source:
//! transformers 5.24 gpt_oss.

use super::llama::plain_layer;
use super::{
    Activation, Architecture, AttentionConfig, Common, FfnNames, MixerConfig, MixtureConfig, MlpConfig, ModelConfig,
    expert_count, head_dim, kv_heads, layer_count, layer_kinds, limit, only, width,
};
use crate::checkpoint::error::Result;
use crate::checkpoint::json::Object;
use crate::logits::{RouterRule, RouterScores};
use crate::model::rope::Rope;

/// What the gate's sigmoid is steepened by; no file has had another.
const ALPHA: f64 = 1.702;

pub(super) fn read(c: &Object, architecture: Architecture) -> Result<ModelConfig> {
    let common = Common::read(c)?;
    let Common { hidden, heads, .. } = common;
    let kv_heads = kv_heads(c, heads, Some(8))?;
    let head_dim = head_dim(c, hidden, heads, Some(64))?;
    if head_dim % 2 != 0 {
        return Err(c.error("head_dim", "an even number (RoPE rotates pairs)"));
    }
    only(c, "hidden_act", &["silu", "swish"])?;
    if c.positive("swiglu_alpha")?.is_some_and(|a| a != ALPHA) {
        return Err(c.error("swiglu_alpha", format!("{ALPHA}")));
    }
    let layers = layer_count(c)?;
    let max_positions = c.integer("max_position_embeddings", 1..=limit::POSITIONS)?.unwrap_or(131_072);
    let (rope, _) = Rope::read(c, max_positions)?;
    rope.whole_heads(c)?;
    rope.no_growth(c)?;
    let window = c.integer("sliding_window", 1..=limit::POSITIONS)?.unwrap_or(128);
    let bias = c.bool_or("attention_bias", true)?;
    let plain = AttentionConfig::new(heads, kv_heads, head_dim);
    let attention = AttentionConfig { qkv_bias: bias, output_bias: bias, sinks: true, ..plain };
    let experts = expert_count(c, "num_local_experts", layers)?;
    let key = if c.get("num_experts_per_tok").is_some() { "num_experts_per_tok" } else { "experts_per_token" };
    let limit = c.positive_f32("swiglu_limit")?.unwrap_or(7.0);
    let expert = MlpConfig {
        width: width(c, "intermediate_size")?,
        activation: Activation::ClampedSwiglu { limit },
        bias: true,
        names: FfnNames::PROJ,
    };
    let mixture = MixtureConfig {
        router: "router",
        router_bias: true,
        experts,
        rule: RouterRule {
            top_k: c.required_integer(key, 1..=experts)?,
            scores: RouterScores::SoftmaxOfChosen,
            renormalize: None,
            scale: 1.0,
        },
        correction: None,
        expert,
        latent: None,
        shared: None,
    };
    let windows: Vec<Option<usize>> = if c.get("layer_types").is_some() {
        let kind = |kind: String| match kind.as_str() {
            "sliding_attention" => Ok(Some(window)),
            "full_attention" => Ok(None),
            _ => Err(c.error("layer_types", "full_attention or sliding_attention")),
        };
        layer_kinds(c, "layer_types", layers)?.into_iter().map(kind).collect::<Result<_>>()?
    } else {
        (0..layers).map(|i| (i % 2 == 0).then_some(window)).collect()
    };
    let layer = |window: &Option<usize>| {
        let attention = MixerConfig::Attention(AttentionConfig { window: *window, ..attention });
        plain_layer(attention, MixerConfig::Mixture(mixture.clone()))
    };
    common.model(c, architecture, 1e-5, max_positions, vec![(rope, head_dim)], windows.iter().map(layer).collect())
}
