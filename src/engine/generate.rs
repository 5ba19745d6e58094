//! An answer in the making: takes tokens, gives text, until it is finished. And many answers side by side.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use super::{Engine, EngineError, Event, Id};
use crate::backend::Backend;
use crate::logits::{Constraint, Draw, History, Sampled, Sampler, SamplingParams};
use crate::text::{StopDecoder, TextError, Tokenizer};

/// What to generate.
#[derive(Default)]
pub struct Request {
    pub prompt: Vec<u32>,
    /// Tokens to generate at most.
    pub max_tokens: usize,
    pub sampling: SamplingParams,
    /// Tokens that end the answer and are not part of its text.
    pub stop_tokens: Vec<u32>,
    /// Strings that end the answer and are not part of its text; special tokens count by their names.
    pub stop: Vec<String>,
    /// Strings end the answer only after this text: what comes before is thinking.
    pub stop_after: Option<String>,
    /// No stop token is chosen, and no stop string counts, before this many tokens.
    pub min_tokens: usize,
    /// The stop string that ends the answer stays in its text.
    pub keep_stop: bool,
    /// Also log-probabilities of the prompt's tokens from the second on, and of this many most probable tokens there.
    pub prompt_logprobs: Option<usize>,
    /// What the answer has to follow; after `stop_after`, where there is one.
    pub constraint: Option<Box<dyn Constraint>>,
    /// Special tokens are part of the text.
    pub show_special: bool,
}

/// How probable a token of a prompt is where it stands.
#[derive(Clone, Debug, PartialEq)]
pub struct PromptScore {
    pub token: u32,
    /// Natural logarithm of its probability.
    pub logprob: f32,
    /// How many tokens are at least as probable; 1 is the most probable.
    pub rank: usize,
    /// The most probable tokens there, the most probable first.
    pub top_logprobs: Vec<(u32, f32)>,
}

/// What made an answer stop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StopReason {
    Token(u32),
    Text(String),
    /// Its grammar lets nothing follow.
    Grammar,
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
    /// What stopped it, where it is [`Finish::Stop`].
    pub stop: Option<StopReason>,
    /// Seed that repeats this answer.
    pub seed: u64,
    /// From the request until the first token was chosen.
    pub prefill: Duration,
    /// From then to the last.
    pub decode: Duration,
}

/// What one token led to.
pub(super) struct Taken {
    /// Text that is certain now.
    pub text: String,
    /// The token, if something is to be computed after it.
    pub next: Option<u32>,
}

/// An answer in the making.
pub(super) struct Answer {
    sampler: Sampler,
    decoder: StopDecoder,
    stop_tokens: Vec<u32>,
    /// Tokens of the prompt.
    prompt: usize,
    /// Tokens at most: the request's limit, or what the context has room for.
    limit: usize,
    out: Generated,
    start: Instant,
    first: Option<Instant>,
}

impl Answer {
    /// An answer to a request, whose prompt is given back, in a context of `capacity` tokens, which the prompt fits into.
    pub fn new(tokenizer: &Tokenizer, request: Request, capacity: usize) -> Result<(Self, Vec<u32>), EngineError> {
        let prompt = request.prompt.len();
        let sampler = Sampler::new(request.sampling)?;
        let answer = Self {
            decoder: StopDecoder::new(tokenizer, &request.stop, request.stop_after.as_deref())?,
            stop_tokens: request.stop_tokens,
            prompt,
            // The last token needs no room: nothing is computed after it.
            limit: request.max_tokens.min(capacity.saturating_sub(prompt) + 1),
            out: Generated {
                tokens: Vec::new(),
                text: String::new(),
                finish: Finish::Length,
                stop: None,
                seed: sampler.seed(),
                prefill: Duration::ZERO,
                decode: Duration::ZERO,
            },
            sampler,
            start: Instant::now(),
            first: None,
        };
        Ok((answer, request.prompt))
    }

    /// How its next token is chosen; `tokens` are the prompt's and those chosen.
    pub fn draw<'a>(&'a self, tokens: &'a [u32]) -> Draw<'a> {
        let (prompt, generated) = tokens.split_at(self.prompt);
        Draw { sampler: &self.sampler, history: History { prompt, generated } }
    }

    /// Whether it takes no more tokens.
    pub fn is_full(&self) -> bool {
        self.out.tokens.len() >= self.limit
    }

    /// Takes the next token.
    pub fn take(&mut self, sampled: Sampled) -> Result<Taken, TextError> {
        let token = sampled.token;
        self.first.get_or_insert_with(Instant::now);
        self.out.tokens.push(sampled);
        if self.stop_tokens.contains(&token) {
            self.out.finish = Finish::Stop;
            return Ok(Taken { text: String::new(), next: None });
        }
        let step = self.decoder.push(token)?;
        self.out.text.push_str(&step.text);
        if step.stop.is_some() {
            self.out.finish = Finish::Stop;
            return Ok(Taken { text: step.text, next: None });
        }
        Ok(Taken { text: step.text, next: (!self.is_full()).then_some(token) })
    }

    /// The answer, and the end of its text: what was held back for lack of certainty is text after all.
    pub fn finish(mut self) -> Result<(Generated, String), TextError> {
        let rest = self.decoder.finish()?;
        self.out.text.push_str(&rest);
        Ok((self.timed(), rest))
    }

    /// The answer as far as it is.
    pub fn cancel(mut self) -> Generated {
        self.out.finish = Finish::Cancelled;
        self.timed()
    }

    fn timed(mut self) -> Generated {
        let first = self.first.unwrap_or_else(Instant::now);
        self.out.prefill = first - self.start;
        self.out.decode = first.elapsed();
        self.out
    }
}

/// Answers one request in an engine that has no other. `text` is told what is certain of the answer as it comes, and cancels
/// it where it breaks.
///
/// # Errors
/// As [`Engine::generate`] and [`Engine::step`].
pub fn answer<B: Backend>(
    engine: &mut Engine<'_, B>,
    tokenizer: &Tokenizer,
    request: Request,
    text: &mut dyn FnMut(&str) -> ControlFlow<()>,
) -> Result<Generated, EngineError> {
    let id = engine.generate(tokenizer, request)?;
    let mut heard = true;
    loop {
        for event in engine.step()? {
            let (certain, answer) = match event {
                Event::Token { text, .. } => (text, None),
                Event::Answered { answer, rest, .. } => (rest, Some(answer)),
                Event::Failed { error, .. } => return Err(error),
                Event::Prompt { .. } | Event::Scored { .. } | Event::Logits { .. } | Event::States { .. } => continue,
            };
            heard = heard && (certain.is_empty() || text(&certain).is_continue());
            // An answer that has ended meanwhile is as it is.
            let cancelled = if heard { None } else { engine.cancel(id) };
            if let Some(answer) = answer.or(cancelled) {
                return Ok(answer);
            }
        }
    }
}

/// Answers `requests`, at most `width` at a time, prompts that begin alike one after the other, and hands each answer to
/// `done` with its index as it ends; stops early when `done` breaks.
///
/// # Errors
/// As [`Engine::generate`] and [`Engine::step`]; the error of a single request ends all, those answered before have been
/// handed over.
pub fn answer_all<B: Backend>(
    engine: &mut Engine<'_, B>,
    tokenizer: &Tokenizer,
    requests: Vec<Request>,
    width: usize,
    done: &mut dyn FnMut(usize, Generated) -> ControlFlow<()>,
) -> Result<(), EngineError> {
    let mut order: Vec<(usize, Request)> = requests.into_iter().enumerate().collect();
    order.sort_by(|a, b| a.1.prompt.cmp(&b.1.prompt));
    let mut waiting = order.into_iter();
    let mut asked: HashMap<Id, usize> = HashMap::new();
    loop {
        while asked.len() < width
            && let Some((index, request)) = waiting.next()
        {
            asked.insert(engine.generate(tokenizer, request)?, index);
        }
        if asked.is_empty() {
            return Ok(());
        }
        for event in engine.step()? {
            if let Event::Answered { id, answer, .. } = event
                && let Some(index) = asked.remove(&id)
                && done(index, answer).is_break()
            {
                asked.into_keys().for_each(|id| drop(engine.cancel(id)));
                return Ok(());
            }
        }
    }
}
