//! Reports of evaluations, for the page to show: files that lie in one folder.

use std::path::{Path, PathBuf};

use axum::http::header;
use axum::response::{IntoResponse as _, Response};
use serde_json::{Value, json};

use super::error::ApiError;

/// Bytes of a report at most.
const LARGEST: u64 = 64 << 20;

/// Reports listed at most, the newest first.
const MOST: usize = 1000;

struct Report {
    name: String,
    path: PathBuf,
    bytes: u64,
    modified: jiff::Timestamp,
}

/// HTML and JSON files of a folder; no links, nothing hidden, nothing in folders within.
fn all(folder: &Path) -> std::io::Result<Vec<Report>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        let shown = (name.ends_with(".html") || name.ends_with(".json")) && !name.starts_with('.');
        if !shown || !entry.file_type()?.is_file() {
            continue;
        }
        let about = entry.metadata()?;
        let modified = jiff::Timestamp::try_from(about.modified()?).unwrap_or_default();
        found.push(Report { name, path: entry.path(), bytes: about.len(), modified });
    }
    found.sort_by(|a, b| b.modified.cmp(&a.modified).then_with(|| a.name.cmp(&b.name)));
    found.truncate(MOST);
    Ok(found)
}

fn listed(folder: Option<&Path>) -> Result<Vec<Report>, ApiError> {
    let folder = folder.ok_or_else(|| ApiError::not_found("no reports are shown here (--reports FOLDER)"))?;
    all(folder).map_err(|e| ApiError::failed(format!("the folder of reports cannot be read: {e}")))
}

/// The list of reports.
pub fn list(folder: Option<&Path>) -> Result<Value, ApiError> {
    let tell = |r: &Report| json!({"name": r.name, "bytes": r.bytes, "modified": r.modified.to_string()});
    Ok(json!({"reports": listed(folder)?.iter().map(tell).collect::<Vec<_>>()}))
}

/// A report of the list, by its name: no path is made of what a request says.
pub fn one(folder: Option<&Path>, name: &str) -> Result<Response, ApiError> {
    let found = listed(folder)?.into_iter().find(|report| report.name == name);
    let report = found.ok_or_else(|| ApiError::not_found("there is no report of that name"))?;
    if report.bytes > LARGEST {
        return Err(ApiError::bad(format!("the report has more than {} MiB", LARGEST >> 20)));
    }
    let text = std::fs::read(&report.path).map_err(|e| ApiError::failed(format!("the report cannot be read: {e}")))?;
    let kind = if name.ends_with(".html") { "text/html; charset=utf-8" } else { "application/json" };
    // A report is a page by itself: it may run what is in it, and reach nothing, this server included.
    let policy = "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:";
    Ok(([(header::CONTENT_TYPE, kind), (header::CONTENT_SECURITY_POLICY, policy)], text).into_response())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_reports_of_the_folder_are_given_out() {
        let folder = tempfile::tempdir().unwrap();
        let inside = folder.path().join("reports");
        std::fs::create_dir(&inside).unwrap();
        std::fs::write(folder.path().join("secret.json"), "1").unwrap();
        for name in ["a.html", "b.json", ".hidden.json", "notes.txt"] {
            std::fs::write(inside.join(name), "x").unwrap();
        }
        #[cfg(unix)]
        std::os::unix::fs::symlink(folder.path().join("secret.json"), inside.join("link.json")).unwrap();
        let list = list(Some(&inside)).unwrap();
        let mut names: Vec<&str> =
            list["reports"].as_array().unwrap().iter().map(|r| r["name"].as_str().unwrap()).collect();
        names.sort_unstable();
        assert_eq!(names, ["a.html", "b.json"]);
        assert_eq!(one(Some(&inside), "a.html").unwrap().status(), 200);
        for name in ["../secret.json", "link.json", ".hidden.json", "notes.txt", "/etc/passwd", ""] {
            assert_eq!(one(Some(&inside), name).unwrap_err().status(), 404, "{name}");
        }
        assert_eq!(one(None, "a.html").unwrap_err().status(), 404);
    }
}
