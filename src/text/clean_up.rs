//! `clean_up_tokenization_spaces`: spaces before punctuation and English contractions, taken out of decoded text.
//!
//! Source: transformers 5.24, tokenization_utils_base.py, `clean_up_tokenization`.

/// What is replaced by what, one after the other over the whole text.
const REPLACED: [(&str, &str); 10] = [
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
];

/// Characters of [`REPLACED`] that another follows there: after any other, a text can be cut in two without changing what
/// becomes of it, because characters other than spaces are never taken out.
const UNCERTAIN: [char; 5] = [' ', '\'', 'n', 'v', 'r'];

/// The text without those spaces.
pub(super) fn clean_up(text: &str) -> String {
    REPLACED.iter().fold(text.to_owned(), |text, (from, to)| text.replace(from, to))
}

/// Cleans a text that arrives in pieces: all it gives is what [`clean_up`] makes of the whole text.
#[derive(Debug, Clone, Default)]
pub(super) struct CleanUp {
    /// The end of the text, of which what follows decides what becomes.
    held: String,
}

impl CleanUp {
    /// Takes more text; returns what is certain now.
    pub(super) fn push(&mut self, text: &str) -> String {
        self.held += text;
        let certain = self.held.trim_end_matches(UNCERTAIN).len();
        clean_up(&self.held.drain(..certain).collect::<String>())
    }

    /// What would follow if the text ended with `more`.
    pub(super) fn pending(&self, more: &str) -> String {
        clean_up(&(self.held.clone() + more))
    }

    /// Ends the text.
    pub(super) fn finish(&mut self, more: &str) -> String {
        let text = self.pending(more);
        self.held.clear();
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn a_text_in_pieces_is_cleaned_like_the_whole(
            pieces in prop::collection::vec("[ '.?!,ntmsvrea]{0,5}", 0..12)
        ) {
            let mut cleaner = CleanUp::default();
            let mut text: String = pieces.iter().map(|piece| cleaner.push(piece)).collect();
            text += &cleaner.finish("");
            prop_assert_eq!(text, clean_up(&pieces.concat()));
        }
    }
}
