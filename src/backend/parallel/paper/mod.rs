//! Ranks on paper: each does all that it would do of a model, but compute. What is left is what it would have read, multiplied and
//! sent, in order, which needs neither the devices nor the memory.
//!
//! The code that decides who does what is that of [`Parallel`] and its ranks; only the backend below it and the link between are others.

mod backend;
mod link;

use std::sync::{Arc, Mutex, PoisonError};

pub use self::backend::Paper;
use self::link::{PaperLink, Script};
use super::{Parallel, Plan, Size, help};
use crate::backend::Result;

/// What one operation of a backend takes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Work {
    /// Bytes that are read and written.
    pub bytes: f64,
    /// Multiply-adds of floats, and of integers.
    pub floats: f64,
    pub integers: f64,
}

/// What a rank does, one thing after the other.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    Work(Work),
    /// The first rank tells all others; they wait for it.
    Broadcast {
        bytes: usize,
    },
    /// All of a stage wait for each other and get what each has: bytes of this rank, and of all.
    Spread {
        own: usize,
        all: usize,
    },
    Send {
        to: usize,
        bytes: usize,
    },
    Receive {
        from: usize,
        bytes: usize,
    },
    /// What came before is over.
    Mark,
}

/// What a rank did, and what it held.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Trace {
    pub events: Vec<Event>,
    /// Bytes of weights that it has in the end, and had at most; and of all caches.
    pub weights: usize,
    pub most_weights: usize,
    pub caches: usize,
}

/// The trace of a rank, which its backend and its links write.
#[derive(Clone, Debug, Default)]
pub struct Pen(Arc<Mutex<Trace>>);

impl Pen {
    fn write(&self, change: impl FnOnce(&mut Trace)) {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Says that what came before is over.
    pub fn mark(&self) {
        self.write(|trace| trace.events.push(Event::Mark));
    }

    fn take(&self) -> Trace {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// What every rank of `size` does when the first one does `run`, of a model that `plan` spreads. `run` gets the backend and what marks
/// places in the first rank's trace; nothing of the backend outlives it.
///
/// # Errors
/// Those of `run`, and of ranks that have no part in what is asked.
pub fn record<E: From<crate::backend::BackendError>>(
    size: Size,
    plan: Plan,
    run: impl FnOnce(Parallel<Paper>, &Pen) -> std::result::Result<(), E>,
) -> std::result::Result<Vec<Trace>, E> {
    let script = Arc::new(Script::of(size.ranks()));
    let first = Pen::default();
    let link = PaperLink::of_all(&script, &first, 0, size);
    run(Parallel::new(Paper::new(first.clone()), Arc::new(link), size)?.with_plan(plan), &first)?;
    let others = (1..size.ranks()).map(|rank| {
        let pen = Pen::default();
        let link = PaperLink::of_all(&script, &pen, rank, size);
        help(Paper::new(pen.clone()), Arc::new(link), size).map(|()| pen.take())
    });
    let mut others = others.collect::<Result<Vec<_>>>()?;
    let first = first.take();
    let told = heard_before(&first.events);
    others.iter_mut().for_each(|other| marked(&mut other.events, &told));
    Ok(std::iter::once(first).chain(others).collect())
}

/// How much was told before each mark.
fn heard_before(events: &[Event]) -> Vec<usize> {
    let mut told = 0;
    let mark = |event: &Event| {
        told += usize::from(matches!(event, Event::Broadcast { .. }));
        (*event == Event::Mark).then_some(told)
    };
    events.iter().filter_map(mark).collect()
}

/// Marks where the first rank has them: before the next thing that it tells.
fn marked(events: &mut Vec<Event>, told: &[usize]) {
    let (mut heard, mut marks) = (0, told.iter().peekable());
    let mut out = Vec::with_capacity(events.len() + told.len());
    for event in events.drain(..) {
        if matches!(event, Event::Broadcast { .. }) {
            while marks.next_if(|mark| **mark == heard).is_some() {
                out.push(Event::Mark);
            }
            heard += 1;
        }
        out.push(event);
    }
    out.extend(marks.map(|_| Event::Mark));
    *events = out;
}
