//! JSON as records: where each begins and ends. Values are made later, so that a large file is not held twice.

use std::ops::Range;

use serde::de::IgnoredAny;
use serde_json::{Deserializer, Value};

use super::RecordsError;

/// Where records stand in a text.
#[derive(Debug, Default)]
pub(super) struct Split {
    pub places: Vec<Range<usize>>,
    /// At which each begins, from 1.
    pub lines: Vec<usize>,
    /// Whether they are the items of a list.
    pub in_list: bool,
}

/// Lines that are looked at to tell whether a text is lines of JSON.
const LOOK: usize = 64;

/// Whether a text means to be JSON: an object with a key at its beginning, a list of such or of values to its end, or
/// lines of which most are objects. `[1] Smith et al.` and `{braces}` are text.
pub(super) fn looks_like_json(text: &str) -> bool {
    let text = text.trim_start();
    let lines: Vec<&str> = text.lines().map(str::trim_start).filter(|l| !l.is_empty()).take(LOOK).collect();
    if let Some(inside) = text.strip_prefix('[') {
        let whole = serde_json::from_str::<IgnoredAny>(text);
        // To its end, or cut off.
        let is_list = whole.map_or_else(|e| e.is_eof(), |_| true);
        let are_lists = || lines.iter().all(|l| serde_json::from_str::<Vec<Value>>(l).is_ok());
        if begins_object(inside.trim_start()) || is_list || are_lists() {
            return true;
        }
    }
    let objects = || lines.iter().filter(|l| begins_object(l) && serde_json::from_str::<IgnoredAny>(l).is_ok());
    begins_object(text) || lines.len() > 1 && 2 * objects().count() > lines.len()
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

/// The records of a JSON text.
pub(super) fn split(file: &str, text: &str) -> Result<Split, RecordsError> {
    let mut place = Place { text, at: 0, line: 1 };
    place.skip(0);
    if text[place.at..].starts_with('[')
        && let Some(items) = list(file, place)?
    {
        return Ok(items);
    }
    let mut found = Split::default();
    let mut stream = Deserializer::from_str(text).into_iter::<IgnoredAny>();
    loop {
        place.skip(stream.byte_offset());
        match stream.next() {
            None => return Ok(found),
            Some(Ok(IgnoredAny)) => found.push(&place, stream.byte_offset()),
            Some(Err(e)) => {
                let begun = place.line;
                let is_first = found.places.is_empty();
                let message = match place.next() {
                    Some(',') if !is_first => "a comma between values; a list of them stands in [ ]".to_owned(),
                    _ if begun < e.line() => {
                        format!("not a JSON document: {}, in what begins in line {begun}", said(&e))
                    }
                    _ => format!("not a JSON document: {}", said(&e)),
                };
                // What is wrong in lines of JSON is the line where the value begins, however far the parser read on.
                let line = if is_first && !e.is_eof() { e.line() } else { begun };
                return Err(RecordsError::Wrong { file: file.into(), line, message });
            }
        }
    }
}

/// The items of the list that begins at `place`, where it is all of the text. A list of numbers is one record: token ids.
fn list(file: &str, mut place: Place) -> Result<Option<Split>, RecordsError> {
    let mut items = Split { in_list: true, ..Split::default() };
    let Place { at: start, line, text } = place;
    place.skip(start + 1);
    while place.next() != Some(']') || !items.places.is_empty() {
        let wrong = |line, message: &str, where_: &str| {
            let message = format!("not a JSON document: {message}{where_}");
            Err(RecordsError::Wrong { file: file.into(), line, message })
        };
        let item = format!(", in item {} of the list", items.places.len() + 1);
        let mut stream = Deserializer::from_str(&text[place.at..]).into_iter::<IgnoredAny>();
        match stream.next() {
            Some(Ok(IgnoredAny)) => {}
            Some(Err(e)) => return wrong(place.line + e.line() - 1, &said(&e), &item),
            None => return wrong(place.line, "the list is not closed; the file may be cut off", &item),
        }
        let end = place.at + stream.byte_offset();
        items.push(&place, end);
        place.skip(end);
        match place.next() {
            Some(',') => place.skip(place.at + 1),
            Some(']') => break,
            found => {
                let found = found.map_or_else(|| "the end of the file".into(), |c| format!("`{c}`"));
                let after = format!(" after item {}, found {found}", items.places.len());
                return wrong(place.line, "expected `,` or `]`", &after);
            }
        }
    }
    let end = place.at + 1;
    if !text[end..].trim().is_empty() {
        // The first of several values.
        return Ok(None);
    }
    let is_number = |item: &Range<usize>| text[item.start..].starts_with(|c: char| c.is_ascii_digit() || c == '-');
    if !items.places.is_empty() && items.places.iter().all(is_number) {
        return Ok(Some(Split { places: std::iter::once(start..end).collect(), lines: vec![line], in_list: true }));
    }
    Ok(Some(items))
}

impl Split {
    fn push(&mut self, from: &Place, to: usize) {
        self.places.push(from.at..to);
        self.lines.push(from.line);
    }
}

/// A place in a text, and its line from 1.
#[derive(Clone, Copy)]
struct Place<'a> {
    text: &'a str,
    at: usize,
    line: usize,
}

impl Place<'_> {
    /// Goes on to what is no white space at `to` or after it.
    fn skip(&mut self, to: usize) {
        let to = self.text.len() - self.text[to..].trim_start().len();
        self.line += self.text.as_bytes()[self.at..to].iter().filter(|b| **b == b'\n').count();
        self.at = to;
    }

    fn next(&self) -> Option<char> {
        self.text[self.at..].chars().next()
    }
}

/// What serde_json says, without its place.
pub(super) fn said(e: &serde_json::Error) -> String {
    let text = e.to_string();
    text.rsplit_once(" at line ").map_or(text.clone(), |(said, _)| said.to_owned())
}
