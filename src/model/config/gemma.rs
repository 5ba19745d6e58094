//! Gemma 3: norms before and after every mixer, windows in most layers with a rotation of their own, scaled embeddings.
//! Source: transformers 5.24 gemma3.

use serde_json::{Value, json};

use super::{
    Activation, Architecture, AttentionConfig, HEAD_COUNT, LayerConfig, MixerConfig, MlpConfig, ModelConfig, Names,
    QkNorm, StepConfig, head_dim, kv_heads, layer_count, layer_kinds, limit, only, positions, width,
};
use crate::checkpoint::error::Result;
use crate::checkpoint::json::Object;
use crate::model::rope::Rope;

/// Of every so many layers the last attends to everything, where the file does not list them.
const PATTERN: usize = 6;
/// Base of the rotation under a window, where the file does not say.
const LOCAL_THETA: f64 = 10_000.0;
const GLOBAL_THETA: f64 = 1_000_000.0;

pub(super) fn read(c: &Object, architecture: Architecture) -> Result<ModelConfig> {
    let hidden = width(c, "hidden_size")?;
    // Google's own files leave what the class has as its default out.
    let heads = c.integer("num_attention_heads", HEAD_COUNT)?.unwrap_or(8);
    let vocab = c.integer("vocab_size", 1..=limit::VOCAB)?.unwrap_or(262_208);
    let (kv_heads, head_dim) = (kv_heads(c, heads, Some(4))?, head_dim(c, hidden, heads, Some(256))?);
    if head_dim % 2 != 0 {
        return Err(c.error("head_dim", "an even number (RoPE rotates pairs)"));
    }
    only(c, "hidden_activation", &["gelu_pytorch_tanh"])?;
    for key in ["attn_logit_softcapping", "final_logit_softcapping"] {
        if c.get(key).is_some() {
            return Err(c.error(key, "null: no released Gemma 3 has one"));
        }
    }
    if c.bool_or("use_bidirectional_attention", false)? {
        return Err(c.error("use_bidirectional_attention", "false: text is generated from left to right"));
    }
    let layers = layer_count(c)?;
    let max_positions = positions(c, 131_072)?;
    let window = c.integer("sliding_window", 1..=limit::POSITIONS)?.unwrap_or(4096);
    let windows: Vec<Option<usize>> = if c.get("layer_types").is_some() {
        let kind = |kind: String| match kind.as_str() {
            "sliding_attention" => Ok(Some(window)),
            "full_attention" => Ok(None),
            _ => Err(c.error("layer_types", "full_attention or sliding_attention")),
        };
        layer_kinds(c, "layer_types", layers)?.into_iter().map(kind).collect::<Result<_>>()?
    } else {
        let key = if c.has("sliding_window_pattern") { "sliding_window_pattern" } else { "_sliding_window_pattern" };
        let pattern = c.integer(key, 1..=limit::LAYERS)?.unwrap_or(PATTERN);
        (1..=layers).map(|i| (i % pattern != 0).then_some(window)).collect()
    };
    let ropes = [rope(c, "full_attention", max_positions)?, rope(c, "sliding_attention", max_positions)?];
    let scalar = c.positive_f32("query_pre_attn_scalar")?.unwrap_or(256.0);
    let bias = c.bool_or("attention_bias", false)?;
    let attention = AttentionConfig {
        qkv_bias: bias,
        output_bias: bias,
        qk_norm: QkNorm::Heads,
        scale: 1.0 / scalar.sqrt(),
        ..AttentionConfig::new(heads, kv_heads, head_dim)
    };
    let mlp = MlpConfig { activation: Activation::GeluTanh, ..MlpConfig::silu(width(c, "intermediate_size")?) };
    let layer = |window: &Option<usize>| {
        let rope = Some(usize::from(window.is_some()));
        let attention = MixerConfig::Attention(AttentionConfig { window: *window, rope, ..attention });
        let after = Some("post_attention_layernorm");
        let attention = StepConfig { norm: "input_layernorm", after, at: "self_attn", mixer: attention };
        let (norm, after) = ("pre_feedforward_layernorm", Some("post_feedforward_layernorm"));
        LayerConfig { steps: vec![attention, StepConfig { norm, after, at: "mlp", mixer: MixerConfig::Mlp(mlp) }] }
    };
    Ok(ModelConfig {
        architecture,
        names: Names::PLAIN,
        hidden,
        vocab,
        max_positions,
        rms_eps: c.positive_f32("rms_norm_eps")?.unwrap_or(1e-6),
        ropes: ropes.map(|rope| (rope, head_dim)).to_vec(),
        layers: windows.iter().map(layer).collect(),
        offset_norms: true,
        // Rounded to the type of the weights, as the deployed model has it.
        embedding_scale: Some(half::bf16::from_f32((hidden as f32).sqrt()).to_f32()),
        tied_embeddings: c.bool_or("tie_word_embeddings", true)?,
        eos_tokens: c.token_ids("eos_token_id")?,
    })
}

/// The rotation of one kind of layers: a block of its own (transformers 5), or the keys of before.
fn rope(c: &Object, kind: &str, positions: usize) -> Result<Rope> {
    let blocks = c.object("rope_parameters")?;
    let block = blocks.as_ref().map(|b| b.object(kind)).transpose()?.flatten();
    let keys: Value = match (block, kind) {
        (Some(block), _) => json!({"rope_parameters": block.value()}),
        (None, "sliding_attention") => {
            json!({"rope_theta": c.positive("rope_local_base_freq")?.unwrap_or(LOCAL_THETA)})
        }
        (None, _) => {
            let theta = c.positive("rope_theta")?.unwrap_or(GLOBAL_THETA);
            json!({"rope_theta": theta, "rope_scaling": c.get("rope_scaling")})
        }
    };
    let keys = Object::of(c.file(), keys)?;
    let (rope, _) = Rope::read(&keys, positions)?;
    rope.whole_heads(&keys)?;
    rope.no_growth(&keys)?;
    Ok(rope)
}
