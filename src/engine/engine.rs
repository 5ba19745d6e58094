//! One model at work on many sequences: requests go in at any time, each step computes one pass and gives what it led to.
//!
//! What a sequence gets depends on its own tokens only, bit for bit, whatever runs beside it, in how many pieces it is
//! computed, what it shares and how often it has to give way: see `tests/library/engine.rs`.

use std::collections::HashMap;
use std::ops::Range;

use super::generate::{Answer, Generated, PromptScore, Request};
use super::runner::{LOGIT_ROWS, Runner};
use super::scheduler::{Plan, Scheduler};
use super::speculation::{Asked, Proposer};
use super::{Id, Limits, Speculation, Stats};
use crate::backend::{Backend, BackendError};
use crate::formats::kv::KvFormat;
use crate::logits::{ConstraintError, Draw, Sampled, SamplingError, Scratch, TokenScore};
use crate::model::Decoder;
use crate::text::{TextError, Tokenizer};

/// Bytes of recurrent states that are kept for sequences to come, unless that is less than two of them.
const KEPT_STATES: usize = 256 << 20;

/// Why the engine cannot go on, or does not take a request.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    #[error(transparent)]
    Backend(#[from] BackendError),
    #[error(transparent)]
    Text(#[from] TextError),
    #[error(transparent)]
    Sampling(#[from] SamplingError),
    #[error(transparent)]
    Constraint(#[from] ConstraintError),
    /// Speculative decoding that cannot be.
    #[error("speculative decoding: {0}")]
    Speculation(String),
    #[error("the prompt is empty; a model continues at least one token")]
    EmptyPrompt,
    #[error(
        "the prompt has {prompt} tokens, the context only {capacity}; shorten it, or raise --context if the model allows"
    )]
    PromptTooLong { prompt: usize, capacity: usize },
}

/// What a step led to. A sequence's last event ends it.
#[derive(Debug)]
pub enum Event<T> {
    /// An answer's next token, and text that is certain with it.
    Token { id: Id, token: Sampled, text: String },
    /// An answer is complete; `rest` is the end of its text, which came with no token.
    Answered { id: Id, answer: Generated, rest: String },
    /// How probable a prompt's tokens are, from the second on; before the first token of the answer.
    Prompt { id: Id, scores: Vec<PromptScore> },
    /// An answer cannot go on; the others do.
    Failed { id: Id, error: EngineError },
    /// The scores that were asked for, in that order.
    Scored { id: Id, scores: Vec<TokenScore> },
    /// Logits [rows, vocab] after the tokens from position `from` on; ends the sequence with its last token.
    Logits { id: Id, from: usize, rows: usize, logits: T },
    /// What enters the head after those tokens, [rows, hidden]: [`Decoder::head_logits`] makes logits of it.
    States { id: Id, from: usize, rows: usize, states: T },
}

/// What is to be known of a sequence.
enum Task {
    Answer(Box<Answer>),
    Scores {
        /// Position, and the token whose probability after it is wanted; ascending.
        picks: Vec<(usize, u32)>,
        found: Vec<TokenScore>,
    },
    Logits,
    States,
}

/// A model, its KV cache and the sequences on their way.
pub struct Engine<'m, B: Backend> {
    model: &'m Decoder<B>,
    runner: Runner<'m, B>,
    kv: KvFormat,
    scheduler: Scheduler,
    proposer: Option<Proposer<'m, B>>,
    tasks: HashMap<Id, Task>,
    scratch: Scratch,
}

/// An answer that chooses in a pass, the row of the last of its tokens, and how many guesses stand behind it.
struct Choosing {
    id: Id,
    row: usize,
    guesses: usize,
}

impl<'m, B: Backend> Engine<'m, B> {
    /// An engine within `limits`; `kv` is the cache's format where the checkpoint does not fix one.
    ///
    /// # Errors
    /// When the backend cannot make a cache.
    pub fn new(model: &'m Decoder<B>, limits: Limits, kv: KvFormat) -> Result<Self, EngineError> {
        let state = model.state_bytes();
        let states = (state > 0).then(|| limits.states.unwrap_or((KEPT_STATES / state).clamp(2, 64)));
        let limits = Limits { states, ..limits };
        Ok(Self {
            model,
            runner: Runner::new(model, kv)?,
            kv,
            scheduler: Scheduler::new(limits),
            proposer: None,
            tasks: HashMap::new(),
            scratch: Scratch::default(),
        })
    }

    /// The same engine, which guesses what comes next; its answers stay what they are.
    ///
    /// # Errors
    /// A model with recurrent layers, numbers of tokens that mean nothing, a draft model of another vocabulary.
    pub fn with_speculation(self, speculation: Speculation<'m, B>) -> Result<Self, EngineError> {
        let proposer = Proposer::new(self.model, speculation, self.scheduler.limits(), self.kv)?;
        Ok(Self { proposer: Some(proposer), ..self })
    }

    /// The model.
    #[must_use]
    pub fn model(&self) -> &'m Decoder<B> {
        self.model
    }

    /// Tokens of one sequence at most.
    #[must_use]
    pub fn context(&self) -> usize {
        self.scheduler.limits().context
    }

    /// Tokens that the cache has room for now.
    #[must_use]
    pub fn room(&self) -> usize {
        self.runner.room()
    }

    /// What it is at.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.scheduler.stats()
    }

    /// Sequences that have not ended.
    #[must_use]
    pub fn len(&self) -> usize {
        self.scheduler.len()
    }

    /// Whether there is nothing to do.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.scheduler.is_empty()
    }

    /// Asks for an answer.
    ///
    /// # Errors
    /// A prompt that is empty, too long or not of this vocabulary; sampling parameters or stop strings out of range.
    pub fn generate(&mut self, tokenizer: &Tokenizer, request: Request) -> Result<Id, EngineError> {
        let (prompt, capacity) = (request.prompt.len(), self.context());
        if prompt == 0 {
            return Err(EngineError::EmptyPrompt);
        }
        if prompt > capacity {
            return Err(EngineError::PromptTooLong { prompt, capacity });
        }
        self.check(&request.prompt)?;
        let biased: Vec<u32> = request.sampling.logit_bias.iter().map(|b| b.0).collect();
        self.in_vocabulary(&biased)?;
        let (answer, prompt) = Answer::new(tokenizer, request, capacity)?;
        // Scores are found where the model computes, even where the cache holds the tokens.
        let wanted = answer.next_scored().min(prompt.len() - 1);
        Ok(self.add(prompt, wanted, Task::Answer(Box::new(answer))))
    }

    /// Asks how probable tokens are: `picks` holds positions in `tokens`, ascending, each with a token that could follow.
    ///
    /// # Errors
    /// No picks, a position outside the tokens, more tokens than the context has, a token outside the vocabulary.
    pub fn score(&mut self, mut tokens: Vec<u32>, picks: Vec<(usize, u32)>) -> Result<Id, EngineError> {
        let (Some(first), Some(last)) = (picks.first(), picks.last()) else {
            return Err(bad("nothing is to be scored"));
        };
        if last.0 >= tokens.len() || !picks.is_sorted_by_key(|p| p.0) {
            return Err(bad("positions to be scored must ascend within the tokens"));
        }
        // What comes after the last of them is of no use.
        tokens.truncate(last.0 + 1);
        self.check(&tokens)?;
        let (wanted, found) = (first.0, Vec::with_capacity(picks.len()));
        Ok(self.add(tokens, wanted, Task::Scores { picks, found }))
    }

    /// Asks for the logits after each token from position `from` on.
    ///
    /// # Errors
    /// No token there, more tokens than the context has, a token outside the vocabulary.
    pub fn logits(&mut self, tokens: Vec<u32>, from: usize) -> Result<Id, EngineError> {
        if from >= tokens.len() {
            return Err(bad("there is no token whose logits are wanted"));
        }
        self.check(&tokens)?;
        Ok(self.add(tokens, from, Task::Logits))
    }

    /// Asks for what enters the head after each token from position `from` on: as much as logits, and far smaller.
    ///
    /// # Errors
    /// As [`Self::logits`].
    pub fn states(&mut self, tokens: Vec<u32>, from: usize) -> Result<Id, EngineError> {
        let id = self.logits(tokens, from)?;
        self.tasks.insert(id, Task::States);
        Ok(id)
    }

    fn check(&self, tokens: &[u32]) -> Result<(), EngineError> {
        let capacity = self.context();
        if tokens.len() > capacity {
            return Err(BackendError::CacheTooSmall { capacity, needed: tokens.len() }.into());
        }
        self.in_vocabulary(tokens)
    }

    fn in_vocabulary(&self, tokens: &[u32]) -> Result<(), EngineError> {
        let vocab = self.model.config.vocab;
        match tokens.iter().find(|&&t| t as usize >= vocab) {
            Some(&token) => Err(BackendError::TokenOutOfRange { token, vocab }.into()),
            None => Ok(()),
        }
    }

    fn add(&mut self, tokens: Vec<u32>, wanted: usize, task: Task) -> Id {
        let id = self.scheduler.add(tokens, wanted);
        self.tasks.insert(id, task);
        id
    }

    /// Ends a sequence now; returns what there is of an answer.
    pub fn cancel(&mut self, id: Id) -> Option<Generated> {
        let cached = self.scheduler.cached(id);
        match self.end(id)? {
            Task::Answer(mut answer) => {
                answer.set_cached(cached);
                Some(answer.cancel())
            }
            Task::Scores { .. } | Task::Logits | Task::States => None,
        }
    }

    /// Computes one pass. Without events there may still be something to do; see [`Self::is_empty`]. What goes wrong with one
    /// answer alone ends it by [`Event::Failed`].
    ///
    /// # Errors
    /// The backend's failure, or a model that computes what is no number. The engine is of no more use then.
    pub fn step(&mut self) -> Result<Vec<Event<B::Tensor>>, EngineError> {
        let mut plan = self.scheduler.plan();
        let mut events = Vec::new();
        if plan.parts.is_empty() {
            return Ok(events);
        }
        self.guess(&mut plan)?;
        let hidden = self.runner.compute(&self.scheduler, &plan)?;
        let copies = self.scheduler.computed(&plan);
        self.runner.copy_states(&copies, self.scheduler.slots())?;
        let (mut next, mut scores, mut logits) = (Vec::new(), Vec::new(), Vec::new());
        let mut prompts = Vec::new();
        let mut first = 0;
        for part in &plan.parts {
            let row = |position: usize| first + position - part.range.start;
            match self.tasks.get(&part.id) {
                Some(Task::Answer(answer)) => {
                    let tokens = self.scheduler.tokens(part.id);
                    if answer.prompt_scores().is_some() {
                        let end = part.range.end.min(answer.prompt() - 1);
                        prompts.extend((answer.next_scored()..end).map(|p| (part.id, row(p), tokens[p + 1])));
                    }
                    if part.range.end == tokens.len() {
                        let (row, guesses) = (row(part.range.end - 1), part.guesses.len());
                        next.push(Choosing { id: part.id, row, guesses });
                    }
                }
                Some(Task::Scores { picks, found }) => {
                    let here = picks[found.len()..].iter().take_while(|p| p.0 < part.range.end);
                    scores.extend(here.map(|&(position, token)| (part.id, row(position), token)));
                }
                Some(Task::Logits | Task::States) if part.wanted < part.range.end => {
                    let from = part.wanted.max(part.range.start);
                    logits.push((part.id, from, row(from)..row(part.range.end)));
                }
                _ => {}
            }
            first += part.tokens();
        }
        self.score_prompts(&hidden, &prompts)?;
        self.choose(&hidden, next, &mut events)?;
        self.find_scores(&hidden, &scores, &mut events)?;
        self.hand_out(&hidden, logits, &mut events)?;
        Ok(events)
    }

    /// Adds guesses to a plan, of what answers that choose go on with.
    fn guess(&mut self, plan: &mut Plan) -> Result<(), EngineError> {
        let Some(proposer) = &mut self.proposer else { return Ok(()) };
        let reach = self.model.context_bound().unwrap_or(usize::MAX).min(self.scheduler.limits().context);
        let mut asked = Vec::new();
        for part in &plan.parts {
            let tokens = self.scheduler.tokens(part.id);
            if let Some(Task::Answer(answer)) = self.tasks.get(&part.id)
                && part.range.end == tokens.len()
                && !answer.is_full()
            {
                // After the last token that an answer takes, nothing is computed.
                let of_use = (answer.room() - 1).min(reach.saturating_sub(tokens.len()));
                asked.push(Asked { id: part.id, tokens, count: of_use.min(answer.trust()).min(proposer.tokens()) });
            }
        }
        let most = self.scheduler.guesses(plan, asked.len());
        asked.iter_mut().for_each(|a| a.count = a.count.min(most));
        asked.retain(|a| a.count > 0);
        if asked.is_empty() {
            return Ok(());
        }
        let ids: Vec<Id> = asked.iter().map(|a| a.id).collect();
        for (id, guesses) in ids.into_iter().zip(proposer.propose(&asked)?) {
            if self.scheduler.guess(plan, id, &guesses) > 0
                && let Some(Task::Answer(answer)) = self.tasks.get_mut(&id)
            {
                answer.begin_guesses();
            }
        }
        Ok(())
    }

    /// Chooses the next token of answers, and those after it as long as they were guessed.
    fn choose(
        &mut self,
        hidden: &B::Tensor,
        mut next: Vec<Choosing>,
        events: &mut Vec<Event<B::Tensor>>,
    ) -> Result<(), EngineError> {
        next.retain(|&Choosing { id, .. }| {
            let Some(Task::Answer(answer)) = self.tasks.get_mut(&id) else { return false };
            if let Some(scores) = answer.all_prompt_scores() {
                events.push(Event::Prompt { id, scores });
            }
            let goes_on = !answer.is_full();
            if !goes_on {
                self.finish(id, events);
            }
            goes_on
        });
        let mut rest = &next[..];
        while !rest.is_empty() {
            let mut rows = 0;
            let fits = |c: &&Choosing| {
                rows += 1 + c.guesses;
                rows <= LOGIT_ROWS
            };
            let (some, after) = rest.split_at(rest.iter().take_while(fits).count().max(1));
            self.choose_of(hidden, some, events)?;
            rest = after;
        }
        Ok(())
    }

    /// [`Self::choose`] for a few answers.
    fn choose_of(
        &mut self,
        hidden: &B::Tensor,
        next: &[Choosing],
        events: &mut Vec<Event<B::Tensor>>,
    ) -> Result<(), EngineError> {
        let backend = self.model.backend();
        let rows: Vec<usize> = next.iter().flat_map(|c| c.row..=c.row + c.guesses).collect();
        let all = self.model.logits(&backend.select_rows(hidden, &rows)?)?;
        let mut first = 0;
        // Whose turn it is, and the row of logits that it chooses from.
        let mut turns = Vec::with_capacity(next.len());
        for choosing in next {
            turns.push((choosing.id, first));
            first += 1 + choosing.guesses;
        }
        while !turns.is_empty() {
            turns.retain(|turn| self.prepare(turn.0, events));
            let places: Vec<usize> = turns.iter().map(|t| t.1).collect();
            let some;
            let logits = match places.len() {
                0 => break,
                count if count == rows.len() => &all,
                _ => {
                    some = backend.select_rows(&all, &places)?;
                    &some
                }
            };
            let mut scratch = std::mem::take(&mut self.scratch);
            let draws: Vec<Draw> =
                turns.iter().filter_map(|(id, _)| Some(self.answer(*id)?.draw(self.scheduler.tokens(*id)))).collect();
            let sampled = backend.sample_scored(logits, &draws, &mut scratch)?;
            self.scratch = scratch;
            let mut sampled = sampled.into_iter();
            turns.retain_mut(|(id, row)| {
                *row += 1;
                match sampled.next() {
                    Some(Ok(token)) => self.take(*id, token, events),
                    Some(Err(error)) => self.fail(*id, error.into(), events),
                    None => false,
                }
            });
        }
        Ok(())
    }

    /// Makes an answer ready to choose; one that cannot ends.
    fn prepare(&mut self, id: Id, events: &mut Vec<Event<B::Tensor>>) -> bool {
        let Some(Task::Answer(answer)) = self.tasks.get_mut(&id) else { return false };
        match answer.prepare(self.model.config.vocab) {
            Ok(()) => true,
            Err(error) => self.fail(id, error, events),
        }
    }

    fn answer(&self, id: Id) -> Option<&Answer> {
        match self.tasks.get(&id) {
            Some(Task::Answer(answer)) => Some(answer),
            _ => None,
        }
    }

    /// Gives an answer its next token; whether that was guessed, so that what follows it is known already.
    fn take(&mut self, id: Id, token: Sampled, events: &mut Vec<Event<B::Tensor>>) -> bool {
        let Some(Task::Answer(answer)) = self.tasks.get_mut(&id) else { return false };
        let taken = match answer.take(token.clone()) {
            Ok(taken) => taken,
            Err(error) => return self.fail(id, error, events),
        };
        events.push(Event::Token { id, token, text: taken.text });
        let Some(token) = taken.next else {
            self.finish(id, events);
            return false;
        };
        let guessed = self.scheduler.push(id, token);
        if guessed {
            answer.count_right();
        }
        guessed
    }

    /// Ends an answer that is complete.
    fn finish(&mut self, id: Id, events: &mut Vec<Event<B::Tensor>>) {
        let cached = self.scheduler.cached(id);
        if let Some(Task::Answer(mut answer)) = self.end(id) {
            answer.set_cached(cached);
            events.push(match answer.finish() {
                Ok((answer, rest)) => Event::Answered { id, answer, rest },
                Err(error) => Event::Failed { id, error: error.into() },
            });
        }
    }

    /// Ends an answer that cannot go on: it does not.
    fn fail(&mut self, id: Id, error: EngineError, events: &mut Vec<Event<B::Tensor>>) -> bool {
        self.end(id);
        events.push(Event::Failed { id, error });
        false
    }

    /// Scores tokens of prompts, each after the given row.
    fn score_prompts(&mut self, hidden: &B::Tensor, picks: &[(Id, usize, u32)]) -> Result<(), EngineError> {
        let backend = self.model.backend();
        for part in picks.chunks(LOGIT_ROWS) {
            let rows: Vec<usize> = part.iter().map(|p| p.1).collect();
            let tokens: Vec<u32> = part.iter().map(|p| p.2).collect();
            let top = |p: &(Id, usize, u32)| self.answer(p.0)?.prompt_scores().map(|s| s.top);
            let most = part.iter().filter_map(top).max().unwrap_or(0);
            let logits = self.model.logits(&backend.select_rows(hidden, &rows)?)?;
            let scores = backend.score_ranked(&logits, &tokens, most)?;
            for (&(id, _, token), score) in part.iter().zip(scores) {
                if let Some(Task::Answer(answer)) = self.tasks.get_mut(&id) {
                    answer.take_prompt_score(token, score);
                }
            }
        }
        Ok(())
    }

    /// Scores tokens after the given rows.
    fn find_scores(
        &mut self,
        hidden: &B::Tensor,
        picks: &[(Id, usize, u32)],
        events: &mut Vec<Event<B::Tensor>>,
    ) -> Result<(), EngineError> {
        let backend = self.model.backend();
        let groups: Vec<&[(Id, usize, u32)]> = picks.chunk_by(|a, b| a.1 == b.1).collect();
        for groups in groups.chunks(LOGIT_ROWS) {
            let rows: Vec<usize> = groups.iter().map(|g| g[0].1).collect();
            let logits = self.model.logits(&backend.select_rows(hidden, &rows)?)?;
            let asked: Vec<(usize, u32)> =
                groups.iter().enumerate().flat_map(|(row, g)| g.iter().map(move |p| (row, p.2))).collect();
            let scores = backend.score(&logits, &asked)?;
            for (&(id, ..), score) in groups.iter().copied().flatten().zip(scores) {
                let Some(Task::Scores { picks, found }) = self.tasks.get_mut(&id) else { continue };
                found.push(score);
                if found.len() == picks.len()
                    && let Some(Task::Scores { found: scores, .. }) = self.end(id)
                {
                    events.push(Event::Scored { id, scores });
                }
            }
        }
        Ok(())
    }

    /// Gives the logits, or what they are made of, of whole runs of rows out, at most [`LOGIT_ROWS`] at a time.
    fn hand_out(
        &mut self,
        hidden: &B::Tensor,
        parts: Vec<(Id, usize, Range<usize>)>,
        events: &mut Vec<Event<B::Tensor>>,
    ) -> Result<(), EngineError> {
        for (id, from, rows) in parts {
            let end = from + rows.len();
            for start in rows.clone().step_by(LOGIT_ROWS) {
                let some: Vec<usize> = (start..rows.end.min(start + LOGIT_ROWS)).collect();
                let states = self.model.final_norm(&self.model.backend().select_rows(hidden, &some)?)?;
                let (from, rows) = (from + start - rows.start, some.len());
                events.push(match self.tasks.get(&id) {
                    Some(Task::States) => Event::States { id, from, rows, states },
                    _ => Event::Logits { id, from, rows, logits: self.model.head_logits(&states)? },
                });
            }
            if end == self.scheduler.tokens(id).len() {
                self.end(id);
            }
        }
        Ok(())
    }

    fn end(&mut self, id: Id) -> Option<Task> {
        if let Some(proposer) = &mut self.proposer {
            proposer.forget(id);
        }
        self.scheduler.remove(id);
        self.tasks.remove(&id)
    }
}

fn bad(message: &str) -> EngineError {
    BackendError::Failed { context: "engine", message: message.into() }.into()
}
