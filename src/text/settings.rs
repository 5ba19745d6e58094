//! The JSON files beside a tokenizer: objects, and the flags in them.

use std::path::Path;

use recoup_ground::records::without_mark;
use serde_json::{Map, Value};

use super::TextError;

/// The text that a class is built from, beside `tokenizer.json`.
pub(super) struct Flags<'a> {
    pub config: &'a Map<String, Value>,
    /// Path of `tokenizer_config.json`, for messages.
    pub path: &'a Path,
}

impl Flags<'_> {
    /// A switch that may be missing.
    ///
    /// # Errors
    /// When it is neither true, false nor null.
    pub fn switch(&self, key: &str) -> Result<Option<bool>, TextError> {
        match self.config.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Bool(on)) => Ok(Some(*on)),
            Some(other) => Err(TextError::Invalid {
                path: self.path.to_owned(),
                detail: format!("`{key}` must be true, false or null, found {other}"),
            }),
        }
    }
}

/// Reads a JSON object; `None` when there is no such file.
pub(super) fn read_json_object(path: &Path) -> Result<Option<Map<String, Value>>, TextError> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(source) if source.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(source) => {
            return Err(TextError::Read { path: path.to_owned(), source, hint: "" });
        }
    };
    match serde_json::from_slice::<Value>(without_mark(&bytes)) {
        Ok(Value::Object(map)) => Ok(Some(map)),
        Ok(other) => Err(TextError::Invalid {
            path: path.to_owned(),
            detail: format!("expected a JSON object, found {}", kind(&other)),
        }),
        Err(error) => Err(TextError::Invalid {
            path: path.to_owned(),
            detail: recoup_ground::foreign::foreign(&bytes).map_or_else(
                || format!("not valid JSON ({error}); copy the file again from its source"),
                |what| format!("not valid JSON: it is {what}"),
            ),
        }),
    }
}

/// What kind of JSON value this is, for a message.
pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
