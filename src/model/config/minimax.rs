//! MiniMax-M2: attention with norms over whole rows of q and k, and a mixture of experts in every layer. Source:
//! transformers 5.24 minimax_m2.

use super::llama::plain_layer;
use super::{
    Architecture, AttentionConfig, Common, FfnNames, HEAD_DIM, MixerConfig, MixtureConfig, MlpConfig, ModelConfig,
    QkNorm, expert_count, head_dim, kv_heads, layer_count, only, positions, width,
};
use crate::checkpoint::error::Result;
use crate::checkpoint::json::Object;
use crate::logits::{RouterRule, RouterScores};
use crate::model::rope::Rope;

pub(super) fn read(c: &Object, architecture: Architecture) -> Result<ModelConfig> {
    let common = Common::read(c)?;
    let Common { hidden, heads, .. } = common;
    let (kv_heads, head_dim) = (kv_heads(c, heads, Some(8))?, head_dim(c, hidden, heads, Some(128))?);
    only(c, "hidden_act", &["silu", "swish"])?;
    only(c, "scoring_func", &["sigmoid"])?;
    only(c, "qk_norm_type", &["per_layer"])?;
    let layers = layer_count(c)?;
    let max_positions = positions(c, 196_608)?;
    let (rope, _) = Rope::read(c, max_positions)?;
    rope.no_growth(c)?;
    let turned = match c.integer("rotary_dim", HEAD_DIM)? {
        None => rope.turned(c, head_dim)?,
        Some(d) if d % 2 == 0 && d <= head_dim && (rope.part.is_none() || rope.turned(c, head_dim)? == d) => d,
        Some(_) => {
            let expected =
                format!("an even number of at most head_dim = {head_dim}, and what partial_rotary_factor says");
            return Err(c.error("rotary_dim", expected));
        }
    };
    let qk_norm = if c.bool_or("use_qk_norm", true)? { QkNorm::Rows } else { QkNorm::None };
    let attention = AttentionConfig { qk_norm, ..AttentionConfig::new(heads, kv_heads, head_dim) };
    let experts = expert_count(c, "num_local_experts", layers)?;
    let mixture = MixtureConfig {
        router: "gate",
        router_bias: false,
        experts,
        rule: RouterRule {
            top_k: c.required_integer("num_experts_per_tok", 1..=experts)?,
            scores: RouterScores::Sigmoid { bias: None, groups: 1, top_groups: 1 },
            renormalize: Some(0.0),
            scale: 1.0,
        },
        correction: Some("e_score_correction_bias"),
        expert: MlpConfig { names: FfnNames::W, ..MlpConfig::silu(width(c, "intermediate_size")?) },
        latent: None,
        shared: None,
    };
    let mut layer = plain_layer(MixerConfig::Attention(attention), MixerConfig::Mixture(mixture));
    layer.steps[1].at = "block_sparse_moe";
    common.model(c, architecture, 1e-6, max_positions, vec![(rope, turned)], vec![layer; layers])
}
