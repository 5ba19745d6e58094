//! Classes of tokens by their text.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What kind of token is to be predicted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum TokenClass {
    /// Letters after white space.
    WordStart,
    /// Letters (and apostrophes and marks within a word) with nothing before them.
    WordContinuation,
    /// Digits, with or without a space before them.
    Number,
    Punctuation,
    /// Spaces, tabs and line breaks only.
    WhiteSpace,
    /// Special tokens, symbols, mixtures, parts of characters.
    Other,
}

impl TokenClass {
    pub const ALL: [Self; 6] =
        [Self::WordStart, Self::WordContinuation, Self::Number, Self::Punctuation, Self::WhiteSpace, Self::Other];

    /// The class of a token with this text, as it stands in a text (a space is a space, not `▁` or `Ġ`).
    #[must_use]
    pub fn of(text: &str) -> Self {
        let body = text.trim_start();
        let all = |is: fn(char) -> bool| body.chars().all(is);
        if text.is_empty() {
            Self::Other
        } else if body.is_empty() {
            Self::WhiteSpace
        } else if all(char::is_numeric) {
            Self::Number
        } else if all(|c| c.is_alphabetic() || is_word_mark(c)) && body.chars().any(char::is_alphabetic) {
            if body.len() < text.len() { Self::WordStart } else { Self::WordContinuation }
        } else if body.trim_end().chars().all(is_punctuation) {
            Self::Punctuation
        } else {
            Self::Other
        }
    }
}

impl fmt::Display for TokenClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::WordStart => "word start",
            Self::WordContinuation => "word continuation",
            Self::Number => "number",
            Self::Punctuation => "punctuation",
            Self::WhiteSpace => "white space",
            Self::Other => "other",
        })
    }
}

/// Apostrophes, the hyphen, and combining marks (U+0300 to U+036F).
fn is_word_mark(c: char) -> bool {
    matches!(c, '\'' | '’' | '-' | '\u{300}'..='\u{36f}')
}

/// ASCII punctuation and the blocks General Punctuation, CJK Symbols and Punctuation, and the fullwidth forms of ASCII
/// punctuation; « » ¡ ¿ · § ¶ of Latin-1.
fn is_punctuation(c: char) -> bool {
    c.is_ascii_punctuation()
        || matches!(c, '\u{2010}'..='\u{205e}' | '\u{3001}'..='\u{303f}' | '！'..='／' | '：'..='＠' | '［'..='｀' | '｛'..='･')
        || matches!(c, '«' | '»' | '¡' | '¿' | '·' | '§' | '¶')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_fall_into_the_class_of_their_text() {
        let cases = [
            (" the", TokenClass::WordStart),
            ("\nThe", TokenClass::WordStart),
            (" naïve", TokenClass::WordStart),
            ("ing", TokenClass::WordContinuation),
            ("'s", TokenClass::WordContinuation),
            ("日本", TokenClass::WordContinuation),
            ("42", TokenClass::Number),
            (" 7", TokenClass::Number),
            (",", TokenClass::Punctuation),
            (" (", TokenClass::Punctuation),
            (".\n\n", TokenClass::Punctuation),
            ("'", TokenClass::Punctuation),
            ("。", TokenClass::Punctuation),
            ("   ", TokenClass::WhiteSpace),
            ("\n\n", TokenClass::WhiteSpace),
            ("", TokenClass::Other),
            ("<|im_end|>", TokenClass::Other),
            ("\u{fffd}", TokenClass::Other),
            ("x86", TokenClass::Other),
            ("🙂", TokenClass::Other),
        ];
        for (text, class) in cases {
            assert_eq!(TokenClass::of(text), class, "{text:?}");
        }
    }
}
