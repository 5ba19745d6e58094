//! Python's way of writing values as text and reading them back: what task files take for granted.

use serde_json::{Map, Number, Value};

pub use recoup_jinja::python::float;
use recoup_jinja::python::quoted;

/// `str(value)`.
#[must_use]
pub fn str(value: &Value) -> String {
    match value {
        Value::String(s) => s.clone(),
        other => repr(other),
    }
}

/// `repr(value)`.
#[must_use]
pub fn repr(value: &Value) -> String {
    match value {
        Value::Null => "None".into(),
        Value::Bool(true) => "True".into(),
        Value::Bool(false) => "False".into(),
        Value::Number(n) => number(n),
        Value::String(s) => quoted(s),
        Value::Array(items) => format!("[{}]", items.iter().map(repr).collect::<Vec<_>>().join(", ")),
        Value::Object(map) => {
            let items: Vec<String> = map.iter().map(|(k, v)| format!("{}: {}", quoted(k), repr(v))).collect();
            format!("{{{}}}", items.join(", "))
        }
    }
}

/// `json.dumps(value, indent=2, ensure_ascii=False)`.
#[must_use]
pub fn dumps(value: &Value) -> String {
    let mut out = String::new();
    dump(value, 0, &mut out);
    out
}

/// `str.isdigit()` for ASCII.
#[must_use]
pub fn is_digits(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit())
}

/// `ast.literal_eval(text)`: strings, numbers, lists, tuples (as lists), dicts with string keys, `True`, `False`, `None`.
///
/// # Errors
/// What is wrong, and at which character.
pub fn literal(text: &str) -> Result<Value, String> {
    // Python strips leading blanks, and white space counts for nothing at the end.
    let mut reader = Reader { chars: text.trim().chars().collect(), at: 0 };
    let value = reader.value()?;
    reader.space();
    if reader.at < reader.chars.len() { Err(reader.unexpected("the end")) } else { Ok(value) }
}

fn dump(value: &Value, depth: usize, out: &mut String) {
    let line = |depth: usize| format!("\n{}", "  ".repeat(depth));
    match value {
        Value::Array(items) if !items.is_empty() => {
            for (i, item) in items.iter().enumerate() {
                out.push_str(if i == 0 { "[" } else { "," });
                out.push_str(&line(depth + 1));
                dump(item, depth + 1, out);
            }
            out.push_str(&(line(depth) + "]"));
        }
        Value::Object(map) if !map.is_empty() => {
            for (i, (key, item)) in map.iter().enumerate() {
                out.push_str(if i == 0 { "{" } else { "," });
                out.push_str(&format!("{}{}: ", line(depth + 1), Value::from(key.as_str())));
                dump(item, depth + 1, out);
            }
            out.push_str(&(line(depth) + "}"));
        }
        Value::Number(n) => out.push_str(&number(n)),
        other => out.push_str(&other.to_string()),
    }
}

fn number(n: &Number) -> String {
    match n.as_f64() {
        Some(f) if n.is_f64() => float(f),
        _ => n.to_string(),
    }
}

struct Reader {
    chars: Vec<char>,
    at: usize,
}

impl Reader {
    fn peek(&self) -> Option<char> {
        self.chars.get(self.at).copied()
    }

    fn next(&mut self) -> Option<char> {
        let c = self.peek();
        self.at += 1;
        c
    }

    fn space(&mut self) {
        while self.peek().is_some_and(char::is_whitespace) {
            self.at += 1;
        }
    }

    fn unexpected(&self, expected: &str) -> String {
        match self.peek() {
            Some(c) => format!("expected {expected} at character {}, found {c:?}", self.at + 1),
            None => format!("expected {expected}, found the end"),
        }
    }

    fn value(&mut self) -> Result<Value, String> {
        self.space();
        match self.peek() {
            Some('[') => Ok(Value::Array(self.items(']')?.0)),
            Some('(') => {
                let (mut items, comma) = self.items(')')?;
                Ok(if items.len() == 1 && !comma { items.remove(0) } else { Value::Array(items) })
            }
            Some('{') => self.dict(),
            Some('\'' | '"') => {
                let mut text = String::new();
                // Python joins strings that stand next to each other.
                while let Some(quote @ ('\'' | '"')) = self.peek() {
                    self.at += 1;
                    self.string(quote, &mut text)?;
                    self.space();
                }
                Ok(Value::String(text))
            }
            _ => self.word(),
        }
    }

    fn items(&mut self, close: char) -> Result<(Vec<Value>, bool), String> {
        self.at += 1;
        let (mut items, mut comma) = (Vec::new(), false);
        loop {
            self.space();
            if self.peek() == Some(close) {
                self.at += 1;
                return Ok((items, comma));
            }
            items.push(self.value()?);
            self.space();
            comma = self.peek() == Some(',');
            if comma {
                self.at += 1;
            } else if self.peek() != Some(close) {
                return Err(self.unexpected(&format!("`,` or `{close}`")));
            }
        }
    }

    fn dict(&mut self) -> Result<Value, String> {
        self.at += 1;
        let mut map = Map::new();
        loop {
            self.space();
            if self.peek() == Some('}') {
                self.at += 1;
                return Ok(Value::Object(map));
            }
            let key = self.value()?;
            self.space();
            if self.next() != Some(':') {
                self.at -= 1;
                return Err(self.unexpected("`:`"));
            }
            map.insert(str(&key), self.value()?);
            self.space();
            match self.peek() {
                Some(',') => self.at += 1,
                Some('}') => {}
                _ => return Err(self.unexpected("`,` or `}`")),
            }
        }
    }

    fn string(&mut self, quote: char, out: &mut String) -> Result<(), String> {
        loop {
            match self.next() {
                Some(c) if c == quote => return Ok(()),
                Some('\\') => self.escape(out)?,
                Some('\n') => return Err("a string ends at the end of its line".into()),
                Some(c) => out.push(c),
                None => return Err(format!("a string that begins with {quote} does not end")),
            }
        }
    }

    fn escape(&mut self, out: &mut String) -> Result<(), String> {
        let c = self.next().ok_or("a string ends in a backslash")?;
        let width = match c {
            'x' => 2,
            'u' => 4,
            'U' => 8,
            '\n' => return Ok(()),
            simple => {
                match simple {
                    'n' => out.push('\n'),
                    't' => out.push('\t'),
                    'r' => out.push('\r'),
                    '0' => out.push('\0'),
                    '\\' | '\'' | '"' => out.push(simple),
                    // Python keeps the backslash of an escape that it does not know.
                    _ => out.extend(['\\', simple]),
                }
                return Ok(());
            }
        };
        let digits: String = (0..width).filter_map(|_| self.next()).collect();
        let decoded = u32::from_str_radix(&digits, 16).ok().and_then(char::from_u32);
        out.push(decoded.ok_or_else(|| format!("\\{c}{digits} is no character"))?);
        Ok(())
    }

    fn word(&mut self) -> Result<Value, String> {
        let start = self.at;
        while self.peek().is_some_and(|c| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.' | '_')) {
            self.at += 1;
        }
        let word: String = self.chars[start..self.at].iter().collect();
        match word.as_str() {
            "None" => return Ok(Value::Null),
            "True" => return Ok(Value::Bool(true)),
            "False" => return Ok(Value::Bool(false)),
            _ => {}
        }
        if let Ok(i) = word.parse::<i64>() {
            return Ok(i.into());
        }
        let float = word.parse::<f64>().ok().filter(|_| word.contains(|c: char| c.is_ascii_digit()));
        float.and_then(Number::from_f64).map(Value::Number).ok_or_else(|| {
            self.at = start;
            self.unexpected("a value")
        })
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
        assert_eq!(float(-0.1), "-0.1");
        assert_eq!(float(123456789012345680.0), "1.2345678901234568e+17");
        assert_eq!(float(f64::NEG_INFINITY), "-inf");
    }

    #[test]
    fn json_is_laid_out_as_python_lays_it_out() {
        let value = json!({"a": [1, 1e16, {}], "b": [], "é\n": null});
        assert_eq!(dumps(&value), "{\n  \"a\": [\n    1,\n    1e+16,\n    {}\n  ],\n  \"b\": [],\n  \"é\\n\": null\n}");
    }

    #[test]
    fn what_was_written_reads_back() {
        let value = json!(["it's \\ \n\u{200b}\u{1f600}", -1, 2.5, null, [true, {"k": []}]]);
        assert_eq!(literal(&repr(&value)), Ok(value));
        assert_eq!(literal("('a', )"), Ok(json!(["a"])));
        assert_eq!(literal("('a' 'b')"), Ok(json!("ab")));
        assert_eq!(literal(r#"[ "a\q" ]"#), Ok(json!(["a\\q"])));
    }

    #[test]
    fn what_is_no_literal_is_refused_with_its_place() {
        assert_eq!(literal("[1, foo()]"), Err("expected a value at character 5, found 'f'".into()));
        assert_eq!(literal("['a'"), Err("expected `,` or `]`, found the end".into()));
        assert!(literal("['a] ").is_err());
        assert!(literal("").is_err());
    }
}
