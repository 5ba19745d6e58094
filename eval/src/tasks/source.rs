//! Where a task's data files are.

use std::path::{Path, PathBuf};

use super::{
    Error,
    config::{Config, DataSet},
    data::{self, Doc, TextUnit},
    files,
};
use recoup_ground::records::{self, Format};

/// A file that documents were read from.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct DataFile {
    pub split: String,
    pub file: String,
    /// Of the file as it lies there, in hexadecimal.
    pub sha256: String,
}

/// The documents of a split.
#[derive(Debug)]
pub struct Split {
    pub docs: Vec<Doc>,
    pub files: Vec<DataFile>,
    /// Files that are not in the data folder, where there is one, and where they are instead.
    pub notes: Vec<String>,
}

/// Reads the documents of a split that the task's `key` names.
pub fn read_split(config: &Config, key: &str, split: &str, data_dir: Option<&Path>) -> Result<Split, Error> {
    let (paths, format, unit) = match &config.data {
        DataSet::Files { format, unit, splits } => {
            let Some((_, names)) = splits.iter().find(|(name, _)| name == split) else {
                let known: Vec<&str> = splits.iter().map(|(name, _)| name.as_str()).collect();
                let (task, file, known) = (config.keys.name.clone(), config.file.clone(), known.join(", "));
                return Err(Error::NoSplit { task, file, key: key.into(), split: split.into(), known });
            };
            let find = |name: &String| find_file(config, name, data_dir);
            (names.iter().map(find).collect::<Result<Vec<_>, _>>()?.concat(), *format, *unit)
        }
        DataSet::Folder { path, name, .. } => {
            let path = find_in_folder(config, path, name.as_deref(), split, data_dir)?;
            let format = Format::of(&path).unwrap_or(Format::Json);
            (vec![path], format, TextUnit::Line)
        }
    };
    let docs = data::read(&paths, format, unit)?;
    if docs.is_empty() {
        let file = paths.first().map(|p| p.display().to_string()).unwrap_or_default();
        return Err(Error::NoDocuments { task: config.keys.name.clone(), split: split.into(), file });
    }
    let elsewhere = |p: &&PathBuf| data_dir.is_some_and(|folder| !p.starts_with(folder));
    let note = |p: &PathBuf| {
        let folder = data_dir.unwrap_or(Path::new("")).display();
        let name = p.file_name().unwrap_or_default().to_string_lossy();
        format!("{}: {name} is not in the data folder {folder}; taken from {}", config.keys.name, p.display())
    };
    let notes = paths.iter().filter(elsewhere).map(note).collect();
    let file = |p: &PathBuf| {
        let sha256 = files::digest(p)?;
        Ok(DataFile { split: split.into(), file: p.display().to_string(), sha256 })
    };
    let files = paths.iter().map(file).collect::<Result<_, Error>>()?;
    Ok(Split { docs, files, notes })
}

/// The data file of this name, or those that it fits as a pattern: in the folder for data, beside the task's file, or in a folder above up to the root.
fn find_file(config: &Config, name: &str, data_dir: Option<&Path>) -> Result<Vec<PathBuf>, Error> {
    let relative = Path::new(name);
    let mut looked: Vec<PathBuf> = Vec::new();
    if let Some(folder) = data_dir {
        looked.push(folder.join(name));
        looked.extend(relative.file_name().map(|n| folder.join(n)));
        // A sample in the place of the data that was named would be another benchmark.
        if config.root == Path::new(files::BUILT_IN) && !looked.iter().any(|p| files::exists(p)) {
            let advice = "the shipped sample is not taken in its place: put the file there, or evaluate this task without \
                          --data-dir";
            return Err(no_data(config, name, &looked, advice.into()));
        }
    }
    looked.push(config.folder.join(name));
    if relative.is_relative() {
        let above = config.folder.ancestors().skip(1).take_while(|p| p.starts_with(&config.root));
        looked.extend(above.map(|p| p.join(name)));
    }
    match looked.iter().find(|p| files::exists(p)) {
        Some(path) => Ok(vec![path.clone()]),
        None if name.contains(['*', '?', '[']) && looked.iter().any(|p| records::expand(p).is_ok()) => {
            let found = looked.iter().find_map(|p| records::expand(p).ok());
            Ok(found.map(|f| f.files).unwrap_or_default())
        }
        None => {
            let advice = format!("put `{name}` into a folder and name that as the data folder (--data-dir)");
            Err(no_data(config, name, &looked, advice))
        }
    }
}

/// A split's file in a local copy of a data set of the hub.
fn find_in_folder(
    config: &Config,
    path: &str,
    name: Option<&str>,
    split: &str,
    data_dir: Option<&Path>,
) -> Result<PathBuf, Error> {
    let mut looked = Vec::new();
    for base in data_dir.into_iter().chain([config.folder.as_path()]) {
        let folder = base.join(path);
        let folder = name.map_or(folder.clone(), |n| folder.join(n));
        for (ending, _) in records::ENDINGS.iter().filter(|(_, format)| *format != Format::Text) {
            looked.extend(["", ".gz", ".zst"].map(|packed| folder.join(format!("{split}.{ending}{packed}"))));
        }
    }
    match looked.iter().find(|p| files::exists(p)) {
        Some(found) => Ok(found.clone()),
        None => {
            let part = name.map_or(String::new(), |n| format!("{n}/"));
            let wanted = format!("{path}/{part}{split}.jsonl");
            let advice = format!(
                "`dataset_path: {path}` is a data set of the hub, which is not downloaded: save its split as \
                 `{wanted}` (or .json, .csv, .parquet) below the data folder (--data-dir), or set `dataset_path: json` \
                 with `dataset_kwargs.data_files`"
            );
            looked.retain(|p| p.extension().is_none_or(|e| e != "gz" && e != "zst"));
            Err(no_data(config, &wanted, &looked, advice))
        }
    }
}

fn no_data(config: &Config, data: &str, looked: &[PathBuf], advice: String) -> Error {
    let looked: Vec<String> = looked.iter().map(|p| p.display().to_string()).collect();
    let (task, file) = (config.keys.name.clone(), config.file.clone());
    Error::NoData { task, file, data: data.into(), looked: looked.join(", "), advice }
}
