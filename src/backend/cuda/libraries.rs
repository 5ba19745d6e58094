//! Where NVIDIA's libraries are that nothing links: found at run time, when something asks for them.

use std::path::{Path, PathBuf};

/// What the system says of a library.
pub(super) fn said(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}

/// The folder or file that a variable names, if it does.
pub(super) fn named(variable: &str) -> Option<PathBuf> {
    std::env::var_os(variable).filter(|v| !v.is_empty()).map(PathBuf::from)
}

/// Where toolkits put libraries, and Python's packages, `packages` by name below nvidia/.
pub(super) fn usual_folders(packages: &[&str]) -> Vec<PathBuf> {
    let mut folders = Vec::new();
    let toolkits = [named("CUDA_HOME"), named("CUDA_PATH"), Some("/usr/local/cuda".into())];
    for toolkit in toolkits.into_iter().flatten() {
        folders.extend(["lib64", "lib"].map(|l| toolkit.join(l)));
    }
    let environments = [
        named("VIRTUAL_ENV"),
        named("CONDA_PREFIX"),
        named("HOME").map(|home| home.join(".local")),
        Some("/usr/local".into()),
    ];
    for environment in environments.into_iter().flatten() {
        folders.push(environment.join("lib"));
        let is_python = |path: &PathBuf| path.file_name().is_some_and(|n| n.to_string_lossy().starts_with("python3"));
        let mut pythons: Vec<PathBuf> = std::fs::read_dir(environment.join("lib"))
            .into_iter()
            .flatten()
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(is_python)
            .collect();
        pythons.sort();
        for python in pythons.iter().rev() {
            for place in ["site-packages", "dist-packages"] {
                let package = |p: &&str| python.join(place).join("nvidia").join(p).join("lib");
                folders.extend(packages.iter().map(package));
            }
        }
    }
    folders
}

/// A function of a library, by its name; its type is the caller's word.
///
/// # Safety
/// `T` has to be the function's type.
pub(super) unsafe fn function<T: Copy>(
    library: &libloading::Library,
    file: &Path,
    name: &str,
) -> std::result::Result<T, String> {
    // SAFETY: the caller's.
    let found = unsafe { library.get::<T>(format!("{name}\0").as_bytes()) };
    found.map(|f| *f).map_err(|e| format!("{}: {name} is not in it ({})", file.display(), said(&e)))
}
