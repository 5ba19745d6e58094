//! How a response starts and ends.

use super::arguments::Arguments;
use super::text::strip;
use super::{Check, Error};

pub fn end_checker(arguments: &mut Arguments) -> Result<Check, Error> {
    let phrase = arguments.text("end_phrase")?;
    let phrase = strip(&phrase).to_lowercase();
    Ok(Box::new(move |response| strip(response).trim_matches('"').to_lowercase().ends_with(&phrase)))
}

pub fn quotation(_: &mut Arguments) -> Result<Check, Error> {
    Ok(Box::new(|response| {
        let text = strip(response);
        text.len() > 1 && text.starts_with('"') && text.ends_with('"')
    }))
}
