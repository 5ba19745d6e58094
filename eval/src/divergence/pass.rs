//! A text through the baseline, once, and through other models after it; no logits are kept.

use recoup_ground::shares::Shard;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::{DivergenceError, Token, TokenClass, TokenModel, TokenReader, WindowSums, figures};
use crate::comparison::Divergence;

/// What a model said in the windows of a text, one after the other.
pub struct Said<R>(Vec<R>);

/// One model's tokens in all windows of a text, or in a part of them, beside the baseline's: what figures are made of.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Measured(Vec<Token>);

impl Measured {
    /// Of all windows, from what was measured in parts of them.
    pub fn joined(parts: impl IntoIterator<Item = Self>) -> Self {
        let mut tokens: Vec<Token> = parts.into_iter().flat_map(|part| part.0).collect();
        tokens.sort_by_key(|t| (t.window, t.position));
        Self(tokens)
    }
}

/// A text cut into windows that every model reads alike.
#[derive(Clone, Debug, PartialEq)]
pub struct Windows {
    /// What reports call the text.
    pub name: String,
    /// Token ids, the token that begins every text (where the tokenizer has one) included.
    pub windows: Vec<Vec<u32>>,
    /// Of each of their tokens.
    classes: Vec<Vec<TokenClass>>,
    /// Which of the text's windows these are.
    part: Shard,
    /// Tokens whose probabilities are compared: the vocabulary that all models have.
    pub vocab: usize,
    /// The vocabularies, the baseline's first, where some are padded: rows behind the tokenizer's last token, which are
    /// left out where not all models have them.
    pub padded: Option<Vec<usize>>,
}

/// Why models could not be compared on a text.
#[derive(Debug, Error)]
pub enum PassError<E: std::error::Error + 'static> {
    #[error(transparent)]
    Model(E),
    #[error("{text}: {source}")]
    Divergence { text: String, source: DivergenceError },
    #[error(
        "{text}: {tokens} tokens do not fill two windows of {window}; give a longer text or a smaller --window (an error \
         needs two windows at least)"
    )]
    TooShort { text: String, tokens: usize, window: usize },
    #[error("windows of {window} tokens: expected 2 to {context}, the models' context")]
    Window { window: usize, context: usize },
    #[error(
        "model {model} cuts {text} into other tokens than the baseline (they part at token {at}): KL needs one tokenizer"
    )]
    Tokenizer { text: String, model: usize, at: usize },
    #[error(
        "model {model} has a vocabulary of {found}, the baseline of {expected}, and a tokenizer with {tokens} tokens: more \
         than padding is missing, and KL needs one tokenizer"
    )]
    Vocab { model: usize, found: usize, expected: usize, tokens: usize },
}

impl Windows {
    /// Cuts `text` into disjoint windows of `length` tokens, at most `limit` of them; what does not fill a window is left
    /// out. Every token but a window's first is predicted.
    ///
    /// # Errors
    /// When the models do not share a tokenizer, or the text fills fewer than two windows.
    pub fn cut<M: TokenReader>(
        models: &[M],
        name: &str,
        text: &str,
        length: usize,
        limit: Option<usize>,
    ) -> Result<Self, PassError<M::Error>> {
        let context = models.iter().map(TokenReader::context_length).min().unwrap_or(0);
        if !(2..=context).contains(&length) {
            return Err(PassError::Window { window: length, context });
        }
        let Some((baseline, others)) = models.split_first() else {
            let (windows, classes) = (Vec::new(), Vec::new());
            return Ok(Self { name: name.into(), windows, classes, part: Shard::ALL, vocab: 0, padded: None });
        };
        let tokens = baseline.encode(text).map_err(PassError::Model)?;
        for (i, other) in others.iter().enumerate() {
            let shared = other.vocab().min(baseline.vocab());
            let tokens_in_all = other.tokens().max(baseline.tokens());
            if other.vocab() != baseline.vocab() && tokens_in_all > shared {
                let (found, expected) = (other.vocab(), baseline.vocab());
                return Err(PassError::Vocab { model: i + 1, found, expected, tokens: tokens_in_all });
            }
            let theirs = other.encode(text).map_err(PassError::Model)?;
            if theirs != tokens {
                let at = tokens.iter().zip(&theirs).take_while(|(a, b)| a == b).count();
                return Err(PassError::Tokenizer { text: name.into(), model: i + 1, at });
            }
        }
        let begin = baseline.beginning();
        let body = length - usize::from(begin.is_some());
        let cut = tokens.chunks_exact(body.max(1)).take(limit.unwrap_or(usize::MAX));
        let windows: Vec<Vec<u32>> = cut.map(|w| begin.iter().chain(w).copied().collect()).collect();
        if windows.len() < 2 {
            return Err(PassError::TooShort { text: name.into(), tokens: tokens.len(), window: length });
        }
        let vocabularies: Vec<usize> = models.iter().map(TokenReader::vocab).collect();
        let vocab = vocabularies.iter().copied().min().unwrap_or(0);
        let padded = vocabularies.iter().any(|v| *v != vocab).then_some(vocabularies);
        let class = |token: &u32| TokenClass::of(&baseline.token_text(*token));
        let classes = windows.iter().map(|w| w.iter().map(class).collect()).collect();
        Ok(Self { name: name.into(), windows, classes, part: Shard::ALL, vocab, padded })
    }

    /// Those of all windows that `part` has, which may be none.
    #[must_use]
    pub fn of(&self, part: Shard) -> Self {
        let (windows, classes) = (part.share(self.windows.clone()), part.share(self.classes.clone()));
        Self { windows, classes, part, ..self.clone() }
    }

    /// Tokens that are predicted.
    #[must_use]
    pub fn predicted(&self) -> usize {
        self.windows.iter().map(|w| w.len() - 1).sum()
    }

    /// Whether what was said in `other` holds for these windows: they are the first of those, in order.
    #[must_use]
    pub fn begin(&self, other: &Self) -> bool {
        self.part == other.part && other.windows.starts_with(&self.windows)
    }

    /// What `baseline` says in all windows. `progress` is called after each.
    ///
    /// # Errors
    /// When it fails.
    pub fn said<M: TokenModel>(
        &self,
        baseline: &mut M,
        progress: &mut dyn FnMut(),
    ) -> Result<Said<M::Rows>, PassError<M::Error>> {
        let mut said = Vec::with_capacity(self.windows.len());
        for window in &self.windows {
            said.push(baseline.rows(read(window)).map_err(PassError::Model)?);
            progress();
        }
        Ok(Said(said))
    }

    /// Runs all windows through `models` and returns what each says, in order, beside what `baseline` said in these windows,
    /// or in more that begin with them. `progress` is called after each window.
    ///
    /// # Errors
    /// When a model fails or computes something that is no number.
    pub fn measured<M: TokenModel>(
        &self,
        baseline: &M,
        said: &Said<M::Rows>,
        models: &mut [M],
        progress: &mut dyn FnMut(),
    ) -> Result<Vec<Measured>, PassError<M::Error>> {
        let mut tokens: Vec<Vec<Token>> = models.iter().map(|_| Vec::with_capacity(self.predicted())).collect();
        for (at, ((window, classes), expected)) in self.windows.iter().zip(&self.classes).zip(&said.0).enumerate() {
            let number = self.part.index + at * self.part.of;
            for (model, tokens) in models.iter_mut().zip(&mut tokens) {
                let rows = model.rows(read(window)).map_err(PassError::Model)?;
                let pairs = model.compare(&rows, baseline, expected, self.vocab, &window[1..]);
                for (i, (pair, &class)) in pairs.map_err(PassError::Model)?.into_iter().zip(&classes[1..]).enumerate() {
                    let position = i + 1;
                    let at = |source| self.failed(DivergenceError::Row { window: number, position, source });
                    tokens.push(Token { window: number, position, class, pair: pair.map_err(at)? });
                }
            }
            progress();
        }
        Ok(tokens.into_iter().map(Measured).collect())
    }

    /// The figures of what was measured of `model` in all windows.
    ///
    /// # Errors
    /// When a perplexity is no number.
    pub fn figures<E: std::error::Error>(
        &self,
        model: usize,
        measured: &Measured,
    ) -> Result<(Divergence, WindowSums), PassError<E>> {
        figures(model, &self.name, &measured.0).map_err(|source| self.failed(source))
    }

    fn failed<E: std::error::Error>(&self, source: DivergenceError) -> PassError<E> {
        PassError::Divergence { text: self.name.clone(), source }
    }
}

/// What is read of a window: its last token is only predicted.
fn read(window: &[u32]) -> &[u32] {
    &window[..window.len() - 1]
}
