//! Texts to measure on: shipped ones and files, by names that tell them apart.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use recoup_ground::records;
use serde_json::{Map, Value};

use super::super::options::with_arguments;
use super::listed;
use crate::corpus::{Opened, text_of};
use crate::text::ChatTemplate;

/// Texts that ship with the project.
const BUILT_IN_TEXTS: [&str; 2] = ["wikitext", "books"];

/// Texts by name, and what there is to say of them.
#[derive(Default)]
pub(super) struct Texts {
    pub named: Vec<(String, String)>,
    pub notes: Vec<String>,
}

/// The texts that `arguments` mean; conversations are written by the chat template in `folder`, given
/// the arguments `template`.
pub(super) fn texts(arguments: &[OsString], folder: &Path, template: &Map<String, Value>) -> Result<Texts> {
    let arguments: Vec<&Path> = listed(arguments);
    if arguments.contains(&Path::new("none")) {
        if let Some(other) = arguments.iter().find(|n| **n != Path::new("none")) {
            bail!("--text none beside {}: `none` stands alone; a file of that name is ./none", other.display());
        }
        return Ok(Texts::default());
    }
    let mut notes = Vec::new();
    let shipped = |name: &Path| BUILT_IN_TEXTS.into_iter().find(|text| Path::new(text) == name);
    for (i, name) in arguments.iter().enumerate().filter_map(|(i, n)| Some((i, shipped(n)?))) {
        if arguments[..i].contains(&Path::new(name)) {
            bail!("--text {name}: given twice");
        }
        if Path::new(name).is_file() {
            notes.push(format!("--text {name} is the shipped text; the file of this name is ./{name}"));
        }
    }
    let files: Vec<PathBuf> = arguments.iter().filter(|n| shipped(n).is_none()).map(PathBuf::from).collect();
    records::same_file_twice(&files)?;
    // The shipped texts' names mean them everywhere, also where they are not measured on.
    let mut names = records::distinct_names(&files, &BUILT_IN_TEXTS).into_iter();
    let mut out = Vec::new();
    for argument in arguments {
        if let Some(name) = shipped(argument) {
            out.push((name.to_owned(), recoup_eval::tasks::built_in_text(name)?));
            continue;
        }
        let name = names.next().unwrap_or_else(|| argument.display().to_string());
        let opened = Opened::read(argument).with_context(|| {
            format!("--text {} is no shipped text ({})", argument.display(), BUILT_IN_TEXTS.join(", "))
        })?;
        let own = if opened.records.is_empty() {
            None
        } else {
            with_arguments(ChatTemplate::from_folder(folder)?, template.clone(), folder)?
        };
        let (text, counts) = text_of(&opened, own.as_ref())?;
        notes.extend(counts.notes(&name, 0).iter().map(|n| n.trim_start_matches("note: ").to_owned()));
        if counts.conversations > 0 {
            notes.push(format!(
                "{name}: {} conversations, as the chat template of the baseline writes them",
                counts.conversations
            ));
        }
        out.push((name, text));
    }
    Ok(Texts { named: out, notes })
}
