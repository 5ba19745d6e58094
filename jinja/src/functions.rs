//! The functions that every template can call, and those that chat templates are given.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use crate::Settings;
use crate::error::{Error, ErrorKind, Result};
use crate::render::{Arguments, Renderer};
use crate::value::{Dict, MAX_RANGE, Value, insert, range_length};

pub const NAMES: [&str; 8] =
    ["range", "dict", "namespace", "cycler", "joiner", "lipsum", "raise_exception", "strftime_now"];

pub fn exists(name: &str, settings: Settings) -> bool {
    let chat_only = matches!(name, "raise_exception" | "strftime_now");
    NAMES.contains(&name) && (settings.sandboxed || !chat_only)
}

/// transformers lets a namespace have no attribute that begins with an underline.
pub fn check_attribute(r: &Renderer, name: &str) -> Result<()> {
    if r.settings.sandboxed && name.starts_with('_') {
        return Err(Error::failed(format!(
            "Chat templates cannot store underscore-prefixed attributes on a namespace, but got '{name}'"
        )));
    }
    Ok(())
}

pub fn call(r: &mut Renderer, name: &str, arguments: Arguments) -> Result<Value> {
    match name {
        "range" => {
            let [a, b, c] = arguments.bind("range", ["start", "stop", "step"])?;
            let number = |v: &Option<Value>| v.as_ref().map(|v| v.index("range wants")).transpose();
            let (a, b, c) = (number(&a)?, number(&b)?, number(&c)?);
            let Some(a) = a else { return Err(Error::failed("range expected at least 1 argument, got 0")) };
            let (start, stop) = b.map_or((0, a), |b| (a, b));
            let step = c.unwrap_or(1);
            if step == 0 {
                return Err(Error::failed("range() arg 3 must not be zero"));
            }
            if r.settings.sandboxed && range_length(start, stop, step) > MAX_RANGE {
                return Err(Error::failed(format!(
                    "Range too big. The sandbox blocks ranges larger than MAX_RANGE ({MAX_RANGE})."
                )));
            }
            Ok(Value::Range(start, stop, step))
        }
        "dict" => Ok(Value::Dict(Rc::new(RefCell::new(dict(arguments)?)))),
        "namespace" => {
            let attributes = dict(arguments)?;
            for (key, _) in attributes.values() {
                check_attribute(r, key.as_text().unwrap_or_default())?;
            }
            Ok(Value::Namespace(Rc::new(RefCell::new(attributes))))
        }
        "cycler" => {
            if arguments.positional.is_empty() || !arguments.named.is_empty() {
                return Err(Error::failed("at least one item has to be provided"));
            }
            Ok(Value::Cycler(Rc::new((arguments.positional, Cell::new(0)))))
        }
        "joiner" => {
            let [separator] = arguments.bind("joiner", ["sep"])?;
            Ok(Value::Joiner(Rc::new((separator.unwrap_or_else(|| ", ".into()), Cell::new(false)))))
        }
        "raise_exception" => {
            let message = arguments.one("raise_exception", "message")?;
            Err(Error::new(ErrorKind::Raised, message.str()?))
        }
        "strftime_now" => {
            let format = arguments.one("strftime_now", "format")?;
            let Some(format) = format.as_text() else {
                return Err(Error::failed("strftime_now wants a format, a text"));
            };
            let now = r.options.now.ok_or_else(|| Error::unsupported("'strftime_now' is not supported"))?;
            let failed = |e| Error::failed(format!("strftime_now({format:?}): {e}"));
            now(format).map(Value::from).map_err(failed)
        }
        other => Err(Error::unsupported(format!("the function '{other}' is not supported"))),
    }
}

/// `dict(pairs, name=value)`
pub fn dict(arguments: Arguments) -> Result<Dict> {
    let mut out = Dict::new();
    if arguments.positional.len() > 1 {
        return Err(Error::failed(format!("dict expected at most 1 argument, got {}", arguments.positional.len())));
    }
    match arguments.positional.first() {
        None => {}
        Some(Value::Dict(own)) => out = own.borrow().clone(),
        Some(other) => {
            for pair in other.iterate()? {
                let mut pair = pair.iterate()?.into_iter();
                match (pair.next(), pair.next(), pair.next()) {
                    (Some(key), Some(value), None) => insert(&mut out, key, value)?,
                    _ => return Err(Error::failed("dictionary update sequence element has not length 2")),
                }
            }
        }
    }
    for (name, value) in arguments.named {
        insert(&mut out, (&*name).into(), value)?;
    }
    Ok(out)
}
