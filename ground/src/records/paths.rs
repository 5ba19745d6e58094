//! Which files an argument means, and short names that tell several of them apart.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use super::{COMPRESSED, Format, RecordsError, STDIN};

/// What an argument means.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Files {
    /// In the order of their paths.
    pub files: Vec<PathBuf>,
    /// Files of a folder whose names tell no format, which are not read.
    pub others: Vec<PathBuf>,
}

/// The files that an argument means: itself, the files of data below a folder, or those that a pattern (`*`, `?`, `[…]`,
/// `**`) fits.
///
/// # Errors
/// A folder or a pattern without such a file, or a folder that cannot be listed.
pub fn expand(argument: &Path) -> Result<Files, RecordsError> {
    if argument.is_dir() {
        let mut found = Files::default();
        below(argument, &mut found)?;
        found.files.sort();
        found.others.sort();
        let others = found.others.len();
        let among = if others == 0 { String::new() } else { format!(" among {others} others") };
        return found.or_none(&argument.display().to_string(), among);
    }
    let pattern = argument.to_str().filter(|t| t.contains(['*', '?', '[']) && !argument.exists());
    let Some(pattern) = pattern else { return Ok(Files { files: vec![argument.into()], others: Vec::new() }) };
    let shell = glob::MatchOptions { require_literal_leading_dot: true, ..glob::MatchOptions::new() };
    let paths = glob::glob_with(pattern, shell)
        .map_err(|e| RecordsError::Pattern { pattern: pattern.into(), message: e.to_string() })?;
    let mut found = Files::default();
    for path in paths {
        let path = path.map_err(|e| RecordsError::Read { path: e.path().into(), source: e.into() })?;
        found.files.extend(Some(path).filter(|p| p.is_file()));
    }
    found.or_none(pattern, String::new())
}

impl Files {
    fn or_none(self, pattern: &str, found: String) -> Result<Self, RecordsError> {
        if self.files.is_empty() { Err(RecordsError::NoFiles { pattern: pattern.into(), found }) } else { Ok(self) }
    }
}

fn below(folder: &Path, found: &mut Files) -> Result<(), RecordsError> {
    let fail = |source| RecordsError::Read { path: folder.into(), source };
    for entry in std::fs::read_dir(folder).map_err(fail)? {
        let path = entry.map_err(fail)?.path();
        let name = last(&path);
        if name.starts_with('.') {
            continue;
        }
        if path.is_dir() {
            below(&path, found)?;
        } else if Format::of(&path).is_some() && !DESCRIPTIONS.contains(&name.as_str()) {
            found.files.push(path);
        } else {
            found.others.push(path);
        }
    }
    Ok(())
}

/// Files beside a data set that describe it.
const DESCRIPTIONS: [&str; 4] = ["dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"];

/// A name for each path, none twice even where case, or what is no letter or digit, does not count: the name alone, with
/// its ending, or with as many of the folders before it as are needed. `taken` are names that are others' already.
#[must_use]
pub fn distinct_names(paths: &[PathBuf], taken: &[&str]) -> Vec<String> {
    tell_apart(&paths.iter().map(|p| forms(p, without_endings(p))).collect::<Vec<_>>(), taken)
}

/// As [`distinct_names`], with the ending always.
#[must_use]
pub fn distinct_file_names(paths: &[PathBuf], taken: &[&str]) -> Vec<String> {
    tell_apart(&paths.iter().map(|p| forms(p, last(p))).collect::<Vec<_>>(), taken)
}

fn last(path: &Path) -> String {
    path.file_name().map_or_else(|| path.display().to_string(), |n| n.to_string_lossy().into_owned())
}

/// The name of a file without the endings that tell its format: `a.jsonl.gz` is `a`.
fn without_endings(path: &Path) -> String {
    let name = last(path);
    let lower = name.to_ascii_lowercase();
    let packed = COMPRESSED.iter().find_map(|e| lower.strip_suffix(&format!(".{e}"))).map_or(name.len(), str::len);
    let stem = Path::new(&name[..packed]).file_stem().map(|s| s.to_string_lossy().into_owned());
    stem.filter(|s| !s.is_empty()).unwrap_or(name)
}

/// Names of a path from `first` on, each longer.
fn forms(path: &Path, first: String) -> Vec<String> {
    if path == Path::new(STDIN) {
        return vec!["stdin".into()];
    }
    let mut forms = vec![first, last(path)];
    let parts: Vec<String> = path.components().map(|c| c.as_os_str().to_string_lossy().into_owned()).collect();
    for from in (0..parts.len().saturating_sub(1)).rev() {
        forms.push(parts[from..].join("/").replace("//", "/"));
    }
    forms.dedup();
    forms
}

/// The first of the `forms` of each that no other has; numbered where there is none.
fn tell_apart(forms: &[Vec<String>], taken: &[&str]) -> Vec<String> {
    let mut taken: HashSet<String> = taken.iter().map(|t| plain(t)).collect();
    let mut level = vec![0; forms.len()];
    loop {
        let names: Vec<&String> = forms.iter().zip(&level).map(|(forms, level)| &forms[*level]).collect();
        let keys: Vec<String> = names.iter().map(|name| plain(name)).collect();
        let clash = |i: usize| taken.contains(&keys[i]) || keys.iter().filter(|k| **k == keys[i]).count() > 1;
        let longer: Vec<usize> = (0..forms.len()).filter(|i| clash(*i) && level[*i] + 1 < forms[*i].len()).collect();
        if longer.is_empty() {
            let numbered = |name: &String| {
                let mut all = std::iter::once(name.clone()).chain((2..).map(|n| format!("{name} ({n})")));
                // There is always one more.
                all.find(|n| taken.insert(plain(n))).unwrap_or_default()
            };
            return names.into_iter().map(numbered).collect();
        }
        longer.into_iter().for_each(|i| level[i] += 1);
    }
}

/// What is left of a name in the name of a file that ignores case.
fn plain(name: &str) -> String {
    name.chars().flat_map(char::to_lowercase).map(|c| if c.is_alphanumeric() { c } else { '_' }).collect()
}

/// Refuses a file that is given twice, also by way of a link.
///
/// # Errors
/// When two of `paths` are the same.
pub fn same_file_twice(paths: &[PathBuf]) -> Result<(), RecordsError> {
    let real = |p: &PathBuf| std::fs::canonicalize(p).unwrap_or_else(|_| p.clone());
    let mut seen: HashMap<PathBuf, &PathBuf> = HashMap::new();
    for second in paths {
        if let Some(first) = seen.insert(real(second), second) {
            let shown = |p: &PathBuf| p.display().to_string();
            return Err(RecordsError::Twice { first: shown(first), second: shown(second) });
        }
    }
    Ok(())
}
