//! Phi-3 and Phi-4: Llama with q, k and v in one matrix, and gate and up in another. Source: transformers 5.24 phi3.

use super::llama::plain_layer;
use super::{
    Architecture, AttentionConfig, Common, FfnNames, InputsConfig, MixerConfig, MlpConfig, ModelConfig, head_dim,
    kv_heads, layer_count, limit, only, positions, width,
};
use crate::checkpoint::error::Result;
use crate::checkpoint::json::Object;
use crate::model::rope::Rope;

pub(super) fn read(c: &Object, architecture: Architecture) -> Result<ModelConfig> {
    let common = Common::read(c)?;
    let Common { hidden, heads, .. } = common;
    let (kv_heads, head_dim) = (kv_heads(c, heads, None)?, head_dim(c, hidden, heads, None)?);
    only(c, "hidden_act", &["silu", "swish"])?;
    let layers = layer_count(c)?;
    let max_positions = positions(c, 4096)?;
    let (mut rope, _) = Rope::read(c, max_positions)?;
    rope.no_growth(c)?;
    rope.part = rope.part.or(Some(1.0));
    let turned = rope.turned(c, head_dim)?;
    let window = c.integer("sliding_window", 1..=limit::POSITIONS)?;
    let plain = AttentionConfig::new(heads, kv_heads, head_dim);
    let attention = AttentionConfig { window, inputs: InputsConfig::Fused, ..plain };
    let mlp = MlpConfig { names: FfnNames::FUSED, ..MlpConfig::silu(width(c, "intermediate_size")?) };
    let layer = plain_layer(MixerConfig::Attention(attention), MixerConfig::Mlp(mlp));
    common.model(c, architecture, 1e-5, max_positions, vec![(rope, turned)], vec![layer; layers])
}
