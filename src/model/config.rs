//! config.json of a supported architecture, read into types that cannot be wrong.

use crate::checkpoint::Checkpoint;
use crate::checkpoint::error::{CheckpointError, Result};
use crate::checkpoint::json::Object;

/// Bounds on what a configuration may ask for, checked before anything is allocated. The largest dense models known
/// stay well below each of them.
mod limit {
    pub const LAYERS: usize = 1024;
    pub const WIDTH: usize = 1 << 18;
    pub const HEADS: usize = 4096;
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

/// How rotary frequencies are stretched for long contexts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    None,
    Linear {
        factor: f32,
    },
    /// Llama 3.1: low frequencies divided by `factor`, high ones kept, a ramp between.
    Llama3 {
        factor: f32,
        low_freq_factor: f32,
        high_freq_factor: f32,
        original_max_position: f32,
    },
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
    pub rope_theta: f64,
    pub rope_scaling: RopeScaling,
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
        let kv_heads = c.integer("num_key_value_heads", 1..=limit::HEADS)?.unwrap_or(heads);
        if heads % kv_heads != 0 {
            return Err(c.error("num_key_value_heads", format!("a divisor of num_attention_heads = {heads}")));
        }
        let head_dim = match c.integer("head_dim", 1..=4096)? {
            Some(d) => d,
            None if hidden % heads == 0 => hidden / heads,
            None => return Err(c.error("num_attention_heads", format!("a divisor of hidden_size = {hidden}"))),
        };
        if head_dim % 2 != 0 {
            return Err(c.error("head_dim", "an even number (RoPE rotates pairs)"));
        }
        if c.string("hidden_act")?.is_some_and(|a| a != "silu" && a != "swish") {
            return Err(c.error("hidden_act", "\"silu\""));
        }
        let layers = c.required_integer("num_hidden_layers", 1..=limit::LAYERS)?;
        let (rope_theta, rope_scaling) = rope(c)?;
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
            max_positions: c.integer("max_position_embeddings", 1..=limit::POSITIONS)?.unwrap_or(2048),
            rms_eps: c.positive_f32("rms_norm_eps")?.unwrap_or(1e-6),
            rope_theta,
            rope_scaling,
            windows: windows(c, architecture, layers)?,
            // Qwen2 always has biases on q, k and v and none on the output; the key is not in its configuration.
            qkv_bias: architecture == Architecture::Qwen2 || attention_bias,
            output_bias: architecture != Architecture::Qwen2 && attention_bias,
            mlp_bias: architecture == Architecture::Llama && c.bool_or("mlp_bias", false)?,
            qk_norm: qwen3,
            tied_embeddings: c.bool_or("tie_word_embeddings", false)?,
            moe,
            dense_layers,
            eos_tokens: token_ids(c, "eos_token_id")?,
        })
    }

    /// The same model with a head of its own where a tied checkpoint stores a quantized one.
    ///
    /// # Errors
    /// When a tied checkpoint stores an unquantized head that differs from the embedding.
    pub fn untied_where_stored(mut self, checkpoint: &Checkpoint) -> Result<Self> {
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

    /// Whether layer `index` routes to experts.
    #[must_use]
    pub fn is_moe(&self, index: usize) -> bool {
        self.moe.is_some() && !self.dense_layers.contains(&index)
    }

    /// Frequency of each rotated pair, radians per position, [head_dim / 2].
    ///
    /// Computed as transformers does, in f32: the deployed model's rounding is part of the model.
    #[must_use]
    pub fn rope_frequencies(&self) -> Vec<f32> {
        let half = self.head_dim / 2;
        let base = (0..half).map(|i| {
            let exponent = (2 * i) as f32 / self.head_dim as f32;
            1.0 / libm::pow(self.rope_theta, f64::from(exponent)) as f32
        });
        match self.rope_scaling {
            RopeScaling::None => base.collect(),
            RopeScaling::Linear { factor } => base.map(|f| f / factor).collect(),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } => base
                .map(|f| {
                    let wavelength = 2.0 * std::f32::consts::PI / f;
                    if wavelength < original_max_position / high_freq_factor {
                        f
                    } else if wavelength > original_max_position / low_freq_factor {
                        f / factor
                    } else {
                        let smooth = (original_max_position / wavelength - low_freq_factor)
                            / (high_freq_factor - low_freq_factor);
                        (1.0 - smooth) * f / factor + smooth * f
                    }
                })
                .collect(),
        }
    }
}

/// One id or a list of ids under `key`, as Hugging Face writes end-of-sequence tokens; absent is none.
///
/// # Errors
/// When the key holds something else.
pub fn token_ids(c: &Object, key: &str) -> Result<Vec<u32>> {
    let id = |v: &serde_json::Value| v.as_u64().and_then(|v| u32::try_from(v).ok());
    match c.get(key) {
        None => Ok(Vec::new()),
        Some(serde_json::Value::Array(a)) => {
            a.iter().map(id).collect::<Option<_>>().ok_or_else(|| c.error(key, "a token id or a list of them"))
        }
        Some(v) => Ok(vec![id(v).ok_or_else(|| c.error(key, "a token id or a list of them"))?]),
    }
}

fn architecture(c: &Object) -> Result<Architecture> {
    let unknown = |found: String| CheckpointError::Unknown {
        file: c.file().into(),
        what: "architecture",
        found,
        known: ARCHITECTURES,
    };
    let names = c.strings("architectures")?;
    let by_type = c.string("model_type")?.unwrap_or_default();
    match (names.first().map(String::as_str), by_type) {
        (Some("LlamaForCausalLM"), _) | (None, "llama") => Ok(Architecture::Llama),
        (Some("MistralForCausalLM"), _) | (None, "mistral") => Ok(Architecture::Mistral),
        (Some("Qwen2ForCausalLM"), _) | (None, "qwen2") => Ok(Architecture::Qwen2),
        (Some("Qwen3ForCausalLM"), _) | (None, "qwen3") => Ok(Architecture::Qwen3),
        (Some("Qwen3MoeForCausalLM"), _) | (None, "qwen3_moe") => Ok(Architecture::Qwen3Moe),
        (Some(name), _) => Err(unknown(name.into())),
        (None, name) => Err(unknown(name.into())),
    }
}

/// RoPE base and scaling: transformers 5 keeps both in `rope_parameters`, 4 has `rope_theta` and `rope_scaling`.
fn rope(c: &Object) -> Result<(f64, RopeScaling)> {
    let parameters = match c.object("rope_parameters")? {
        Some(p) => Some(p),
        None => c.object("rope_scaling")?,
    };
    let nested_theta = parameters.as_ref().map(|p| p.positive("rope_theta")).transpose()?.flatten();
    let theta = match nested_theta {
        Some(t) => t,
        None => c.positive("rope_theta")?.unwrap_or(10_000.0),
    };
    for o in std::iter::once(c).chain(&parameters) {
        if o.positive("partial_rotary_factor")?.is_some_and(|f| f != 1.0) {
            return Err(o.error("partial_rotary_factor", "1"));
        }
    }
    let Some(p) = parameters else { return Ok((theta, RopeScaling::None)) };
    let kind = match p.string("rope_type")? {
        Some(k) => k,
        None => match p.string("type")? {
            Some(k) => k,
            // Parameters without a type, `{"rope_theta": …}`, scale nothing; a factor without one would be guesswork.
            None if p.get("factor").is_none() => "default",
            None => return Err(p.error("rope_type", "the kind of scaling that `factor` belongs to")),
        },
    };
    let number =
        |key: &str| -> Result<f32> { p.positive_f32(key)?.ok_or_else(|| p.error(key, "a positive finite number")) };
    let scaling = match kind {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: number("factor")? },
        "llama3" => {
            let s = RopeScaling::Llama3 {
                factor: number("factor")?,
                low_freq_factor: number("low_freq_factor")?,
                high_freq_factor: number("high_freq_factor")?,
                original_max_position: number("original_max_position_embeddings")?,
            };
            if number("low_freq_factor")? >= number("high_freq_factor")? {
                return Err(p.error("low_freq_factor", "less than high_freq_factor"));
            }
            s
        }
        other => {
            return Err(CheckpointError::Unknown {
                file: c.file().into(),
                what: "rope type",
                found: other.into(),
                known: "default, linear and llama3",
            });
        }
    };
    Ok((theta, scaling))
}

fn windows(c: &Object, architecture: Architecture, layers: usize) -> Result<Vec<Option<usize>>> {
    let window = c.integer("sliding_window", 1..=limit::POSITIONS)?;
    let used = match architecture {
        Architecture::Mistral => true,
        Architecture::Llama => false,
        _ => c.bool_or("use_sliding_window", false)?,
    };
    let Some(window) = window.filter(|_| used) else { return Ok(vec![None; layers]) };
    let kinds = c.strings("layer_types")?;
    if !kinds.is_empty() {
        if kinds.len() != layers {
            return Err(c.error("layer_types", format!("one entry for each of the {layers} layers")));
        }
        return kinds
            .iter()
            .map(|k| match k.as_str() {
                "full_attention" => Ok(None),
                "sliding_attention" => Ok(Some(window)),
                _ => Err(c.error("layer_types", "full_attention or sliding_attention")),
            })
            .collect();
    }
    // Qwen: the first `max_window_layers` layers attend fully.
    let full = match architecture {
        Architecture::Mistral => 0,
        _ => c.integer("max_window_layers", 0..=limit::LAYERS)?.unwrap_or(layers),
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
