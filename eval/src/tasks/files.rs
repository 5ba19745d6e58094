//! Files of tasks, wherever they are: in a folder, or built into this crate.

use std::{
    borrow::Cow,
    path::{Component, Path, PathBuf},
};

use super::Error;
use recoup_ground::digest::{sha256, sha256_of};
use recoup_ground::records::{self, RecordsError};

include!(concat!(env!("OUT_DIR"), "/tasks.rs"));

/// What stands at the head of the paths of built-in files.
pub const BUILT_IN: &str = "<built-in>";

/// Folders that hold no tasks, as lm-evaluation-harness has it.
const IGNORED: [&str; 2] = ["__pycache__", ".ipynb_checkpoints"];

/// Reads a file, unpacked where it is compressed.
pub fn read(path: &Path) -> Result<Cow<'static, [u8]>, Error> {
    match built_in(path) {
        Some(bytes) => bytes.map(Cow::Borrowed).ok_or_else(|| unread(path, std::io::ErrorKind::NotFound.into())),
        None => Ok(Cow::Owned(records::bytes(path)?)),
    }
}

/// SHA-256 of a file as it lies there, in hexadecimal.
pub fn digest(path: &Path) -> Result<String, Error> {
    if built_in(path).is_some() {
        return Ok(sha256(read(path)?));
    }
    std::fs::File::open(path).and_then(sha256_of).map_err(|source| unread(path, source))
}

fn unread(path: &Path, source: std::io::Error) -> Error {
    RecordsError::Read { path: path.into(), source }.into()
}

/// Reads a file of UTF-8, without its byte order mark.
pub fn read_text(path: &Path) -> Result<String, Error> {
    Ok(records::decode(&path.display().to_string(), read(path)?.into_owned())?)
}

/// Whether there is a file.
pub fn exists(path: &Path) -> bool {
    match built_in(path) {
        Some(bytes) => bytes.is_some(),
        None => path.is_file(),
    }
}

/// Files below `root` whose name ends in `.yaml`, sorted.
pub fn yaml_files(root: &Path) -> Result<Vec<PathBuf>, Error> {
    let mut found = Vec::new();
    if built_in(root).is_some() {
        let names = FILES.iter().map(|(name, _)| name).filter(|name| name.ends_with(".yaml"));
        return Ok(names.map(|name| root.join(name)).collect());
    }
    let mut folders = vec![root.to_path_buf()];
    // Links may lead round in circles.
    let mut seen = std::collections::BTreeSet::new();
    while let Some(folder) = folders.pop() {
        let entries = match std::fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(source) if folder == root => return Err(unread(root, source)),
            // A folder below that may not be read holds nothing that could be asked for.
            Err(_) => continue,
        };
        if !seen.insert(std::fs::canonicalize(&folder).unwrap_or_else(|_| folder.clone())) {
            continue;
        }
        for path in entries.flatten().map(|e| e.path()) {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if path.is_dir() {
                if !IGNORED.contains(&&*name) {
                    folders.push(path);
                }
            } else if path.extension().is_some_and(|e| e == "yaml") {
                found.push(path);
            }
        }
    }
    found.sort();
    Ok(found)
}

/// The path without `a/..`, so that a file has one name.
pub fn lexical(path: &Path) -> PathBuf {
    let mut out = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir if out.file_name().is_some() => drop(out.pop()),
            Component::CurDir => {}
            part => out.push(part),
        }
    }
    out
}

/// Of a path of built-in files: the file's content, if there is one.
fn built_in(path: &Path) -> Option<Option<&'static [u8]>> {
    let path = lexical(path);
    let parts: Option<Vec<&str>> = path.strip_prefix(BUILT_IN).ok()?.iter().map(|part| part.to_str()).collect();
    let name = parts?.join("/");
    Some(FILES.binary_search_by_key(&name.as_str(), |(n, _)| n).ok().map(|at| FILES[at].1))
}
