//! `value.name` as Python has it: methods and fields of each type, and what the sandbox hides.

use std::rc::Rc;

use crate::error::{Error, Result};
use crate::render::Renderer;
use crate::value::{Value, View};

/// Methods of `str`.
const STR: [&str; 47] = [
    "capitalize",
    "casefold",
    "center",
    "count",
    "encode",
    "endswith",
    "expandtabs",
    "find",
    "format",
    "format_map",
    "index",
    "isalnum",
    "isalpha",
    "isascii",
    "isdecimal",
    "isdigit",
    "isidentifier",
    "islower",
    "isnumeric",
    "isprintable",
    "isspace",
    "istitle",
    "isupper",
    "join",
    "ljust",
    "lower",
    "lstrip",
    "maketrans",
    "partition",
    "removeprefix",
    "removesuffix",
    "replace",
    "rfind",
    "rindex",
    "rjust",
    "rpartition",
    "rsplit",
    "rstrip",
    "split",
    "splitlines",
    "startswith",
    "strip",
    "swapcase",
    "title",
    "translate",
    "upper",
    "zfill",
];
const LIST: [&str; 11] =
    ["append", "clear", "copy", "count", "extend", "index", "insert", "pop", "remove", "reverse", "sort"];
const TUPLE: [&str; 2] = ["count", "index"];
const DICT: [&str; 11] =
    ["clear", "copy", "fromkeys", "get", "items", "keys", "pop", "popitem", "setdefault", "update", "values"];
const INT: [&str; 5] = ["as_integer_ratio", "bit_count", "bit_length", "conjugate", "to_bytes"];
const FLOAT: [&str; 5] = ["as_integer_ratio", "conjugate", "fromhex", "hex", "is_integer"];

/// Methods by which a sandbox that keeps values as they are lets nothing be changed.
const CHANGING_LIST: [&str; 8] = ["append", "clear", "pop", "reverse", "insert", "sort", "extend", "remove"];
const CHANGING_DICT: [&str; 5] = ["clear", "pop", "popitem", "setdefault", "update"];

/// The attribute `name` of `value`, if its type has it.
pub fn of(r: &mut Renderer, value: &Value, name: &str) -> Result<Option<Value>> {
    let changing = match value {
        Value::List(_) => CHANGING_LIST.contains(&name),
        Value::Dict(_) => CHANGING_DICT.contains(&name),
        _ => false,
    };
    if changing && r.settings.sandboxed {
        return Ok(Some(r.undefined(format!(
            "access to attribute '{name}' of '{}' object is unsafe: it would change a value, which chat templates may \
             not do",
            value.type_name()
        ))));
    }
    let methods: &[&str] = match value {
        Value::Text(_) => &STR,
        Value::List(_) => &LIST,
        Value::Tuple(_) => &TUPLE,
        Value::Group(_) => &TUPLE,
        Value::Dict(_) => &DICT,
        Value::Int(_) | Value::Bool(_) => &INT,
        Value::Float(_) => &FLOAT,
        Value::Range(..) => &TUPLE,
        Value::View(View::Keys | View::Items, _) => &["isdisjoint"],
        Value::Loop(_) => &["cycle", "changed"],
        Value::Cycler(_) => &["next", "reset"],
        _ => &[],
    };
    if methods.contains(&name) {
        return Ok(Some(Value::Method(Rc::new((value.clone(), name.into())))));
    }
    Ok(match value {
        Value::Int(_) | Value::Bool(_) => match name {
            "real" | "numerator" => value.as_int().map(Value::Int),
            "imag" => Some(Value::Int(0)),
            "denominator" => Some(Value::Int(1)),
            _ => None,
        },
        Value::Float(x) => match name {
            "real" => Some(Value::Float(*x)),
            "imag" => Some(Value::Float(0.0)),
            _ => None,
        },
        Value::Range(start, stop, step) => match name {
            "start" => Some(Value::Int(*start)),
            "stop" => Some(Value::Int(*stop)),
            "step" => Some(Value::Int(*step)),
            _ => None,
        },
        Value::Group(items) => match name {
            "grouper" => items.first().cloned(),
            "list" => items.get(1).cloned(),
            _ => None,
        },
        Value::Namespace(dict) => dict.borrow().get(&Value::from(name).key()?).map(|(_, value)| value.clone()),
        Value::Cycler(cycler) => match name {
            "current" => cycler.0.get(cycler.1.get()).cloned(),
            "pos" => Some(Value::Int(cycler.1.get() as i128)),
            "items" => Some(Value::tuple(cycler.0.clone())),
            _ => None,
        },
        Value::Joiner(joiner) => match name {
            "sep" => Some(joiner.0.clone()),
            "used" => Some(Value::Bool(joiner.1.get())),
            _ => None,
        },
        Value::Macro(own) => match name {
            "name" => Some((&*own.definition.name).into()),
            "arguments" => Some(Value::tuple(own.definition.parameters.iter().map(|p| Value::from(&**p)).collect())),
            "catch_kwargs" => Some(Value::Bool(own.definition.catches_kwargs)),
            "catch_varargs" => Some(Value::Bool(own.definition.catches_varargs)),
            "caller" => Some(Value::Bool(own.definition.uses_caller)),
            _ => None,
        },
        Value::Loop(state) => {
            let (index, count) = (state.index.get(), state.items.len());
            let number = |n: usize| Some(Value::Int(n as i128));
            match name {
                "index" => number(index + 1),
                "index0" => number(index),
                "revindex" => number(count - index),
                "revindex0" => number(count - index - 1),
                "first" => Some(Value::Bool(index == 0)),
                "last" => Some(Value::Bool(index + 1 == count)),
                "length" => number(count),
                "depth" => number(state.depth + 1),
                "depth0" => number(state.depth),
                "previtem" => Some(match index.checked_sub(1) {
                    Some(at) => state.items[at].clone(),
                    None => r.undefined("there is no previous item"),
                }),
                "nextitem" => Some(match state.items.get(index + 1) {
                    Some(item) => item.clone(),
                    None => r.undefined("there is no next item"),
                }),
                _ => None,
            }
        }
        _ => None,
    })
}

/// What stands for an attribute or item that is not there.
pub fn missing(r: &mut Renderer, value: &Value, name: &Value) -> Result<Value> {
    let kind = match value {
        Value::None => "None".to_owned(),
        other => format!("{} object", other.type_name()),
    };
    match name.as_text() {
        Some(name) if name.starts_with("__") && name.ends_with("__") => {
            if r.settings.sandboxed {
                return Ok(r.undefined(format!("access to attribute '{name}' of '{kind}' is unsafe.")));
            }
            Err(Error::unsupported(format!("the attribute '{name}' is not supported")))
        }
        Some(name) => Ok(r.undefined(format!("'{kind}' has no attribute '{name}'"))),
        None => {
            let name = name.repr().unwrap_or_default();
            Ok(r.undefined(format!("{kind} has no element {name}")))
        }
    }
}
