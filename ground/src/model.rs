//! The seam to a language model, in this process or behind a URL: what is asked of it and what it answers.

use std::ops::ControlFlow;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// One thing to ask of a model. Texts, not tokens: who tokenizes is the model's affair (a server does it itself).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Log-probability of `continuation` after `context` (lm-evaluation-harness: `loglikelihood`).
    LogLikelihood { context: String, continuation: String },
    /// Log-probability of a text of any length (`loglikelihood_rolling`).
    Rolling { text: String },
    /// Text that follows `context` (`generate_until`).
    Generate { context: String, options: GenerationOptions },
}

/// How to generate; lm-evaluation-harness's `generation_kwargs`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GenerationOptions {
    /// Strings that end the answer and are not part of it. The model's own end-of-text token always ends it.
    pub until: Vec<String>,
    /// Tokens at most.
    pub max_tokens: usize,
    /// 0: greedy.
    pub temperature: f64,
    pub top_p: f64,
    /// 0: all.
    pub top_k: usize,
    pub min_p: f64,
    /// Divides the positive logits, and multiplies the negative ones, of tokens of the prompt and the answer; 1: off.
    #[serde(default = "off_at_one", skip_serializing_if = "is_one")]
    pub repetition_penalty: f64,
    /// Subtracted from the logits of tokens of the answer; 0: off.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub presence_penalty: f64,
    /// Subtracted once for each time that a token occurs in the answer; 0: off.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub frequency_penalty: f64,
    /// Of the sampling, where there is any.
    pub seed: u64,
    /// `top_k` and `min_p` where they were set to what means off: a server with a default of its own has to be told.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub off: Vec<String>,
    /// What ends the model's thinking: the answer is what follows, and strings end it only there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub think_end: Option<String>,
}

impl GenerationOptions {
    /// The answer in a text: what follows the thinking, up to the first of `until`. A text without an end of thinking is
    /// an answer as it is. Source: lm-eval 0.4.13, models/utils.py, `postprocess_generated_text`; unlike it, which ends
    /// the generation at `until` wherever it stands, what stands in the thinking does not end it.
    #[must_use]
    pub fn answer(&self, text: String) -> String {
        let Some(end) = self.think_end.as_deref().filter(|e| !e.is_empty()) else { return text };
        let answer = text.rsplit_once(end).map_or(text.as_str(), |(_, after)| after);
        // What Python strips.
        let answer = answer.trim_start_matches(|c: char| c.is_whitespace() || ('\x1c'..='\x1f').contains(&c));
        let cut = self.until.iter().filter(|u| !u.is_empty()).filter_map(|u| answer.find(u.as_str())).min();
        answer[..cut.unwrap_or(answer.len())].to_owned()
    }
}

fn off_at_one() -> f64 {
    1.0
}

#[allow(clippy::trivially_copy_pass_by_ref)]
fn is_one(value: &f64) -> bool {
    *value == 1.0
}

#[allow(clippy::trivially_copy_pass_by_ref)]
fn is_zero(value: &f64) -> bool {
    *value == 0.0
}

/// What a model's maker set for the generation of answers (generation_config.json).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationDefaults {
    /// `top_p`, `top_k`, `min_p` and `repetition_penalty`, which count where neither task nor command says otherwise;
    /// `stop_strings`, which end answers beside the task's.
    pub settings: Map<String, Value>,
    /// What would change answers and is not used, each with its value and the reason.
    pub unused: Vec<String>,
    /// `top_k` of sampled answers where neither its maker, nor the task, nor the command says one.
    pub top_k: Option<usize>,
}

impl Default for GenerationOptions {
    /// Greedy, 256 tokens at most, as in lm-evaluation-harness.
    fn default() -> Self {
        Self {
            until: Vec::new(),
            max_tokens: 256,
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seed: 0,
            off: Vec::new(),
            think_end: None,
        }
    }
}

/// What a model answered to the [`Request`] of the same name.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Response {
    /// Natural log; `is_greedy`: every token of the continuation is the most probable one.
    LogLikelihood {
        #[serde(with = "log_likelihood")]
        log_likelihood: f64,
        is_greedy: bool,
    },
    /// Natural log over all tokens, and how many those are (where the model says).
    Rolling {
        #[serde(with = "log_likelihood")]
        log_likelihood: f64,
        tokens: Option<usize>,
    },
    /// `tokens` generated; `capped`: the limit on tokens (or the context's end) ended it, not the model.
    Generated { text: String, tokens: Option<usize>, capped: bool },
}

impl Response {
    /// Its log-likelihood, where it is one that no probability has: NaN or +inf. -inf is that of a text which the model holds for impossible.
    #[must_use]
    pub fn impossible(&self) -> Option<f64> {
        match self {
            Self::LogLikelihood { log_likelihood, .. } | Self::Rolling { log_likelihood, .. } => {
                Some(*log_likelihood).filter(|l| l.is_nan() || *l == f64::INFINITY)
            }
            Self::Generated { .. } => None,
        }
    }
}

/// A log-likelihood in JSON, which has no -inf: that is the text "-Infinity".
mod log_likelihood {
    use serde::de::{Deserialize, Deserializer, Error, Unexpected};
    use serde::ser::{Error as _, Serializer};

    const IMPOSSIBLE: &str = "-Infinity";

    #[allow(clippy::trivially_copy_pass_by_ref)]
    pub fn serialize<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
        match *value {
            f64::NEG_INFINITY => serializer.serialize_str(IMPOSSIBLE),
            v if v.is_finite() => serializer.serialize_f64(v),
            v => Err(S::Error::custom(format!("{v} is no log-likelihood"))),
        }
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
        #[derive(serde::Deserialize)]
        #[serde(untagged)]
        enum Stored {
            Number(f64),
            Text(String),
            Nothing(()),
        }
        match Stored::deserialize(deserializer)? {
            Stored::Number(v) => Ok(v),
            Stored::Text(t) if t == IMPOSSIBLE => Ok(f64::NEG_INFINITY),
            Stored::Text(t) => Err(D::Error::invalid_value(Unexpected::Str(&t), &"a log-likelihood")),
            Stored::Nothing(()) => Err(D::Error::custom(
                "the log-likelihood is null, as an earlier version wrote what is no number: the model of that run computed \
                 none, and its answers are worth nothing",
            )),
        }
    }
}

/// A turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    pub content: String,
}

/// How what is asked of a model is written: its text side, for which nothing is computed.
pub trait Prompts {
    /// What can go wrong in the model.
    type Error: std::error::Error + Send + Sync + 'static;

    /// The prompt that the model's chat template makes of `messages`. With `continue_last` the last message is an
    /// assistant's turn left open, to be continued; otherwise the template opens a new assistant's turn.
    ///
    /// # Errors
    /// When the model has no chat template, or the template refuses.
    fn chat_prompt(&self, messages: &[Message], continue_last: bool) -> Result<String, Self::Error>;

    /// How the model's maker wants answers generated, where who asks has to see to that; a server has its own.
    fn generation_defaults(&self) -> GenerationDefaults {
        GenerationDefaults::default()
    }
}

/// Something that can be asked.
pub trait LanguageModel: Prompts {
    /// Answers `requests` in whatever order suits it, calling `done(index, response)` as each is ready. When `done`
    /// breaks, it stops early and returns `Ok`.
    ///
    /// An answer depends on its own request only, never on what else is asked for.
    ///
    /// # Errors
    /// When the model fails, or a request cannot be answered (a context longer than the model takes, a server that does
    /// not give log-probabilities); the text says which.
    fn answer(
        &mut self,
        requests: &[Request],
        done: &mut dyn FnMut(usize, Response) -> ControlFlow<()>,
    ) -> Result<(), Self::Error>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thinking_is_no_part_of_the_answer() {
        let options = |until: &[&str], think_end: Option<&str>| GenerationOptions {
            until: until.iter().map(|u| (*u).to_owned()).collect(),
            think_end: think_end.map(str::to_owned),
            ..GenerationOptions::default()
        };
        // Right-hand sides: lm-eval 0.4.13's `postprocess_generated_text`.
        let text = "<think>\n\nQ: 5?\n\n</think>\n\n 42 apples\n\nQ: next";
        assert_eq!(options(&["\n\n", "Q:"], Some("</think>")).answer(text.into()), "42 apples");
        assert_eq!(options(&[], Some("</think>")).answer("a</think>b</think>\tc".into()), "c");
        assert_eq!(options(&["Q:"], Some("</think>")).answer("never closed Q: x".into()), "never closed ");
        assert_eq!(options(&["Q:"], None).answer("x Q: y".into()), "x Q: y");
    }
}
