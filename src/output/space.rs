//! Room on a disk.

use std::path::Path;

/// Bytes that this user can still write to the file system of `path`, where it says so.
#[cfg(unix)]
pub(super) fn free(path: &Path) -> Option<u64> {
    let found = rustix::fs::statvfs(path).ok()?;
    // Some network file systems count nothing.
    (found.f_blocks > 0).then(|| found.f_bavail.saturating_mul(found.f_frsize))
}

/// Not asked there.
#[cfg(not(unix))]
pub(super) fn free(_: &Path) -> Option<u64> {
    None
}

/// Whether another file system begins at the folder.
#[cfg(unix)]
pub(super) fn is_mount(folder: &Path) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    let device = |path: &Path| std::fs::metadata(path).map(|m| m.dev()).ok();
    folder.parent().is_none_or(|parent| device(parent) != device(folder))
}

/// Drives have letters there.
#[cfg(not(unix))]
pub(super) fn is_mount(folder: &Path) -> bool {
    folder.parent().is_none()
}

/// Bytes for people: 1.5 MiB.
#[must_use]
pub fn human_bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit < UNITS.len() - 1 {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}
