//! Jinja2's filters over text, and `tojson` in its two meanings.

use crate::error::{Error, Result};
use crate::format::printf;
use crate::json::{Style, dumps};
use crate::methods::{capitalize, is_alphanumeric, justify, replace, split_lines, strip};
use crate::operators::escape;
use crate::python::is_space;
use crate::regex::PythonRegex;
use crate::render::{Arguments, Renderer};
use crate::value::{Text, Value};

pub const NAMES: [&str; 22] = [
    "capitalize",
    "center",
    "e",
    "escape",
    "filesizeformat",
    "forceescape",
    "format",
    "indent",
    "join",
    "lower",
    "regex_replace",
    "replace",
    "striptags",
    "title",
    "trim",
    "truncate",
    "upper",
    "urlencode",
    "urlize",
    "wordcount",
    "wordwrap",
    "xmlattr",
];

/// Wider indentations than this are refused.
const MAX_INDENT: i128 = 1 << 16;

pub fn call(r: &mut Renderer, name: &str, value: &Value, arguments: Arguments) -> Result<Value> {
    if name == "join" {
        return join(r, value, arguments);
    }
    let text = value.str()?;
    r.charge_bytes(text.len())?;
    let markup = matches!(value, Value::Text(t) if t.markup);
    let made = |text: String| Value::Text(Text { text: text.into(), markup });
    let flag = |v: Option<Value>, default: bool| v.map_or(Ok(default), |v| v.truth());
    Ok(match name {
        "upper" | "lower" | "capitalize" | "title" => {
            arguments.none(name)?;
            made(match name {
                "upper" => text.to_uppercase(),
                "lower" => text.to_lowercase(),
                "capitalize" => capitalize(&text),
                _ => title(&text),
            })
        }
        "center" => {
            let [width] = arguments.bind(name, ["width"])?;
            let width = width.map_or(Ok(80), |w| w.index("a width"))?;
            made(justify(r, &text, width, ' ', '^')?)
        }
        "e" | "escape" | "forceescape" => {
            arguments.none(name)?;
            let escaped = if markup && name != "forceescape" { text } else { escape(&text) };
            Value::Text(Text { text: escaped.into(), markup: true })
        }
        "filesizeformat" => {
            let [binary] = arguments.bind(name, ["binary"])?;
            let bytes = super::filters::call(
                r,
                "float",
                value.clone(),
                Arguments { positional: vec![Value::None], named: vec![] },
            )?;
            let bytes = bytes.as_float().ok_or_else(|| Error::failed("could not convert to float"))?;
            file_size(bytes, flag(binary, false)?).into()
        }
        "format" => {
            let values = match (arguments.positional.is_empty(), arguments.named.is_empty()) {
                (false, false) => {
                    return Err(Error::failed("can't handle positional and keyword arguments at the same time"));
                }
                (_, true) => Value::tuple(arguments.positional),
                (_, false) => Value::dict(arguments.named.into_iter().map(|(n, v)| (Value::from(&*n), v)))?,
            };
            if markup {
                return Err(Error::unsupported("format of text with escaped HTML (Markup) is not supported"));
            }
            printf(r, &text, &values)?.into()
        }
        "indent" => {
            let [width, first, blank] = arguments.bind(name, ["width", "first", "blank"])?;
            value.check()?;
            if !matches!(value, Value::Text(_)) {
                return Err(Error::failed(format!("indent wants a text, found '{}'", value.type_name())));
            }
            let by = match width {
                Some(Value::Text(t)) => t.text.to_string(),
                Some(other) => spaces(&other)?,
                None => " ".repeat(4),
            };
            made(indent(r, &text, &by, flag(first, false)?, flag(blank, false)?)?)
        }
        "regex_replace" => {
            let [pattern, replacement, count] = arguments.bind(name, ["pattern", "repl", "count"])?;
            let (Some(pattern), Some(replacement)) = (pattern, replacement) else {
                return Err(Error::failed("regex_replace: wants a pattern and a replacement"));
            };
            let count = count.map_or(Ok(0), |c| c.index("a count"))?;
            let count = usize::try_from(count).map_err(|_| Error::failed("regex_replace: a count is 0 or more"))?;
            let regex = PythonRegex::new(&pattern.str()?).map_err(Error::failed)?;
            regex.sub(&replacement.str()?, &text, count).map_err(Error::failed)?.into()
        }
        "replace" => {
            let [old, new, count] = arguments.bind(name, ["old", "new", "count"])?;
            let (Some(old), Some(new)) = (old, new) else {
                return Err(Error::failed("replace: wants what is replaced and by what"));
            };
            let count = count.filter(|c| !matches!(c, Value::None)).map_or(Ok(-1), |c| c.index("a count"))?;
            replace(r, &text, &old.str()?, &new.str()?, count)?.into()
        }
        "striptags" => {
            arguments.none(name)?;
            strip_tags(&text)?.into()
        }
        "trim" => {
            let [chars] = arguments.bind(name, ["chars"])?;
            let chars = chars.filter(|c| !matches!(c, Value::None)).map(|c| c.str()).transpose()?;
            made(strip(&text, chars.as_deref(), true, true))
        }
        "truncate" => {
            let [length, kill, end, leeway] = arguments.bind(name, ["length", "killwords", "end", "leeway"])?;
            let length = length.map_or(Ok(255), |l| l.index("a length"))?;
            let end = end.map_or_else(|| Ok("...".to_owned()), |e| e.str())?;
            let leeway = leeway.filter(|l| !matches!(l, Value::None)).map_or(Ok(5), |l| l.index("a leeway"))?;
            value.length()?;
            truncate(value, &text, length, flag(kill, false)?, &end, leeway)?
        }
        "urlencode" => {
            arguments.none(name)?;
            url_encode(value)?.into()
        }
        "wordcount" => {
            arguments.none(name)?;
            let words = text.split(|c: char| !(c == '_' || is_alphanumeric(c))).filter(|w| !w.is_empty()).count();
            Value::Int(words as i128)
        }
        "wordwrap" => {
            if !matches!(value, Value::Text(_)) {
                return Err(Error::failed(format!("wordwrap wants a text, found '{}'", value.type_name())));
            }
            let names = ["width", "break_long_words", "wrapstring", "break_on_hyphens"];
            let [width, long, newline, hyphens] = arguments.bind(name, names)?;
            let width = width.map_or(Ok(79), |w| w.index("a width"))?;
            let newline = newline.filter(|n| !matches!(n, Value::None)).map_or_else(|| Ok("\n".into()), |n| n.str())?;
            if flag(hyphens, true)? && text.contains('-') {
                return Err(Error::unsupported(
                    "wordwrap of text with hyphens is not supported (but with break_on_hyphens=false)",
                ));
            }
            let width = usize::try_from(width).ok().filter(|w| *w > 0);
            let width = width.ok_or_else(|| Error::failed("invalid width (must be > 0)"))?;
            let long = flag(long, true)?;
            let wrap = |line: &String| wrap(line, width, long).join(&newline);
            split_lines(&text, false).iter().map(wrap).collect::<Vec<_>>().join(&newline).into()
        }
        "xmlattr" => {
            let [autospace] = arguments.bind(name, ["autospace"])?;
            let Value::Dict(dict) = value else { return Err(Error::failed("xmlattr wants a mapping")) };
            let mut out = Vec::new();
            for (key, value) in dict.borrow().values() {
                if matches!(value, Value::None | Value::Undefined(_)) {
                    continue;
                }
                let key = key.str()?;
                if key.contains([' ', '\t', '\n', '\r', '\u{b}', '\u{c}', '/', '>', '=']) {
                    return Err(Error::failed(format!("Invalid character in attribute name: {key:?}")));
                }
                let markup = matches!(value, Value::Text(t) if t.markup);
                let value = if markup { value.str()? } else { escape(&value.str()?) };
                out.push(format!("{}=\"{value}\"", escape(&key)));
            }
            let text = out.join(" ");
            let space = flag(autospace, true)? && !text.is_empty();
            format!("{}{text}", if space { " " } else { "" }).into()
        }
        _ => {
            return Err(Error::unsupported(format!("the filter '{name}' is not supported")));
        }
    })
}

fn join(r: &mut Renderer, value: &Value, arguments: Arguments) -> Result<Value> {
    let [separator, attribute] = arguments.bind("join", ["d", "attribute"])?;
    let separator = separator.map_or_else(|| Ok(String::new()), |s| s.str())?;
    let items = match attribute.filter(|a| !matches!(a, Value::None)) {
        Some(attribute) => {
            let named = vec![("attribute".into(), attribute)];
            super::filters::call(r, "map", value.clone(), Arguments { positional: vec![], named })?.iterate()?
        }
        None => value.iterate()?,
    };
    let mut out = String::new();
    for (at, item) in items.iter().enumerate() {
        if at > 0 {
            out.push_str(&separator);
        }
        out.push_str(&item.str()?);
        r.charge(1 + out.len() / (1 << 20))?;
    }
    r.charge_bytes(out.len())?;
    Ok(out.into())
}

/// `tojson` of chat templates is `json.dumps` with its options; Jinja2's own sorts keys, is ASCII and escapes HTML.
pub fn tojson(r: &mut Renderer, value: &Value, arguments: Arguments) -> Result<Value> {
    let given = |v: Option<Value>| v.filter(|v| !matches!(v, Value::None));
    if !r.settings.sandboxed {
        let [indent] = arguments.bind("tojson", ["indent"])?;
        let indent = given(indent).map(|i| indent_text(&i)).transpose()?;
        let item_separator = if indent.is_some() { "," } else { ", " }.to_owned();
        let style = Style { ensure_ascii: true, sort_keys: true, indent, item_separator, key_separator: ": ".into() };
        let mut text = dumps(r, value, &style)?;
        for (from, to) in [('<', "\\u003c"), ('>', "\\u003e"), ('&', "\\u0026"), ('\'', "\\u0027")] {
            text = text.replace(from, to);
        }
        return Ok(Value::Text(Text { text: text.into(), markup: true }));
    }
    let names = ["ensure_ascii", "indent", "separators", "sort_keys"];
    let [ensure_ascii, indent, separators, sort_keys] = arguments.bind("tojson", names)?;
    let indent = given(indent).map(|i| indent_text(&i)).transpose()?;
    let (item_separator, key_separator) = match given(separators) {
        None => (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()),
        Some(pair) => match pair.iterate()?.as_slice() {
            [item, key] => (item.str()?, key.str()?),
            _ => return Err(Error::failed("tojson: `separators` are two texts")),
        },
    };
    let style = Style {
        ensure_ascii: ensure_ascii.map_or(Ok(false), |v| v.truth())?,
        sort_keys: sort_keys.map_or(Ok(false), |v| v.truth())?,
        indent,
        item_separator,
        key_separator,
    };
    Ok(dumps(r, value, &style)?.into())
}

fn indent_text(value: &Value) -> Result<String> {
    match value {
        Value::Text(t) => Ok(t.text.to_string()),
        other => spaces(other),
    }
}

fn spaces(width: &Value) -> Result<String> {
    let width = width.index("an indentation")?;
    if width > MAX_INDENT {
        return Err(Error::unsupported(format!("an indentation of {width} is not supported")));
    }
    Ok(" ".repeat(usize::try_from(width).unwrap_or(0)))
}

/// The filter `title`: words begin after a blank, a hyphen or an opening bracket.
fn title(text: &str) -> String {
    let separates = |c: char| is_space(c) || "-({[<".contains(c);
    let (mut out, mut begins) = (String::new(), true);
    for c in text.chars() {
        if separates(c) {
            begins = true;
            out.push(c);
        } else if begins {
            out.extend(c.to_uppercase());
            begins = false;
        } else {
            out.extend(c.to_lowercase());
        }
    }
    out
}

fn file_size(bytes: f64, binary: bool) -> String {
    let base: f64 = if binary { 1024.0 } else { 1000.0 };
    let units = ["k", "M", "G", "T", "P", "E", "Z", "Y"];
    if bytes == 1.0 {
        return "1 Byte".into();
    }
    if bytes < base {
        return format!("{} Bytes", bytes.trunc() as i128);
    }
    let mut unit = base;
    for (at, name) in units.iter().enumerate() {
        unit *= base;
        if bytes < unit || at + 1 == units.len() {
            let name = if binary { format!("{}iB", name.to_uppercase()) } else { format!("{name}B") };
            return format!("{:.1} {name}", base * bytes / unit);
        }
    }
    String::new()
}

fn indent(r: &mut Renderer, text: &str, by: &str, first: bool, blank: bool) -> Result<String> {
    let lines = split_lines(&format!("{text}\n"), false);
    r.charge_bytes(text.len() + by.len().saturating_mul(lines.len()))?;
    let mut out = if first { by.to_owned() } else { String::new() };
    for (at, line) in lines.iter().enumerate() {
        if at > 0 {
            out.push('\n');
            if blank || !line.is_empty() {
                out.push_str(by);
            }
        }
        out.push_str(line);
    }
    Ok(out)
}

fn strip_tags(text: &str) -> Result<String> {
    let (mut out, mut rest) = (String::new(), text);
    while let Some(start) = rest.find('<') {
        let end = if rest[start..].starts_with("<!--") {
            rest[start + 4..].find("-->").map(|at| start + 4 + at + 3)
        } else {
            rest[start..].find('>').map(|at| start + at + 1)
        };
        let Some(end) = end else { break };
        out.push_str(&rest[..start]);
        rest = &rest[end..];
    }
    out.push_str(rest);
    let words: Vec<&str> = out.split(is_space).filter(|w| !w.is_empty()).collect();
    unescape(&words.join(" "))
}

/// HTML's references to characters: numbers, and the names that templates have use for.
fn unescape(text: &str) -> Result<String> {
    let (mut out, mut rest) = (String::new(), text);
    while let Some(at) = rest.find('&') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        let name: String = rest[1..].chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '#').collect();
        let closed = rest[1 + name.len()..].starts_with(';');
        let number = name.strip_prefix('#').and_then(|n| match n.strip_prefix(['x', 'X']) {
            Some(hex) => u32::from_str_radix(hex, 16).ok(),
            None => n.parse().ok(),
        });
        let c = match (name.as_str(), number) {
            (_, Some(code)) if !(0x80..0xa0).contains(&code) => char::from_u32(code),
            ("amp", _) => Some('&'),
            ("lt", _) => Some('<'),
            ("gt", _) => Some('>'),
            ("quot", _) => Some('"'),
            ("apos", _) if closed => Some('\''),
            ("nbsp", _) => Some('\u{a0}'),
            ("", _) => None,
            _ if closed => {
                return Err(Error::unsupported(format!("striptags: the reference &{name}; is not supported")));
            }
            _ => None,
        };
        match c {
            Some(c) => {
                out.push(c);
                rest = &rest[1 + name.len() + usize::from(closed)..];
            }
            None => {
                out.push('&');
                rest = &rest[1..];
            }
        }
    }
    out.push_str(rest);
    Ok(out)
}

fn truncate(value: &Value, text: &str, length: i128, kill: bool, end: &str, leeway: i128) -> Result<Value> {
    let ending = end.chars().count() as i128;
    if length < ending {
        return Err(Error::failed(format!("expected length >= {ending}, got {length}")));
    }
    if leeway < 0 {
        return Err(Error::failed(format!("expected leeway >= 0, got {leeway}")));
    }
    if value.length()? as i128 <= length.saturating_add(leeway) {
        return Ok(value.clone());
    }
    if !matches!(value, Value::Text(_)) {
        return Err(Error::failed(format!("truncate wants a text, found '{}'", value.type_name())));
    }
    let kept: String = text.chars().take(usize::try_from(length - ending).unwrap_or(usize::MAX)).collect();
    let kept = if kill { kept.as_str() } else { kept.rsplit_once(' ').map_or(kept.as_str(), |(before, _)| before) };
    Ok(format!("{kept}{end}").into())
}

fn url_encode(value: &Value) -> Result<String> {
    let quote = |value: &Value, query: bool| -> Result<String> {
        let mut out = String::new();
        for byte in value.str()?.bytes() {
            match byte {
                b if b.is_ascii_alphanumeric() || b"_.-~".contains(&b) => out.push(b as char),
                b'/' if !query => out.push('/'),
                b' ' if query => out.push('+'),
                b => out.push_str(&format!("%{b:02X}")),
            }
        }
        Ok(out)
    };
    let pairs: Vec<Value> = match value {
        Value::Dict(dict) => dict.borrow().values().map(|(k, v)| Value::tuple(vec![k.clone(), v.clone()])).collect(),
        Value::List(_) | Value::Tuple(_) | Value::View(..) | Value::Iterator(_) | Value::Range(..) => {
            value.iterate()?
        }
        other => return quote(other, false),
    };
    let mut out = Vec::new();
    for pair in pairs {
        match pair.iterate()?.as_slice() {
            [key, value] => out.push(format!("{}={}", quote(key, true)?, quote(value, true)?)),
            _ => return Err(Error::failed("urlencode wants pairs of key and value")),
        }
    }
    Ok(out.join("&"))
}

/// `textwrap.wrap(line, width, …)` of one line: blanks between words stay, those at a break go.
fn wrap(line: &str, width: usize, break_long: bool) -> Vec<String> {
    let blank = |c: char| "\t\n\u{b}\u{c}\r ".contains(c);
    let mut chunks: Vec<String> = Vec::new();
    for c in line.chars() {
        match chunks.last_mut() {
            Some(last) if last.chars().next().is_some_and(blank) == blank(c) => last.push(c),
            _ => chunks.push(c.into()),
        }
    }
    let (mut lines, mut at) = (Vec::<String>::new(), 0);
    while at < chunks.len() {
        let is_blank = |chunk: &String| chunk.chars().all(blank);
        if is_blank(&chunks[at]) && !lines.is_empty() {
            at += 1;
            if at == chunks.len() {
                break;
            }
        }
        let (mut own, mut length) = (Vec::new(), 0);
        while at < chunks.len() && length + chunks[at].chars().count() <= width {
            length += chunks[at].chars().count();
            own.push(chunks[at].clone());
            at += 1;
        }
        if at < chunks.len() && chunks[at].chars().count() > width {
            if break_long {
                let room = width - length;
                let (head, tail): (String, String) =
                    (chunks[at].chars().take(room).collect(), chunks[at].chars().skip(room).collect());
                own.push(head);
                chunks[at] = tail;
            } else if own.is_empty() {
                own.push(chunks[at].clone());
                at += 1;
            }
        }
        if own.last().is_some_and(is_blank) {
            own.pop();
        }
        if !own.is_empty() {
            lines.push(own.concat());
        }
    }
    lines
}
