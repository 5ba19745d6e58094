//! The outer form of a response: lists, highlights, sections, titles, JSON, fixed answers.

use std::sync::LazyLock;

use regex::Regex;

use super::arguments::Arguments;
use super::patterns::{Pattern, fixed};
use super::text::{SPACE, strip};
use super::{Check, Error, json};

pub fn bullet_lists(arguments: &mut Arguments) -> Result<Check, Error> {
    // An asterisk alone on its line takes the next line for its text, and empty lines before a bullet belong to it.
    static ASTERISK: LazyLock<Regex> = LazyLock::new(|| fixed(&format!(r"(?m)^{SPACE}*\*[^*].*$")));
    static DASH: LazyLock<Regex> = LazyLock::new(|| fixed(&format!(r"(?m)^{SPACE}*-.*$")));
    let number = arguments.number("num_bullets")?;
    Ok(Box::new(move |response| ASTERISK.find_iter(response).count() + DASH.find_iter(response).count() == number))
}

pub fn constrained_response(_: &mut Arguments) -> Result<Check, Error> {
    const ANSWERS: [&str; 3] = ["My answer is yes.", "My answer is no.", "My answer is maybe."];
    Ok(Box::new(|response| ANSWERS.iter().any(|answer| response.contains(answer))))
}

pub fn highlighted_sections(arguments: &mut Arguments) -> Result<Check, Error> {
    static SINGLE: LazyLock<Regex> = LazyLock::new(|| fixed(r"\*[^\n*]*\*"));
    static DOUBLE: LazyLock<Regex> = LazyLock::new(|| fixed(r"\*\*[^\n*]*\*\*"));
    let number = arguments.number("num_highlights")?;
    Ok(Box::new(move |response| {
        let filled = |pattern: &Regex| {
            pattern.find_iter(response).filter(|found| !strip(found.as_str().trim_matches('*')).is_empty()).count()
        };
        filled(&SINGLE) + filled(&DOUBLE) >= number
    }))
}

pub fn multiple_sections(arguments: &mut Arguments) -> Result<Check, Error> {
    let splitter = arguments.text("section_spliter")?;
    let pattern = format!(r"{SPACE}?{}{SPACE}?\d+{SPACE}?", strip(&splitter));
    let splitter = arguments.pattern("section_spliter", &pattern, Pattern::verbatim)?;
    let number = arguments.number("num_sections")?;
    // Python's split returns the groups of the pattern too, and all that it returns is counted.
    Ok(Box::new(move |response| splitter.count(response) * (1 + splitter.groups()) >= number))
}

pub fn json_format(_: &mut Arguments) -> Result<Check, Error> {
    Ok(Box::new(|response| {
        let mut text = strip(response);
        for opening in ["```json", "```Json", "```JSON", "```"] {
            text = text.strip_prefix(opening).unwrap_or(text);
        }
        json::is_json(strip(text.strip_suffix("```").unwrap_or(text)))
    }))
}

pub fn title(_: &mut Arguments) -> Result<Check, Error> {
    static TITLE: LazyLock<Regex> = LazyLock::new(|| fixed(r"<<[^\n]+>>"));
    let text = |title: &str| title.trim_start_matches('<').trim_end_matches('>').to_owned();
    Ok(Box::new(move |response| TITLE.find_iter(response).any(|found| !strip(&text(found.as_str())).is_empty())))
}
