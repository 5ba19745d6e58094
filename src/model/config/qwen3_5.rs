//! Qwen3.5 and later: gated delta nets, every few layers gated attention; dense, or a mixture with a shared expert. Source:
//! transformers 5.24 qwen3_5 and qwen3_5_moe. Text only: the three position grids of its RoPE are then equal.

use super::llama::plain_layer;
use super::{
    Architecture, AttentionConfig, Common, DeltaConfig, HEAD_COUNT, HEAD_DIM, MixerConfig, MixtureConfig, MlpConfig,
    ModelConfig, QkNorm, SharedConfig, expert_count, head_dim, kv_heads, layer_count, layer_kinds, limit, only, width,
};
use crate::checkpoint::error::Result;
use crate::checkpoint::json::Object;
use crate::logits::RouterRule;
use crate::model::rope::Rope;

/// Of every so many layers the last is full attention, where the file does not list them.
const FULL_ATTENTION_INTERVAL: usize = 4;

pub(super) fn read(c: &Object, architecture: Architecture) -> Result<ModelConfig> {
    let common = Common::read(c)?;
    let Common { hidden, heads, .. } = common;
    let layers = layer_count(c)?;
    let kv_heads = kv_heads(c, heads, None)?;
    let head_dim = head_dim(c, hidden, heads, Some(256))?;
    only(c, "hidden_act", &["silu", "swish"])?;
    if c.bool_or("attention_bias", false)? {
        return Err(c.error("attention_bias", "false: no released model of this architecture has biases"));
    }
    let max_positions = c.integer("max_position_embeddings", 1..=limit::POSITIONS)?.unwrap_or(32_768);
    let (rope, _) = Rope::read(c, max_positions)?;
    rope.no_growth(c)?;
    let turned = rope.turned(c, head_dim)?;
    let plain = AttentionConfig::new(heads, kv_heads, head_dim);
    let attention = AttentionConfig { qk_norm: QkNorm::Heads, gated: true, ..plain };
    let ffn = match architecture {
        Architecture::Qwen3_5Moe => MixerConfig::Mixture(mixture(c, layers)?),
        _ => MixerConfig::Mlp(silu(c, "intermediate_size")?),
    };
    let delta = delta(c)?;
    let layer = |full: &bool| {
        let mut layer = plain_layer(MixerConfig::Attention(attention), ffn.clone());
        if !full {
            (layer.steps[0].at, layer.steps[0].mixer) = ("linear_attn", MixerConfig::DeltaNet(delta));
        }
        layer
    };
    Ok(ModelConfig {
        offset_norms: true,
        ..common.model(
            c,
            architecture,
            1e-6,
            max_positions,
            vec![(rope, turned)],
            full_layers(c, layers)?.iter().map(layer).collect(),
        )?
    })
}

/// Which layers are full attention.
fn full_layers(c: &Object, layers: usize) -> Result<Vec<bool>> {
    if c.get("layer_types").is_none() {
        let interval = c.integer("full_attention_interval", 1..=limit::LAYERS)?.unwrap_or(FULL_ATTENTION_INTERVAL);
        return Ok((1..=layers).map(|i| i % interval == 0).collect());
    }
    let kind = |kind: String| match kind.as_str() {
        "full_attention" => Ok(true),
        "linear_attention" => Ok(false),
        _ => Err(c.error("layer_types", "full_attention or linear_attention")),
    };
    layer_kinds(c, "layer_types", layers)?.into_iter().map(kind).collect()
}

fn silu(c: &Object, key: &str) -> Result<MlpConfig> {
    Ok(MlpConfig::silu(width(c, key)?))
}

fn delta(c: &Object) -> Result<DeltaConfig> {
    let key_heads = c.required_integer("linear_num_key_heads", HEAD_COUNT)?;
    let value_heads = c.required_integer("linear_num_value_heads", HEAD_COUNT)?;
    if value_heads % key_heads != 0 {
        let expected = format!("a multiple of linear_num_key_heads = {key_heads}");
        return Err(c.error("linear_num_value_heads", expected));
    }
    let key_dim = c.required_integer("linear_key_head_dim", HEAD_DIM)?;
    let value_dim = c.required_integer("linear_value_head_dim", HEAD_DIM)?;
    if value_heads * key_dim * value_dim > limit::STATE {
        let expected = format!("a state of at most {} values a layer", limit::STATE);
        return Err(c.error("linear_value_head_dim", expected));
    }
    let kernel = c.integer("linear_conv_kernel_dim", 1..=limit::KERNEL)?.unwrap_or(4);
    Ok(DeltaConfig { key_heads, value_heads, key_dim, value_dim, kernel })
}

fn mixture(c: &Object, layers: usize) -> Result<MixtureConfig> {
    let experts = expert_count(c, "num_experts", layers)?;
    let shared = silu(c, "shared_expert_intermediate_size")?;
    Ok(MixtureConfig {
        router: "gate",
        router_bias: false,
        experts,
        // That weights are rescaled is no matter of the configuration in this architecture.
        rule: RouterRule::softmax(c.required_integer("num_experts_per_tok", 1..=experts)?, true),
        correction: None,
        expert: silu(c, "moe_intermediate_size")?,
        latent: None,
        shared: Some(SharedConfig { at: "shared_expert", mlp: shared, gate: Some("shared_expert_gate") }),
    })
}
