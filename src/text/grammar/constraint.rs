//! llguidance at work on one answer.

use llguidance::Matcher;

use super::compile::reason;
use crate::logits::{Constraint, ConstraintError, TokenSet};

/// A grammar and what was chosen so far.
pub(super) struct Matched {
    matcher: Matcher,
    /// Tokens that stand for something: all that may ever be chosen.
    known: std::sync::Arc<TokenSet>,
    allowed: TokenSet,
}

impl Matched {
    pub(super) fn new(matcher: Matcher, known: std::sync::Arc<TokenSet>) -> Self {
        Self { matcher, known, allowed: TokenSet::default() }
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
