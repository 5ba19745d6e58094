//! All tasks that can be named: built in, and in the folders given.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsStr,
    fs::canonicalize,
    path::{Path, PathBuf},
};

use serde::Deserialize;
use serde_json::{Map, Value};

use super::{
    Error,
    aggregate::{Group, GroupMetric},
    config::Config,
    files, nearest,
    task::Task,
    yaml::{self, Kind, Node},
};

/// Tasks, groups and tags by name. A file that is wrong matters only to who asks for what is in it.
#[derive(Debug, Default)]
pub struct Library {
    definitions: BTreeMap<String, Definition>,
    tags: BTreeMap<String, BTreeSet<String>>,
    /// Names that cannot be used, and why; also of files that define nothing.
    broken: BTreeMap<String, String>,
    /// Files of the folders given that cannot be read as tasks, and why; those without a name of their own (to be included,
    /// or no tasks at all) are not among them.
    unreadable: Vec<(String, String)>,
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

#[derive(Debug)]
struct Definition {
    /// The file's keys, with those that it includes.
    node: Node,
    notes: Vec<String>,
    folder: PathBuf,
    root: PathBuf,
    is_group: bool,
    /// The file whose definition of the same name this one replaced.
    instead_of: Option<String>,
}

/// The keys of a group, but for [`GROUP_LISTS`].
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct GroupKeys {
    group: String,
    group_alias: Option<String>,
    #[serde(default)]
    metadata: Map<String, Value>,
}

const GROUP_LISTS: [&str; 4] = ["task", "aggregate_metric_list", "tag", "include"];

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
        let mut library = Self { data_dir, ..Self::default() };
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
            file: d.node.file.to_string(),
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
                let (name, definition) = define(path, path.parent().unwrap_or(Path::new("")))?;
                let name = name.ok_or_else(|| definition.node.missing("task"))?;
                let known = self.definitions.get(&name).map(|d| d.node.file.to_string());
                let another = known.filter(|known| canonicalize(known).ok() != canonicalize(path).ok());
                if let Some(first) = another.filter(|_| wanted.has(&name)) {
                    return Err(Error::Duplicate { name, first, second: definition.node.file.to_string() });
                }
                self.insert(name.clone(), definition)?;
                self.collect(&name, &mut wanted, &mut Vec::new())?;
            } else if name.contains(['*', '?']) {
                let pattern = glob::Pattern::new(name).map_err(|_| self.unknown(name))?;
                let known: Vec<String> =
                    self.list().into_iter().map(|l| l.name).filter(|n| pattern.matches(n)).collect();
                if known.is_empty() {
                    return Err(self.unknown(name));
                }
                known.iter().try_for_each(|name| self.collect(name, &mut wanted, &mut Vec::new()).map(drop))?;
            } else {
                self.collect(name, &mut wanted, &mut Vec::new())?;
            }
        }
        let load = |name: &String| {
            let Definition { node, folder, root, .. } = &self.definitions[name];
            Task::load(Config::new(node, folder, root)?, self.data_dir.as_deref())
        };
        let tasks = wanted.tasks.iter().map(load).collect::<Result<Vec<_>, _>>()?;
        let mut notes: Vec<String> = tasks.iter().flat_map(|t| t.notes.iter().cloned()).collect();
        notes.extend(self.notes(wanted.tasks.iter().chain(wanted.groups.iter().map(|g| &g.name))));
        Ok(Selection { tasks, groups: wanted.groups, notes })
    }

    /// What is to be said of the files of `names`, and of those that nobody could ask for.
    fn notes<'n>(&self, names: impl Iterator<Item = &'n String>) -> Vec<String> {
        let mut out = Vec::new();
        for (name, definition) in names.filter_map(|name| self.definitions.get(name).map(|d| (name, d))) {
            let Definition { node, notes, instead_of, .. } = definition;
            out.extend(notes.iter().cloned());
            out.extend(
                instead_of.iter().map(|other| format!("`{name}` is taken from {}, not from {other}", node.file)),
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
            let added = define(&path, root).and_then(|(name, definition)| {
                let Some(name) = name else {
                    let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
                    self.broken.entry(stem).or_insert(format!("{file} has no `task`, so it defines none"));
                    return Ok(());
                };
                match own.insert(name.clone(), file.clone()) {
                    Some(first) => {
                        let twice = Error::Duplicate { name: name.clone(), first, second: file.clone() };
                        self.break_name(name, twice.to_string());
                        Ok(())
                    }
                    None => self.insert(name, definition),
                }
            });
            if let Err(error) = added {
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
        if let Some(tags) = definition.node.get("tag").filter(|_| !definition.is_group) {
            for tag in tags.read::<Vec<String>>()? {
                self.tags.entry(tag).or_default().insert(name.clone());
            }
        }
        self.broken.remove(&name);
        let known = self.definitions.get(&name).map(|d| d.node.file.to_string());
        definition.instead_of = known.filter(|file| **file != *definition.node.file);
        self.definitions.insert(name, definition);
        Ok(())
    }

    fn unknown(&self, name: &str) -> Error {
        if let Some(why) = self.broken.get(name) {
            return Error::Broken { name: name.into(), why: why.clone() };
        }
        let known = self.list();
        Error::UnknownTask { name: name.into(), nearest: nearest(name, known.iter().map(|l| l.name.as_str())) }
    }

    /// Adds what a name stands for; answers with the names of its tasks.
    fn collect(&self, name: &str, wanted: &mut Wanted, open: &mut Vec<String>) -> Result<Vec<String>, Error> {
        match self.definitions.get(name) {
            Some(definition) if definition.is_group => self.collect_group(name, &definition.node, wanted, open),
            Some(_) => {
                if !wanted.tasks.iter().any(|t| t == name) {
                    wanted.tasks.push(name.into());
                }
                Ok(vec![name.into()])
            }
            None => {
                let tasks = self.tags.get(name).ok_or_else(|| self.unknown(name))?;
                tasks.iter().try_for_each(|task| self.collect(task, wanted, open).map(drop))?;
                Ok(tasks.iter().cloned().collect())
            }
        }
    }

    fn collect_group(
        &self,
        name: &str,
        node: &Node,
        wanted: &mut Wanted,
        open: &mut Vec<String>,
    ) -> Result<Vec<String>, Error> {
        let keys: GroupKeys = node.read_beside(&GROUP_LISTS)?;
        if open.iter().any(|o| o == name) {
            let chain: Vec<&str> = open.iter().map(String::as_str).chain([name]).collect();
            return Err(Error::GroupCycle { name: name.into(), chain: chain.join(" → ") });
        }
        open.push(name.into());
        let (mut tasks, mut children): (Vec<String>, Vec<String>) = (Vec::new(), Vec::new());
        for member in node.items("task").unwrap_or_default() {
            let own = if let Kind::Map(_) = member.kind {
                if member.get("group").is_none() {
                    let message = "`group` is missing: only groups can be defined in a group".into();
                    return Err(Error::File { file: member.file.to_string(), line: member.line, message });
                }
                let GroupKeys { group, .. } = member.read_beside(&GROUP_LISTS)?;
                children.push(format!("{name}::{group}"));
                self.collect_group(&format!("{name}::{group}"), member, wanted, open)?
            } else {
                let child: String = member.read()?;
                let own = self.collect(&child, wanted, open)?;
                // A tag is no child of its own: its tasks are.
                let is_tag = !self.definitions.contains_key(&child);
                children.extend(if is_tag { own.clone() } else { vec![child] });
                own
            };
            tasks.extend(own.into_iter().filter(|t| !tasks.contains(t)).collect::<Vec<_>>());
        }
        open.pop();
        if !wanted.groups.iter().any(|g| g.name == name) {
            let metrics = node.items("aggregate_metric_list").unwrap_or_default();
            wanted.groups.push(Group {
                name: name.into(),
                alias: keys.group_alias.unwrap_or_else(|| name.into()),
                tasks: tasks.clone(),
                children,
                aggregates: metrics.iter().map(aggregate).collect::<Result<_, _>>()?,
                version: keys.metadata.get("version").map_or("N/A".into(), recoup_jinja::data::str),
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

/// What a file defines, and its name, if it has one.
fn define(path: &Path, root: &Path) -> Result<(Option<String>, Definition), Error> {
    let (node, notes) = yaml::load(path)?;
    let has = |key: &str| node.get(key).is_some();
    // A task written in Python names its group as well.
    let is_group = has("group") && !has("dataset_path") && !has("class");
    let name = node.get(if is_group { "group" } else { "task" }).map(Node::read).transpose()?;
    let folder = path.parent().unwrap_or(Path::new("")).into();
    Ok((name, Definition { node, notes, folder, root: root.into(), is_group, instead_of: None }))
}

/// An entry of `aggregate_metric_list`.
fn aggregate(item: &Node) -> Result<GroupMetric, Error> {
    match item.get("aggregation").map(|e| (e, e.read::<String>())) {
        Some((_, Err(error))) => Err(error),
        Some((entry, Ok(name))) if name != "mean" => Err(entry.wrong("groups are aggregated by `mean` only")),
        _ => item.read_beside(&["aggregation"]),
    }
}
