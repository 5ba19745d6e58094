//! Speculative decoding: what may come next is guessed, and computed in the same pass as what is certain.
//!
//! The model's own sampler draws after each guess, with the seed and at the place that it would have without; a guess counts
//! as long as it is what was drawn. So the answer is the same, bit for bit. (That is rejection sampling for guesses that
//! carry all their probability on one token, with the draw for the random number.) docs/speculative.md has the rest.

mod draft;
mod lookup;

use super::scheduler::Limits;
use super::{EngineError, Id};
use crate::backend::{Backend, BackendError};
use crate::formats::kv::KvFormat;
use crate::model::Decoder;
use draft::Draft;

/// How tokens are guessed.
pub enum Speculation<'m, B: Backend> {
    /// What followed, where the end of the text so far occurred before in it: at most `tokens` tokens after the longest such
    /// end of `min` to `max` tokens.
    PromptLookup { tokens: usize, min: usize, max: usize },
    /// What a smaller model finds most probable, `tokens` tokens at most. Its tokens must mean what the model's mean: the
    /// same tokenizer.
    Draft { model: &'m Decoder<B>, tokens: usize },
}

/// Of which sequence guesses are wanted, and how many.
pub(super) struct Asked<'a> {
    pub id: Id,
    pub tokens: &'a [u32],
    pub count: usize,
}

/// Who guesses.
pub(super) enum Proposer<'m, B: Backend> {
    Lookup { tokens: usize, min: usize, max: usize },
    Draft(Box<Draft<'m, B>>),
}

impl<'m, B: Backend> Proposer<'m, B> {
    /// For a model, in an engine with these limits.
    ///
    /// # Errors
    /// A model whose layers cannot go back to an earlier token, numbers of tokens that mean nothing, a draft model of another
    /// vocabulary.
    pub fn new(
        model: &Decoder<B>,
        speculation: Speculation<'m, B>,
        limits: &Limits,
        kv: KvFormat,
    ) -> Result<Self, EngineError> {
        let refuse = EngineError::Speculation;
        let recurrent = |model: &Decoder<B>, which: &str| {
            let message = format!(
                "{which} has recurrent layers, whose state cannot be taken back where a guess was wrong; run it without"
            );
            if model.state_bytes() > 0 { Err(refuse(message)) } else { Ok(()) }
        };
        recurrent(model, "this model")?;
        let tokens = match speculation {
            Speculation::PromptLookup { tokens, .. } | Speculation::Draft { tokens, .. } => tokens,
        };
        if tokens == 0 {
            return Err(refuse("the number of tokens to guess must be 1 or more, found 0".into()));
        }
        match speculation {
            Speculation::PromptLookup { tokens, min, max } => {
                if min == 0 || min > max {
                    return Err(refuse(format!("what is looked up must have 1 token or more, found {min} to {max}")));
                }
                Ok(Self::Lookup { tokens, min, max })
            }
            Speculation::Draft { model: draft, tokens } => {
                recurrent(draft, "the draft model")?;
                let (own, other) = (model.config.vocab, draft.config.vocab);
                if own != other {
                    return Err(refuse(format!(
                        "the draft model must have the model's vocabulary of {own} tokens, found {other}: take a smaller model \
                         of the same family"
                    )));
                }
                Ok(Self::Draft(Box::new(Draft::new(draft, tokens, limits, kv)?)))
            }
        }
    }

    /// Tokens that are guessed at most.
    pub fn tokens(&self) -> usize {
        match self {
            Self::Lookup { tokens, .. } => *tokens,
            Self::Draft(draft) => draft.tokens(),
        }
    }

    /// Guesses for each of these sequences, as many as asked for or fewer.
    ///
    /// # Errors
    /// When the draft model fails.
    pub fn propose(&mut self, asked: &[Asked<'_>]) -> Result<Vec<Vec<u32>>, BackendError> {
        match self {
            Self::Lookup { min, max, .. } => {
                Ok(asked.iter().map(|a| lookup::lookup(a.tokens, a.count, *min, *max)).collect())
            }
            Self::Draft(draft) => draft.propose(asked),
        }
    }

    /// A sequence has ended.
    pub fn forget(&mut self, id: Id) {
        if let Self::Draft(draft) = self {
            draft.forget(id);
        }
    }
}
