//! GGUF metadata as a config.json: which key says what, and the model's own reader that judges the values.
//!
//! What a model may be is [`ModelConfig`]'s to say. Here are llama.cpp's names for it, and what has no place in config.json.

use serde_json::{Map, Value as Json, json};

use super::error::{GgufError, Result};
use super::header::Gguf;
use super::rope;
use super::tokenizer::SpecialIds;
use crate::checkpoint::CheckpointError;
use crate::checkpoint::json::Object;
use crate::model::ModelConfig;
use crate::model::config::Architecture as Model;
use crate::model::config::Plain;

/// What llama.cpp calls an architecture, and the model that it is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Architecture {
    /// `general.architecture`, and the prefix of its keys.
    pub name: &'static str,
    model: Model,
    /// The same with a sliding window: transformers' Llama ignores one, its Mistral is the same model with one.
    windowed: Model,
    /// Rows of q and k are interleaved within each head.
    pub interleaved: bool,
}

/// Every architecture that can be imported. `llama` is Llama 1 to 3, Mistral and what else llama.cpp converts to it.
const ARCHITECTURES: [Architecture; 4] = [
    Architecture { name: "llama", model: Model::Llama, windowed: Model::Mistral, interleaved: true },
    Architecture { name: "qwen2", model: Model::Qwen2, windowed: Model::Qwen2, interleaved: false },
    Architecture { name: "qwen3", model: Model::Qwen3, windowed: Model::Qwen3, interleaved: false },
    Architecture { name: "qwen3moe", model: Model::Qwen3Moe, windowed: Model::Qwen3Moe, interleaved: false },
];

/// Where the value of a key of config.json comes from.
#[derive(Clone, Copy)]
enum Source {
    /// A whole number under this key, without the architecture's prefix.
    Whole(&'static str),
    /// The same where it is there; the model's default else.
    PerhapsWhole(&'static str),
    Number(&'static str),
    PerhapsNumber(&'static str),
    /// Always this.
    Text(&'static str),
}

/// Keys of every model, in the order of the file.
const KEYS: [(&str, Source); 10] = [
    ("hidden_size", Source::Whole("embedding_length")),
    ("intermediate_size", Source::Whole("feed_forward_length")),
    ("num_hidden_layers", Source::Whole("block_count")),
    ("num_attention_heads", Source::Whole("attention.head_count")),
    ("num_key_value_heads", Source::PerhapsWhole("attention.head_count_kv")),
    ("head_dim", Source::PerhapsWhole("attention.key_length")),
    ("hidden_act", Source::Text("silu")),
    ("max_position_embeddings", Source::Whole("context_length")),
    ("rms_norm_eps", Source::Number("attention.layer_norm_rms_epsilon")),
    ("rope_theta", Source::PerhapsNumber("rope.freq_base")),
];
/// Keys of a mixture of experts.
const EXPERT_KEYS: [(&str, Source); 3] = [
    ("num_experts", Source::Whole("expert_count")),
    ("num_experts_per_tok", Source::Whole("expert_used_count")),
    ("moe_intermediate_size", Source::Whole("expert_feed_forward_length")),
];
/// The vocabulary has as many tokens as this has rows.
const EMBEDDING: &str = "token_embd.weight";
const WINDOW: &str = "attention.sliding_window";
/// Keys that are held to what the model computes, and such as say nothing of that.
const CHECKED: [&str; 8] = [
    WINDOW,
    "attention.value_length",
    "rope.dimension_count",
    "vocab_size",
    "expert_gating_func",
    "expert_weights_norm",
    "expert_weights_scale",
    "tensor_data_layout",
];

impl Source {
    /// The key of the metadata, where there is one.
    fn key(self) -> Option<&'static str> {
        match self {
            Self::Whole(key) | Self::PerhapsWhole(key) | Self::Number(key) | Self::PerhapsNumber(key) => Some(key),
            Self::Text(_) => None,
        }
    }
}

/// A model's configuration as its GGUF file has it.
pub(super) struct Config {
    pub architecture: Architecture,
    pub model: ModelConfig,
    /// What is alike in all its layers.
    pub plain: Plain,
    json: Map<String, Json>,
}

impl Config {
    /// Reads and checks the metadata; looks at the names and shapes of the tensors, and at no weight.
    pub fn read(gguf: &Gguf) -> Result<Self> {
        let keys = Keys { gguf, architecture: architecture(gguf)? };
        keys.refuse_unknown()?;
        let mut json = keys.translate()?;
        let model = keys.model(&json)?;
        json["rope_scaling"] = rope::scaling(gguf, keys.architecture.name, &keys.plain(&model)?)?;
        let model = keys.model(&json)?;
        keys.check(&model)?;
        // Defaults of the model become explicit.
        let plain = keys.plain(&model)?;
        json["num_key_value_heads"] = plain.attention.kv_heads.into();
        json["head_dim"] = plain.attention.head_dim.into();
        json["rope_theta"] = plain.rope.theta.into();
        json["attention_bias"] = plain.attention.qkv_bias.into();
        json.retain(|_, value| !value.is_null());
        Ok(Self { architecture: keys.architecture, plain, model, json })
    }

    /// config.json as transformers writes it.
    pub fn to_json(&self, special: &SpecialIds) -> Json {
        let mut config = self.json.clone();
        for (key, id) in [("bos_token_id", special.bos), ("eos_token_id", special.eos), ("pad_token_id", special.pad)] {
            if let Some(id) = id {
                config.insert(key.into(), json!(id));
            }
        }
        // The new name and the one that transformers before 4.56 reads.
        config.insert("dtype".into(), json!("bfloat16"));
        config.insert("torch_dtype".into(), json!("bfloat16"));
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

fn architecture(gguf: &Gguf) -> Result<Architecture> {
    let found = gguf
        .string("general.architecture")?
        .ok_or_else(|| gguf.key_error("general.architecture", "the name of an architecture"))?;
    ARCHITECTURES.into_iter().find(|a| a.name == found).ok_or_else(|| GgufError::Unknown {
        file: gguf.path.clone(),
        what: "architecture",
        found: found.into(),
        known: ARCHITECTURES.map(|a| a.name).join(", "),
    })
}

/// Metadata below one architecture's prefix.
struct Keys<'a> {
    gguf: &'a Gguf,
    architecture: Architecture,
}

impl Keys<'_> {
    fn full(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture.name)
    }

    fn error(&self, key: &str, expected: impl Into<String>) -> GgufError {
        self.gguf.key_error(&self.full(key), expected)
    }

    /// Scales, biases and caps that other models have under the same architecture name would go unnoticed otherwise.
    fn refuse_unknown(&self) -> Result<()> {
        let translated = KEYS.iter().chain(&EXPERT_KEYS).filter_map(|(_, from)| from.key());
        let known: Vec<&str> = translated.chain(CHECKED).chain(rope::known()).collect();
        for (key, value) in &self.gguf.metadata {
            let rest = key.strip_prefix(self.architecture.name).and_then(|rest| rest.strip_prefix('.'));
            if rest.is_some_and(|rest| !known.contains(&rest)) {
                let (file, found) = (self.gguf.path.clone(), value.to_string());
                return Err(GgufError::UnknownKey { file, key: key.clone(), found });
            }
        }
        Ok(())
    }

    /// The keys of config.json but for those of the tokenizer. Null: not in the metadata.
    fn translate(&self) -> Result<Map<String, Json>> {
        let has = |name: &str| self.gguf.tensors.contains_key(name);
        let window = self.whole(WINDOW)?.filter(|w| *w > 0);
        let Architecture { model: plain, windowed, .. } = self.architecture;
        let model = if window.is_some() { windowed } else { plain };
        let mut config = Map::new();
        let mut set = |key: &str, value: Json| drop(config.insert(key.into(), value));
        set("architectures", json!([model.class()]));
        set("model_type", json!(model.model_type()));
        set("vocab_size", json!(self.vocabulary()?));
        for (key, from) in KEYS {
            set(key, self.value(from)?);
        }
        set("rope_scaling", Json::Null);
        if plain == windowed {
            set("use_sliding_window", json!(window.is_some()));
        }
        if let Some(window) = window {
            set("sliding_window", json!(window));
            if plain == windowed {
                // llama.cpp slides the window in every layer; in transformers those from this one on.
                set("max_window_layers", json!(0));
            }
        }
        if plain == Model::Qwen3Moe {
            for (key, from) in EXPERT_KEYS {
                set(key, self.value(from)?);
            }
            // llama.cpp's qwen3moe graph always renormalises the chosen experts' weights.
            set("norm_topk_prob", json!(true));
            set("decoder_sparse_step", json!(1));
            set("mlp_only_layers", json!([]));
        }
        set("tie_word_embeddings", json!(!has("output.weight")));
        set("attention_bias", json!(has("blk.0.attn_q.bias")));
        if plain == Model::Llama {
            set("mlp_bias", json!(has("blk.0.ffn_gate.bias")));
        }
        set("attention_dropout", json!(0.0));
        Ok(config)
    }

    fn value(&self, from: Source) -> Result<Json> {
        Ok(match from {
            Source::Text(text) => json!(text),
            Source::Whole(key) => self.whole(key)?.ok_or_else(|| self.error(key, "a whole number"))?.into(),
            Source::PerhapsWhole(key) => self.whole(key)?.into(),
            Source::Number(key) => self.number(key)?.ok_or_else(|| self.error(key, "a number"))?.into(),
            Source::PerhapsNumber(key) => self.number(key)?.into(),
        })
    }

    fn whole(&self, key: &str) -> Result<Option<u64>> {
        self.gguf.integer(&self.full(key), 0..=u64::MAX).map_err(|_| self.error(key, "a whole number"))
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        self.gguf.float(&self.full(key), "a number", |_| true)
    }

    /// Rows of the embedding, cross-checked with the metadata and the tokenizer.
    fn vocabulary(&self) -> Result<u64> {
        let gguf = self.gguf;
        let embedding = gguf.tensors.get(EMBEDDING).ok_or_else(|| GgufError::MissingTensor {
            file: gguf.path.clone(),
            tensor: EMBEDDING.into(),
            why: "the file has no embedding; a vocabulary-only file is no model".into(),
        })?;
        let rows = embedding.shape.first().copied().unwrap_or(0);
        if self.whole("vocab_size")?.is_some_and(|v| v != rows) {
            return Err(self.error("vocab_size", format!("{rows}, the rows of {EMBEDDING}")));
        }
        let tokens = gguf.strings("tokenizer.ggml.tokens")?.map(<[String]>::len);
        if tokens.is_some_and(|n| n as u64 != rows) {
            return Err(gguf.key_error("tokenizer.ggml.tokens", format!("{rows} tokens, the rows of {EMBEDDING}")));
        }
        Ok(rows)
    }

    /// What `config` means to the model; its complaints name the metadata.
    fn model(&self, config: &Map<String, Json>) -> Result<ModelConfig> {
        let object = Object::of(&self.gguf.path, Json::Object(config.clone()))?;
        ModelConfig::read(&object).map_err(|e| match e {
            CheckpointError::Config { key, expected, found, .. } => self.blame(&key, &expected, &found),
            other => other.into(),
        })
    }

    /// The error about `key` of config.json as one about the metadata that it was made of.
    fn blame(&self, key: &str, expected: &str, found: &str) -> GgufError {
        let translated = KEYS.iter().chain(&EXPERT_KEYS).filter_map(|(key, from)| Some((*key, from.key()?)));
        let names: Vec<_> = translated.chain([("sliding_window", WINDOW)]).chain(rope::TRANSLATED).collect();
        let own = |name: &str| names.iter().find(|(known, _)| *known == name).map(|(_, from)| *from);
        let words = expected.split(' ').map(|word| own(word).map_or_else(|| word.to_owned(), |from| self.full(from)));
        let expected = words.collect::<Vec<_>>().join(" ");
        match own(key) {
            Some(from) => self.error(from, expected),
            None => {
                let detail = format!("`{key}` that follows from it: expected {expected}, found {found}");
                GgufError::Tensor { file: self.gguf.path.clone(), tensor: EMBEDDING.into(), detail }
            }
        }
    }

    /// All architectures that are imported are plain decoders.
    fn plain(&self, model: &ModelConfig) -> Result<Plain> {
        model.plain().ok_or_else(|| self.error("block_count", "layers that are all of one kind"))
    }

    /// Holds what config.json has no key for to what `model` computes.
    fn check(&self, model: &ModelConfig) -> Result<()> {
        let Plain { attention, experts, .. } = self.plain(model)?;
        for key in ["attention.value_length", "rope.dimension_count"] {
            if self.whole(key)?.is_some_and(|d| d != attention.head_dim as u64) {
                let expected = format!("the head size, {}; other sizes are not supported", attention.head_dim);
                return Err(self.error(key, expected));
            }
        }
        let epsilon = self.full("attention.layer_norm_rms_epsilon");
        self.gguf.float(&epsilon, "a positive number below 1", |e| e < 1.0)?;
        if experts.is_none() {
            // Mixtral is stored as `llama` with experts.
            return match self.whole("expert_count")? {
                None | Some(0) => Ok(()),
                Some(_) => Err(self.error("expert_count", "no experts; of the mixtures, only qwen3moe is supported")),
            };
        }
        // `LLAMA_EXPERT_GATING_FUNC_TYPE_SOFTMAX` is 1; 0 says nothing.
        if self.whole("expert_gating_func")?.is_some_and(|f| f > 1) {
            return Err(self.error("expert_gating_func", "1 (softmax)"));
        }
        if self.gguf.boolean(&self.full("expert_weights_norm"))? == Some(false) {
            return Err(self.error("expert_weights_norm", "true, as every qwen3moe model has"));
        }
        let scale = self.full("expert_weights_scale");
        self.gguf.float(&scale, "1, as every qwen3moe model has", |s| s == 1.0 || s == 0.0)?;
        Ok(())
    }
}
