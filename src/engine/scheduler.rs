//! What the next pass through the model computes: which tokens of which sequences, in which pages of the cache.
//!
//! A sequence waits, runs (holds pages) and ends. A pass has a budget of tokens. It goes first to the sequences that need
//! one token, which are those that choose their next, then to prompts that have begun, in pieces if need be, then to those
//! that wait, in order of arrival. Pages are taken as tokens need them. When there are none left, the newest sequence gives
//! its pages back and waits again: what it had computed is computed again, unless it is still in the cache. So the oldest
//! always goes on, and all end.
//!
//! A sequence that begins like one whose beginning is being computed waits until it can share that. Others overtake it
//! meanwhile, which is the only overtaking there is.
//!
//! Where a model has recurrent layers, a beginning can be shared only where its state was kept: after the last whole page
//! before what is wanted of a sequence, after pieces of prompts that end with a page, and where another sequence was found to
//! part.
//!
//! Guesses of what sequences that choose go on with ([`super::Speculation`]) come last, into what a pass has room for: see
//! [`GUESSED_PASS`]. Nobody gives way for them. What is computed of them counts only once they were chosen ([`Scheduler::push`]):
//! until then nothing of them is shared, and what is computed next overwrites it.
//!
//! Pure: a state in, a plan out; [`super::Engine`] carries plans out.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::{Bound, Range};

use super::pages::{Held, Pages, common};
use super::sequence::{Id, Sequence};
use super::stats::Stats;
use crate::backend::PAGE;

/// A beginning is waited for if it has at least this many tokens more than what the cache holds: fewer are computed anew.
const MIN_SHARED: usize = 16;

/// Waiting sequences that are looked at for one pass, beside those that are admitted.
const LOOK_AHEAD: usize = 256;

/// Tokens of a pass at most that has any guesses, which the sequences that choose share evenly. A pass of few tokens takes
/// hardly longer than one of a single token, for the weights are read once; where many sequences run, or a prompt is being
/// read, the pass is as long as pays without guesses.
const GUESSED_PASS: usize = 32;

/// Bounds of an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Tokens of one sequence at most.
    pub context: usize,
    /// Pages of [`PAGE`] tokens of the KV cache, which grows as they are needed; at least those of one sequence.
    pub pages: usize,
    /// Pages that nobody uses and that are kept for sequences to come before the cache grows.
    pub kept: usize,
    /// Sequences that run side by side.
    pub sequences: usize,
    /// Tokens of one pass: bounds the memory of activations, changes no result.
    pub pass: usize,
    /// States of recurrent layers that are kept for sequences to come; `None` where a model has no such layers.
    pub states: Option<usize>,
}

impl Limits {
    /// For `sequences` of at most `context` tokens side by side, none of which ever has to give way.
    #[must_use]
    pub fn new(context: usize, sequences: usize) -> Self {
        // A partly filled page, and a page that one is copied from.
        let pages = sequences.saturating_mul(context.div_ceil(PAGE) + 2);
        Self { context, pages, kept: 64, sequences, pass: 512, states: None }
    }
}

/// Part of a sequence that a pass computes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    pub id: Id,
    /// Positions in the sequence.
    pub range: Range<usize>,
    /// Tokens that may follow, to be computed behind them.
    pub guesses: Vec<u32>,
    /// Position from which on something is to be known after each token.
    pub wanted: usize,
    /// Pages for all tokens up to the range's end.
    pub pages: Vec<u32>,
    /// Slot of its recurrent state; 0 where there is none.
    pub slot: u32,
}

impl Part {
    /// Tokens that are computed.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.range.len() + self.guesses.len()
    }
}

/// A sequence that begins with tokens of another that end within a page: the page is copied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Copy {
    pub from: u32,
    pub to: u32,
    /// Whole pages before it.
    pub before: Vec<u32>,
    /// Tokens of the page that are shared.
    pub tokens: usize,
}

/// The slot whose state is copied, and the slot it is copied to.
pub type StateCopy = (u32, u32);

/// One pass: first the copies, in order, then all parts at once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    pub copies: Vec<Copy>,
    pub states: Vec<StateCopy>,
    pub parts: Vec<Part>,
    /// Pages and slots that the cache must have before parts are computed.
    pub pages: usize,
    pub slots: usize,
}

/// The sequences and their pages.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    pages: Pages,
    waiting: BTreeMap<Id, Sequence>,
    running: BTreeMap<Id, Sequence>,
    next: u64,
    /// What was done so far; what it is at is counted when asked for.
    done: Stats,
}

impl Scheduler {
    /// No sequences yet. Limits that would leave no sequence any room are raised.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        let limits = Limits {
            pages: limits.pages.max(limits.context.div_ceil(PAGE)).max(1),
            sequences: limits.sequences.max(1),
            pass: limits.pass.max(1),
            ..limits
        };
        let slots = limits.states.map_or(0, |kept| limits.sequences.saturating_add(kept));
        let pages = Pages::new(limits.pages, limits.kept).with_slots(slots);
        let (waiting, running) = (BTreeMap::new(), BTreeMap::new());
        Self { limits, pages, waiting, running, next: 0, done: Stats::default() }
    }

    /// The bounds.
    #[must_use]
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Sequences that wait or run.
    #[must_use]
    pub fn len(&self) -> usize {
        self.waiting.len() + self.running.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What it is at, and what it has done.
    #[must_use]
    pub fn stats(&self) -> Stats {
        Stats {
            running: self.running.len(),
            waiting: self.waiting.len(),
            pages_used: self.limits.pages - self.pages.available(),
            pages_kept: self.pages.idle(),
            pages: self.limits.pages,
            ..self.done
        }
    }

    /// Tokens of a sequence that has not ended.
    #[must_use]
    pub fn tokens(&self, id: Id) -> &[u32] {
        self.running.get(&id).or_else(|| self.waiting.get(&id)).map_or(&[], |s| &s.tokens)
    }

    /// Tokens of a sequence that the cache held when it first began.
    #[must_use]
    pub fn cached(&self, id: Id) -> usize {
        self.running.get(&id).or_else(|| self.waiting.get(&id)).map_or(0, |s| s.cached)
    }

    /// Adds a sequence, after whose tokens from position `wanted` on something is to be known. `tokens` has at least one
    /// token and at most the context's.
    pub fn add(&mut self, tokens: Vec<u32>, wanted: usize) -> Id {
        debug_assert!(!tokens.is_empty() && tokens.len() <= self.limits.context);
        let id = Id(self.next);
        self.next += 1;
        self.waiting.insert(id, Sequence::new(tokens, wanted));
        id
    }

    /// Appends a token to a sequence, after which something is to be known. Only while the context has room. Whether it was
    /// guessed: then the last pass has computed it already.
    pub fn push(&mut self, id: Id, token: u32) -> bool {
        let sequence = self.running.get_mut(&id).or_else(|| self.waiting.get_mut(&id));
        let Some(sequence) = sequence else { return false };
        debug_assert!(sequence.tokens.len() < self.limits.context);
        let guessed = sequence.push(token, &mut self.pages);
        self.done.accepted += u64::from(guessed);
        guessed
    }

    /// How many guesses each of `choosing` sequences may have in a pass.
    #[must_use]
    pub fn guesses(&self, plan: &Plan, choosing: usize) -> usize {
        let planned: usize = plan.parts.iter().map(Part::tokens).sum();
        self.limits.pass.min(GUESSED_PASS).saturating_sub(planned) / choosing.max(1)
    }

    /// Adds guesses of what follows a sequence, the last of whose tokens the plan computes: as many of them as there are
    /// pages for, which it returns.
    pub fn guess(&mut self, plan: &mut Plan, id: Id, guesses: &[u32]) -> usize {
        let part = plan.parts.iter_mut().find(|p| p.id == id);
        let (Some(part), Some(sequence)) = (part, self.running.get_mut(&id)) else { return 0 };
        let end = part.range.end;
        debug_assert!(end == sequence.tokens.len() && sequence.slot.is_none());
        let reach = sequence.take_pages((end + guesses.len()).min(self.limits.context), &mut self.pages);
        part.guesses = guesses[..reach.saturating_sub(end)].to_vec();
        part.pages = sequence.pages[..reach.div_ceil(PAGE)].to_vec();
        plan.pages = self.pages.made();
        self.done.drafted += part.guesses.len() as u64;
        part.guesses.len()
    }

    /// A part that computes the last of `guesses`, those before it being computed already, behind a sequence all of which
    /// is; `None` where there is no room for it.
    pub fn look_ahead(&mut self, id: Id, guesses: &[u32]) -> Option<Part> {
        let sequence = self.running.get_mut(&id).filter(|s| s.remaining() == 0)?;
        let (last, reach) = (*guesses.last()?, sequence.computed + guesses.len());
        if reach > self.limits.context || sequence.take_pages(reach, &mut self.pages) < reach {
            return None;
        }
        sequence.set_ahead(guesses);
        let (range, pages) = (reach - 1..reach - 1, sequence.pages[..reach.div_ceil(PAGE)].to_vec());
        Some(Part { id, range, guesses: vec![last], wanted: reach - 1, pages, slot: 0 })
    }

    /// What was guessed of a sequence counts no more.
    pub fn forget_ahead(&mut self, id: Id) {
        if let Some(sequence) = self.running.get_mut(&id) {
            sequence.forget_ahead(&mut self.pages);
        }
    }

    /// Takes a sequence away, wherever it is; what is computed of it stays in the cache while there is room. Plans made
    /// before hold no longer.
    pub fn remove(&mut self, id: Id) {
        self.waiting.remove(&id);
        if let Some(mut sequence) = self.running.remove(&id) {
            sequence.retire(&mut self.pages);
        }
    }

    /// The next pass; without parts when nothing is to be computed.
    pub fn plan(&mut self) -> Plan {
        let mut plan = Plan::default();
        let mut budget = self.limits.pass;
        self.go_on(&mut plan, &mut budget);
        self.admit(&mut plan, &mut budget);
        (plan.pages, plan.slots) = (self.pages.made(), self.pages.slots());
        plan
    }

    /// The parts of a plan have been computed. Returns copies of states to be made at once, in order.
    pub fn computed(&mut self, plan: &Plan) -> Vec<StateCopy> {
        let mut copies = Vec::new();
        for part in &plan.parts {
            if let Some(sequence) = self.running.get_mut(&part.id) {
                sequence.advance(part.range.end, &mut self.pages);
                sequence.set_ahead(&part.guesses);
                copies.extend(sequence.keep_state(&mut self.pages));
            }
        }
        copies
    }

    /// Pages that the cache must have by now.
    #[must_use]
    pub fn pages(&self) -> usize {
        self.pages.made()
    }

    /// Slots that the cache must have by now.
    #[must_use]
    pub fn slots(&self) -> usize {
        self.pages.slots()
    }

    /// Plans parts of the sequences that run. Where pages run out, the newest gives way.
    fn go_on(&mut self, plan: &mut Plan, budget: &mut usize) {
        let mut order: Vec<(bool, Id)> =
            self.running.iter().filter(|(_, s)| s.remaining() > 0).map(|(id, s)| (s.remaining() > 1, *id)).collect();
        order.sort_unstable();
        for (_, id) in order {
            while let Some(sequence) = self.running.get_mut(&id).filter(|_| *budget > 0) {
                if let Some(part) = part(id, sequence, &mut self.pages, *budget) {
                    *budget -= part.range.len();
                    plan.parts.push(part);
                    break;
                }
                let Some((newest, mut sequence)) = self.running.pop_last() else { break };
                sequence.retire(&mut self.pages);
                sequence.gave_way = true;
                self.done.preemptions += 1;
                self.waiting.insert(newest, sequence);
                if let Some(at) = plan.parts.iter().position(|p| p.id == newest) {
                    *budget += plan.parts.remove(at).range.len();
                }
            }
        }
    }

    /// Plans parts of sequences that have waited, in order of arrival, until one does not fit.
    fn admit(&mut self, plan: &mut Plan, budget: &mut usize) {
        let mut put_off = 0;
        let mut after = None;
        while *budget > 0 && self.running.len() < self.limits.sequences && put_off < LOOK_AHEAD {
            let next = self.waiting.range((after.map_or(Bound::Unbounded, Bound::Excluded), Bound::Unbounded)).next();
            let Some((&id, sequence)) = next else { break };
            after = Some(id);
            let reusable = sequence.reusable();
            let mut held = self.pages.find(reusable);
            let mut state = None;
            let mut cuts = BTreeSet::new();
            if self.limits.states.is_some() {
                cuts.extend([reusable.len() / PAGE * PAGE, held.pages.len() * PAGE]);
                state = self.pages.state_of(&held.pages);
                held = Held { pages: held.pages[..state.map_or(0, |s| s.0)].to_vec(), partial: None };
            }
            let coming = self.coming(id);
            if coming >= held.tokens() + MIN_SHARED {
                put_off += 1;
                continue;
            }
            let Some(sequence) = self.waiting.get(&id) else { break };
            let mut pages = held.pages;
            pages.iter().for_each(|&page| self.pages.retain(page));
            if sequence.tokens.len().div_ceil(PAGE) - pages.len() > self.pages.available() {
                self.pages.release(&pages);
                break;
            }
            let Some(mut sequence) = self.waiting.remove(&id) else { break };
            let asked = sequence.reusable().len();
            let whole = pages.len();
            let mut computed = whole * PAGE;
            if let Some((from, tokens)) = held.partial
                && let Some(to) = self.take_beside(from)
            {
                plan.copies.push(Copy { from, to, before: pages.clone(), tokens });
                pages.push(to);
                computed += tokens;
            }
            if self.limits.states.is_some() {
                // No more sequences run than there are slots beside those of states.
                if let (Some((_, from)), Some(last)) = (state, pages.last()) {
                    self.pages.touch_state(*last);
                    sequence.slot = self.pages.take_slot();
                    plan.states.extend(sequence.slot.map(|to| (from, to)));
                } else {
                    sequence.slot = self.pages.take_slot();
                }
                sequence.cuts = cuts;
            }
            if !sequence.gave_way {
                self.done.prefix_asked += asked as u64;
                self.done.prefix_found += computed as u64;
                sequence.cached = computed;
            }
            sequence.begin(pages, whole, computed);
            if let Some(part) = part(id, &mut sequence, &mut self.pages, *budget) {
                *budget -= part.range.len();
                plan.parts.push(part);
            }
            self.running.insert(id, sequence);
        }
    }

    /// How much of the beginning of a sequence that waits is being computed by one that runs, and can be shared then.
    fn coming(&mut self, id: Id) -> usize {
        let Some(sequence) = self.waiting.get(&id) else { return 0 };
        let reusable = sequence.reusable();
        let mut most = 0;
        for other in self.running.values_mut().filter(|s| s.remaining() > 1) {
            let shared = common(&other.tokens, reusable);
            let whole = shared / PAGE * PAGE;
            most = most.max(match self.limits.states {
                None => shared,
                Some(0) => 0,
                // Where the two part, the other's state is kept if it is not beyond.
                Some(_) if whole > other.computed => {
                    other.cuts.insert(whole);
                    whole
                }
                Some(_) => 0,
            });
        }
        most
    }

    /// A page that is not `page`, which stays what it is meanwhile.
    fn take_beside(&mut self, page: u32) -> Option<u32> {
        self.pages.retain(page);
        let taken = self.pages.take();
        self.pages.release(&[page]);
        taken
    }
}

/// As much of a sequence as there are tokens in the budget and pages; none if there is no page.
fn part(id: Id, sequence: &mut Sequence, pages: &mut Pages, budget: usize) -> Option<Part> {
    let start = sequence.computed;
    let reach = sequence.reach(start + sequence.remaining().min(budget));
    let end = sequence.take_pages(reach, pages);
    let slot = sequence.slot.unwrap_or(0);
    let held = sequence.pages[..end.div_ceil(PAGE)].to_vec();
    let guesses = Vec::new();
    (end > start).then_some(Part { id, range: start..end, guesses, wanted: sequence.wanted, pages: held, slot })
}

#[cfg(test)]
mod tests;
