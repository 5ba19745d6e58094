//! `rope_scaling` of config.json: from `rope.scaling.*` keys, or recognised from the table of factors that stands for
//! Llama 3's rule. What they mean is the model's to say.

use serde_json::{Value as Json, json};

use super::blocks::Blocks;
use super::error::{GgufError, Result};
use super::header::Gguf;
use crate::model::config::Plain;
use crate::model::rope::{Rope, RopeScaling};

/// The table's name in a GGUF file.
pub(super) const FACTORS: &str = "rope_freqs.weight";

const ORIGINAL: &str = "rope.scaling.original_context_length";
/// Keys of config.json, and what they are made of.
pub(super) const TRANSLATED: [(&str, &str); 5] = [
    ("rope_scaling.factor", "rope.scaling.factor"),
    ("rope_scaling.original_max_position_embeddings", ORIGINAL),
    ("rope_scaling.beta_fast", "rope.scaling.yarn_beta_fast"),
    ("rope_scaling.beta_slow", "rope.scaling.yarn_beta_slow"),
    // convert_hf_to_gguf writes config.json's `attention_factor` here, the whole factor.
    ("rope_scaling.attention_factor", "rope.scaling.yarn_attn_factor"),
];
/// Keys that are read here besides.
const OTHERS: [&str; 6] = [
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.finetuned",
    "rope.scaling.attn_factor",
    "rope.scaling.yarn_ext_factor",
    "rope.scaling.yarn_log_multiplier",
];

/// Llama 3.1's `low_freq_factor` and `high_freq_factor`: every published model has these (config.json of Llama 3.1, 3.2).
const LOW_FREQ_FACTOR: f32 = 1.0;
const HIGH_FREQ_FACTOR: f32 = 4.0;
/// Training lengths to try when the file does not say: Llama 3's own first.
const ORIGINAL_CONTEXTS: [u64; 5] = [8192, 4096, 2048, 16384, 32768];
/// The table is computed in f32 by the converter; anything farther off follows another rule.
const TOLERANCE: f32 = 1e-3;

/// The keys that are read here, without the architecture's prefix.
pub(super) fn known() -> impl Iterator<Item = &'static str> {
    TRANSLATED.into_iter().map(|(_, key)| key).chain(OTHERS)
}

/// `rope_scaling` of config.json for `model`, which is not scaled yet, or null.
///
/// # Errors
/// On a type of scaling that is not known, and on a table of factors that is not Llama 3's.
pub(super) fn scaling(gguf: &Gguf, prefix: &str, model: &Plain) -> Result<Json> {
    let key = |name: &str| format!("{prefix}.{name}");
    let positive = |name: &str| gguf.float(&key(name), "a positive number", |f| f > 0.0);
    let original = gguf.integer(&key(ORIGINAL), 1..=1 << 32)?;
    // Written as 0 by some converters where there is none.
    let factor = gguf.float(&key("rope.scaling.factor"), "a number of at least 0", |f| f >= 0.0)?.filter(|f| *f > 0.0);
    let linear = positive("rope.scale_linear")?.filter(|f| *f != 1.0);
    gguf.boolean(&key("rope.scaling.finetuned"))?;
    // What transformers' YaRN has no name for is fine where it changes nothing.
    let only = |name: &str, what: &str, value: f64| gguf.float(&key(name), what, |f| f == value).map(drop);
    only("rope.scaling.yarn_ext_factor", "1: a partial extrapolation is not supported", 1.0)?;
    only("rope.scaling.yarn_log_multiplier", "0: DeepSeek's scaling of attention is not supported", 0.0)?;
    let whole = positive("rope.scaling.yarn_attn_factor")?;
    // llama.cpp multiplies YaRN's own factor by this one.
    let times = positive("rope.scaling.attn_factor")?.filter(|f| *f != 1.0);

    let kind = gguf.string(&key("rope.scaling.type"))?;
    let from_keys = match (kind, factor.or(linear)) {
        (None | Some("none"), None) => Json::Null,
        (None | Some("linear"), Some(factor)) => json!({"rope_type": "linear", "factor": factor}),
        (Some("yarn"), Some(factor)) => {
            let original =
                original.ok_or_else(|| gguf.key_error(&key(ORIGINAL), "the context length before yarn scaling"))?;
            let mut yarn = json!({"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original});
            for name in ["beta_fast", "beta_slow"] {
                if let Some(beta) = positive(&format!("rope.scaling.yarn_{name}"))? {
                    yarn[name] = json!(beta);
                }
            }
            if let Some(attention) = whole.or(times.map(|t| t * (0.1 * factor.ln() + 1.0))) {
                yarn["attention_factor"] = json!(attention);
            }
            yarn
        }
        (Some("linear" | "yarn"), None) => {
            return Err(gguf.key_error(&key("rope.scaling.factor"), "the factor of the scaling"));
        }
        (Some(found), _) => {
            return Err(GgufError::Unknown {
                file: gguf.path.clone(),
                what: "rope scaling",
                found: found.into(),
                known: "none, linear, yarn, and llama3 as a table of factors".into(),
            });
        }
    };
    if times.is_some() && kind != Some("yarn") {
        return Err(gguf.key_error(&key("rope.scaling.attn_factor"), "1, where the scaling is not yarn"));
    }
    let table = llama3(gguf, model, original)?;
    if from_keys.is_null() {
        return Ok(table);
    }
    if !table.is_null() {
        return Err(GgufError::Tensor {
            file: gguf.path.clone(),
            tensor: FACTORS.into(),
            detail: format!("contradicts `{}`: a model has one rule for its positions", key("rope.scaling.type")),
        });
    }
    Ok(from_keys)
}

/// Recognises the table that the converter writes for `rope_type` "llama3": one divisor per frequency, shape [head_dim/2].
fn llama3(gguf: &Gguf, model: &Plain, original: Option<u64>) -> Result<Json> {
    let Some(info) = gguf.tensors.get(FACTORS) else { return Ok(Json::Null) };
    let error = |detail: String| GgufError::Tensor { file: gguf.path.clone(), tensor: FACTORS.into(), detail };
    let expected = vec![model.attention.head_dim as u64 / 2];
    if info.shape != expected {
        let (file, found) = (gguf.path.clone(), info.shape.clone());
        return Err(GgufError::Shape { file, tensor: FACTORS.into(), expected, found });
    }
    // head_dim is bounded, so this is small.
    let mut blocks = Blocks::new();
    gguf.tensor_bytes(info, 0, blocks.resize(info.bytes as usize))?;
    let table = info.kind.decode(&blocks).map_err(error)?;
    if table.iter().all(|f| *f == 1.0) {
        return Ok(Json::Null);
    }
    // The slowest frequency is divided by the whole factor.
    let factor = table.last().copied().unwrap_or(1.0);
    let frequencies = |scaling| Rope { scaling, ..model.rope }.frequencies(model.attention.head_dim);
    let plain = frequencies(RopeScaling::None);
    for original in original.map_or_else(|| ORIGINAL_CONTEXTS.to_vec(), |o| vec![o]) {
        let scaled = frequencies(RopeScaling::Llama3 {
            factor,
            low_freq_factor: LOW_FREQ_FACTOR,
            high_freq_factor: HIGH_FREQ_FACTOR,
            original_max_position: original as f32,
        });
        let mut divisors = plain.iter().zip(scaled).map(|(plain, scaled)| plain / scaled);
        if table.iter().all(|found| divisors.next().is_some_and(|d| (found - d).abs() <= TOLERANCE * found.abs())) {
            return Ok(json!({
                "rope_type": "llama3",
                "factor": f64::from(factor),
                "low_freq_factor": LOW_FREQ_FACTOR,
                "high_freq_factor": HIGH_FREQ_FACTOR,
                "original_max_position_embeddings": original,
            }));
        }
    }
    Err(error(format!(
        "its {} factors, {} to {factor}, do not follow Llama 3's rule with low and high frequency factors {LOW_FREQ_FACTOR} \
         and {HIGH_FREQ_FACTOR}; other tables are not supported",
        table.len(),
        table.first().copied().unwrap_or(1.0),
    )))
}
