//! The named special tokens of a model (bos, eos, …): which strings its configuration files give them.

use std::path::Path;

use recoup_eval::records::without_mark;
use serde_json::{Map, Value};

use super::TextError;

/// The names that may hold one token.
/// Source: transformers, `SpecialTokensMixin.SPECIAL_TOKENS_ATTRIBUTES`.
const NAMES: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// The name that holds a list of tokens; transformers 5 calls it `extra_special_tokens`.
const LIST_NAME: &str = "additional_special_tokens";

/// Named special tokens, as `tokenizer_config.json` and `special_tokens_map.json` give them.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct SpecialTokens {
    named: Map<String, Value>,
    add_bos_token: Option<bool>,
}

impl SpecialTokens {
    /// Reads the two files of `folder`; either may be missing. `tokenizer_config.json` wins where both name a token.
    ///
    /// # Errors
    /// A file that is there but cannot be read, is not JSON, or names a token by something other than a string or an
    /// object with a string `content`.
    pub fn from_folder(folder: &Path) -> Result<SpecialTokens, TextError> {
        let mut tokens = SpecialTokens::default();
        for name in ["tokenizer_config.json", "special_tokens_map.json"] {
            let path = folder.join(name);
            if let Some(config) = read_json_object(&path)? {
                tokens.merge(&config, &path)?;
            }
        }
        Ok(tokens)
    }

    /// The string of a named token, for example `eos_token`; `None` when the model has none.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.named.get(name)?.as_str()
    }

    /// Names a token by hand.
    pub fn set(&mut self, name: &str, token: &str) {
        self.named.insert(name.to_owned(), token.into());
    }

    /// Whether encoding should begin with bos (`add_bos_token`); `None` leaves it to `tokenizer.json`.
    pub fn add_bos_token(&self) -> Option<bool> {
        self.add_bos_token
    }

    /// Name and value, as a chat template sees them.
    pub(super) fn named(&self) -> &Map<String, Value> {
        &self.named
    }

    fn merge(&mut self, config: &Map<String, Value>, path: &Path) -> Result<(), TextError> {
        for name in NAMES {
            if let Some(token) = config.get(name)
                && !token.is_null()
                && !self.named.contains_key(name)
            {
                self.named.insert(name.to_owned(), token_string(token, name, path)?.into());
            }
        }
        if let Some(Value::Array(list)) = config.get(LIST_NAME)
            && !self.named.contains_key(LIST_NAME)
        {
            let tokens: Result<Vec<Value>, TextError> =
                list.iter().map(|token| Ok(token_string(token, LIST_NAME, path)?.into())).collect();
            self.named.insert(LIST_NAME.to_owned(), Value::Array(tokens?));
        }
        match config.get("add_bos_token") {
            None | Some(Value::Null) => {}
            Some(Value::Bool(yes)) => self.add_bos_token = self.add_bos_token.or(Some(*yes)),
            Some(other) => {
                return Err(TextError::Invalid {
                    path: path.to_owned(),
                    detail: format!("`add_bos_token` must be true, false or null, found {other}"),
                });
            }
        }
        Ok(())
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
            detail: recoup_eval::foreign::foreign(&bytes).map_or_else(
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

/// A token is written as its string, or as an AddedToken object whose `content` is the string.
fn token_string(token: &Value, name: &str, path: &Path) -> Result<String, TextError> {
    token.as_str().or_else(|| token.get("content")?.as_str()).map(str::to_owned).ok_or_else(|| TextError::Invalid {
        path: path.to_owned(),
        detail: format!("`{name}` must be a string or an object with a string `content`, found {}", kind(token)),
    })
}
