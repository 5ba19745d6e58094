//! Operators, indices and slices with Python's meaning.

use std::rc::Rc;

use crate::ast::{Binary, Comparison};
use crate::error::{Error, Result};
use crate::format::printf;
use crate::render::Renderer;
use crate::value::{Text, Value, View};

/// `<`, `>`, `&`, `'` and `"` as HTML writes them.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '\'' => out.push_str("&#39;"),
            '"' => out.push_str("&#34;"),
            c => out.push(c),
        }
    }
    out
}

fn too_large() -> Error {
    Error::unsupported("a whole number of more than 127 bits is not supported")
}

/// `left operator right`
pub fn binary(r: &mut Renderer, operator: Binary, left: &Value, right: &Value) -> Result<Value> {
    left.check()?;
    if let (Binary::Mod, Value::Text(text), Value::Undefined(_)) = (operator, left, right) {
        // Formatting takes it for a mapping, and only what it writes is used.
        return Ok(Value::Text(Text { text: printf(r, &text.text, right)?.into(), markup: text.markup }));
    }
    right.check()?;
    if let (Some(a), Some(b)) = (left.as_int(), right.as_int()) {
        return whole(operator, a, b);
    }
    if let (Some(a), Some(b)) = (left.as_float(), right.as_float()) {
        return real(operator, a, b).map(Value::Float);
    }
    match (operator, left, right) {
        (Binary::Add, Value::Text(a), Value::Text(b)) => {
            r.charge_bytes(a.text.len() + b.text.len())?;
            let safe = |t: &Text| if t.markup { t.text.to_string() } else { escape(&t.text) };
            let markup = a.markup || b.markup;
            let text = if markup { safe(a) + &safe(b) } else { format!("{}{}", a.text, b.text) };
            Ok(Value::Text(Text { text: text.into(), markup }))
        }
        (Binary::Add, Value::List(a), Value::List(b)) => {
            let items: Vec<Value> = a.borrow().iter().chain(b.borrow().iter()).cloned().collect();
            r.charge(items.len())?;
            Ok(Value::list(items))
        }
        (Binary::Add, _, _) if left.as_tuple().is_some() && right.as_tuple().is_some() => {
            let parts = [left.as_tuple(), right.as_tuple()];
            let items: Vec<Value> = parts.into_iter().flatten().flat_map(|t| t.iter().cloned()).collect();
            r.charge(items.len())?;
            Ok(Value::tuple(items))
        }
        (Binary::Mul, thing, count) | (Binary::Mul, count, thing)
            if count.as_int().is_some() && matches!(thing, Value::Text(_) | Value::List(_) | Value::Tuple(_)) =>
        {
            repeat(r, thing, count.as_int().unwrap_or(0))
        }
        (Binary::Mod, Value::Text(text), _) => {
            if text.markup {
                return Err(Error::unsupported("`%` on text with escaped HTML (Markup) is not supported"));
            }
            Ok(printf(r, &text.text, right)?.into())
        }
        _ => {
            let sign = match operator {
                Binary::Add => "+",
                Binary::Sub => "-",
                Binary::Mul => "*",
                Binary::Div => "/",
                Binary::FloorDiv => "//",
                Binary::Mod => "%",
                Binary::Pow => "** or pow()",
            };
            let (a, b) = (left.type_name(), right.type_name());
            // Python has another sentence for each; the types are what helps.
            Err(Error::failed(format!("unsupported operand type(s) for {sign}: '{a}' and '{b}'")))
        }
    }
}

fn repeat(r: &mut Renderer, thing: &Value, count: i128) -> Result<Value> {
    let count = usize::try_from(count.max(0)).unwrap_or(usize::MAX);
    match thing {
        Value::Text(t) => {
            r.charge_bytes(t.text.len().saturating_mul(count))?;
            Ok(Value::Text(Text { text: t.text.repeat(count).into(), markup: t.markup }))
        }
        Value::List(_) | Value::Tuple(_) => {
            let items = thing.iterate()?;
            r.charge(items.len().saturating_mul(count))?;
            let mut out = Vec::new();
            for _ in 0..if items.is_empty() { 0 } else { count } {
                out.extend_from_slice(&items);
            }
            Ok(if matches!(thing, Value::List(_)) { Value::list(out) } else { Value::tuple(out) })
        }
        _ => Err(Error::failed("only texts and lists are repeated")),
    }
}

fn whole(operator: Binary, a: i128, b: i128) -> Result<Value> {
    let checked = |n: Option<i128>| n.map(Value::Int).ok_or_else(too_large);
    let nonzero = |what: &str| if b == 0 { Err(Error::failed(what)) } else { Ok(()) };
    match operator {
        Binary::Add => checked(a.checked_add(b)),
        Binary::Sub => checked(a.checked_sub(b)),
        Binary::Mul => checked(a.checked_mul(b)),
        Binary::Div => {
            nonzero("division by zero")?;
            Ok(Value::Float(a as f64 / b as f64))
        }
        Binary::FloorDiv => {
            nonzero("integer division or modulo by zero")?;
            let quotient = a.checked_div(b).ok_or_else(too_large)?;
            checked(Some(quotient - i128::from(a % b != 0 && (a < 0) != (b < 0))))
        }
        Binary::Mod => {
            nonzero("integer modulo by zero")?;
            let rest = a.checked_rem(b).ok_or_else(too_large)?;
            checked(Some(if rest != 0 && (rest < 0) != (b < 0) { rest + b } else { rest }))
        }
        Binary::Pow if b >= 0 => match a {
            0 | 1 => Ok(Value::Int(if b == 0 { 1 } else { a })),
            -1 => Ok(Value::Int(if b % 2 == 0 { 1 } else { -1 })),
            _ => checked(u32::try_from(b).ok().and_then(|b| a.checked_pow(b))),
        },
        Binary::Pow => real(operator, a as f64, b as f64).map(Value::Float),
    }
}

fn real(operator: Binary, a: f64, b: f64) -> Result<f64> {
    let nonzero = |what: &str| if b == 0.0 { Err(Error::failed(what)) } else { Ok(()) };
    Ok(match operator {
        Binary::Add => a + b,
        Binary::Sub => a - b,
        Binary::Mul => a * b,
        Binary::Div => {
            nonzero("float division by zero")?;
            a / b
        }
        Binary::FloorDiv => {
            nonzero("float floor division by zero")?;
            floor_divide(a, b).0
        }
        Binary::Mod => {
            nonzero("float modulo")?;
            floor_divide(a, b).1
        }
        Binary::Pow if a == 0.0 && b < 0.0 => return Err(Error::failed("0.0 cannot be raised to a negative power")),
        Binary::Pow if a < 0.0 && a.is_finite() && b.is_finite() && b.fract() != 0.0 => {
            return Err(Error::unsupported("complex numbers are not supported"));
        }
        Binary::Pow => {
            let power = a.powf(b);
            if power.is_infinite() && a.is_finite() && b.is_finite() {
                return Err(Error::failed("Numerical result out of range"));
            }
            power
        }
    })
}

/// Quotient and rest as `float.__divmod__` computes them.
fn floor_divide(a: f64, b: f64) -> (f64, f64) {
    let mut rest = a % b;
    let mut quotient = (a - rest) / b;
    if rest != 0.0 {
        if (b < 0.0) != (rest < 0.0) {
            rest += b;
            quotient -= 1.0;
        }
    } else {
        rest = 0.0f64.copysign(b);
    }
    let floor = if quotient != 0.0 {
        let floor = quotient.floor();
        if quotient - floor > 0.5 { floor + 1.0 } else { floor }
    } else {
        0.0f64.copysign(a / b)
    };
    (floor, rest)
}

/// `-value` or `+value`
pub fn signed(value: &Value, negative: bool) -> Result<Value> {
    value.check()?;
    let sign = if negative { "-" } else { "+" };
    match (value.as_int(), value) {
        (Some(n), _) => (if negative { n.checked_neg() } else { Some(n) }).map(Value::Int).ok_or_else(too_large),
        (None, Value::Float(x)) => Ok(Value::Float(if negative { -x } else { *x })),
        _ => Err(Error::failed(format!("bad operand type for unary {sign}: '{}'", value.type_name()))),
    }
}

/// One comparison.
pub fn compare(operator: Comparison, left: &Value, right: &Value) -> Result<bool> {
    let order = |sign: &str, holds: fn(std::cmp::Ordering) -> bool| {
        left.order(right, sign).map(|order| order.is_some_and(holds))
    };
    match operator {
        Comparison::Equal => left.equals(right),
        Comparison::NotEqual => left.equals(right).map(|e| !e),
        Comparison::Less => order("<", |o| o.is_lt()),
        Comparison::LessEqual => order("<=", |o| o.is_le()),
        Comparison::Greater => order(">", |o| o.is_gt()),
        Comparison::GreaterEqual => order(">=", |o| o.is_ge()),
        Comparison::In => contains(right, left),
        Comparison::NotIn => contains(right, left).map(|c| !c),
    }
}

/// `item in container`
pub fn contains(container: &Value, item: &Value) -> Result<bool> {
    container.check_strict()?;
    let among = |items: &[Value]| -> Result<bool> {
        for own in items {
            if own.same(item) || own.equals(item)? {
                return Ok(true);
            }
        }
        Ok(false)
    };
    match container {
        Value::Undefined(_) => Ok(false),
        Value::Text(text) => {
            item.check_strict()?;
            match item.as_text() {
                Some(part) => Ok(text.text.contains(part)),
                None => Err(Error::failed(format!(
                    "'in <string>' requires string as left operand, not {}",
                    item.type_name()
                ))),
            }
        }
        Value::List(items) => among(&items.borrow()),
        Value::Tuple(items) | Value::Group(items) => among(items),
        Value::Dict(dict) => Ok(dict.borrow().contains_key(&item.key()?)),
        Value::View(View::Keys, dict) => Ok(dict.borrow().contains_key(&item.key()?)),
        Value::View(..) | Value::Range(..) => among(&container.iterate()?),
        // What was walked over to find it is gone.
        Value::Iterator(once) => {
            while let Some(own) = { once.borrow_mut().items.pop_front() } {
                if own.same(item) || own.equals(item)? {
                    return Ok(true);
                }
            }
            Ok(false)
        }
        other => Err(Error::failed(format!("argument of type '{}' is not iterable", other.type_name()))),
    }
}

/// The place of an index in something of `length` items.
fn place(index: i128, length: usize) -> Option<usize> {
    let index = if index < 0 { index + length as i128 } else { index };
    usize::try_from(index).ok().filter(|i| *i < length)
}

/// `value[index]`; `None` where Python raises a TypeError or a LookupError.
pub fn item(value: &Value, index: &Value) -> Result<Option<Value>> {
    value.check()?;
    index.check_strict()?;
    let at = |length: usize| index.as_int().and_then(|i| place(i, length));
    Ok(match value {
        Value::Text(t) => {
            let length = t.text.chars().count();
            let c = at(length).and_then(|i| t.text.chars().nth(i));
            c.map(|c| Value::Text(Text { text: c.encode_utf8(&mut [0; 4]).to_owned().into(), markup: t.markup }))
        }
        Value::List(items) => {
            let items = items.borrow();
            at(items.len()).map(|i| items[i].clone())
        }
        Value::Tuple(items) | Value::Group(items) => at(items.len()).map(|i| items[i].clone()),
        Value::Dict(dict) => match index.key() {
            Ok(key) => dict.borrow().get(&key).map(|(_, v)| v.clone()),
            Err(_) => None,
        },
        Value::Range(start, _, step) => at(value.length()?).map(|i| Value::Int(start + i as i128 * step)),
        _ => None,
    })
}

/// `value[start:stop:step]`
pub fn slice(r: &mut Renderer, value: &Value, parts: &[Value; 3]) -> Result<Value> {
    value.check()?;
    let bound = |part: &Value| -> Result<Option<i128>> {
        part.check()?;
        match part {
            Value::None => Ok(None),
            other => other
                .as_int()
                .map(Some)
                .ok_or_else(|| Error::failed("slice indices must be integers or None or have an __index__ method")),
        }
    };
    let length = match value {
        Value::Text(_) | Value::List(_) | Value::Tuple(_) | Value::Group(_) | Value::Range(..) => value.length()?,
        other => return Err(Error::failed(format!("'{}' object is not sliceable", other.type_name()))),
    };
    let step = bound(&parts[2])?.unwrap_or(1);
    if step == 0 {
        return Err(Error::failed("slice step cannot be zero"));
    }
    let (low, high) = if step > 0 { (0, length as i128) } else { (-1, length as i128 - 1) };
    let clamp = |at: Option<i128>, default: i128| match at {
        None => default,
        Some(i) if i < 0 => (i.saturating_add(length as i128)).max(low),
        Some(i) => i.min(high),
    };
    let (first, last) = if step > 0 { (low, high) } else { (high, low) };
    let (start, stop) = (clamp(bound(&parts[0])?, first), clamp(bound(&parts[1])?, last));
    let count = super::value::range_length(start, stop, step);
    r.charge(count / 16)?;
    let indices = (0..count as i128).map(|i| (start + i * step) as usize);
    Ok(match value {
        Value::Text(t) => {
            let chars: Vec<char> = t.text.chars().collect();
            let text: String = indices.map(|i| chars[i]).collect();
            Value::Text(Text { text: text.into(), markup: t.markup })
        }
        Value::Range(from, _, by) => Value::Range(from + start * by, from + stop * by, by * step),
        Value::List(items) => {
            let items = items.borrow();
            Value::list(indices.map(|i| items[i].clone()).collect())
        }
        _ => {
            let items = value.as_tuple().map(Rc::clone).unwrap_or_default();
            Value::tuple(indices.map(|i| items[i].clone()).collect())
        }
    })
}
