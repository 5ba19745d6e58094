//! A lock that lives as long as its process: a file that says who holds it, locked by the operating system.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Read as _, Write as _};
use std::path::{Path, PathBuf};

use super::{OutputError, Result, fault, refused};

/// Its name in the hidden folder.
pub(super) const FILE: &str = "lock";

#[derive(Debug)]
pub(super) struct Lock {
    path: PathBuf,
    /// Open, so that it stays locked.
    _file: File,
}

impl Lock {
    /// Makes the folder `hidden` and locks it for the output `target`.
    ///
    /// # Errors
    /// When the folder cannot be made, or another process holds the lock.
    pub(super) fn take(hidden: &Path, target: &Path) -> Result<Self> {
        let path = hidden.join(FILE);
        // Whoever held it may take file and folder away while we come.
        for _ in 0..100 {
            match fs::create_dir(hidden) {
                Err(e) if e.kind() == ErrorKind::AlreadyExists && hidden.is_dir() => {}
                Err(e) => {
                    let detail = format!("cannot be written: {}: {e}; choose another output", hidden.display());
                    return refused(target, &detail);
                }
                Ok(()) => {}
            }
            let opened = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
            let mut file = match opened {
                Err(e) if e.kind() == ErrorKind::NotFound => continue,
                opened => opened.map_err(fault(&path, "open"))?,
            };
            match file.try_lock() {
                Ok(()) if !is_at(&file, &path) => continue,
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    return Err(OutputError::InUse { path: target.into(), owner: owner(&mut file) });
                }
                // A file system without locks cannot tell a dead owner from one that lives.
                Err(TryLockError::Error(_)) if owner(&mut file) != NOBODY => {
                    return refused(hidden, "is of a run that writes there or was killed; if none does, remove it");
                }
                Err(TryLockError::Error(_)) => {}
            }
            let command: Vec<String> = std::env::args_os().map(|a| a.to_string_lossy().into_owned()).collect();
            let text = format!("process {}, {}\n", std::process::id(), command.join(" "));
            file.set_len(0).and_then(|()| file.write_all(text.as_bytes())).map_err(fault(&path, "write"))?;
            return Ok(Self { path, _file: file });
        }
        refused(hidden, "comes and goes; another run begins and ends there")
    }

    pub(super) fn remove(&self) {
        let _ = fs::remove_file(&self.path);
    }
}

const NOBODY: &str = "a process that does not say which";

/// Who wrote the lock file.
fn owner(file: &mut File) -> String {
    let mut text = String::new();
    let _ = file.read_to_string(&mut text);
    match text.trim() {
        "" => NOBODY.into(),
        text => text.into(),
    }
}

/// Whether the open file is still the one of that name.
#[cfg(unix)]
fn is_at(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    let place = |m: std::io::Result<fs::Metadata>| m.ok().map(|m| (m.dev(), m.ino()));
    place(file.metadata()) == place(fs::metadata(path))
}

/// An open file cannot be removed there.
#[cfg(not(unix))]
fn is_at(_: &File, _: &Path) -> bool {
    true
}
