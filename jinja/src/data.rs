//! Python's texts of plain data (`str`, `repr`, `json.dumps`), and plain data of such a text (`ast.literal_eval`).

use std::sync::LazyLock;

use serde_json::{Map, Number, Value as Json};

use crate::error::Result;
use crate::lexer::quoted;
use crate::value::Value;
use crate::{Options, Settings, Template};

/// `str(value)`.
#[must_use]
pub fn str(value: &Json) -> String {
    match value {
        Json::String(s) => s.clone(),
        other => repr(other),
    }
}

/// `repr(value)`; nothing for what is nested deeper than any JSON that was read.
#[must_use]
pub fn repr(value: &Json) -> String {
    Value::from_json(value).repr().unwrap_or_default()
}

/// `json.dumps(value, indent=2, ensure_ascii=False)`, which is what transformers' `tojson` gives.
///
/// # Errors
/// When the value is nested deeper than any JSON that was read.
pub fn dumps(value: Json) -> Result<String> {
    static DUMPS: LazyLock<Result<Template>> =
        LazyLock::new(|| Template::parse("{{ value | tojson(indent=2) }}", Settings::CHAT));
    let unbounded = Options { steps: u64::MAX, max_text: usize::MAX, now: None };
    let template = DUMPS.as_ref().map_err(Clone::clone)?;
    template.render(&Map::from_iter([("value".to_owned(), value)]), &unbounded)
}

/// `ast.literal_eval(text)`: strings, numbers, lists, tuples (as lists), dicts (their keys as texts), `True`, `False`, `None`.
///
/// # Errors
/// What is wrong, and before what.
pub fn literal(text: &str) -> std::result::Result<Json, String> {
    let mut reader = Reader { rest: text, depth: 0 };
    let value = reader.value()?;
    match reader.peek() {
        None => Ok(value),
        Some(_) => Err(reader.unexpected("the end")),
    }
}

/// Brackets within each other at most, as Python has it.
const MAX_DEPTH: usize = 200;

struct Reader<'a> {
    rest: &'a str,
    depth: usize,
}

impl Reader<'_> {
    /// What comes after white space.
    fn peek(&mut self) -> Option<char> {
        self.rest = self.rest.trim_start();
        self.rest.chars().next()
    }

    fn skip(&mut self, c: char) -> bool {
        let found = self.peek() == Some(c);
        if found {
            self.rest = &self.rest[c.len_utf8()..];
        }
        found
    }

    fn unexpected(&self, expected: &str) -> String {
        match self.rest.chars().take(20).collect::<String>() {
            rest if rest.is_empty() => format!("expected {expected}, found the end"),
            rest => format!("expected {expected}, found {rest:?}"),
        }
    }

    fn value(&mut self) -> std::result::Result<Json, String> {
        if self.skip('[') {
            return Ok(self.items(']', Self::value)?.0.into());
        }
        if self.skip('(') {
            let (mut items, comma) = self.items(')', Self::value)?;
            return Ok(if items.len() == 1 && !comma { items.remove(0) } else { items.into() });
        }
        if self.skip('{') {
            let pair = |r: &mut Self| {
                let key = r.value()?;
                if r.skip(':') { Ok((str(&key), r.value()?)) } else { Err(r.unexpected("`:`")) }
            };
            return Ok(Json::Object(self.items('}', pair)?.0.into_iter().collect()));
        }
        if !matches!(self.peek(), Some('\'' | '"')) {
            return self.word();
        }
        let mut text = String::new();
        // Python joins strings that stand next to each other.
        while matches!(self.peek(), Some('\'' | '"')) {
            let (more, length) = quoted(self.rest).map_err(|e| e.message)?;
            if self.rest[..length].replace("\\\n", "").contains('\n') {
                return Err("a string ends at the end of its line".into());
            }
            text += &more;
            self.rest = &self.rest[length..];
        }
        Ok(text.into())
    }

    /// What stands between brackets, and whether a comma ends it.
    fn items<T>(
        &mut self,
        close: char,
        item: impl Fn(&mut Self) -> std::result::Result<T, String>,
    ) -> std::result::Result<(Vec<T>, bool), String> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(format!("brackets are nested deeper than {MAX_DEPTH} levels"));
        }
        let (mut items, mut comma) = (Vec::new(), true);
        while !self.skip(close) {
            if !comma {
                return Err(self.unexpected(&format!("`,` or `{close}`")));
            }
            items.push(item(self)?);
            comma = self.skip(',');
        }
        self.depth -= 1;
        Ok((items, comma))
    }

    fn word(&mut self) -> std::result::Result<Json, String> {
        let ends = |c: char| !(c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.' | '_'));
        let word = &self.rest[..self.rest.find(ends).unwrap_or(self.rest.len())];
        let digits = word.trim_start_matches(['+', '-']);
        let padded = digits.len() > 1 && digits.starts_with('0') && digits.bytes().all(|b| b.is_ascii_digit());
        let float = || word.parse().ok().filter(|_| digits.contains(|c: char| c.is_ascii_digit()));
        let value = match word {
            "None" => Json::Null,
            "True" => true.into(),
            "False" => false.into(),
            _ if padded && digits.bytes().any(|b| b != b'0') => return Err(self.unexpected("a value")),
            _ => match word.parse::<i64>() {
                Ok(whole) => whole.into(),
                Err(_) => float().and_then(Number::from_f64).ok_or_else(|| self.unexpected("a value"))?.into(),
            },
        };
        self.rest = &self.rest[word.len()..];
        Ok(value)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn values_are_written_as_python_writes_them() {
        let value = json!(["it's", "say \"x\"", "both ' and \"", 1, 2.0, 1e16, 1e-5, null, true, {"a": "\n\u{a0}é"}]);
        let python = r#"["it's", 'say "x"', 'both \' and "', 1, 2.0, 1e+16, 1e-05, None, True, {'a': '\n\xa0é'}]"#;
        assert_eq!(repr(&value), python);
        assert_eq!(str(&json!("it's")), "it's");
    }

    #[test]
    fn json_is_laid_out_as_python_lays_it_out() {
        let value = json!({"a": [1, 1e16, {}], "b": [], "é\n": null});
        let python = "{\n  \"a\": [\n    1,\n    1e+16,\n    {}\n  ],\n  \"b\": [],\n  \"é\\n\": null\n}";
        assert_eq!(dumps(value).unwrap(), python);
    }

    #[test]
    fn literals_are_read_as_python_reads_them() {
        let value = json!(["it's \\ \n\u{200b}\u{1f600}", -1, 2.5, null, [true, {"k": []}]]);
        assert_eq!(literal(&repr(&value)), Ok(value));
        for (text, expected) in [
            ("('a', )", json!(["a"])),
            ("('a' 'b')", json!("ab")),
            (r#"[ "a\q\101" ]"#, json!(["a\\qA"])),
            ("[.5, 1., 1e3, +2, 00]", json!([0.5, 1.0, 1000.0, 2, 0])),
            ("{'a': 1, 2: (), }", json!({"a": 1, "2": []})),
        ] {
            assert_eq!(literal(text), Ok(expected), "{text}");
        }
    }

    #[test]
    fn what_is_no_literal_is_refused() {
        assert_eq!(literal("[1, foo()]"), Err("expected a value, found \"foo()]\"".into()));
        assert_eq!(literal("['a'"), Err("expected `,` or `]`, found the end".into()));
        for text in ["['a] ", "", "[none]", "[true]", "[01]", "['a\nb']", "[1] 2", "[,]", "[a]"] {
            assert!(literal(text).is_err(), "{text}");
        }
        assert!(literal(&"[".repeat(100_000)).unwrap_err().contains("nested deeper"));
    }
}
