//! An answer in the making: takes tokens, gives text, until it is finished. And many answers side by side.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use super::{Engine, EngineError, Event, Id};
use crate::backend::Backend;
use crate::logits::{Constraint, Draw, History, RankedScore, Sampled, Sampler, SamplingParams, TokenSet};
use crate::text::{StopDecoder, TextError, Thinking, Tokenizer};

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
    /// How the answer may begin with thinking, in which stop strings do not count.
    pub thinking: Option<Thinking>,
    /// No stop token is chosen, and no stop string counts, before this many tokens.
    pub min_tokens: usize,
    /// The stop string or token that ends the answer stays in its text.
    pub keep_stop: bool,
    /// Also log-probabilities of the prompt's tokens from the second on, and of this many most probable tokens there.
    pub prompt_logprobs: Option<usize>,
    /// What the answer has to follow: from its first token on, or from the token after its thinking. Thinking that the model
    /// may open it may open beside the grammar, where what opens it is one token; what opens it by the grammar follows the
    /// grammar. Where that lets nothing follow but the end, `min_tokens` gives way.
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
    /// Tokens of the prompt that did not have to be computed: the cache held them.
    pub cached: usize,
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
    stop: Vec<String>,
    stop_tokens: Vec<u32>,
    min_tokens: usize,
    keep_stop: bool,
    constraint: Option<Box<dyn Constraint>>,
    /// What may be chosen next, where not everything may.
    allowed: Option<TokenSet>,
    /// The token that opens thinking, where the model may.
    mark: Option<u32>,
    /// It may come next though the grammar does not let it.
    opens: bool,
    /// What comes is thinking beside the grammar: the prompt opened it, or the model by that token.
    beside: bool,
    /// Tokens of the prompt.
    prompt: usize,
    prompt_scores: Option<PromptScores>,
    /// How many of the last guesses were right.
    right: Option<usize>,
    /// Tokens at most: the request's limit, or what the context has room for.
    limit: usize,
    out: Generated,
    start: Instant,
    first: Option<Instant>,
}

/// Scores of a prompt in the making.
pub(super) struct PromptScores {
    /// How many most probable tokens each has.
    pub top: usize,
    found: Vec<PromptScore>,
}

impl Answer {
    /// An answer to a request, whose prompt is given back, in a context of `capacity` tokens, which the prompt fits into.
    pub fn new(tokenizer: &Tokenizer, request: Request, capacity: usize) -> Result<(Self, Vec<u32>), EngineError> {
        let prompt = request.prompt.len();
        let sampler = Sampler::new(request.sampling)?;
        // A mark that is cut into tokens begins like much else: who knows no better would begin it where the grammar leaves little.
        let open = request.thinking.as_ref().and_then(|thinking| thinking.open.as_deref());
        let mark = open.and_then(|open| tokenizer.token_to_id(open));
        let mut decoder = StopDecoder::new(tokenizer, &request.stop, request.thinking)?;
        let beside = decoder.is_thinking();
        decoder = decoder.from_token(request.min_tokens);
        decoder = if request.keep_stop { decoder.keeping_stop() } else { decoder };
        decoder = if request.show_special { decoder.showing_special() } else { decoder };
        let answer = Self {
            decoder,
            stop: request.stop,
            stop_tokens: request.stop_tokens,
            min_tokens: request.min_tokens,
            keep_stop: request.keep_stop,
            constraint: request.constraint,
            allowed: None,
            mark,
            opens: false,
            beside,
            prompt,
            right: None,
            prompt_scores: request.prompt_logprobs.map(|top| PromptScores { top, found: Vec::new() }),
            limit: request.max_tokens.min(capacity.saturating_sub(prompt)),
            out: Generated {
                tokens: Vec::new(),
                text: String::new(),
                finish: Finish::Length,
                stop: None,
                cached: 0,
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

    /// Scores of the prompt that are still to be found; none where all are, or nobody asks.
    pub fn prompt_scores(&self) -> Option<&PromptScores> {
        self.prompt_scores.as_ref()
    }

    /// Position of the first token of the prompt after which a score is still to be found.
    pub fn next_scored(&self) -> usize {
        self.prompt_scores.as_ref().map_or(self.prompt, |scores| scores.found.len())
    }

    /// Tokens of the prompt.
    pub fn prompt(&self) -> usize {
        self.prompt
    }

    /// Takes the score of the next token of the prompt.
    pub fn take_prompt_score(&mut self, token: u32, score: RankedScore) {
        if let Some(PromptScores { top, found }) = &mut self.prompt_scores {
            let top_logprobs = score.top.iter().take(*top).map(|&(token, log_prob)| (token, log_prob as f32)).collect();
            found.push(PromptScore { token, logprob: score.log_prob as f32, rank: score.rank, top_logprobs });
        }
    }

    /// The scores of the prompt, once, as soon as all are found.
    pub fn all_prompt_scores(&mut self) -> Option<Vec<PromptScore>> {
        self.prompt_scores.take_if(|scores| scores.found.len() + 1 >= self.prompt).map(|scores| scores.found)
    }

    /// Finds out which of `vocab` tokens may come next.
    ///
    /// # Errors
    /// When the grammar gave up.
    pub fn prepare(&mut self, vocab: usize) -> Result<(), EngineError> {
        self.opens = false;
        self.allowed = match &mut self.constraint {
            Some(constraint) if !self.beside => {
                let mut allowed = constraint.allowed()?.clone();
                if let Some(mark) = self.mark.filter(|mark| self.decoder.may_open() && !allowed.contains(*mark)) {
                    allowed.insert(mark);
                    self.opens = true;
                }
                Some(allowed)
            }
            _ => None,
        };
        if self.out.tokens.len() < self.min_tokens && !self.stop_tokens.is_empty() {
            let mut longer = self.allowed.clone().unwrap_or_else(|| TokenSet::all(vocab));
            self.stop_tokens.iter().for_each(|&token| longer.remove(token));
            if !longer.is_empty() {
                self.allowed = Some(longer);
            }
        }
        Ok(())
    }

    /// How its next token is chosen, once [`Self::prepare`] was asked; `tokens` are the prompt's and those chosen.
    pub fn draw<'a>(&'a self, tokens: &'a [u32]) -> Draw<'a> {
        let (prompt, generated) = tokens.split_at(self.prompt);
        Draw { sampler: &self.sampler, history: History { prompt, generated }, allowed: self.allowed.as_ref() }
    }

    /// Tokens that it takes at most from now on.
    pub fn room(&self) -> usize {
        self.limit.saturating_sub(self.out.tokens.len())
    }

    /// Guesses of what follows that are worth computing: twice as many as were right last time, and one more.
    pub fn trust(&self) -> usize {
        self.right.map_or(usize::MAX, |right| 2 * right + 1)
    }

    /// Guesses are computed.
    pub fn begin_guesses(&mut self) {
        self.right = Some(0);
    }

    /// One of them was right.
    pub fn count_right(&mut self) {
        self.right = self.right.map(|right| right + 1);
    }

    /// So many tokens of the prompt were in the cache.
    pub fn set_cached(&mut self, tokens: usize) {
        self.out.cached = tokens;
    }

    /// Whether it takes no more tokens.
    pub fn is_full(&self) -> bool {
        self.room() == 0
    }

    /// Takes the next token.
    ///
    /// # Errors
    /// When the tokenizer's decoder or the grammar fails.
    pub fn take(&mut self, sampled: Sampled) -> Result<Taken, EngineError> {
        let token = sampled.token;
        self.first.get_or_insert_with(Instant::now);
        self.out.tokens.push(sampled);
        if self.stop_tokens.contains(&token) {
            // What a stop string cuts is cut all the same.
            let text = if self.keep_stop { self.decoder.push(token)?.text } else { String::new() };
            self.out.text.push_str(&text);
            return Ok(self.stopped(StopReason::Token(token), text));
        }
        let step = self.decoder.push(token)?;
        self.out.text.push_str(&step.text);
        if let Some(index) = step.stop {
            let stop = self.stop.get(index).cloned().unwrap_or_default();
            return Ok(self.stopped(StopReason::Text(stop), step.text));
        }
        if self.beside {
            self.beside = self.decoder.is_thinking();
        } else if let Some(constraint) = &mut self.constraint {
            if self.opens && self.mark == Some(token) {
                // White space before it was no part of the answer.
                constraint.restart();
                self.beside = true;
            } else {
                constraint.take(token)?;
                if constraint.is_done() {
                    return Ok(self.stopped(StopReason::Grammar, step.text));
                }
            }
        }
        Ok(Taken { text: step.text, next: (!self.is_full()).then_some(token) })
    }

    fn stopped(&mut self, reason: StopReason, text: String) -> Taken {
        self.out.finish = Finish::Stop;
        self.out.stop = Some(reason);
        Taken { text, next: None }
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
/// As [`Engine::generate`] and [`Engine::step`], and what an answer fails by.
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
            let (id, ended) = match event {
                Event::Answered { id, answer, .. } => (id, Ok(answer)),
                Event::Failed { id, error } => (id, Err(error)),
                _ => continue,
            };
            let Some(index) = asked.remove(&id) else { continue };
            let goes_on = ended.map(|answer| done(index, answer));
            if !matches!(goes_on, Ok(ControlFlow::Continue(()))) {
                asked.into_keys().for_each(|id| drop(engine.cancel(id)));
                return goes_on.map(drop);
            }
        }
    }
}
