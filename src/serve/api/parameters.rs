//! What the endpoints have in common: how an answer is drawn, what it may be, where it ends.

use serde_json::{Map, Value, json};

use super::fields::Fields;
use crate::logits::SamplingParams;
use crate::serve::error::ApiError;
use crate::text::grammar::Grammar;

type Result<T> = std::result::Result<T, ApiError>;

/// Stop strings of one request at most: each is looked for after every token.
const MOST_STOPS: usize = 64;

/// Bytes of one stop string at most.
const LONGEST_STOP: usize = 512;

/// Stop tokens of one request at most.
const MOST_STOP_TOKENS: usize = 1024;

/// Tokens with a bias of one request at most.
const MOST_BIASES: usize = 4096;

/// Alternatives of a token at most.
pub const MOST_LOGPROBS: usize = 1000;

/// Answers to one prompt at most.
const MOST_ANSWERS: usize = 128;

/// Sampling of a request, over the model's own.
#[derive(Debug)]
pub struct Parameters {
    pub sampling: SamplingParams,
    /// Answers to each prompt.
    pub n: usize,
    pub stop: Vec<String>,
    pub stop_tokens: Vec<u32>,
    /// Tokens that end a turn do not end the answer.
    pub ignore_eos: bool,
    pub min_tokens: usize,
    pub keep_stop: bool,
    pub show_special: bool,
    pub prompt_logprobs: Option<usize>,
    pub grammar: Option<Grammar>,
    /// Ids of prompt and answer are told.
    pub ids: bool,
    /// Tokens are named `token_id:ID` where log-probabilities are told.
    pub name_by_id: bool,
    pub stream: Option<Stream>,
}

/// How an answer is streamed.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stream {
    /// The last chunk tells the usage.
    pub usage: bool,
    /// Every chunk does.
    pub running_usage: bool,
}

impl Parameters {
    /// Takes what is about sampling from the fields; `model`: how the model's maker draws.
    ///
    /// # Errors
    /// Names the parameter that means nothing.
    pub fn take(fields: &mut Fields, model: &SamplingParams) -> Result<Self> {
        let number = |fields: &mut Fields, name: &str, default: f32| -> Result<f32> {
            let given: Option<f64> = fields.take(name)?;
            Ok(given.map_or(default, |x| x as f32))
        };
        let mut sampling = SamplingParams {
            temperature: number(fields, "temperature", model.temperature)?,
            top_p: number(fields, "top_p", model.top_p)?,
            min_p: number(fields, "min_p", model.min_p)?,
            repetition_penalty: number(fields, "repetition_penalty", model.repetition_penalty)?,
            presence_penalty: number(fields, "presence_penalty", model.presence_penalty)?,
            frequency_penalty: number(fields, "frequency_penalty", model.frequency_penalty)?,
            ..model.clone()
        };
        if let Some(k) = fields.take::<i64>("top_k")? {
            if k < -1 {
                return Err(ApiError::parameter(
                    "top_k",
                    format!("`top_k` must be 1 or more, or 0 or -1 for off, found {k}"),
                ));
            }
            sampling.top_k = usize::try_from(k).unwrap_or(0);
        }
        // Any whole number of 64 bits, with or without sign.
        sampling.seed = match fields.take::<Value>("seed")? {
            None => None,
            Some(seed) => match (seed.as_u64(), seed.as_i64()) {
                (Some(seed), _) => Some(seed),
                (None, Some(seed)) => Some(seed as u64),
                (None, None) => {
                    return Err(ApiError::parameter(
                        "seed",
                        format!("`seed` must be a whole number of 64 bits, found {seed}"),
                    ));
                }
            },
        };
        sampling.logit_bias = biases(fields)?;
        if let Err(e) = sampling.validate() {
            let name = e.to_string().split('`').nth(1).unwrap_or_default().to_owned();
            return Err(ApiError::parameter(name, e.to_string()));
        }
        let n = fields.take::<usize>("n")?.unwrap_or(1);
        if n == 0 || n > MOST_ANSWERS {
            return Err(ApiError::parameter("n", format!("`n` must be from 1 to {MOST_ANSWERS}, found {n}")));
        }
        fields.refuse("best_of", &[json!(n)], "only as many answers are made as are given (`n`)")?;
        fields.refuse("use_beam_search", &[json!(false)], "answers are sampled")?;
        fields.refuse("length_penalty", &[json!(1), json!(1.0)], "it is for beam search")?;
        fields.refuse("truncate_prompt_tokens", &[], "prompts are not cut; one that is too long is refused")?;
        fields.refuse("allowed_token_ids", &[json!([])], "use `logit_bias` or a grammar")?;
        fields.refuse("bad_words", &[json!([])], "use `logit_bias` or a grammar")?;
        fields.refuse("logits_processors", &[json!([])], "no code runs on behalf of a request")?;
        fields.refuse("add_special_tokens", &[json!(true)], "send token ids as the prompt instead")?;
        let stop_tokens: Vec<u32> = fields.take("stop_token_ids")?.unwrap_or_default();
        if stop_tokens.len() > MOST_STOP_TOKENS {
            let found = stop_tokens.len();
            let message = format!("`stop_token_ids`: {MOST_STOP_TOKENS} tokens at most, found {found}");
            return Err(ApiError::parameter("stop_token_ids", message));
        }
        let prompt_logprobs = fields.take::<i64>("prompt_logprobs")?;
        let prompt_logprobs = prompt_logprobs.map(|k| alternatives("prompt_logprobs", k)).transpose()?;
        Ok(Self {
            sampling,
            n,
            stop: stops(fields)?,
            stop_tokens,
            ignore_eos: fields.switch("ignore_eos", false)?,
            min_tokens: fields.take("min_tokens")?.unwrap_or(0),
            keep_stop: fields.switch("include_stop_str_in_output", false)?,
            show_special: !fields.switch("skip_special_tokens", true)?,
            prompt_logprobs,
            grammar: grammar(fields)?,
            ids: fields.switch("return_token_ids", false)?,
            name_by_id: fields.switch("return_tokens_as_token_ids", false)?,
            stream: stream(fields)?,
        })
    }

    /// Sampling of answer `index` of a prompt: with a seed each has one of its own.
    #[must_use]
    pub fn sampling_of(&self, index: usize) -> SamplingParams {
        let seed = self.sampling.seed.map(|seed| seed.wrapping_add(index as u64));
        SamplingParams { seed, ..self.sampling.clone() }
    }
}

/// A number of alternatives.
///
/// # Errors
/// When it is negative or more than are given.
pub fn alternatives(name: &str, k: i64) -> Result<usize> {
    usize::try_from(k)
        .ok()
        .filter(|k| *k <= MOST_LOGPROBS)
        .ok_or_else(|| ApiError::parameter(name, format!("`{name}` must be from 0 to {MOST_LOGPROBS}, found {k}")))
}

fn stream(fields: &mut Fields) -> Result<Option<Stream>> {
    let streams = fields.switch("stream", false)?;
    let options: Option<Map<String, Value>> = fields.take("stream_options")?;
    let Some(options) = options else { return Ok(streams.then(Stream::default)) };
    if !streams {
        return Err(ApiError::parameter("stream_options", "`stream_options` is only for `stream: true`"));
    }
    let mut options = Fields::of(options);
    let stream = Stream {
        usage: options.switch("include_usage", false)?,
        running_usage: options.switch("continuous_usage_stats", false)?,
    };
    options.switch("include_obfuscation", false)?;
    options.finish()?;
    Ok(Some(stream))
}

fn stops(fields: &mut Fields) -> Result<Vec<String>> {
    let wrong = |message: String| Err(ApiError::parameter("stop", message));
    let stops: Vec<String> = match fields.take::<Value>("stop")? {
        None => return Ok(Vec::new()),
        Some(Value::String(one)) => vec![one],
        Some(other) => match serde_json::from_value(other) {
            Ok(stops) => stops,
            Err(e) => return wrong(format!("`stop` must be a string or a list of strings: {e}")),
        },
    };
    if stops.len() > MOST_STOPS {
        return wrong(format!("`stop`: {MOST_STOPS} strings at most, found {}", stops.len()));
    }
    if let Some(at) = stops.iter().position(|s| s.is_empty() || s.len() > LONGEST_STOP) {
        return wrong(format!(
            "`stop`: each must have from 1 to {LONGEST_STOP} bytes, number {at} has {}",
            stops[at].len()
        ));
    }
    Ok(stops)
}

fn biases(fields: &mut Fields) -> Result<Vec<(u32, f32)>> {
    let given: Map<String, Value> = fields.take("logit_bias")?.unwrap_or_default();
    let wrong = |message: String| ApiError::parameter("logit_bias", message);
    if given.len() > MOST_BIASES {
        return Err(wrong(format!("`logit_bias`: {MOST_BIASES} tokens at most, found {}", given.len())));
    }
    let bias = |(token, bias): (String, Value)| {
        let id = token.parse::<u32>().map_err(|_| wrong(format!("`logit_bias`: `{token}` is no token id")))?;
        let value = bias.as_f64().filter(|b| (-100.0..=100.0).contains(b));
        let value =
            value.ok_or_else(|| wrong(format!("`logit_bias` must be from -100 to 100, found {bias} for {token}")))?;
        Ok((id, value as f32))
    };
    let mut biases = given.into_iter().map(bias).collect::<Result<Vec<_>>>()?;
    biases.sort_unstable_by_key(|b| b.0);
    // "7" and "07" are the same token.
    if let Some(twice) = biases.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        return Err(wrong(format!("`logit_bias` has token {} twice", twice[0].0)));
    }
    Ok(biases)
}

/// What an answer may be: OpenAI's `response_format`, vLLM's `structured_outputs` and its older `guided_…`.
fn grammar(fields: &mut Fields) -> Result<Option<Grammar>> {
    let mut found: Vec<(String, Grammar)> = Vec::new();
    if let Some(format) = fields.take::<Map<String, Value>>("response_format")? {
        let grammar = response_format(format)?;
        found.extend(grammar.map(|g| ("response_format".to_owned(), g)));
    }
    if let Some(structured) = fields.take::<Map<String, Value>>("structured_outputs")? {
        let mut inner = Fields::of(structured);
        found.extend(named(&mut inner, "", "structured_outputs.")?);
        inner.refuse("structural_tag", &[], "use `json`, `regex`, `choice` or `grammar`")?;
        for harmless in ["disable_fallback", "disable_any_whitespace", "disable_additional_properties"] {
            inner.refuse(harmless, &[json!(false)], "the grammar decides")?;
        }
        inner.finish()?;
    }
    found.extend(named(fields, "guided_", "")?);
    fields.refuse(
        "guided_decoding_backend",
        &[json!("auto"), json!("guidance"), json!("llguidance")],
        "it is llguidance",
    )?;
    fields.refuse("guided_whitespace_pattern", &[], "white space is as JSON has it")?;
    if found.len() > 1 {
        let names: Vec<&str> = found.iter().map(|f| f.0.as_str()).collect();
        return Err(ApiError::parameter(names[1], format!("only one of these may be given: {}", names.join(", "))));
    }
    Ok(found.pop().map(|f| f.1))
}

fn named(fields: &mut Fields, prefix: &str, within: &str) -> Result<Vec<(String, Grammar)>> {
    let mut found = Vec::new();
    let mut add = |name: &str, grammar: Grammar| found.push((format!("{within}{prefix}{name}"), grammar));
    match fields.take::<Value>(&format!("{prefix}json"))? {
        // vLLM takes a schema as text too.
        Some(Value::String(text)) => {
            let schema = serde_json::from_str(&text).map_err(|e| {
                ApiError::parameter(format!("{within}{prefix}json"), format!("`{within}{prefix}json` is no JSON: {e}"))
            })?;
            add("json", Grammar::JsonSchema(schema));
        }
        Some(schema) => add("json", Grammar::JsonSchema(schema)),
        None => {}
    }
    if fields.switch(&format!("{prefix}json_object"), false)? {
        add("json_object", Grammar::JsonObject);
    }
    if let Some(regex) = fields.take(&format!("{prefix}regex"))? {
        add("regex", Grammar::Regex(regex));
    }
    if let Some(choice) = fields.take(&format!("{prefix}choice"))? {
        add("choice", Grammar::Choice(choice));
    }
    if let Some(grammar) = fields.take(&format!("{prefix}grammar"))? {
        add("grammar", Grammar::Lark(grammar));
    }
    Ok(found)
}

/// OpenAI's `response_format`; nothing where any text will do.
///
/// # Errors
/// When it is of no type that is known, or without its schema.
pub fn response_format(format: Map<String, Value>) -> Result<Option<Grammar>> {
    let mut format = Fields::of(format);
    let within = |e: ApiError| ApiError::parameter("response_format", format!("`response_format`: {e}"));
    let kind: String = format.need("type").map_err(within)?;
    let grammar = match kind.as_str() {
        "text" => None,
        "json_object" => Some(Grammar::JsonObject),
        "json_schema" => {
            // In /v1/responses the schema's fields stand beside the type.
            let nested: Option<Map<String, Value>> = format.take("json_schema").map_err(within)?;
            let mut schema = match nested {
                Some(nested) => Fields::of(nested),
                None => std::mem::replace(&mut format, Fields::of(Map::new())),
            };
            let grammar = Grammar::JsonSchema(schema.need("schema").map_err(within)?);
            schema.take::<String>("name").map_err(within)?;
            schema.take::<String>("description").map_err(within)?;
            schema.switch("strict", true).map_err(within)?;
            schema.finish().map_err(within)?;
            Some(grammar)
        }
        "regex" | "choice" | "grammar" | "structural_tag" => {
            let message = "use `structured_outputs: {\"regex\": …}` (`choice`, `grammar`) for what is no JSON";
            return Err(ApiError::parameter("response_format", format!("`response_format`: {message}")));
        }
        other => {
            let message = format!("`response_format`: type `{other}` is none of text, json_object, json_schema");
            return Err(ApiError::parameter("response_format", message));
        }
    };
    format.finish().map_err(within)?;
    Ok(grammar)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(value: Value) -> Result<Parameters> {
        let mut fields = Fields::read(value.to_string().as_bytes())?;
        let taken = Parameters::take(&mut fields, &SamplingParams::default())?;
        fields.finish()?;
        Ok(taken)
    }

    #[test]
    fn parameters_out_of_range_are_refused_by_name() {
        let long: Vec<String> = (0..10_000).map(|i| i.to_string()).collect();
        let cases = [
            ("temperature", json!(-1)),
            ("temperature", json!("hot")),
            ("top_p", json!(0)),
            ("top_k", json!(-2)),
            ("min_p", json!(1.5)),
            ("presence_penalty", json!(3)),
            ("repetition_penalty", json!(0)),
            ("n", json!(0)),
            ("n", json!(1_000_000)),
            ("n", json!(-1)),
            ("seed", json!(1.5)),
            ("stop", json!(long)),
            ("stop", json!([""])),
            ("stop", json!(7)),
            ("stop_token_ids", json!([-1])),
            ("logit_bias", json!({"1": 1000})),
            ("logit_bias", json!({"x": 1})),
            ("logit_bias", json!({"7": 1, "07": 2})),
            ("prompt_logprobs", json!(-1)),
            ("prompt_logprobs", json!(1_000_000)),
            ("response_format", json!({"type": "xml"})),
            ("response_format", json!({"type": "json_schema"})),
            ("stream_options", json!({"include_usage": true})),
            ("best_of", json!(5)),
            ("min_tokens", json!(-1)),
        ];
        for (name, value) in cases {
            let error = take(json!({ name: value })).unwrap_err().body();
            assert_eq!(error["error"]["param"], name, "{error}");
        }
    }

    #[test]
    fn a_grammar_is_given_in_one_way_only() {
        let schema = json!({"type": "object"});
        let openai =
            json!({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}});
        assert!(matches!(take(openai).unwrap().grammar, Some(Grammar::JsonSchema(s)) if s == schema));
        let vllm = json!({"structured_outputs": {"choice": ["a", "b"]}});
        assert!(matches!(take(vllm).unwrap().grammar, Some(Grammar::Choice(c)) if c == ["a", "b"]));
        let older = json!({"guided_json": schema.to_string()});
        assert!(matches!(take(older).unwrap().grammar, Some(Grammar::JsonSchema(s)) if s == schema));
        let both = json!({"guided_regex": "a+", "response_format": {"type": "json_object"}});
        assert!(take(both).unwrap_err().to_string().contains("only one of these"));
        assert!(take(json!({"response_format": {"type": "text"}})).unwrap().grammar.is_none());
    }

    #[test]
    fn answers_of_one_seed_differ_and_repeat() {
        let taken = take(json!({"seed": -1, "n": 3, "top_k": -1, "temperature": 0.5})).unwrap();
        let seeds: Vec<_> = (0..3).map(|i| taken.sampling_of(i).seed.unwrap()).collect();
        assert_eq!(seeds, [u64::MAX, 0, 1]);
        assert_eq!((taken.sampling.top_k, taken.sampling.temperature), (0, 0.5));
    }
}
