//! All tasks that can be named: built in, and in the folders given.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsStr,
    path::{Path, PathBuf},
};

use serde_json::Value;

use super::{
    Error,
    aggregate::{Group, GroupMetric},
    config::Config,
    files,
    keys::{Entry, Keys},
    nearest::nearest,
    task::Task,
    yaml::Kind,
};

/// Tasks, groups and tags by name. A file that is wrong matters only to who asks for what is in it.
#[derive(Debug)]
pub struct Library {
    definitions: BTreeMap<String, Definition>,
    tags: BTreeMap<String, BTreeSet<String>>,
    /// Names that cannot be used, and why.
    broken: BTreeMap<String, String>,
    /// Files of the folders given that cannot be read as tasks, and why; those without a name of their own (to be included,
    /// or no tasks at all) are not among them.
    unreadable: Vec<(String, String)>,
    /// By the file's name: why it defines nothing.
    nameless: BTreeMap<String, String>,
    data_dir: Option<PathBuf>,
}

/// What was asked for: tasks in the order of their first mention, groups after the groups in them.
#[derive(Debug, Default)]
pub struct Selection {
    pub tasks: Vec<Task>,
    pub groups: Vec<Group>,
    /// What whoever asked for them should know.
    pub notes: Vec<String>,
}

/// A name in the library.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    pub name: String,
    pub kind: ListedKind,
    /// The file that defines it; empty for a tag.
    pub file: String,
}

/// What a name stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ListedKind {
    Task,
    Group,
    /// Tasks that carry the same `tag`.
    Tag,
}

#[derive(Clone, Debug)]
struct Definition {
    keys: Keys,
    folder: PathBuf,
    root: PathBuf,
    is_group: bool,
    /// The file whose definition of the same name this one replaced.
    instead_of: Option<String>,
}

const GROUP_KEYS: &[&str] = &["group", "group_alias", "task", "aggregate_metric_list", "tag", "include", "metadata"];

impl Library {
    /// The built-in tasks and those of `folders`; a later folder's name wins over an earlier one's and a built-in one.
    /// `data_dir`: a folder whose data files are taken instead of those of the same name.
    ///
    /// # Errors
    /// When a folder cannot be listed.
    pub fn new(folders: &[PathBuf], data_dir: Option<PathBuf>) -> Result<Self, Error> {
        if let Some(path) = data_dir.as_ref().filter(|path| !path.is_dir()) {
            let problem = if path.exists() { "it is a file, not a folder" } else { "there is no such folder" };
            return Err(Error::DataFolder { path: path.clone(), problem: problem.into() });
        }
        let mut library = Self {
            definitions: BTreeMap::new(),
            tags: BTreeMap::new(),
            broken: BTreeMap::new(),
            unreadable: Vec::new(),
            nameless: BTreeMap::new(),
            data_dir,
        };
        library.add_folder(Path::new(files::BUILT_IN))?;
        folders.iter().try_for_each(|folder| library.add_folder(folder))?;
        Ok(library)
    }

    /// Everything that can be named, by kind and name.
    #[must_use]
    pub fn list(&self) -> Vec<Listed> {
        let definitions = self.definitions.iter().map(|(name, d)| Listed {
            name: name.clone(),
            kind: if d.is_group { ListedKind::Group } else { ListedKind::Task },
            file: d.keys.file.clone(),
        });
        let tags = self.tags.keys().filter(|t| !self.definitions.contains_key(*t));
        let tags = tags.map(|t| Listed { name: t.clone(), kind: ListedKind::Tag, file: String::new() });
        definitions.chain(tags).collect()
    }

    /// Loads what is named: tasks, groups, tags, patterns with `*` and `?`, or paths of YAML files.
    ///
    /// # Errors
    /// When there is nothing of a name, or a task cannot be loaded.
    pub fn select(&mut self, names: &[impl AsRef<OsStr>]) -> Result<Selection, Error> {
        let mut wanted = Wanted::default();
        for path in names.iter().map(Path::new) {
            // Only a file can have a name that is no text.
            let name = &*path.to_string_lossy();
            if path.extension().is_some_and(|e| e == "yaml" || e == "yml") && path.is_file() {
                let folder = path.parent().unwrap_or(Path::new("")).to_path_buf();
                let (name, definition) = define(path, &folder)?;
                let file = definition.keys.file.clone();
                let known =
                    self.definitions.get(&name).map(|d| d.keys.file.clone()).filter(|known| !is_same(known, path));
                if let Some(first) = known.filter(|_| wanted.has(&name)) {
                    return Err(Error::Duplicate { name, first, second: file });
                }
                self.insert(name.clone(), definition)?;
                self.collect(&name, &mut wanted, &mut Vec::new())?;
            } else if name.contains(['*', '?']) {
                let known: Vec<String> = self.list().into_iter().map(|l| l.name).filter(|n| glob(name, n)).collect();
                if known.is_empty() {
                    return Err(self.unknown(name));
                }
                known.iter().try_for_each(|name| self.collect(name, &mut wanted, &mut Vec::new()).map(drop))?;
            } else {
                self.collect(name, &mut wanted, &mut Vec::new())?;
            }
        }
        let load = |name: &String| {
            let definition = &self.definitions[name];
            let config = Config::new(&definition.keys, &definition.folder, &definition.root)?;
            Task::load(config, self.data_dir.as_deref())
        };
        let tasks = wanted.tasks.iter().map(load).collect::<Result<Vec<_>, _>>()?;
        let mut notes: Vec<String> = tasks.iter().flat_map(|t| t.notes.iter().cloned()).collect();
        notes.extend(self.notes(wanted.tasks.iter().chain(wanted.groups.iter().map(|g| &g.name))));
        Ok(Selection { tasks, groups: wanted.groups, notes })
    }

    /// What is to be said of the files of `names`, and of those that nobody could ask for.
    fn notes<'n>(&self, names: impl Iterator<Item = &'n String>) -> Vec<String> {
        let mut out = Vec::new();
        for definition in names.filter_map(|name| self.definitions.get(name).map(|d| (name, d))) {
            let (name, Definition { keys, instead_of, .. }) = definition;
            out.extend(keys.notes.iter().cloned());
            out.extend(
                instead_of.iter().map(|other| format!("`{name}` is taken from {}, not from {other}", keys.file)),
            );
        }
        if let Some((file, why)) = self.unreadable.first() {
            let more = match self.unreadable.len() - 1 {
                0 => String::new(),
                1 => "; one more file like it".into(),
                n => format!("; {n} more files like it"),
            };
            let why = why.strip_prefix(&format!("{file}:")).unwrap_or(why).trim_start();
            out.push(format!("{file} cannot be read as a task and is left out ({why}){more}"));
        }
        out.sort_by_key(|n| n.contains("is left out"));
        out.dedup();
        out
    }

    fn add_folder(&mut self, root: &Path) -> Result<(), Error> {
        let mut own: BTreeMap<String, String> = BTreeMap::new();
        for path in files::yaml_files(root)? {
            let file = path.display().to_string();
            let inserted = match define(&path, root) {
                Ok((name, definition)) => match own.insert(name.clone(), file.clone()) {
                    Some(first) => {
                        let twice = Error::Duplicate { name: name.clone(), first, second: file.clone() };
                        self.break_name(name, twice.to_string());
                        Ok(())
                    }
                    None => self.insert(name, definition),
                },
                Err(Error::MissingKey { key, .. }) if key == "task" => {
                    let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
                    self.nameless.insert(stem, format!("{file} has no `task`, so it defines none"));
                    Ok(())
                }
                Err(error) => Err(error),
            };
            if let Err(error) = inserted {
                let why = error.to_string();
                for name in names_in(&path) {
                    self.break_name(name, why.clone());
                }
                self.unreadable.push((file, why));
            }
        }
        Ok(())
    }

    /// From here on `name` stands for nothing, whatever defined it before.
    fn break_name(&mut self, name: String, why: String) {
        self.definitions.remove(&name);
        self.broken.insert(name, why);
    }

    fn insert(&mut self, name: String, mut definition: Definition) -> Result<(), Error> {
        if !definition.is_group {
            for tag in definition.keys.texts("tag")?.unwrap_or_default() {
                self.tags.entry(tag).or_default().insert(name.clone());
            }
        }
        self.broken.remove(&name);
        let known = self.definitions.get(&name).map(|d| d.keys.file.clone());
        definition.instead_of = known.filter(|file| *file != definition.keys.file);
        self.definitions.insert(name, definition);
        Ok(())
    }

    fn unknown(&self, name: &str) -> Error {
        if let Some(why) = self.broken.get(name).or_else(|| self.nameless.get(name)) {
            return Error::Broken { name: name.into(), why: why.clone() };
        }
        let known = self.list();
        Error::UnknownTask { name: name.into(), nearest: nearest(name, known.iter().map(|l| l.name.as_str())) }
    }

    /// Adds what a name stands for; answers with the names of its tasks.
    fn collect(&self, name: &str, wanted: &mut Wanted, open: &mut Vec<String>) -> Result<Vec<String>, Error> {
        match self.definitions.get(name) {
            Some(definition) if definition.is_group => self.collect_group(name, &definition.keys, wanted, open),
            Some(_) => {
                if !wanted.tasks.iter().any(|t| t == name) {
                    wanted.tasks.push(name.into());
                }
                Ok(vec![name.into()])
            }
            None => {
                let tasks: Vec<String> = match self.tags.get(name) {
                    Some(tasks) => tasks.iter().cloned().collect(),
                    None => return Err(self.unknown(name)),
                };
                tasks.iter().try_for_each(|task| self.collect(task, wanted, open).map(drop))?;
                Ok(tasks)
            }
        }
    }

    fn collect_group(
        &self,
        name: &str,
        keys: &Keys,
        wanted: &mut Wanted,
        open: &mut Vec<String>,
    ) -> Result<Vec<String>, Error> {
        keys.check(GROUP_KEYS, &[])?;
        if open.iter().any(|o| o == name) {
            let chain: Vec<&str> = open.iter().map(String::as_str).chain([name]).collect();
            return Err(Error::GroupCycle { name: name.into(), chain: chain.join(" → ") });
        }
        open.push(name.into());
        let (mut tasks, mut children): (Vec<String>, Vec<String>) = (Vec::new(), Vec::new());
        for member in keys.list("task")?.unwrap_or_default() {
            let (own, child) = match &member.node.kind {
                Kind::Map(_) => {
                    let inline = Keys::of(&member, "a group")?;
                    let child =
                        format!("{name}::{}", inline.required("group", "only groups can be defined in a group")?);
                    (self.collect_group(&child, &inline, wanted, open)?, child)
                }
                _ => {
                    let child = member.text()?;
                    (self.collect(&child, wanted, open)?, child)
                }
            };
            // A tag is no child of its own: its tasks are.
            let is_tag = !child.contains("::") && !self.definitions.contains_key(&child);
            children.extend(if is_tag { own.clone() } else { vec![child] });
            tasks.extend(own.into_iter().filter(|t| !tasks.contains(t)).collect::<Vec<_>>());
        }
        open.pop();
        if !wanted.groups.iter().any(|g| g.name == name) {
            let metadata = keys.get("metadata").map(Entry::object).transpose()?;
            let version = metadata.and_then(|m| m.get("version").map(super::python::str));
            wanted.groups.push(Group {
                name: name.into(),
                alias: keys.text("group_alias")?.unwrap_or_else(|| name.into()),
                tasks: tasks.clone(),
                children,
                aggregates: aggregates(keys)?,
                version: version.unwrap_or_else(|| "N/A".into()),
            });
        }
        Ok(tasks)
    }
}

#[derive(Default)]
struct Wanted {
    tasks: Vec<String>,
    groups: Vec<Group>,
}

impl Wanted {
    fn has(&self, name: &str) -> bool {
        self.tasks.iter().chain(self.groups.iter().map(|g| &g.name)).any(|n| n == name)
    }
}

/// Whether two paths are of one file.
fn is_same(one: &str, other: &Path) -> bool {
    match (std::fs::canonicalize(one), std::fs::canonicalize(other)) {
        (Ok(a), Ok(b)) => a == b,
        _ => Path::new(one) == other,
    }
}

/// Names that a file which cannot be read as YAML seems to define, by its lines that begin with `task:` or `group:`.
fn names_in(path: &Path) -> Vec<String> {
    let bytes = files::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let value = |line: &str| {
        let value = line.strip_prefix("task:").or_else(|| line.strip_prefix("group:"))?;
        let value = value.split(" #").next()?.trim().trim_matches(['"', '\'']);
        (!value.is_empty() && !value.starts_with(['[', '-', '{', '!'])).then(|| value.to_owned())
    };
    text.lines().filter_map(value).collect()
}

fn define(path: &Path, root: &Path) -> Result<(String, Definition), Error> {
    let keys = Keys::load(path)?;
    // A task written in Python names its group as well.
    let is_group = keys.has("group") && !keys.has("dataset_path") && !keys.has("class");
    let name = keys.required(if is_group { "group" } else { "task" }, "it is the name to ask for")?;
    let folder = path.parent().unwrap_or(Path::new("")).to_path_buf();
    Ok((name, Definition { keys, folder, root: root.into(), is_group, instead_of: None }))
}

fn aggregates(keys: &Keys) -> Result<Vec<GroupMetric>, Error> {
    let aggregate = |item: &Entry| {
        let own = Keys::of(item, "a metric of `aggregate_metric_list`")?;
        own.check(&["metric", "filter_list", "aggregation", "weight_by_size"], &[])?;
        if let Some(entry) = own.get("aggregation").filter(|e| e.node.value() != Some(Value::from("mean"))) {
            entry.value()?;
            return Err(entry.bad("groups are aggregated by `mean` only"));
        }
        Ok(GroupMetric {
            metric: own.required("metric", "it is the metric's name")?,
            filters: own.texts("filter_list")?,
            weight_by_size: own.flag("weight_by_size")?.unwrap_or(true),
        })
    };
    keys.list("aggregate_metric_list")?.unwrap_or_default().iter().map(aggregate).collect()
}

/// Whether a name fits a pattern: `*` for any characters, `?` for one.
fn glob(pattern: &str, name: &str) -> bool {
    match (pattern.chars().next(), name.chars().next()) {
        (None, None) => true,
        (Some('*'), first) => glob(&pattern[1..], name) || first.is_some_and(|c| glob(pattern, &name[c.len_utf8()..])),
        (Some('?'), Some(c)) => glob(&pattern[1..], &name[c.len_utf8()..]),
        (Some(p), Some(c)) if p == c => glob(&pattern[c.len_utf8()..], &name[c.len_utf8()..]),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_fit_as_a_shell_fits_them() {
        assert!(glob("mmlu_*", "mmlu_anatomy") && glob("*", "") && glob("?x*", "éxyz"));
        assert!(!glob("mmlu_?", "mmlu_") && !glob("a*b", "ac"));
    }
}
