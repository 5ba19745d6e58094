//! Marks that a response must have, or must not.

use std::sync::LazyLock;

use regex::Regex;

use super::arguments::Arguments;
use super::patterns::{Pattern, fixed};
use super::text::{SPACE, strip};
use super::{Check, Error};

pub fn placeholders(arguments: &mut Arguments) -> Result<Check, Error> {
    static PLACEHOLDER: LazyLock<Regex> = LazyLock::new(|| fixed(r"\[.*?\]"));
    let number = arguments.number("num_placeholders")?;
    Ok(Box::new(move |response| PLACEHOLDER.find_iter(response).count() >= number))
}

pub fn postscript(arguments: &mut Arguments) -> Result<Check, Error> {
    let marker = arguments.text("postscript_marker")?;
    let pattern = match strip(&marker) {
        "P.P.S" => format!(r"p\.{SPACE}?p\.{SPACE}?s"),
        "P.S." => format!(r"p\.{SPACE}?s\."),
        other => other.to_lowercase(),
    };
    let marker = arguments.pattern("postscript_marker", &pattern, Pattern::verbatim)?;
    Ok(Box::new(move |response| marker.is_match(&response.to_lowercase())))
}

pub fn no_comma(_: &mut Arguments) -> Result<Check, Error> {
    Ok(Box::new(|response| !response.contains(',')))
}
