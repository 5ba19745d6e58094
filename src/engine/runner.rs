//! A model and its cache: carries out what a scheduler planned.

use super::scheduler::{Plan, Scheduler, StateCopy};
use crate::backend::{Backend, BackendError, Batch, PAGE, Span};
use crate::formats::kv::KvFormat;
use crate::model::Decoder;

/// Rows of logits at a time: bounds their memory, changes no result.
pub(super) const LOGIT_ROWS: usize = 128;

/// Pages by which the cache grows, at least.
const GROWTH: usize = 16;

/// A model with its KV cache.
pub(super) struct Runner<'m, B: Backend> {
    pub model: &'m Decoder<B>,
    cache: B::Cache,
    /// Pages that the cache has.
    pages: usize,
}

impl<'m, B: Backend> Runner<'m, B> {
    /// With an empty cache; `kv` is its format where the checkpoint does not fix one.
    pub fn new(model: &'m Decoder<B>, kv: KvFormat) -> Result<Self, BackendError> {
        Ok(Self { model, cache: model.new_cache(0, 0, kv)?, pages: 0 })
    }

    /// Tokens that the cache has room for now.
    pub fn room(&self) -> usize {
        self.pages * PAGE
    }

    /// Carries a plan out: what leaves the last layer for each of its tokens, guesses after the others of their part,
    /// [tokens, hidden].
    pub fn compute(&mut self, scheduler: &Scheduler, plan: &Plan) -> Result<B::Tensor, BackendError> {
        let backend = self.model.backend();
        if plan.pages > self.pages {
            let pages = (self.pages + (self.pages / 4).max(GROWTH)).min(scheduler.limits().pages);
            self.pages = pages.max(plan.pages);
        }
        backend.grow(&mut self.cache, self.pages, plan.slots)?;
        for copy in &plan.copies {
            let span = |page| Span {
                start: copy.before.len() * PAGE + copy.tokens,
                len: 0,
                pages: [&copy.before[..], &[page]].concat(),
                slot: 0,
            };
            backend.fork(&mut self.cache, &span(copy.from), &span(copy.to))?;
        }
        for &(from, to) in &plan.states {
            backend.copy_state(&mut self.cache, from, to)?;
        }
        let mut batch = Batch::default();
        for part in &plan.parts {
            batch.tokens.extend_from_slice(scheduler.tokens(part.id).get(part.range.clone()).unwrap_or_default());
            batch.tokens.extend_from_slice(&part.guesses);
            let (start, len, pages) = (part.range.start, part.tokens(), part.pages.clone());
            batch.spans.push(Span { start, len, pages, slot: part.slot });
        }
        self.model.hidden(&batch, &mut self.cache)
    }

    /// Copies states, in order, in a cache of `slots` slots.
    pub fn copy_states(&mut self, copies: &[StateCopy], slots: usize) -> Result<(), BackendError> {
        if copies.is_empty() {
            return Ok(());
        }
        self.model.backend().grow(&mut self.cache, self.pages, slots)?;
        copies.iter().try_for_each(|&(from, to)| self.model.backend().copy_state(&mut self.cache, from, to))
    }
}
