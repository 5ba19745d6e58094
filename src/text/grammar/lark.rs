//! Parts of grammars in llguidance's dialect of Lark, as text.

use std::fmt::Write;

use serde_json::Value;

use super::GrammarError;
use super::schema::Enforced;

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

/// A grammar whose JSON schemas (`%json {…}`) are enforced, or refused, as schemas by themselves are.
///
/// # Errors
/// What of a schema cannot be enforced. What else is wrong with the grammar is for who compiles it.
pub(super) fn with_enforced(text: &str) -> Result<String, GrammarError> {
    let (mut out, mut rest) = (String::with_capacity(text.len()), text);
    while let Some(first) = rest.chars().next() {
        let length = if rest.starts_with("%json") {
            let (schema, length) = match json_after(rest, "%json") {
                Some(found) => found,
                None => return Err(GrammarError::Grammar("`%json` is followed by no JSON".to_owned())),
            };
            out.push_str("%json ");
            out.push_str(&enforced(&schema)?.to_string());
            rest = &rest[length..];
            continue;
        } else if let Some((_, length)) = json_after(rest, "%regex").or_else(|| json_after(rest, "%llguidance")) {
            length
        } else if first == '#' || rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if first == '"' || first == '/' {
            quoted(rest, first)
        } else if first == '<' {
            token_name(rest)
        } else {
            first.len_utf8()
        };
        out.push_str(&rest[..length]);
        rest = &rest[length..];
    }
    Ok(out)
}

fn enforced(schema: &Value) -> Result<Value, GrammarError> {
    if schema.get("x-guidance").is_some() {
        let detail = "it has no say here: how JSON is written is the same for all schemas".to_owned();
        return Err(GrammarError::Schema { place: "#/x-guidance".to_owned(), detail });
    }
    Ok(Enforced::new(schema)?.for_llguidance())
}

/// The JSON behind a keyword that `text` begins with, and the bytes of both.
fn json_after(text: &str, keyword: &str) -> Option<(Value, usize)> {
    let mut values = serde_json::Deserializer::from_str(text.strip_prefix(keyword)?).into_iter::<Value>();
    let value = values.next()?.ok()?;
    Some((value, keyword.len() + values.byte_offset()))
}

/// Bytes of the string or regular expression that `text` begins with; of the mark alone where it does not end.
fn quoted(text: &str, mark: char) -> usize {
    let mut escaped = false;
    let end = text.char_indices().skip(1).find(|(_, c)| {
        let ends = *c == mark && !escaped;
        escaped = *c == '\\' && !escaped;
        ends
    });
    end.map_or(1, |(at, _)| at + 1)
}

/// Bytes of a token's name in angle brackets.
fn token_name(text: &str) -> usize {
    let end = text[1..].find(|c: char| c.is_whitespace() || matches!(c, '<' | '>')).map_or(1, |at| at + 1);
    if text[end..].starts_with('>') { end + 1 } else { 1 }
}
