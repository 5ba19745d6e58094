//! Files that are there whole or as they were.

use std::io::Write as _;
use std::path::{Path, PathBuf};

/// A file that could not be written.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {source}{}", if source.kind() == std::io::ErrorKind::StorageFull { "; free some space and start the same command again" } else { "" })]
pub struct NotWritten {
    pub path: PathBuf,
    pub source: std::io::Error,
}

/// Writes under a temporary name in the same folder and renames.
///
/// # Errors
/// When it cannot be written; a file of that name is as it was then.
pub fn write_atomically(path: &Path, contents: &[u8]) -> Result<(), NotWritten> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let write = || {
        let mut builder = tempfile::Builder::new();
        // The name says whose it is, so that it can be removed where a kill left it.
        builder.prefix(".recoup-").suffix(".tmp");
        // As any other file, by the user's umask.
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        let mut file = builder.tempfile_in(folder)?;
        file.write_all(contents)?;
        file.as_file().sync_all()?;
        file.persist(path).map(drop).map_err(|e| e.error)
    };
    write().map_err(|source| NotWritten { path: path.into(), source })
}
