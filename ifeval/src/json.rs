//! Whether Python's `json.loads` takes a text: JSON, with NaN, infinities and halves of surrogate pairs besides.

use std::sync::LazyLock;

use regex::{Captures, Regex};
use serde::de::IgnoredAny;

use super::patterns::fixed;

/// Python turns no longer integer into a number (`sys.int_info.default_max_str_digits`).
const MAX_INTEGER_DIGITS: usize = 4300;

/// However deep: what is ignored is not read by recursion, and escapes in it are not decoded.
pub fn is_json(text: &str) -> bool {
    static STRING_OR_NUMBER: LazyLock<Regex> = LazyLock::new(|| {
        fixed(r#"(?s)"(?:[^"\\]|\\.)*"|(?<word>NaN|-?Infinity)|(?<integer>[0-9]+)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?"#)
    });
    let strict = STRING_OR_NUMBER.replace_all(text, |found: &Captures| {
        if found.name("word").is_some() {
            return "null".to_owned();
        }
        // With a fraction or an exponent it is no integer, and may be as long as it likes.
        match found.name("integer") {
            Some(integer) if integer.len() > MAX_INTEGER_DIGITS && integer.as_str() == &found[0] => {
                "too long".to_owned()
            }
            _ => found[0].to_owned(),
        }
    });
    serde_json::from_str::<IgnoredAny>(&strict).is_ok()
}
