//! An experiment in parts: what each process keeps, and all of it taken as one run's.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use recoup_eval::run::Shard;
use recoup_ground::atomic::{NotWritten, write_atomically};
use recoup_ground::kept::{difference, found};
use recoup_ground::names::file_name;
use recoup_ground::shorten::shorten;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

/// Where what an experiment says comes from.
#[derive(Clone, Copy, Debug)]
pub enum Source<'a> {
    /// It is computed: all, or a share.
    Computed(Shard),
    /// From the folders of all shares; nothing is computed.
    Parts(&'a [PathBuf]),
}

/// Why parts do not make a whole.
#[derive(Debug, thiserror::Error)]
pub enum PartsError {
    #[error("{}: is not there, or damaged: that part is not complete; let it run to its end, and merge again", .0.display())]
    Missing(PathBuf),
    #[error(
        "{}: is of another run: `{key}` is {found} there and {expected} here; merge with the options and the models that the parts \
         were made with",
        path.display()
    )]
    OtherRun { path: PathBuf, key: String, found: String, expected: String },
    #[error("{}: is shard {found}; {of} folders are merged, which are to be the shards 0/{of} to {}/{of}", path.display(), of - 1)]
    Number { path: PathBuf, found: String, of: usize },
    #[error("{} and {} are the same shard, {shard}", path.display(), other.display())]
    Twice { path: PathBuf, other: PathBuf, shard: String },
}

type Result<T> = std::result::Result<T, PartsError>;

/// What a part says of itself.
const PART: &str = "part.json";

/// Writes down which part of an experiment `folder` is to hold, and what computes it.
///
/// # Errors
/// When it cannot be written.
pub fn describe(folder: &Path, shard: Shard, machine: &str) -> std::result::Result<(), NotWritten> {
    let text = json!({"shard": name(shard), "machine": machine}).to_string() + "\n";
    write_atomically(&folder.join(PART), text.as_bytes())
}

/// What computed the parts, each machine once.
#[must_use]
pub fn machines(folders: &[PathBuf]) -> Vec<String> {
    let mut machines: Vec<String> = Vec::new();
    for folder in folders {
        let part: Option<Value> = std::fs::read(folder.join(PART)).ok().and_then(|t| serde_json::from_slice(&t).ok());
        let machine = part.and_then(|part| part["machine"].as_str().map(str::to_owned));
        machines.extend(machine.filter(|m| !machines.contains(m)));
    }
    machines
}

/// What computed the parts' answers of the model that they call `label`: [`Subject::identity`](crate::evaluate::evaluation::Subject::identity)'s
/// `computation`.
///
/// # Errors
/// When no part has the model.
pub fn computation(folders: &[PathBuf], label: &str) -> Result<Value> {
    Ok(key(folders, &Path::new(&file_name(label)).join(super::MEMORY))?["model"]["computation"].take())
}

/// What the parts' speeds of a model depend on beside it; nothing where none was measured.
#[must_use]
pub fn speed(folders: &[PathBuf], label: &str) -> Option<Value> {
    Some(key(folders, &Path::new(&file_name(label)).join(super::SPEED)).ok()?["on"].take())
}

/// The key of what a part keeps in `file`.
fn key(folders: &[PathBuf], file: &Path) -> Result<Value> {
    let known = folders.iter().find_map(|folder| found::<Value>(&folder.join(file)));
    known.map(|(key, _)| key).ok_or_else(|| missing(folders, file))
}

/// The key under which a share keeps what another key's whole is made of.
pub(super) fn of_share(key: &Value, shard: Shard) -> Value {
    let mut key = key.clone();
    key["shard"] = name(shard).into();
    key
}

/// What all parts keep in `file` for `key`, in their order.
pub(super) fn all<T: DeserializeOwned>(folders: &[PathBuf], file: &Path, key: &Value) -> Result<Vec<T>> {
    let of = folders.len();
    let mut parts: BTreeMap<usize, (PathBuf, T)> = BTreeMap::new();
    for folder in folders {
        let path = folder.join(file);
        let Some((mut own, value)) = found::<T>(&path) else { return Err(PartsError::Missing(path)) };
        let shard = own.as_object_mut().and_then(|own| own.shift_remove("shard")).unwrap_or_default();
        let Some(index) = (0..of).find(|index| shard == name(Shard { index: *index, of })) else {
            return Err(PartsError::Number { path, found: shard.to_string(), of });
        };
        same(&path, &own, key)?;
        if let Some((other, _)) = parts.insert(index, (path.clone(), value)) {
            return Err(PartsError::Twice { path, other, shard: name(Shard { index, of }) });
        }
    }
    Ok(parts.into_values().map(|(_, value)| value).collect())
}

/// What one of the parts keeps in `file` for `key`.
pub(super) fn any<T: DeserializeOwned>(folders: &[PathBuf], file: &Path, key: &Value) -> Result<T> {
    for folder in folders {
        let path = folder.join(file);
        if let Some((own, value)) = found::<T>(&path) {
            same(&path, &own, key)?;
            return Ok(value);
        }
    }
    Err(missing(folders, file))
}

fn missing(folders: &[PathBuf], file: &Path) -> PartsError {
    PartsError::Missing(folders.first().map_or_else(|| file.into(), |first| first.join(file)))
}

fn same(path: &Path, found: &Value, expected: &Value) -> Result<()> {
    let Some((key, found, expected)) = difference(found, expected) else { return Ok(()) };
    let [found, expected] = [found, expected].map(|value| shorten(&value.to_string(), 80));
    Err(PartsError::OtherRun { path: path.into(), key, found, expected })
}

fn name(shard: Shard) -> String {
    format!("{}/{}", shard.index, shard.of)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_each_there_once_and_of_one_run() {
        let folder = tempfile::tempdir().unwrap();
        let (key, file) = (json!({"model": {"files": "a"}}), Path::new("kept.json"));
        let make = |name: &str, shard: Shard, key: &Value, value: usize| {
            let part = folder.path().join(name);
            std::fs::create_dir_all(&part).unwrap();
            let text = json!({"of": of_share(key, shard), "value": value}).to_string();
            std::fs::write(part.join(file), text).unwrap();
            part
        };
        let third = |index| Shard { index, of: 3 };
        let parts = [2, 0, 1].map(|index| make(&format!("part {index}"), third(index), &key, 10 * index));
        let get = |folders: &[PathBuf]| all::<usize>(folders, file, &key).map_err(|e| e.to_string());
        assert_eq!(get(&parts), Ok(vec![0, 10, 20]));
        let number = get(&parts[..2]).unwrap_err();
        assert!(number.contains("is shard \"2/3\"; 2 folders are merged"), "{number}");
        let [a, b, _] = parts.clone();
        let twice = get(&[a.clone(), b.clone(), a.clone()]).unwrap_err();
        assert!(twice.contains("are the same shard, 2/3"), "{twice}");
        let other = make("other", third(1), &json!({"model": {"files": "b"}}), 7);
        let other = get(&[a.clone(), b.clone(), other]).unwrap_err();
        assert!(other.contains("`model.files` is \"b\" there and \"a\" here"), "{other}");
        let missing = get(&[a, b, folder.path().into()]).unwrap_err();
        assert!(missing.contains("kept.json: is not there"), "{missing}");
    }
}
