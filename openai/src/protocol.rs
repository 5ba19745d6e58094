//! The answers of /v1/models, /v1/completions and /v1/chat/completions, as far as they are read here. What nobody needs may
//! be missing, null or of another type.

use serde_json::Value;

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
        let id = model["id"].as_str();
        let id = id.ok_or_else(|| Fault::Unexpected(format!("/v1/models: a model without `id`: {model}")))?;
        if !ids.iter().any(|known| known == id) {
            ids.push(id.to_owned());
        }
    }
    Ok(ids)
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
    /// Tokens of the prompt and of the answer, where the server counts them.
    pub prompt_tokens: Option<usize>,
    pub generated_tokens: Option<usize>,
    /// Where log-probabilities were read; empty where the server gave none.
    pub tokens: Vec<Token>,
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
    pub fn read(value: &Value) -> Result<Self, Fault> {
        let unexpected = |what: &str| Fault::Unexpected(what.to_owned());
        let choices = value["choices"].as_array().ok_or_else(|| unexpected("it has no list `choices`"))?;
        let choice = choices.first().ok_or_else(|| unexpected("`choices` is empty"))?;
        let message = &choice["message"];
        let content = match choice.get("text") {
            Some(content) if !content.is_null() => content,
            None if !message.is_object() => return Err(unexpected("a choice has neither `text` nor `message`")),
            // Null too: a model that only thought before the limit ended it has said nothing.
            _ => &message["content"],
        };
        let text = match content {
            Value::Null => String::new(),
            content => text(content).ok_or_else(|| unexpected(&format!("no text: {content}")))?,
        };
        let has = |name: &str| self::text(&message[name]).is_some_and(|t| !t.is_empty());
        let reason = &choice["finish_reason"];
        let reason = reason.as_str().or(reason["type"].as_str()).unwrap_or_default();
        let count = |name: &str| {
            let n = value["usage"][name].as_f64().filter(|n| *n >= 0.0 && n.fract() == 0.0 && *n < 1e15)?;
            Some(n as usize)
        };
        Ok(Self {
            text,
            capped: matches!(reason, "length" | "max_tokens"),
            filtered: reason == "content_filter",
            declined: has("refusal"),
            reasoning: has("reasoning_content") || has("reasoning"),
            prompt_tokens: count("prompt_tokens"),
            generated_tokens: count("completion_tokens"),
            tokens: Vec::new(),
        })
    }

    /// With the tokens' log-probabilities.
    pub fn scored(value: &Value) -> Result<Self, Fault> {
        let answer = Self::read(value)?;
        Ok(Self { tokens: tokens(&value["choices"][0]["logprobs"])?, ..answer })
    }
}

/// The tokens in either shape that servers give: the completions API's lists, and the chat API's objects, which llama.cpp
/// uses for completions too.
fn tokens(logprobs: &Value) -> Result<Vec<Token>, Fault> {
    let wrong = |found: String| Fault::NoPromptLogProbs { found };
    let token = |text: &Value, logprob: &Value, top: &Value| {
        let text = text.as_str().ok_or_else(|| wrong("`logprobs` holds a token that is no text".into()))?;
        Ok(Token { text: text.to_owned(), logprob: logprob.as_f64(), best: best(top) })
    };
    if let Some(content) = logprobs["content"].as_array() {
        return content.iter().map(|t| token(&t["token"], &t["logprob"], &t["top_logprobs"])).collect();
    }
    let Some(texts) = logprobs["tokens"].as_array() else { return Ok(Vec::new()) };
    let scores = logprobs["token_logprobs"].as_array();
    let scores = scores.ok_or_else(|| wrong("`logprobs` holds no `token_logprobs`".into()))?;
    let top = logprobs["top_logprobs"].as_array().filter(|top| !top.is_empty());
    let lengths = [Some(scores.len()), top.map(Vec::len)];
    if let Some(other) = lengths.into_iter().flatten().find(|n| *n != texts.len()) {
        return Err(wrong(format!("{other} of them for {} tokens", texts.len())));
    }
    let all = texts.iter().zip(scores).enumerate();
    all.map(|(i, (text, score))| token(text, score, top.map_or(&Value::Null, |top| &top[i]))).collect()
}

/// Text, or parts of which those of text count.
fn text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Array(parts) => Some(parts.iter().filter_map(|p| p.as_str().or(p["text"].as_str())).collect()),
        _ => None,
    }
}

/// The highest of the log-probabilities of one place: `{"a": -1.0}`, or a list of objects.
fn best(top: &Value) -> Option<f64> {
    let all: Vec<&Value> = match top {
        Value::Object(map) => map.values().collect(),
        Value::Array(all) => all.iter().map(|t| &t["logprob"]).collect(),
        _ => Vec::new(),
    };
    all.into_iter().filter_map(Value::as_f64).reduce(f64::max)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(choice: Value) -> Answer {
        Answer::read(&json!({"choices": [choice]})).unwrap()
    }

    fn scored(logprobs: Value) -> Result<Vec<Token>, Fault> {
        Ok(Answer::scored(&json!({"choices": [{"text": "ab", "logprobs": logprobs}]}))?.tokens)
    }

    #[test]
    fn both_shapes_of_log_probabilities_read_alike() {
        let lists = json!({"tokens": ["a", "b"], "token_logprobs": [null, -1.5], "text_offset": [0, 1],
            "top_logprobs": [null, {"c": -0.5, "b": -1.5}]});
        let objects = json!({"content": [{"token": "a", "logprob": null},
            {"token": "b", "logprob": -1.5, "top_logprobs": [{"token": "c", "logprob": -0.5}]}]});
        let token = |text: &str, logprob, best| Token { text: text.into(), logprob, best };
        for logprobs in [lists, objects] {
            let expected = [token("a", None, None), token("b", Some(-1.5), Some(-0.5))];
            assert_eq!(scored(logprobs).unwrap(), expected);
        }
        for none in [json!(null), json!([]), json!({}), json!("x"), json!({"content": null})] {
            assert_eq!(scored(none).unwrap(), []);
        }
        let different = json!({"tokens": ["a", "b"], "token_logprobs": [-1.0]});
        let found = scored(different).unwrap_err();
        assert!(matches!(&found, Fault::NoPromptLogProbs { found } if found == "1 of them for 2 tokens"), "{found}");
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
            assert!(matches!(Answer::read(&value), Err(Fault::Unexpected(_))), "{value}");
        }
    }

    #[test]
    fn what_nobody_needs_may_be_missing_null_or_of_another_type() {
        for (usage, prompt, generated) in [
            (json!(null), None, None),
            (json!({}), None, None),
            (json!([]), None, None),
            (json!("none"), None, None),
            (json!({"total_tokens": 8}), None, None),
            (json!({"prompt_tokens": 5, "completion_tokens": null}), Some(5), None),
            (json!({"completion_tokens": -1}), None, None),
            (json!({"prompt_tokens": 5.0, "completion_tokens": 3.0}), Some(5), Some(3)),
        ] {
            let answer = Answer::read(&json!({"choices": [{"text": " 42"}], "usage": usage})).unwrap();
            assert_eq!(answer.text, " 42");
            assert_eq!((answer.prompt_tokens, answer.generated_tokens), (prompt, generated), "{usage}");
        }
        for reason in [json!(null), json!(7), json!({"type": "stop"}), json!("tool_calls")] {
            assert!(!read(json!({"text": "a", "finish_reason": reason, "index": null})).capped);
        }
        assert!(read(json!({"text": "a", "finish_reason": {"type": "length"}})).capped);
    }

    #[test]
    fn content_may_be_text_parts_or_nothing() {
        for (choice, text) in [
            (json!({"message": {"role": "assistant", "content": "a"}}), "a"),
            (json!({"message": {"content": null}}), ""),
            (json!({"message": {"content": [{"type": "text", "text": "a"}, {"type": "image"}, "b"]}}), "ab"),
            (json!({"text": [{"type": "text", "text": " 42"}]}), " 42"),
            (json!({"text": null, "message": {"content": "m"}}), "m"),
            (json!({"text": null}), ""),
        ] {
            assert_eq!(read(choice.clone()).text, text, "{choice}");
        }
    }

    #[test]
    fn why_an_answer_is_empty_is_known() {
        let thought = read(json!({"finish_reason": "length", "message": {"content": null, "reasoning_content": "so"}}));
        assert!(thought.reasoning && thought.capped && thought.text.is_empty());
        let newer = read(json!({"message": {"content": "", "reasoning": "so", "refusal": null}}));
        assert!(newer.reasoning && !newer.declined);
        assert!(read(json!({"message": {"content": null, "refusal": "I cannot"}})).declined);
        assert!(read(json!({"text": "", "finish_reason": "content_filter"})).filtered);
    }

    #[test]
    fn a_model_that_is_listed_twice_is_one() {
        assert_eq!(models(&json!({"data": [{"id": "a"}, {"id": "a", "x": 1}]})).unwrap(), ["a"]);
        assert_eq!(models(&json!({"data": null})).unwrap(), [""; 0]);
        assert!(models(&json!({"models": []})).is_err() && models(&json!({"data": [{}]})).is_err());
    }
}
