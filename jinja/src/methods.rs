//! Methods of Python's `str`, `list`, `dict` and numbers.

use std::cell::RefCell;
use std::rc::Rc;

use crate::error::{Error, Result};
use crate::format::str_format;
use crate::functions::dict;
use crate::python::{is_decimal, is_digit, is_letter, is_printable, is_space};
use crate::render::{Arguments, Renderer};
use crate::value::{Dict, Text, Value, View, insert};

pub fn call(r: &mut Renderer, value: &Value, name: &str, arguments: Arguments) -> Result<Value> {
    match value {
        Value::Text(text) => str_method(r, text, name, arguments),
        Value::List(items) => list_method(r, items, name, arguments),
        Value::Tuple(_) | Value::Group(_) | Value::Range(..) => search_method(value, name, arguments),
        Value::Dict(own) => dict_method(own, name, arguments),
        Value::Int(n) if matches!(name, "conjugate" | "bit_length") => {
            arguments.none(name)?;
            Ok(match name {
                "conjugate" => Value::Int(*n),
                _ => Value::Int(128 - i128::from(n.unsigned_abs().leading_zeros())),
            })
        }
        Value::Float(x) if matches!(name, "conjugate" | "is_integer") => {
            arguments.none(name)?;
            Ok(if name == "conjugate" { Value::Float(*x) } else { Value::Bool(x.fract() == 0.0) })
        }
        Value::Loop(state) => {
            let values = arguments.positional;
            if name == "cycle" {
                if values.is_empty() {
                    return Err(Error::failed("no items for cycling given"));
                }
                return Ok(values[state.index.get() % values.len()].clone());
            }
            let changed = match &*state.last.borrow() {
                Some(last) => !Value::tuple(last.clone()).equals(&Value::tuple(values.clone()))?,
                None => true,
            };
            *state.last.borrow_mut() = Some(values);
            Ok(Value::Bool(changed))
        }
        Value::Cycler(cycler) => {
            arguments.none(name)?;
            let (items, at) = &**cycler;
            if name == "reset" {
                at.set(0);
                return Ok(Value::None);
            }
            let item = items[at.get()].clone();
            at.set((at.get() + 1) % items.len());
            Ok(item)
        }
        other => unsupported(other, name),
    }
}

fn unsupported(value: &Value, name: &str) -> Result<Value> {
    Err(Error::unsupported(format!("the method '{}.{name}' is not supported", value.type_name())))
}

/// A text that an argument must be.
fn text_of<'v>(value: &'v Value, what: &str) -> Result<&'v str> {
    value.check()?;
    value.as_text().ok_or_else(|| Error::failed(format!("{what} must be str, not {}", value.type_name())))
}

/// Start and end as Python clips them, in characters.
fn clip(start: &Option<Value>, end: &Option<Value>, length: usize) -> Result<(usize, usize)> {
    let place = |v: &Option<Value>, default: usize| -> Result<usize> {
        match v {
            None | Some(Value::None) => Ok(default),
            Some(v) => {
                let at = v.index("a place")?;
                let at = if at < 0 { at.saturating_add(length as i128).max(0) } else { at };
                Ok(usize::try_from(at).unwrap_or(usize::MAX))
            }
        }
    };
    Ok((place(start, 0)?, place(end, length)?.min(length)))
}

/// First letter large as in a title: digraphs have a form of their own.
fn title_case(c: char) -> String {
    match c {
        'Ǆ' | 'ǅ' | 'ǆ' => "ǅ".into(),
        'Ǉ' | 'ǈ' | 'ǉ' => "ǈ".into(),
        'Ǌ' | 'ǋ' | 'ǌ' => "ǋ".into(),
        'Ǳ' | 'ǲ' | 'ǳ' => "ǲ".into(),
        c => {
            let mut upper = c.to_uppercase();
            let first: String = upper.next().into_iter().collect();
            first + &upper.flat_map(char::to_lowercase).collect::<String>()
        }
    }
}

fn is_cased(c: char) -> bool {
    c.is_lowercase() || c.is_uppercase() || matches!(c, 'ǅ' | 'ǈ' | 'ǋ' | 'ǲ')
}

/// `str.capitalize`
pub fn capitalize(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or(String::new(), |first| title_case(first) + &chars.as_str().to_lowercase())
}

fn title(text: &str) -> String {
    let (mut out, mut inside) = (String::new(), false);
    for c in text.chars() {
        if inside {
            out.extend(c.to_lowercase())
        } else {
            out.push_str(&title_case(c))
        }
        inside = is_cased(c);
    }
    out
}

fn swap_case(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        if c.is_uppercase() {
            out.extend(c.to_lowercase());
        } else {
            out.extend(c.to_uppercase());
        }
    }
    out
}

fn case_fold(text: &str) -> String {
    // The fold of a letter is the small form of its large form, but for a few that have none.
    let fold = |c: char| -> String {
        match c {
            'ı' => c.to_string(),
            '\u{13a0}'..='\u{13f5}' => c.to_string(),
            '\u{13f8}'..='\u{13fd}' => c.to_uppercase().collect(),
            '\u{ab70}'..='\u{abbf}' => c.to_uppercase().collect(),
            c => c.to_uppercase().collect::<String>().chars().flat_map(char::to_lowercase).collect(),
        }
    };
    text.chars().map(fold).collect()
}

/// `str.strip` and its halves: white space, or any of `chars`.
pub fn strip(text: &str, chars: Option<&str>, start: bool, end: bool) -> String {
    let cut = |c: char| chars.map_or_else(|| is_space(c), |set| set.contains(c));
    let mut text = text;
    if start {
        text = text.trim_start_matches(cut);
    }
    if end {
        text = text.trim_end_matches(cut);
    }
    text.to_owned()
}

/// `str.splitlines`
pub fn split_lines(text: &str, keep_ends: bool) -> Vec<String> {
    let ends = |c: char| {
        matches!(c, '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}')
    };
    let (mut out, mut rest) = (Vec::new(), text);
    while !rest.is_empty() {
        let Some(at) = rest.find(ends) else {
            out.push(rest.to_owned());
            break;
        };
        let width =
            if rest[at..].starts_with("\r\n") { 2 } else { rest[at..].chars().next().map_or(0, char::len_utf8) };
        out.push(rest[..at + if keep_ends { width } else { 0 }].to_owned());
        rest = &rest[at + width..];
    }
    out
}

/// `str.center` and its sisters; `where_` is `<`, `>` or `^`.
pub fn justify(r: &mut Renderer, text: &str, width: i128, fill: char, side: char) -> Result<String> {
    let length = text.chars().count();
    let width = usize::try_from(width.max(0)).unwrap_or(usize::MAX);
    let missing = width.saturating_sub(length);
    r.charge_bytes(missing)?;
    let before = match side {
        '<' => 0,
        '>' => missing,
        _ => missing / 2 + (missing & width & 1),
    };
    let fill = |n: usize| std::iter::repeat_n(fill, n).collect::<String>();
    Ok(fill(before) + text + &fill(missing - before))
}

fn is_numeric(c: char) -> bool {
    c.is_numeric() || "〇一二三四五六七八九十百千万亿億兆零壹贰叁肆伍陆柒捌玖拾廿卅".contains(c)
}

pub fn is_alphanumeric(c: char) -> bool {
    is_letter(c) || is_decimal(c) || is_digit(c) || is_numeric(c)
}

/// `str.islower` (or `isupper`): some letter has a case, and none the other.
pub fn is_case(text: &str, lower: bool) -> bool {
    let own = |c: char| if lower { c.is_lowercase() } else { c.is_uppercase() };
    let other = |c: char| if lower { c.is_uppercase() } else { c.is_lowercase() };
    text.chars().any(own) && !text.chars().any(|c| other(c) || (is_cased(c) && !own(c)))
}

fn is_title(text: &str) -> bool {
    let (mut some, mut inside) = (false, false);
    for c in text.chars() {
        let upper = c.is_uppercase() || (is_cased(c) && !c.is_lowercase());
        if (upper && inside) || (c.is_lowercase() && !inside) {
            return false;
        }
        inside = is_cased(c);
        some |= inside;
    }
    some
}

fn split(text: &str, separator: Option<&str>, most: i128, from_right: bool) -> Result<Vec<String>> {
    let limit = usize::try_from(most).map_or(usize::MAX, |n| n.saturating_add(1));
    if separator == Some("") {
        return Err(Error::failed("empty separator"));
    }
    let mut parts: Vec<String> = match (separator, from_right) {
        (Some(s), false) => text.splitn(limit, s).map(str::to_owned).collect(),
        (Some(s), true) => text.rsplitn(limit, s).map(str::to_owned).collect(),
        (None, false) => {
            let (mut parts, mut rest) = (Vec::new(), text.trim_start_matches(is_space));
            while !rest.is_empty() {
                match rest.find(is_space).filter(|_| parts.len() + 1 < limit) {
                    Some(at) => {
                        parts.push(rest[..at].to_owned());
                        rest = rest[at..].trim_start_matches(is_space);
                    }
                    None => {
                        // The last part, at the limit, is the rest as it is; else nothing follows it.
                        parts.push(rest.to_owned());
                        break;
                    }
                }
            }
            parts
        }
        (None, true) => {
            let (mut parts, mut rest) = (Vec::new(), text.trim_end_matches(is_space));
            while !rest.is_empty() {
                let cut = rest.char_indices().rev().find(|(_, c)| is_space(*c)).map(|(at, c)| (at, at + c.len_utf8()));
                match cut.filter(|_| parts.len() + 1 < limit) {
                    Some((at, after)) => {
                        parts.push(rest[after..].to_owned());
                        rest = rest[..at].trim_end_matches(is_space);
                    }
                    None => {
                        parts.push(rest.to_owned());
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
    Ok(parts)
}

fn str_method(r: &mut Renderer, own: &Text, name: &str, arguments: Arguments) -> Result<Value> {
    let text = &*own.text;
    let takes_text =
        matches!(name, "format" | "format_map" | "join" | "replace" | "partition" | "rpartition" | "split");
    if own.markup && takes_text && !arguments.positional.is_empty() {
        return Err(Error::unsupported(format!(
            "the method '{name}' of text with escaped HTML (Markup) is not supported"
        )));
    }
    r.charge(text.len() / 64)?;
    let made = |text: String| Value::Text(Text { text: text.into(), markup: own.markup });
    let list = |parts: Vec<String>| Value::list(parts.into_iter().map(made).collect());
    let all = |arguments: Arguments, test: &dyn Fn(char) -> bool| -> Result<Value> {
        arguments.none(name)?;
        Ok(Value::Bool(!text.is_empty() && text.chars().all(test)))
    };
    Ok(match name {
        "upper" | "lower" | "capitalize" | "title" | "swapcase" | "casefold" => {
            arguments.none(name)?;
            made(match name {
                "upper" => text.to_uppercase(),
                "lower" => text.to_lowercase(),
                "capitalize" => capitalize(text),
                "title" => title(text),
                "swapcase" => swap_case(text),
                _ => case_fold(text),
            })
        }
        "strip" | "lstrip" | "rstrip" => {
            let [chars] = arguments.bind(name, ["chars"])?;
            let chars = chars.filter(|c| !matches!(c, Value::None));
            let chars = chars.as_ref().map(|c| text_of(c, "strip arg")).transpose()?;
            made(strip(text, chars, name != "rstrip", name != "lstrip"))
        }
        "center" | "ljust" | "rjust" => {
            let [width, fill] = arguments.bind(name, ["width", "fillchar"])?;
            let width = width.ok_or_else(|| Error::failed(format!("{name} expected at least 1 argument, got 0")))?;
            let fill = match &fill {
                None => ' ',
                Some(fill) => {
                    let mut chars = text_of(fill, "The fill character")?.chars();
                    match (chars.next(), chars.next()) {
                        (Some(c), None) => c,
                        _ => return Err(Error::failed("The fill character must be exactly one character long")),
                    }
                }
            };
            let side = match name {
                "ljust" => '<',
                "rjust" => '>',
                _ => '^',
            };
            made(justify(r, text, width.index("a width")?, fill, side)?)
        }
        "zfill" => {
            let width = arguments.one(name, "width")?.index("a width")?;
            let (sign, digits) = match text.chars().next() {
                Some('+' | '-') => text.split_at(1),
                _ => ("", text),
            };
            made(sign.to_owned() + &justify(r, digits, width - sign.len() as i128, '0', '>')?)
        }
        "expandtabs" => {
            let [size] = arguments.bind(name, ["tabsize"])?;
            let size = size.map_or(Ok(8), |s| s.index("a tab's size"))?.clamp(0, 1024) as usize;
            let (mut out, mut column) = (String::new(), 0);
            for c in text.chars() {
                match c {
                    '\t' => {
                        let spaces = if size == 0 { 0 } else { size - column % size };
                        out.extend(std::iter::repeat_n(' ', spaces));
                        column += spaces;
                    }
                    c => {
                        out.push(c);
                        column = if matches!(c, '\n' | '\r') { 0 } else { column + 1 };
                    }
                }
            }
            r.charge_bytes(out.len())?;
            made(out)
        }
        "split" | "rsplit" => {
            let [separator, most] = arguments.bind(name, ["sep", "maxsplit"])?;
            let separator = separator.filter(|s| !matches!(s, Value::None));
            let separator = separator.as_ref().map(|s| text_of(s, "separator")).transpose()?;
            let most = most.map_or(Ok(-1), |m| m.index("maxsplit"))?;
            let parts = split(text, separator, most, name == "rsplit")?;
            r.charge(parts.len())?;
            list(parts)
        }
        "splitlines" => {
            let [keep] = arguments.bind(name, ["keepends"])?;
            list(split_lines(text, keep.map_or(Ok(false), |k| k.truth())?))
        }
        "partition" | "rpartition" => {
            let separator = arguments.one(name, "sep")?;
            let separator = text_of(&separator, "separator")?;
            if separator.is_empty() {
                return Err(Error::failed("empty separator"));
            }
            let first = name == "partition";
            let cut = if first { text.split_once(separator) } else { text.rsplit_once(separator) };
            let parts = match cut {
                Some((before, after)) => [before, separator, after],
                None if first => [text, "", ""],
                None => ["", "", text],
            };
            Value::tuple(parts.into_iter().map(Value::from).collect())
        }
        "removeprefix" | "removesuffix" => {
            let part = arguments.one(name, "part")?;
            let part = text_of(&part, name)?;
            let cut = if name == "removeprefix" { text.strip_prefix(part) } else { text.strip_suffix(part) };
            made(cut.unwrap_or(text).to_owned())
        }
        "replace" => {
            let [old, new, count] = arguments.bind(name, ["old", "new", "count"])?;
            let (Some(old), Some(new)) = (old, new) else {
                return Err(Error::failed("replace expected at least 2 arguments"));
            };
            let (old, new) = (text_of(&old, "replace() argument 1")?, text_of(&new, "replace() argument 2")?);
            let count = count.map_or(Ok(-1), |c| c.index("count"))?;
            made(replace(r, text, old, new, count)?)
        }
        "join" => {
            let parts = arguments.one(name, "iterable")?.iterate()?;
            let mut out = String::new();
            for (at, part) in parts.iter().enumerate() {
                if at > 0 {
                    out.push_str(text);
                }
                part.check_strict()?;
                out.push_str(part.as_text().ok_or_else(|| {
                    let found = part.type_name();
                    Error::failed(format!("sequence item {at}: expected str instance, {found} found"))
                })?);
                r.charge_bytes(out.len() / 64)?;
            }
            Value::from(out)
        }
        "startswith" | "endswith" => {
            let [wanted, start, end] = arguments.bind(name, ["prefix", "start", "end"])?;
            let wanted = wanted.ok_or_else(|| Error::failed(format!("{name} expected at least 1 argument, got 0")))?;
            let length = text.chars().count();
            let (start, end) = clip(&start, &end, length)?;
            let within: Option<String> =
                (start <= end && start <= length).then(|| text.chars().skip(start).take(end - start).collect());
            let fits = |part: &str| {
                within
                    .as_deref()
                    .is_some_and(|w| if name == "startswith" { w.starts_with(part) } else { w.ends_with(part) })
            };
            let what = format!("{name} first arg");
            match wanted.as_tuple() {
                Some(parts) => {
                    let mut any = false;
                    for part in parts.iter() {
                        any |= fits(text_of(part, &what)?);
                    }
                    Value::Bool(any)
                }
                None => Value::Bool(fits(text_of(&wanted, &what)?)),
            }
        }
        "count" | "find" | "rfind" | "index" | "rindex" => {
            let [wanted, start, end] = arguments.bind(name, ["sub", "start", "end"])?;
            let wanted = wanted.ok_or_else(|| Error::failed(format!("{name} expected at least 1 argument, got 0")))?;
            let wanted = text_of(&wanted, "the argument")?;
            let length = text.chars().count();
            let (start, end) = clip(&start, &end, length)?;
            let outside = start > length || start > end;
            let within: String =
                if outside { String::new() } else { text.chars().skip(start).take(end - start).collect() };
            if name == "count" {
                let count = match (outside, wanted.is_empty()) {
                    (true, _) => 0,
                    (false, true) => within.chars().count() + 1,
                    (false, false) => within.matches(wanted).count(),
                };
                return Ok(Value::Int(count as i128));
            }
            let at = if name.starts_with('r') { within.rfind(wanted) } else { within.find(wanted) };
            match at.filter(|_| !outside) {
                Some(at) => Value::Int((start + within[..at].chars().count()) as i128),
                None if name.ends_with("index") => return Err(Error::failed("substring not found")),
                None => Value::Int(-1),
            }
        }
        "format" => Value::from(str_format(r, text, &arguments)?),
        "format_map" => {
            let mapping = arguments.one(name, "mapping")?;
            let Value::Dict(dict) = &mapping else { return Err(Error::failed("format_map wants a mapping")) };
            let named = dict.borrow().values().filter_map(|(k, v)| Some((k.as_text()?.into(), v.clone()))).collect();
            Value::from(str_format(r, text, &Arguments { positional: Vec::new(), named })?)
        }
        "isalpha" => all(arguments, &is_letter)?,
        "isalnum" => all(arguments, &is_alphanumeric)?,
        "isdecimal" => all(arguments, &is_decimal)?,
        "isdigit" => all(arguments, &is_digit)?,
        "isnumeric" => all(arguments, &is_numeric)?,
        "isspace" => all(arguments, &is_space)?,
        "isascii" => {
            arguments.none(name)?;
            Value::Bool(text.is_ascii())
        }
        "isprintable" => {
            arguments.none(name)?;
            Value::Bool(text.chars().all(is_printable))
        }
        "islower" | "isupper" => {
            arguments.none(name)?;
            Value::Bool(is_case(text, name == "islower"))
        }
        "istitle" => {
            arguments.none(name)?;
            Value::Bool(is_title(text))
        }
        "isidentifier" => {
            arguments.none(name)?;
            let mut chars = text.chars();
            let first = chars.next().is_some_and(|c| c == '_' || is_letter(c));
            Value::Bool(first && chars.all(|c| c == '_' || is_letter(c) || is_decimal(c)))
        }
        _ => return unsupported(&Value::Text(own.clone()), name),
    })
}

/// `str.replace`
pub fn replace(r: &mut Renderer, text: &str, old: &str, new: &str, count: i128) -> Result<String> {
    let most = usize::try_from(count).unwrap_or(usize::MAX);
    let found = if old.is_empty() { text.chars().count() + 1 } else { text.matches(old).count() }.min(most);
    r.charge_bytes(text.len() + found.saturating_mul(new.len()))?;
    Ok(text.replacen(old, new, most))
}

/// `count` and `index` of what has an order.
fn search_method(value: &Value, name: &str, arguments: Arguments) -> Result<Value> {
    let items = value.iterate()?;
    match name {
        "count" => {
            let wanted = arguments.one(name, "value")?;
            let mut count = 0;
            for item in &items {
                count += i128::from(item.same(&wanted) || item.equals(&wanted)?);
            }
            Ok(Value::Int(count))
        }
        "index" => {
            let [wanted, start, end] = arguments.bind(name, ["value", "start", "stop"])?;
            let wanted = wanted.ok_or_else(|| Error::failed("index expected at least 1 argument, got 0"))?;
            let (start, end) = clip(&start, &end, items.len())?;
            for (at, item) in items.iter().enumerate().take(end).skip(start) {
                if item.same(&wanted) || item.equals(&wanted)? {
                    return Ok(Value::Int(at as i128));
                }
            }
            Err(Error::failed(format!("{} is not in {}", wanted.repr()?, value.type_name())))
        }
        _ => unsupported(value, name),
    }
}

fn list_method(r: &mut Renderer, own: &Rc<RefCell<Vec<Value>>>, name: &str, arguments: Arguments) -> Result<Value> {
    r.charge(1)?;
    match name {
        "copy" => {
            arguments.none(name)?;
            Ok(Value::list(own.borrow().clone()))
        }
        "append" => {
            let value = arguments.one(name, "object")?;
            own.borrow_mut().push(value);
            Ok(Value::None)
        }
        "extend" => {
            let values = arguments.one(name, "iterable")?.iterate()?;
            r.charge(values.len())?;
            own.borrow_mut().extend(values);
            Ok(Value::None)
        }
        "insert" => {
            let [at, value] = arguments.bind(name, ["index", "object"])?;
            let (Some(at), Some(value)) = (at, value) else { return Err(Error::failed("insert expected 2 arguments")) };
            let length = own.borrow().len();
            let (at, _) = clip(&Some(at), &None, length)?;
            own.borrow_mut().insert(at.min(length), value);
            Ok(Value::None)
        }
        "pop" => {
            let [at] = arguments.bind(name, ["index"])?;
            let at = at.map_or(Ok(-1), |a| a.index("an index"))?;
            let length = own.borrow().len() as i128;
            let at = if at < 0 { at + length } else { at };
            if length == 0 {
                return Err(Error::failed("pop from empty list"));
            }
            if !(0..length).contains(&at) {
                return Err(Error::failed("pop index out of range"));
            }
            Ok(own.borrow_mut().remove(at as usize))
        }
        "remove" => {
            let wanted = arguments.one(name, "value")?;
            let mut at = None;
            for (i, item) in own.borrow().iter().enumerate() {
                if item.same(&wanted) || item.equals(&wanted)? {
                    at = Some(i);
                    break;
                }
            }
            let at = at.ok_or_else(|| Error::failed("list.remove(x): x not in list"))?;
            own.borrow_mut().remove(at);
            Ok(Value::None)
        }
        "clear" => {
            arguments.none(name)?;
            own.borrow_mut().clear();
            Ok(Value::None)
        }
        "reverse" => {
            arguments.none(name)?;
            own.borrow_mut().reverse();
            Ok(Value::None)
        }
        "sort" => {
            let [reverse] = arguments.bind(name, ["reverse"])?;
            let reverse = reverse.map_or(Ok(false), |v| v.truth())?;
            let items = own.borrow().clone();
            let keyed = items.iter().map(|i| (i.clone(), i.clone())).collect();
            let sorted = super::filters::sorted(r, keyed, reverse)?;
            *own.borrow_mut() = sorted;
            Ok(Value::None)
        }
        _ => search_method(&Value::List(own.clone()), name, arguments),
    }
}

fn dict_method(own: &Rc<RefCell<Dict>>, name: &str, arguments: Arguments) -> Result<Value> {
    let view = |kind: View, arguments: Arguments| {
        arguments.none(name)?;
        Ok(Value::View(kind, own.clone()))
    };
    let key_and_default = |arguments: Arguments| -> Result<(Value, Option<Value>)> {
        let [key, default] = arguments.bind(name, ["key", "default"])?;
        let key = key.ok_or_else(|| Error::failed(format!("{name} expected at least 1 argument, got 0")))?;
        Ok((key, default))
    };
    match name {
        "items" => view(View::Items, arguments),
        "keys" => view(View::Keys, arguments),
        "values" => view(View::Values, arguments),
        "get" => {
            let (key, default) = key_and_default(arguments)?;
            let found = own.borrow().get(&key.key()?).map(|(_, v)| v.clone());
            Ok(found.or(default).unwrap_or(Value::None))
        }
        "copy" => {
            arguments.none(name)?;
            Ok(Value::Dict(Rc::new(RefCell::new(own.borrow().clone()))))
        }
        "pop" => {
            let (key, default) = key_and_default(arguments)?;
            let found = own.borrow_mut().shift_remove(&key.key()?).map(|(_, v)| v);
            let missing = || key.repr().unwrap_or_default();
            found.or(default).ok_or_else(|| Error::failed(format!("KeyError: {}", missing())))
        }
        "popitem" => {
            arguments.none(name)?;
            let last = own.borrow_mut().pop();
            let (_, (key, value)) = last.ok_or_else(|| Error::failed("popitem(): dictionary is empty"))?;
            Ok(Value::tuple(vec![key, value]))
        }
        "setdefault" => {
            let (key, default) = key_and_default(arguments)?;
            if let Some((_, value)) = own.borrow().get(&key.key()?) {
                return Ok(value.clone());
            }
            let value = default.unwrap_or(Value::None);
            insert(&mut own.borrow_mut(), key, value.clone())?;
            Ok(value)
        }
        "update" => {
            for (key, value) in dict(arguments)?.into_values() {
                insert(&mut own.borrow_mut(), key, value)?;
            }
            Ok(Value::None)
        }
        "clear" => {
            arguments.none(name)?;
            own.borrow_mut().clear();
            Ok(Value::None)
        }
        _ => unsupported(&Value::Dict(own.clone()), name),
    }
}
