//! `json.dumps` as Python writes it: models were trained on its exact spaces, escapes and numbers.

use std::fmt::Write;

use crate::error::{Error, Result};
use crate::python::float;
use crate::render::Renderer;
use crate::value::{MAX_NESTING, Value};

/// How a value is written.
#[derive(Clone, Debug)]
pub struct Style {
    pub ensure_ascii: bool,
    pub sort_keys: bool,
    /// One level of indentation.
    pub indent: Option<String>,
    pub item_separator: String,
    pub key_separator: String,
}

/// `json.dumps(value)` in this style.
pub fn dumps(r: &mut Renderer, value: &Value, style: &Style) -> Result<String> {
    let mut out = String::new();
    write(r, &mut out, value, style, 0)?;
    r.charge_bytes(out.len())?;
    Ok(out)
}

fn write(r: &mut Renderer, out: &mut String, value: &Value, style: &Style, depth: usize) -> Result<()> {
    if depth > MAX_NESTING {
        return Err(Error::failed(format!("tojson: a value is nested deeper than {MAX_NESTING} levels")));
    }
    r.charge(1)?;
    r.charge_bytes(out.len() / 64)?;
    let line = |out: &mut String, depth: usize| {
        if let Some(indent) = &style.indent {
            out.push('\n');
            (0..depth).for_each(|_| out.push_str(indent));
        }
    };
    value.check()?;
    match value {
        Value::None => out.push_str("null"),
        Value::Bool(b) => out.push_str(if *b { "true" } else { "false" }),
        Value::Int(n) => out.push_str(&n.to_string()),
        Value::Float(x) => out.push_str(&number(*x)),
        Value::Text(t) => string(out, &t.text, style.ensure_ascii),
        Value::List(_) | Value::Tuple(_) | Value::Group(_) => {
            let items = value.iterate()?;
            out.push('[');
            for (at, item) in items.iter().enumerate() {
                if at > 0 {
                    out.push_str(&style.item_separator);
                }
                line(out, depth + 1);
                write(r, out, item, style, depth + 1)?;
            }
            if !items.is_empty() {
                line(out, depth);
            }
            out.push(']');
        }
        Value::Dict(dict) => {
            let mut items: Vec<(Value, Value)> = dict.borrow().values().cloned().collect();
            if style.sort_keys {
                let keyed = items.iter().map(|(k, v)| (k.clone(), Value::tuple(vec![k.clone(), v.clone()]))).collect();
                let pair = |pair: Value| {
                    let items = pair.as_tuple().map(|t| t.to_vec()).unwrap_or_default();
                    let mut items = items.into_iter();
                    Some((items.next()?, items.next()?))
                };
                items = super::filters::sorted(r, keyed, false)?.into_iter().filter_map(pair).collect();
            }
            out.push('{');
            for (at, (key, item)) in items.iter().enumerate() {
                if at > 0 {
                    out.push_str(&style.item_separator);
                }
                line(out, depth + 1);
                let key = match key {
                    Value::Text(t) => t.text.to_string(),
                    Value::None => "null".into(),
                    Value::Bool(b) => if *b { "true" } else { "false" }.into(),
                    Value::Int(n) => n.to_string(),
                    Value::Float(x) => number(*x),
                    other => {
                        return Err(Error::failed(format!(
                            "keys must be str, int, float, bool or None, not {}",
                            other.type_name()
                        )));
                    }
                };
                string(out, &key, style.ensure_ascii);
                out.push_str(&style.key_separator);
                write(r, out, item, style, depth + 1)?;
            }
            if !items.is_empty() {
                line(out, depth);
            }
            out.push('}');
        }
        other => {
            return Err(Error::failed(format!("Object of type {} is not JSON serializable", other.type_name())));
        }
    }
    Ok(())
}

fn number(x: f64) -> String {
    match x {
        x if x.is_nan() => "NaN".into(),
        f64::INFINITY => "Infinity".into(),
        f64::NEG_INFINITY => "-Infinity".into(),
        x => float(x),
    }
}

fn string(out: &mut String, text: &str, ensure_ascii: bool) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            c if c < ' ' || (ensure_ascii && !(' '..='~').contains(&c)) => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    // Writing to a String cannot fail.
                    let _ = write!(out, "\\u{unit:04x}");
                }
            }
            c => out.push(c),
        }
    }
    out.push('"');
}
