//! Jinja2's filters over sequences, numbers and mappings; those over text are in `text_filters.rs`.

use std::cell::RefCell;
use std::cmp::Ordering;
use std::rc::Rc;

use crate::Settings;
use crate::ast::Binary;
use crate::error::{Error, ErrorKind, Result};
use crate::operators::{binary, item};
use crate::render::{Arguments, Renderer};
use crate::value::{Text, Value};
use crate::{attributes, tests, text_filters};

const NAMES: [&str; 33] = [
    "abs",
    "attr",
    "batch",
    "count",
    "d",
    "default",
    "dictsort",
    "first",
    "float",
    "groupby",
    "int",
    "items",
    "last",
    "length",
    "list",
    "map",
    "max",
    "min",
    "pprint",
    "random",
    "reject",
    "rejectattr",
    "reverse",
    "round",
    "safe",
    "select",
    "selectattr",
    "slice",
    "sort",
    "string",
    "sum",
    "tojson",
    "unique",
];

pub fn exists(name: &str, settings: Settings) -> bool {
    let task_only = name == "regex_replace";
    (NAMES.contains(&name) || text_filters::NAMES.contains(&name)) && (!task_only || !settings.sandboxed)
}

pub fn call(r: &mut Renderer, name: &str, value: Value, arguments: Arguments) -> Result<Value> {
    if !exists(name, r.settings) {
        return Err(Error::failed(format!("No filter named '{name}'.")));
    }
    if text_filters::NAMES.contains(&name) {
        return text_filters::call(r, name, &value, arguments);
    }
    match name {
        "abs" => {
            arguments.none(name)?;
            value.check()?;
            match (value.as_int(), &value) {
                (Some(n), _) => n
                    .checked_abs()
                    .map(Value::Int)
                    .ok_or_else(|| Error::unsupported("a whole number of more than 127 bits is not supported")),
                (None, Value::Float(x)) => Ok(Value::Float(x.abs())),
                _ => Err(Error::failed(format!("bad operand type for abs(): '{}'", value.type_name()))),
            }
        }
        "attr" => {
            let name = arguments.one(name, "name")?.str()?;
            value.check()?;
            match attributes::of(r, &value, &name)? {
                Some(found) => Ok(found),
                None => attributes::missing(r, &value, &name.as_str().into()),
            }
        }
        "batch" | "slice" => {
            let [count, fill] = arguments.bind(name, ["count", "fill_with"])?;
            let count = count.ok_or_else(|| Error::failed(format!("{name}: missing the number")))?;
            let count = count.index(name)?;
            let fill = fill.filter(|f| !matches!(f, Value::None));
            parts(r, name, value.iterate()?, count, fill)
        }
        "count" | "length" => {
            arguments.none(name)?;
            Ok(Value::Int(value.length()? as i128))
        }
        "d" | "default" => {
            let [default, boolean] = arguments.bind(name, ["default_value", "boolean"])?;
            let boolean = boolean.map_or(Ok(false), |b| b.truth())?;
            let missing = matches!(value, Value::Undefined(_)) || (boolean && !value.truth()?);
            Ok(if missing { default.unwrap_or_else(|| "".into()) } else { value })
        }
        "dictsort" => {
            let [case, by, reverse] = arguments.bind(name, ["case_sensitive", "by", "reverse"])?;
            let case = case.map_or(Ok(false), |c| c.truth())?;
            let reverse = reverse.map_or(Ok(false), |v| v.truth())?;
            let at = match by.as_ref().map(|b| b.as_text()) {
                None | Some(Some("key")) => 0,
                Some(Some("value")) => 1,
                _ => return Err(Error::failed("You can only sort by either \"key\" or \"value\"")),
            };
            value.check()?;
            let Value::Dict(dict) = &value else {
                return Err(Error::failed(format!("'{} object' has no attribute 'items'", value.type_name())));
            };
            let pairs: Vec<(Value, Value)> = dict.borrow().values().cloned().collect();
            let keyed = pairs.into_iter().map(|(k, v)| {
                let key = if at == 0 { k.clone() } else { v.clone() };
                (if case { key } else { ignore_case(key) }, Value::tuple(vec![k, v]))
            });
            let keyed = keyed.collect();
            Ok(Value::list(sorted(r, keyed, reverse)?))
        }
        "first" => {
            arguments.none(name)?;
            let first = match &value {
                Value::Iterator(once) => once.borrow_mut().items.pop_front(),
                other => other.iterate()?.into_iter().next(),
            };
            Ok(first.unwrap_or_else(|| r.undefined("No first item, sequence was empty.")))
        }
        "last" => {
            arguments.none(name)?;
            value.check_strict()?;
            let undefined = matches!(value, Value::Undefined(_));
            let last = if undefined { None } else { reversed(&value)?.into_iter().next() };
            Ok(last.unwrap_or_else(|| r.undefined("No last item, sequence was empty.")))
        }
        "float" => {
            let [default] = arguments.bind(name, ["default"])?;
            value.check()?;
            let number = match &value {
                Value::Text(t) => read_float(&t.text),
                other => other.as_float(),
            };
            Ok(number.map_or_else(|| default.unwrap_or(Value::Float(0.0)), Value::Float))
        }
        "int" => {
            let [default, base] = arguments.bind(name, ["default", "base"])?;
            value.check()?;
            let base = base.map_or(Ok(10), |b| b.index("a base"))?;
            let whole = |x: f64| (x.is_finite() && x.abs() < 1.7e38).then_some(x as i128);
            let number = match &value {
                Value::Text(t) => read_int(&t.text, base).or_else(|| read_float(&t.text).and_then(whole)),
                Value::Float(x) => whole(*x),
                other => other.as_int(),
            };
            Ok(number.map_or_else(|| default.unwrap_or(Value::Int(0)), Value::Int))
        }
        "groupby" => {
            let [attribute, default, case] = arguments.bind(name, ["attribute", "default", "case_sensitive"])?;
            let attribute = attribute.ok_or_else(|| Error::failed("groupby: missing the argument 'attribute'"))?;
            let case = case.map_or(Ok(false), |c| c.truth())?;
            let default = default.filter(|d| !matches!(d, Value::None));
            let mut keyed = Vec::new();
            for item in value.iterate()? {
                let key = by_attribute(r, &item, &attribute, default.as_ref())?;
                keyed.push((if case { key.clone() } else { ignore_case(key.clone()) }, Value::tuple(vec![key, item])));
            }
            let mut groups: Vec<(Value, Value, Vec<Value>)> = Vec::new();
            let keys: Vec<Value> = sorted(r, keyed, false)?;
            for pair in keys {
                let pair = pair.iterate()?;
                let folded = if case { pair[0].clone() } else { ignore_case(pair[0].clone()) };
                match groups.last_mut() {
                    Some((last, _, items)) if last.equals(&folded)? => items.push(pair[1].clone()),
                    _ => groups.push((folded, pair[0].clone(), vec![pair[1].clone()])),
                }
            }
            let group =
                |(_, key, items): (Value, Value, Vec<Value>)| Value::Group(Rc::new(vec![key, Value::list(items)]));
            Ok(Value::list(groups.into_iter().map(group).collect()))
        }
        "items" => {
            arguments.none(name)?;
            match &value {
                Value::Undefined(_) => Ok(Value::once("generator", Vec::new())),
                Value::Dict(dict) => {
                    let pairs = dict.borrow().values().map(|(k, v)| Value::tuple(vec![k.clone(), v.clone()])).collect();
                    Ok(Value::once("generator", pairs))
                }
                _ => Err(Error::failed("Can only get item pairs from a mapping.")),
            }
        }
        "list" => {
            arguments.none(name)?;
            let items = value.iterate()?;
            r.charge(items.len())?;
            Ok(Value::list(items))
        }
        "map" => map(r, &value, arguments),
        "max" | "min" => {
            let [case, attribute] = arguments.bind(name, ["case_sensitive", "attribute"])?;
            let keyed = keyed(r, value.iterate()?, case, attribute)?;
            let mut best: Option<(Value, Value)> = None;
            for (key, item) in keyed {
                let better = match &best {
                    None => true,
                    Some((own, _)) if name == "max" => key.order(own, ">")? == Some(Ordering::Greater),
                    Some((own, _)) => key.order(own, "<")? == Some(Ordering::Less),
                };
                if better {
                    best = Some((key, item));
                }
            }
            Ok(best.map_or_else(|| r.undefined("No aggregated item, sequence was empty."), |(_, item)| item))
        }
        "pprint" => {
            arguments.none(name)?;
            /// `pprint.pformat` breaks longer ones into lines.
            const WIDTH: usize = 80;
            let text = sort_keys(r, &value)?.repr()?;
            if text.chars().count() > WIDTH {
                return Err(Error::unsupported("pprint of what does not fit on a line is not supported"));
            }
            Ok(text.into())
        }
        "select" | "reject" | "selectattr" | "rejectattr" => select(r, name, &value, arguments),
        "reverse" => {
            arguments.none(name)?;
            match &value {
                Value::Text(t) => {
                    Ok(Value::Text(Text { text: t.text.chars().rev().collect::<String>().into(), markup: t.markup }))
                }
                Value::Iterator(_) | Value::Undefined(_) => {
                    Ok(Value::list(value.iterate()?.into_iter().rev().collect()))
                }
                other => match reversed(other) {
                    Ok(items) => Ok(Value::once("list_reverseiterator", items)),
                    Err(e) if e.kind == ErrorKind::Failed => Err(Error::failed("argument must be iterable")),
                    Err(e) => Err(e),
                },
            }
        }
        "round" => {
            let [precision, method] = arguments.bind(name, ["precision", "method"])?;
            let precision = precision.map_or(Ok(0), |p| p.index("a precision"))?;
            value.check()?;
            let method = method.map_or_else(|| Ok("common".to_owned()), |m| m.str())?;
            round(&value, precision, &method)
        }
        "safe" => {
            arguments.none(name)?;
            Ok(Value::Text(Text { text: value.str()?.into(), markup: true }))
        }
        "sort" => {
            let [reverse, case, attribute] = arguments.bind(name, ["reverse", "case_sensitive", "attribute"])?;
            let reverse = reverse.map_or(Ok(false), |v| v.truth())?;
            let case = case.map_or(Ok(false), |c| c.truth())?;
            let mut keyed = Vec::new();
            for item in value.iterate()? {
                keyed.push((sort_key(r, &item, case, attribute.as_ref())?, item));
            }
            Ok(Value::list(sorted(r, keyed, reverse)?))
        }
        "string" => {
            arguments.none(name)?;
            Ok(if matches!(value, Value::Text(_)) { value } else { value.str()?.into() })
        }
        "sum" => {
            let [attribute, start] = arguments.bind(name, ["attribute", "start"])?;
            let attribute = attribute.filter(|a| !matches!(a, Value::None));
            let mut sum = start.unwrap_or(Value::Int(0));
            if matches!(sum, Value::Text(_)) {
                return Err(Error::failed("sum() can't sum strings [use ''.join(seq) instead]"));
            }
            for item in value.iterate()? {
                let item = match &attribute {
                    Some(attribute) => by_attribute(r, &item, attribute, None)?,
                    None => item,
                };
                sum = binary(r, Binary::Add, &sum, &item)?;
            }
            Ok(sum)
        }
        "tojson" => text_filters::tojson(r, &value, arguments),
        "unique" => {
            let [case, attribute] = arguments.bind(name, ["case_sensitive", "attribute"])?;
            let keyed = keyed(r, value.iterate()?, case, attribute)?;
            let (mut seen, mut out) = (std::collections::HashSet::new(), Vec::new());
            for (key, item) in keyed {
                if seen.insert(key.key()?) {
                    out.push(item);
                }
            }
            Ok(Value::once("generator", out))
        }
        _ => Err(Error::unsupported(format!("the filter '{name}' is not supported"))),
    }
}

/// Texts in small letters; the rest as it is.
fn ignore_case(value: Value) -> Value {
    match &value {
        Value::Text(t) => t.text.to_lowercase().into(),
        _ => value,
    }
}

/// `item.a.b` by the name `a.b`; whole numbers are indices.
fn by_attribute(r: &mut Renderer, value: &Value, attribute: &Value, default: Option<&Value>) -> Result<Value> {
    let parts: Vec<Value> = match attribute {
        Value::None => return Ok(value.clone()),
        Value::Text(t) => t
            .text
            .split('.')
            .map(|part| match part.parse::<i128>() {
                Ok(n) if part.bytes().all(|b| b.is_ascii_digit()) => Value::Int(n),
                _ => part.into(),
            })
            .collect(),
        other => vec![other.clone()],
    };
    let mut value = value.clone();
    for part in parts {
        value = r.item(&value, &part)?;
        if let (Value::Undefined(_), Some(default)) = (&value, default) {
            value = default.clone();
        }
    }
    Ok(value)
}

/// What `sort` compares: one attribute, or several with commas.
fn sort_key(r: &mut Renderer, item: &Value, case: bool, attribute: Option<&Value>) -> Result<Value> {
    let fold = |v: Value| if case { v } else { ignore_case(v) };
    let Some(attribute) = attribute.filter(|a| !matches!(a, Value::None)) else {
        return Ok(Value::list(vec![fold(item.clone())]));
    };
    let names: Vec<Value> = match attribute.as_text() {
        Some(names) => names.split(',').map(Value::from).collect(),
        None => vec![attribute.clone()],
    };
    let keys = names.iter().map(|name| by_attribute(r, item, name, None).map(fold)).collect::<Result<_>>()?;
    Ok(Value::list(keys))
}

/// Items with their keys: an attribute, without regard to case unless it is asked for.
fn keyed(
    r: &mut Renderer,
    items: Vec<Value>,
    case: Option<Value>,
    attribute: Option<Value>,
) -> Result<Vec<(Value, Value)>> {
    let case = case.map_or(Ok(false), |c| c.truth())?;
    let attribute = attribute.unwrap_or(Value::None);
    let mut out = Vec::new();
    for item in items {
        r.charge(1)?;
        let key = by_attribute(r, &item, &attribute, None)?;
        out.push((if case { key } else { ignore_case(key) }, item));
    }
    Ok(out)
}

/// The items in the order of their keys, those of equal keys as they stood.
pub fn sorted(r: &mut Renderer, mut keyed: Vec<(Value, Value)>, reverse: bool) -> Result<Vec<Value>> {
    r.charge(keyed.len().saturating_mul(4))?;
    let mut failure = None;
    keyed.sort_by(|(a, _), (b, _)| {
        if failure.is_some() {
            return Ordering::Equal;
        }
        let (a, b) = if reverse { (b, a) } else { (a, b) };
        match a.order(b, "<") {
            Ok(order) => order.unwrap_or(Ordering::Equal),
            Err(e) => {
                failure = Some(e);
                Ordering::Equal
            }
        }
    });
    match failure {
        Some(e) => Err(e),
        None => Ok(keyed.into_iter().map(|(_, item)| item).collect()),
    }
}

/// What `reversed` walks over.
fn reversed(value: &Value) -> Result<Vec<Value>> {
    value.check()?;
    match value {
        Value::Text(_)
        | Value::List(_)
        | Value::Tuple(_)
        | Value::Group(_)
        | Value::Dict(_)
        | Value::View(..)
        | Value::Range(..) => Ok(value.iterate()?.into_iter().rev().collect()),
        other => Err(Error::failed(format!("'{}' object is not reversible", other.type_name()))),
    }
}

fn parts(r: &mut Renderer, name: &str, items: Vec<Value>, count: i128, fill: Option<Value>) -> Result<Value> {
    let mut out = Vec::new();
    if name == "batch" {
        // Python's loop never meets a number below 1.
        let size = usize::try_from(count).ok().filter(|n| *n > 0).unwrap_or(usize::MAX);
        for chunk in items.chunks(size.min(items.len().max(1))) {
            let mut chunk = chunk.to_vec();
            if let (Some(fill), true) = (&fill, size < usize::MAX) {
                r.charge(size - chunk.len())?;
                chunk.resize(size, fill.clone());
            }
            out.push(Value::list(chunk));
        }
        return Ok(Value::once("generator", out));
    }
    let slices = usize::try_from(count).ok().filter(|n| *n > 0);
    let slices = slices.ok_or_else(|| Error::failed("integer division or modulo by zero"))?;
    r.charge(slices)?;
    let (each, more) = (items.len() / slices, items.len() % slices);
    let mut at = 0;
    for slice in 0..slices {
        let length = each + usize::from(slice < more);
        let mut part = items[at..at + length].to_vec();
        at += length;
        if let (Some(fill), true) = (&fill, slice >= more) {
            part.push(fill.clone());
        }
        out.push(Value::list(part));
    }
    Ok(Value::once("generator", out))
}

fn map(r: &mut Renderer, value: &Value, mut arguments: Arguments) -> Result<Value> {
    let mut out = Vec::new();
    let items = if value.truth()? { value.iterate()? } else { Vec::new() };
    if arguments.positional.is_empty() && arguments.named.iter().any(|(n, _)| &**n == "attribute") {
        let [attribute, default] = arguments.bind("map", ["attribute", "default"])?;
        let attribute = attribute.unwrap_or(Value::None);
        let default = default.filter(|d| !matches!(d, Value::None));
        for item in items {
            r.charge(1)?;
            out.push(by_attribute(r, &item, &attribute, default.as_ref())?);
        }
        return Ok(Value::once("generator", out));
    }
    if arguments.positional.is_empty() {
        return Err(Error::failed("map requires a filter argument"));
    }
    let name = arguments.positional.remove(0).str()?;
    if !exists(&name, r.settings) {
        return Err(Error::failed(format!("No filter named '{name}'.")));
    }
    for item in items {
        r.charge(1)?;
        out.push(call(r, &name, item, arguments.clone())?);
    }
    Ok(Value::once("generator", out))
}

fn select(r: &mut Renderer, name: &str, value: &Value, mut arguments: Arguments) -> Result<Value> {
    let mut out = Vec::new();
    let attribute = if name.ends_with("attr") {
        if arguments.positional.is_empty() {
            return Err(Error::failed("Missing parameter for attribute name"));
        }
        Some(arguments.positional.remove(0))
    } else {
        None
    };
    let test = if arguments.positional.is_empty() { None } else { Some(arguments.positional.remove(0).str()?) };
    if let Some(test) = test.as_ref().filter(|t| !tests::exists(t)) {
        return Err(Error::failed(format!("No test named '{test}'.")));
    }
    let items = if value.truth()? { value.iterate()? } else { Vec::new() };
    for item in items {
        r.charge(1)?;
        let own = match &attribute {
            Some(attribute) => by_attribute(r, &item, attribute, None)?,
            None => item.clone(),
        };
        let holds = match &test {
            Some(test) => tests::call(r, test, &own, arguments.clone())?,
            None => own.truth()?,
        };
        if holds == name.starts_with("select") {
            out.push(item);
        }
    }
    Ok(Value::once("generator", out))
}

fn round(value: &Value, precision: i128, method: &str) -> Result<Value> {
    if !matches!(method, "common" | "ceil" | "floor") {
        return Err(Error::failed("method must be common, ceil or floor"));
    }
    let Some(x) = value.as_float() else {
        return Err(Error::failed(format!("type {} doesn't define __round__ method", value.type_name())));
    };
    let precision = precision.clamp(-400, 400) as i32;
    if method != "common" {
        let scale = 10f64.powi(precision);
        let scaled = x * scale;
        return Ok(Value::Float(if method == "ceil" { scaled.ceil() } else { scaled.floor() } / scale));
    }
    if let Some(n) = value.as_int() {
        if precision >= 0 {
            return Ok(Value::Int(n));
        }
        let Some(unit) = 10i128.checked_pow(precision.unsigned_abs()) else { return Ok(Value::Int(0)) };
        let (down, rest) = (n.div_euclid(unit), n.rem_euclid(unit));
        let up = rest * 2 > unit || (rest * 2 == unit && down % 2 != 0);
        return Ok(Value::Int((down + i128::from(up)) * unit));
    }
    if !x.is_finite() || precision > 323 {
        return Ok(Value::Float(x));
    }
    if precision >= 0 {
        // Exact digits, halves to even: what `round` does.
        let digits = format!("{x:.*}", precision as usize);
        return Ok(Value::Float(digits.parse().unwrap_or(x)));
    }
    let unit = 10f64.powi(-precision);
    Ok(Value::Float(if unit.is_finite() { (x / unit).round_ties_even() * unit } else { 0.0 }))
}

/// `float(text)`
fn read_float(text: &str) -> Option<f64> {
    let text = text.trim_matches(crate::python::is_space);
    let plain = without_underscores(text)?;
    match plain.to_ascii_lowercase().trim_start_matches(['+', '-']) {
        "inf" | "infinity" | "nan" => {}
        digits if digits.starts_with(|c: char| c.is_ascii_digit() || c == '.') => {}
        _ => return None,
    }
    plain.parse().ok()
}

/// `int(text, base)`
fn read_int(text: &str, base: i128) -> Option<i128> {
    let text = text.trim_matches(crate::python::is_space);
    let (negative, digits) = match text.strip_prefix(['+', '-']) {
        Some(rest) => (text.starts_with('-'), rest),
        None => (false, text),
    };
    let lower = digits.to_ascii_lowercase();
    let prefixed = |prefix: &str, own: i128| {
        lower.strip_prefix(prefix).filter(|_| base == own || base == 0).map(|d| (d.to_owned(), own))
    };
    let found = prefixed("0x", 16).or_else(|| prefixed("0o", 8)).or_else(|| prefixed("0b", 2));
    let (digits, base) = found.unwrap_or((lower, if base == 0 { 10 } else { base }));
    let radix = u32::try_from(base).ok().filter(|b| (2..=36).contains(b))?;
    let digits = without_underscores(&digits)?;
    if digits.is_empty() || digits.starts_with(['+', '-']) {
        return None;
    }
    let n = i128::from_str_radix(&digits, radix).ok()?;
    Some(if negative { -n } else { n })
}

/// Digits as Python lets them be grouped: single underlines between them.
fn without_underscores(text: &str) -> Option<String> {
    let wrong = text.starts_with('_') || text.ends_with('_') || text.contains("__");
    (!wrong).then(|| text.replace('_', ""))
}

/// The same value with the keys of every dict in order.
fn sort_keys(r: &mut Renderer, value: &Value) -> Result<Value> {
    Ok(match value {
        Value::Dict(dict) => {
            let pairs: Vec<(Value, Value)> = dict.borrow().values().cloned().collect();
            let mut keyed = Vec::new();
            for (key, value) in pairs {
                let value = sort_keys(r, &value)?;
                keyed.push((key.clone(), Value::tuple(vec![key, value])));
            }
            let mut out = super::value::Dict::new();
            for pair in sorted(r, keyed, false)? {
                if let (Some(key), Some(value)) = (item(&pair, &Value::Int(0))?, item(&pair, &Value::Int(1))?) {
                    super::value::insert(&mut out, key, value)?;
                }
            }
            Value::Dict(Rc::new(RefCell::new(out)))
        }
        Value::List(items) => {
            let items = items.borrow().clone();
            Value::list(items.iter().map(|i| sort_keys(r, i)).collect::<Result<_>>()?)
        }
        Value::Tuple(items) => Value::tuple(items.iter().map(|i| sort_keys(r, i)).collect::<Result<_>>()?),
        other => other.clone(),
    })
}
