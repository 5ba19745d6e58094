//! A YAML file as a tree that knows its lines, with scalars read as lm-evaluation-harness's PyYAML reads them.

use granit_parser::{Event, Parser, ScalarStyle};
use serde_json::{Map, Number, Value};

use super::Error;

/// A value and where it stands.
#[derive(Clone, Debug)]
pub struct Node {
    /// Counted from 1.
    pub line: usize,
    pub kind: Kind,
}

/// What a value is.
#[derive(Clone, Debug)]
pub enum Kind {
    /// A scalar.
    Scalar(Value),
    List(Vec<Node>),
    /// In the order of the file.
    Map(Vec<(String, Node)>),
    /// `!function name`.
    Function(String),
}

impl Node {
    /// The value without its lines; `None` where a `!function` is in it.
    #[must_use]
    pub fn value(&self) -> Option<Value> {
        Some(match &self.kind {
            Kind::Scalar(v) => v.clone(),
            Kind::List(items) => Value::Array(items.iter().map(Node::value).collect::<Option<_>>()?),
            Kind::Map(entries) => {
                let entries = entries.iter().map(|(k, n)| Some((k.clone(), n.value()?)));
                Value::Object(entries.collect::<Option<Map<_, _>>>()?)
            }
            Kind::Function(_) => return None,
        })
    }

    /// What it is, for errors.
    #[must_use]
    pub fn describe(&self) -> String {
        match &self.kind {
            Kind::Scalar(Value::Null) => "nothing".into(),
            Kind::Scalar(Value::String(s)) => format!("the text {s:?}"),
            Kind::Scalar(v) => format!("`{v}`"),
            Kind::List(_) => "a list".into(),
            Kind::Map(_) => "a mapping".into(),
            Kind::Function(f) => format!("`!function {f}`"),
        }
    }
}

/// A mapping at the top of a file, and what is strange in it without being wrong.
#[derive(Debug)]
pub struct Parsed {
    pub entries: Vec<(String, Node)>,
    /// Keys that are there twice: the last counts, as PyYAML has it.
    pub notes: Vec<String>,
}

/// Reads a file's text; its top level is a mapping.
///
/// # Errors
/// [`Error::Yaml`] with the line.
pub fn parse(file: &str, text: &str) -> Result<Parsed, Error> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let parser = Parser::new_from_str(text);
    let mut builder = Builder { file, parser, anchors: Vec::new(), notes: Vec::new() };
    let node = loop {
        match builder.next()? {
            (Event::StreamStart | Event::DocumentStart(..), _) => {}
            (Event::StreamEnd | Event::DocumentEnd, line) => return Err(builder.error(line, "the file is empty")),
            (event, line) => break builder.node(event, line)?,
        }
    };
    loop {
        match builder.next()? {
            (Event::DocumentEnd, _) => {}
            (Event::StreamEnd, _) => break,
            (_, line) => return Err(builder.error(line, "a second document begins here; a task file has one")),
        }
    }
    let line = node.line;
    match node.kind {
        Kind::Map(entries) => Ok(Parsed { entries, notes: builder.notes }),
        _ => Err(builder.error(line, "expected `key: value` lines")),
    }
}

struct Builder<'a> {
    file: &'a str,
    parser: Parser<'a, granit_parser::StrInput<'a>>,
    anchors: Vec<(usize, Node)>,
    notes: Vec<String>,
}

/// What the tags of YAML itself (`!!int`) stand for.
const CORE: &str = "tag:yaml.org,2002:";

impl<'a> Builder<'a> {
    fn error(&self, line: usize, message: impl Into<String>) -> Error {
        Error::Yaml { file: self.file.into(), line, message: message.into() }
    }

    fn next(&mut self) -> Result<(Event<'a>, usize), Error> {
        match self.parser.next() {
            Some(Ok((event, span))) => Ok((event, span.start.line())),
            Some(Err(e)) => Err(self.error(e.marker().line(), e.info())),
            None => Ok((Event::StreamEnd, 0)),
        }
    }

    fn node(&mut self, event: Event<'a>, line: usize) -> Result<Node, Error> {
        let (kind, anchor) = match event {
            Event::Scalar(text, style, anchor, tag) => {
                let kind = match tag.as_deref().map(|t| (t.handle().to_owned(), t.suffix().to_owned())) {
                    None if style == ScalarStyle::Plain => Kind::Scalar(plain(&text)),
                    None => Kind::Scalar(Value::String(text.into_owned())),
                    Some((handle, suffix)) if format!("{handle}{suffix}") == "!function" => {
                        Kind::Function(text.into_owned())
                    }
                    Some((handle, suffix)) => match tagged(&format!("{handle}{suffix}"), &text) {
                        Some(value) => Kind::Scalar(value),
                        None => {
                            return Err(
                                self.error(line, format!("`{text}` with the tag `{handle}{suffix}` is not known here"))
                            );
                        }
                    },
                };
                (kind, anchor)
            }
            Event::SequenceStart(_, anchor, tag) => {
                self.expect_tag(line, tag.as_deref(), "seq")?;
                let mut items = Vec::new();
                loop {
                    match self.next()? {
                        (Event::SequenceEnd, _) => break,
                        (event, line) => items.push(self.node(event, line)?),
                    }
                }
                (Kind::List(items), anchor)
            }
            Event::MappingStart(_, anchor, tag) => {
                self.expect_tag(line, tag.as_deref(), "map")?;
                (Kind::Map(self.mapping()?), anchor)
            }
            Event::Alias(id) => {
                let known = self.anchors.iter().find(|(anchor, _)| *anchor == id).map(|(_, node)| node.clone());
                return known.ok_or_else(|| self.error(line, "an alias inside of what it stands for"));
            }
            _ => return Err(self.error(line, "expected a value")),
        };
        let node = Node { line, kind };
        if anchor != 0 {
            self.anchors.push((anchor, node.clone()));
        }
        Ok(node)
    }

    fn expect_tag(&self, line: usize, tag: Option<&granit_parser::Tag>, expected: &str) -> Result<(), Error> {
        let Some(tag) = tag.map(|t| format!("{}{}", t.handle(), t.suffix())) else { return Ok(()) };
        if tag == format!("{CORE}{expected}") {
            Ok(())
        } else {
            Err(self.error(line, format!("tag `{tag}` is not known here")))
        }
    }

    fn mapping(&mut self) -> Result<Vec<(String, Node)>, Error> {
        let mut entries: Vec<(String, Node)> = Vec::new();
        let mut merged: Vec<(String, Node)> = Vec::new();
        loop {
            let (event, line) = self.next()?;
            if event == Event::MappingEnd {
                // Own keys win over merged ones, and of those the first.
                for (key, node) in merged {
                    if !entries.iter().any(|(k, _)| *k == key) {
                        entries.push((key, node));
                    }
                }
                return Ok(entries);
            }
            let key = match self.node(event, line)?.kind {
                Kind::Scalar(v) => super::python::str(&v),
                _ => return Err(self.error(line, "a key must be a word")),
            };
            let (event, value_line) = self.next()?;
            let value = self.node(event, value_line)?;
            if key == "<<" {
                let maps = match value.kind {
                    Kind::List(items) => items.into_iter().map(|n| n.kind).collect(),
                    one => vec![one],
                };
                for map in maps {
                    let Kind::Map(own) = map else {
                        return Err(self.error(line, "`<<` takes a mapping, or a list of mappings"));
                    };
                    merged.extend(own);
                }
                continue;
            }
            // An error about a value that begins on a later line is still about this key.
            let value = Node { line, ..value };
            match entries.iter_mut().find(|(k, _)| *k == key) {
                Some((_, known)) => {
                    self.notes.push(format!(
                        "{}:{line}: key `{key}` is there twice (line {} before); the last counts, as in lm-evaluation-harness",
                        self.file, known.line
                    ));
                    *known = value;
                }
                None => entries.push((key, value)),
            }
        }
    }
}

/// A scalar with one of YAML's own tags, as PyYAML constructs it; `None` where it cannot, and for other tags.
fn tagged(tag: &str, text: &str) -> Option<Value> {
    match tag.strip_prefix(CORE)? {
        "str" => Some(text.into()),
        "null" => Some(Value::Null),
        "bool" => Some(plain(&text.to_lowercase())).filter(Value::is_boolean),
        "int" => integer(text).map(Value::from),
        "float" => text.replace('_', "").parse().ok().and_then(Number::from_f64).map(Value::Number),
        _ => None,
    }
}

/// A plain scalar by YAML 1.1's rules, as PyYAML reads it: `yes` is true, `1e5` is a text, `010` is eight. Dates
/// and sexagesimal numbers, which no key takes, stay texts.
fn plain(text: &str) -> Value {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => return Value::Null,
        "yes" | "Yes" | "YES" | "true" | "True" | "TRUE" | "on" | "On" | "ON" => return Value::Bool(true),
        "no" | "No" | "NO" | "false" | "False" | "FALSE" | "off" | "Off" | "OFF" => return Value::Bool(false),
        _ => {}
    }
    integer(text).map(Value::from).or_else(|| float(text).map(Value::Number)).unwrap_or_else(|| text.into())
}

fn integer(text: &str) -> Option<i64> {
    let (sign, digits) = match text.as_bytes().first()? {
        b'-' => (-1, &text[1..]),
        b'+' => (1, &text[1..]),
        _ => (1, text),
    };
    if !digits.starts_with(|c: char| c.is_ascii_digit()) {
        return None;
    }
    let digits = digits.replace('_', "");
    let magnitude = match digits.get(..2) {
        Some("0x") => i64::from_str_radix(&digits[2..], 16),
        Some("0b") => i64::from_str_radix(&digits[2..], 2),
        Some(two) if two.starts_with('0') => i64::from_str_radix(&digits[1..], 8),
        _ => digits.parse(),
    };
    Some(sign * magnitude.ok()?)
}

fn float(text: &str) -> Option<Number> {
    let body = text.trim_start_matches(['-', '+']);
    let (mantissa, exponent) = body.split_once(['e', 'E']).map_or((body, None), |(m, e)| (m, Some(e)));
    let signed = exponent.is_none_or(|e| e.starts_with(['-', '+']));
    let plain = mantissa.chars().all(|c| c.is_ascii_digit() || c == '.' || c == '_');
    // A sign before a bare point makes a text of it.
    let bare = mantissa.starts_with('.') && (mantissa.len() == 1 || body != text);
    if !mantissa.contains('.') || !plain || !signed || bare {
        return None;
    }
    Number::from_f64(text.replace('_', "").parse().ok()?)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn values(text: &str) -> Value {
        let entries = parse("t.yaml", text).unwrap().entries;
        Value::Object(entries.iter().map(|(k, n)| (k.clone(), n.value().unwrap())).collect())
    }

    #[test]
    fn scalars_are_read_as_pyyaml_reads_them() {
        let text = "a: yes\nb: 'yes'\nc: 010\nd: 1e5\ne: 1.0e+5\nf: 0.\ng: ~\nh:\ni: \"x\\n\\\n  y\"\nj: 1_000\nk: -.5\nl: 0x1F\nm: .5\nn: 089\no: 1.5e3\np: +1.5";
        // yaml.safe_load of the same text.
        let expected = json!({"a": true, "b": "yes", "c": 8, "d": "1e5", "e": 100000.0, "f": 0.0, "g": null, "h": null,
            "i": "x\ny", "j": 1000, "k": "-.5", "l": 31, "m": 0.5, "n": "089", "o": "1.5e3", "p": 1.5});
        assert_eq!(values(text), expected);
        assert_eq!(values("a: &x [1, {b: c}]\nd: *x"), json!({"a": [1, {"b": "c"}], "d": [1, {"b": "c"}]}));
    }

    #[test]
    fn mistakes_are_reported_with_their_line() {
        let message = |text: &str| parse("t.yaml", text).unwrap_err().to_string();
        assert!(message("a: 1\nb: [1, 2").starts_with("t.yaml:"));
        assert!(message("- a\n- b").contains("t.yaml:1"));
        assert!(message("").contains("the file is empty"));
        assert!(message("a: !!python/object:os.system x").contains("is not known here"));
        assert!(message("a: 1\n---\nb: 2").contains("second document"));
        assert!(message("a: !!int x").contains("!!int") || message("a: !!int x").contains("2002:int"));
        assert!(message("a: !!set {x, y}").contains("set` is not known here"));
        assert!(message("<<: 3").contains("takes a mapping"));
    }

    #[test]
    fn of_a_key_that_is_there_twice_the_last_counts_and_it_is_noted() {
        let parsed = parse("t.yaml", "a: 1\nb: {c: 1, c: 2}\na: 3").unwrap();
        let value = |i: usize| parsed.entries[i].1.value().unwrap();
        // yaml.safe_load: {'a': 3, 'b': {'c': 2}}
        assert_eq!((parsed.entries.len(), value(0), value(1)), (2, json!(3), json!({"c": 2})));
        assert_eq!(parsed.notes.len(), 2);
        assert!(parsed.notes[1].contains("t.yaml:3: key `a` is there twice (line 1 before)"), "{:?}", parsed.notes);
    }

    #[test]
    fn yamls_own_tags_and_merged_mappings_are_read_as_pyyaml_reads_them() {
        let text = "a: !!null\nb: !!int \"3\"\nc: !!float 2\nd: !!bool yes\ne: !!str 5\nf: !!map {x: 1}\ng: !!seq [1]\n\
                    h: !!null ''\nbase: &b {x: 1, y: 2}\nm: {<<: *b, y: 3}\nn: {<<: [*b, {z: 4, x: 9}]}";
        // yaml.safe_load of the same text.
        let expected = json!({"a": null, "b": 3, "c": 2.0, "d": true, "e": "5", "f": {"x": 1}, "g": [1], "h": null,
            "base": {"x": 1, "y": 2}, "m": {"y": 3, "x": 1}, "n": {"x": 1, "y": 2, "z": 4}});
        assert_eq!(values(text), expected);
    }

    #[test]
    fn functions_are_seen_but_have_no_value() {
        let entries = parse("t.yaml", "a: !function utils.f").unwrap().entries;
        assert!(matches!(&entries[0].1.kind, Kind::Function(f) if f == "utils.f"));
        assert!(entries[0].1.value().is_none());
    }
}
