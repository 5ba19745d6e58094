//! Responses of two parts: two answers, or the prompt and an answer.

use super::arguments::Arguments;
use super::text::strip;
use super::{Check, Error};

pub fn two_responses(_: &mut Arguments) -> Result<Check, Error> {
    Ok(Box::new(|response| {
        let parts: Vec<&str> = response.split("******").map(strip).collect();
        let within = parts.get(1..parts.len() - 1).unwrap_or_default();
        let filled: Vec<&&str> = parts.iter().filter(|part| !part.is_empty()).collect();
        within.iter().all(|part| !part.is_empty()) && matches!(filled[..], [one, other] if one != other)
    }))
}

pub fn repeat_prompt(arguments: &mut Arguments) -> Result<Check, Error> {
    let prompt = arguments.text("prompt_to_repeat")?;
    let prompt = strip(&prompt).to_lowercase();
    Ok(Box::new(move |response| strip(response).to_lowercase().starts_with(&prompt)))
}
