//! Reads typed, range-checked values out of a JSON file, so that every error names the file and the key.

use std::path::{Path, PathBuf};

use recoup_ground::foreign::foreign;
use recoup_ground::records::without_mark;
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
    /// Keys whose values were taken over from the object around it.
    inherited: Vec<&'static str>,
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
        let value = parse(&text).map_err(|e| {
            let detail = foreign(&text).map_or_else(|| e.to_string(), |what| format!("it is {what}"));
            CheckpointError::Json { file: file.into(), detail }
        })?;
        if !value.is_object() {
            return Err(CheckpointError::Json { file: file.into(), detail: "expected an object at the top".into() });
        }
        Ok(Self { file: file.into(), prefix: String::new(), value, inherited: Vec::new() })
    }

    /// The object `value`, which was made from `file`.
    ///
    /// # Errors
    /// When it is no object.
    pub fn of(file: &Path, value: Value) -> Result<Self> {
        if !value.is_object() {
            return Err(CheckpointError::Json { file: file.into(), detail: "expected an object at the top".into() });
        }
        Ok(Self { file: file.into(), prefix: String::new(), value, inherited: Vec::new() })
    }

    /// The file this object came from.
    #[must_use]
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// Dotted path of `key` inside the file.
    #[must_use]
    pub fn path(&self, key: &str) -> String {
        if self.inherited.contains(&key) { key.to_owned() } else { format!("{}{key}", self.prefix) }
    }

    /// With the values of these `keys` from `root`, the file's own object, where it has none itself.
    #[must_use]
    pub(super) fn inheriting(mut self, root: &Self, keys: &[&'static str]) -> Self {
        for &key in keys.iter().filter(|k| self.get(k).is_none()).collect::<Vec<_>>() {
            if let (Some(value), Some(map)) = (root.get(key), self.value.as_object_mut()) {
                map.insert(key.to_owned(), value.clone());
                self.inherited.push(key);
            }
        }
        self
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

    /// Whether `key` is there, if only as null.
    #[must_use]
    pub fn has(&self, key: &str) -> bool {
        self.value.get(key).is_some()
    }

    /// An object under `key`, if there is one.
    ///
    /// # Errors
    /// When the key holds something else.
    pub fn object(&self, key: &str) -> Result<Option<Self>> {
        match self.get(key) {
            None => Ok(None),
            Some(v) if v.is_object() => {
                let (file, prefix) = (self.file.clone(), format!("{}{key}.", self.prefix));
                Ok(Some(Self { file, prefix, value: v.clone(), inherited: Vec::new() }))
            }
            Some(_) => Err(self.error(key, "an object")),
        }
    }

    /// The object `value`, which is in this one under `path`.
    ///
    /// # Errors
    /// When it is no object.
    pub fn inside(&self, path: &str, value: &Value) -> Result<Self> {
        if !value.is_object() {
            let (found, key) = (shorten(&value.to_string()), self.path(path));
            return Err(CheckpointError::Config { file: self.file.clone(), key, expected: "an object".into(), found });
        }
        let prefix = format!("{}{path}.", self.prefix);
        Ok(Self { file: self.file.clone(), prefix, value: value.clone(), inherited: Vec::new() })
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
        whole(v)
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

    /// A list of numbers, which may be infinite, if there is one.
    ///
    /// # Errors
    /// When the key holds something else, or a NaN.
    pub fn numbers(&self, key: &str) -> Result<Option<Vec<f64>>> {
        let Some(v) = self.get(key) else { return Ok(None) };
        let numbers: Option<Vec<f64>> = v.as_array().and_then(|a| a.iter().map(number).collect());
        numbers.map(Some).ok_or_else(|| self.error(key, "a list of numbers"))
    }

    /// One id or a list of ids under `key`, as Hugging Face writes end-of-sequence tokens; absent is none.
    ///
    /// # Errors
    /// When the key holds something else.
    pub fn token_ids(&self, key: &str) -> Result<Vec<u32>> {
        let id = |v: &Value| whole(v).and_then(|v| u32::try_from(v).ok());
        let ids = match self.get(key) {
            None => Some(Vec::new()),
            Some(Value::Array(ids)) => ids.iter().map(id).collect(),
            Some(one) => id(one).map(|id| vec![id]),
        };
        ids.ok_or_else(|| self.error(key, "a token id or a list of them"))
    }
}

/// The whole number that `v` is, written as an integer or as a float: 32.0 is what some tools make of 32.
#[must_use]
pub fn whole(v: &Value) -> Option<u64> {
    // Above 2^53 a float is no longer one whole number.
    let float = |f: f64| (f.fract() == 0.0 && (0.0..=9_007_199_254_740_992.0).contains(&f)).then_some(f as u64);
    v.as_u64().or_else(|| v.as_f64().and_then(float))
}

/// The number that `v` is, [`parse`]'s infinities included; nothing of a NaN.
#[must_use]
pub fn number(v: &Value) -> Option<f64> {
    match v.get("__float__").and_then(Value::as_str) {
        Some("Infinity") => Some(f64::INFINITY),
        Some("-Infinity") => Some(f64::NEG_INFINITY),
        _ => v.as_f64(),
    }
}

/// Parses JSON as Python writes it: a bare `Infinity`, `-Infinity` or `NaN`, which JSON does not have, becomes
/// `{"__float__": "Infinity"}`, transformers 5's own spelling of the same.
///
/// # Errors
/// Where and why the text is no JSON.
pub fn parse(text: &[u8]) -> serde_json::Result<Value> {
    let text = without_mark(text);
    serde_json::from_slice(text).or_else(|e| match without_bare_floats(text) {
        Some(text) => serde_json::from_slice(&text),
        None => Err(e),
    })
}

/// `text` with the numbers that only Python writes respelled; `None` where it holds none.
fn without_bare_floats(text: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len());
    let (mut at, mut in_string, mut found) = (0, false, false);
    while let Some(&byte) = text.get(at) {
        let rest = &text[at..];
        if !in_string
            && let Some(name) = ["-Infinity", "Infinity", "NaN"].iter().find(|n| rest.starts_with(n.as_bytes()))
        {
            out.extend_from_slice(format!("{{\"__float__\": \"{name}\"}}").as_bytes());
            (at, found) = (at + name.len(), true);
            continue;
        }
        if in_string && byte == b'\\' {
            out.extend_from_slice(&rest[..rest.len().min(2)]);
            at += 2;
            continue;
        }
        in_string ^= byte == b'"';
        out.push(byte);
        at += 1;
    }
    found.then_some(out)
}

fn shorten(text: &str) -> String {
    const MOST: usize = 120;
    if text.chars().count() <= MOST { text.into() } else { text.chars().take(MOST).chain(['…']).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn floats_that_only_python_writes_become_transformers_own_spelling_outside_of_strings() {
        let text = br#"{"limit": [0.0, Infinity], "low": -Infinity, "a": NaN, "s": "NaN \" Infinity"}"#;
        let inf = |s: &str| json!({"__float__": s});
        let expected = json!({"limit": [0.0, inf("Infinity")], "low": inf("-Infinity"), "a": inf("NaN"),
            "s": "NaN \" Infinity"});
        assert_eq!(parse(text).unwrap(), expected);
        assert!(parse(b"{\"a\": Infinit}").is_err() && parse(b"{\"a\": \"NaN").is_err());
    }

    #[test]
    fn infinities_are_numbers_and_nan_is_none() {
        let read = |limit: &str| {
            let value = parse(format!("{{\"limit\": {limit}}}").as_bytes()).unwrap();
            Object::of(Path::new("config.json"), value).unwrap().numbers("limit").map_err(|e| e.to_string())
        };
        let open = Ok(Some(vec![0.0, f64::INFINITY]));
        assert_eq!(read("[0.0, Infinity]"), open);
        assert_eq!(read("[0, {\"__float__\": \"Infinity\"}]"), open);
        assert_eq!(read("[-Infinity, 1e308]"), Ok(Some(vec![f64::NEG_INFINITY, 1e308])));
        assert_eq!(read("null"), Ok(None));
        for bad in ["[0, NaN]", "[\"Infinity\"]", "Infinity", "[{\"__float__\": 1}]"] {
            assert!(read(bad).unwrap_err().contains("`limit`: expected a list of numbers"), "{bad}");
        }
    }

    #[test]
    fn a_wrapper_gives_what_its_text_model_leaves_out_and_errors_name_where_it_stands() {
        let value = json!({"eos_token_id": "x", "text_config": {"hidden_size": "y", "tie_word_embeddings": true},
            "tie_word_embeddings": false});
        let root = Object::of(Path::new("config.json"), value).unwrap();
        let text = root.object("text_config").unwrap().unwrap();
        let text = text.inheriting(&root, &["eos_token_id", "tie_word_embeddings"]);
        assert!(text.bool_or("tie_word_embeddings", false).unwrap());
        assert!(text.token_ids("eos_token_id").unwrap_err().to_string().contains("`eos_token_id`"));
        assert!(text.integer("hidden_size", 1..=2).unwrap_err().to_string().contains("`text_config.hidden_size`"));
    }

    #[test]
    fn a_whole_number_may_be_written_as_a_float_and_nothing_else_is_one() {
        assert_eq!([json!(32), json!(32.0), json!(3.2e1)].map(|v| whole(&v)), [Some(32); 3]);
        assert_eq!([json!(32.5), json!(-1.0), json!("32"), json!(1e300)].map(|v| whole(&v)), [None; 4]);
    }
}
