//! Guesses by a smaller model, which reads what the model's sequences have become and goes on greedily.
//!
//! It has a scheduler and a cache of its own, in which each sequence stands as far as it is certain; what it guesses is
//! computed beyond that and never counts as computed before it is certain, so that going back is forgetting.

use std::collections::HashMap;

use super::Asked;
use crate::backend::{Backend, BackendError};
use crate::engine::Id;
use crate::engine::runner::{LOGIT_ROWS, Runner};
use crate::engine::scheduler::{Limits, Plan, Scheduler};
use crate::formats::kv::KvFormat;
use crate::logits::{Draw, History, Sampler, SamplingParams, Scratch};
use crate::model::Decoder;

/// A draft model at work.
pub(in crate::engine) struct Draft<'m, B: Backend> {
    runner: Runner<'m, B>,
    scheduler: Scheduler,
    /// Its own sequence for each of the model's.
    own: HashMap<Id, Id>,
    tokens: usize,
    sampler: Sampler,
    scratch: Scratch,
}

impl<'m, B: Backend> Draft<'m, B> {
    /// One that guesses `tokens` tokens at most, beside an engine with these limits.
    pub fn new(
        model: &'m Decoder<B>,
        tokens: usize,
        limits: &Limits,
        kv: KvFormat,
    ) -> Result<Self, crate::engine::EngineError> {
        let context = model.context_bound().map_or(limits.context, |bound| bound.min(limits.context));
        // Sequences that wait in the engine still have one here.
        let limits = Limits { context, sequences: usize::MAX, states: None, ..*limits };
        Ok(Self {
            runner: Runner::new(model, kv)?,
            scheduler: Scheduler::new(limits),
            own: HashMap::new(),
            tokens,
            sampler: Sampler::new(SamplingParams::greedy())?,
            scratch: Scratch::default(),
        })
    }

    /// Tokens that it guesses at most.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// The sequence has ended.
    pub fn forget(&mut self, id: Id) {
        if let Some(own) = self.own.remove(&id) {
            self.scheduler.remove(own);
        }
    }

    /// Guesses; none where the model has not read a text to its end yet, of which it reads as much as fits into one pass.
    pub fn propose(&mut self, asked: &[Asked<'_>]) -> Result<Vec<Vec<u32>>, BackendError> {
        asked.iter().for_each(|a| self.follow(a.id, a.tokens));
        let own: Vec<Option<Id>> = asked.iter().map(|a| self.own.get(&a.id).copied()).collect();
        let mut guesses = vec![Vec::new(); asked.len()];
        let plan = self.scheduler.plan();
        if !plan.parts.is_empty() {
            let hidden = self.runner.compute(&self.scheduler, &plan)?;
            // Without recurrent layers there are no states to copy.
            self.scheduler.computed(&plan);
            let mut first = 0;
            let mut rows = Vec::new();
            for part in &plan.parts {
                first += part.tokens();
                let read = part.range.end == self.scheduler.tokens(part.id).len();
                let whose = own.iter().position(|own| *own == Some(part.id)).filter(|_| read);
                rows.extend(whose.map(|whose| (whose, first - 1)));
            }
            self.choose(&hidden, &rows, &mut guesses)?;
        }
        for count in 1..self.tokens {
            let mut plan = Plan::default();
            let mut rows = Vec::new();
            for (whose, (asked, guesses)) in asked.iter().zip(&guesses).enumerate() {
                if guesses.len() == count
                    && asked.count > count
                    && let Some(part) = own[whose].and_then(|own| self.scheduler.look_ahead(own, guesses))
                {
                    rows.push((whose, plan.parts.len()));
                    plan.parts.push(part);
                }
            }
            if rows.is_empty() {
                break;
            }
            plan.pages = self.scheduler.pages();
            let hidden = self.runner.compute(&self.scheduler, &plan)?;
            self.choose(&hidden, &rows, &mut guesses)?;
        }
        Ok(guesses)
    }

    /// Makes the sequence what the model's is. Its last token is to be computed, even where it was guessed: only what follows
    /// it is of interest.
    fn follow(&mut self, id: Id, tokens: &[u32]) {
        if tokens.len() > self.scheduler.limits().context {
            return self.forget(id);
        }
        let Some(&own) = self.own.get(&id) else {
            self.own.insert(id, self.scheduler.add(tokens.to_vec(), tokens.len() - 1));
            return;
        };
        let known = self.scheduler.tokens(own).len();
        if let Some((last, new)) = tokens[known..].split_last() {
            for &token in new {
                self.scheduler.push(own, token);
            }
            self.scheduler.forget_ahead(own);
            self.scheduler.push(own, *last);
        }
    }

    /// Adds the most probable token after each row to the guesses of whose it is.
    fn choose(
        &mut self,
        hidden: &B::Tensor,
        rows: &[(usize, usize)],
        guesses: &mut [Vec<u32>],
    ) -> Result<(), BackendError> {
        let model = self.runner.model;
        for rows in rows.chunks(LOGIT_ROWS) {
            let places: Vec<usize> = rows.iter().map(|r| r.1).collect();
            let logits = model.logits(&model.backend().select_rows(hidden, &places)?)?;
            let draws = vec![Draw { sampler: &self.sampler, history: History::default(), allowed: None }; rows.len()];
            let chosen = model.backend().sample(&logits, &draws, &mut self.scratch)?;
            for (&(whose, _), token) in rows.iter().zip(chosen) {
                guesses[whose].extend(token.ok().map(|t| t.token));
            }
        }
        Ok(())
    }
}
