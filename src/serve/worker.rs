//! A model at work: a thread of its own, which owns the engine. Requests go in through a queue of bounded length, what comes of
//! them goes out through a channel each; who drops the channel's end no longer wants the answer.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::watch;

use super::error::ApiError;
use super::metrics::ModelMetrics;
use crate::backend::Backend;
use crate::engine::{Engine, EngineError, Event, Finish, Generated, Id, PromptScore, Request, Stats};
use crate::logits::Sampled;
use crate::text::Tokenizer;

/// What comes of a request, in this order; the last is `Done` or `Failed`.
#[derive(Debug)]
pub enum Output {
    /// How probable the prompt's tokens are, where that was asked for.
    Prompt(Vec<PromptScore>),
    /// The next token, and text that is certain with it.
    Token { token: Sampled, text: String },
    /// The answer is complete; `rest` is the end of its text.
    Done { answer: Box<Generated>, rest: String },
    /// There will be no answer.
    Failed(ApiError),
}

/// A request on its way to the engine.
struct Job {
    request: Request,
    /// By which its tokens become text.
    tokenizer: Tokenizer,
    index: usize,
    out: UnboundedSender<(usize, Output)>,
    ticket: Ticket,
    asked: Instant,
}

/// A place among the sequences that are let in; given back when dropped.
pub struct Ticket(Arc<AtomicUsize>);

impl Drop for Ticket {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// What the worker and those who ask it both see.
struct Shared {
    /// Sequences let in: on their way, waiting or running.
    inside: Arc<AtomicUsize>,
    /// Of those at most.
    most: usize,
    /// The thread has ended, and why.
    dead: AtomicBool,
    stats: Mutex<Stats>,
    metrics: ModelMetrics,
    /// What is not finished by now will not be.
    cut: watch::Sender<bool>,
}

/// Where requests for a model go in.
#[derive(Clone)]
pub struct Worker {
    jobs: Sender<Job>,
    shared: Arc<Shared>,
}

impl Worker {
    /// A worker and its other end, which [`work`] serves; at most `most` sequences are let in at a time.
    #[must_use]
    pub fn new(most: usize, metrics: ModelMetrics) -> (Self, Desk) {
        let (jobs, receiver) = channel();
        let shared = Arc::new(Shared {
            inside: Arc::default(),
            most,
            dead: AtomicBool::new(false),
            stats: Mutex::default(),
            metrics,
            cut: watch::Sender::new(false),
        });
        (Self { jobs, shared: shared.clone() }, Desk { jobs: receiver, shared })
    }

    /// Places for `count` sequences, all or none.
    ///
    /// # Errors
    /// When there are not as many; more than there ever are is the request's fault.
    pub fn places(&self, count: usize) -> Result<Vec<Ticket>, ApiError> {
        if count > self.shared.most {
            let most = self.shared.most;
            return Err(ApiError::bad(format!(
                "the request asks for {count} answers at once, {most} are let in at most"
            )));
        }
        let place = |inside: usize| inside.checked_add(count).filter(|all| *all <= self.shared.most);
        match self.shared.inside.fetch_update(Ordering::AcqRel, Ordering::Acquire, place) {
            Ok(_) => Ok((0..count).map(|_| Ticket(self.shared.inside.clone())).collect()),
            Err(inside) => {
                self.shared.metrics.refused();
                Err(ApiError::full(inside))
            }
        }
    }

    /// Asks for an answer, whose text `tokenizer` makes; what comes of it goes to `out` with `index`.
    ///
    /// # Errors
    /// When the worker is no more.
    pub fn ask(
        &self,
        ticket: Ticket,
        request: Request,
        tokenizer: Tokenizer,
        index: usize,
        out: UnboundedSender<(usize, Output)>,
    ) -> Result<(), ApiError> {
        let job = Job { request, tokenizer, index, out, ticket, asked: Instant::now() };
        self.jobs.send(job).map_err(|_| ApiError::stopped())
    }

    /// Sequences that are let in now.
    #[must_use]
    pub fn inside(&self) -> usize {
        self.shared.inside.load(Ordering::Acquire)
    }

    /// Whether it works.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        !self.shared.dead.load(Ordering::Acquire)
    }

    /// Ends all answers that are under way: whoever waits for one is told.
    pub fn cut(&self) {
        self.shared.cut.send_replace(true);
    }

    /// Tells when [`Self::cut`] was called.
    #[must_use]
    pub fn cut_signal(&self) -> watch::Receiver<bool> {
        self.shared.cut.subscribe()
    }

    /// What the engine is at.
    #[must_use]
    pub fn stats(&self) -> Stats {
        *self.shared.stats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is measured of this model.
    #[must_use]
    pub fn metrics(&self) -> &ModelMetrics {
        &self.shared.metrics
    }
}

/// The end of a [`Worker`] where the work is done.
pub struct Desk {
    jobs: Receiver<Job>,
    shared: Arc<Shared>,
}

/// What the worker knows of a sequence in the engine.
struct Asked {
    index: usize,
    out: UnboundedSender<(usize, Output)>,
    _ticket: Ticket,
    at: Instant,
    prompt: usize,
    /// When its last token was chosen.
    last: Option<Instant>,
}

impl Asked {
    /// Tells whoever asked; who is gone is found out before the next pass.
    fn send(&self, output: Output) {
        let _ = self.out.send((self.index, output));
    }
}

/// Serves a desk until nobody can ask any more, or the engine fails.
///
/// # Errors
/// The engine's failure, which whoever waits has been told.
pub fn work<B: Backend>(engine: &mut Engine<'_, B>, desk: Desk) -> Result<(), EngineError> {
    let Desk { jobs, shared } = desk;
    // A panic is a fault of ours; whoever waits is to hear of it all the same, and the server to go down.
    let result =
        catch_unwind(AssertUnwindSafe(|| Bench { jobs, asked: HashMap::new(), shared: &shared }.serve(engine)));
    shared.dead.store(true, Ordering::Release);
    match result {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

struct Bench<'a> {
    jobs: Receiver<Job>,
    asked: HashMap<Id, Asked>,
    shared: &'a Shared,
}

impl Bench<'_> {
    fn serve<B: Backend>(mut self, engine: &mut Engine<'_, B>) -> Result<(), EngineError> {
        loop {
            // With nothing to do it waits; else it takes what has come meanwhile.
            if engine.is_empty() {
                self.note(engine);
                match self.jobs.recv() {
                    Ok(job) => self.begin(engine, job),
                    Err(_) => return Ok(()),
                }
            }
            while let Ok(job) = self.jobs.try_recv() {
                self.begin(engine, job);
            }
            self.let_go(engine);
            match engine.step() {
                Ok(events) => events.into_iter().for_each(|event| self.tell(event)),
                Err(e) => {
                    let error = ApiError::failed(e.to_string());
                    for (_, asked) in self.asked.drain() {
                        asked.send(Output::Failed(error.clone()));
                    }
                    return Err(e);
                }
            }
            self.note(engine);
        }
    }

    fn begin<B: Backend>(&mut self, engine: &mut Engine<'_, B>, job: Job) {
        let Job { request, tokenizer, index, out, ticket, asked } = job;
        // Whoever asked may have gone while the request waited.
        if out.is_closed() {
            self.shared.metrics.ended("abort");
            return;
        }
        let prompt = request.prompt.len();
        match engine.generate(&tokenizer, request) {
            Ok(id) => {
                self.asked.insert(id, Asked { index, out, _ticket: ticket, at: asked, prompt, last: None });
            }
            Err(e) => {
                self.shared.metrics.ended("error");
                let _ = out.send((index, Output::Failed(e.into())));
            }
        }
    }

    /// Ends what nobody waits for any more.
    fn let_go<B: Backend>(&mut self, engine: &mut Engine<'_, B>) {
        let gone: Vec<Id> = self.asked.iter().filter(|(_, asked)| asked.out.is_closed()).map(|(id, _)| *id).collect();
        for id in gone {
            engine.cancel(id);
            self.asked.remove(&id);
            self.shared.metrics.ended("abort");
        }
    }

    fn tell<T>(&mut self, event: Event<T>) {
        let metrics = &self.shared.metrics;
        match event {
            Event::Prompt { id, scores } => {
                if let Some(asked) = self.asked.get(&id) {
                    asked.send(Output::Prompt(scores));
                }
            }
            Event::Token { id, token, text } => {
                let Some(asked) = self.asked.get_mut(&id) else { return };
                let now = Instant::now();
                match asked.last.replace(now) {
                    None => metrics.first_token(now - asked.at, asked.prompt),
                    Some(last) => metrics.next_token(now - last),
                }
                asked.send(Output::Token { token, text });
            }
            Event::Answered { id, answer, rest } => {
                let Some(asked) = self.asked.remove(&id) else { return };
                metrics.ended(match answer.finish {
                    Finish::Stop => "stop",
                    Finish::Length => "length",
                    Finish::Cancelled => "abort",
                });
                metrics.answered(asked.at.elapsed(), answer.prefill, answer.decode, asked.prompt, answer.tokens.len());
                asked.send(Output::Done { answer: Box::new(answer), rest });
            }
            Event::Failed { id, error } => {
                let Some(asked) = self.asked.remove(&id) else { return };
                metrics.ended("error");
                asked.send(Output::Failed(error.into()));
            }
            Event::Scored { .. } | Event::Logits { .. } | Event::States { .. } => {}
        }
    }

    fn note<B: Backend>(&self, engine: &Engine<'_, B>) {
        *self.shared.stats.lock().unwrap_or_else(PoisonError::into_inner) = engine.stats();
    }
}
