//! Words and letters that must occur, or must not.

use super::arguments::Arguments;
use super::patterns::Pattern;
use super::text::strip;
use super::{Check, Error};

pub fn existence(arguments: &mut Arguments) -> Result<Check, Error> {
    let keywords = arguments.patterns("keywords", Pattern::anywhere)?;
    Ok(Box::new(move |response| keywords.iter().all(|keyword| keyword.is_match(response))))
}

pub fn frequency(arguments: &mut Arguments) -> Result<Check, Error> {
    let keyword = arguments.text("keyword")?;
    let keyword = arguments.pattern("keyword", strip(&keyword), Pattern::anywhere)?;
    let relation = arguments.relation("frequency", "relation")?;
    Ok(Box::new(move |response| relation.holds(keyword.count(response))))
}

pub fn forbidden_words(arguments: &mut Arguments) -> Result<Check, Error> {
    let words = arguments.patterns("forbidden_words", Pattern::whole_word)?;
    Ok(Box::new(move |response| !words.iter().any(|word| word.is_match(response))))
}

pub fn letter_frequency(arguments: &mut Arguments) -> Result<Check, Error> {
    let letter = arguments.choice("letter", "one character", |text| {
        let mut lower = text.chars().flat_map(char::to_lowercase);
        lower.next().filter(|_| lower.next().is_none())
    })?;
    let relation = arguments.relation("let_frequency", "let_relation")?;
    Ok(Box::new(move |response| relation.holds(response.to_lowercase().matches(letter).count())))
}
