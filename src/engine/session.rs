//! One sequence and its KV cache: prefill in chunks, reuse of what the cache already holds, one token at a time.

use crate::backend::{Backend, BackendError, Batch, PAGE, Result, Span};
use crate::formats::kv::KvFormat;
use crate::model::{Decoder, Wanted};

/// Tokens of a prompt that run at once: bounds the activations' memory, changes no result.
const PREFILL_CHUNK: usize = 512;

/// A model with the cache of one sequence.
pub struct Session<B: Backend> {
    model: Decoder<B>,
    cache: B::Cache,
    pages: Vec<u32>,
    /// Tokens whose keys and values the cache holds.
    held: Vec<u32>,
}

impl<B: Backend> Session<B> {
    /// A session for at most `capacity` tokens, prompt and answer together.
    ///
    /// # Errors
    /// When the backend cannot make the cache.
    pub fn new(model: Decoder<B>, capacity: usize, kv: KvFormat) -> Result<Self> {
        let pages = capacity.div_ceil(PAGE);
        let cache = model.new_cache(pages * PAGE, kv)?;
        Ok(Self { model, cache, pages: (0..pages as u32).collect(), held: Vec::new() })
    }

    /// Tokens it can hold.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.pages.len() * PAGE
    }

    /// The model.
    #[must_use]
    pub fn model(&self) -> &Decoder<B> {
        &self.model
    }

    /// Makes `tokens` the sequence and returns the logits after its last token; what the cache holds already of its
    /// beginning is not computed again.
    ///
    /// # Errors
    /// When `tokens` is empty or longer than the capacity, or names a token outside the vocabulary.
    pub fn prefill(&mut self, tokens: &[u32]) -> Result<Vec<f32>> {
        let Some(last) = tokens.len().checked_sub(1) else {
            return Err(BackendError::Failed { context: "prefill", message: "the prompt is empty".into() });
        };
        let known = self.held.iter().zip(&tokens[..last]).take_while(|(a, b)| a == b).count();
        self.held.truncate(known);
        let mut logits = Vec::new();
        for chunk in tokens[known..].chunks(PREFILL_CHUNK) {
            logits = self.forward(chunk)?;
        }
        Ok(logits)
    }

    /// Appends one token and returns the logits after it.
    ///
    /// # Errors
    /// When the capacity is used up.
    pub fn step(&mut self, token: u32) -> Result<Vec<f32>> {
        self.forward(&[token])
    }

    fn forward(&mut self, tokens: &[u32]) -> Result<Vec<f32>> {
        let needed = self.held.len() + tokens.len();
        if needed > self.capacity() {
            return Err(BackendError::CacheTooSmall { capacity: self.capacity(), needed });
        }
        let pages = self.pages[..needed.div_ceil(PAGE)].to_vec();
        let span = Span { start: self.held.len(), len: tokens.len(), pages };
        let batch = Batch { tokens: tokens.to_vec(), spans: vec![span] };
        let logits = self.model.forward(&batch, &mut self.cache, Wanted::Last)?;
        self.held.extend_from_slice(tokens);
        self.model.backend().to_host(&logits)
    }
}
