//! An experiment in parts: where it comes from, and what its parts say of themselves.

use std::path::{Path, PathBuf};

use recoup_ground::atomic::{NotWritten, write_atomically};
use recoup_ground::names::file_name;
use recoup_ground::shares::{self, Shard, SharesError};
use serde_json::{Value, json};

/// Where what an experiment says comes from.
#[derive(Clone, Copy, Debug)]
pub enum Source<'a> {
    /// It is computed: all, or a share.
    Computed(Shard),
    /// From the folders of all shares; nothing is computed.
    Parts(&'a [PathBuf]),
}

/// What a part says of itself.
const PART: &str = "part.json";

/// Writes down which part of an experiment `folder` is to hold, and what computes it.
///
/// # Errors
/// When it cannot be written.
pub fn describe(folder: &Path, shard: Shard, machine: &str) -> Result<(), NotWritten> {
    let text = json!({"shard": shard.to_string(), "machine": machine}).to_string() + "\n";
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

/// What computed the parts' answers of the model that they call `label`:
/// [`Subject::identity`](crate::evaluate::evaluation::Subject::identity)'s `computation`.
///
/// # Errors
/// When no part has the model.
pub fn computation(folders: &[PathBuf], label: &str) -> Result<Value, SharesError> {
    let file = Path::new(&file_name(label)).join(super::MEMORY);
    Ok(shares::key(folders, &file)?["model"]["computation"].take())
}

/// What the parts' speeds of a model depend on beside it; nothing where none was measured.
#[must_use]
pub fn speed(folders: &[PathBuf], label: &str) -> Option<Value> {
    let file = Path::new(&file_name(label)).join(super::SPEED);
    Some(shares::key(folders, &file).ok()?["on"].take())
}
