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

    /// All of `vocab` tokens.
    #[must_use]
    pub fn all(vocab: usize) -> Self {
        let mut words = vec![u32::MAX; vocab.div_ceil(32)];
        if let (Some(last), used @ 1..) = (words.last_mut(), vocab % 32) {
            *last >>= 32 - used;
        }
        Self { words }
    }

    /// Whether it has no token.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
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

    /// Forgets what was chosen: the answer begins anew.
    fn restart(&mut self);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_holds_what_was_put_in_and_nothing_beyond_the_vocabulary() {
        for vocab in [0, 1, 31, 32, 33, 64, 100] {
            let (mut set, all) = (TokenSet::empty(vocab), TokenSet::all(vocab));
            assert!(set.is_empty() && all.is_empty() == (vocab == 0));
            (0..200).for_each(|id| assert_eq!(all.contains(id), (id as usize) < vocab, "{id} of {vocab}"));
            (0..vocab as u32).for_each(|id| set.insert(id));
            assert_eq!(set, all);
            (0..vocab as u32).for_each(|id| set.remove(id));
            assert!(set.is_empty());
        }
        let mut few = TokenSet::from_words(vec![1 << 3, 1]);
        few.remove(3);
        few.insert(1000);
        assert_eq!((few.words(), few.contains(32), few.contains(3)), (&[0, 1][..], true, false));
    }
}
