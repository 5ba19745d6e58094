//! The linear layers and norms of a model by their Hugging Face names: what loading, inspecting and quantizing agree on.

use super::config::ModelConfig;
use crate::checkpoint::resolve::LinearRole;

/// What a linear layer does in the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Part {
    Embedding,
    Q,
    K,
    V,
    O,
    Gate,
    Up,
    Down,
    Router,
    Head,
}

/// One linear layer.
#[derive(Clone, Debug)]
pub struct Module {
    /// `model.layers.0.self_attn.q_proj`.
    pub name: String,
    pub part: Part,
    /// `None` for embedding and head.
    pub layer: Option<usize>,
    /// Which expert it belongs to, in a mixture of experts.
    pub expert: Option<usize>,
    pub role: LinearRole,
}

impl Module {
    /// Whether quantization recipes apply to it by default: the linears of the blocks, not embedding, head or router.
    #[must_use]
    pub fn is_block_linear(&self) -> bool {
        !matches!(self.part, Part::Embedding | Part::Router | Part::Head)
    }

    /// Modules with the same key read the same input and are fused by deploying engines, so that they share scales:
    /// q, k and v; gate and up of one MLP or expert.
    #[must_use]
    pub fn fusion_key(&self) -> String {
        let suffix = match self.part {
            Part::Q | Part::K | Part::V => "qkv",
            Part::Gate | Part::Up => "gate_up",
            _ => return self.name.clone(),
        };
        let parent = self.name.rsplit_once('.').map_or("", |(parent, _)| parent);
        format!("{parent}.{suffix}")
    }

    /// Modules with the same key share the scale of their input: as [`Self::fusion_key`], but all experts of a layer
    /// together, whose kernels quantize tokens before they are routed.
    #[must_use]
    pub fn input_key(&self) -> String {
        match (self.expert, self.layer, self.part) {
            (Some(_), Some(layer), Part::Gate | Part::Up) => format!("model.layers.{layer}.mlp.experts.gate_up"),
            (Some(_), Some(layer), _) => format!("model.layers.{layer}.mlp.experts.down"),
            _ => self.fusion_key(),
        }
    }
}

impl ModelConfig {
    /// Every linear layer in the order of the forward pass. A tied head is not listed.
    #[must_use]
    pub fn modules(&self) -> Vec<Module> {
        let mut out = Vec::new();
        let (q, kv, h) = (self.heads * self.head_dim, self.kv_heads * self.head_dim, self.hidden);
        let mut push = |name: String, part, layer, expert, n, k, bias| {
            // No engine quantizes embeddings, heads and routers unless the file holds them so.
            let may_be_plain = matches!(part, Part::Embedding | Part::Router | Part::Head);
            out.push(Module { name, part, layer, expert, role: LinearRole { n, k, bias, may_be_plain } });
        };
        push("model.embed_tokens".into(), Part::Embedding, None, None, self.vocab, h, false);
        for layer in 0..self.layers {
            let at = Some(layer);
            let attention = format!("model.layers.{layer}.self_attn");
            push(format!("{attention}.q_proj"), Part::Q, at, None, q, h, self.qkv_bias);
            push(format!("{attention}.k_proj"), Part::K, at, None, kv, h, self.qkv_bias);
            push(format!("{attention}.v_proj"), Part::V, at, None, kv, h, self.qkv_bias);
            push(format!("{attention}.o_proj"), Part::O, at, None, h, q, self.output_bias);
            let mlp = format!("model.layers.{layer}.mlp");
            let mut push_mlp = |prefix: &str, expert, width| {
                push(format!("{prefix}.gate_proj"), Part::Gate, at, expert, width, h, self.mlp_bias);
                push(format!("{prefix}.up_proj"), Part::Up, at, expert, width, h, self.mlp_bias);
                push(format!("{prefix}.down_proj"), Part::Down, at, expert, h, width, self.mlp_bias);
            };
            match self.moe.filter(|_| self.is_moe(layer)) {
                None => push_mlp(&mlp, None, self.intermediate),
                Some(moe) => {
                    for e in 0..moe.experts {
                        push_mlp(&format!("{mlp}.experts.{e}"), Some(e), moe.intermediate);
                    }
                    push(format!("{mlp}.gate"), Part::Router, at, None, moe.experts, h, false);
                }
            }
        }
        if !self.tied_embeddings {
            push("lm_head".into(), Part::Head, None, None, self.vocab, h, false);
        }
        out
    }

    /// Every norm's tensor name and length.
    #[must_use]
    pub fn norms(&self) -> Vec<(String, usize)> {
        let mut out = Vec::new();
        for layer in 0..self.layers {
            let prefix = format!("model.layers.{layer}");
            out.push((format!("{prefix}.input_layernorm.weight"), self.hidden));
            out.push((format!("{prefix}.post_attention_layernorm.weight"), self.hidden));
            if self.qk_norm {
                out.push((format!("{prefix}.self_attn.q_norm.weight"), self.head_dim));
                out.push((format!("{prefix}.self_attn.k_norm.weight"), self.head_dim));
            }
        }
        out.push(("model.norm.weight".into(), self.hidden));
        out
    }
}
