//! generation_config.json: how a model's maker wants answers drawn and ended, in transformers' meaning; every setting in
//! it is used, or named as not used.

use std::path::Path;

use serde_json::Value;

use crate::checkpoint::error::Result;
use crate::checkpoint::json::Object;
use crate::logits::SamplingParams;

/// The file's name in a checkpoint folder.
pub const FILE: &str = "generation_config.json";

/// What generation_config.json says; the default is that of a model without the file.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerationConfig {
    /// How tokens are drawn; greedy where `do_sample` is not true.
    pub sampling: SamplingParams,
    /// How tokens are drawn where the caller draws, whatever `do_sample` says.
    pub drawn: SamplingParams,
    /// The file says a `top_k`, if only that it is off.
    pub names_top_k: bool,
    /// Tokens that end the answer (`eos_token_id`).
    pub eos: Vec<u32>,
    /// Strings that end the answer (`stop_strings`).
    pub stop_strings: Vec<String>,
    /// Tokens of the answer at most (`max_new_tokens`).
    pub max_new_tokens: Option<usize>,
    /// Tokens of prompt and answer together at most (`max_length`); counts only without `max_new_tokens`.
    pub max_length: Option<usize>,
    /// Settings that would change the answer and are not used, each with its value and the reason.
    pub ignored: Vec<String>,
}

impl Default for GenerationConfig {
    fn default() -> Self {
        Self {
            sampling: SamplingParams::greedy(),
            drawn: SamplingParams::default(),
            names_top_k: false,
            eos: Vec::new(),
            stop_strings: Vec::new(),
            max_new_tokens: None,
            max_length: None,
            ignored: Vec::new(),
        }
    }
}

/// Settings that count only where `do_sample` is true.
const SAMPLING: [&str; 7] = ["temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"];

/// Settings that this reader uses.
const USED: [&str; 8] =
    ["do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "eos_token_id", "stop_strings"];

/// Settings that do not change which tokens come out. Source: transformers, generation/configuration_utils.py.
const WITHOUT_EFFECT: [&str; 23] = [
    "max_new_tokens",
    "max_length",
    "bos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
    "transformers_version",
    "trust_remote_code",
    "use_cache",
    "cache_implementation",
    "cache_config",
    "return_legacy_cache",
    "prefill_chunk_size",
    "low_memory",
    "compile_config",
    "disable_compile",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "output_logits",
    "return_dict_in_generate",
    "continuous_batching_config",
    "is_assistant",
    "num_assistant_tokens",
];

impl GenerationConfig {
    /// Reads generation_config.json of `folder`, if there is one.
    ///
    /// # Errors
    /// When the file is no JSON object, or a setting has a value that means nothing.
    pub fn from_folder(folder: &Path) -> Result<Self> {
        let file = folder.join(FILE);
        if !file.is_file() {
            return Ok(Self::default());
        }
        Self::read(&Object::read(&file)?)
    }

    fn read(c: &Object) -> Result<Self> {
        let mut own = Self { eos: c.token_ids("eos_token_id")?, ..Self::default() };
        own.stop_strings = match c.get("stop_strings") {
            Some(Value::String(one)) => vec![one.clone()],
            _ => c.strings("stop_strings")?,
        };
        if own.stop_strings.iter().any(String::is_empty) {
            return Err(c.error("stop_strings", "strings that are not empty"));
        }
        own.max_new_tokens = limit(c, "max_new_tokens")?;
        own.max_length = limit(c, "max_length")?;
        // transformers: off at 1; what is not positive has no meaning.
        own.drawn.repetition_penalty = c.positive_f32("repetition_penalty")?.unwrap_or(1.0);
        let sampled = c.bool_or("do_sample", false)?;
        own.drawn.temperature = number(c, "temperature", "0 or more", |t| t >= 0.0)?.unwrap_or(1.0);
        own.names_top_k = c.get("top_k").is_some();
        // 0 is off in transformers, -1 in vLLM; its default, where the file says nothing, is taken as off too.
        own.drawn.top_k = match number(c, "top_k", "a whole number, or 0 or -1 for off", |k| k >= -1.0)? {
            Some(k) if k.fract() == 0.0 => {
                if k < 1.0 {
                    0
                } else {
                    k as usize
                }
            }
            Some(_) => return Err(c.error("top_k", "a whole number, or 0 or -1 for off")),
            None => 0,
        };
        // At 0 only the most probable token is left, which is what the smallest positive value means here; -1 is off.
        own.drawn.top_p =
            match number(c, "top_p", "from 0 to 1, or -1 for off", |p| (0.0..=1.0).contains(&p) || p == -1.0)? {
                Some(0.0) => f32::MIN_POSITIVE,
                Some(p) if p < 0.0 => 1.0,
                p => p.unwrap_or(1.0),
            };
        let min_p = number(c, "min_p", "from 0 to 1, or -1 for off", |p| (0.0..=1.0).contains(&p) || p == -1.0)?;
        own.drawn.min_p = min_p.unwrap_or(0.0).max(0.0);
        own.sampling = match sampled {
            true => own.drawn.clone(),
            false => SamplingParams { repetition_penalty: own.drawn.repetition_penalty, ..SamplingParams::greedy() },
        };
        for (key, value) in c.value().as_object().into_iter().flatten() {
            let key = key.as_str();
            if key.starts_with('_') || WITHOUT_EFFECT.contains(&key) || is_off(key, value) {
                continue;
            }
            if !sampled && SAMPLING.contains(&key) {
                own.ignored.push(format!("{key} {value} (do_sample is not true)"));
            } else if !USED.contains(&key) {
                own.ignored.push(format!("{key} {value} (not supported)"));
            }
        }
        Ok(own)
    }

    /// Tokens of an answer to a prompt of `prompt` tokens at most, where the file sets a limit.
    #[must_use]
    pub fn limit(&self, prompt: usize) -> Option<usize> {
        self.max_new_tokens.or(self.max_length.map(|l| l.saturating_sub(prompt)))
    }
}

/// A limit on tokens; null, 0 and -1 set none.
fn limit(c: &Object, key: &str) -> Result<Option<usize>> {
    match c.get(key) {
        None => Ok(None),
        Some(v) if v.as_i64().is_some_and(|v| v == 0 || v == -1) => Ok(None),
        Some(_) => c.integer(key, 1..=usize::MAX),
    }
}

fn number(c: &Object, key: &str, expected: &str, valid: impl Fn(f64) -> bool) -> Result<Option<f32>> {
    let Some(v) = c.get(key) else { return Ok(None) };
    v.as_f64().filter(|v| v.is_finite() && valid(*v)).map(|v| Some(v as f32)).ok_or_else(|| c.error(key, expected))
}

/// Whether a setting has the value by which transformers knows that it is off.
fn is_off(key: &str, value: &Value) -> bool {
    let is = |off: f64| value.as_f64() == Some(off);
    match (key, value) {
        (_, Value::Null | Value::Bool(false)) => true,
        (_, Value::Array(items)) => items.is_empty(),
        (_, Value::Object(map)) => map.is_empty(),
        ("temperature" | "top_p" | "typical_p" | "repetition_penalty" | "encoder_repetition_penalty", _) => is(1.0),
        // No meaning without beams, which are named by themselves.
        ("length_penalty", _) => true,
        ("num_beams" | "num_beam_groups" | "num_return_sequences" | "guidance_scale", _) => is(1.0),
        _ => is(0.0) || is(-1.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<GenerationConfig> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(FILE), text).unwrap();
        GenerationConfig::from_folder(folder.path())
    }

    #[test]
    fn every_setting_of_sampling_is_read() {
        let c = read(
            r#"{"do_sample": true, "temperature": 1.5, "min_p": 0.5, "top_k": 7, "top_p": 0.75, "eos_token_id": [3, 4],
                "repetition_penalty": 1.25, "stop_strings": ["X"], "max_new_tokens": 9, "bos_token_id": 1}"#,
        )
        .unwrap();
        let sampling = SamplingParams {
            temperature: 1.5,
            min_p: 0.5,
            top_k: 7,
            top_p: 0.75,
            repetition_penalty: 1.25,
            ..SamplingParams::default()
        };
        assert_eq!((c.limit(5), c.sampling, c.eos), (Some(9), sampling, vec![3, 4]));
        assert_eq!((c.stop_strings, c.ignored), (vec!["X".to_owned()], vec![]));
        assert_eq!(read(r#"{"max_length": 20}"#).unwrap().limit(5), Some(15));
        assert_eq!(read(r#"{"stop_strings": "end"}"#).unwrap().stop_strings, ["end"]);
    }

    #[test]
    fn what_hugging_face_means_by_off_is_off() {
        for off in [
            r#""top_k": 0"#,
            r#""top_k": -1"#,
            r#""top_k": null, "top_p": null, "min_p": null, "temperature": null"#,
            r#""top_p": 1, "min_p": 0, "typical_p": 1.0, "num_beams": 1, "no_repeat_ngram_size": 0"#,
            r#""max_new_tokens": -1, "max_length": null, "bad_words_ids": [], "penalty_alpha": 0"#,
        ] {
            let c = read(&format!(r#"{{"do_sample": true, {off}}}"#)).unwrap();
            let names_top_k = off.starts_with(r#""top_k": 0"#) || off.starts_with(r#""top_k": -1"#);
            let expected = GenerationConfig { sampling: SamplingParams::default(), names_top_k, ..Default::default() };
            assert_eq!(c, expected, "{off}");
            c.sampling.validate().unwrap();
        }
    }

    #[test]
    fn what_is_not_used_is_named() {
        let c =
            read(r#"{"temperature": 0.6, "top_p": 0.95, "num_beams": 4, "suppress_tokens": [1], "odd": "x"}"#).unwrap();
        assert_eq!(c.sampling, SamplingParams::greedy());
        let expected = [
            "temperature 0.6 (do_sample is not true)",
            "top_p 0.95 (do_sample is not true)",
            "num_beams 4 (not supported)",
            "suppress_tokens [1] (not supported)",
            "odd \"x\" (not supported)",
        ];
        assert_eq!(c.ignored, expected);
    }

    #[test]
    fn what_means_nothing_is_refused_by_name() {
        for (key, value) in [
            ("min_p", "1.5"),
            ("top_p", "2"),
            ("top_k", "-3"),
            ("top_k", "2.5"),
            ("temperature", "\"hot\""),
            ("repetition_penalty", "0"),
            ("stop_strings", "[\"\"]"),
            ("max_new_tokens", "1.5"),
            ("do_sample", "1"),
        ] {
            let key_and_sample = if key == "do_sample" { String::new() } else { "\"do_sample\": true, ".into() };
            let error = read(&format!("{{{key_and_sample}\"{key}\": {value}}}")).unwrap_err().to_string();
            assert!(error.contains(key) && error.contains(FILE), "{error}");
        }
    }
}
