//! Regular expressions as Python reads them.
//!
//! Texts without special characters, which is all that the data set has, match exactly as in Python. Others are read in
//! the syntax of the crate `regex`: no look-around, no back-references, and `\w`, `\b` take marks for letters.

use std::sync::LazyLock;

use regex::{Error, Regex};

/// A regular expression that came with an instruction.
pub struct Pattern(Regex);

impl Pattern {
    /// Found anywhere, whatever the case (`re.IGNORECASE`).
    pub fn anywhere(source: &str) -> Result<Self, Error> {
        Regex::new(&format!("(?i){}", any_case(source))).map(Self)
    }

    /// Between two `\b`, whatever the case.
    pub fn whole_word(source: &str) -> Result<Self, Error> {
        let (Some(first), Some(last)) = (source.chars().next(), source.chars().next_back()) else {
            return Self::verbatim(r"\b");
        };
        if !is_literal(source) {
            return Regex::new(&format!(r"(?i)\b{source}\b")).map(Self);
        }
        let before = if is_python_word(first) { r"(?:\A|[^\p{L}\p{N}_])" } else { r"[\p{L}\p{N}_]" };
        let after = if is_python_word(last) { r"(?:[^\p{L}\p{N}_]|\z)" } else { r"[\p{L}\p{N}_]" };
        Regex::new(&format!("(?i){before}{}{after}", any_case(source))).map(Self)
    }

    /// As it is, its case too.
    pub fn verbatim(source: &str) -> Result<Self, Error> {
        Regex::new(source).map(Self)
    }

    pub fn is_match(&self, text: &str) -> bool {
        self.0.is_match(text)
    }

    /// Matches that do not overlap.
    pub fn count(&self, text: &str) -> usize {
        self.0.find_iter(text).count()
    }

    pub fn groups(&self) -> usize {
        self.0.captures_len() - 1
    }
}

/// A regular expression that is part of this program: a constant, and a test passes through each.
pub fn fixed(source: &str) -> Regex {
    Regex::new(source).unwrap_or_else(|error| unreachable!("`{source}`: {error}"))
}

/// `\w` of the Unicode standard: letters with their marks, digits, `_` and its like.
pub fn is_word(c: char) -> bool {
    static CLASS: LazyLock<Regex> = LazyLock::new(|| fixed(r"\w"));
    if c.is_ascii() { c.is_ascii_alphanumeric() || c == '_' } else { CLASS.is_match(c.encode_utf8(&mut [0; 4])) }
}

/// Decimal digits, `\d`.
pub fn is_digit(c: char) -> bool {
    static CLASS: LazyLock<Regex> = LazyLock::new(|| fixed(r"\d"));
    if c.is_ascii() { c.is_ascii_digit() } else { CLASS.is_match(c.encode_utf8(&mut [0; 4])) }
}

/// `\w` of Python's `re`: marks that combine are none.
fn is_python_word(c: char) -> bool {
    static CLASS: LazyLock<Regex> = LazyLock::new(|| fixed(r"[\p{L}\p{N}_]"));
    CLASS.is_match(c.encode_utf8(&mut [0; 4]))
}

fn is_literal(source: &str) -> bool {
    !source.contains(['\\', '.', '+', '*', '?', '(', ')', '[', ']', '{', '}', '|', '^', '$'])
}

/// To Python all four letters i are the same when case is not.
fn any_case(source: &str) -> String {
    if !is_literal(source) {
        return source.to_owned();
    }
    source.chars().map(|c| if "iIıİ".contains(c) { "[iıİ]".to_owned() } else { c.to_string() }).collect()
}
