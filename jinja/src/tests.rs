//! Jinja2's tests: what stands after `is`.

use crate::ast::Comparison;
use crate::error::{Error, Result};
use crate::methods::is_case;
use crate::operators::{binary, compare};
use crate::render::{Arguments, Renderer};
use crate::value::Value;
use crate::{ast::Binary, filters};

const NAMES: [&str; 39] = [
    "boolean",
    "callable",
    "defined",
    "divisibleby",
    "eq",
    "equalto",
    "escaped",
    "even",
    "false",
    "filter",
    "float",
    "ge",
    "greaterthan",
    "gt",
    "in",
    "integer",
    "iterable",
    "le",
    "lessthan",
    "lower",
    "lt",
    "mapping",
    "ne",
    "none",
    "number",
    "odd",
    "sameas",
    "sequence",
    "string",
    "test",
    "true",
    "undefined",
    "upper",
    "==",
    "!=",
    "<",
    "<=",
    ">",
    ">=",
];

pub fn exists(name: &str) -> bool {
    NAMES.contains(&name)
}

pub fn call(r: &mut Renderer, name: &str, value: &Value, arguments: Arguments) -> Result<bool> {
    let comparison = match name {
        "eq" | "equalto" | "==" => Some(Comparison::Equal),
        "ne" | "!=" => Some(Comparison::NotEqual),
        "lt" | "lessthan" | "<" => Some(Comparison::Less),
        "le" | "<=" => Some(Comparison::LessEqual),
        "gt" | "greaterthan" | ">" => Some(Comparison::Greater),
        "ge" | ">=" => Some(Comparison::GreaterEqual),
        "in" => Some(Comparison::In),
        _ => None,
    };
    if let Some(comparison) = comparison {
        return compare(comparison, value, &arguments.one(name, "other")?);
    }
    match name {
        "divisibleby" => {
            let by = arguments.one(name, "num")?;
            return binary(r, Binary::Mod, value, &by)?.equals(&Value::Int(0));
        }
        "sameas" => return Ok(value.same(&arguments.one(name, "other")?)),
        _ => {}
    }
    if !exists(name) {
        return Err(Error::failed(format!("No test named '{name}'.")));
    }
    arguments.none(&format!("the test '{name}'"))?;
    let named = |what: fn(&str, &Renderer) -> bool, r: &Renderer| value.as_text().is_some_and(|n| what(n, r));
    Ok(match name {
        "boolean" => matches!(value, Value::Bool(_)),
        "true" => matches!(value, Value::Bool(true)),
        "false" => matches!(value, Value::Bool(false)),
        "none" => matches!(value, Value::None),
        "defined" => !matches!(value, Value::Undefined(_)),
        "undefined" => matches!(value, Value::Undefined(_)),
        "integer" => matches!(value, Value::Int(_)),
        "float" => matches!(value, Value::Float(_)),
        "number" => matches!(value, Value::Int(_) | Value::Float(_) | Value::Bool(_)),
        "string" => matches!(value, Value::Text(_)),
        "mapping" => matches!(value, Value::Dict(_)),
        "escaped" => matches!(value, Value::Text(t) if t.markup),
        "sequence" => match value {
            Value::Undefined(u) => !u.strict,
            Value::Text(_) | Value::List(_) | Value::Tuple(_) | Value::Group(_) => true,
            Value::Dict(_) | Value::Range(..) => true,
            _ => false,
        },
        "iterable" => {
            value.check_strict()?;
            let once = matches!(value, Value::Undefined(_) | Value::Iterator(_) | Value::Loop(_) | Value::View(..));
            let many = matches!(value, Value::Text(_) | Value::List(_) | Value::Tuple(_) | Value::Group(_));
            once || many || matches!(value, Value::Dict(_) | Value::Range(..))
        }
        // An undefined value can be called: the call is the error.
        "callable" => matches!(
            value,
            Value::Macro(_)
                | Value::Function(_)
                | Value::Method(_)
                | Value::Joiner(_)
                | Value::Loop(_)
                | Value::Undefined(_)
        ),
        "even" | "odd" => {
            let rest = binary(r, Binary::Mod, value, &Value::Int(2))?;
            rest.equals(&Value::Int(i128::from(name == "odd")))?
        }
        "lower" | "upper" => is_case(&value.str()?, name == "lower"),
        "filter" => named(|n, r| filters::exists(n, r.settings), r),
        _ => named(|n, _| exists(n), r),
    })
}
