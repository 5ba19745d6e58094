//! Which tokens may come next in an answer that has to follow a grammar.

/// Tokens of a vocabulary.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenSet {
    /// Token `id` is bit `id % 32` of word `id / 32`.
    words: Vec<u32>,
}

impl TokenSet {
    /// None of `vocab` tokens.
    #[must_use]
    pub fn empty(vocab: usize) -> Self {
        Self { words: vec![0; vocab.div_ceil(32)] }
    }

    /// Those whose bits are set: token `id` is bit `id % 32` of word `id / 32`.
    #[must_use]
    pub fn from_words(words: Vec<u32>) -> Self {
        Self { words }
    }

    /// The words of bits.
    #[must_use]
    pub fn words(&self) -> &[u32] {
        &self.words
    }

    /// Whether a token is among them; none beyond the vocabulary is.
    #[must_use]
    pub fn contains(&self, id: u32) -> bool {
        self.words.get(id as usize / 32).is_some_and(|word| word >> (id % 32) & 1 == 1)
    }

    /// Adds a token of the vocabulary.
    pub fn insert(&mut self, id: u32) {
        if let Some(word) = self.words.get_mut(id as usize / 32) {
            *word |= 1 << (id % 32);
        }
    }

    /// Takes a token away.
    pub fn remove(&mut self, id: u32) {
        if let Some(word) = self.words.get_mut(id as usize / 32) {
            *word &= !(1 << (id % 32));
        }
    }
}

/// Why a grammar cannot go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the grammar of the answer: {0}")]
pub struct ConstraintError(pub String);

/// A grammar at work on one answer.
pub trait Constraint: Send {
    /// The tokens that may come next; where the text may end here, those that end it are among them.
    ///
    /// # Errors
    /// When the grammar gave up: too large, too ambiguous.
    fn allowed(&mut self) -> Result<&TokenSet, ConstraintError>;

    /// `token`, one of those allowed, was chosen.
    ///
    /// # Errors
    /// When it was not allowed.
    fn take(&mut self, token: u32) -> Result<(), ConstraintError>;

    /// Whether nothing may follow: the answer ends here.
    fn is_done(&mut self) -> bool;
}
