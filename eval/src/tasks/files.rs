//! Files of tasks, wherever they are: in a folder, or built into this crate.

use std::{
    borrow::Cow,
    path::{Component, Path, PathBuf},
};

use super::Error;
use crate::records;

include!(concat!(env!("OUT_DIR"), "/tasks.rs"));

/// What stands at the head of the paths of built-in files.
pub const BUILT_IN: &str = "<built-in>";

/// Folders that hold no tasks, as lm-evaluation-harness has it.
const IGNORED: [&str; 2] = ["__pycache__", ".ipynb_checkpoints"];

/// Reads a file, unpacked where it is compressed.
///
/// # Errors
/// When it cannot be read, or is not there.
pub fn read(path: &Path) -> Result<Cow<'static, [u8]>, Error> {
    match built_in(path) {
        Some(name) => match FILES.binary_search_by_key(&name.as_str(), |(n, _)| n) {
            Ok(at) => Ok(Cow::Borrowed(FILES[at].1)),
            Err(_) => Err(Error::Read { path: path.into(), source: std::io::ErrorKind::NotFound.into() }),
        },
        None => Ok(Cow::Owned(records::bytes(path)?)),
    }
}

/// SHA-256 of a file as it lies there, in hexadecimal.
///
/// # Errors
/// When it cannot be read.
pub fn digest(path: &Path) -> Result<String, Error> {
    use sha2::Digest as _;
    use std::io::BufRead as _;
    let fail = |source| Error::Read { path: path.into(), source };
    let mut hash = sha2::Sha256::new();
    if built_in(path).is_some() {
        hash.update(read(path)?);
    } else {
        let mut file = std::io::BufReader::with_capacity(1 << 20, std::fs::File::open(path).map_err(fail)?);
        loop {
            let bytes = file.fill_buf().map_err(fail)?;
            if bytes.is_empty() {
                break;
            }
            hash.update(bytes);
            let read = bytes.len();
            file.consume(read);
        }
    }
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Reads a file of UTF-8, without its byte order mark.
///
/// # Errors
/// When it cannot be read, or is not UTF-8.
pub fn read_text(path: &Path) -> Result<String, Error> {
    Ok(records::decode(&path.display().to_string(), read(path)?.into_owned())?)
}

/// Whether there is a file.
#[must_use]
pub fn exists(path: &Path) -> bool {
    match built_in(path) {
        Some(name) => FILES.binary_search_by_key(&name.as_str(), |(n, _)| n).is_ok(),
        None => path.is_file(),
    }
}

/// Files below `root` whose name ends in `.yaml`, sorted.
///
/// # Errors
/// When a folder cannot be listed.
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
            Err(source) if folder == root => return Err(Error::Read { path: folder, source }),
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

/// The name of a built-in file below `eval/tasks`, without `.` and `..`.
fn built_in(path: &Path) -> Option<String> {
    let mut rest = path.components();
    if rest.next()?.as_os_str() != BUILT_IN {
        return None;
    }
    let mut parts: Vec<&str> = Vec::new();
    for part in rest {
        match part {
            Component::ParentDir => drop(parts.pop()),
            Component::Normal(name) => parts.push(name.to_str()?),
            _ => {}
        }
    }
    Some(parts.join("/"))
}
