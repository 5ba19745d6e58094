//! `json.dumps` as Python writes it: models were trained on its exact spaces, escapes and numbers.

use std::fmt::Write;

use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{Error, ErrorKind, Value};

/// Deeper nesting than this is refused, before it exhausts the stack (Python's own limit is about 1000).
const MAX_DEPTH: usize = 128;

/// The filter `tojson` as transformers defines it for chat templates:
/// `tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`. Unlike Jinja2's own it escapes no
/// HTML. Source: transformers, utils/chat_template_utils.py, `_compile_jinja_template`.
///
/// # Errors
/// Arguments of the wrong kind, and values that JSON cannot write (undefined, functions).
pub(super) fn tojson(value: &Value, args: Rest<Value>, kwargs: Kwargs) -> Result<Value, Error> {
    let given = |place: usize, name: &str| -> Result<Option<Value>, Error> {
        let value = match args.get(place) {
            Some(value) => Some(value.clone()),
            None => kwargs.get::<Option<Value>>(name)?,
        };
        Ok(value.filter(|value| !value.is_none()))
    };
    let ensure_ascii = given(0, "ensure_ascii")?.is_some_and(|yes| yes.is_true());
    let indent = given(1, "indent")?;
    let separators = given(2, "separators")?;
    let sort_keys = given(3, "sort_keys")?.is_some_and(|yes| yes.is_true());
    kwargs.assert_all_used()?;

    let indent = indent.as_ref().map(indent_text).transpose()?;
    let default_item = if indent.is_some() { "," } else { ", " };
    let (item_separator, key_separator) = match separators {
        Some(pair) => (pair.get_item_by_index(0)?.to_string(), pair.get_item_by_index(1)?.to_string()),
        None => (default_item.to_owned(), ": ".to_owned()),
    };
    let mut writer = Writer { out: String::new(), ensure_ascii, sort_keys, indent, item_separator, key_separator };
    writer.value(value, 0)?;
    Ok(Value::from(writer.out))
}

/// One level of indentation: a number of spaces, or a text.
fn indent_text(value: &Value) -> Result<String, Error> {
    if let Some(text) = value.as_str() {
        return Ok(text.to_owned());
    }
    let spaces =
        value.as_i64().filter(|&n| n <= 64).ok_or_else(|| invalid(format!("tojson: cannot indent by {value:?}")))?;
    // Python indents by nothing for negative numbers.
    Ok(" ".repeat(usize::try_from(spaces).unwrap_or(0)))
}

struct Writer {
    out: String,
    ensure_ascii: bool,
    sort_keys: bool,
    indent: Option<String>,
    item_separator: String,
    key_separator: String,
}

impl Writer {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            return Err(invalid(format!("tojson: value nested deeper than {MAX_DEPTH} levels")));
        }
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(bool_text(value)),
            ValueKind::Number => self.out.push_str(&number_text(value)),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.group('[', ']', &items, depth, |writer, item| writer.value(item, depth + 1))?;
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort_keys {
                    keys.sort();
                }
                self.group('{', '}', &keys, depth, |writer, key| {
                    writer.key(key)?;
                    writer.out.push_str(&writer.key_separator);
                    writer.value(&value.get_item(key)?, depth + 1)
                })?;
            }
            other => {
                return Err(invalid(format!("tojson: an {other} value cannot be written as JSON")));
            }
        }
        Ok(())
    }

    fn group(
        &mut self,
        open: char,
        close: char,
        items: &[Value],
        depth: usize,
        mut write: impl FnMut(&mut Writer, &Value) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.out.push(open);
        for (index, item) in items.iter().enumerate() {
            if index > 0 {
                self.out.push_str(&self.item_separator);
            }
            self.new_line(depth + 1);
            write(self, item)?;
        }
        if !items.is_empty() {
            self.new_line(depth);
        }
        self.out.push(close);
        Ok(())
    }

    fn new_line(&mut self, depth: usize) {
        if let Some(indent) = &self.indent {
            self.out.push('\n');
            for _ in 0..depth {
                self.out.push_str(indent);
            }
        }
    }

    fn key(&mut self, key: &Value) -> Result<(), Error> {
        match key.kind() {
            ValueKind::String => self.string(key.as_str().unwrap_or_default()),
            ValueKind::None => self.string("null"),
            ValueKind::Bool => self.string(bool_text(key)),
            ValueKind::Number => self.string(&number_text(key)),
            other => {
                return Err(invalid(format!("tojson: an {other} value cannot be a key of a JSON object")));
            }
        }
        Ok(())
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                c if c < ' ' || (self.ensure_ascii && !(' '..='~').contains(&c)) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        // Writing to a String cannot fail.
                        let _ = write!(self.out, "\\u{unit:04x}");
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}

fn bool_text(value: &Value) -> &'static str {
    if value.is_true() { "true" } else { "false" }
}

fn number_text(value: &Value) -> String {
    if value.is_integer() {
        return value.to_string();
    }
    f64::try_from(value.clone()).map_or_else(|_| value.to_string(), float_text)
}

/// A float as Python's `repr` and `json.dumps` write it: the shortest digits that read back the same, with an exponent
/// below 1e-4 and from 1e16 on. Source: CPython, Python/pystrtod.c, `float_repr_style`.
pub(super) fn float_text(x: f64) -> String {
    if x.is_nan() {
        return "NaN".to_owned();
    }
    if x.is_infinite() {
        return if x > 0.0 { "Infinity" } else { "-Infinity" }.to_owned();
    }
    let scientific = format!("{x:e}");
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if x == 0.0 || (-4..16).contains(&exponent) {
        // Display never uses an exponent, and writes no fraction for a whole number.
        let text = x.to_string();
        return if text.contains('.') { text } else { text + ".0" };
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{mantissa}e{sign}{:02}", exponent.abs())
}

fn invalid(detail: String) -> Error {
    Error::new(ErrorKind::InvalidOperation, detail)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_are_written_as_python_writes_them() {
        // Right-hand sides printed by CPython 3.12, `json.dumps(x)`.
        for (x, text) in [
            (1.0, "1.0"),
            (-0.0, "-0.0"),
            (0.1, "0.1"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e300, "1.5e+300"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (1.25e-7, "1.25e-07"),
            (123456789.125, "123456789.125"),
        ] {
            assert_eq!(float_text(x), text);
        }
    }
}
