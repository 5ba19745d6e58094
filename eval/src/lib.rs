//! Evaluation of language models, whatever runs them: the seam to a model, and perplexity.
//!
//! Knows nothing of any engine: the engine implements [`LanguageModel`].

pub mod perplexity;

/// A model that gives log-probabilities.
pub trait LanguageModel {
    /// What can go wrong in it.
    type Error: std::error::Error + Send + Sync + 'static;

    /// Tokens that fit into one pass.
    fn context_length(&self) -> usize;

    /// Token ids of a text, without special tokens.
    ///
    /// # Errors
    /// When the text cannot be encoded.
    fn encode(&self, text: &str) -> Result<Vec<u32>, Self::Error>;

    /// The token that stands before a text's first one.
    fn prefix_token(&self) -> u32;

    /// Natural-log probability of each token of `continuation`, given `context` and the tokens before it.
    ///
    /// # Errors
    /// When the two together exceed the context length, or the model fails.
    fn log_likelihoods(&self, context: &[u32], continuation: &[u32]) -> Result<Vec<f64>, Self::Error>;
}
