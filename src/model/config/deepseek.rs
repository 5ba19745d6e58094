//! DeepSeek-V3, R1 and Kimi-K2: latent attention, dense first layers, then mixtures with shared experts. Source:
//! transformers 5.24 deepseek_v3.

use super::glm::dense_then_mixtures;
use super::{
    Architecture, AttentionConfig, Common, HEAD_DIM, InputsConfig, LatentConfig, MixerConfig, ModelConfig, layer_count,
    limit, only, positions,
};
use crate::checkpoint::error::Result;
use crate::checkpoint::json::Object;
use crate::model::rope::Rope;

pub(super) fn read(c: &Object, architecture: Architecture) -> Result<ModelConfig> {
    let common = Common::read(c)?;
    let Common { heads, .. } = common;
    only(c, "hidden_act", &["silu", "swish"])?;
    only(c, "topk_method", &["noaux_tc"])?;
    only(c, "scoring_func", &["sigmoid"])?;
    if c.integer("moe_layer_freq", 1..=limit::LAYERS)?.is_some_and(|n| n != 1) {
        return Err(c.error("moe_layer_freq", "1: a mixture in every layer but the first"));
    }
    let layers = layer_count(c)?;
    let max_positions = positions(c, 4096)?;
    let (rope, _) = Rope::read(c, max_positions)?;
    rope.no_growth(c)?;
    let latent = LatentConfig {
        q_rank: c.integer("q_lora_rank", 1..=limit::WIDTH)?,
        kv_rank: c.required_integer("kv_lora_rank", 1..=limit::WIDTH)?,
        turned: c.required_integer("qk_rope_head_dim", HEAD_DIM)?,
        still: c.required_integer("qk_nope_head_dim", HEAD_DIM)?,
        value_dim: c.required_integer("v_head_dim", HEAD_DIM)?,
        interleaved: c.bool_or("rope_interleave", true)?,
    };
    if !latent.turned.is_multiple_of(2) {
        return Err(c.error("qk_rope_head_dim", "an even number (RoPE rotates pairs)"));
    }
    let bias = c.bool_or("attention_bias", false)?;
    if bias {
        return Err(c.error("attention_bias", "false: no released model of this architecture has biases"));
    }
    let plain = AttentionConfig::new(heads, heads, latent.turned + latent.still);
    let stretch = rope.all_dimensions_scale();
    let scale = plain.scale * stretch * stretch;
    let attention = AttentionConfig { scale, inputs: InputsConfig::Latent(latent), ..plain };
    common.model(
        c,
        architecture,
        1e-6,
        max_positions,
        vec![(rope, latent.turned)],
        dense_then_mixtures(c, layers, MixerConfig::Attention(attention))?,
    )
}
