//! Text from a prompt: prefill, then sample, decode and look for the end, token by token.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use super::{History, Sampled, Sampler, SamplingError, SamplingParams, Scratch, Session};
use crate::backend::{Backend, BackendError};
use crate::text::{StopDecoder, TextError, Tokenizer};

/// Why generation failed.
#[derive(Debug, thiserror::Error)]
pub enum GenerateError {
    #[error(transparent)]
    Backend(#[from] BackendError),
    #[error(transparent)]
    Text(#[from] TextError),
    #[error(transparent)]
    Sampling(#[from] SamplingError),
    #[error("the prompt is empty; a model continues at least one token")]
    EmptyPrompt,
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
    /// Strings that end the answer and are not part of its text; special tokens count by their names.
    pub stop: &'a [String],
    /// Strings end the answer only after this text: what comes before is thinking.
    pub stop_after: Option<&'a str>,
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

/// An answer in the making: takes logits, gives tokens, until it is finished.
pub(super) struct Answer<'a> {
    request: Request<'a>,
    /// Tokens at most: the request's limit, or what the context has room for.
    limit: usize,
    sampler: Sampler,
    decoder: StopDecoder,
    ids: Vec<u32>,
    out: Generated,
    start: Instant,
    first: Option<Instant>,
}

impl<'a> Answer<'a> {
    /// An answer to `request` in a context of `capacity` tokens.
    pub(super) fn new(tokenizer: &Tokenizer, request: Request<'a>, capacity: usize) -> Result<Self, GenerateError> {
        let prompt = request.prompt.len();
        let room = capacity.checked_sub(prompt).ok_or(GenerateError::PromptTooLong { prompt, capacity })?;
        let sampler = Sampler::new(request.sampling.clone())?;
        Ok(Self {
            // The last token needs no room: nothing is computed after it.
            limit: request.max_tokens.min(room + 1),
            decoder: StopDecoder::new(tokenizer, request.stop, request.stop_after)?,
            ids: Vec::new(),
            out: Generated {
                tokens: Vec::new(),
                text: String::new(),
                finish: Finish::Length,
                seed: sampler.seed(),
                prefill: Duration::ZERO,
                decode: Duration::ZERO,
            },
            sampler,
            request,
            start: Instant::now(),
            first: None,
        })
    }

    /// Tokens at most.
    pub(super) fn limit(&self) -> usize {
        self.limit
    }

    /// Chooses the next token from `logits`; returns it if something is to be computed after it.
    pub(super) fn advance(
        &mut self,
        logits: &[f32],
        scratch: &mut Scratch,
        show: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Option<u32>, GenerateError> {
        if self.ids.len() >= self.limit {
            return Ok(None);
        }
        let history = History { prompt: self.request.prompt, generated: &self.ids };
        let sampled = self.sampler.sample(logits, history, scratch)?;
        let token = sampled.token;
        self.first.get_or_insert_with(Instant::now);
        self.out.tokens.push(sampled);
        self.ids.push(token);
        if self.request.stop_tokens.contains(&token) {
            self.out.finish = Finish::Stop;
            return Ok(None);
        }
        let step = self.decoder.push(token)?;
        if emit(&mut self.out, &step.text, show).is_break() {
            self.out.finish = Finish::Cancelled;
            return Ok(None);
        }
        if step.stop.is_some() {
            self.out.finish = Finish::Stop;
            return Ok(None);
        }
        Ok((self.ids.len() < self.limit).then_some(token))
    }

    /// The answer; what was held back for lack of certainty is text after all.
    pub(super) fn finish(mut self, show: &mut dyn FnMut(&str) -> ControlFlow<()>) -> Result<Generated, GenerateError> {
        let rest = self.decoder.finish()?;
        if self.out.finish != Finish::Cancelled {
            let _ = emit(&mut self.out, &rest, show);
        }
        let first = self.first.unwrap_or_else(Instant::now);
        self.out.prefill = first - self.start;
        self.out.decode = first.elapsed();
        Ok(self.out)
    }
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
    let mut answer = Answer::new(tokenizer, request, session.capacity())?;
    let mut scratch = Scratch::default();
    let mut logits = session.prefill(request.prompt)?;
    while let Some(token) = answer.advance(&logits, &mut scratch, show)? {
        logits = session.step(token)?;
    }
    answer.finish(show)
}

fn emit(out: &mut Generated, text: &str, show: &mut dyn FnMut(&str) -> ControlFlow<()>) -> ControlFlow<()> {
    if text.is_empty() {
        return ControlFlow::Continue(());
    }
    out.text.push_str(text);
    show(text)
}
