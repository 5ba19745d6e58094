//! Where things are remembered between runs.

use std::path::PathBuf;

/// The user's cache folder: `RECOUP_CACHE`, or as the platform has it. It need not exist.
#[must_use]
pub fn cache_folder() -> Option<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    set("RECOUP_CACHE")
        .or_else(|| set("XDG_CACHE_HOME").filter(|p| p.is_absolute()).map(|p| p.join("recoup")))
        .or_else(|| set("HOME").map(|p| p.join(".cache").join("recoup")))
}
