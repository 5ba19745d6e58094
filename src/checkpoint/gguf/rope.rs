//! Position scaling: from `rope.scaling.*` keys, or recognised from the table of factors that stands for Llama 3's rule.

use serde_json::{Value as Json, json};

use super::blocks::Blocks;
use super::error::{GgufError, Result};
use super::header::Gguf;

/// The table's name in a GGUF file.
pub(super) const FACTORS: &str = "rope_freqs.weight";

/// Keys that are read here, without the architecture's prefix.
pub(super) const READ: [&str; 11] = [
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.attn_factor",
    "rope.scaling.yarn_ext_factor",
    "rope.scaling.yarn_log_multiplier",
];

/// Llama 3.1's `low_freq_factor` and `high_freq_factor`: every published model has these (config.json of Llama 3.1, 3.2).
const LOW_FREQ_FACTOR: f64 = 1.0;
const HIGH_FREQ_FACTOR: f64 = 4.0;
/// Training lengths to try when the file does not say: Llama 3's own first.
const ORIGINAL_CONTEXTS: [u64; 5] = [8192, 4096, 2048, 16384, 32768];
/// The table is computed in f32 by the converter; anything farther off follows another rule.
const TOLERANCE: f64 = 1e-3;

/// `rope_scaling` of config.json, or none.
///
/// # Errors
/// On a type of scaling that is not known, and on a table of factors that is not Llama 3's.
pub(super) fn scaling(gguf: &Gguf, prefix: &str, head_dim: u64, theta: f64) -> Result<Option<Json>> {
    let key = |name: &str| format!("{prefix}.{name}");
    let positive = |name: &str| gguf.float(&key(name), "a positive number", |f| f > 0.0);
    let original = gguf.integer(&key("rope.scaling.original_context_length"), 1..=1 << 32)?;
    // Written as 0 by some converters where there is none.
    let factor = gguf.float(&key("rope.scaling.factor"), "a number of at least 0", |f| f >= 0.0)?.filter(|f| *f > 0.0);
    let linear = positive("rope.scale_linear")?.filter(|f| *f != 1.0);
    gguf.boolean(&key("rope.scaling.finetuned"))?;
    // What transformers' YaRN has no name for is fine where it changes nothing.
    let only = |name: &str, what: &str, value: f64| gguf.float(&key(name), what, |f| f == value).map(drop);
    only("rope.scaling.yarn_ext_factor", "1: a partial extrapolation is not supported", 1.0)?;
    only("rope.scaling.yarn_log_multiplier", "0: DeepSeek's scaling of attention is not supported", 0.0)?;
    // convert_hf_to_gguf writes config.json's `attention_factor` here, the whole factor.
    let whole = positive("rope.scaling.yarn_attn_factor")?;
    // llama.cpp multiplies YaRN's own factor by this one.
    let times = positive("rope.scaling.attn_factor")?.filter(|f| *f != 1.0);

    let kind = gguf.string(&key("rope.scaling.type"))?;
    let from_keys = match (kind, factor.or(linear)) {
        (None | Some("none"), None) => None,
        (None | Some("linear"), Some(factor)) => Some(json!({"rope_type": "linear", "factor": factor})),
        (Some("yarn"), Some(factor)) => {
            let original = original.ok_or_else(|| {
                gguf.key_error(&key("rope.scaling.original_context_length"), "the context length before yarn scaling")
            })?;
            let mut yarn = json!({"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original});
            for name in ["beta_fast", "beta_slow"] {
                if let Some(beta) = positive(&format!("rope.scaling.yarn_{name}"))? {
                    yarn[name] = json!(beta);
                }
            }
            if let Some(attention) = whole.or(times.map(|t| t * (0.1 * factor.ln() + 1.0))) {
                yarn["attention_factor"] = json!(attention);
            }
            Some(yarn)
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
    match (from_keys, llama3(gguf, head_dim, theta, original)?) {
        (Some(_), Some(_)) => Err(GgufError::Tensor {
            file: gguf.path.clone(),
            tensor: FACTORS.into(),
            detail: format!("contradicts `{}`: a model has one rule for its positions", key("rope.scaling.type")),
        }),
        (keys, table) => Ok(keys.or(table)),
    }
}

/// Recognises the table that the converter writes for `rope_type` "llama3": one divisor per frequency, shape [head_dim/2].
fn llama3(gguf: &Gguf, head_dim: u64, theta: f64, original: Option<u64>) -> Result<Option<Json>> {
    let Some(info) = gguf.tensors.get(FACTORS) else { return Ok(None) };
    let error = |detail: String| GgufError::Tensor { file: gguf.path.clone(), tensor: FACTORS.into(), detail };
    if info.shape != [head_dim / 2] {
        return Err(GgufError::Shape {
            file: gguf.path.clone(),
            tensor: FACTORS.into(),
            expected: vec![head_dim / 2],
            found: info.shape.clone(),
        });
    }
    // head_dim is bounded, so this is small.
    let mut blocks = Blocks::new();
    gguf.tensor_bytes(info, 0, blocks.resize(info.bytes as usize))?;
    let table: Vec<f64> = info.kind.decode(&blocks).map_err(error)?.into_iter().map(f64::from).collect();
    if table.iter().all(|f| *f == 1.0) {
        return Ok(None);
    }
    // The slowest frequency is divided by the whole factor.
    let factor = table.last().copied().unwrap_or(1.0);
    let candidates = original.map_or_else(|| ORIGINAL_CONTEXTS.to_vec(), |o| vec![o]);
    for original in candidates {
        let matches = table.iter().enumerate().all(|(i, found)| {
            let frequency = theta.powf(-2.0 * i as f64 / head_dim as f64);
            (found - llama3_divisor(frequency, factor, original as f64)).abs() <= TOLERANCE * found.abs()
        });
        if matches {
            return Ok(Some(json!({
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": LOW_FREQ_FACTOR,
                "high_freq_factor": HIGH_FREQ_FACTOR,
                "original_max_position_embeddings": original,
            })));
        }
    }
    Err(error(format!(
        "its {} factors, {} to {factor}, do not follow Llama 3's rule with low and high frequency factors {LOW_FREQ_FACTOR} \
         and {HIGH_FREQ_FACTOR}; other tables are not supported",
        table.len(),
        table.first().copied().unwrap_or(1.0),
    )))
}

/// What Llama 3.1 divides a rotary frequency (radians per token) by; transformers' `_compute_llama3_parameters`.
fn llama3_divisor(frequency: f64, factor: f64, original: f64) -> f64 {
    let wavelength = std::f64::consts::TAU / frequency;
    if wavelength < original / HIGH_FREQ_FACTOR {
        1.0
    } else if wavelength > original / LOW_FREQ_FACTOR {
        factor
    } else {
        let smooth = (original / wavelength - LOW_FREQ_FACTOR) / (HIGH_FREQ_FACTOR - LOW_FREQ_FACTOR);
        1.0 / ((1.0 - smooth) / factor + smooth)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llama_3_1_leaves_fast_frequencies_alone_and_divides_slow_ones_by_the_factor() {
        assert_eq!(llama3_divisor(1.0, 8.0, 8192.0), 1.0);
        assert_eq!(llama3_divisor(1e-5, 8.0, 8192.0), 8.0);
        // Half way between the two wavelengths: smooth = (8192/w - 1)/3 with w = 4096 is 1/3.
        let middle = llama3_divisor(std::f64::consts::TAU / 4096.0, 8.0, 8192.0);
        assert!((middle - 1.0 / (2.0 / 3.0 / 8.0 + 1.0 / 3.0)).abs() < 1e-12);
    }
}
