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
use std::path::Path;

use serde_json::Value;

pub use self::csv::Table;
pub use self::error::RecordsError;
pub use self::paths::{Files, distinct_file_names, distinct_names, expand, same_file_twice, short_name};
pub use self::raw::{
    STDIN, bytes, decode, parse_json, plain_line_ends, read_json, read_text, text_of, unpack, without_mark,
};

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
    match named {
        Some(Format::Json) => Ok(Content::Records(Records::json(path, text)?)),
        Some(Format::Separated(separator)) => Ok(Content::Records(Table::read(&file, &text, separator)?.records())),
        _ if json::looks_like_json(&text) => match Records::json(path, text) {
            Ok(records) => Ok(Content::Records(records)),
            Err(RecordsError::Wrong { file, line, message }) => {
                let message = format!("looks like JSON but is not: {message}");
                Err(RecordsError::Wrong { file, line, message })
            }
            Err(other) => Err(other),
        },
        _ => Ok(Content::Text(plain_line_ends(text))),
    }
}

/// Values of a file, one for each example.
#[derive(Clone, Debug)]
pub struct Records {
    file: String,
    items: Items,
}

#[derive(Clone, Debug)]
enum Items {
    /// Made when asked for: as text they take a tenth of the memory.
    Json { text: String, spans: Vec<json::Span>, list: bool },
    /// With the line at which each begins, where it is known.
    Rows(Vec<(Option<usize>, Value)>),
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
            return Ok(Self { file, items: Items::Rows(rows.into_iter().map(|v| (None, v)).collect()) });
        }
        let (spans, list) = json::split(&file, &text)?;
        Ok(Self { file, items: Items::Json { text, spans, list } })
    }

    /// The rows of a Parquet file.
    ///
    /// # Errors
    /// What is no Parquet file; any, without the feature `parquet`.
    pub fn parquet(path: &Path) -> Result<Self, RecordsError> {
        let rows = parquet::read(path)?;
        let items = Items::Rows(rows.into_iter().map(|v| (None, v)).collect());
        Ok(Self { file: path.display().to_string(), items })
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        match &self.items {
            Items::Json { spans, .. } => spans.len(),
            Items::Rows(rows) => rows.len(),
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
            Items::Rows(rows) => Ok(Cow::Borrowed(&rows[i].1)),
            Items::Json { text, spans, .. } => {
                let span = &spans[i];
                let value = serde_json::from_str(&text[span.from..span.to]);
                value.map(Cow::Owned).map_err(|e| self.wrong(i, json::said(&e)))
            }
        }
    }

    /// The line at which record `i` begins, from 1; 1 where the format has none.
    #[must_use]
    pub fn line(&self, i: usize) -> usize {
        match &self.items {
            Items::Json { spans, .. } => spans[i].line,
            Items::Rows(rows) => rows[i].0.unwrap_or(1),
        }
    }

    /// That record `i` is wrong.
    #[must_use]
    pub fn wrong(&self, i: usize, message: impl Into<String>) -> RecordsError {
        let message = message.into();
        let (file, line) = (self.file.clone(), self.line(i));
        let message = match &self.items {
            Items::Json { list: false, .. } | Items::Rows(_) if self.has_lines() => message,
            _ => format!("item {}: {message}", i + 1),
        };
        RecordsError::Wrong { file, line, message }
    }

    fn has_lines(&self) -> bool {
        match &self.items {
            Items::Json { list, .. } => !list,
            Items::Rows(rows) => rows.iter().all(|r| r.0.is_some()),
        }
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
