//! Capitals, small letters and languages.

use super::arguments::Arguments;
use super::language;
use super::text::{is_lower, is_upper};
use super::{Check, Error, words};

pub fn response_language(arguments: &mut Arguments) -> Result<Check, Error> {
    let language = arguments.choice("language", "the code of one of IFEval's 30 languages", language::by_code)?;
    Ok(Box::new(move |response| language::detect(response).is_none_or(|found| found == language)))
}

pub fn english_capital(_: &mut Arguments) -> Result<Check, Error> {
    Ok(Box::new(|response| is_upper(response) && is_english(response)))
}

pub fn english_lowercase(_: &mut Arguments) -> Result<Check, Error> {
    Ok(Box::new(|response| is_lower(response) && is_english(response)))
}

pub fn capital_word_frequency(arguments: &mut Arguments) -> Result<Check, Error> {
    let relation = arguments.relation("capital_frequency", "capital_relation")?;
    let count = |response: &str| words::split(response).iter().filter(|word| is_upper(word)).count();
    Ok(Box::new(move |response| relation.holds(count(response))))
}

/// A text without anything to judge passes.
fn is_english(response: &str) -> bool {
    language::detect(response).is_none_or(|found| found == "en")
}
