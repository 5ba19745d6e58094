//! A model of a comparison, whose weights are loaded when something is to be computed.

use std::cell::OnceCell;

use super::Result;
use crate::backend::Backend;
use crate::evaluate::evaluation::Subject;
use crate::evaluate::language_model::Reader;
use crate::model::{Decoder, ModelConfig};
use crate::text::ModelText;

/// A model's decoder.
pub struct Weights<B: Backend> {
    pub decoder: Decoder<B>,
    /// The same whose products' inputs are not quantized, where
    /// [`AttributionMode::RestoreInputs`](recoup_eval::comparison::AttributionMode::RestoreInputs) asks for it.
    pub float_inputs: Option<Decoder<B>>,
}

/// A model of the comparison.
pub struct Contender<'l, B: Backend> {
    pub text: ModelText,
    pub subject: Subject,
    vocab: usize,
    positions: usize,
    load: Box<dyn Fn() -> Result<Weights<B>> + 'l>,
    weights: OnceCell<Weights<B>>,
}

impl<'l, B: Backend> Contender<'l, B> {
    /// `load` is called once, when something is to be computed, and not at all where everything is kept.
    pub fn new(
        text: ModelText,
        subject: Subject,
        config: &ModelConfig,
        load: impl Fn() -> Result<Weights<B>> + 'l,
    ) -> Self {
        let (vocab, positions) = (config.vocab, config.max_positions);
        Self { text, subject, vocab, positions, load: Box::new(load), weights: OnceCell::new() }
    }

    /// Its weights, in memory from here on.
    ///
    /// # Errors
    /// Those of loading them.
    pub fn weights(&self) -> Result<&Weights<B>> {
        if let Some(loaded) = self.weights.get() {
            return Ok(loaded);
        }
        let loaded = (self.load)()?;
        Ok(self.weights.get_or_init(|| loaded))
    }

    pub(super) fn reader(&self) -> Reader<'_> {
        Reader { text: &self.text, vocab: self.vocab, positions: self.positions }
    }
}
