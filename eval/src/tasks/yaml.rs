//! A YAML file as a tree that knows its lines, with scalars read as lm-evaluation-harness's PyYAML reads them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use granit_parser::{Event, Parser, ScalarStyle, StrInput, Tag};
use serde_json::{Number, Value};

use super::{Error, files};

/// A value and where it stands.
#[derive(Clone, Debug)]
pub struct Node {
    pub file: Arc<str>,
    /// Of its key, counted from 1.
    pub line: usize,
    /// What it is the value of; of an item its list's, and nothing at the top of a file.
    pub key: Arc<str>,
    pub kind: Kind,
}

/// What a value is.
#[derive(Clone, Debug)]
pub enum Kind {
    Scalar(Value),
    List(Vec<Node>),
    /// In the order of the file.
    Map(Vec<Node>),
    /// `!function name`.
    Function(String),
}

impl Node {
    /// The value of a key; `null` is none.
    pub fn get(&self, key: &str) -> Option<&Node> {
        self.entries().iter().find(|n| &*n.key == key && !n.is_null())
    }

    /// What is in a mapping.
    pub fn entries(&self) -> &[Node] {
        if let Kind::Map(entries) = &self.kind { entries } else { &[] }
    }

    /// The items of the list at a key; what is no list is an item of its own.
    pub fn items(&self, key: &str) -> Option<&[Node]> {
        self.get(key).map(Self::as_items)
    }

    /// The items of a list, or the value itself.
    pub fn as_items(&self) -> &[Node] {
        if let Kind::List(items) = &self.kind { items } else { std::slice::from_ref(self) }
    }

    /// Of a mapping, these keys only.
    pub fn only(&self, keys: &[&str]) -> Self {
        let entries = self.entries().iter().filter(|n| keys.contains(&&*n.key)).cloned().collect();
        Self { kind: Kind::Map(entries), ..self.clone() }
    }

    /// A mapping with the entries of `over`, which win.
    pub fn with(mut self, over: Vec<Node>) -> Self {
        if let Kind::Map(entries) = &mut self.kind {
            over.into_iter().for_each(|node| drop(put(entries, node)));
        }
        self
    }

    pub fn is_null(&self) -> bool {
        matches!(self.kind, Kind::Scalar(Value::Null))
    }

    /// What it is, for errors.
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

/// Puts an entry in the place of one with its key, which is given back, or behind all.
fn put(entries: &mut Vec<Node>, node: Node) -> Option<Node> {
    match entries.iter_mut().find(|known| known.key == node.key) {
        Some(known) => Some(std::mem::replace(known, node)),
        None => {
            entries.push(node);
            None
        }
    }
}

/// Reads a file and all that it includes, as one mapping in which its own keys win; and what is strange in the files
/// without being wrong.
pub fn load(path: &Path) -> Result<(Node, Vec<String>), Error> {
    load_in(path, &mut Vec::new())
}

fn load_in(path: &Path, open: &mut Vec<PathBuf>) -> Result<(Node, Vec<String>), Error> {
    if open.iter().any(|p| p == path) {
        let chain: Vec<String> =
            open.iter().map(PathBuf::as_path).chain([path]).map(|p| p.display().to_string()).collect();
        return Err(Error::IncludeCycle { chain: chain.join(" → ") });
    }
    let (own, mut notes) = parse(&path.display().to_string(), &files::read_text(path)?)?;
    open.push(path.into());
    let mut merged = own.only(&[]);
    for included in own.get("include").map(Node::read::<Vec<String>>).transpose()?.unwrap_or_default() {
        let folder = path.parent().unwrap_or(Path::new(""));
        let (included, more) = load_in(&files::lexical(&folder.join(included)), open)?;
        merged = merged.with(included.entries().to_vec());
        notes.extend(more);
    }
    open.pop();
    let own = own.entries().iter().filter(|n| &*n.key != "include").cloned().collect();
    Ok((merged.with(own), notes))
}

/// Reads a file's text, whose top level is a mapping. Of a key that is there twice the last counts, as PyYAML has it, and a
/// note says so.
fn parse(file: &str, text: &str) -> Result<(Node, Vec<String>), Error> {
    let parser = Parser::new_from_str(text);
    let mut builder = Builder { file: file.into(), parser, anchors: Vec::new(), notes: Vec::new() };
    let top = loop {
        match builder.next()? {
            (Event::StreamStart | Event::DocumentStart(..), _) => {}
            (Event::StreamEnd | Event::DocumentEnd, line) => return Err(builder.error(line, "the file is empty")),
            (event, line) => break builder.node(event, line, "")?,
        }
    };
    loop {
        match builder.next()? {
            (Event::DocumentEnd, _) => {}
            (Event::StreamEnd, _) => break,
            (_, line) => return Err(builder.error(line, "a second document begins here; a task file has one")),
        }
    }
    match top.kind {
        Kind::Map(_) => Ok((top, builder.notes)),
        _ => Err(builder.error(top.line, "expected `key: value` lines")),
    }
}

struct Builder<'a> {
    file: Arc<str>,
    parser: Parser<'a, StrInput<'a>>,
    anchors: Vec<(usize, Node)>,
    notes: Vec<String>,
}

/// What the tags of YAML itself (`!!int`) stand for.
const CORE: &str = "tag:yaml.org,2002:";

impl<'a> Builder<'a> {
    fn error(&self, line: usize, message: impl std::fmt::Display) -> Error {
        let message = format!("not a YAML file that can be read: {message}");
        Error::File { file: self.file.to_string(), line, message }
    }

    fn next(&mut self) -> Result<(Event<'a>, usize), Error> {
        match self.parser.next() {
            Some(Ok((event, span))) => Ok((event, span.start.line())),
            Some(Err(e)) => Err(self.error(e.marker().line(), e.info())),
            None => Ok((Event::StreamEnd, 0)),
        }
    }

    fn node(&mut self, event: Event<'a>, line: usize, key: &str) -> Result<Node, Error> {
        let (kind, anchor) = match event {
            Event::Scalar(text, style, anchor, tag) => {
                let kind =
                    match tag.map(|t| name(&t)).as_deref() {
                        None if style == ScalarStyle::Plain => Kind::Scalar(plain(&text)),
                        None => Kind::Scalar(text.into()),
                        Some("!function") => Kind::Function(text.into_owned()),
                        Some(tag) => Kind::Scalar(tagged(tag, &text).ok_or_else(|| {
                            self.error(line, format!("`{text}` with the tag `{tag}` is not known here"))
                        })?),
                    };
                (kind, anchor)
            }
            Event::SequenceStart(_, anchor, tag) => {
                self.expect_tag(line, tag.as_deref(), "seq")?;
                let mut items = Vec::new();
                loop {
                    match self.next()? {
                        (Event::SequenceEnd, _) => break (Kind::List(items), anchor),
                        (event, line) => items.push(self.node(event, line, key)?),
                    }
                }
            }
            Event::MappingStart(_, anchor, tag) => {
                self.expect_tag(line, tag.as_deref(), "map")?;
                (Kind::Map(self.mapping()?), anchor)
            }
            Event::Alias(id) => {
                let known = self.anchors.iter().find(|(anchor, _)| *anchor == id).map(|(_, node)| node.kind.clone());
                (known.ok_or_else(|| self.error(line, "an alias inside of what it stands for"))?, 0)
            }
            _ => return Err(self.error(line, "expected a value")),
        };
        let node = Node { file: self.file.clone(), line, key: key.into(), kind };
        if anchor != 0 {
            self.anchors.push((anchor, node.clone()));
        }
        Ok(node)
    }

    fn expect_tag(&self, line: usize, tag: Option<&Tag>, expected: &str) -> Result<(), Error> {
        match tag.map(name).filter(|tag| tag.strip_prefix(CORE) != Some(expected)) {
            Some(tag) => Err(self.error(line, format!("tag `{tag}` is not known here"))),
            None => Ok(()),
        }
    }

    fn mapping(&mut self) -> Result<Vec<Node>, Error> {
        let (mut entries, mut merged): (Vec<Node>, Vec<Node>) = (Vec::new(), Vec::new());
        loop {
            let (event, line) = self.next()?;
            if event == Event::MappingEnd {
                // Own keys win over merged ones, and of those the first.
                for node in merged {
                    if !entries.iter().any(|own| own.key == node.key) {
                        entries.push(node);
                    }
                }
                return Ok(entries);
            }
            let Kind::Scalar(key) = self.node(event, line, "")?.kind else {
                return Err(self.error(line, "a key must be a word"));
            };
            let key = recoup_jinja::data::str(&key);
            let (event, value_line) = self.next()?;
            // An error about a value that begins on a later line is still about this key.
            let value = Node { line, ..self.node(event, value_line, &key)? };
            if key == "<<" {
                for map in value.as_items() {
                    let Kind::Map(own) = &map.kind else {
                        return Err(self.error(line, "`<<` takes a mapping, or a list of mappings"));
                    };
                    merged.extend(own.iter().cloned());
                }
            } else if let Some(known) = put(&mut entries, value) {
                self.notes.push(format!(
                    "{}:{line}: key `{key}` is there twice (line {} before); the last counts, as in lm-evaluation-harness",
                    self.file, known.line
                ));
            }
        }
    }
}

fn name(tag: &Tag) -> String {
    format!("{}{}", tag.handle(), tag.suffix())
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
    let digits = text.strip_prefix(['-', '+']).unwrap_or(text);
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
    magnitude.ok().map(|n| if text.starts_with('-') { -n } else { n })
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
        parse("t.yaml", text).unwrap().0.read().unwrap()
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
        for (text, expected) in [
            ("a: 1\nb: [1, 2", "t.yaml:"),
            ("- a\n- b", "t.yaml:1"),
            ("", "the file is empty"),
            ("a: !!python/object:os.system x", "is not known here"),
            ("a: 1\n---\nb: 2", "t.yaml:2: not a YAML file that can be read: a second document"),
            ("a: !!int x", "2002:int"),
            ("a: !!set {x, y}", "set` is not known here"),
            ("<<: 3", "takes a mapping"),
        ] {
            let message = parse("t.yaml", text).unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        }
    }

    #[test]
    fn of_a_key_that_is_there_twice_the_last_counts_and_it_is_noted() {
        let (node, notes) = parse("t.yaml", "a: 1\nb: {c: 1, c: 2}\na: 3").unwrap();
        // yaml.safe_load: {'a': 3, 'b': {'c': 2}}
        assert_eq!(node.read::<Value>().unwrap().to_string(), r#"{"a":3,"b":{"c":2}}"#);
        assert_eq!(notes.len(), 2);
        assert!(notes[1].contains("t.yaml:3: key `a` is there twice (line 1 before)"), "{notes:?}");
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
}
