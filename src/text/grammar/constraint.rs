//! llguidance at work on one answer.

use std::sync::{Arc, Mutex, PoisonError};

use llguidance::Matcher;

use super::compile::reason;
use crate::logits::{Constraint, ConstraintError, TokenSet};

/// A grammar and what was chosen so far.
struct Matched {
    matcher: Matcher,
    allowed: TokenSet,
}

/// A grammar at work on an answer, or on several: each begins with a copy of it, made when its first token is asked for, so that
/// what waits takes no memory.
pub(super) struct Copied {
    first: Arc<Mutex<Matcher>>,
    /// Tokens that stand for something: all that may ever be chosen.
    known: Arc<TokenSet>,
    own: Option<Matched>,
}

impl Copied {
    /// For one answer.
    pub(super) fn one(matcher: Matcher, known: &Arc<TokenSet>) -> Box<dyn Constraint> {
        Box::new(Self { first: Arc::new(Mutex::new(matcher)), known: known.clone(), own: None })
    }

    /// `count` of them.
    pub(super) fn several(matcher: Matcher, known: &Arc<TokenSet>, count: usize) -> Vec<Box<dyn Constraint>> {
        let first = Arc::new(Mutex::new(matcher));
        let one = |_| Box::new(Self { first: first.clone(), known: known.clone(), own: None }) as Box<dyn Constraint>;
        (0..count).map(one).collect()
    }

    fn own(&mut self) -> &mut Matched {
        self.own.get_or_insert_with(|| {
            let matcher = self.first.lock().unwrap_or_else(PoisonError::into_inner).deep_clone();
            Matched { matcher, allowed: TokenSet::default() }
        })
    }
}

impl Constraint for Copied {
    fn allowed(&mut self) -> Result<&TokenSet, ConstraintError> {
        let known = self.known.clone();
        let own = self.own();
        let mask = own.matcher.compute_mask_or_eos().map_err(|error| ConstraintError(reason(&error)))?;
        let words = mask.as_slice().iter().zip(known.words()).map(|(allowed, known)| allowed & known);
        own.allowed = TokenSet::from_words(words.collect());
        Ok(&own.allowed)
    }

    fn take(&mut self, token: u32) -> Result<(), ConstraintError> {
        if !self.known.contains(token) {
            return Err(ConstraintError(format!("token {token} stands for nothing")));
        }
        self.own().matcher.consume_token(token).map_err(|error| ConstraintError(reason(&error)))
    }

    fn is_done(&mut self) -> bool {
        self.own().matcher.is_stopped()
    }

    fn restart(&mut self) {
        self.own = None;
    }
}
