//! Verbs that are made of other verbs: each step is a command of its own, and done once.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Result, anyhow, bail};
use clap::Parser as _;
use recoup_ground::digest::sha256;
use recoup_ground::kept::kept;
use recoup_ground::names::file_name;
use serde_json::{Value, json};

use super::options::identity;
use super::{Cli, Verb, interrupt};
use crate::checkpoint::Checkpoint;

/// A command that makes a model.
pub(super) struct Step {
    /// What the model is called.
    pub label: String,
    /// The verb and its arguments, without where the result goes. A model made by others, or of files that are others by now, is
    /// another model.
    pub arguments: Vec<OsString>,
    /// Arguments that change nothing in the model.
    pub beside: Vec<OsString>,
    /// Whether the plain model that it is rounded from is kept as well ([`unrounded`]).
    pub keeps_unrounded: bool,
}

/// A model to be measured, and what making it took.
pub(super) struct Made {
    pub label: String,
    pub folder: PathBuf,
    pub minutes: Option<f64>,
}

/// Where the plain model lies that `made` was rounded from.
pub(super) fn unrounded(made: &Path) -> PathBuf {
    beside(made, "-unrounded")
}

fn beside(folder: &Path, ending: &str) -> PathBuf {
    let mut name = folder.as_os_str().to_owned();
    name.push(ending);
    name.into()
}

impl Step {
    /// What the model is made of; another beginning is another model.
    fn key(&self) -> Result<Value> {
        let mut key =
            json!({"version": env!("CARGO_PKG_VERSION"), "arguments": self.words(), "of": read(&self.arguments)?});
        if self.keeps_unrounded {
            key["unrounded"] = true.into();
        }
        Ok(key)
    }

    fn words(&self) -> Vec<String> {
        self.arguments.iter().map(|a| a.to_string_lossy().into_owned()).collect()
    }

    /// Where the model lies below `output`, or will. Another beginning of the same name is left as it is.
    pub(super) fn folder(&self, output: &Path) -> Result<PathBuf> {
        let key = self.key()?.to_string();
        Ok(output.join(format!("{}-{}", file_name(&self.label), &sha256(key)[..8])))
    }

    /// Whether the model is there.
    pub(super) fn is_made(&self, output: &Path) -> Result<bool> {
        Ok(self.folder(output)?.join("config.json").exists())
    }

    /// Makes the model below `output`, where that is not done already.
    pub(super) fn made(&self, output: &Path) -> Result<Made> {
        let folder = self.folder(output)?;
        let record = beside(&folder, ".json");
        if record.exists() && !self.is_made(output)? {
            // What it tells of is gone.
            std::fs::remove_file(&record)?;
        }
        let minutes = kept(&record, &self.key()?, || {
            super::say!("{}: recoup {}", self.label, self.words().join(" "));
            let began = Instant::now();
            if !self.is_made(output)? {
                let mut command = recoup()?;
                command.args(&self.arguments).args(&self.beside).arg("-o").arg(&folder).stdout(Stdio::null());
                if self.keeps_unrounded {
                    let unrounded = unrounded(&folder);
                    if unrounded.exists() {
                        // Written first, by a run that was killed before the model was.
                        std::fs::remove_dir_all(&unrounded)?;
                    }
                    command.arg("--keep-unrounded").arg(unrounded);
                }
                finish(&mut command, &self.label)?;
            }
            anyhow::Ok(began.elapsed().as_secs_f64() / 60.0)
        })?;
        Ok(Made { label: self.label.clone(), folder, minutes: Some(minutes) })
    }
}

/// What tells the files and models apart that arguments name.
fn read(arguments: &[OsString]) -> Result<BTreeMap<String, Value>> {
    let mut found = BTreeMap::new();
    for argument in arguments {
        // A weight of a source stands behind its name.
        let path = match argument.to_str().and_then(|a| a.rsplit_once('=')) {
            Some((name, _)) if !Path::new(argument).exists() => Path::new(name),
            _ => Path::new(argument),
        };
        let name = path.to_string_lossy().into_owned();
        if path.join("config.json").exists() {
            found.insert(name, identity(&Checkpoint::open(path)?)?);
        } else if path.is_file() {
            found.insert(name, Value::from(sha256(std::fs::read(path)?)));
        }
    }
    Ok(found)
}

/// This program, for another verb.
pub(super) fn recoup() -> Result<Command> {
    Ok(Command::new(std::env::current_exe()?))
}

/// What a verb's arguments mean, but for where its result goes: what is wrong with them is found before anything is begun.
pub(super) fn parsed(arguments: &[OsString]) -> Result<Verb> {
    let line = words(&[&"recoup"]).into_iter().chain(arguments.iter().cloned());
    let cli = Cli::try_parse_from(line.chain(words(&[&"-o", &"out"])));
    // The message goes on about the other verb's usage.
    let first =
        |e: clap::Error| e.to_string().trim_start_matches("error: ").lines().next().unwrap_or_default().to_owned();
    Ok(cli.map_err(|e| anyhow!(first(e)))?.verb)
}

/// Runs a command to its end.
pub(super) fn finish(command: &mut Command, what: &str) -> Result<()> {
    let status = interrupt::wait_for(command)?;
    if !status.success() {
        bail!("{what}: ended with {status}; what is done is kept, and the same command goes on from there");
    }
    Ok(())
}

/// Arguments as one would type them.
pub(super) fn words(arguments: &[&dyn AsRef<OsStr>]) -> Vec<OsString> {
    arguments.iter().map(|a| a.as_ref().to_owned()).collect()
}
