//! What took time is kept in a file with its key, and given out again for the same key only.

use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::atomic::{NotWritten, write_atomically};

/// What `file` holds for `key`, or else what `make` gives, which is kept there. A file that cannot be read as such a value
/// is as good as none.
///
/// # Errors
/// Those of `make`; when the value cannot be written.
pub fn kept<T, E>(file: &Path, key: &Value, make: impl FnOnce() -> Result<T, E>) -> Result<T, E>
where
    T: Serialize + DeserializeOwned,
    E: From<NotWritten>,
{
    if let Some((of, found)) = found(file)
        && of == *key
    {
        return Ok(found);
    }
    let value = make()?;
    let text = json!({"of": key, "value": value}).to_string() + "\n";
    write_atomically(file, text.as_bytes())?;
    Ok(value)
}

/// What a file keeps, with its key; nothing where it cannot be read as such a value.
#[must_use]
pub fn found<T: DeserializeOwned>(file: &Path) -> Option<(Value, T)> {
    let text = std::fs::read_to_string(file).ok()?;
    let mut kept: Value = serde_json::from_str(&text).ok()?;
    Some((kept.get_mut("of")?.take(), serde_json::from_value(kept["value"].take()).ok()?))
}

/// The first place where two descriptions differ, `model.files.config.json`, and what stands there: found, then expected.
/// What is not there is null.
#[must_use]
pub fn difference<'v>(found: &'v Value, expected: &'v Value) -> Option<(String, &'v Value, &'v Value)> {
    below("", found, expected)
}

fn below<'v>(at: &str, found: &'v Value, expected: &'v Value) -> Option<(String, &'v Value, &'v Value)> {
    if let (Value::Object(a), Value::Object(b)) = (found, expected) {
        let mut keys = b.keys().chain(a.keys().filter(|k| !b.contains_key(*k)));
        return keys.find_map(|key| {
            let at = if at.is_empty() { key.clone() } else { format!("{at}.{key}") };
            below(&at, a.get(key).unwrap_or(&Value::Null), b.get(key).unwrap_or(&Value::Null))
        });
    }
    (found != expected).then(|| (at.to_owned(), found, expected))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_made_once_for_a_key_and_anew_for_another_or_of_a_damaged_file() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("value.json");
        let mut made = 0;
        let mut get = |key: Value| {
            let make = || -> Result<Vec<f64>, NotWritten> {
                made += 1;
                Ok(vec![f64::from(made), 0.1])
            };
            let value = kept(&file, &key, make).unwrap();
            assert_eq!(value[1], 0.1);
            value[0]
        };
        assert_eq!([get(json!({"model": "a"})), get(json!({"model": "a"}))], [1.0, 1.0]);
        assert_eq!([get(json!({"model": "b"})), get(json!({"model": "b"}))], [2.0, 2.0]);
        for damaged in ["{\"of\": {\"model\": \"b\"}, \"value\"", "{\"of\":{\"model\":\"b\"},\"value\":7}", "7"] {
            std::fs::write(&file, damaged).unwrap();
            assert!(get(json!({"model": "b"})) > 2.0, "{damaged}");
        }
    }

    #[test]
    fn what_fails_is_not_kept() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("value.json");
        let failing = || Err(NotWritten { path: "elsewhere".into(), source: std::io::ErrorKind::Other.into() });
        assert!(kept::<u8, NotWritten>(&file, &Value::Null, failing).is_err());
        assert!(!file.exists());
        let nowhere = file.join("below");
        assert!(kept::<u8, NotWritten>(&nowhere, &Value::Null, || Ok(1)).is_err());
    }

    #[test]
    fn the_first_difference_is_named_by_the_keys_that_it_lies_under() {
        let (found, expected) = (json!({"a": 1, "b": {"c": [1]}}), json!({"a": 1, "b": {"c": [2]}, "d": null}));
        let (at, one, other) = difference(&found, &expected).unwrap();
        assert_eq!((at.as_str(), one, other), ("b.c", &json!([1]), &json!([2])));
        assert_eq!(difference(&expected, &expected), None);
        assert_eq!(difference(&json!({"a": 1}), &json!({"a": 1, "d": null})), None, "not there is null");
        assert_eq!(difference(&json!({"e": 1}), &json!({})).unwrap().0, "e");
    }
}
