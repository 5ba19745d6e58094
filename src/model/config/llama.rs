//! Llama, Mistral, Ministral 3, Qwen2, Qwen3 and its mixture of experts: attention and a SiLU-gated feed-forward in every layer.

use super::{
    Architecture, AttentionConfig, Common, LayerConfig, MixerConfig, MixtureConfig, MlpConfig, ModelConfig, QkNorm,
    StepConfig, expert_count, head_dim, kv_heads, layer_count, limit, only, width,
};
use crate::checkpoint::error::Result;
use crate::checkpoint::json::Object;
use crate::logits::RouterRule;
use crate::model::rope::Rope;

pub(super) fn read(c: &Object, architecture: Architecture) -> Result<ModelConfig> {
    let common = Common::read(c)?;
    let Common { hidden, heads, .. } = common;
    let defaults = Defaults::of(architecture);
    let kv_heads = kv_heads(c, heads, defaults.kv_heads)?;
    let head_dim = head_dim(c, hidden, heads, defaults.head_dim)?;
    if head_dim % 2 != 0 {
        return Err(c.error("head_dim", "an even number (RoPE rotates pairs)"));
    }
    only(c, "hidden_act", &["silu", "swish"])?;
    let layers = layer_count(c)?;
    let max_positions = c.integer("max_position_embeddings", 1..=limit::POSITIONS)?.unwrap_or(defaults.max_positions);
    let (rope, _) = Rope::read(c, max_positions)?;
    rope.whole_heads(c)?;
    let growth = if architecture == Architecture::Ministral3 { rope.query_growth() } else { rope.no_growth(c)? };
    let attention_bias = c.bool_or("attention_bias", architecture == Architecture::Qwen2)?;
    let qwen3 = matches!(architecture, Architecture::Qwen3 | Architecture::Qwen3Moe);
    let attention = AttentionConfig {
        // Qwen2 always has biases on q, k and v and none on the output; the key is not in its configuration.
        qkv_bias: architecture == Architecture::Qwen2 || attention_bias,
        output_bias: architecture != Architecture::Qwen2 && attention_bias,
        qk_norm: if qwen3 { QkNorm::Heads } else { QkNorm::None },
        growth,
        ..AttentionConfig::new(heads, kv_heads, head_dim)
    };
    let mlp_bias = architecture == Architecture::Llama && c.bool_or("mlp_bias", false)?;
    let mlp = MlpConfig { bias: mlp_bias, ..MlpConfig::silu(width(c, "intermediate_size")?) };
    let mixture = experts(c, architecture, layers)?;
    let windows = windows(c, architecture, layers)?;
    let layer = |(index, window): (usize, &Option<usize>)| {
        let attention = MixerConfig::Attention(AttentionConfig { window: *window, ..attention });
        let ffn = match &mixture {
            Some((mixture, dense)) if !dense.contains(&index) => MixerConfig::Mixture(mixture.clone()),
            _ => MixerConfig::Mlp(mlp),
        };
        plain_layer(attention, ffn)
    };
    common.model(
        c,
        architecture,
        1e-6,
        max_positions,
        vec![(rope, head_dim)],
        windows.iter().enumerate().map(layer).collect(),
    )
}

/// Attention and a feed-forward by the names that Llama gave them.
pub(super) fn plain_layer(attention: MixerConfig, ffn: MixerConfig) -> LayerConfig {
    LayerConfig { steps: vec![attention_step(attention), ffn_step(ffn)] }
}

pub(super) fn attention_step(mixer: MixerConfig) -> StepConfig {
    StepConfig { norm: "input_layernorm", after: None, at: "self_attn", mixer }
}

pub(super) fn ffn_step(mixer: MixerConfig) -> StepConfig {
    StepConfig { norm: "post_attention_layernorm", after: None, at: "mlp", mixer }
}

/// What transformers 5.24's configuration class takes where a key is absent, as far as it differs between classes.
struct Defaults {
    /// `None`: one for each head.
    kv_heads: Option<usize>,
    /// `None`: hidden_size / num_attention_heads.
    head_dim: Option<usize>,
    max_positions: usize,
}

impl Defaults {
    fn of(architecture: Architecture) -> Self {
        let (kv_heads, head_dim, max_positions) = match architecture {
            Architecture::Llama => (None, None, 2048),
            Architecture::Mistral => (Some(8), None, 131_072),
            Architecture::Ministral3 => (Some(8), Some(128), 262_144),
            Architecture::Qwen2 => (Some(32), None, 32_768),
            Architecture::Qwen3 => (Some(32), Some(128), 32_768),
            Architecture::Qwen3Moe => (Some(4), None, 32_768),
            _ => (None, None, 2048),
        };
        Self { kv_heads, head_dim, max_positions }
    }
}

/// Window of Mistral and Qwen where the key is absent; null is none.
const DEFAULT_WINDOW: usize = 4096;
/// Qwen's first layers that attend fully, where the key is absent.
const DEFAULT_FULL_LAYERS: usize = 28;

fn windows(c: &Object, architecture: Architecture, layers: usize) -> Result<Vec<Option<usize>>> {
    use Architecture as A;
    let used = match architecture {
        A::Mistral | A::Ministral3 => true,
        A::Llama => false,
        _ => c.bool_or("use_sliding_window", false)?,
    };
    // Only where it is used: 0 beside `use_sliding_window` false is how some write that there is none.
    let window = match c.has("sliding_window") {
        _ if !used => None,
        false if architecture == A::Ministral3 => None,
        false => Some(DEFAULT_WINDOW),
        true => c.integer("sliding_window", 1..=limit::POSITIONS)?,
    };
    let all = |window| Ok(vec![window; layers]);
    // In these classes every layer is alike, whatever `layer_types` says.
    if matches!(architecture, A::Llama | A::Qwen3Moe) {
        return all(window);
    }
    let kinds = c.strings("layer_types")?;
    if !kinds.is_empty() {
        if kinds.len() != layers {
            return Err(c.error("layer_types", format!("one entry for each of the {layers} layers")));
        }
        return kinds
            .iter()
            .map(|k| match (k.as_str(), window) {
                ("full_attention", _) => Ok(None),
                ("sliding_attention", Some(window)) => Ok(Some(window)),
                ("sliding_attention", None) => Err(c.error(
                    "layer_types",
                    "full_attention everywhere, since there is no window (sliding_window null, or use_sliding_window \
                     not true)",
                )),
                _ => Err(c.error("layer_types", "full_attention or sliding_attention")),
            })
            .collect();
    }
    let Some(window) = window else { return all(None) };
    // Qwen: the first `max_window_layers` layers attend fully.
    let full = match architecture {
        A::Mistral | A::Ministral3 => 0,
        _ => c.integer("max_window_layers", 0..=limit::LAYERS)?.unwrap_or(DEFAULT_FULL_LAYERS),
    };
    Ok((0..layers).map(|i| (i >= full).then_some(window)).collect())
}

/// The mixture, and the layers that have a dense feed-forward instead.
fn experts(c: &Object, architecture: Architecture, layers: usize) -> Result<Option<(MixtureConfig, Vec<usize>)>> {
    if architecture != Architecture::Qwen3Moe {
        return Ok(None);
    }
    let key = if c.get("num_experts").is_some() { "num_experts" } else { "num_local_experts" };
    let experts = expert_count(c, key, layers)?;
    let mixture = MixtureConfig {
        router: "gate",
        router_bias: false,
        experts,
        rule: RouterRule::softmax(
            c.required_integer("num_experts_per_tok", 1..=experts)?,
            c.bool_or("norm_topk_prob", false)?,
        ),
        correction: None,
        expert: MlpConfig::silu(width(c, "moe_intermediate_size")?),
        latent: None,
        shared: None,
    };
    let step = c.integer("decoder_sparse_step", 1..=limit::LAYERS)?.unwrap_or(1);
    let listed: Vec<usize> = match c.get("mlp_only_layers") {
        None => Vec::new(),
        Some(v) => v
            .as_array()
            .and_then(|a| a.iter().map(|v| v.as_u64().map(|v| v as usize)).collect())
            .ok_or_else(|| c.error("mlp_only_layers", "a list of layer numbers"))?,
    };
    let dense = (0..layers).filter(|i| listed.contains(i) || (i + 1) % step != 0).collect();
    Ok(Some((mixture, dense)))
}
