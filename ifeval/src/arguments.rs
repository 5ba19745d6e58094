//! The arguments of one instruction, from JSON into types that cannot be wrong.

use serde_json::{Map, Value};

use super::Error;
use super::patterns::Pattern;

/// Arguments not yet asked for.
pub struct Arguments<'a> {
    instruction: &'a str,
    values: Map<String, Value>,
}

/// How a count compares to the number asked for.
#[derive(Clone, Copy)]
pub enum Relation {
    LessThan(usize),
    AtLeast(usize),
}

impl Relation {
    pub fn holds(self, count: usize) -> bool {
        match self {
            Self::LessThan(limit) => count < limit,
            Self::AtLeast(limit) => count >= limit,
        }
    }
}

impl<'a> Arguments<'a> {
    pub fn new(instruction: &'a str, kwargs: &Value) -> Result<Self, Error> {
        let Value::Object(values) = kwargs else {
            return Err(Error::NotAnObject { instruction: instruction.to_owned(), found: kwargs.to_string() });
        };
        let values = values.iter().filter(|(_, value)| !is_unset(value));
        Ok(Self { instruction, values: values.map(|(key, value)| (key.clone(), value.clone())).collect() })
    }

    pub fn text(&mut self, key: &'static str) -> Result<String, Error> {
        self.take(key, "a text", |value| value.as_str().map(str::to_owned))
    }

    /// One that `accepted` makes something of; `expected` says what it takes.
    pub fn choice<T>(
        &mut self,
        key: &'static str,
        expected: &'static str,
        accepted: impl Fn(&str) -> Option<T>,
    ) -> Result<T, Error> {
        self.take(key, expected, |value| value.as_str().and_then(&accepted))
    }

    pub fn number(&mut self, key: &'static str) -> Result<usize, Error> {
        self.take(key, "a whole number above zero", as_number)
    }

    pub fn number_up_to(&mut self, key: &'static str, limit: usize) -> Result<usize, Error> {
        self.take(key, "a whole number above zero, at most `num_paragraphs`", |value| {
            as_number(value).filter(|number| *number <= limit)
        })
    }

    pub fn relation(&mut self, number: &'static str, relation: &'static str) -> Result<Relation, Error> {
        let number = self.number(number)?;
        self.choice(relation, "`less than` or `at least`", |text| match text {
            "less than" => Some(Relation::LessThan(number)),
            "at least" => Some(Relation::AtLeast(number)),
            _ => None,
        })
    }

    /// A list of texts, each made a pattern.
    pub fn patterns(
        &mut self,
        key: &'static str,
        make: impl Fn(&str) -> Result<Pattern, regex::Error>,
    ) -> Result<Vec<Pattern>, Error> {
        let texts = self.take(key, "a list of texts", |value| {
            let texts = value.as_array()?.iter().map(|text| text.as_str().map(str::to_owned));
            texts.collect::<Option<Vec<_>>>()
        })?;
        texts.iter().map(|text| self.pattern(key, text, &make)).collect()
    }

    /// The pattern that `make` makes of a text which came with `key`.
    pub fn pattern(
        &self,
        key: &'static str,
        text: &str,
        make: impl Fn(&str) -> Result<Pattern, regex::Error>,
    ) -> Result<Pattern, Error> {
        make(text).map_err(|reason| Error::Pattern {
            instruction: self.instruction.to_owned(),
            key,
            pattern: text.to_owned(),
            reason: reason.to_string(),
        })
    }

    /// Refuses what the instruction did not ask for.
    pub fn finish(self) -> Result<(), Error> {
        match self.values.keys().next() {
            None => Ok(()),
            Some(key) => Err(Error::Unexpected { instruction: self.instruction.to_owned(), key: key.clone() }),
        }
    }

    fn take<T>(
        &mut self,
        key: &'static str,
        expected: &'static str,
        convert: impl Fn(&Value) -> Option<T>,
    ) -> Result<T, Error> {
        let instruction = || self.instruction.to_owned();
        let value = self.values.shift_remove(key).ok_or_else(|| Error::Missing {
            instruction: instruction(),
            key,
            expected,
        })?;
        convert(&value).ok_or_else(|| Error::Mistyped {
            instruction: instruction(),
            key,
            expected,
            found: value.to_string(),
        })
    }
}

/// What Python takes for false counts as not given.
fn is_unset(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::Bool(true) => false,
    }
}

/// Tables of numbers with gaps turn whole numbers into `3.0`.
fn as_number(value: &Value) -> Option<usize> {
    let number =
        value.as_f64().filter(|number| number.fract() == 0.0 && (1.0..=f64::from(u32::MAX)).contains(number))?;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "whole and within u32")]
    Some(number as usize)
}
