//! Words after the Penn Treebank's rules, as NLTK's `word_tokenize` has them (MacIntyre 1995, and NLTK's additions).

use std::sync::LazyLock;

use regex::Regex;

use super::patterns::{fixed, is_word};
use super::sentences;
use super::text;

/// Tokens of a text, sentence by sentence.
pub fn split(text: &str) -> Vec<String> {
    sentences::split(text).into_iter().flat_map(split_sentence).collect()
}

/// A pattern and what replaces it, in the order of application.
type Rules = Vec<(Regex, &'static str)>;

fn rules(sources: &[(&str, &'static str)]) -> Rules {
    sources.iter().map(|(source, by)| (fixed(source), *by)).collect()
}

fn apply(rules: &Rules, mut text: String) -> String {
    for (pattern, by) in rules {
        if let std::borrow::Cow::Owned(replaced) = pattern.replace_all(&text, *by) {
            text = replaced;
        }
    }
    text
}

static OPENING_QUOTES: LazyLock<Rules> = LazyLock::new(|| {
    rules(&[("([«“‘„]|[`]+)", " $1 "), (r#"\A""#, "``"), ("(``)", " $1 "), (r#"([ (\[{<])("|'{2})"#, "$1 `` ")])
});

static PUNCTUATION: LazyLock<Rules> = LazyLock::new(|| {
    rules(&[
        (r#"([^.])(\.)([\])}>"'»”’ ]*)\s*\z"#, "$1 $2 $3 "),
        (r"([:,])([^\d])", " $1 $2"),
        (r"([:,])\z", " $1 "),
        (r"\.{2,}", " $0 "),
        ("[;@#$%&]", " $0 "),
        (r"[\u{2012}-\u{2015}]", " $0 "),
        (r#"([^.])(\.)([\])}>"']*)\s*\z"#, "$1 $2$3 "),
        ("[?!]", " $0 "),
        ("([^'])' ", "$1 ' "),
        ("[*]", " $0 "),
        (r"[\]\[(){}<>]", " $0 "),
        ("--", " -- "),
    ])
});

static CLOSING_QUOTES_AND_CONTRACTIONS: LazyLock<Rules> = LazyLock::new(|| {
    rules(&[
        ("([»”’])", " $1 "),
        ("''", " '' "),
        ("\"", " '' "),
        (r"\s+", " "),
        ("([^' ])('[sS]|'[mM]|'[dD]|') ", "$1 $2 "),
        ("([^' ])('ll|'LL|'re|'RE|'ve|'VE|n't|N'T) ", "$1 $2 "),
        (r"(?i)\b(can)(not)\b", " $1 $2 "),
        (r"(?i)\b(d)('ye)\b", " $1 $2 "),
        (r"(?i)\b(gim)(me)\b", " $1 $2 "),
        (r"(?i)\b(gon)(na)\b", " $1 $2 "),
        (r"(?i)\b(got)(ta)\b", " $1 $2 "),
        (r"(?i)\b(lem)(me)\b", " $1 $2 "),
        (r"(?i)\b(more)('n)\b", " $1 $2 "),
        (r"(?i)\b(wan)(na)\s", " $1 $2  "),
        (r"(?i) ('t)(is)\b", " $1 $2 "),
        (r"(?i) ('t)(was)\b", " $1 $2 "),
    ])
});

fn split_sentence(sentence: &str) -> Vec<String> {
    let text = apply(&OPENING_QUOTES, sentence.to_owned());
    let text = apply(&PUNCTUATION, part_opening_apostrophes(&text));
    let text = apply(&CLOSING_QUOTES_AND_CONTRACTIONS, format!(" {text} "));
    text::split(&text).map(str::to_owned).collect()
}

/// An apostrophe before a word is a quote, unless it starts a clitic.
fn part_opening_apostrophes(text: &str) -> String {
    static CLITIC: LazyLock<Regex> = LazyLock::new(|| fixed(r"(?i)\A(?:re|ve|ll|m|t|s|d|n)\b"));
    let mut parted = String::with_capacity(text.len());
    let mut before = ' ';
    for (at, c) in text.char_indices() {
        parted.push(c);
        let after = &text[at + c.len_utf8()..];
        if c == '\'' && !is_word(before) && after.starts_with(is_word) && !CLITIC.is_match(after) {
            parted.push(' ');
        }
        before = c;
    }
    parted
}
