//! The tokens that a model's configuration files name (bos, eos, …) and list, read as transformers 5 reads them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use tokenizers::AddedToken;

use super::TextError;
use super::classes::{Class, class_of, is_byte_level};
use super::settings::{Flags, kind, read_json_object};

/// The names that may hold one token, in the order in which new ones get their ids.
/// Source: transformers, `PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES`.
const NAMES: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// The name that holds a list of tokens, or names of the model's own (`image_token`) with a token each.
pub(super) const EXTRA: &str = "extra_special_tokens";

/// What [`EXTRA`] was called before transformers 5; counts only where that is missing or empty.
const ADDITIONAL: &str = "additional_special_tokens";

/// Named special tokens, as `tokenizer_config.json` and `special_tokens_map.json` give them.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct SpecialTokens {
    named: Map<String, Value>,
}

impl SpecialTokens {
    /// Reads the files of `folder` that name tokens; each may be missing. Where none names a token, the name that the class
    /// of the tokenizer gives it counts.
    ///
    /// # Errors
    /// A file that is there but cannot be read, is not JSON, or names a token by something other than a string or an
    /// object with a string `content`.
    pub fn from_folder(folder: &Path) -> Result<SpecialTokens, TextError> {
        let mut configured = Configured::from_folder(folder)?;
        let path = folder.join("tokenizer_config.json");
        let config = read_json_object(&path)?.unwrap_or_default();
        let model_path = folder.join("config.json");
        let model = read_json_object(&model_path)?;
        let byte_level = || std::fs::read(folder.join("tokenizer.json")).is_ok_and(|bytes| is_byte_level(&bytes));
        let flags = Flags { config: &config, path: &path };
        // What is to be said about the class, the tokenizer says.
        if let Class::Rebuilt(class) = class_of(&flags, (&model_path, model.as_ref()), byte_level, &mut Vec::new())? {
            configured.set_defaults(class.default_tokens());
        }
        Ok(configured.names())
    }

    /// The string of a named token, for example `eos_token`; `None` when the model has none.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.named.get(name)?.as_str()
    }

    /// Names a token by hand.
    pub fn set(&mut self, name: &str, token: &str) {
        self.named.insert(name.to_owned(), token.into());
    }

    /// Name and value, as a chat template sees them.
    pub(super) fn named(&self) -> &Map<String, Value> {
        &self.named
    }
}

/// A token with what a file says about it.
#[derive(Debug, Clone)]
pub(super) struct Token {
    pub content: String,
    pub special: bool,
    /// Whether it is written as its string alone, which is never equal to one written with flags.
    plain: bool,
    single_word: bool,
    lstrip: bool,
    rstrip: bool,
    /// Where no file says, what is special is not normalized, all else is.
    normalized: Option<bool>,
}

impl Token {
    fn special(content: &str) -> Token {
        Token {
            content: content.to_owned(),
            special: true,
            plain: true,
            single_word: false,
            lstrip: false,
            rstrip: false,
            normalized: None,
        }
    }

    pub(super) fn added(&self) -> AddedToken {
        AddedToken::from(self.content.clone(), self.special)
            .single_word(self.single_word)
            .lstrip(self.lstrip)
            .rstrip(self.rstrip)
            .normalized(self.normalized.unwrap_or(!self.special))
    }
}

/// Equal as objects of transformers are.
impl PartialEq for Token {
    fn eq(&self, other: &Token) -> bool {
        self.plain == other.plain && self.added() == other.added()
    }
}

impl From<AddedToken> for Token {
    fn from(token: AddedToken) -> Token {
        Token {
            content: token.content,
            special: token.special,
            plain: false,
            single_word: token.single_word,
            lstrip: token.lstrip,
            rstrip: token.rstrip,
            normalized: Some(token.normalized),
        }
    }
}

/// All that the configuration files beside `tokenizer.json` say about tokens.
#[derive(Debug, Default)]
pub(super) struct Configured {
    /// Tokens with a name, the seven common names first.
    pub named: Vec<(String, Token)>,
    /// Special tokens without one.
    pub extra: Vec<Token>,
    /// Tokens listed with their ids, by `added_tokens_decoder` or else by `added_tokens.json`.
    pub listed: BTreeMap<u32, Token>,
    /// Where `listed` was read, and by which key, for messages.
    pub listed_in: (PathBuf, &'static str),
    /// Names that a file gives, those that it gives as null included.
    given: BTreeSet<String>,
    /// Whether a file lists `extra`, if only as nothing.
    has_extra: bool,
}

impl Configured {
    /// Reads the files as transformers 5 does: where `tokenizer_config.json` has `added_tokens_decoder`, it is all there
    /// is; else `special_tokens_map.json` overrules it, and `added_tokens.json` lists tokens.
    /// Source: transformers 5.24, tokenization_utils_base.py, `_from_pretrained` and `__init__`.
    ///
    /// # Errors
    /// As [`SpecialTokens::from_folder`]; a list of tokens that is none.
    pub(super) fn from_folder(folder: &Path) -> Result<Configured, TextError> {
        let path = folder.join("tokenizer_config.json");
        let config = read_json_object(&path)?.unwrap_or_default();
        let mut named: Map<String, Value> = Map::new();
        let mut own = Configured { given: config.keys().cloned().collect(), ..Configured::default() };

        // Names of the model's own may be anything that ends in `_token`; switches such as `add_bos_token` are no strings.
        let is_object = |value: &Value| value.get("__type").is_some_and(|t| t == "AddedToken");
        for (name, value) in &config {
            let own_name = name.ends_with("_token") && (value.is_string() || is_object(value));
            if !value.is_null() && (NAMES.contains(&name.as_str()) || own_name) {
                named.insert(name.clone(), token(value, name, &path)?.0);
            }
        }
        let is_empty = |value: &Value| match value {
            Value::Null => true,
            Value::Array(list) => list.is_empty(),
            Value::Object(map) => map.is_empty(),
            _ => false,
        };
        let old = config.get(ADDITIONAL).filter(|_| config.get(EXTRA).is_none_or(is_empty));
        let key = if old.is_some() { ADDITIONAL } else { EXTRA };
        own.has_extra = true;
        match old.or(config.get(EXTRA)) {
            Some(Value::Object(map)) => {
                own.has_extra = false;
                for (name, value) in map {
                    named.insert(name.clone(), token(value, name, &path)?.0);
                }
                // Names and a list, under both keys: both count.
                if let Some(value) = config.get(ADDITIONAL).filter(|_| old.is_none()) {
                    own.extra = list(value, ADDITIONAL, &path)?;
                }
            }
            Some(value) => own.extra = list(value, key, &path)?,
            None => own.has_extra = false,
        }

        if let Some(listed) = config.get("added_tokens_decoder") {
            own.listed_in = (path.clone(), "added_tokens_decoder");
            let Value::Object(listed) = listed else {
                return Err(invalid(
                    &path,
                    format!("`added_tokens_decoder` must be an object, found {}", kind(listed)),
                ));
            };
            for (id, value) in listed {
                let number = id.parse().map_err(|_| {
                    invalid(&path, format!("`added_tokens_decoder` has the key `{id}`, expected a token id"))
                })?;
                if !value.is_object() {
                    let detail = format!("`added_tokens_decoder`, entry {id} is not an added token: {value}");
                    return Err(invalid(&path, detail));
                }
                own.listed.insert(number, token(value, &format!("added_tokens_decoder, entry {id}"), &path)?.1);
            }
        } else {
            let map_path = folder.join("special_tokens_map.json");
            let mut of_map: Map<String, Value> = Map::new();
            for (name, value) in read_json_object(&map_path)?.unwrap_or_default() {
                own.given.insert(name.clone());
                let is_common = NAMES.contains(&name.as_str());
                if value.is_null() {
                    if is_common {
                        named.retain(|known, _| *known != name);
                    }
                } else if name == EXTRA {
                    match &value {
                        Value::Object(map) => {
                            for (name, value) in map {
                                named.insert(name.clone(), token(value, name, &map_path)?.0);
                            }
                        }
                        _ => {
                            let mut more = list(&value, EXTRA, &map_path)?;
                            more.iter_mut().for_each(|token| token.special = true);
                            for token in more {
                                if !own.extra.contains(&token) {
                                    own.extra.push(token);
                                }
                            }
                            own.has_extra = true;
                        }
                    }
                } else if name == ADDITIONAL {
                    if !own.has_extra {
                        own.extra = list(&value, ADDITIONAL, &map_path)?;
                    }
                } else if is_common || name.ends_with("_token") {
                    let mut value = token(&value, &name, &map_path)?.0;
                    if let Value::Object(fields) = &mut value {
                        fields.insert("special".to_owned(), Value::Bool(true));
                    }
                    if is_common {
                        named.insert(name, value);
                    } else {
                        // Of a name of the model's own, the configuration has the last word, and this file the first place.
                        let value = named.get(&name).cloned().unwrap_or(value);
                        of_map.insert(name, value);
                    }
                }
            }
            for (name, value) in named {
                of_map.entry(name).or_insert(value);
            }
            named = of_map;
            own.listed_in = (folder.join("added_tokens.json"), "added_tokens.json");
            for (content, id) in read_json_object(&own.listed_in.0)?.unwrap_or_default() {
                let id = id.as_u64().and_then(|id| u32::try_from(id).ok()).ok_or_else(|| {
                    invalid(&own.listed_in.0, format!("`{content}` must have a token id, found {id}"))
                })?;
                let is_special =
                    NAMES.iter().filter_map(|name| named.get(*name)).any(|v| content_of(v) == Some(&content))
                        || own.extra.iter().any(|token| token.content == content);
                let token = Token { special: is_special, plain: false, ..Token::special(&content) };
                own.listed.insert(id, token);
            }
        }

        // The common names first, then the model's own in the order of the files.
        let first = NAMES.iter().filter_map(|name| Some((*name, named.get(*name)?)));
        let rest = named.iter().filter(|(name, _)| !NAMES.contains(&name.as_str())).map(|(n, v)| (n.as_str(), v));
        for (name, value) in first.chain(rest) {
            own.named.push((name.to_owned(), token(value, name, &path)?.1));
        }
        own.take_listed_flags();
        Ok(own)
    }

    /// Flags of a listed token count for its name, if it is one of the common ones.
    fn take_listed_flags(&mut self) {
        for (name, token) in &mut self.named {
            let listed = self.listed.values().find(|l| NAMES.contains(&name.as_str()) && l.content == token.content);
            if let Some(listed) = listed {
                token.clone_from(listed);
            }
        }
    }

    /// Whether `tokenizer_config.json` lists the added tokens, so that no other file is asked for them.
    pub(super) fn lists_all(&self) -> bool {
        self.listed_in.1 == "added_tokens_decoder"
    }

    /// Lists the added tokens of `tokenizer.json` as well, by their ids there; they overrule `added_tokens.json`.
    pub(super) fn list_more(&mut self, added: Vec<(u32, AddedToken)>) {
        self.listed.extend(added.into_iter().map(|(id, token)| (id, Token::from(token))));
        self.take_listed_flags();
    }

    /// Names tokens where no file does, as a class of transformers does; null in a file stays none.
    pub(super) fn set_defaults(&mut self, tokens: &[(&str, &str)]) {
        let given = std::mem::take(&mut self.named);
        let own = tokens.iter().map(|(name, _)| *name).filter(|name| !NAMES.contains(name));
        for name in NAMES.into_iter().chain(own) {
            let token = given.iter().find(|(given, _)| given == name).map(|(_, token)| token.clone());
            let default = tokens.iter().find(|(default, _)| *default == name && !self.given.contains(name));
            let token = token.or_else(|| default.map(|(_, content)| Token::special(content)));
            self.named.extend(token.map(|token| (name.to_owned(), token)));
        }
        // A class's tokens of its own are special ones without a name as well, where no file lists such.
        if !self.has_extra {
            let own = tokens.iter().filter(|(name, _)| !NAMES.contains(name));
            self.extra.extend(own.map(|(_, content)| Token::special(content)));
        }
        let rest = given.into_iter().filter(|(name, _)| !self.named.iter().any(|(known, _)| known == name));
        self.named.extend(rest.collect::<Vec<_>>());
    }

    /// The string of a named token.
    pub(super) fn content(&self, name: &str) -> Option<&str> {
        self.named.iter().find(|(known, _)| known == name).map(|(_, token)| token.content.as_str())
    }

    /// All tokens with a name, then the special ones without.
    pub(super) fn special(&self) -> impl Iterator<Item = &Token> {
        self.named.iter().map(|(_, token)| token).chain(&self.extra)
    }

    /// The strings of the named tokens.
    pub(super) fn names(&self) -> SpecialTokens {
        let mut named: Map<String, Value> =
            self.named.iter().map(|(name, token)| (name.clone(), token.content.clone().into())).collect();
        if !self.extra.is_empty() {
            // The name that templates of transformers 4 know.
            named.insert(ADDITIONAL.to_owned(), self.extra.iter().map(|t| Value::from(t.content.clone())).collect());
        }
        SpecialTokens { named }
    }
}

fn invalid(path: &Path, detail: String) -> TextError {
    TextError::Invalid { path: path.to_owned(), detail }
}

/// The string of a token's value.
fn content_of(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value.get("content")?.as_str())
}

/// A token is written as its string, or as an AddedToken object whose `content` is the string; returns the value and the
/// token.
fn token(value: &Value, name: &str, path: &Path) -> Result<(Value, Token), TextError> {
    let content = content_of(value).ok_or_else(|| {
        invalid(path, format!("`{name}` must be a string or an object with a string `content`, found {}", kind(value)))
    })?;
    let flag = |key: &str| match value.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Bool(flag)) => Ok(Some(*flag)),
        Some(other) => Err(invalid(path, format!("`{name}`: `{key}` must be true or false, found {}", kind(other)))),
    };
    let token = Token {
        content: content.to_owned(),
        special: flag("special")?.unwrap_or(value.is_string()),
        plain: value.is_string(),
        single_word: flag("single_word")?.unwrap_or(false),
        lstrip: flag("lstrip")?.unwrap_or(false),
        rstrip: flag("rstrip")?.unwrap_or(false),
        normalized: flag("normalized")?,
    };
    Ok((value.clone(), token))
}

/// A list of special tokens.
fn list(value: &Value, name: &str, path: &Path) -> Result<Vec<Token>, TextError> {
    match value {
        Value::Null => Ok(Vec::new()),
        Value::Array(list) => list.iter().map(|value| Ok(token(value, name, path)?.1)).collect(),
        other => Err(invalid(path, format!("`{name}` must be a list of tokens, found {}", kind(other)))),
    }
}
