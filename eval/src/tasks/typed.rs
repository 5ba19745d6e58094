//! Values of a task file as the types they must have, by serde; errors know file, line and key.

use std::fmt::Display;

use serde::Deserialize;
use serde::de::{
    self, DeserializeOwned, DeserializeSeed, Deserializer, Expected, IntoDeserializer, MapAccess, SeqAccess,
    Unexpected, Visitor,
};
use serde::forward_to_deserialize_any;
use serde_json::Value;

use super::{
    Error, nearest,
    yaml::{Kind, Node},
};

/// Keys that lm-evaluation-harness knows and this evaluator does not support, and why.
const REFUSED: [(&str, &str); 7] = [
    ("process_docs", "it names Python code; prepare the data file beforehand"),
    ("class", "it names Python code; write the task as YAML"),
    ("custom_dataset", "it names Python code; write the data to a file"),
    ("use_prompt", "promptsource is not built in; write the prompt as `doc_to_text`"),
    ("doc_to_image", "only text is evaluated"),
    ("doc_to_audio", "only text is evaluated"),
    ("fewshot_indices", "lm-evaluation-harness ignores it too; list the examples as `samples`"),
];

/// A text, or `!function name` as such.
#[derive(Clone, Debug, Deserialize)]
pub struct Callable(pub String);

/// What is wrong with a value, and where once that is known.
#[derive(Debug)]
pub enum Fault {
    /// It is of another type.
    Type(String),
    /// It means nothing.
    Value(String),
    /// A key that should, or should not, be there.
    Key(String),
    Unknown {
        key: String,
        nearest: String,
    },
    Placed(Box<Error>),
}

impl Fault {
    /// The fault at a value. A Python function is more telling than all else.
    fn at(self, node: &Node) -> Self {
        let (file, line, key) = (node.file.to_string(), node.line, &node.key);
        let message = match (self, function(node)) {
            (Self::Placed(error), _) => return Self::Placed(error),
            (_, Some((node, function))) => {
                let (file, line, key) = (node.file.to_string(), node.line, node.key.to_string());
                return Self::Placed(Box::new(Error::Function { file, line, key, function: function.into() }));
            }
            (Self::Unknown { key, nearest }, _) => {
                return Self::Placed(Box::new(Error::UnknownKey { file, line, key, nearest }));
            }
            (Self::Type(expected), _) => format!("`{key}` must be {expected}, found {}", node.describe()),
            (Self::Value(message), _) => format!("`{key}`: {message}"),
            (Self::Key(message), _) => message,
        };
        Self::Placed(Box::new(Error::File { file, line, message }))
    }
}

fn function(node: &Node) -> Option<(&Node, &str)> {
    match &node.kind {
        Kind::Scalar(_) => None,
        Kind::Function(name) => Some((node, name)),
        Kind::List(nodes) | Kind::Map(nodes) => nodes.iter().find_map(function),
    }
}

impl de::Error for Fault {
    fn custom<T: Display>(message: T) -> Self {
        Self::Value(message.to_string())
    }

    fn invalid_type(_: Unexpected, expected: &dyn Expected) -> Self {
        let expected = expected.to_string();
        Self::Type(match expected.as_str() {
            "usize" => "a count".into(),
            "i64" => "a whole number".into(),
            "a boolean" => "true or false".into(),
            "a string" => "a text".into(),
            "a map" => "a mapping (`key: value`)".into(),
            other if other.starts_with("struct") || other.contains("enum") => "a mapping (`key: value`)".into(),
            _ => expected,
        })
    }

    fn invalid_value(found: Unexpected, expected: &dyn Expected) -> Self {
        Self::invalid_type(found, expected)
    }

    fn unknown_variant(variant: &str, known: &'static [&'static str]) -> Self {
        let nearest = nearest(variant, known.iter().copied());
        Self::Value(format!("{variant:?} is not one of {}; the nearest is {nearest:?}", known.join(", ")))
    }

    fn unknown_field(key: &str, known: &'static [&'static str]) -> Self {
        match REFUSED.iter().find(|(refused, _)| *refused == key) {
            Some((_, reason)) => Self::Key(format!("key `{key}` is not supported: {reason}")),
            None => Self::Unknown { key: key.into(), nearest: nearest(key, known.iter().copied()) },
        }
    }

    fn missing_field(key: &'static str) -> Self {
        let reason = match key {
            "doc_to_text" | "doc_to_target" => ": every task needs one (a Jinja template or the name of a field)",
            "doc_to_choice" => ": multiple choice needs one (a list, a Jinja template or the name of a field)",
            "dataset_path" => ": it names the data's format (json, csv, text, parquet) or its folder",
            "data_files" => {
                ": a format needs the files of each split, as `dataset_kwargs: {data_files: {test: a.jsonl}}`"
            }
            "test_split" => ": name the split to evaluate on, as `test_split` or `validation_split`",
            _ => "",
        };
        Self::Key(format!("`{key}` is missing{reason}"))
    }
}

impl std::error::Error for Fault {}

impl Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "{self:?}")
    }
}

impl From<Fault> for Error {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::Placed(error) => *error,
            other => Self::File { file: String::new(), line: 0, message: other.to_string() },
        }
    }
}

impl Node {
    /// The value as a `T`. What may be one value or a list of several is a `Vec`.
    pub fn read<T: DeserializeOwned>(&self) -> Result<T, Error> {
        Ok(T::deserialize(self)?)
    }

    /// Of a mapping, what is not in `others` as a `T`; both are known keys.
    pub fn read_beside<T: DeserializeOwned>(&self, others: &[&str]) -> Result<T, Error> {
        let own: Vec<&str> = self.entries().iter().map(|n| &*n.key).filter(|key| !others.contains(key)).collect();
        let kept = if matches!(self.kind, Kind::Map(_)) { &self.only(&own) } else { self };
        kept.read().map_err(|mut error| {
            if let Error::UnknownKey { key, nearest: known, .. } = &mut error {
                *known = nearest(key, others.iter().copied().chain([known.as_str()]));
            }
            error
        })
    }

    /// The error that a value means nothing.
    pub fn wrong(&self, message: impl Into<String>) -> Error {
        Fault::Value(message.into()).at(self).into()
    }

    /// The error that a key is not there.
    pub fn missing(&self, key: &'static str) -> Error {
        <Fault as de::Error>::missing_field(key).at(self).into()
    }
}

impl<'de> Deserializer<'de> for &'de Node {
    type Error = Fault;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        let value = match &self.kind {
            Kind::Scalar(Value::Bool(b)) => visitor.visit_bool(*b),
            Kind::Scalar(Value::Number(n)) => match (n.as_i64(), n.as_f64()) {
                (Some(n), _) => visitor.visit_i64(n),
                (None, n) => visitor.visit_f64(n.unwrap_or(f64::NAN)),
            },
            Kind::Scalar(Value::String(s)) => visitor.visit_str(s),
            Kind::Scalar(_) => visitor.visit_unit(),
            Kind::List(items) => visitor.visit_seq(Nodes::new(items.iter())),
            Kind::Map(entries) => visitor.visit_map(Nodes::new(entries.iter())),
            Kind::Function(_) => Err(Fault::Type("a value".into())),
        };
        value.map_err(|fault| fault.at(self))
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        if self.is_null() { visitor.visit_none() } else { visitor.visit_some(self) }
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        visitor.visit_seq(Nodes::new(self.as_items().iter())).map_err(|fault| fault.at(self))
    }

    /// A key without a value is as good as not there.
    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Fault> {
        let Kind::Map(entries) = &self.kind else { return self.deserialize_any(visitor) };
        let is_known = |n: &Node| fields.contains(&&*n.key) || REFUSED.iter().any(|(key, _)| *key == &*n.key);
        let entries = entries.iter().filter(|n| !n.is_null() || !is_known(n));
        visitor.visit_map(Nodes::new(entries)).map_err(|fault| fault.at(self))
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Fault> {
        let value = match &self.kind {
            Kind::Scalar(Value::String(variant)) => visitor.visit_enum(variant.as_str().into_deserializer()),
            _ => Err(Fault::Type("a text".into())),
        };
        value.map_err(|fault: Fault| fault.at(self))
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, name: &'static str, visitor: V) -> Result<V::Value, Fault> {
        match &self.kind {
            Kind::Function(f) if name == "Callable" => {
                visitor.visit_newtype_struct(format!("!function {f}").into_deserializer())
            }
            _ => visitor.visit_newtype_struct(self),
        }
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        visitor.visit_unit()
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct tuple
        tuple_struct map identifier
    }
}

/// Items of a list or entries of a mapping. What a type finds wrong with a value after it was read is placed there too.
struct Nodes<'n, I> {
    left: I,
    /// The entry whose key was read.
    entry: Option<&'n Node>,
}

impl<'n, I: Iterator<Item = &'n Node>> Nodes<'n, I> {
    fn new(nodes: I) -> Self {
        Self { left: nodes, entry: None }
    }
}

impl<'de, I: Iterator<Item = &'de Node>> SeqAccess<'de> for Nodes<'de, I> {
    type Error = Fault;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, Fault> {
        self.left.next().map(|node| seed.deserialize(node).map_err(|fault| fault.at(node))).transpose()
    }
}

impl<'de, I: Iterator<Item = &'de Node>> MapAccess<'de> for Nodes<'de, I> {
    type Error = Fault;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Fault> {
        self.entry = self.left.next();
        let read = |node: &'de Node| seed.deserialize((*node.key).into_deserializer()).map_err(|f: Fault| f.at(node));
        self.entry.map(read).transpose()
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Fault> {
        let node = self.entry.take().ok_or_else(|| Fault::Value("a value without a key".into()))?;
        seed.deserialize(node).map_err(|fault| fault.at(node))
    }
}
