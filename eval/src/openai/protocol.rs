//! The answers of /v1/models, /v1/completions and /v1/chat/completions, as far as they are read here.

use serde::Deserialize;
use serde_json::{Map, Value};

use super::error::Fault;

#[derive(Debug, Deserialize)]
pub(super) struct Models {
    pub data: Vec<Model>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Model {
    pub id: String,
}

#[derive(Debug, Deserialize)]
struct Completion {
    choices: Vec<Choice>,
    usage: Option<Usage>,
}

/// The first and only choice of an answer, text or chat.
#[derive(Debug, Deserialize)]
struct Choice {
    text: Option<String>,
    message: Option<ChatMessage>,
    finish_reason: Option<String>,
    logprobs: Option<LogProbs>,
}

#[derive(Debug, Deserialize)]
struct ChatMessage {
    content: Option<String>,
}

#[derive(Clone, Copy, Debug, Deserialize)]
pub(super) struct Usage {
    pub prompt_tokens: usize,
    #[serde(default)]
    pub completion_tokens: usize,
}

/// Both shapes that servers give: the completions API's lists, and the chat API's objects, which llama.cpp uses for
/// completions too.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum LogProbs {
    Lists {
        tokens: Vec<String>,
        token_logprobs: Vec<Option<f64>>,
        top_logprobs: Option<Vec<Option<Map<String, Value>>>>,
    },
    Objects {
        content: Option<Vec<TokenObject>>,
    },
}

#[derive(Debug, Deserialize)]
struct TokenObject {
    token: String,
    logprob: Option<f64>,
    #[serde(default)]
    top_logprobs: Vec<TopObject>,
}

#[derive(Debug, Deserialize)]
struct TopObject {
    logprob: f64,
}

/// An answer, read.
#[derive(Debug)]
pub(super) struct Answer {
    pub text: String,
    /// Whether the limit on tokens ended it.
    pub capped: bool,
    /// Empty where the server gave none.
    pub tokens: Vec<Token>,
    pub usage: Option<Usage>,
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
        let completion: Completion =
            serde_json::from_value(value).map_err(|e| Fault::Unexpected(format!("/v1/completions: {e}")))?;
        let choice = completion.choices.into_iter().next();
        let choice = choice.ok_or_else(|| Fault::Unexpected("`choices` is empty".to_owned()))?;
        let text = match (choice.text, choice.message) {
            (Some(text), _) => text,
            // A model that only thought before the limit ended it has said nothing.
            (None, Some(message)) => message.content.unwrap_or_default(),
            (None, None) => return Err(Fault::Unexpected("a choice has neither `text` nor `message`".to_owned())),
        };
        let tokens = choice.logprobs.map(tokens).transpose()?.unwrap_or_default();
        let capped = choice.finish_reason.as_deref() == Some("length");
        Ok(Self { text, capped, tokens, usage: completion.usage })
    }
}

fn tokens(logprobs: LogProbs) -> Result<Vec<Token>, Fault> {
    match logprobs {
        LogProbs::Lists { tokens, token_logprobs, top_logprobs } => {
            let top = top_logprobs.unwrap_or_default();
            if token_logprobs.len() != tokens.len() || !top.is_empty() && top.len() != tokens.len() {
                return Err(Fault::NoPromptLogProbs {
                    found: format!("{} of them for {} tokens", token_logprobs.len().min(top.len()), tokens.len()),
                });
            }
            let best = top.iter().map(|t| t.as_ref().and_then(|t| maximum(t.values().filter_map(Value::as_f64))));
            let best = best.chain(std::iter::repeat(None));
            let all = tokens.into_iter().zip(token_logprobs).zip(best);
            Ok(all.map(|((text, logprob), best)| Token { text, logprob, best }).collect())
        }
        LogProbs::Objects { content } => Ok(content
            .unwrap_or_default()
            .into_iter()
            .map(|t| Token {
                text: t.token,
                logprob: t.logprob,
                best: maximum(t.top_logprobs.iter().map(|top| top.logprob)),
            })
            .collect()),
    }
}

fn maximum(values: impl Iterator<Item = f64>) -> Option<f64> {
    values.reduce(f64::max)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn both_shapes_of_log_probabilities_read_alike() {
        let lists = json!({"tokens": ["a", "b"], "token_logprobs": [null, -1.5], "text_offset": [0, 1],
            "top_logprobs": [null, {"c": -0.5, "b": -1.5}]});
        let objects = json!({"content": [{"token": "a", "logprob": null},
            {"token": "b", "logprob": -1.5, "top_logprobs": [{"token": "c", "logprob": -0.5}]}]});
        let read = |l: Value| Answer::read(json!({"choices": [{"text": "ab", "logprobs": l}]})).unwrap().tokens;
        assert_eq!(read(lists), read(objects.clone()));
        assert_eq!(read(objects)[1], Token { text: "b".into(), logprob: Some(-1.5), best: Some(-0.5) });
    }

    #[test]
    fn answers_that_are_not_of_the_api_are_refused() {
        for value in [json!({}), json!({"choices": []}), json!({"choices": [{}]}), json!([1])] {
            assert!(matches!(Answer::read(value.clone()), Err(Fault::Unexpected(_))), "{value}");
        }
    }

    #[test]
    fn lists_of_different_lengths_are_refused() {
        let logprobs = json!({"tokens": ["a", "b"], "token_logprobs": [-1.0]});
        let fault = Answer::read(json!({"choices": [{"text": "ab", "logprobs": logprobs}]})).unwrap_err();
        assert!(matches!(fault, Fault::NoPromptLogProbs { .. }));
    }
}
