//! One pass over a text through the baseline and other models side by side; no logits are kept.

use thiserror::Error;

use super::{Accumulator, DivergenceError, Options, TokenClass, WindowSums};
use crate::TokenModel;
use crate::comparison::Divergence;

/// Tokens that the models compute at a time: bounds the memory of logits, changes no result.
const CHUNK: usize = 128;

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

    /// Runs all windows through `models` (the first is the baseline) and returns each other model's figures, in order.
    /// `progress` is called after each window.
    ///
    /// # Errors
    /// When a model fails or computes something that is no number.
    pub fn diverge<M: TokenModel>(
        &self,
        models: &mut [M],
        progress: &mut dyn FnMut(),
    ) -> Result<Vec<(Divergence, WindowSums)>, PassError<M::Error>> {
        let failed = |source| PassError::Divergence { text: self.name.clone(), source };
        let Some((baseline, others)) = models.split_first_mut() else { return Ok(Vec::new()) };
        let vocab = self.vocab;
        let mut accumulators: Vec<Accumulator> = (1..=others.len())
            .map(|model| Accumulator::new(Options { model, text: self.name.clone(), vocab }))
            .collect();
        for (index, window) in self.windows.iter().enumerate() {
            let classes: Vec<TokenClass> = window.iter().map(|&t| TokenClass::of(&baseline.token_text(t))).collect();
            // The last token is predicted, not read.
            for start in (0..window.len() - 1).step_by(CHUNK) {
                let end = (start + CHUNK).min(window.len() - 1);
                let expected = baseline.logits(start, &window[start..end]).map_err(PassError::Model)?;
                for (other, accumulator) in others.iter_mut().zip(&mut accumulators) {
                    let found = other.logits(start, &window[start..end]).map_err(PassError::Model)?;
                    let widths = [baseline.vocab(), other.vocab()];
                    let rows = Rows { index, start, window, classes: &classes, vocab, widths };
                    rows.push(&expected, &found, accumulator).map_err(failed)?;
                }
            }
            progress();
        }
        accumulators.into_iter().map(|a| a.finish().map_err(failed)).collect()
    }
}

/// Where a chunk's rows stand.
struct Rows<'a> {
    index: usize,
    start: usize,
    window: &'a [u32],
    classes: &'a [TokenClass],
    vocab: usize,
    /// Length of the rows of both models, of which the first `vocab` logits count.
    widths: [usize; 2],
}

impl Rows<'_> {
    /// Splits the rows over the machine's threads.
    fn push(&self, expected: &[f32], found: &[f32], into: &mut Accumulator) -> Result<(), DivergenceError> {
        let rows = expected.len() / self.widths[0];
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(rows.max(1));
        let share = rows.div_ceil(threads).max(1);
        let empty = into.fresh();
        let parts: Vec<Result<Accumulator, DivergenceError>> = std::thread::scope(|scope| {
            let handles: Vec<_> = (0..rows)
                .step_by(share)
                .map(|first| {
                    let mut part = empty.clone();
                    scope.spawn(move || {
                        for row in first..rows.min(first + share) {
                            let at = self.start + row + 1;
                            let a = &expected[row * self.widths[0]..][..self.vocab];
                            let b = &found[row * self.widths[1]..][..self.vocab];
                            part.push(self.index, at, self.classes[at], a, b, self.window[at])?;
                        }
                        Ok(part)
                    })
                })
                .collect();
            handles.into_iter().map(|h| h.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
        });
        parts.into_iter().try_for_each(|part| into.merge(part?))
    }
}
