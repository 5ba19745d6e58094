//! A text through the baseline, once, and through other models after it; no logits are kept.

use thiserror::Error;

use super::{DivergenceError, Token, TokenClass, TokenModel, WindowSums, figures};
use crate::comparison::Divergence;

/// What a model said in the windows of a text, one after the other.
pub struct Said<R>(Vec<R>);

/// A text cut into windows that every model reads alike.
#[derive(Clone, Debug, PartialEq)]
pub struct Windows {
    /// What reports call the text.
    pub name: String,
    /// Token ids, the token that begins every text (where the tokenizer has one) included.
    pub windows: Vec<Vec<u32>>,
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
    pub fn cut<M: TokenModel>(
        models: &[M],
        name: &str,
        text: &str,
        length: usize,
        limit: Option<usize>,
    ) -> Result<Self, PassError<M::Error>> {
        let context = models.iter().map(TokenModel::context_length).min().unwrap_or(0);
        if !(2..=context).contains(&length) {
            return Err(PassError::Window { window: length, context });
        }
        let Some((baseline, others)) = models.split_first() else {
            return Ok(Self { name: name.into(), windows: Vec::new(), vocab: 0, padded: None });
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
        let vocabularies: Vec<usize> = models.iter().map(TokenModel::vocab).collect();
        let vocab = vocabularies.iter().copied().min().unwrap_or(0);
        let padded = vocabularies.iter().any(|v| *v != vocab).then_some(vocabularies);
        Ok(Self { name: name.into(), windows, vocab, padded })
    }

    /// Tokens that are predicted.
    #[must_use]
    pub fn predicted(&self) -> usize {
        self.windows.iter().map(|w| w.len() - 1).sum()
    }

    /// Whether what was said in `other` holds for these windows: they are the first of those, in order.
    #[must_use]
    pub fn begin(&self, other: &Self) -> bool {
        other.windows.starts_with(&self.windows)
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

    /// Runs all windows through `models` and returns each one's figures, in order, against what `baseline` said in these
    /// windows, or in more that begin with them. `progress` is called after each window.
    ///
    /// # Errors
    /// When a model fails or computes something that is no number.
    pub fn diverge<M: TokenModel>(
        &self,
        baseline: &M,
        said: &Said<M::Rows>,
        models: &mut [M],
        progress: &mut dyn FnMut(),
    ) -> Result<Vec<(Divergence, WindowSums)>, PassError<M::Error>> {
        let failed = |source| PassError::Divergence { text: self.name.clone(), source };
        let mut tokens: Vec<Vec<Token>> = models.iter().map(|_| Vec::with_capacity(self.predicted())).collect();
        for (at, (window, expected)) in self.windows.iter().zip(&said.0).enumerate() {
            for (model, tokens) in models.iter_mut().zip(&mut tokens) {
                let rows = model.rows(read(window)).map_err(PassError::Model)?;
                let pairs = model.compare(&rows, baseline, expected, self.vocab, &window[1..]);
                for (i, (pair, &token)) in pairs.map_err(PassError::Model)?.into_iter().zip(&window[1..]).enumerate() {
                    let position = i + 1;
                    let pair = pair.map_err(|source| failed(DivergenceError::Row { window: at, position, source }))?;
                    let class = TokenClass::of(&baseline.token_text(token));
                    tokens.push(Token { window: at, position, class, pair });
                }
            }
            progress();
        }
        let figures = |(model, tokens): (usize, &Vec<Token>)| figures(model + 1, &self.name, tokens).map_err(failed);
        tokens.iter().enumerate().map(figures).collect()
    }
}

/// What is read of a window: its last token is only predicted.
fn read(window: &[u32]) -> &[u32] {
    &window[..window.len() - 1]
}
