//! The keys of a mapping in a task file, taken one by one as the types they must have; errors know file and line.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::{
    Error, files,
    nearest::nearest,
    yaml::{self, Kind, Node},
};

/// A mapping whose values may come from several files.
#[derive(Clone, Debug)]
pub struct Keys {
    /// The file that is read.
    pub file: String,
    /// What the mapping is, for errors.
    within: String,
    entries: Vec<Entry>,
    /// What is strange in the files without being wrong.
    pub notes: Vec<String>,
}

/// A value, and the file that it stands in.
#[derive(Clone, Debug)]
pub struct Entry {
    pub key: String,
    pub file: String,
    pub node: Node,
}

impl Keys {
    /// Reads a file and all that it includes; its own keys win.
    ///
    /// # Errors
    /// When a file cannot be read, is no YAML, or files include each other.
    pub fn load(path: &Path) -> Result<Self, Error> {
        load(path, &mut Vec::new())
    }

    /// The mapping at a value.
    ///
    /// # Errors
    /// When it is not one.
    pub fn of(entry: &Entry, within: &str) -> Result<Self, Error> {
        let Kind::Map(map) = &entry.node.kind else { return Err(entry.wrong("a mapping (`key: value`)")) };
        let entries = map.iter().map(|(k, n)| Entry { key: k.clone(), file: entry.file.clone(), node: n.clone() });
        Ok(Self { file: entry.file.clone(), within: within.into(), entries: entries.collect(), notes: Vec::new() })
    }

    /// Whether the key is there at all.
    #[must_use]
    pub fn has(&self, key: &str) -> bool {
        self.entries.iter().any(|e| e.key == key)
    }

    /// The value of a key; `null` is none.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&Entry> {
        self.entries.iter().find(|e| e.key == key && !matches!(e.node.kind, Kind::Scalar(Value::Null)))
    }

    /// All that is there.
    #[must_use]
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Refuses keys that are not known.
    ///
    /// # Errors
    /// The first of them.
    pub fn check(&self, known: &[&str], unsupported: &[(&str, &str)]) -> Result<(), Error> {
        for entry in &self.entries {
            let (file, line, key) = (entry.file.clone(), entry.node.line, entry.key.clone());
            if let Some((_, reason)) = unsupported.iter().find(|(k, _)| *k == key) {
                if self.get(&key).is_some() {
                    entry.value()?;
                    return Err(Error::Unsupported { file, line, key, reason: (*reason).into() });
                }
            } else if !known.contains(&key.as_str()) {
                let nearest = nearest(&key, known.iter().copied());
                return Err(Error::UnknownKey { file, line, key, within: self.within.clone(), nearest });
            }
        }
        Ok(())
    }

    /// A text.
    ///
    /// # Errors
    /// When it is something else.
    pub fn text(&self, key: &str) -> Result<Option<String>, Error> {
        self.get(key).map(Entry::text).transpose()
    }

    /// A text that must be there.
    ///
    /// # Errors
    /// When it is missing or something else.
    pub fn required(&self, key: &str, reason: &str) -> Result<String, Error> {
        let missing = || Error::MissingKey { file: self.file.clone(), key: key.into(), reason: reason.into() };
        self.text(key)?.ok_or_else(missing)
    }

    /// A count.
    ///
    /// # Errors
    /// When it is something else.
    pub fn count(&self, key: &str) -> Result<Option<usize>, Error> {
        let Some(entry) = self.get(key) else { return Ok(None) };
        let count = entry.value()?.as_u64().ok_or_else(|| entry.wrong("a count"))?;
        Ok(Some(count as usize))
    }

    /// True or false.
    ///
    /// # Errors
    /// When it is something else.
    pub fn flag(&self, key: &str) -> Result<Option<bool>, Error> {
        let Some(entry) = self.get(key) else { return Ok(None) };
        entry.value()?.as_bool().map(Some).ok_or_else(|| entry.wrong("true or false"))
    }

    /// A list, or one value for a list of one.
    ///
    /// # Errors
    /// When it is a mapping.
    pub fn list(&self, key: &str) -> Result<Option<Vec<Entry>>, Error> {
        let Some(entry) = self.get(key) else { return Ok(None) };
        let at = |node: &Node| Entry { node: node.clone(), ..entry.clone() };
        Ok(Some(match &entry.node.kind {
            Kind::List(items) => items.iter().map(at).collect(),
            _ => vec![entry.clone()],
        }))
    }

    /// Texts, or one text.
    ///
    /// # Errors
    /// When one is something else.
    pub fn texts(&self, key: &str) -> Result<Option<Vec<String>>, Error> {
        self.list(key)?.map(|items| items.iter().map(Entry::text).collect()).transpose()
    }
}

impl Entry {
    /// The value without its lines.
    ///
    /// # Errors
    /// When it is, or holds, a Python function.
    pub fn value(&self) -> Result<Value, Error> {
        if let Some(value) = self.node.value() {
            return Ok(value);
        }
        let (line, function) = function(&self.node).unwrap_or((self.node.line, String::new()));
        Err(Error::Function { file: self.file.clone(), line, key: self.key.clone(), function })
    }

    /// The text.
    ///
    /// # Errors
    /// When it is something else.
    pub fn text(&self) -> Result<String, Error> {
        match self.value()? {
            Value::String(s) => Ok(s),
            _ => Err(self.wrong("a text")),
        }
    }

    /// The mapping as JSON.
    ///
    /// # Errors
    /// When it is something else.
    pub fn object(&self) -> Result<Map<String, Value>, Error> {
        match self.value()? {
            Value::Object(map) => Ok(map),
            _ => Err(self.wrong("a mapping (`key: value`)")),
        }
    }

    /// The error that the value is of the wrong kind.
    #[must_use]
    pub fn wrong(&self, expected: &str) -> Error {
        Error::WrongType {
            file: self.file.clone(),
            line: self.node.line,
            key: self.key.clone(),
            expected: expected.into(),
            found: self.node.describe(),
        }
    }

    /// The error that the value means nothing.
    #[must_use]
    pub fn bad(&self, message: impl Into<String>) -> Error {
        let (file, key) = (self.file.clone(), self.key.clone());
        Error::BadValue { file, line: self.node.line, key, message: message.into() }
    }
}

fn function(node: &Node) -> Option<(usize, String)> {
    match &node.kind {
        Kind::Scalar(_) => None,
        Kind::Function(name) => Some((node.line, name.clone())),
        Kind::List(items) => items.iter().find_map(function),
        Kind::Map(entries) => entries.iter().find_map(|(_, n)| function(n)),
    }
}

fn load(path: &Path, open: &mut Vec<PathBuf>) -> Result<Keys, Error> {
    if open.iter().any(|p| p == path) {
        let chain: Vec<String> = open.iter().chain([&path.to_path_buf()]).map(|p| p.display().to_string()).collect();
        return Err(Error::IncludeCycle { chain: chain.join(" → ") });
    }
    let file = path.display().to_string();
    let yaml::Parsed { entries: own, mut notes } = yaml::parse(&file, &files::read_text(path)?)?;
    open.push(path.into());
    let own = Keys {
        notes: Vec::new(),
        within: if own.iter().any(|(k, _)| k == "group") { "a group".into() } else { "a task".into() },
        entries: own.into_iter().map(|(key, node)| Entry { key, file: file.clone(), node }).collect(),
        file,
    };
    let mut merged: Vec<Entry> = Vec::new();
    let mut put = |entry: Entry| match merged.iter_mut().find(|e| e.key == entry.key) {
        Some(known) => *known = entry,
        None => merged.push(entry),
    };
    for included in own.texts("include")?.unwrap_or_default() {
        let folder = path.parent().unwrap_or(Path::new(""));
        let included = load(&lexical(&folder.join(included)), open)?;
        notes.extend(included.notes);
        included.entries.into_iter().for_each(&mut put);
    }
    own.entries.into_iter().filter(|e| e.key != "include").for_each(&mut put);
    open.pop();
    Ok(Keys { entries: merged, file: own.file, within: own.within, notes })
}

/// The path without `a/..`, so that a file has one name.
fn lexical(path: &Path) -> PathBuf {
    let mut out = PathBuf::new();
    for part in path.components() {
        match part {
            std::path::Component::ParentDir if out.file_name().is_some() => drop(out.pop()),
            std::path::Component::CurDir => {}
            part => out.push(part),
        }
    }
    out
}
