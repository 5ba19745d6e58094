//! A folder that appears complete or not at all: written beside its final place, synced, renamed.

use std::fs::{self, File};
use std::io::{ErrorKind, Write as _};
use std::path::{Path, PathBuf};

use serde_json::Value as Json;

use super::error::{GgufError, Result};

/// The folder being written; dropping it before [`Staging::commit`] removes it.
pub(super) struct Staging {
    folder: PathBuf,
    target: PathBuf,
    parent: PathBuf,
    committed: bool,
}

impl Staging {
    /// Creates `.<name>.partial-<pid>` beside `target`, which must not exist or be an empty folder.
    ///
    /// # Errors
    /// When something is in the way, or the folder cannot be created.
    pub fn create(target: &Path) -> Result<Self> {
        let output = |detail: &str| GgufError::Output { path: target.into(), detail: detail.into() };
        let name = target.file_name().ok_or_else(|| output("is no folder name; name the folder to create"))?;
        match fs::symlink_metadata(target) {
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            Err(e) => return Err(GgufError::io(target, "look at the output folder", e)),
            Ok(meta) if !meta.is_dir() => return Err(output("exists and is no folder; choose another output folder")),
            Ok(_) => {
                let mut entries = fs::read_dir(target).map_err(|e| GgufError::io(target, "list", e))?;
                if entries.next().is_some() {
                    return Err(output("exists and is not empty; remove it or choose another output folder"));
                }
            }
        }
        let parent = match target.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
            _ => PathBuf::from("."),
        };
        fs::create_dir_all(&parent).map_err(|e| GgufError::io(&parent, "create the folder", e))?;
        let mut partial = std::ffi::OsString::from(".");
        partial.push(name);
        partial.push(format!(".partial-{}", std::process::id()));
        let folder = parent.join(partial);
        match fs::create_dir(&folder) {
            Ok(()) => Ok(Self { folder, target: target.into(), parent, committed: false }),
            Err(e) if e.kind() == ErrorKind::AlreadyExists => Err(GgufError::Output {
                path: folder,
                detail: "is in the way: another import is writing it, or one was killed; remove it and try again"
                    .into(),
            }),
            Err(e) => Err(GgufError::io(&folder, "create the folder", e)),
        }
    }

    /// The path of a file to write.
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Makes everything durable and gives the folder its final name. Files must have been synced by their writers.
    ///
    /// # Errors
    /// When syncing or renaming fails, for example because the target has appeared meanwhile.
    pub fn commit(mut self) -> Result<()> {
        sync_folder(&self.folder)?;
        // POSIX replaces an empty folder in the rename; Windows does not.
        if cfg!(windows) && self.target.is_dir() {
            fs::remove_dir(&self.target).map_err(|e| GgufError::io(&self.target, "replace the empty folder", e))?;
        }
        fs::rename(&self.folder, &self.target)
            .map_err(|e| GgufError::io(&self.target, "rename the finished folder to this name", e))?;
        self.committed = true;
        sync_folder(&self.parent)
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if !self.committed {
            // Best effort: the error that brought us here is the one to report.
            let _ = fs::remove_dir_all(&self.folder);
        }
    }
}

/// Writes and syncs one JSON file.
pub(super) fn write_json(path: &Path, value: &Json, pretty: bool) -> Result<()> {
    let mut text = if pretty { format!("{value:#}") } else { value.to_string() };
    text.push('\n');
    let written = File::create_new(path).and_then(|mut file| {
        file.write_all(text.as_bytes())?;
        file.sync_all()
    });
    written.map_err(|e| GgufError::io(path, "write", e))
}

fn sync_folder(folder: &Path) -> Result<()> {
    // Only POSIX can open a folder to sync it.
    if cfg!(unix) {
        File::open(folder).and_then(|f| f.sync_all()).map_err(|e| GgufError::io(folder, "sync", e))?;
    }
    Ok(())
}
