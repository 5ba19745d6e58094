//! llguidance at work on one answer.

use std::sync::{Arc, Mutex, PoisonError};

use llguidance::Matcher;

use super::compile::reason;
use crate::logits::{Constraint, ConstraintError, TokenSet};

/// A grammar and what was chosen so far.
pub(super) struct Matched {
    matcher: Matcher,
    /// Tokens that stand for something: all that may ever be chosen.
    known: Arc<TokenSet>,
    allowed: TokenSet,
}

impl Matched {
    pub(super) fn new(matcher: Matcher, known: Arc<TokenSet>) -> Self {
        Self { matcher, known, allowed: TokenSet::default() }
    }
}

/// The same grammar at work on several answers: each begins with a copy of it, made when its first token is asked for, so that
/// what waits takes no memory.
pub(super) struct Copied {
    first: Arc<Mutex<Matcher>>,
    known: Arc<TokenSet>,
    own: Option<Matched>,
}

impl Copied {
    /// `count` of them.
    pub(super) fn several(matcher: Matcher, known: &Arc<TokenSet>, count: usize) -> Vec<Box<dyn Constraint>> {
        let first = Arc::new(Mutex::new(matcher));
        let one = |_| Box::new(Self { first: first.clone(), known: known.clone(), own: None }) as Box<dyn Constraint>;
        (0..count).map(one).collect()
    }

    fn own(&mut self) -> &mut Matched {
        self.own.get_or_insert_with(|| {
            let copy = self.first.lock().unwrap_or_else(PoisonError::into_inner).deep_clone();
            Matched::new(copy, self.known.clone())
        })
    }
}

impl Constraint for Copied {
    fn allowed(&mut self) -> Result<&TokenSet, ConstraintError> {
        self.own().allowed()
    }

    fn take(&mut self, token: u32) -> Result<(), ConstraintError> {
        self.own().take(token)
    }

    fn is_done(&mut self) -> bool {
        self.own().is_done()
    }
}

impl Constraint for Matched {
    fn allowed(&mut self) -> Result<&TokenSet, ConstraintError> {
        let mask = self.matcher.compute_mask_or_eos().map_err(|error| ConstraintError(reason(&error)))?;
        let words = mask.as_slice().iter().zip(self.known.words()).map(|(allowed, known)| allowed & known);
        self.allowed = TokenSet::from_words(words.collect());
        Ok(&self.allowed)
    }

    fn take(&mut self, token: u32) -> Result<(), ConstraintError> {
        if !self.known.contains(token) {
            return Err(ConstraintError(format!("token {token} stands for nothing")));
        }
        self.matcher.consume_token(token).map_err(|error| ConstraintError(reason(&error)))
    }

    fn is_done(&mut self) -> bool {
        self.matcher.is_stopped()
    }
}
