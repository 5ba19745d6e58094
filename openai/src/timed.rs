//! One answer as it came: when its first token did, and each further one.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use super::error::{Asked, Error, Fault};
use super::{CHAT_COMPLETIONS, COMPLETIONS, OpenAi, locked, object};

/// Fields that not every server knows: an answer that goes on to its length whatever the model says.
const OPTIONAL: [&str; 1] = ["ignore_eos"];

/// When an answer came, from when it was asked for.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Timed {
    /// When each piece of its text came, in order. A piece is a token with most servers, some put several into one.
    pub pieces: Vec<Duration>,
    /// When the answer ended.
    pub end: Duration,
    /// Tokens by the server's own account, where it gives one.
    pub prompt_tokens: Option<u64>,
    pub completion_tokens: Option<u64>,
}

impl OpenAi {
    /// Asks for `tokens` tokens after `prompt` as a stream, by chat where the options say so; once, without further tries.
    ///
    /// # Errors
    /// When the server refuses, breaks off or sends no stream.
    pub fn timed(&self, prompt: &str, tokens: usize) -> Result<Timed, Error> {
        let path = if self.options.chat { CHAT_COMPLETIONS } else { COMPLETIONS };
        self.timed_inner(path, prompt, tokens).map_err(|fault| Error {
            asked: Asked::Timed,
            url: self.http.shown(path),
            via: self.http.via(),
            fault,
        })
    }

    fn timed_inner(&self, path: &str, prompt: &str, tokens: usize) -> Result<Timed, Fault> {
        let mut body = object(json!({"model": self.model, "max_tokens": tokens, "temperature": 0, "stream": true,
            "stream_options": {"include_usage": true}}));
        match self.options.chat {
            true => body.insert("messages".to_owned(), json!([{"role": "user", "content": prompt}])),
            false => body.insert("prompt".to_owned(), json!(prompt)),
        };
        let body = self.options.fields.apply(body);
        loop {
            let mut sent: Map<String, Value> = locked(&self.learned).apply(body.clone());
            let optional = !self.plain.load(Ordering::Relaxed);
            if optional {
                sent.extend(OPTIONAL.map(|name| (name.to_owned(), json!(true))));
            }
            let mut timed = Timed::default();
            let begin = Instant::now();
            let answered = self.http.stream(path, &Value::Object(sent.clone()), &mut |event| timed.take(event, begin));
            timed.end = begin.elapsed();
            match answered {
                Ok(()) => return Ok(timed),
                Err(Fault::Refused { status: 400 | 422, said, .. })
                    if optional && OPTIONAL.iter().any(|name| said.names(name)) =>
                {
                    self.plain.store(true, Ordering::Relaxed);
                }
                Err(Fault::Refused { status: 400 | 422, said, .. }) if locked(&self.learned).learn(&sent, &said) => {}
                Err(fault) => return Err(fault),
            }
        }
    }
}

impl Timed {
    /// An event of the stream.
    fn take(&mut self, event: &Value, begin: Instant) {
        let choice = &event["choices"][0];
        let delta = &choice["delta"];
        let texts = [&choice["text"], &delta["content"], &delta["reasoning_content"], &delta["reasoning"]];
        if texts.iter().any(|t| t.as_str().is_some_and(|t| !t.is_empty())) {
            self.pieces.push(begin.elapsed());
        }
        let count = |name: &str| event["usage"][name].as_u64();
        self.prompt_tokens = count("prompt_tokens").or(self.prompt_tokens);
        self.completion_tokens = count("completion_tokens").or(self.completion_tokens);
    }

    /// Tokens of the answer: the server's account, or pieces.
    #[must_use]
    pub fn tokens(&self) -> u64 {
        self.completion_tokens.unwrap_or(self.pieces.len() as u64)
    }

    /// Seconds to the first token; `None` where none came.
    #[must_use]
    pub fn first(&self) -> Option<f64> {
        self.pieces.first().map(Duration::as_secs_f64)
    }

    /// Seconds of each token after the first, on average.
    #[must_use]
    pub fn each(&self) -> Option<f64> {
        let (first, last) = (self.pieces.first()?, self.pieces.last()?);
        let more = self.tokens().checked_sub(1).filter(|n| *n > 0)?;
        (self.pieces.len() > 1).then(|| (*last - *first).as_secs_f64() / more as f64)
    }
}
