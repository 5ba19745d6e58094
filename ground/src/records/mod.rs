//! The one reader of data: what a file holds, told by its content first and its name second, as a text or as records.
//!
//! Text, JSON (a list, or an object around one), JSON lines, CSV, TSV and Parquet; gzip and Zstandard; a byte order mark
//! and any line ends; standard input as `-`. What looks like JSON and cannot be understood is refused, never taken for
//! text.

mod csv;
mod error;
mod json;
mod parquet;
mod paths;
mod raw;

use std::borrow::Cow;
use std::ops::Range;
use std::path::Path;

use serde_json::Value;

pub use self::csv::Table;
pub use self::error::RecordsError;
pub use self::paths::{Files, distinct_file_names, distinct_names, expand, same_file_twice};
pub use self::raw::{STDIN, bytes, decode, parse_json, plain_line_ends, read_json, read_text, without_mark};

/// What a file holds.
#[derive(Clone, Debug)]
pub enum Content {
    /// A text with `\n` at the ends of lines.
    Text(String),
    Records(Records),
}

/// How a file is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Text,
    /// A list, an object around one, lines, or values one after the other.
    Json,
    /// Columns apart by this character.
    Separated(u8),
    Parquet,
}

/// Endings of names that tell a format, in the order in which they are looked for where only the name before is known.
pub const ENDINGS: [(&str, Format); 8] = [
    ("jsonl", Format::Json),
    ("json", Format::Json),
    ("ndjson", Format::Json),
    ("csv", Format::Separated(b',')),
    ("tsv", Format::Separated(b'\t')),
    ("parquet", Format::Parquet),
    ("txt", Format::Text),
    ("text", Format::Text),
];

/// Endings of compressed files that are read.
pub const COMPRESSED: [&str; 4] = ["gz", "gzip", "zst", "zstd"];

impl Format {
    /// The format that a file's name tells, in whatever case, compressed or not.
    #[must_use]
    pub fn of(path: &Path) -> Option<Self> {
        let name = path.file_name()?.to_string_lossy().to_lowercase();
        let (mut stem, mut ending) = name.rsplit_once('.')?;
        if COMPRESSED.contains(&ending) {
            (stem, ending) = stem.rsplit_once('.')?;
        }
        let known = ENDINGS.iter().find(|(e, _)| *e == ending && !stem.is_empty());
        known.map(|(_, format)| *format)
    }
}

/// Reads a file, or standard input for `-`.
///
/// # Errors
/// A file that cannot be read or unpacked, or whose content is not what it seems to be, with the line.
pub fn read(path: &Path) -> Result<Content, RecordsError> {
    let bytes = bytes(path)?;
    let named = Format::of(path);
    if bytes.starts_with(parquet::MAGIC) || named == Some(Format::Parquet) {
        return Ok(Content::Records(Records::parquet(path)?));
    }
    let file = path.display().to_string();
    let text = decode(&file, bytes)?;
    let records = match named {
        Some(Format::Json) => Records::json(path, text)?,
        Some(Format::Separated(separator)) => Table::read(&file, &text, separator)?.records(),
        _ if json::looks_like_json(&text) => Records::json(path, text).map_err(|e| match e {
            RecordsError::Wrong { file, line, message } => {
                RecordsError::Wrong { file, line, message: format!("looks like JSON but is not: {message}") }
            }
            other => other,
        })?,
        _ => return Ok(Content::Text(plain_line_ends(text))),
    };
    Ok(Content::Records(records))
}

/// Values of a file, one for each example.
#[derive(Clone, Debug)]
pub struct Records {
    file: String,
    items: Items,
    /// Where each begins, from 1; empty where the format has no lines.
    lines: Vec<usize>,
    /// Whether errors name the item too: lines do not tell which.
    in_list: bool,
}

#[derive(Clone, Debug)]
enum Items {
    /// Made when asked for: as text they take a tenth of the memory.
    Json(String, Vec<Range<usize>>),
    Values(Vec<Value>),
}

impl Records {
    /// The records of a JSON text: the items of a list, of the only list of objects in an object (or its `data`), or the
    /// values that stand one after the other.
    ///
    /// # Errors
    /// What is no JSON, with its line.
    pub fn json(path: &Path, text: String) -> Result<Self, RecordsError> {
        let file = path.display().to_string();
        if let Some(rows) = json::wrapped(&text) {
            return Ok(Self { file, items: Items::Values(rows), lines: Vec::new(), in_list: true });
        }
        let json::Split { places, lines, in_list } = json::split(&file, &text)?;
        Ok(Self { file, items: Items::Json(text, places), lines, in_list })
    }

    /// The rows of a Parquet file.
    ///
    /// # Errors
    /// What is no Parquet file; any, without the feature `parquet`.
    pub fn parquet(path: &Path) -> Result<Self, RecordsError> {
        let items = Items::Values(parquet::read(path)?);
        Ok(Self { file: path.display().to_string(), items, lines: Vec::new(), in_list: true })
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        match &self.items {
            Items::Json(_, places) => places.len(),
            Items::Values(values) => values.len(),
        }
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The value of record `i`.
    ///
    /// # Errors
    /// Where it cannot be represented (half of a surrogate pair), with its place.
    pub fn get(&self, i: usize) -> Result<Cow<'_, Value>, RecordsError> {
        match &self.items {
            Items::Values(values) => Ok(Cow::Borrowed(&values[i])),
            Items::Json(text, places) => {
                let value = serde_json::from_str(&text[places[i].clone()]);
                value.map(Cow::Owned).map_err(|e| self.wrong(i, json::said(&e)))
            }
        }
    }

    /// That record `i` is wrong.
    #[must_use]
    pub fn wrong(&self, i: usize, message: impl Into<String>) -> RecordsError {
        let item = if self.in_list { format!("item {}: ", i + 1) } else { String::new() };
        let (file, line) = (self.file.clone(), self.lines.get(i).copied().unwrap_or(1));
        RecordsError::Wrong { file, line, message: item + &message.into() }
    }
}

/// What a value is, for messages.
#[must_use]
pub fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
