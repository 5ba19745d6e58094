//! JSON as records: where each begins and ends. Values are made later, so that a large file is not held twice.

use serde::de::IgnoredAny;
use serde_json::{Deserializer, Value};

use super::RecordsError;

/// A record's place in the text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Span {
    pub from: usize,
    pub to: usize,
    /// From 1.
    pub line: usize,
}

/// Lines that are looked at to tell whether a text is lines of JSON.
const LOOK: usize = 64;

/// Whether a text means to be JSON: an object with a key at its beginning, a list of such or of values to its end, or
/// lines of which most are objects. `[1] Smith et al.` and `{braces}` are text.
pub(super) fn looks_like_json(text: &str) -> bool {
    let text = text.trim_start();
    if begins_object(text) {
        return true;
    }
    if let Some(inside) = text.strip_prefix('[') {
        if begins_object(inside.trim_start()) {
            return true;
        }
        // To its end, or cut off.
        match serde_json::from_str::<IgnoredAny>(text) {
            Ok(_) => return true,
            Err(e) if e.is_eof() => return true,
            Err(_) => {}
        }
        if text
            .lines()
            .take(LOOK)
            .filter(|l| !l.trim().is_empty())
            .all(|l| serde_json::from_str::<Vec<Value>>(l).is_ok())
        {
            return true;
        }
    }
    let lines: Vec<&str> = text.lines().filter(|l| !l.trim().is_empty()).take(LOOK).collect();
    let objects = lines.iter().filter(|l| begins_object(l.trim_start()) && serde_json::from_str::<Value>(l).is_ok());
    lines.len() > 1 && 2 * objects.count() > lines.len()
}

/// Whether `{ "key" :` stands at the beginning.
fn begins_object(text: &str) -> bool {
    let Some(key) = text.strip_prefix('{').map(str::trim_start).filter(|t| t.starts_with('"')) else { return false };
    let mut stream = Deserializer::from_str(key).into_iter::<IgnoredAny>();
    matches!(stream.next(), Some(Ok(_))) && key[stream.byte_offset()..].trim_start().starts_with(':')
}

/// The records of an object that only wraps a list of them: its `data`, or its one member
/// of a name that data sets give such a list.
pub(super) fn wrapped(text: &str) -> Option<Vec<Value>> {
    const WRAPPERS: [&str; 9] =
        ["rows", "examples", "records", "instances", "samples", "documents", "train", "test", "validation"];
    if !text.trim_start().starts_with('{') {
        return None;
    }
    let Value::Object(mut map) = serde_json::from_str(text).ok()? else { return None };
    let only = WRAPPERS.into_iter().find(|w| map.len() == 1 && map.contains_key(*w));
    let key = if map.contains_key("data") { "data" } else { only? };
    let Some(Value::Array(items)) = map.remove(key) else { return None };
    (!items.is_empty() && items.iter().all(Value::is_object)).then_some(items)
}

/// The records of a JSON text, and whether they are the items of a list.
pub(super) fn split(file: &str, text: &str) -> Result<(Vec<Span>, bool), RecordsError> {
    let start = text.len() - text.trim_start().len();
    if text[start..].starts_with('[')
        && let Some(items) = list(file, text, start)?
    {
        return Ok((items, true));
    }
    let mut spans = Vec::new();
    let mut line = Lines { text, at: 0, line: 1 };
    let mut stream = Deserializer::from_str(text).into_iter::<IgnoredAny>();
    loop {
        let before = stream.byte_offset();
        let from = before + (text[before..].len() - text[before..].trim_start().len());
        match stream.next() {
            None => return Ok((spans, false)),
            Some(Ok(IgnoredAny)) => spans.push(Span { from, to: stream.byte_offset(), line: line.of(from) }),
            Some(Err(e)) => {
                let begun = line.of(from);
                let message = match text[from..].chars().next() {
                    Some(',') if !spans.is_empty() => "a comma between values; a list of them stands in [ ]".to_owned(),
                    _ if begun < e.line() => {
                        format!("not a JSON document: {}, in what begins in line {begun}", said(&e))
                    }
                    _ => format!("not a JSON document: {}", said(&e)),
                };
                // What is wrong in lines of JSON is the line where the value begins, however far the parser read on.
                let line = if spans.is_empty() && !e.is_eof() { e.line() } else { begun };
                return Err(RecordsError::Wrong { file: file.into(), line, message });
            }
        }
    }
}

/// The items of the list that begins at `start`, where it is all of the text. A list of numbers is one record: token ids.
fn list(file: &str, text: &str, start: usize) -> Result<Option<Vec<Span>>, RecordsError> {
    let skip = |at: usize| at + (text[at..].len() - text[at..].trim_start().len());
    let mut line = Lines { text, at: 0, line: 1 };
    let mut items = Vec::new();
    let mut at = skip(start + 1);
    if !text[at..].starts_with(']') {
        loop {
            let begun = line.of(at);
            let mut stream = Deserializer::from_str(&text[at..]).into_iter::<IgnoredAny>();
            let wrong = |line: usize, message: String| RecordsError::Wrong {
                file: file.into(),
                line,
                message: format!("not a JSON document: {message}, in item {} of the list", items.len() + 1),
            };
            match stream.next() {
                Some(Ok(IgnoredAny)) => {}
                Some(Err(e)) => return Err(wrong(begun + e.line() - 1, said(&e))),
                None => return Err(wrong(begun, "the list is not closed; the file may be cut off".into())),
            }
            let to = at + stream.byte_offset();
            items.push(Span { from: at, to, line: begun });
            at = skip(to);
            match text[at..].chars().next() {
                Some(',') => at = skip(at + 1),
                Some(']') => break,
                found => {
                    let found = found.map_or_else(|| "the end of the file".into(), |c| format!("`{c}`"));
                    let message =
                        format!("not a JSON document: expected `,` or `]` after item {}, found {found}", items.len());
                    return Err(RecordsError::Wrong { file: file.into(), line: line.of(at), message });
                }
            }
        }
    }
    let end = at + 1;
    if !text[end..].trim().is_empty() {
        // The first of several values.
        return Ok(None);
    }
    let numbers = items.iter().all(|i| text[i.from..].starts_with(|c: char| c.is_ascii_digit() || c == '-'));
    if numbers && !items.is_empty() {
        let line = items[0].line;
        return Ok(Some(vec![Span { from: start, to: end, line }]));
    }
    Ok(Some(items))
}

/// Numbers of lines of places that come in ascending order.
struct Lines<'a> {
    text: &'a str,
    at: usize,
    line: usize,
}

impl Lines<'_> {
    fn of(&mut self, place: usize) -> usize {
        self.line += self.text.as_bytes()[self.at..place].iter().filter(|b| **b == b'\n').count();
        self.at = place;
        self.line
    }
}

/// What serde_json says, without its place.
pub(super) fn said(e: &serde_json::Error) -> String {
    let text = e.to_string();
    text.rsplit_once(" at line ").map_or(text.clone(), |(said, _)| said.to_owned())
}
