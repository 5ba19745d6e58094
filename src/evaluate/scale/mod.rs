//! How a model does on many devices, without having one: what each rank holds, what goes between them, and how long it takes.
//!
//! The ranks do all they would do but compute (`backend/parallel/paper`), so that whatever runs over ranks is reckoned as it runs. What
//! each thing takes is measured, or a maker's figure (costs.rs); when it happens follows from who waits for whom (timeline.rs).

pub mod costs;
pub mod timeline;
pub mod training;

use crate::backend::parallel::paper::{Event, Paper, Pen, Trace, record};
use crate::backend::parallel::{Parallel, Size};
use crate::backend::{Backend as _, Batch, PAGE, Span};
use crate::engine::EngineError;
use crate::evaluate::bench::{Case, PIECE};
use crate::formats::kv::KvFormat;
use crate::logits::{Draw, History, Sampler, SamplingParams, Scratch};
use crate::model::decoder::LoadError;
use crate::model::parallel::PlanError;
use crate::model::{Decoder, Source, Wanted};
use costs::Costs;

/// Why nothing can be said.
#[derive(Debug, thiserror::Error)]
pub enum ScaleError {
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error("{0}")]
    Timeline(String),
}

impl From<crate::backend::BackendError> for ScaleError {
    fn from(e: crate::backend::BackendError) -> Self {
        Self::Engine(e.into())
    }
}

/// What goes between ranks, all together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes that ranks get.
    pub bytes: usize,
    /// Of these what the rank that gets most gets.
    pub most: usize,
    /// Times that the first rank's stage waits for each other.
    pub exchanges: usize,
}

/// What the ranks of a model do when it is loaded, reads prompts and gives tokens.
pub struct Recorded {
    size: Size,
    case: Case,
    traces: Vec<Trace>,
}

/// How long things take, in seconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Forecast {
    /// From a prompt to its first token.
    pub first_token: f64,
    /// Of one step that gives each sequence a token.
    pub step: f64,
    /// Share of the step that the first rank does not wait, or carry something.
    pub busy: f64,
}

/// Marks of a trace: what is loaded, the prompt's first token, a step.
const PHASES: usize = 3;

/// What `size` ranks do of the model of `source`, with a cache in `kv`; a step is one in the middle of what `case` generates.
///
/// # Errors
/// A model that cannot be shared out so, or that has no such positions.
pub fn ranks(source: &dyn Source, size: Size, case: Case, kv: KvFormat) -> Result<Recorded, ScaleError> {
    let plan = source.config().map_err(LoadError::from)?.plan(size)?;
    let run = |backend: Parallel<Paper>, pen: &Pen| -> Result<(), ScaleError> {
        let model = Decoder::load(backend, source)?;
        let Case { batch, prompt, generate } = case;
        let each = (prompt + generate).div_ceil(PAGE);
        let mut cache = model.new_cache(batch * each * PAGE, batch, kv)?;
        pen.mark();
        let span = |sequence: usize, start: usize, len: usize| Span {
            start,
            len,
            pages: (sequence * each..(sequence + 1) * each).map(|p| p as u32).collect(),
            slot: sequence as u32,
        };
        let sampler = Sampler::new(SamplingParams::greedy()).map_err(EngineError::from)?;
        let mut scratch = Scratch::default();
        let mut pass = |spans: Vec<Span>, chosen: usize| -> Result<(), ScaleError> {
            let tokens = vec![0; spans.iter().map(|s| s.len).sum()];
            let logits = model.forward(&Batch { tokens, spans }, &mut cache, Wanted::Last)?;
            if chosen > 0 {
                let draws = vec![Draw { sampler: &sampler, history: History::default(), allowed: None }; chosen];
                model.backend().sample(&logits, &draws, &mut scratch)?;
            }
            Ok(())
        };
        let mut done = 0;
        while done < prompt {
            let len = PIECE.min(prompt - done);
            done += len;
            pass(vec![span(0, done - len, len)], usize::from(done == prompt))?;
        }
        pen.mark();
        pass((0..batch).map(|s| span(s, prompt + generate / 2, 1)).collect(), batch)?;
        pen.mark();
        Ok(())
    };
    Ok(Recorded { size, case, traces: record(size, plan, run)? })
}

impl Recorded {
    /// How many ranks there are.
    #[must_use]
    pub fn size(&self) -> Size {
        self.size
    }

    /// What was asked.
    #[must_use]
    pub fn case(&self) -> Case {
        self.case
    }

    /// Bytes of weights at the rank that has most of them, and of its caches at the rank that has most of those.
    #[must_use]
    pub fn held(&self) -> (usize, usize) {
        let most = |of: fn(&Trace) -> usize| self.traces.iter().map(of).max().unwrap_or(0);
        (most(|t| t.most_weights), most(|t| t.caches))
    }

    /// What goes between ranks in each phase: loading, a prompt, a step.
    #[must_use]
    pub fn traffic(&self) -> [Traffic; PHASES] {
        let mut phases = [Traffic::default(); PHASES];
        for (rank, trace) in self.traces.iter().enumerate() {
            let mut own = [0; PHASES];
            let mut phase = 0;
            for event in &trace.events {
                let (got, exchanges) = match event {
                    Event::Mark => {
                        phase += 1;
                        continue;
                    }
                    Event::Broadcast { bytes } if rank > 0 => (*bytes, 0),
                    Event::Spread { own, all } => (all - own, usize::from(rank == 0)),
                    Event::Receive { bytes, .. } => (*bytes, 0),
                    _ => continue,
                };
                // Behind the last mark things are only put away.
                if let (Some(own), Some(all)) = (own.get_mut(phase), phases.get_mut(phase)) {
                    *own += got;
                    all.exchanges += exchanges;
                }
            }
            for (all, own) in phases.iter_mut().zip(own) {
                all.bytes += own;
                all.most = all.most.max(own);
            }
        }
        phases
    }

    /// How long it takes on what `costs` says.
    ///
    /// # Errors
    /// When ranks wait for each other for ever.
    pub fn on(&self, costs: &Costs) -> Result<Forecast, ScaleError> {
        let line = timeline::run(&self.traces, self.size, costs).map_err(ScaleError::Timeline)?;
        let &[loaded, first, step] = &line.marks[..] else {
            return Err(ScaleError::Timeline(format!("{} marks in the place of {PHASES}", line.marks.len())));
        };
        let work = |events: &[Event]| {
            let one = |e: &Event| if let Event::Work(w) = e { costs.seconds(w) } else { 0.0 };
            events.iter().map(one).sum::<f64>()
        };
        let last = self.traces.first().and_then(|t| t.events.split(|e| *e == Event::Mark).nth(PHASES - 1));
        let (first_token, step) = (first - loaded, step - first);
        Ok(Forecast { first_token, step, busy: last.map_or(0.0, work) / step })
    }
}
