//! Reads typed, range-checked values out of a JSON file, so that every error names the file and the key.

use std::path::{Path, PathBuf};

use recoup_eval::foreign::foreign;
use recoup_eval::records::without_mark;
use serde_json::Value;

use super::error::{CheckpointError, Result};

/// Larger JSON files than this are neither configuration nor index (that of half a
/// million tensors has about 50 MB); parsed, hostile ones take some 16 times their size.
const MAX_JSON_BYTES: u64 = 64 << 20;

/// A JSON object together with where it came from.
#[derive(Clone, Debug)]
pub struct Object {
    file: PathBuf,
    /// Dotted path of this object inside the file, with a trailing dot; empty at the root.
    prefix: String,
    value: Value,
}

impl Object {
    /// Reads `file` as one JSON object.
    ///
    /// # Errors
    /// When the file cannot be read, is no JSON, or is no object.
    pub fn read(file: &Path) -> Result<Self> {
        let io = |source| CheckpointError::Io { path: file.into(), action: "read", source };
        let length = std::fs::metadata(file).map_err(io)?.len();
        if length > MAX_JSON_BYTES {
            return Err(CheckpointError::Json {
                file: file.into(),
                detail: format!("{length} bytes is more than a configuration file can have"),
            });
        }
        let text = std::fs::read(file).map_err(io)?;
        let value: Value = serde_json::from_slice(without_mark(&text)).map_err(|e| {
            let detail = foreign(&text).map_or_else(|| e.to_string(), |what| format!("it is {what}"));
            CheckpointError::Json { file: file.into(), detail }
        })?;
        if !value.is_object() {
            return Err(CheckpointError::Json { file: file.into(), detail: "expected an object at the top".into() });
        }
        Ok(Self { file: file.into(), prefix: String::new(), value })
    }

    /// The object `value`, which was made from `file`.
    ///
    /// # Errors
    /// When it is no object.
    pub fn of(file: &Path, value: Value) -> Result<Self> {
        if !value.is_object() {
            return Err(CheckpointError::Json { file: file.into(), detail: "expected an object at the top".into() });
        }
        Ok(Self { file: file.into(), prefix: String::new(), value })
    }

    /// The file this object came from.
    #[must_use]
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// Dotted path of `key` inside the file.
    #[must_use]
    pub fn path(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    /// The raw value.
    #[must_use]
    pub fn value(&self) -> &Value {
        &self.value
    }

    /// The error that says what `key` should have been.
    #[must_use]
    pub fn error(&self, key: &str, expected: impl Into<String>) -> CheckpointError {
        let found = match self.value.get(key) {
            None => "nothing".into(),
            Some(v) => shorten(&v.to_string()),
        };
        CheckpointError::Config { file: self.file.clone(), key: self.path(key), expected: expected.into(), found }
    }

    /// The value of `key`; absent and null are the same.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.value.get(key).filter(|v| !v.is_null())
    }

    /// An object under `key`, if there is one.
    ///
    /// # Errors
    /// When the key holds something else.
    pub fn object(&self, key: &str) -> Result<Option<Self>> {
        match self.get(key) {
            None => Ok(None),
            Some(v) if v.is_object() => {
                Ok(Some(Self { file: self.file.clone(), prefix: format!("{}{key}.", self.prefix), value: v.clone() }))
            }
            Some(_) => Err(self.error(key, "an object")),
        }
    }

    /// The objects under `key`, an object of objects, in file order.
    ///
    /// # Errors
    /// When the key or one of its entries holds something else.
    pub fn objects(&self, key: &str) -> Result<Vec<(String, Self)>> {
        let Some(outer) = self.object(key)? else { return Ok(Vec::new()) };
        let names: Vec<String> = outer.value.as_object().map(|m| m.keys().cloned().collect()).unwrap_or_default();
        names
            .into_iter()
            .map(|name| {
                let inner = outer.object(&name)?.ok_or_else(|| outer.error(&name, "an object"))?;
                Ok((name, inner))
            })
            .collect()
    }

    /// A string, if there is one.
    ///
    /// # Errors
    /// When the key holds something else.
    pub fn string(&self, key: &str) -> Result<Option<&str>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some(s)),
            Some(_) => Err(self.error(key, "a string")),
        }
    }

    /// A list of strings; absent is empty.
    ///
    /// # Errors
    /// When the key holds something else.
    pub fn strings(&self, key: &str) -> Result<Vec<String>> {
        let Some(v) = self.get(key) else { return Ok(Vec::new()) };
        v.as_array()
            .and_then(|a| a.iter().map(|s| s.as_str().map(str::to_owned)).collect())
            .ok_or_else(|| self.error(key, "a list of strings"))
    }

    /// A boolean, `default` where absent.
    ///
    /// # Errors
    /// When the key holds something else.
    pub fn bool_or(&self, key: &str, default: bool) -> Result<bool> {
        match self.get(key) {
            None => Ok(default),
            Some(Value::Bool(b)) => Ok(*b),
            Some(_) => Err(self.error(key, "true or false")),
        }
    }

    /// A whole number within `range`, if there is one.
    ///
    /// # Errors
    /// When the key holds something else or a number outside the range.
    pub fn integer(&self, key: &str, range: std::ops::RangeInclusive<usize>) -> Result<Option<usize>> {
        let Some(v) = self.get(key) else { return Ok(None) };
        v.as_u64()
            .and_then(|v| usize::try_from(v).ok())
            .filter(|v| range.contains(v))
            .map(Some)
            .ok_or_else(|| self.error(key, format!("a whole number from {} to {}", range.start(), range.end())))
    }

    /// A whole number within `range` that must be there.
    ///
    /// # Errors
    /// As [`Self::integer`], and when it is missing.
    pub fn required_integer(&self, key: &str, range: std::ops::RangeInclusive<usize>) -> Result<usize> {
        let message = format!("a whole number from {} to {}", range.start(), range.end());
        self.integer(key, range)?.ok_or_else(|| self.error(key, message))
    }

    /// A number that is positive and finite in f32 too, if there is one.
    ///
    /// # Errors
    /// When the key holds something else.
    pub fn positive_f32(&self, key: &str) -> Result<Option<f32>> {
        match self.positive(key)?.map(|v| v as f32) {
            Some(v) if !v.is_normal() => Err(self.error(key, "a positive finite number, not outside the range of f32")),
            v => Ok(v),
        }
    }

    /// A positive finite number, if there is one.
    ///
    /// # Errors
    /// When the key holds something else.
    pub fn positive(&self, key: &str) -> Result<Option<f64>> {
        let Some(v) = self.get(key) else { return Ok(None) };
        v.as_f64()
            .filter(|v| v.is_finite() && *v > 0.0)
            .map(Some)
            .ok_or_else(|| self.error(key, "a positive finite number"))
    }
}

fn shorten(text: &str) -> String {
    const MOST: usize = 120;
    if text.chars().count() <= MOST { text.into() } else { text.chars().take(MOST).chain(['…']).collect() }
}
