//! Mixtral: Mistral with a mixture of experts in every layer. Source: transformers 5.24 mixtral.

use super::llama::plain_layer;
use super::{
    Architecture, AttentionConfig, Common, FfnNames, MixerConfig, MixtureConfig, MlpConfig, ModelConfig, expert_count,
    head_dim, kv_heads, layer_count, limit, only, positions, width,
};
use crate::checkpoint::error::Result;
use crate::checkpoint::json::Object;
use crate::logits::RouterRule;
use crate::model::rope::Rope;

pub(super) fn read(c: &Object, architecture: Architecture) -> Result<ModelConfig> {
    let common = Common::read(c)?;
    let Common { hidden, heads, .. } = common;
    let (kv_heads, head_dim) = (kv_heads(c, heads, Some(8))?, head_dim(c, hidden, heads, None)?);
    if head_dim % 2 != 0 {
        return Err(c.error("head_dim", "an even number (RoPE rotates pairs)"));
    }
    only(c, "hidden_act", &["silu", "swish"])?;
    let layers = layer_count(c)?;
    let max_positions = positions(c, 131_072)?;
    let (rope, _) = Rope::read(c, max_positions)?;
    rope.whole_heads(c)?;
    rope.no_growth(c)?;
    let window = c.integer("sliding_window", 1..=limit::POSITIONS)?;
    let attention = AttentionConfig { window, ..AttentionConfig::new(heads, kv_heads, head_dim) };
    let experts = expert_count(c, "num_local_experts", layers)?;
    let mixture = MixtureConfig {
        router: "gate",
        router_bias: false,
        experts,
        rule: RouterRule::softmax(c.required_integer("num_experts_per_tok", 1..=experts)?, true),
        correction: None,
        expert: MlpConfig { names: FfnNames::W, ..MlpConfig::silu(width(c, "intermediate_size")?) },
        latent: None,
        shared: None,
    };
    let mut layer = plain_layer(MixerConfig::Attention(attention), MixerConfig::Mixture(mixture));
    layer.steps[1].at = "block_sparse_moe";
    common.model(c, architecture, 1e-5, max_positions, vec![(rope, head_dim)], vec![layer; layers])
}
