//! Work that several processes share out: which share a process does, what each keeps of it, and all of that together.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::kept::{difference, found};
use crate::shorten::shorten;

/// Every `of`th part of a work from the `index`th on (from 0).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    pub index: usize,
    pub of: usize,
}

impl Shard {
    /// Everything.
    pub const ALL: Self = Self { index: 0, of: 1 };

    /// Whether the part of that number belongs to it.
    #[must_use]
    pub fn has(self, number: usize) -> bool {
        number % self.of == self.index
    }

    /// Its share of `all`.
    pub fn share<T>(self, all: impl IntoIterator<Item = T>) -> Vec<T> {
        all.into_iter().skip(self.index).step_by(self.of).collect()
    }
}

impl fmt::Display for Shard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.index, self.of)
    }
}

/// All of what [`Shard::share`] shared out, from the shares in their order.
#[must_use]
pub fn whole<T>(shares: Vec<Vec<T>>) -> Vec<T> {
    let mut shares: Vec<_> = shares.into_iter().map(Vec::into_iter).collect();
    let mut all = Vec::new();
    loop {
        let before = all.len();
        all.extend(shares.iter_mut().filter_map(Iterator::next));
        if all.len() == before {
            return all;
        }
    }
}

/// Why shares do not make a whole.
#[derive(Debug, thiserror::Error)]
pub enum SharesError {
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
    Twice { path: PathBuf, other: PathBuf, shard: Shard },
}

type Result<T> = std::result::Result<T, SharesError>;

/// The key under which a share [keeps](crate::kept::kept) what another key's whole is made of.
#[must_use]
pub fn of_share(key: &Value, shard: Shard) -> Value {
    let mut key = key.clone();
    key["shard"] = shard.to_string().into();
    key
}

/// What all shares keep in `file`, below their `folders`, for `key`; in their order.
///
/// # Errors
/// When one is missing, there twice, or of something else.
pub fn all<T: DeserializeOwned>(folders: &[PathBuf], file: &Path, key: &Value) -> Result<Vec<T>> {
    let of = folders.len();
    let mut shares: BTreeMap<usize, (PathBuf, T)> = BTreeMap::new();
    for folder in folders {
        let path = folder.join(file);
        let Some((mut own, value)) = found::<T>(&path) else { return Err(SharesError::Missing(path)) };
        let shard = own.as_object_mut().and_then(|own| own.shift_remove("shard")).unwrap_or_default();
        let named = (0..of).map(|index| Shard { index, of }).find(|s| shard == s.to_string());
        let Some(named) = named else { return Err(SharesError::Number { path, found: shard.to_string(), of }) };
        same(&path, &own, key)?;
        if let Some((other, _)) = shares.insert(named.index, (path.clone(), value)) {
            return Err(SharesError::Twice { path, other, shard: named });
        }
    }
    Ok(shares.into_values().map(|(_, value)| value).collect())
}

/// What one of the shares keeps in `file` for `key`, on behalf of all.
///
/// # Errors
/// When none has it, or it is of something else.
pub fn any<T: DeserializeOwned>(folders: &[PathBuf], file: &Path, key: &Value) -> Result<T> {
    for folder in folders {
        let path = folder.join(file);
        if let Some((own, value)) = found::<T>(&path) {
            same(&path, &own, key)?;
            return Ok(value);
        }
    }
    Err(missing(folders, file))
}

/// The key under which a share keeps something in `file`.
///
/// # Errors
/// When none has the file.
pub fn key(folders: &[PathBuf], file: &Path) -> Result<Value> {
    let known = folders.iter().find_map(|folder| found::<Value>(&folder.join(file)));
    known.map(|(key, _)| key).ok_or_else(|| missing(folders, file))
}

fn missing(folders: &[PathBuf], file: &Path) -> SharesError {
    SharesError::Missing(folders.first().map_or_else(|| file.into(), |first| first.join(file)))
}

fn same(path: &Path, found: &Value, expected: &Value) -> Result<()> {
    let Some((key, found, expected)) = difference(found, expected) else { return Ok(()) };
    let [found, expected] = [found, expected].map(|value| shorten(&value.to_string(), 80));
    Err(SharesError::OtherRun { path: path.into(), key, found, expected })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_shared_out_comes_together_again() {
        for of in 1..6 {
            let shares = (0..of).map(|index| Shard { index, of }.share(0..4)).collect::<Vec<Vec<usize>>>();
            assert!(shares.iter().enumerate().all(|(i, s)| s.iter().all(|n| Shard { index: i, of }.has(*n))));
            assert_eq!(whole(shares), [0, 1, 2, 3]);
        }
    }

    #[test]
    fn shares_are_each_there_once_and_of_one_run() {
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
