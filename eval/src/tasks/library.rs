//! All tasks that can be named: built in, and in the folders given.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use serde_json::Value;

use super::{
    Error,
    aggregate::{Group, GroupMetric},
    config::Config,
    error::nearest,
    files,
    keys::{Entry, Keys},
    task::Task,
    yaml::Kind,
};

/// Tasks, groups and tags by name.
#[derive(Debug)]
pub struct Library {
    definitions: BTreeMap<String, Definition>,
    tags: BTreeMap<String, BTreeSet<String>>,
    data_dir: Option<PathBuf>,
}

/// What was asked for: tasks in the order of their first mention, groups after the groups in them.
#[derive(Debug, Default)]
pub struct Selection {
    pub tasks: Vec<Task>,
    pub groups: Vec<Group>,
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
}

const GROUP_KEYS: &[&str] = &["group", "group_alias", "task", "aggregate_metric_list", "tag", "include", "metadata"];

impl Library {
    /// The built-in tasks and those of `folders`; a later folder's name wins over an earlier one's and a built-in one.
    /// `data_dir`: a folder whose data files are taken instead of those of the same name.
    ///
    /// # Errors
    /// When a file is no YAML, or one folder has a name twice.
    pub fn new(folders: &[PathBuf], data_dir: Option<PathBuf>) -> Result<Self, Error> {
        let mut library = Self { definitions: BTreeMap::new(), tags: BTreeMap::new(), data_dir };
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
    pub fn select(&mut self, names: &[impl AsRef<str>]) -> Result<Selection, Error> {
        let mut wanted = Wanted::default();
        for name in names.iter().map(AsRef::as_ref) {
            let path = Path::new(name);
            if path.extension().is_some_and(|e| e == "yaml" || e == "yml") && path.is_file() {
                let folder = path.parent().unwrap_or(Path::new("")).to_path_buf();
                let (name, definition) = define(path, &folder)?;
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
        Ok(Selection { tasks: wanted.tasks.iter().map(load).collect::<Result<_, _>>()?, groups: wanted.groups })
    }

    fn add_folder(&mut self, root: &Path) -> Result<(), Error> {
        let mut own: BTreeMap<String, String> = BTreeMap::new();
        for path in files::yaml_files(root)? {
            let (name, definition) = define(&path, root)?;
            let file = definition.keys.file.clone();
            if let Some(first) = own.insert(name.clone(), file.clone()) {
                return Err(Error::Duplicate { name, first, second: file });
            }
            self.insert(name, definition)?;
        }
        Ok(())
    }

    fn insert(&mut self, name: String, definition: Definition) -> Result<(), Error> {
        if !definition.is_group {
            for tag in definition.keys.texts("tag")?.unwrap_or_default() {
                self.tags.entry(tag).or_default().insert(name.clone());
            }
        }
        self.definitions.insert(name, definition);
        Ok(())
    }

    fn unknown(&self, name: &str) -> Error {
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

fn define(path: &Path, root: &Path) -> Result<(String, Definition), Error> {
    let keys = Keys::load(path)?;
    let is_group = keys.has("group") && !keys.has("dataset_path");
    let name = keys.required(if is_group { "group" } else { "task" }, "it is the name to ask for")?;
    let folder = path.parent().unwrap_or(Path::new("")).to_path_buf();
    Ok((name, Definition { keys, folder, root: root.into(), is_group }))
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
