//! The endpoints of OpenAI's API, with vLLM's additions: what bodies mean, and how answers are written.

mod answers;
pub mod chat;
pub mod completions;
mod fields;
mod logprobs;
mod messages;
mod parameters;
pub mod responses;
pub mod tokens;

use std::convert::Infallible;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::Json;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse as _, Response};
use serde_json::{Map, Value, json};
use tokio::sync::mpsc::{Sender, channel};
use tokio_stream::wrappers::ReceiverStream;

use super::error::ApiError;
use super::model::ServedModel;

/// Chunks that wait for a reader; a slower one makes whoever writes them wait.
const CHUNKS: usize = 16;

/// How long a reader may take nothing while chunks wait, before it is given up.
const STALL: Duration = Duration::from_secs(120);

/// How long an error waits for its reader.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// Silence after which a stream shows that it is alive.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// Seconds since 1970.
pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// A name that no other answer has, with a beginning that tells what it is of.
fn fresh(prefix: &str) -> String {
    use std::hash::{BuildHasher as _, RandomState};
    let [a, b] = [(); 2].map(|()| RandomState::new().hash_one(now()));
    format!("{prefix}{a:016x}{b:016x}")
}

/// Tokens used so far.
fn usage(prompt: usize, completion: usize) -> Value {
    json!({"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion})
}

/// Tokens used in all; of those of the prompt, `cached` were in the cache.
fn total_usage(prompt: usize, completion: usize, cached: usize) -> Value {
    let mut usage = usage(prompt, completion);
    usage["prompt_tokens_details"] = json!({"cached_tokens": cached});
    usage
}

/// What stands at the head of every answer and every chunk of one.
#[derive(Clone)]
struct Head {
    id: String,
    object: &'static str,
    created: u64,
    model: String,
}

impl Head {
    fn new(prefix: &str, object: &'static str, model: &ServedModel) -> Self {
        Self { id: fresh(prefix), object, created: now(), model: model.name().to_owned() }
    }

    fn with(&self, object: &str, rest: Value) -> Value {
        let mut all = Map::from_iter([
            ("id".to_owned(), self.id.clone().into()),
            ("object".to_owned(), object.into()),
            ("created".to_owned(), self.created.into()),
            ("model".to_owned(), self.model.clone().into()),
        ]);
        if let Value::Object(rest) = rest {
            all.extend(rest);
        }
        all.into()
    }

    /// A whole answer.
    fn whole(&self, rest: Value) -> Response {
        Json(self.with(self.object, rest)).into_response()
    }

    /// A chunk of one.
    fn chunk(&self, rest: Value) -> Value {
        self.with(self.object, rest)
    }
}

/// Where the events of a stream go.
struct Out(Sender<Result<Event, Infallible>>);

impl Out {
    /// Sends one; waits where the reader is slow.
    async fn send(&self, data: &Value) -> Result<(), ApiError> {
        self.event(Event::default().data(data.to_string())).await
    }

    /// Sends one with a name.
    async fn named(&self, name: &str, data: &Value) -> Result<(), ApiError> {
        self.event(Event::default().event(name).data(data.to_string())).await
    }

    /// Ends the stream as OpenAI's API does.
    async fn done(&self) -> Result<(), ApiError> {
        self.event(Event::default().data("[DONE]")).await
    }

    async fn event(&self, event: Event) -> Result<(), ApiError> {
        match tokio::time::timeout(STALL, self.0.send(Ok(event))).await {
            Ok(Ok(())) => Ok(()),
            // Nobody reads that.
            Ok(Err(_)) | Err(_) => Err(ApiError::failed("the client has gone")),
        }
    }
}

/// A stream of events that `write` writes; an error becomes the last. It ends when the client goes.
fn events<F, W>(write: W) -> Response
where
    W: FnOnce(Out) -> F,
    F: Future<Output = Result<(), ApiError>> + Send + 'static,
{
    let (sender, receiver) = channel(CHUNKS);
    let writing = write(Out(sender.clone()));
    tokio::spawn(async move {
        let written = tokio::select! {
            written = writing => written,
            () = sender.closed() => return,
        };
        if let Err(error) = written {
            // If that finds no room for long, nobody is there.
            for data in [error.body().to_string(), "[DONE]".to_owned()] {
                let _ = tokio::time::timeout(LAST_WORDS, sender.send(Ok(Event::default().data(data)))).await;
            }
        }
    });
    Sse::new(ReceiverStream::new(receiver)).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)).into_response()
}
