//! nemotron-nas (DeciLM): Llama of which a search took attention or feed-forward out of some layers and changed the widths of
//! others (Llama-3_3-Nemotron-Super-49B). Source: vLLM's nemotron_nas.py.

use super::llama::{attention_step, ffn_step};
use super::{
    Architecture, AttentionConfig, Common, LayerConfig, MixerConfig, MlpConfig, ModelConfig, head_dim, layer_count,
    limit, only,
};
use crate::checkpoint::error::Result;
use crate::checkpoint::json::Object;
use crate::model::rope::Rope;

/// What widths of feed-forwards are rounded up to.
const WIDTH_STEP: usize = 256;

pub(super) fn read(c: &Object, architecture: Architecture) -> Result<ModelConfig> {
    let common = Common::read(c)?;
    let Common { hidden, heads, .. } = common;
    let head_dim = head_dim(c, hidden, heads, None)?;
    if head_dim % 2 != 0 {
        return Err(c.error("head_dim", "an even number (RoPE rotates pairs)"));
    }
    only(c, "hidden_act", &["silu", "swish"])?;
    let max_positions = c.integer("max_position_embeddings", 1..=limit::POSITIONS)?.unwrap_or(2048);
    let (rope, _) = Rope::read(c, max_positions)?;
    rope.whole_heads(c)?;
    rope.no_growth(c)?;
    let attention_bias = c.bool_or("attention_bias", false)?;
    let mlp_bias = c.bool_or("mlp_bias", false)?;
    let blocks = blocks(c, layer_count(c)?)?;
    let layer = |block: &Object| -> Result<LayerConfig> {
        let mut steps = Vec::new();
        if let Some(part) = part(block, "attention")? {
            let group = part.required_integer("n_heads_in_group", 1..=heads)?;
            if heads % group != 0 {
                return Err(part.error("n_heads_in_group", format!("a divisor of num_attention_heads = {heads}")));
            }
            let plain = AttentionConfig::new(heads, heads / group, head_dim);
            let attention = AttentionConfig { qkv_bias: attention_bias, output_bias: attention_bias, ..plain };
            steps.push(attention_step(MixerConfig::Attention(attention)));
        }
        if let Some(part) = part(block, "ffn")? {
            let width = ffn_width(&part, hidden)?;
            let mlp = MlpConfig { bias: mlp_bias, ..MlpConfig::silu(width) };
            steps.push(ffn_step(MixerConfig::Mlp(mlp)));
        }
        Ok(LayerConfig { steps })
    };
    common.model(
        c,
        architecture,
        1e-6,
        max_positions,
        vec![(rope, head_dim)],
        blocks.iter().map(layer).collect::<Result<_>>()?,
    )
}

/// The entries of `block_configs`, one of each layer.
fn blocks(c: &Object, layers: usize) -> Result<Vec<Object>> {
    let expected = || c.error("block_configs", format!("a list with an object for each of the {layers} layers"));
    let list = c.get("block_configs").and_then(serde_json::Value::as_array).filter(|l| l.len() == layers);
    let list = list.ok_or_else(expected)?;
    list.iter().enumerate().map(|(i, v)| c.inside(&format!("block_configs[{i}]"), v)).collect()
}

/// What a layer has of `key`; `None` where that is nothing.
fn part(block: &Object, key: &str) -> Result<Option<Object>> {
    let part = block.object(key)?.ok_or_else(|| block.error(key, "an object"))?;
    for unknown in ["replace_with_linear", "unshifted_sink", "use_prefill_window_in_sink_attention"] {
        if part.bool_or(unknown, false)? {
            return Err(part.error(unknown, "false: nothing else is supported"));
        }
    }
    for unknown in ["sparsify", "window_length", "num_sink_tokens"] {
        if part.get(unknown).is_some() {
            return Err(part.error(unknown, "null: nothing else is supported"));
        }
    }
    Ok((!part.bool_or("no_op", false)?).then_some(part))
}

/// 2/3 of `ffn_mult` times the model's width, rounded up.
fn ffn_width(ffn: &Object, hidden: usize) -> Result<usize> {
    let multiple = ffn.positive("ffn_mult")?.ok_or_else(|| ffn.error("ffn_mult", "a positive finite number"))?;
    let width = 2.0 * multiple * hidden as f64 / 3.0;
    if width >= limit::WIDTH as f64 {
        return Err(ffn.error("ffn_mult", format!("a number that gives a width of at most {}", limit::WIDTH)));
    }
    Ok((width as usize).max(1).next_multiple_of(WIDTH_STEP))
}
