//! Parts of grammars in llguidance's dialect of Lark, as text.

use std::fmt::Write;

/// A string that stands for exactly this text.
pub(super) fn literal(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c < ' ' || c == '\u{7F}' => _ = write!(out, "\\u{:04X}", u32::from(c)),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

/// A regular expression of Rust's syntax.
pub(super) fn regex(expression: &str) -> String {
    // The empty one has no place between slashes.
    if expression.is_empty() { "\"\"".to_owned() } else { format!("/{}/", llguidance::regex_to_lark(expression, "")) }
}

/// A token by its id.
pub(super) fn token(id: u32) -> String {
    format!("<[{id}]>")
}

/// Rules or terminals, one of which it is.
pub(super) fn any_of(options: &[String]) -> String {
    if let [one] = options { one.clone() } else { format!("({})", options.join(" | ")) }
}
