//! config.json of a supported architecture, read into types that cannot be wrong.

use crate::checkpoint::Checkpoint;
use crate::checkpoint::error::{CheckpointError, Result};
use crate::checkpoint::json::Object;

use super::rope::Rope;

/// Bounds on what a configuration may ask for, checked before anything is allocated. The largest dense models known
/// stay well below each of them.
mod limit {
    pub const LAYERS: usize = 1024;
    pub const WIDTH: usize = 1 << 18;
    pub const HEADS: usize = 4096;
    pub const HEAD_DIM: usize = 4096;
    pub const VOCAB: usize = 1 << 24;
    pub const POSITIONS: usize = 1 << 28;
    pub const EXPERTS: usize = 4096;
    /// Over all layers (Kimi K2 has 23,040).
    pub const ALL_EXPERTS: usize = 1 << 16;
}

const ARCHITECTURES: &str =
    "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM and Qwen3MoeForCausalLM";

/// Architectures that the decoder covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
    Qwen3Moe,
}

/// The mixture of experts of one layer kind.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Moe {
    pub experts: usize,
    /// Experts per token.
    pub top_k: usize,
    /// FFN width of one expert.
    pub intermediate: usize,
    /// Whether the chosen experts' probabilities are rescaled to sum to one.
    pub normalize: bool,
}

/// Shape and constants of one decoder.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    pub architecture: Architecture,
    pub hidden: usize,
    pub intermediate: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub vocab: usize,
    pub max_positions: usize,
    pub rms_eps: f32,
    pub rope: Rope,
    /// Per layer: keys farther back than this many positions (the query's own included) are not attended to.
    pub windows: Vec<Option<usize>>,
    /// Biases on q, k and v.
    pub qkv_bias: bool,
    /// Bias on the attention output.
    pub output_bias: bool,
    /// Biases in the FFN.
    pub mlp_bias: bool,
    /// RMS norm on each head of q and k before RoPE.
    pub qk_norm: bool,
    pub tied_embeddings: bool,
    pub moe: Option<Moe>,
    /// Layers with a dense FFN although the model has experts.
    pub dense_layers: Vec<usize>,
    /// From config.json; generation_config.json may say more.
    pub eos_tokens: Vec<u32>,
}

impl ModelConfig {
    /// Reads config.json.
    ///
    /// # Errors
    /// Names the key that is missing or out of range, or the architecture that is not supported.
    pub fn read(c: &Object) -> Result<Self> {
        let architecture = architecture(c)?;
        let hidden = c.required_integer("hidden_size", 1..=limit::WIDTH)?;
        let heads = c.required_integer("num_attention_heads", 1..=limit::HEADS)?;
        let defaults = Defaults::of(architecture);
        let kv_heads = match c.integer("num_key_value_heads", 1..=limit::HEADS)? {
            Some(n) => n,
            // Absent is the class's default; null is one for each head.
            None if c.has("num_key_value_heads") => heads,
            None => defaults.kv_heads.unwrap_or(heads),
        };
        if heads % kv_heads != 0 {
            return Err(c.error("num_key_value_heads", format!("a divisor of num_attention_heads = {heads}")));
        }
        let head_dim = match c.integer("head_dim", 1..=limit::HEAD_DIM)? {
            Some(d) => d,
            None if defaults.head_dim.is_some() && !c.has("head_dim") => defaults.head_dim.unwrap_or_default(),
            None if hidden % heads == 0 && hidden / heads <= limit::HEAD_DIM => hidden / heads,
            None => return Err(c.error("num_attention_heads", format!("a divisor of hidden_size = {hidden}"))),
        };
        if head_dim % 2 != 0 {
            return Err(c.error("head_dim", "an even number (RoPE rotates pairs)"));
        }
        if c.string("hidden_act")?.is_some_and(|a| a != "silu" && a != "swish") {
            return Err(c.error("hidden_act", "\"silu\""));
        }
        let layers = c.required_integer("num_hidden_layers", 1..=limit::LAYERS)?;
        let max_positions =
            c.integer("max_position_embeddings", 1..=limit::POSITIONS)?.unwrap_or(defaults.max_positions);
        let (rope, _) = Rope::read(c, max_positions)?;
        let qwen3 = matches!(architecture, Architecture::Qwen3 | Architecture::Qwen3Moe);
        let attention_bias = c.bool_or("attention_bias", architecture == Architecture::Qwen2)?;
        let (moe, dense_layers) = experts(c, architecture, layers)?;
        Ok(Self {
            architecture,
            hidden,
            intermediate: c.required_integer("intermediate_size", 1..=limit::WIDTH)?,
            layers,
            heads,
            kv_heads,
            head_dim,
            vocab: c.required_integer("vocab_size", 1..=limit::VOCAB)?,
            max_positions,
            rms_eps: c.positive_f32("rms_norm_eps")?.unwrap_or(1e-6),
            rope,
            windows: windows(c, architecture, layers)?,
            // Qwen2 always has biases on q, k and v and none on the output; the key is not in its configuration.
            qkv_bias: architecture == Architecture::Qwen2 || attention_bias,
            output_bias: architecture != Architecture::Qwen2 && attention_bias,
            mlp_bias: architecture == Architecture::Llama && c.bool_or("mlp_bias", false)?,
            qk_norm: qwen3,
            tied_embeddings: c.bool_or("tie_word_embeddings", false)?,
            moe,
            dense_layers,
            eos_tokens: c.token_ids("eos_token_id")?,
        })
    }

    /// The same model with a head of its own where a tied checkpoint stores a quantized one.
    ///
    /// # Errors
    /// When a tied checkpoint stores an unquantized head that differs from the embedding, one that is not tied stores
    /// none, or the tensors are of fewer layers.
    pub fn untied_where_stored(mut self, checkpoint: &Checkpoint) -> Result<Self> {
        self.check_layers(checkpoint)?;
        if !self.tied_embeddings && !checkpoint.has_linear("lm_head") && checkpoint.has_linear("model.embed_tokens") {
            return Err(CheckpointError::MissingTensor {
                folder: checkpoint.tensors.folder().into(),
                tensor: "lm_head.weight".into(),
                why:
                    "config.json does not tie it to the embedding; set tie_word_embeddings to true if the model is tied"
                        .into(),
            });
        }
        if !self.tied_embeddings || !checkpoint.has_linear("lm_head") {
            return Ok(self);
        }
        let tensors = &checkpoint.tensors;
        match (tensors.peek("lm_head.weight"), tensors.peek("model.embed_tokens.weight")) {
            (Some(head), Some(embedding)) if head.is_float() && embedding.is_float() => {
                let same = head.shape == embedding.shape
                    && if head.dtype == embedding.dtype {
                        head.bytes == embedding.bytes
                    } else {
                        head.floats()? == embedding.floats()?
                    };
                if !same {
                    return Err(CheckpointError::Conflict {
                        file: head.file.into(),
                        module: "lm_head".into(),
                        detail: "config.json ties it to the embedding (tie_word_embeddings), but the stored \
                                 `lm_head.weight` is another; set tie_word_embeddings to false, or remove the tensor"
                            .into(),
                    });
                }
                tensors.take("lm_head.weight");
            }
            _ => self.tied_embeddings = false,
        }
        Ok(self)
    }

    fn check_layers(&self, checkpoint: &Checkpoint) -> Result<()> {
        let layer = |name: &str| name.strip_prefix("model.layers.")?.split('.').next()?.parse::<usize>().ok();
        match checkpoint.tensors.names().filter_map(layer).max().map(|last| last.saturating_add(1)) {
            // More than that are left over, and named as such.
            Some(stored) if stored < self.layers => Err(checkpoint.config.error(
                "num_hidden_layers",
                format!("{stored}, the number of layers that tensors are stored of (`model.layers.{}`)", stored - 1),
            )),
            _ => Ok(()),
        }
    }

    /// Whether layer `index` routes to experts.
    #[must_use]
    pub fn is_moe(&self, index: usize) -> bool {
        self.moe.is_some() && !self.dense_layers.contains(&index)
    }
}

impl Architecture {
    const ALL: [(Self, &str, &str); 5] = [
        (Self::Llama, "Llama", "llama"),
        (Self::Mistral, "Mistral", "mistral"),
        (Self::Qwen2, "Qwen2", "qwen2"),
        (Self::Qwen3, "Qwen3", "qwen3"),
        (Self::Qwen3Moe, "Qwen3Moe", "qwen3_moe"),
    ];

    /// `LlamaForCausalLM`, or `LlamaModel` as the decoder without a head is saved.
    fn by_class(name: &str) -> Option<Self> {
        let family = name.strip_suffix("ForCausalLM").or_else(|| name.strip_suffix("Model"))?;
        Self::ALL.iter().find(|a| a.1 == family).map(|a| a.0)
    }

    pub(super) fn by_type(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|a| a.2 == name).map(|a| a.0)
    }

    /// What `architectures` calls it.
    #[must_use]
    pub fn class(self) -> String {
        let family = Self::ALL.iter().find(|a| a.0 == self).map_or("", |a| a.1);
        format!("{family}ForCausalLM")
    }

    /// What `model_type` calls it.
    #[must_use]
    pub fn model_type(self) -> &'static str {
        Self::ALL.iter().find(|a| a.0 == self).map_or("", |a| a.2)
    }
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
            Architecture::Qwen2 => (Some(32), None, 32_768),
            Architecture::Qwen3 => (Some(32), Some(128), 32_768),
            Architecture::Qwen3Moe => (Some(4), None, 32_768),
        };
        Self { kv_heads, head_dim, max_positions }
    }
}

/// Window of Mistral and Qwen where the key is absent; null is none.
const DEFAULT_WINDOW: usize = 4096;
/// Qwen's first layers that attend fully, where the key is absent.
const DEFAULT_FULL_LAYERS: usize = 28;

/// `architectures` and `model_type` must name the same: transformers goes by the second, vLLM by the first.
fn architecture(c: &Object) -> Result<Architecture> {
    let unknown = |found: &str| CheckpointError::Unknown {
        file: c.file().into(),
        what: "architecture",
        found: found.into(),
        known: ARCHITECTURES.into(),
    };
    let names = c.strings("architectures")?;
    let by_type = c.string("model_type")?.unwrap_or_default();
    let Some(first) = names.first() else { return Architecture::by_type(by_type).ok_or_else(|| unknown(by_type)) };
    let named = Architecture::by_class(first).ok_or_else(|| unknown(first))?;
    if Architecture::by_type(by_type).is_some_and(|t| t != named) {
        let expected = format!("the type of {first}, which `architectures` names; correct the one that is wrong");
        return Err(c.error("model_type", expected));
    }
    if let Some(other) = names.iter().find(|n| Architecture::by_class(n) != Some(named)) {
        return Err(c.error("architectures", format!("one architecture; {first} and {other} compute different things")));
    }
    Ok(named)
}

fn windows(c: &Object, architecture: Architecture, layers: usize) -> Result<Vec<Option<usize>>> {
    use Architecture as A;
    let used = match architecture {
        A::Mistral => true,
        A::Llama => false,
        _ => c.bool_or("use_sliding_window", false)?,
    };
    // Only where it is used: 0 beside `use_sliding_window` false is how some write that there is none.
    let window = match c.has("sliding_window") {
        _ if !used => None,
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
        A::Mistral => 0,
        _ => c.integer("max_window_layers", 0..=limit::LAYERS)?.unwrap_or(DEFAULT_FULL_LAYERS),
    };
    Ok((0..layers).map(|i| (i >= full).then_some(window)).collect())
}

fn experts(c: &Object, architecture: Architecture, layers: usize) -> Result<(Option<Moe>, Vec<usize>)> {
    if architecture != Architecture::Qwen3Moe {
        return Ok((None, Vec::new()));
    }
    let experts = match c.integer("num_experts", 1..=limit::EXPERTS)? {
        Some(n) => n,
        None => c.required_integer("num_local_experts", 1..=limit::EXPERTS)?,
    };
    if experts * layers > limit::ALL_EXPERTS {
        let key = if c.get("num_experts").is_some() { "num_experts" } else { "num_local_experts" };
        return Err(c.error(key, format!("at most {} experts in all {layers} layers together", limit::ALL_EXPERTS)));
    }
    let moe = Moe {
        experts,
        top_k: c.required_integer("num_experts_per_tok", 1..=experts)?,
        intermediate: c.required_integer("moe_intermediate_size", 1..=limit::WIDTH)?,
        normalize: c.bool_or("norm_topk_prob", false)?,
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
    Ok((Some(moe), dense))
}
