//! `generation_kwargs`: how answers are generated. Every setting is used, refused, or named as having no effect.

use recoup_jinja::data::repr;
use serde_json::{Map, Value};

use super::nearest;
use crate::{GenerationDefaults, GenerationOptions};

/// Settings as they count together.
#[derive(Clone, Debug, PartialEq)]
pub struct Generation {
    pub options: GenerationOptions,
    /// Settings that were asked for and change nothing, each with its value and the reason.
    pub unused: Vec<String>,
    /// Its `top_k` is what the library takes where nobody says one.
    pub top_k_by_default: bool,
}

/// A setting that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{key}` {problem}")]
pub struct Wrong {
    pub key: String,
    pub problem: String,
}

/// Names of the limit on tokens, by their priority in lm-evaluation-harness (`normalize_gen_kwargs`).
const LIMITS: [&str; 4] = ["max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"];
/// Names of the strings that end an answer: lm-evaluation-harness's, OpenAI's, transformers'.
const STOPS: [&str; 3] = ["until", "stop", "stop_strings"];
/// What else is a number.
const NUMBERS: &str = "temperature top_p top_k min_p repetition_penalty presence_penalty frequency_penalty seed";
/// Settings of sampling only.
const SAMPLING: [&str; 4] = ["top_p", "top_k", "min_p", "seed"];
/// Settings of which servers have defaults that are not off.
const CAN_BE_OFF: [&str; 2] = ["top_k", "min_p"];
/// What of a model's own settings counts where nothing else is said, as transformers has it.
const OF_THE_MODEL: [&str; 4] = ["top_p", "top_k", "min_p", "repetition_penalty"];
/// Settings of transformers and vLLM that are not supported, by the number at which they are off. Null, false and nothing in
/// a list are off, too.
const OFF: [(f64, &str); 3] = [
    (
        1.0,
        "num_beams num_beam_groups num_return_sequences n best_of beam_width encoder_repetition_penalty typical_p \
           guidance_scale",
    ),
    (
        0.0,
        "no_repeat_ngram_size encoder_no_repeat_ngram_size min_length min_new_tokens min_tokens epsilon_cutoff \
           eta_cutoff penalty_alpha diversity_penalty bad_words_ids force_words_ids suppress_tokens \
           begin_suppress_tokens sequence_bias logit_bias exponential_decay_length_penalty ignore_eos \
           prompt_lookup_num_tokens",
    ),
    (-1.0, "forced_bos_token_id forced_eos_token_id eos_token_id stop_token_ids"),
];
/// Settings that change no answer here, and why.
const NO_EFFECT: [(&str, &str); 7] = [
    ("length_penalty", "without beams it has none"),
    ("early_stopping", "without beams it has none"),
    ("use_cache", "answers are the same with and without"),
    ("pad_token_id", "nothing is padded"),
    ("return_dict_in_generate", "answers are texts"),
    ("output_scores", "answers are texts"),
    ("remove_invalid_values", "a logit that is no number ends the run"),
];

/// Checks the settings of one place (a task, the command); the names of stop strings become `until`.
///
/// # Errors
/// The first setting that is not known, not supported or of no possible value.
pub fn checked(map: &Map<String, Value>) -> Result<Map<String, Value>, Wrong> {
    let mut out = Map::new();
    for (key, value) in map {
        let name = key.as_str();
        let wrong = |problem: String| Wrong { key: key.clone(), problem };
        let is = |valid: fn(f64) -> bool| value.is_null() || number(value).is_some_and(valid);
        let (expected, valid) = match name {
            _ if STOPS.contains(&name) => ("a text or a list of texts", stops(value).is_some()),
            _ if LIMITS.contains(&name) => ("a count of tokens, 1 or more", is(|n| n >= 1.0 && n.fract() == 0.0)),
            "do_sample" => ("true or false", value.is_null() || value.is_boolean()),
            "temperature" => ("0 (greedy) or more", is(|n| n >= 0.0)),
            "top_p" => ("from 0 to 1 (1, or -1, is off)", is(|n| (0.0..=1.0).contains(&n) || n == -1.0)),
            "top_k" => ("a whole number (0, or -1, is off)", is(|n| n >= -1.0 && n.fract() == 0.0)),
            "min_p" => ("from 0 to 1 (0 is off)", is(|n| (0.0..=1.0).contains(&n) || n == -1.0)),
            "repetition_penalty" => ("above 0 (1 is off)", is(|n| n > 0.0)),
            "presence_penalty" | "frequency_penalty" => ("from -2 to 2 (0 is off)", is(|n| (-2.0..=2.0).contains(&n))),
            "seed" => ("a whole number", is(|n| n >= 0.0 && n.fract() == 0.0)),
            "max_length" => {
                return Err(wrong(format!(
                    "counts the prompt's tokens too and is not supported; set `max_gen_toks`, which counts the answer's \
                     (found {})",
                    repr(value)
                )));
            }
            _ => {
                let off = OFF.iter().find(|(_, names)| names.split(' ').any(|known| known == name));
                if off.is_some_and(|(off, _)| !is_off(value, *off)) {
                    return Err(wrong(format!("cannot be {}: it is not supported; leave it out", repr(value))));
                }
                if off.is_none() && !NO_EFFECT.iter().any(|(known, _)| *known == name) {
                    let names = OFF.iter().map(|(_, names)| *names).chain([NUMBERS]).flat_map(|names| names.split(' '));
                    let nearest = nearest(name, names.chain(LIMITS).chain(STOPS).chain(["do_sample"]));
                    return Err(wrong(format!(
                        "is no setting of generation that is known; the nearest is `{nearest}`"
                    )));
                }
                ("", true)
            }
        };
        if !valid {
            return Err(wrong(format!("must be {expected}, found {}", repr(value))));
        }
        if !STOPS.contains(&name) {
            out.insert(key.clone(), value.clone());
            continue;
        }
        if STOPS.iter().any(|other| *other != name && map.contains_key(*other)) {
            return Err(wrong(format!("is there beside another of {}; give one", STOPS.join(", "))));
        }
        out.insert("until".into(), value.clone());
    }
    Ok(out)
}

/// What checked settings mean together, by lm-evaluation-harness's rules (`normalize_gen_kwargs`). What the model's maker
/// set counts where they say nothing.
pub fn generation(map: &Map<String, Value>, of_model: &GenerationDefaults) -> Generation {
    let (of_model, default_top_k) = (&of_model.settings, of_model.top_k);
    let own = GenerationOptions::default();
    let mut unused = Vec::new();
    let mut name = |key: &str, value: &Value, why: &str| unused.push(format!("{key} {value} ({why})"));
    let given = |key: &str| map.get(key).filter(|v| !v.is_null());

    let limits: Vec<(&str, &Value)> = LIMITS.iter().filter_map(|key| Some((*key, given(key)?))).collect();
    for (key, value) in limits.iter().skip(1).filter(|(_, v)| number(v) != number(limits[0].1)) {
        name(key, value, &format!("{} {} counts, as in lm-evaluation-harness", limits[0].0, limits[0].1));
    }
    let asked = given("temperature").and_then(number).unwrap_or(own.temperature);
    let do_sample = given("do_sample").and_then(Value::as_bool);
    let temperature = if do_sample == Some(false) { 0.0 } else { asked };
    if let (Some(false), Some(value), true) = (do_sample, given("temperature"), asked > 0.0) {
        name("temperature", value, "do_sample is false; set it to true");
    }
    if do_sample == Some(true) && asked == 0.0 {
        name("do_sample", &Value::Bool(true), "temperature is 0, so answers are greedy");
    }
    let sampled = temperature > 0.0;
    for key in SAMPLING.iter().filter(|_| !sampled) {
        if let Some(value) = given(key).filter(|v| *key == "seed" || is_neutral(key, v) == Some(false)) {
            name(key, value, "answers are greedy");
        }
    }
    for (key, why) in NO_EFFECT {
        if let Some(value) = given(key).filter(|v| **v != Value::Bool(false)) {
            name(key, value, why);
        }
    }
    let value = |key: &str, default: f64| {
        if SAMPLING.contains(&key) && !sampled {
            return default;
        }
        let of_model = of_model.get(key).filter(|_| OF_THE_MODEL.contains(&key));
        given(key).or(of_model).and_then(number).unwrap_or(default)
    };
    let mut until = map.get("until").and_then(stops).unwrap_or_default();
    let off = |value: &Value| number(value).is_some_and(|n| n <= 0.0);
    // The model's own end its answers beside the task's.
    until.extend(of_model.get("stop_strings").and_then(stops).unwrap_or_default());
    let options = GenerationOptions {
        until,
        max_tokens: limits.first().and_then(|(_, v)| number(v)).map_or(own.max_tokens, |n| n as usize),
        temperature,
        top_p: match value("top_p", own.top_p) {
            // Only the most probable token is left, as with the smallest positive share.
            0.0 => f64::from(f32::MIN_POSITIVE),
            off if off < 0.0 => 1.0,
            p => p,
        },
        top_k: value("top_k", default_top_k.filter(|_| sampled).unwrap_or(own.top_k) as f64).max(0.0) as usize,
        min_p: value("min_p", own.min_p).max(0.0),
        repetition_penalty: value("repetition_penalty", own.repetition_penalty),
        presence_penalty: value("presence_penalty", own.presence_penalty),
        frequency_penalty: value("frequency_penalty", own.frequency_penalty),
        seed: value("seed", own.seed as f64) as u64,
        off: CAN_BE_OFF.into_iter().filter(|key| sampled && given(key).is_some_and(off)).map(str::to_owned).collect(),
        think_end: None,
    };
    let said = given("top_k").is_some() || of_model.contains_key("top_k");
    Generation { options, unused, top_k_by_default: sampled && !said && default_top_k.is_some() }
}

/// A number, or a text that is one: YAML 1.1 takes `1e-5` for a text.
fn number(value: &Value) -> Option<f64> {
    value.as_f64().or_else(|| value.as_str()?.trim().parse().ok()).filter(|n| n.is_finite())
}

fn stops(value: &Value) -> Option<Vec<String>> {
    match value {
        Value::Null => Some(Vec::new()),
        Value::String(s) => Some(vec![s.clone()]),
        Value::Array(items) => items.iter().map(|i| i.as_str().map(str::to_owned)).collect(),
        _ => None,
    }
}

fn is_off(value: &Value, off: f64) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(map) => map.is_empty(),
        value => number(value) == Some(off),
    }
}

/// Whether a setting of sampling has the value at which it does nothing.
fn is_neutral(key: &str, value: &Value) -> Option<bool> {
    let value = number(value)?;
    Some(match key {
        "top_p" => value == 1.0 || value < 0.0,
        _ => value <= 0.0,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn map(value: Value) -> Map<String, Value> {
        value.as_object().unwrap().clone()
    }

    fn read(value: Value) -> Generation {
        generation(&checked(&map(value)).unwrap(), &GenerationDefaults::default())
    }

    #[test]
    fn every_setting_that_is_used_arrives() {
        let found = read(json!({"until": ["a", "b"], "max_gen_toks": 7, "temperature": 0.5, "top_p": 0.9, "top_k": 3,
            "min_p": 0.1, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": -0.5, "seed": 4}));
        let expected = GenerationOptions {
            until: vec!["a".into(), "b".into()],
            max_tokens: 7,
            temperature: 0.5,
            top_p: 0.9,
            top_k: 3,
            min_p: 0.1,
            repetition_penalty: 1.3,
            presence_penalty: 0.5,
            frequency_penalty: -0.5,
            seed: 4,
            off: vec![],
            think_end: None,
        };
        assert_eq!(found, Generation { options: expected, unused: vec![], top_k_by_default: false });
    }

    #[test]
    fn what_is_not_known_or_not_supported_is_refused_by_name() {
        for (setting, message) in [
            (
                json!({"temprature": 1.5}),
                "`temprature` is no setting of generation that is known; the nearest is `temperature`",
            ),
            (
                json!({"repeat_penalty": 1.5}),
                "`repeat_penalty` is no setting of generation that is known; the nearest is `repetition_penalty`",
            ),
            (json!({"num_beams": 4}), "`num_beams` cannot be 4: it is not supported; leave it out"),
            (
                json!({"no_repeat_ngram_size": 2}),
                "`no_repeat_ngram_size` cannot be 2: it is not supported; leave it out",
            ),
            (json!({"bad_words_ids": [[1]]}), "`bad_words_ids` cannot be [[1]]: it is not supported; leave it out"),
            (json!({"max_gen_toks": 0}), "`max_gen_toks` must be a count of tokens, 1 or more, found 0"),
            (json!({"max_tokens": 1.5}), "`max_tokens` must be a count of tokens, 1 or more, found 1.5"),
            (json!({"do_sample": "yes"}), "`do_sample` must be true or false, found 'yes'"),
            (json!({"temperature": -1}), "`temperature` must be 0 (greedy) or more, found -1"),
            (json!({"temperature": "NaN"}), "`temperature` must be 0 (greedy) or more, found 'NaN'"),
            (json!({"top_p": 1.5}), "`top_p` must be from 0 to 1 (1, or -1, is off), found 1.5"),
            (json!({"top_k": 2.5}), "`top_k` must be a whole number (0, or -1, is off), found 2.5"),
            (json!({"top_k": -2}), "`top_k` must be a whole number (0, or -1, is off), found -2"),
            (json!({"repetition_penalty": 0}), "`repetition_penalty` must be above 0 (1 is off), found 0"),
            (json!({"until": 3}), "`until` must be a text or a list of texts, found 3"),
            (json!({"until": [1]}), "`until` must be a text or a list of texts, found [1]"),
            (
                json!({"until": "a", "stop": "b"}),
                "`until` is there beside another of until, stop, stop_strings; give one",
            ),
            (json!({"seed": -1}), "`seed` must be a whole number, found -1"),
        ] {
            assert_eq!(checked(&map(setting)).unwrap_err().to_string(), message);
        }
        assert!(checked(&map(json!({"max_length": 9}))).unwrap_err().to_string().contains("set `max_gen_toks`"));
    }

    #[test]
    fn what_means_off_is_off() {
        for off in [
            json!({"top_k": 0}),
            json!({"top_k": -1, "temperature": null}),
            json!({"top_p": 1, "min_p": 0, "repetition_penalty": 1.0}),
            json!({"top_p": -1, "presence_penalty": 0}),
            json!({"num_beams": 1, "no_repeat_ngram_size": 0, "typical_p": 1.0, "bad_words_ids": null, "use_cache": false}),
            json!({"until": null, "max_tokens": null, "do_sample": null}),
        ] {
            assert_eq!(
                read(off.clone()),
                Generation { options: GenerationOptions::default(), unused: vec![], top_k_by_default: false },
                "{off}"
            );
        }
    }

    #[test]
    fn stop_is_until_and_limits_have_lm_evals_priority() {
        assert_eq!(read(json!({"stop": "e"})).options.until, ["e"]);
        assert_eq!(read(json!({"stop_strings": ["e", "f"]})).options.until, ["e", "f"]);
        assert_eq!(read(json!({"max_completion_tokens": "9"})).options.max_tokens, 9);
        let found = read(json!({"max_new_tokens": 3, "max_gen_toks": 12}));
        assert_eq!(found.options.max_tokens, 12);
        assert_eq!(found.unused, ["max_new_tokens 3 (max_gen_toks 12 counts, as in lm-evaluation-harness)"]);
        assert_eq!(read(json!({"max_new_tokens": 12, "max_gen_toks": 12})).unused, Vec::<String>::new());
    }

    #[test]
    fn what_changes_nothing_is_named() {
        let found = read(json!({"do_sample": false, "temperature": 1.5, "top_p": 0.9, "seed": 1, "length_penalty": 2}));
        assert_eq!(found.options, GenerationOptions::default());
        let expected = [
            "temperature 1.5 (do_sample is false; set it to true)",
            "top_p 0.9 (answers are greedy)",
            "seed 1 (answers are greedy)",
            "length_penalty 2 (without beams it has none)",
        ];
        assert_eq!(found.unused, expected);
        assert_eq!(
            read(json!({"do_sample": true})).unused,
            ["do_sample true (temperature is 0, so answers are greedy)"]
        );
        assert_eq!(read(json!({"do_sample": false, "temperature": 0})).unused, Vec::<String>::new());
    }

    #[test]
    fn the_models_own_settings_count_where_nothing_else_is_said() {
        let settings = map(json!({"top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1, "temperature": 0.7}));
        let of_model = GenerationDefaults { settings, ..GenerationDefaults::default() };
        let of = |own: Value| generation(&checked(&map(own)).unwrap(), &of_model).options;
        let greedy = of(json!({}));
        assert_eq!(greedy, GenerationOptions { repetition_penalty: 1.1, ..GenerationOptions::default() });
        let sampled = of(json!({"temperature": 0.5, "top_k": 0}));
        let expected = GenerationOptions { temperature: 0.5, top_p: 0.9, off: vec!["top_k".into()], ..greedy };
        assert_eq!(sampled, expected);
        assert_eq!(of(json!({"repetition_penalty": 1})), GenerationOptions::default());
        let ends =
            GenerationDefaults { settings: map(json!({"stop_strings": ["b"]})), ..GenerationDefaults::default() };
        assert_eq!(generation(&map(json!({"until": ["a"]})), &ends).options.until, ["a", "b"]);
    }

    #[test]
    fn the_librarys_top_k_counts_of_sampled_answers_for_which_nobody_says_one() {
        let top_k = |own: Value, settings: Value| {
            let of_model =
                GenerationDefaults { settings: map(settings), top_k: Some(50), ..GenerationDefaults::default() };
            generation(&checked(&map(own)).unwrap(), &of_model).options.top_k
        };
        assert_eq!(top_k(json!({"temperature": 1}), json!({})), 50);
        assert_eq!(top_k(json!({}), json!({})), 0);
        assert_eq!(top_k(json!({"temperature": 1}), json!({"top_k": 20})), 20);
        for off in [json!(0), json!(-1)] {
            assert_eq!(top_k(json!({"temperature": 1, "top_k": off}), json!({"top_k": 20})), 0);
        }
    }
}
