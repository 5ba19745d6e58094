//! GLM-4.5 and later (glm4_moe): attention that turns half of a head, dense first layers, then mixtures with shared experts.
//! Source: transformers 5.24 glm4_moe.

use super::llama::plain_layer;
use super::{
    Architecture, AttentionConfig, Common, FfnNames, MixerConfig, MixtureConfig, MlpConfig, ModelConfig, QkNorm,
    SharedConfig, corrected, head_dim, kv_heads, layer_count, limit, only, positions, width,
};
use crate::checkpoint::error::Result;
use crate::checkpoint::json::Object;
use crate::model::rope::Rope;

/// Where the file does not say which part of a head turns.
const TURNED: f64 = 0.5;

pub(super) fn read(c: &Object, architecture: Architecture) -> Result<ModelConfig> {
    let common = Common::read(c)?;
    let Common { hidden, heads, .. } = common;
    let (kv_heads, head_dim) = (kv_heads(c, heads, Some(8))?, head_dim(c, hidden, heads, Some(128))?);
    only(c, "hidden_act", &["silu", "swish"])?;
    let layers = layer_count(c)?;
    let max_positions = positions(c, 131_072)?;
    let (mut rope, _) = Rope::read(c, max_positions)?;
    rope.no_growth(c)?;
    rope.part = rope.part.or(Some(TURNED));
    let turned = rope.turned(c, head_dim)?;
    let qk_norm = if c.bool_or("use_qk_norm", false)? { QkNorm::Heads } else { QkNorm::None };
    let qkv_bias = c.bool_or("attention_bias", false)?;
    let attention = AttentionConfig { qk_norm, qkv_bias, ..AttentionConfig::new(heads, kv_heads, head_dim) };
    let layers = dense_then_mixtures(c, layers, MixerConfig::Attention(attention))?;
    common.model(c, architecture, 1e-5, max_positions, vec![(rope, turned)], layers)
}

/// Layers of which the first have a dense feed-forward, and the others a mixture with shared experts.
pub(super) fn dense_then_mixtures(
    c: &Object,
    layers: usize,
    attention: MixerConfig,
) -> Result<Vec<super::LayerConfig>> {
    let dense = c.integer("first_k_dense_replace", 0..=layers)?.unwrap_or(1.min(layers));
    let mlp = (dense > 0).then(|| width(c, "intermediate_size").map(MlpConfig::silu)).transpose()?;
    let mixture = (dense < layers).then(|| corrected(c, layers - dense, FfnNames::PROJ)).transpose()?;
    // More shared experts are one as wide as all of them.
    let shared = c.integer("n_shared_experts", 0..=limit::EXPERTS)?.unwrap_or(0);
    let mixture = mixture.map(|m| {
        let mlp = MlpConfig::silu(shared * m.expert.width);
        let shared = (shared > 0).then_some(SharedConfig { at: "shared_experts", mlp, gate: None });
        MixerConfig::Mixture(MixtureConfig { shared, ..m })
    });
    let ffn = |index| if index < dense { mlp.map(MixerConfig::Mlp) } else { mixture.clone() };
    Ok((0..layers).filter_map(|i| Some(plain_layer(attention.clone(), ffn(i)?))).collect())
}
