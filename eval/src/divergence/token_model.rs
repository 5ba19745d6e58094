//! The seams to a model whose every token's distribution can be compared: how it reads a text, for which no weights are
//! needed, and what it says.

use recoup_ground::divergence::{Pair, RowError};

/// How a model cuts a text into tokens, and how many it takes.
pub trait TokenReader {
    /// What can go wrong in it.
    type Error: std::error::Error + Send + Sync + 'static;

    /// Tokens that fit into one pass.
    fn context_length(&self) -> usize;

    /// Size of the vocabulary: the length of each row of logits.
    fn vocab(&self) -> usize;

    /// Ids that the tokenizer can give are all below this; the vocabulary may be larger, padded for the hardware's sake.
    fn tokens(&self) -> usize;

    /// Token ids of a text, without special tokens.
    ///
    /// # Errors
    /// When the text cannot be encoded.
    fn encode(&self, text: &str) -> Result<Vec<u32>, Self::Error>;

    /// The text of one token as it stands in a text (for classes of tokens); bytes that are no UTF-8 are replaced.
    fn token_text(&self, token: u32) -> String;

    /// The token that the model's tokenizer puts before every text, if it does.
    fn beginning(&self) -> Option<u32>;
}

/// Token-by-token scores and full distributions: what perplexity over windows and KL divergence need, and what a remote
/// model cannot give.
pub trait TokenModel {
    /// What can go wrong in it.
    type Error: std::error::Error + Send + Sync + 'static;
    /// What a model says after each token of a sequence, wherever and however it keeps that.
    type Rows;

    /// What it says after each of `tokens`, which begin a sequence.
    ///
    /// # Errors
    /// When the sequence exceeds the context length, or the model fails.
    fn rows(&mut self, tokens: &[u32]) -> Result<Self::Rows, Self::Error>;

    /// Losses, and divergence from what `baseline` said, row by row: `targets[i]` is the token that follows row `i`, and the
    /// first `vocab` tokens of both vocabularies count.
    ///
    /// # Errors
    /// When a model fails.
    fn compare(
        &self,
        rows: &Self::Rows,
        baseline: &Self,
        of_baseline: &Self::Rows,
        vocab: usize,
        targets: &[u32],
    ) -> Result<Vec<Result<Pair, RowError>>, Self::Error>;
}
