//! The answers of /v1/models, /v1/completions and /v1/chat/completions, as far as they are read here. What nobody needs may
//! be missing, null or of another type.

use serde_json::{Map, Value};

use super::error::Fault;

/// Names of the models in an answer of /v1/models, each once.
pub(super) fn models(value: &Value) -> Result<Vec<String>, Fault> {
    let data = match value.get("data") {
        Some(Value::Array(data)) => data.as_slice(),
        Some(Value::Null) => &[],
        _ => return Err(Fault::Unexpected("/v1/models: `data` is no list".to_owned())),
    };
    let mut ids: Vec<String> = Vec::new();
    for model in data {
        let id = model.get("id").and_then(Value::as_str);
        let id = id.ok_or_else(|| Fault::Unexpected(format!("/v1/models: a model without `id`: {model}")))?;
        if !ids.iter().any(|known| known == id) {
            ids.push(id.to_owned());
        }
    }
    Ok(ids)
}

/// Tokens as the server counts them, as far as it does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Usage {
    pub prompt: Option<usize>,
    pub generated: Option<usize>,
}

impl Usage {
    fn read(value: &Value) -> Self {
        let count = |name: &str| {
            let n = value.get(name)?.as_f64().filter(|n| *n >= 0.0 && n.fract() == 0.0 && *n < 1e15)?;
            Some(n as usize)
        };
        Self { prompt: count("prompt_tokens"), generated: count("completion_tokens") }
    }
}

/// The first and only choice of an answer, text or chat.
#[derive(Clone, Debug, Default)]
pub(super) struct Answer {
    pub text: String,
    /// Whether the limit on tokens ended it.
    pub capped: bool,
    /// Whether the server's content filter ended it.
    pub filtered: bool,
    /// Whether the model declined, in a field of its own.
    pub declined: bool,
    /// Whether it holds reasoning, in a field of its own.
    pub reasoning: bool,
    pub usage: Usage,
    /// As they came: only scoring needs them.
    logprobs: Value,
}

/// An answer with what scoring needs of it.
#[derive(Clone, Debug)]
pub(super) struct Echo {
    pub text: String,
    /// Empty where the server gave none.
    pub tokens: Vec<Token>,
    pub usage: Usage,
}

/// A token as a server describes it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Token {
    pub text: String,
    /// `None`: nothing stood before it, or the server does not know.
    pub logprob: Option<f64>,
    /// Of the most probable token in its place.
    pub best: Option<f64>,
}

impl Answer {
    pub fn read(value: Value) -> Result<Self, Fault> {
        let Some(choices) = value.get("choices").and_then(Value::as_array) else {
            return Err(Fault::Unexpected("it has no list `choices`".to_owned()));
        };
        let choice = choices.first().ok_or_else(|| Fault::Unexpected("`choices` is empty".to_owned()))?;
        let message = choice.get("message").filter(|m| m.is_object());
        let written = |holder: Option<&Value>, name: &str| {
            holder.and_then(|m| m.get(name)).and_then(text).filter(|t| !t.is_empty()).is_some()
        };
        let content = match (choice.get("text"), message) {
            (Some(content), _) if !content.is_null() => content,
            // A model that only thought before the limit ended it has said nothing.
            (_, Some(message)) => message.get("content").unwrap_or(&Value::Null),
            (Some(_), None) => &Value::Null,
            (None, None) => return Err(Fault::Unexpected("a choice has neither `text` nor `message`".to_owned())),
        };
        let text = match content {
            Value::Null => String::new(),
            content => text(content).ok_or_else(|| Fault::Unexpected(format!("no text: {content}")))?,
        };
        let reason = choice.get("finish_reason").unwrap_or(&Value::Null);
        let reason = reason.as_str().or_else(|| reason.get("type").and_then(Value::as_str)).unwrap_or_default();
        Ok(Self {
            text,
            capped: matches!(reason, "length" | "max_tokens"),
            filtered: reason == "content_filter",
            declined: written(message, "refusal"),
            reasoning: written(message, "reasoning_content") || written(message, "reasoning"),
            usage: value.get("usage").map(Usage::read).unwrap_or_default(),
            logprobs: choice.get("logprobs").cloned().unwrap_or_default(),
        })
    }

    pub fn with_tokens(self) -> Result<Echo, Fault> {
        Ok(Echo { tokens: self.tokens()?, text: self.text, usage: self.usage })
    }

    /// The tokens with their log-probabilities, in either shape that servers give: the completions API's lists, and the
    /// chat API's objects, which llama.cpp uses for completions too. Empty where the server gave none.
    fn tokens(&self) -> Result<Vec<Token>, Fault> {
        let wrong = |what: &str| Fault::NoPromptLogProbs { found: format!("`logprobs` holds {what}") };
        let list = |name: &str| self.logprobs.get(name).and_then(Value::as_array);
        if let Some(content) = list("content") {
            let token = |t: &Value| {
                let text = t.get("token").and_then(Value::as_str).ok_or_else(|| wrong("a token without text"))?;
                let best = t.get("top_logprobs").and_then(best);
                Ok(Token { text: text.to_owned(), logprob: t.get("logprob").and_then(Value::as_f64), best })
            };
            return content.iter().map(token).collect();
        }
        let Some(tokens) = list("tokens") else { return Ok(Vec::new()) };
        let logprobs = list("token_logprobs").ok_or_else(|| wrong("no `token_logprobs`"))?;
        let top = list("top_logprobs").map_or(&[][..], Vec::as_slice);
        if logprobs.len() != tokens.len() || !top.is_empty() && top.len() != tokens.len() {
            let fewest = if top.is_empty() { logprobs.len() } else { logprobs.len().min(top.len()) };
            return Err(Fault::NoPromptLogProbs { found: format!("{fewest} of them for {} tokens", tokens.len()) });
        }
        let all = tokens.iter().zip(logprobs).enumerate().map(|(i, (text, logprob))| {
            let text = text.as_str().ok_or_else(|| wrong("a token that is no text"))?;
            Ok(Token { text: text.to_owned(), logprob: logprob.as_f64(), best: top.get(i).and_then(best) })
        });
        all.collect()
    }
}

/// Text, or parts of which those of text count.
fn text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Array(parts) => Some(
            parts
                .iter()
                .filter_map(|part| part.as_str().or_else(|| part.get("text").and_then(Value::as_str)))
                .collect(),
        ),
        _ => None,
    }
}

/// The highest of the log-probabilities of one place: `{"a": -1.0}`, or a list of objects.
fn best(top: &Value) -> Option<f64> {
    let of_map = |map: &Map<String, Value>| maximum(map.values().filter_map(Value::as_f64));
    match top {
        Value::Object(map) => of_map(map),
        Value::Array(all) => maximum(all.iter().filter_map(|t| t.get("logprob").and_then(Value::as_f64))),
        _ => None,
    }
}

fn maximum(values: impl Iterator<Item = f64>) -> Option<f64> {
    values.reduce(f64::max)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(value: Value) -> Answer {
        Answer::read(value).unwrap()
    }

    #[test]
    fn both_shapes_of_log_probabilities_read_alike() {
        let lists = json!({"tokens": ["a", "b"], "token_logprobs": [null, -1.5], "text_offset": [0, 1],
            "top_logprobs": [null, {"c": -0.5, "b": -1.5}]});
        let objects = json!({"content": [{"token": "a", "logprob": null},
            {"token": "b", "logprob": -1.5, "top_logprobs": [{"token": "c", "logprob": -0.5}]}]});
        let tokens = |l: Value| read(json!({"choices": [{"text": "ab", "logprobs": l}]})).tokens().unwrap();
        assert_eq!(tokens(lists), tokens(objects.clone()));
        assert_eq!(tokens(objects)[1], Token { text: "b".into(), logprob: Some(-1.5), best: Some(-0.5) });
    }

    #[test]
    fn answers_that_are_not_of_the_api_are_refused() {
        for value in [
            json!({}),
            json!({"choices": []}),
            json!({"choices": [{}]}),
            json!([1]),
            json!({"choices": [{"text": 4}]}),
            json!({"choices": null}),
        ] {
            assert!(matches!(Answer::read(value.clone()), Err(Fault::Unexpected(_))), "{value}");
        }
    }

    #[test]
    fn what_nobody_needs_may_be_missing_null_or_of_another_type() {
        for usage in [
            json!(null),
            json!({}),
            json!([]),
            json!("none"),
            json!({"total_tokens": 8}),
            json!({"prompt_tokens": 5, "completion_tokens": null}),
            json!({"completion_tokens": -1}),
        ] {
            let answer = read(json!({"choices": [{"text": " 42"}], "usage": usage}));
            assert_eq!((answer.text.as_str(), answer.usage.generated), (" 42", None), "{usage}");
        }
        let floats =
            read(json!({"choices": [{"text": "a"}], "usage": {"prompt_tokens": 5.0, "completion_tokens": 3.0}}));
        assert_eq!(floats.usage, Usage { prompt: Some(5), generated: Some(3) });
        for logprobs in [json!(null), json!([]), json!({}), json!("x"), json!({"content": null})] {
            let answer = read(json!({"choices": [{"text": "a", "logprobs": logprobs, "index": null}]}));
            assert_eq!(answer.tokens().unwrap(), []);
        }
        for reason in [json!(null), json!(7), json!({"type": "stop"}), json!("tool_calls")] {
            assert!(!read(json!({"choices": [{"text": "a", "finish_reason": reason}]})).capped);
        }
        assert!(read(json!({"choices": [{"text": "a", "finish_reason": {"type": "length"}}]})).capped);
    }

    #[test]
    fn content_may_be_text_parts_or_nothing() {
        let content = |c: Value| read(json!({"choices": [{"message": {"role": "assistant", "content": c}}]})).text;
        assert_eq!(content(json!("a")), "a");
        assert_eq!(content(json!(null)), "");
        assert_eq!(content(json!([{"type": "text", "text": "a"}, {"type": "image"}, "b"])), "ab");
        assert_eq!(read(json!({"choices": [{"text": [{"type": "text", "text": " 42"}]}]})).text, " 42");
        assert_eq!(read(json!({"choices": [{"text": null, "message": {"content": "m"}}]})).text, "m");
        assert_eq!(read(json!({"choices": [{"text": null}]})).text, "");
    }

    #[test]
    fn why_an_answer_is_empty_is_known() {
        let thought = read(json!({"choices": [{"finish_reason": "length",
            "message": {"content": null, "reasoning_content": "so"}}]}));
        assert!(thought.reasoning && thought.capped && thought.text.is_empty());
        let newer = json!({"choices": [{"message": {"content": "", "reasoning": "so", "refusal": null}}]});
        assert!(read(newer.clone()).reasoning && !read(newer).declined);
        assert!(read(json!({"choices": [{"message": {"content": null, "refusal": "I cannot"}}]})).declined);
        assert!(read(json!({"choices": [{"text": "", "finish_reason": "content_filter"}]})).filtered);
    }

    #[test]
    fn lists_of_different_lengths_are_refused() {
        let logprobs = json!({"tokens": ["a", "b"], "token_logprobs": [-1.0]});
        let answer = read(json!({"choices": [{"text": "ab", "logprobs": logprobs}]}));
        assert!(matches!(answer.tokens(), Err(Fault::NoPromptLogProbs { .. })));
    }

    #[test]
    fn a_model_that_is_listed_twice_is_one() {
        assert_eq!(models(&json!({"data": [{"id": "a"}, {"id": "a", "x": 1}]})).unwrap(), ["a"]);
        assert_eq!(models(&json!({"data": null})).unwrap(), [""; 0]);
        assert!(models(&json!({"models": []})).is_err() && models(&json!({"data": [{}]})).is_err());
    }
}
