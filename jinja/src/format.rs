//! Python's two ways of formatting: `text % values` and `text.format(values)`.

use crate::error::{Error, Result};
use crate::python::{escaped, float};
use crate::render::{Arguments, Renderer};
use crate::value::Value;
use crate::{attributes, operators};

/// Wider fields than this are refused.
const MAX_WIDTH: usize = 1 << 20;

/// How a value is laid out: `[[fill]align][sign][#][0][width][grouping][.precision][type]`.
#[derive(Clone, Debug, Default)]
struct Spec {
    fill: Option<char>,
    align: Option<char>,
    sign: Option<char>,
    alternate: bool,
    zero: bool,
    width: usize,
    grouping: Option<char>,
    precision: Option<usize>,
    kind: Option<char>,
}

/// `format % values`
pub fn printf(r: &mut Renderer, format: &str, values: &Value) -> Result<String> {
    let single = [values.clone()];
    let items: &[Value] = match values.as_tuple() {
        Some(items) => items,
        None => &single,
    };
    // Python takes whatever can be indexed, but for tuples and texts, for a mapping, which may be left unused.
    let mapping = matches!(values, Value::Dict(_) | Value::List(_) | Value::Range(..) | Value::Undefined(_));
    let (mut out, mut next) = (String::new(), 0);
    let mut chars = format.chars().peekable();
    let mut used_mapping = false;
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut named = None;
        if chars.next_if_eq(&'(').is_some() {
            let (mut key, mut open) = (String::new(), 1);
            loop {
                match chars.next() {
                    None => return Err(Error::failed("incomplete format key")),
                    Some(')') if open == 1 => break,
                    Some(c) => {
                        open += i32::from(c == '(') - i32::from(c == ')');
                        key.push(c);
                    }
                }
            }
            let Value::Dict(dict) = values else { return Err(Error::failed("format requires a mapping")) };
            let found = dict.borrow().get(&Value::from(key.as_str()).key()?).map(|(_, v)| v.clone());
            named = Some(found.ok_or_else(|| Error::failed(format!("the mapping has no key {key:?}")))?);
            used_mapping = true;
        }
        let mut take = |named: &Option<Value>| -> Result<Value> {
            if let Some(value) = named {
                return Ok(value.clone());
            }
            let value = items.get(next).cloned();
            next += 1;
            value.ok_or_else(|| Error::failed("not enough arguments for format string"))
        };
        let mut spec = Spec::default();
        let mut left = false;
        while let Some(flag) = chars.next_if(|c| "-+ 0#".contains(*c)) {
            match flag {
                '-' => left = true,
                '+' => spec.sign = Some('+'),
                ' ' if spec.sign.is_none() => spec.sign = Some(' '),
                '0' => spec.zero = true,
                '#' => spec.alternate = true,
                _ => {}
            }
        }
        let number = |chars: &mut std::iter::Peekable<std::str::Chars>| {
            let mut n = 0usize;
            while let Some(digit) = chars.peek().and_then(|c| c.to_digit(10)) {
                n = n.saturating_mul(10).saturating_add(digit as usize);
                chars.next();
            }
            n
        };
        if chars.next_if_eq(&'*').is_some() {
            let width = take(&None)?.index("* wants")?;
            left |= width < 0;
            spec.width = usize::try_from(width.unsigned_abs()).unwrap_or(usize::MAX);
        } else {
            spec.width = number(&mut chars);
        }
        if chars.next_if_eq(&'.').is_some() {
            spec.precision = Some(if chars.next_if_eq(&'*').is_some() {
                usize::try_from(take(&None)?.index("* wants")?).unwrap_or(0)
            } else {
                number(&mut chars)
            });
        }
        while chars.next_if(|c| matches!(c, 'h' | 'l' | 'L')).is_some() {}
        let Some(kind) = chars.next() else { return Err(Error::failed("incomplete format")) };
        spec.align = left.then_some('<');
        if kind == '%' {
            out.push('%');
            continue;
        }
        let value = take(&named)?;
        out.push_str(&conversion(r, spec, left, kind, &value)?);
    }
    if !mapping && !used_mapping && next < items.len() {
        return Err(Error::failed("not all arguments converted during string formatting"));
    }
    r.charge_bytes(out.len())?;
    Ok(out)
}

fn conversion(r: &mut Renderer, mut spec: Spec, left: bool, kind: char, value: &Value) -> Result<String> {
    let real = || {
        value.check()?;
        value.as_float().ok_or_else(|| {
            Error::failed(format!("%{kind} format: a real number is required, not {}", value.type_name()))
        })
    };
    match kind {
        's' | 'r' | 'a' => {
            let text = match kind {
                's' => value.str()?,
                'r' => value.repr()?,
                _ => ascii(&value.repr()?),
            };
            // Zeros and signs are for numbers.
            let plain = Spec { width: spec.width, precision: spec.precision, ..Spec::default() };
            lay_out_text(r, &Spec { align: Some(if left { '<' } else { '>' }), ..plain }, &text)
        }
        'c' => {
            let text = match (value.as_int(), value.as_text()) {
                (Some(code), _) => u32::try_from(code).ok().and_then(char::from_u32).map(String::from),
                (None, Some(text)) if text.chars().count() == 1 => Some(text.to_owned()),
                _ => None,
            };
            let text = text.ok_or_else(|| Error::failed("%c requires an int or a unicode character"))?;
            let plain = Spec { width: spec.width, ..Spec::default() };
            lay_out_text(r, &Spec { align: Some(if left { '<' } else { '>' }), ..plain }, &text)
        }
        'd' | 'i' | 'u' | 'x' | 'X' | 'o' => {
            let whole = match value.as_int() {
                Some(n) => n,
                None if "diu".contains(kind) => truncated(real()?)?,
                None => {
                    return Err(Error::failed(format!(
                        "%{kind} format: an integer is required, not {}",
                        value.type_name()
                    )));
                }
            };
            let mut digits = radix(whole.unsigned_abs(), kind);
            // A precision is a number of digits here.
            let least = spec.precision.unwrap_or(0).min(MAX_WIDTH);
            digits = "0".repeat(least.saturating_sub(digits.len())) + &digits;
            let prefix = match (spec.alternate, kind) {
                (true, 'x') => "0x",
                (true, 'X') => "0X",
                (true, 'o') => "0o",
                _ => "",
            };
            number(r, &spec, whole < 0, prefix, &digits)
        }
        'e' | 'E' | 'f' | 'F' | 'g' | 'G' => {
            let x = real()?;
            spec.kind = Some(kind);
            spec.zero &= x.is_finite() || spec.zero;
            let digits = float_digits(x.abs(), kind, spec.precision.unwrap_or(6), spec.alternate)?;
            number(r, &spec, x.is_sign_negative() && !x.is_nan(), "", &digits)
        }
        other => Err(Error::failed(format!("unsupported format character '{other}' ({:#x})", other as u32))),
    }
}

/// Everything that is not ASCII as an escape.
pub fn ascii(text: &str) -> String {
    text.chars().map(|c| if c.is_ascii() { c.to_string() } else { escaped(c) }).collect()
}

fn truncated(x: f64) -> Result<i128> {
    if !x.is_finite() {
        return Err(Error::failed(format!("cannot convert float {} to integer", float(x))));
    }
    if x.abs() >= 1.7e38 {
        return Err(Error::unsupported("a whole number of more than 127 bits is not supported"));
    }
    Ok(x as i128)
}

fn radix(n: u128, kind: char) -> String {
    match kind {
        'x' => format!("{n:x}"),
        'X' => format!("{n:X}"),
        'o' => format!("{n:o}"),
        'b' => format!("{n:b}"),
        _ => n.to_string(),
    }
}

/// Digits of a float that is not negative.
fn float_digits(x: f64, kind: char, precision: usize, alternate: bool) -> Result<String> {
    if precision > 1000 {
        return Err(Error::unsupported("more than 1000 digits are not supported"));
    }
    let cased = |text: String| if kind.is_uppercase() { text.to_uppercase() } else { text };
    if !x.is_finite() {
        return Ok(cased(float(x)) + if kind == '%' { "%" } else { "" });
    }
    let scientific = |precision: usize| {
        let text = format!("{x:.precision$e}");
        let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        let exponent: i32 = exponent.parse().unwrap_or(0);
        (digits.to_owned(), exponent)
    };
    let with_exponent = |digits: &str, exponent: i32| {
        let sign = if exponent < 0 { '-' } else { '+' };
        format!("{digits}e{sign}{:02}", exponent.abs())
    };
    Ok(cased(match kind {
        'f' | 'F' => {
            let text = format!("{x:.precision$}");
            if alternate && precision == 0 { text + "." } else { text }
        }
        '%' => format!("{:.precision$}%", x * 100.0),
        'e' | 'E' => {
            let (digits, exponent) = scientific(precision);
            let digits = if alternate && precision == 0 { digits + "." } else { digits };
            with_exponent(&digits, exponent)
        }
        // `g`, and `n`, which means "no type" here: at least one digit after the point.
        _ => {
            let precision = precision.max(1);
            let (digits, exponent) = scientific(precision - 1);
            let point = exponent + 1;
            let limit = precision as i32 - i32::from(kind == 'n');
            let shorten = |text: String| match (alternate, text.contains('.')) {
                (false, true) => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
                _ => text,
            };
            if x != 0.0 && (point <= -4 || point > limit) {
                with_exponent(&shorten(digits), exponent)
            } else {
                let decimals = usize::try_from(precision as i32 - point).unwrap_or(0);
                let text = shorten(format!("{x:.decimals$}"));
                if kind == 'n' && !text.contains('.') { text + ".0" } else { text }
            }
        }
    }))
}

fn pad(r: &mut Renderer, text: String, width: usize, fill: char, align: char) -> Result<String> {
    if width > MAX_WIDTH {
        return Err(Error::unsupported(format!("a field {width} characters wide is not supported")));
    }
    let missing = width.saturating_sub(text.chars().count());
    r.charge_bytes(missing)?;
    let (before, after) = match align {
        '<' => (0, missing),
        '^' => (missing / 2, missing - missing / 2),
        _ => (missing, 0),
    };
    let fill = |n: usize| std::iter::repeat_n(fill, n).collect::<String>();
    Ok(fill(before) + &text + &fill(after))
}

fn lay_out_text(r: &mut Renderer, spec: &Spec, text: &str) -> Result<String> {
    let text: String = match spec.precision {
        Some(most) => text.chars().take(most).collect(),
        None => text.to_owned(),
    };
    let fill = spec.fill.unwrap_or(if spec.zero { '0' } else { ' ' });
    pad(r, text, spec.width, fill, spec.align.unwrap_or('<'))
}

fn number(r: &mut Renderer, spec: &Spec, negative: bool, prefix: &str, digits: &str) -> Result<String> {
    let sign = match (negative, spec.sign) {
        (true, _) => "-",
        (false, Some('+')) => "+",
        (false, Some(' ')) => " ",
        _ => "",
    };
    let zeros = spec.zero && spec.align.is_none() && spec.fill.is_none();
    let (fill, align) = match (zeros, spec.align) {
        (true, _) => ('0', '='),
        (false, align) => (spec.fill.unwrap_or(if spec.zero { '0' } else { ' ' }), align.unwrap_or('>')),
    };
    // printf's `-` wins over its `0`.
    let fill = if spec.align == Some('<') && spec.fill.is_none() && spec.kind.is_some() { ' ' } else { fill };
    let head = format!("{sign}{prefix}");
    let width = if align == '=' { spec.width.saturating_sub(head.chars().count()) } else { 0 };
    if width > MAX_WIDTH {
        return Err(Error::unsupported(format!("a field {width} characters wide is not supported")));
    }
    let digits = match spec.grouping {
        None => digits.to_owned(),
        Some(separator) => {
            let split = digits.find(|c: char| !c.is_ascii_hexdigit()).unwrap_or(digits.len());
            // Of digits in the sense of the type: an exponent's letter is none.
            let split = if digits.contains("0x") { split } else { digits.find(['.', 'e', 'E', '%']).unwrap_or(split) };
            let (whole, rest) = digits.split_at(split);
            let by = if matches!(spec.kind, Some('x' | 'X' | 'o' | 'b')) { 4 } else { 3 };
            let least = if fill == '0' { width.saturating_sub(rest.len()) } else { 0 };
            group(whole, by, separator, least) + rest
        }
    };
    if align == '=' {
        return Ok(head + &pad(r, digits, width, fill, '>')?);
    }
    pad(r, head + &digits, spec.width, fill, align)
}

/// Digits in groups; zeros before them up to `least` characters.
fn group(digits: &str, by: usize, separator: char, least: usize) -> String {
    let (mut out, mut count) = (Vec::new(), 0);
    let mut digits = digits.chars().rev();
    while let Some(digit) = digits.next().or_else(|| (out.len() < least).then_some('0')) {
        if count > 0 && count % by == 0 {
            out.push(separator);
        }
        out.push(digit);
        count += 1;
    }
    out.iter().rev().collect()
}

/// `format(value, spec)`
pub fn format_value(r: &mut Renderer, value: &Value, spec: &str) -> Result<String> {
    value.check_strict()?;
    if spec.is_empty() {
        return value.str();
    }
    let mut parsed = parse(spec)?;
    let unknown =
        |kind: char| Error::failed(format!("Unknown format code '{kind}' for object of type '{}'", value.type_name()));
    let kind = parsed.kind;
    match value {
        Value::Text(t) => match kind {
            None | Some('s') if parsed.sign.is_none() && !parsed.alternate && parsed.grouping.is_none() => {
                if parsed.align == Some('=') {
                    return Err(Error::failed("'=' alignment not allowed in string format specifier"));
                }
                lay_out_text(r, &parsed, &t.text)
            }
            None | Some('s') => Err(Error::failed("Sign, '#' and ',' are not allowed in string format specifier")),
            Some(kind) => Err(unknown(kind)),
        },
        Value::Bool(b) if kind.is_none() && parsed.width == 0 => Ok(if *b { "True" } else { "False" }.to_owned()),
        Value::Int(_) | Value::Bool(_) if matches!(kind, None | Some('d' | 'x' | 'X' | 'o' | 'b' | 'c' | 'n')) => {
            let n = value.as_int().unwrap_or(0);
            if parsed.precision.is_some() {
                return Err(Error::failed("Precision not allowed in integer format specifier"));
            }
            if kind == Some('c') {
                let c = u32::try_from(n).ok().and_then(char::from_u32);
                let c = c.ok_or_else(|| Error::failed("%c arg not in range(0x110000)"))?;
                return lay_out_text(r, &parsed, &c.to_string());
            }
            let kind = kind.filter(|k| *k != 'n').unwrap_or('d');
            let prefix = match (parsed.alternate, kind) {
                (true, 'x') => "0x",
                (true, 'X') => "0X",
                (true, 'o') => "0o",
                (true, 'b') => "0b",
                _ => "",
            };
            parsed.kind = Some(kind).filter(|_| parsed.align != Some('<'));
            number(r, &parsed, n < 0, prefix, &radix(n.unsigned_abs(), kind))
        }
        Value::Int(_) | Value::Bool(_) | Value::Float(_)
            if matches!(kind, None | Some('e' | 'E' | 'f' | 'F' | 'g' | 'G' | 'n' | '%')) =>
        {
            let x = value.as_float().unwrap_or(f64::NAN);
            let digits = match (kind, parsed.precision) {
                (None, None) => float(x.abs()),
                (None, Some(precision)) => float_digits(x.abs(), 'n', precision, parsed.alternate)?,
                (Some('n'), precision) => float_digits(x.abs(), 'g', precision.unwrap_or(6), parsed.alternate)?,
                (Some(kind), precision) => float_digits(x.abs(), kind, precision.unwrap_or(6), parsed.alternate)?,
            };
            parsed.kind = None;
            number(r, &parsed, x.is_sign_negative() && !x.is_nan(), "", &digits)
        }
        Value::Int(_) | Value::Bool(_) | Value::Float(_) => Err(unknown(kind.unwrap_or('?'))),
        other => Err(Error::failed(format!("unsupported format string passed to {}.__format__", other.type_name()))),
    }
}

fn parse(text: &str) -> Result<Spec> {
    let chars: Vec<char> = text.chars().collect();
    let (mut spec, mut at) = (Spec::default(), 0);
    let is_align = |c: Option<&char>| c.is_some_and(|c| "<>=^".contains(*c));
    if is_align(chars.get(1)) {
        (spec.fill, spec.align, at) = (Some(chars[0]), Some(chars[1]), 2);
    } else if is_align(chars.first()) {
        (spec.align, at) = (Some(chars[0]), 1);
    }
    if let Some(sign @ ('+' | '-' | ' ')) = chars.get(at) {
        (spec.sign, at) = (Some(*sign), at + 1);
    }
    if chars.get(at) == Some(&'z') {
        return Err(Error::unsupported("'z' in a format is not supported"));
    }
    if chars.get(at) == Some(&'#') {
        (spec.alternate, at) = (true, at + 1);
    }
    if chars.get(at) == Some(&'0') {
        (spec.zero, at) = (true, at + 1);
    }
    let digits = |at: &mut usize| {
        let start = *at;
        let mut n = 0usize;
        while let Some(digit) = chars.get(*at).and_then(|c| c.to_digit(10)) {
            n = n.saturating_mul(10).saturating_add(digit as usize);
            *at += 1;
        }
        (*at > start).then_some(n)
    };
    spec.width = digits(&mut at).unwrap_or(0);
    if let Some(separator @ (',' | '_')) = chars.get(at) {
        (spec.grouping, at) = (Some(*separator), at + 1);
    }
    if chars.get(at) == Some(&'.') {
        at += 1;
        spec.precision = Some(digits(&mut at).ok_or_else(|| Error::failed("Format specifier missing precision"))?);
    }
    if let Some(kind) = chars.get(at) {
        (spec.kind, at) = (Some(*kind), at + 1);
    }
    if at < chars.len() {
        return Err(Error::failed(format!("Invalid format specifier '{text}'")));
    }
    Ok(spec)
}

/// `text.format(…)`
pub fn str_format(r: &mut Renderer, text: &str, arguments: &Arguments) -> Result<String> {
    let mut automatic = Some(0);
    let out = fields(r, text, arguments, &mut automatic, 0)?;
    r.charge_bytes(out.len())?;
    Ok(out)
}

fn fields(
    r: &mut Renderer,
    text: &str,
    arguments: &Arguments,
    automatic: &mut Option<usize>,
    depth: usize,
) -> Result<String> {
    if depth > 1 {
        return Err(Error::failed("Max string recursion exceeded"));
    }
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find(['{', '}']) {
        out.push_str(&rest[..at]);
        let brace = &rest[at..at + 1];
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix(brace) {
            out.push_str(brace);
            rest = after;
            continue;
        }
        if brace == "}" {
            return Err(Error::failed("Single '}' encountered in format string"));
        }
        let mut open = 1;
        let end = rest.char_indices().find(|(_, c)| {
            open += i32::from(*c == '{') - i32::from(*c == '}');
            open == 0
        });
        let Some((end, _)) = end else { return Err(Error::failed("expected '}' before end of string")) };
        let field = &rest[..end];
        rest = &rest[end + 1..];
        let cut = field.find(['!', ':']).unwrap_or(field.len());
        let (name, after) = field.split_at(cut);
        let (conversion, spec) = match after.strip_prefix('!') {
            Some(after) => {
                let mut chars = after.chars();
                let conversion = chars.next();
                let spec = chars.as_str();
                (conversion, spec.strip_prefix(':').unwrap_or(spec))
            }
            None => (None, after.strip_prefix(':').unwrap_or("")),
        };
        let mut value = field_value(r, name, arguments, automatic)?;
        match conversion {
            None => {}
            Some('s') => value = value.str()?.into(),
            Some('r') => value = value.repr()?.into(),
            Some('a') => value = ascii(&value.repr()?).into(),
            Some(c) => return Err(Error::failed(format!("Unknown conversion specifier '{c}'"))),
        }
        let spec = if spec.contains('{') { fields(r, spec, arguments, automatic, depth + 1)? } else { spec.to_owned() };
        out.push_str(&format_value(r, &value, &spec)?);
    }
    out.push_str(rest);
    Ok(out)
}

/// `0`, `name`, `name.attribute`, `name[index]`, or nothing for the next one.
fn field_value(r: &mut Renderer, name: &str, arguments: &Arguments, automatic: &mut Option<usize>) -> Result<Value> {
    let cut = name.find(['.', '[']).unwrap_or(name.len());
    let (first, mut path) = name.split_at(cut);
    let position = if first.is_empty() {
        let next = automatic.ok_or_else(|| {
            Error::failed("cannot switch from manual field specification to automatic field numbering")
        })?;
        *automatic = Some(next + 1);
        Some(next)
    } else {
        first.parse::<usize>().ok()
    };
    if !first.is_empty() && position.is_some() {
        if automatic.is_some_and(|n| n > 0) {
            return Err(Error::failed("cannot switch from automatic field numbering to manual field specification"));
        }
        *automatic = None;
    }
    let mut value =
        match position {
            Some(at) => arguments.positional.get(at).cloned().ok_or_else(|| {
                Error::failed(format!("Replacement index {at} out of range for positional args tuple"))
            })?,
            None => {
                let found = arguments.named.iter().find(|(n, _)| &**n == first).map(|(_, v)| v.clone());
                found.ok_or_else(|| Error::failed(format!("format: no argument {first:?}")))?
            }
        };
    while !path.is_empty() {
        if let Some(after) = path.strip_prefix('.') {
            let cut = after.find(['.', '[']).unwrap_or(after.len());
            value = strictly(r, &value, &after[..cut].into(), true)?;
            path = &after[cut..];
        } else {
            let after = &path[1..];
            let Some(cut) = after.find(']') else { return Err(Error::failed("Missing ']' in format string")) };
            let index = match after[..cut].parse::<i128>() {
                Ok(n) => Value::Int(n),
                Err(_) => after[..cut].into(),
            };
            value = strictly(r, &value, &index, false)?;
            path = &after[cut + 1..];
        }
    }
    Ok(value)
}

/// A field's attribute or item: in the sandbox as templates have them, else only what Python has by that way.
fn strictly(r: &mut Renderer, value: &Value, name: &Value, attribute: bool) -> Result<Value> {
    if r.settings.sandboxed {
        return if attribute { r.attribute(value, name.as_text().unwrap_or_default()) } else { r.item(value, name) };
    }
    let found = if attribute {
        attributes::of(r, value, name.as_text().unwrap_or_default())?
    } else {
        operators::item(value, name)?
    };
    found.ok_or_else(|| {
        let (kind, name) = (value.type_name(), name.repr().unwrap_or_default());
        Error::failed(format!("format: '{kind}' object has no {} {name}", if attribute { "attribute" } else { "item" }))
    })
}
