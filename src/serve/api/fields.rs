//! The fields of a request, taken one by one: a wrong one is named, and so is one that nothing here knows.

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::serve::error::ApiError;

type Result<T> = std::result::Result<T, ApiError>;

/// Fields that change nothing of an answer and are let through: bookkeeping of OpenAI's, and switches of vLLM's for what is
/// always so here.
const WITHOUT_EFFECT: [&str; 13] = [
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "priority",
    "request_id",
    "verbosity",
    "prediction",
    "cache_salt",
    "spaces_between_special_tokens",
];

/// A request's fields that were not taken yet.
#[derive(Debug)]
pub struct Fields(Map<String, Value>);

impl Fields {
    /// Of a body.
    ///
    /// # Errors
    /// When it is no JSON object.
    pub fn read(body: &[u8]) -> Result<Self> {
        let value = serde_json::from_slice(body).map_err(|e| ApiError::bad(format!("the body is no JSON: {e}")))?;
        match value {
            Value::Object(fields) => Ok(Self(fields)),
            _ => Err(ApiError::bad("the body must be a JSON object")),
        }
    }

    /// Of an object within a request.
    #[must_use]
    pub fn of(fields: Map<String, Value>) -> Self {
        Self(fields)
    }

    /// Takes a field; null is as good as absent.
    ///
    /// # Errors
    /// When it has another type.
    pub fn take<T: DeserializeOwned>(&mut self, name: &str) -> Result<Option<T>> {
        match self.0.shift_remove(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match serde_json::from_value(value) {
                Ok(value) => Ok(Some(value)),
                Err(e) => Err(ApiError::parameter(name, format!("`{name}`: {e}"))),
            },
        }
    }

    /// Takes a field that must be there.
    ///
    /// # Errors
    /// When it is absent, null, or has another type.
    pub fn need<T: DeserializeOwned>(&mut self, name: &str) -> Result<T> {
        self.take(name)?.ok_or_else(|| ApiError::parameter(name, format!("`{name}` is missing")))
    }

    /// Takes a switch.
    ///
    /// # Errors
    /// When it is no boolean.
    pub fn switch(&mut self, name: &str, default: bool) -> Result<bool> {
        Ok(self.take(name)?.unwrap_or(default))
    }

    /// Takes a field that is refused unless it has one of the values that mean what happens anyway.
    ///
    /// # Errors
    /// When it has another value; `why` says what there is instead.
    pub fn refuse(&mut self, name: &str, harmless: &[Value], why: &str) -> Result<()> {
        match self.take::<Value>(name)? {
            Some(value) if !harmless.contains(&value) => {
                Err(ApiError::parameter(name, format!("`{name}` is not offered here: {why}")))
            }
            _ => Ok(()),
        }
    }

    /// That nothing is left.
    ///
    /// # Errors
    /// Names the first field that is not known: what is not understood would change nothing without a word.
    pub fn finish(self) -> Result<()> {
        match self.0.into_iter().find(|(name, value)| !value.is_null() && !WITHOUT_EFFECT.contains(&name.as_str())) {
            Some((name, _)) => {
                Err(ApiError::parameter(name.clone(), format!("`{name}`: no such parameter is known here")))
            }
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn fields(value: Value) -> Fields {
        Fields::read(value.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn what_is_wrong_is_named_and_so_is_what_is_not_known() {
        let mut f = fields(json!({"n": "two", "seed": null, "user": "u", "guided_jsn": {}}));
        let body = f.take::<usize>("n").unwrap_err().body();
        assert_eq!(body["error"]["param"], "n");
        assert_eq!(f.take::<u64>("seed").unwrap(), None);
        assert_eq!(f.finish().unwrap_err().body()["error"]["param"], "guided_jsn");
        assert!(fields(json!({"user": "u", "logit_bias": null})).finish().is_ok());
    }

    #[test]
    fn bodies_that_are_no_objects_are_refused() {
        let deep = format!("{{\"a\": {}1{}}}", "[".repeat(100_000), "]".repeat(100_000));
        for body in [&b"[]"[..], b"", b"{", b"\xff\xfe{}", b"{\"a\": NaN}", b"{\"a\": 1e999}", deep.as_bytes()] {
            assert_eq!(Fields::read(body).unwrap_err().status().as_u16(), 400);
        }
    }
}
