//! Text from a prompt: prefill, then sample, decode and look for the end, token by token.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use super::{History, Sampled, Sampler, SamplingError, SamplingParams, Scratch, Session};
use crate::backend::{Backend, BackendError};
use crate::text::{StopMatcher, TextError, Tokenizer};

/// Why generation failed.
#[derive(Debug, thiserror::Error)]
pub enum GenerateError {
    #[error(transparent)]
    Backend(#[from] BackendError),
    #[error(transparent)]
    Text(#[from] TextError),
    #[error(transparent)]
    Sampling(#[from] SamplingError),
    #[error(
        "the prompt has {prompt} tokens, the context only {capacity}; shorten it, or raise --context if the model allows"
    )]
    PromptTooLong { prompt: usize, capacity: usize },
}

/// What to generate.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    pub prompt: &'a [u32],
    /// Tokens to generate at most.
    pub max_tokens: usize,
    pub sampling: &'a SamplingParams,
    /// Tokens that end the answer and are not part of its text.
    pub stop_tokens: &'a [u32],
    /// Strings that end the answer and are not part of its text.
    pub stop: &'a [String],
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// A stop token or a stop string.
    Stop,
    /// The limit on tokens, or the end of the context.
    Length,
    /// The caller asked to.
    Cancelled,
}

/// An answer and what it took.
#[derive(Clone, Debug)]
pub struct Generated {
    pub tokens: Vec<Sampled>,
    pub text: String,
    pub finish: Finish,
    /// Seed that repeats this answer.
    pub seed: u64,
    /// Until the first token was chosen.
    pub prefill: Duration,
    /// From then to the last.
    pub decode: Duration,
}

/// Generates an answer; `show` gets each piece of text as soon as it is certain, and may end the answer.
///
/// # Errors
/// When the prompt does not fit, parameters are out of range, or the model computes something that is no number.
pub fn generate<B: Backend>(
    session: &mut Session<B>,
    tokenizer: &Tokenizer,
    request: Request<'_>,
    show: &mut dyn FnMut(&str) -> ControlFlow<()>,
) -> Result<Generated, GenerateError> {
    let sampler = Sampler::new(request.sampling.clone())?;
    let mut matcher = StopMatcher::new(request.stop)?;
    let mut decoder = tokenizer.stream_decoder(true);
    let room = session
        .capacity()
        .checked_sub(request.prompt.len())
        .ok_or(GenerateError::PromptTooLong { prompt: request.prompt.len(), capacity: session.capacity() })?;
    let start = Instant::now();
    let mut logits = session.prefill(request.prompt)?;
    let mut scratch = Scratch::default();
    let mut out = Generated {
        tokens: Vec::new(),
        text: String::new(),
        finish: Finish::Length,
        seed: sampler.seed(),
        prefill: Duration::ZERO,
        decode: Duration::ZERO,
    };
    let mut ids = Vec::new();
    let mut first = None;
    // The last token needs no room: nothing is computed after it.
    for n in 0..request.max_tokens.min(room + 1) {
        let history = History { prompt: request.prompt, generated: &ids };
        let sampled = sampler.sample(&logits, history, &mut scratch)?;
        let token = sampled.token;
        first.get_or_insert_with(Instant::now);
        out.tokens.push(sampled);
        ids.push(token);
        if request.stop_tokens.contains(&token) {
            out.finish = Finish::Stop;
            break;
        }
        let step = matcher.push(&decoder.push(token)?.unwrap_or_default());
        if emit(&mut out, &step.text, show).is_break() {
            out.finish = Finish::Cancelled;
            break;
        }
        if step.stop.is_some() {
            out.finish = Finish::Stop;
            break;
        }
        if n + 1 < request.max_tokens.min(room + 1) {
            logits = session.step(token)?;
        }
    }
    // What was held back for lack of certainty is text after all. A matcher that stopped returns nothing.
    let rest = matcher.push(&decoder.finish()?.unwrap_or_default()).text + &matcher.finish();
    if out.finish != Finish::Cancelled {
        let _ = emit(&mut out, &rest, show);
    }
    let first = first.unwrap_or_else(Instant::now);
    out.prefill = first - start;
    out.decode = first.elapsed();
    Ok(out)
}

fn emit(out: &mut Generated, text: &str, show: &mut dyn FnMut(&str) -> ControlFlow<()>) -> ControlFlow<()> {
    if text.is_empty() {
        return ControlFlow::Continue(());
    }
    out.text.push_str(text);
    show(text)
}
