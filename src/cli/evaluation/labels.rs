//! What the models of a comparison are called.

use std::ffi::OsString;

use anyhow::{Context as _, Result, bail};
use recoup_ground::names::clash;

use super::model_name;

/// The labels given, or else the names of the models' folders. They name rows, columns and folders.
pub(super) fn of(models: &[OsString], given: &[String]) -> Result<Vec<String>> {
    let labels = match given {
        [] => of_folders(models),
        _ if given.len() != models.len() => {
            bail!("--labels names {}, but {} models are given", given.len(), models.len())
        }
        _ => given.iter().map(|l| l.trim().to_owned()).collect(),
    };
    if let Some(at) = labels.iter().position(String::is_empty) {
        bail!("--labels: the label of model {} is empty", at + 1);
    }
    if let Some((one, other)) = clash(&labels.iter().map(String::as_str).collect::<Vec<_>>()) {
        let what = if one == other {
            format!("`{one}` stands for two models")
        } else {
            format!("`{one}` and `{other}` differ by capitals only, which this system's files do not")
        };
        bail!("{what}; give each a label of its own: --labels BF16,PTQ,…");
    }
    Ok(labels)
}

/// Names of folders; where two are equal, the path tells them apart.
fn of_folders(models: &[OsString]) -> Vec<String> {
    let mut labels: Vec<String> = models.iter().map(|m| model_name(m)).collect();
    for i in 0..labels.len() {
        if labels.iter().filter(|l| **l == labels[i]).count() > 1 {
            labels[i] = models[i].to_string_lossy().into_owned();
        }
    }
    labels
}

/// Which model is the PTQ one: the one named, none, or the second of three or more.
pub(super) fn ptq(named: Option<&str>, labels: &[String]) -> Result<Option<usize>> {
    match named {
        Some("none") => Ok(None),
        Some(name) => {
            let index = labels.iter().position(|l| l == name).filter(|i| *i > 0);
            Ok(Some(index.with_context(|| format!("--ptq {name}: expected one of {}", labels[1..].join(", ")))?))
        }
        None => Ok((labels.len() > 2).then_some(1)),
    }
}
