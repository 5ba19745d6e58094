//! What chat templates expect of Jinja2 on Python and minijinja does not have: methods, tests and how floats look.
//!
//! Known to be missing still, and met in no template so far: the operator `%` on strings, the test `callable`, the
//! filters `wordcount` and `truncate`, `cycler` and `joiner`, attributes of numbers, methods that are not called
//! (`x.strip is defined`).

use minijinja::value::{Kwargs, ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, Output, State, Value, escape_formatter};

use super::python_json::float_text;

/// Adds Python's methods, Jinja2's meaning of `sequence` and `iterable`, and Python's way to print a float.
pub(super) fn add_to(env: &mut Environment<'_>) {
    env.set_unknown_method_callback(method);
    env.add_test("sequence", is_sequence);
    env.add_test("iterable", is_iterable);
    env.add_filter("string", |value: &Value| match float(value) {
        Some(x) => Value::from(float_text(x)),
        None if value.as_str().is_some() => value.clone(),
        None => Value::from(value.to_string()),
    });
    env.set_formatter(|out: &mut Output, state: &mut State, value: &Value| {
        match float(value) {
            // Writing fails only where the bound on the output is met.
            Some(x) => {
                out.write_str(&float_text(x)).map_err(|error| Error::new(ErrorKind::WriteFailure, error.to_string()))
            }
            None => escape_formatter(out, state, value),
        }
    });
}

/// The float that a value is, if it is one (neither an integer nor infinite: those look the same anyway).
fn float(value: &Value) -> Option<f64> {
    if value.kind() != ValueKind::Number || value.is_integer() {
        return None;
    }
    f64::try_from(value.clone()).ok().filter(|x| x.is_finite())
}

/// Jinja2: whatever has a length and can be indexed, so strings, mappings and undefined values too.
fn is_sequence(value: &Value) -> bool {
    match value.kind() {
        ValueKind::Undefined | ValueKind::String | ValueKind::Seq | ValueKind::Map => true,
        // minijinja keeps slices and sums of lists as iterators of known length.
        ValueKind::Iterable => value.len().is_some(),
        _ => false,
    }
}

/// Jinja2: whatever `iter()` takes. An undefined value iterates over nothing; none does not iterate, and templates tell
/// by this whether there are tools.
fn is_iterable(value: &Value) -> bool {
    !value.is_none() && value.try_iter().is_ok()
}

/// Python's methods: those of minijinja-contrib, and some that templates use and it lacks.
fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    if let Some(text) = value.as_str()
        && let Some(result) = string_method(text, name, args)?
    {
        return Ok(result);
    }
    match (value.kind(), name) {
        // Values never change, so a copy is the value itself.
        (ValueKind::Seq | ValueKind::Map | ValueKind::Iterable, "copy") => {
            let () = from_args(args)?;
            Ok(value.clone())
        }
        (ValueKind::Seq | ValueKind::Iterable, "index") => {
            let (wanted,): (&Value,) = from_args(args)?;
            value
                .try_iter()?
                .position(|item| item == *wanted)
                .map(Value::from)
                .ok_or_else(|| invalid(format!("{wanted:?} is not in list")))
        }
        // Jinja2's sandbox for chat templates forbids them as well.
        (
            ValueKind::Seq | ValueKind::Map | ValueKind::Iterable,
            "append" | "extend" | "insert" | "pop" | "remove" | "clear" | "update" | "setdefault" | "sort" | "reverse"
            | "popitem",
        ) => Err(invalid(format!("method `{name}` would change a value, which chat templates may not do"))),
        _ => minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args),
    }
}

fn string_method(text: &str, name: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    Ok(Some(match name {
        "split" | "rsplit" => split(text, args, name == "rsplit")?,
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            if separator.is_empty() {
                return Err(invalid(format!("{name}: empty separator")));
            }
            let halves = if name == "partition" { text.split_once(separator) } else { text.rsplit_once(separator) };
            Value::from_iter(match halves {
                Some((before, after)) => [before, separator, after],
                None if name == "partition" => [text, "", ""],
                None => ["", "", text],
            })
        }
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Value::from(text.strip_prefix(prefix).unwrap_or(text))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Value::from(text.strip_suffix(suffix).unwrap_or(text))
        }
        "index" => {
            let (wanted,): (&str,) = from_args(args)?;
            match text.find(wanted) {
                Some(at) => Value::from(text[..at].chars().count()),
                None => return Err(invalid("substring not found".to_owned())),
            }
        }
        "casefold" => {
            let () = from_args(args)?;
            Value::from(text.to_lowercase())
        }
        _ => return Ok(None),
    }))
}

/// `str.split` and `str.rsplit`, `maxsplit` by place or by name.
fn split(text: &str, args: &[Value], from_right: bool) -> Result<Value, Error> {
    let (separator, maxsplit, kwargs): (Option<&Value>, Option<i64>, Kwargs) = from_args(args)?;
    let separator = match separator {
        Some(value) => Some(value.clone()),
        None => kwargs.get::<Option<Value>>("sep")?,
    };
    let maxsplit = maxsplit.or(kwargs.get("maxsplit")?).and_then(|n| usize::try_from(n).ok());
    kwargs.assert_all_used()?;
    let separator = match &separator {
        None => None,
        Some(none) if none.is_none() => None,
        Some(value) => Some(
            value
                .as_str()
                .filter(|separator| !separator.is_empty())
                .ok_or_else(|| invalid("split: the separator must be a string that is not empty".to_owned()))?,
        ),
    };
    let limit = maxsplit.map_or(usize::MAX, |n| n.saturating_add(1));
    let mut parts: Vec<&str> = match (separator, from_right) {
        (Some(separator), false) => text.splitn(limit, separator).collect(),
        (Some(separator), true) => text.rsplitn(limit, separator).collect(),
        (None, false) => split_whitespace(text, limit),
        (None, true) => {
            let mut parts = Vec::new();
            let mut rest = text.trim_end();
            while !rest.is_empty() {
                let cut = rest.rfind(char::is_whitespace);
                match cut.filter(|_| parts.len() + 1 < limit) {
                    Some(at) => {
                        parts.push(rest[at..].trim_start());
                        rest = rest[..at].trim_end();
                    }
                    None => {
                        parts.push(rest);
                        break;
                    }
                }
            }
            parts
        }
    };
    if from_right {
        parts.reverse();
    }
    Ok(Value::from_iter(parts))
}

/// Words from the left; the last part, at the limit, is the untouched rest.
fn split_whitespace(text: &str, limit: usize) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        match rest.find(char::is_whitespace).filter(|_| parts.len() + 1 < limit) {
            Some(at) => {
                parts.push(&rest[..at]);
                rest = rest[at..].trim_start();
            }
            None => {
                parts.push(rest);
                break;
            }
        }
    }
    parts
}

fn invalid(detail: String) -> Error {
    Error::new(ErrorKind::InvalidOperation, detail)
}
