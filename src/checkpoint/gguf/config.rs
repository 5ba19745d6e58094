//! The model's hyperparameters: read from GGUF metadata, checked, and written as a transformers config.json.

use serde_json::{Map, Value as Json, json};

use super::error::{GgufError, Result};
use super::header::Gguf;
use super::rope;
use super::tokenizer::SpecialIds;

// Bounds that no real model reaches; they keep a damaged or hostile header from driving allocations and loops.
const MAX_LAYERS: u64 = 1 << 10;
const MAX_HIDDEN: u64 = 1 << 20;
const MAX_INTERMEDIATE: u64 = 1 << 22;
const MAX_HEADS: u64 = 1 << 12;
const MAX_HEAD_DIM: u64 = 1 << 12;
const MAX_VOCAB: u64 = 1 << 24;
const MAX_CONTEXT: u64 = 1 << 32;
const MAX_EXPERTS: u64 = 1 << 12;
/// Expert tensors over all layers: Qwen3-235B-A22B has 94 · 128.
const MAX_EXPERTS_IN_ALL: u64 = 1 << 17;

/// `rope_theta` where `rope.freq_base` is absent (llama.cpp's default, and Llama 1 and 2's value).
const DEFAULT_ROPE_THETA: f64 = 10_000.0;

/// A model family that can be imported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Architecture {
    /// Llama 1 to 3, Mistral and everything else that llama.cpp converts to `llama`.
    Llama,
    Qwen2,
    Qwen3,
    Qwen3Moe,
}

/// Keys of each architecture, without its prefix, that are read below.
const READ: [&str; 19] = [
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "rope.dimension_count",
    "rope.freq_base",
    "vocab_size",
    "expert_count",
    "expert_used_count",
    "expert_feed_forward_length",
    "expert_gating_func",
    "expert_weights_norm",
    "expert_weights_scale",
];
/// Keys that say nothing about what the model computes.
const HARMLESS: [&str; 1] = ["tensor_data_layout"];

impl Architecture {
    fn parse(gguf: &Gguf) -> Result<Self> {
        let known = [Self::Llama, Self::Qwen2, Self::Qwen3, Self::Qwen3Moe];
        let found = gguf
            .string("general.architecture")?
            .ok_or_else(|| gguf.key_error("general.architecture", "the name of an architecture"))?;
        known.into_iter().find(|a| a.prefix() == found).ok_or_else(|| GgufError::Unknown {
            file: gguf.path.clone(),
            what: "architecture",
            found: found.into(),
            known: known.map(Self::prefix).join(", "),
        })
    }

    /// llama.cpp's name, which is also the prefix of its metadata keys.
    pub fn prefix(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Qwen3Moe => "qwen3moe",
        }
    }
}

/// The mixture-of-experts part of a configuration.
#[derive(Clone, Copy, Debug)]
pub(super) struct Experts {
    pub count: u64,
    pub used: u64,
    /// Rows of an expert's gate and up projections.
    pub intermediate: u64,
}

/// Checked hyperparameters: every dimension is positive and within bounds, and the heads divide as they must.
#[derive(Clone, Debug)]
pub(super) struct ModelConfig {
    pub architecture: Architecture,
    pub layers: u64,
    pub hidden: u64,
    pub intermediate: u64,
    pub heads: u64,
    pub kv_heads: u64,
    pub head_dim: u64,
    pub vocab: u64,
    /// `output.weight` is absent: the embedding is the output projection too.
    pub tied: bool,
    /// Bias on q, k and v, and on o except in Qwen2.
    pub attention_bias: bool,
    pub mlp_bias: bool,
    pub experts: Option<Experts>,
    context: u64,
    rms_norm_eps: f64,
    rope_theta: f64,
    rope_scaling: Option<Json>,
    sliding_window: Option<u64>,
}

impl ModelConfig {
    /// Reads and checks the hyperparameters; looks at the names of the tensors, never at their data.
    pub fn read(gguf: &Gguf) -> Result<Self> {
        let architecture = Architecture::parse(gguf)?;
        let keys = Keys { gguf, prefix: architecture.prefix() };
        keys.refuse_unknown()?;
        let layers = keys.required("block_count", 1..=MAX_LAYERS)?;
        let hidden = keys.required("embedding_length", 1..=MAX_HIDDEN)?;
        let intermediate = keys.required("feed_forward_length", 1..=MAX_INTERMEDIATE)?;
        let heads = keys.required("attention.head_count", 1..=MAX_HEADS)?;
        let kv_heads = keys.integer("attention.head_count_kv", 1..=MAX_HEADS)?.unwrap_or(heads);
        if !heads.is_multiple_of(kv_heads) {
            return Err(keys.error("attention.head_count_kv", format!("a divisor of the {heads} attention heads")));
        }
        let head_dim = match keys.integer("attention.key_length", 1..=MAX_HEAD_DIM)? {
            Some(d) => d,
            None if hidden.is_multiple_of(heads) && hidden / heads <= MAX_HEAD_DIM => hidden / heads,
            None => {
                return Err(keys
                    .error("attention.key_length", format!("the head size, as {heads} heads do not divide {hidden}")));
            }
        };
        if !head_dim.is_multiple_of(2) {
            return Err(keys.error("attention.key_length", "an even head size, for rotary embedding"));
        }
        for key in ["attention.value_length", "rope.dimension_count"] {
            if keys.integer(key, 1..=MAX_HEAD_DIM)?.is_some_and(|d| d != head_dim) {
                return Err(keys.error(key, format!("the head size, {head_dim}; other sizes are not supported")));
            }
        }
        let context = keys.required("context_length", 1..=MAX_CONTEXT)?;
        let rms_norm_eps = keys
            .float("attention.layer_norm_rms_epsilon", "a positive number below 1", |e| e > 0.0 && e < 1.0)?
            .ok_or_else(|| keys.error("attention.layer_norm_rms_epsilon", "a positive number below 1"))?;
        let rope_theta = keys.float("rope.freq_base", "a positive number", |t| t > 0.0)?.unwrap_or(DEFAULT_ROPE_THETA);
        let sliding_window = keys.integer("attention.sliding_window", 0..=MAX_CONTEXT)?.filter(|w| *w > 0);

        let vocab = vocabulary_size(gguf, &keys)?;
        let has = |name: &str| gguf.tensors.contains_key(name);
        let attention_bias = has("blk.0.attn_q.bias");
        let config = Self {
            architecture,
            layers,
            hidden,
            intermediate,
            heads,
            kv_heads,
            head_dim,
            vocab,
            tied: !has("output.weight"),
            // transformers' Qwen2 always has them, so that a file without them is not a Qwen2 model.
            attention_bias: attention_bias || architecture == Architecture::Qwen2,
            mlp_bias: architecture == Architecture::Llama && has("blk.0.ffn_gate.bias"),
            experts: experts(&keys, architecture, layers)?,
            context,
            rms_norm_eps,
            rope_theta,
            rope_scaling: rope::scaling(gguf, architecture.prefix(), head_dim, rope_theta)?,
            sliding_window,
        };
        Ok(config)
    }

    /// config.json as transformers writes it.
    pub fn to_json(&self, special: &SpecialIds) -> Json {
        let (class, model_type) = match self.architecture {
            // transformers' Llama ignores a sliding window; its Mistral is the same model with one.
            Architecture::Llama if self.sliding_window.is_some() => ("MistralForCausalLM", "mistral"),
            Architecture::Llama => ("LlamaForCausalLM", "llama"),
            Architecture::Qwen2 => ("Qwen2ForCausalLM", "qwen2"),
            Architecture::Qwen3 => ("Qwen3ForCausalLM", "qwen3"),
            Architecture::Qwen3Moe => ("Qwen3MoeForCausalLM", "qwen3_moe"),
        };
        let mut config = Map::new();
        let mut set = |key: &str, value: Json| {
            config.insert(key.into(), value);
        };
        set("architectures", json!([class]));
        set("model_type", json!(model_type));
        set("vocab_size", json!(self.vocab));
        set("hidden_size", json!(self.hidden));
        set("intermediate_size", json!(self.intermediate));
        set("num_hidden_layers", json!(self.layers));
        set("num_attention_heads", json!(self.heads));
        set("num_key_value_heads", json!(self.kv_heads));
        set("head_dim", json!(self.head_dim));
        set("hidden_act", json!("silu"));
        set("max_position_embeddings", json!(self.context));
        set("rms_norm_eps", json!(self.rms_norm_eps));
        set("rope_theta", json!(self.rope_theta));
        if let Some(scaling) = &self.rope_scaling {
            set("rope_scaling", scaling.clone());
        }
        match (self.architecture, self.sliding_window) {
            (Architecture::Llama, None) => {}
            (Architecture::Llama, Some(window)) => set("sliding_window", json!(window)),
            (_, None) => set("use_sliding_window", json!(false)),
            (_, Some(window)) => {
                set("use_sliding_window", json!(true));
                set("sliding_window", json!(window));
                // llama.cpp slides the window in every layer; in transformers those from this one on.
                set("max_window_layers", json!(0));
            }
        }
        if let Some(experts) = self.experts {
            set("num_experts", json!(experts.count));
            set("num_experts_per_tok", json!(experts.used));
            set("moe_intermediate_size", json!(experts.intermediate));
            // llama.cpp's qwen3moe graph always renormalises the chosen experts' weights.
            set("norm_topk_prob", json!(true));
            set("decoder_sparse_step", json!(1));
            set("mlp_only_layers", json!([]));
        }
        set("tie_word_embeddings", json!(self.tied));
        set("attention_bias", json!(self.attention_bias));
        if self.architecture == Architecture::Llama {
            set("mlp_bias", json!(self.mlp_bias));
        }
        set("attention_dropout", json!(0.0));
        for (key, id) in [("bos_token_id", special.bos), ("eos_token_id", special.eos), ("pad_token_id", special.pad)] {
            if let Some(id) = id {
                set(key, json!(id));
            }
        }
        // The new name and the one that transformers before 4.56 reads.
        set("dtype", json!("bfloat16"));
        set("torch_dtype", json!("bfloat16"));
        Json::Object(config)
    }
}

/// generation_config.json: the ids to start and to stop at, the end of a turn included.
pub(super) fn generation_json(special: &SpecialIds) -> Json {
    let mut config = Map::new();
    if let Some(id) = special.bos {
        config.insert("bos_token_id".into(), json!(id));
    }
    match special.stop().as_slice() {
        [] => {}
        [id] => drop(config.insert("eos_token_id".into(), json!(id))),
        ids => drop(config.insert("eos_token_id".into(), json!(ids))),
    }
    if let Some(id) = special.pad {
        config.insert("pad_token_id".into(), json!(id));
    }
    Json::Object(config)
}

/// Rows of the embedding, cross-checked with the metadata and the tokenizer.
fn vocabulary_size(gguf: &Gguf, keys: &Keys) -> Result<u64> {
    let embedding = gguf.tensors.get("token_embd.weight").ok_or_else(|| GgufError::MissingTensor {
        file: gguf.path.clone(),
        tensor: "token_embd.weight".into(),
        why: "the file has no embedding; a vocabulary-only file is no model".into(),
    })?;
    let rows = embedding.shape.first().copied().unwrap_or(0);
    if rows > MAX_VOCAB {
        return Err(GgufError::Tensor {
            file: gguf.path.clone(),
            tensor: embedding.name.clone(),
            detail: format!("{rows} rows; a vocabulary has at most {MAX_VOCAB} tokens"),
        });
    }
    if keys.integer("vocab_size", 1..=MAX_VOCAB)?.is_some_and(|v| v != rows) {
        return Err(keys.error("vocab_size", format!("{rows}, the rows of token_embd.weight")));
    }
    let tokens = gguf.strings("tokenizer.ggml.tokens")?.map(<[String]>::len);
    if tokens.is_some_and(|n| n as u64 != rows) {
        return Err(gguf.key_error("tokenizer.ggml.tokens", format!("{rows} tokens, the rows of token_embd.weight")));
    }
    Ok(rows)
}

fn experts(keys: &Keys, architecture: Architecture, layers: u64) -> Result<Option<Experts>> {
    if architecture != Architecture::Qwen3Moe {
        // Mixtral is stored as `llama` with experts.
        if keys.integer("expert_count", 0..=MAX_EXPERTS)?.is_some_and(|n| n > 0) {
            return Err(keys.error("expert_count", "no experts; of the mixtures, only qwen3moe is supported"));
        }
        return Ok(None);
    }
    let count = keys.required("expert_count", 1..=MAX_EXPERTS.min(MAX_EXPERTS_IN_ALL / layers))?;
    let used = keys.required("expert_used_count", 1..=count)?;
    let intermediate = keys.required("expert_feed_forward_length", 1..=MAX_INTERMEDIATE)?;
    // `LLAMA_EXPERT_GATING_FUNC_TYPE_SOFTMAX` is 1; 0 says nothing.
    if keys.integer("expert_gating_func", 0..=u64::MAX)?.is_some_and(|f| f > 1) {
        return Err(keys.error("expert_gating_func", "1 (softmax)"));
    }
    if keys.boolean("expert_weights_norm")? == Some(false) {
        return Err(keys.error("expert_weights_norm", "true, as every qwen3moe model has"));
    }
    keys.float("expert_weights_scale", "1, as every qwen3moe model has", |s| s == 1.0 || s == 0.0)?;
    Ok(Some(Experts { count, used, intermediate }))
}

/// Metadata below one architecture's prefix.
struct Keys<'a> {
    gguf: &'a Gguf,
    prefix: &'static str,
}

impl Keys<'_> {
    fn full(&self, key: &str) -> String {
        format!("{}.{key}", self.prefix)
    }

    fn error(&self, key: &str, expected: impl Into<String>) -> GgufError {
        self.gguf.key_error(&self.full(key), expected)
    }

    fn integer(&self, key: &str, range: std::ops::RangeInclusive<u64>) -> Result<Option<u64>> {
        self.gguf.integer(&self.full(key), range)
    }

    fn required(&self, key: &str, range: std::ops::RangeInclusive<u64>) -> Result<u64> {
        let expected = format!("a whole number from {} to {}", range.start(), range.end());
        self.integer(key, range)?.ok_or_else(|| self.error(key, expected))
    }

    fn float(&self, key: &str, expected: &str, accept: impl Fn(f64) -> bool) -> Result<Option<f64>> {
        self.gguf.float(&self.full(key), expected, accept)
    }

    fn boolean(&self, key: &str) -> Result<Option<bool>> {
        self.gguf.boolean(&self.full(key))
    }

    /// Scales, biases and caps that other models have under the same architecture name would go unnoticed otherwise.
    fn refuse_unknown(&self) -> Result<()> {
        for (key, value) in &self.gguf.metadata {
            let Some(rest) = key.strip_prefix(self.prefix).and_then(|rest| rest.strip_prefix('.')) else { continue };
            if !READ.contains(&rest) && !HARMLESS.contains(&rest) && !rope::READ.contains(&rest) {
                return Err(GgufError::UnknownKey {
                    file: self.gguf.path.clone(),
                    key: key.clone(),
                    found: value.to_string(),
                });
            }
        }
        Ok(())
    }
}
