//! How many sentences, words and paragraphs, and how a paragraph starts.

use std::sync::LazyLock;

use regex::Regex;

use super::arguments::Arguments;
use super::patterns::fixed;
use super::text::{SPACE, split, strip};
use super::{Check, Error, sentences};

pub fn sentences(arguments: &mut Arguments) -> Result<Check, Error> {
    let relation = arguments.relation("num_sentences", "relation")?;
    Ok(Box::new(move |response| relation.holds(sentences::split(response).len())))
}

pub fn words(arguments: &mut Arguments) -> Result<Check, Error> {
    static WORD: LazyLock<Regex> = LazyLock::new(|| fixed(r"\w+"));
    let relation = arguments.relation("num_words", "relation")?;
    Ok(Box::new(move |response| relation.holds(WORD.find_iter(response).count())))
}

pub fn paragraphs(arguments: &mut Arguments) -> Result<Check, Error> {
    static DIVIDER: LazyLock<Regex> = LazyLock::new(|| fixed(&format!(r"{SPACE}?\*\*\*{SPACE}?")));
    let number = arguments.number("num_paragraphs")?;
    Ok(Box::new(move |response| {
        let parts: Vec<bool> = DIVIDER.split(response).map(|part| !strip(part).is_empty()).collect();
        let within = parts.get(1..parts.len() - 1).unwrap_or_default();
        within.iter().all(|filled| *filled) && parts.iter().filter(|filled| **filled).count() == number
    }))
}

pub fn first_word(arguments: &mut Arguments) -> Result<Check, Error> {
    let number = arguments.number("num_paragraphs")?;
    let nth = arguments.number_up_to("nth_paragraph", number)?;
    let wanted = arguments.text("first_word")?.to_lowercase();
    Ok(Box::new(move |response| {
        let paragraphs: Vec<&str> = response.split("\n\n").map(strip).collect();
        // Empty paragraphs do not count, yet they have their place when the nth is looked up.
        let filled = paragraphs.iter().filter(|paragraph| !paragraph.is_empty()).count();
        filled == number && first_word_of(paragraphs[nth - 1]).is_some_and(|word| word == wanted)
    }))
}

/// In lower case, without quotes before it, up to the first punctuation mark.
fn first_word_of(paragraph: &str) -> Option<String> {
    let word = split(paragraph).next()?;
    let word = word.trim_start_matches('\'').trim_start_matches('"');
    let letters = word.chars().take_while(|c| !matches!(c, '.' | ',' | '?' | '!' | '\'' | '"'));
    Some(letters.flat_map(char::to_lowercase).collect())
}
