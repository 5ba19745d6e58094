//! Options of what `recover` trains on and what it watches: files, a shipped text, and what the teacher writes.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use anyhow::Result;
use serde_json::Value;

use super::device::on_cpu;
use super::options::{TemplateOptions, text_to_read, threads};
use super::steps::words;
use crate::checkpoint::Checkpoint;
use crate::corpus::Reader;
use crate::model::Decoder;
use crate::recover::best_known::LENGTH;
use crate::recover::mixture::{Mixture, Prepared, Read};
use crate::recover::teacher_text;
use crate::text::{ModelText, TextError};

#[derive(clap::Args)]
pub(super) struct DataOptions {
    /// What to train on: text, or records (JSON lines or lists, CSV, TSV, Parquet; compressed by gzip or Zstandard) with
    /// `messages`, `conversations`, `prompt` and `completion`, `text` or `input_ids`; a file, a folder, a pattern, or - for
    /// standard input. `teacher` and `teacher-chat` are texts and conversations that the teacher writes itself, `built-in`
    /// is a short shipped text. Several share the sequences equally, or as their weights say
    #[arg(long, value_name = "FILE[=WEIGHT]", required = true)]
    data: Vec<OsString>,
    /// Data to measure the KL on while training, read as --data, best of another kind than the data; the weights that do best on it are
    /// kept [default: a part of the data that is held out, and a short built-in text]
    #[arg(long, value_name = "FILE")]
    watch: Vec<PathBuf>,
    /// Of conversations, learn only what the assistant says
    #[arg(long)]
    pub assistant_only: bool,
    #[command(flatten)]
    pub template: TemplateOptions,
    /// Sequences to train on, in all [default: 512; under --minutes or --preset as many as the steps take]
    #[arg(long)]
    pub samples: Option<usize>,
    /// Tokens in a sequence [default: 256]
    #[arg(long)]
    pub length: Option<usize>,
    /// Sequences of each watched text [default: 8]
    #[arg(long)]
    pub watch_samples: Option<usize>,
}

/// How much of the data is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Amounts {
    pub samples: usize,
    pub length: usize,
    pub watch_samples: usize,
}

impl DataOptions {
    /// What was given, as the arguments of another command.
    pub(super) fn arguments(&self) -> Vec<OsString> {
        let mut out = Vec::new();
        out.extend(self.data.iter().flat_map(|data| words(&[&"--data", data])));
        out.extend(self.watch.iter().flat_map(|watch| words(&[&"--watch", watch])));
        out.extend(self.assistant_only.then(|| "--assistant-only".into()));
        let numbers = [("--samples", self.samples), ("--length", self.length), ("--watch-samples", self.watch_samples)];
        out.extend(
            numbers
                .into_iter()
                .flat_map(|(name, n)| n.iter().flat_map(|n| words(&[&name, &n.to_string()])).collect::<Vec<_>>()),
        );
        if let Some(arguments) = &self.template.chat_template_kwargs {
            out.extend(words(&[&"--chat-template-kwargs", &Value::from(arguments.clone()).to_string()]));
        }
        out
    }

    /// What was given, and for the rest what is wanted where nothing is.
    pub(super) fn amounts(&self) -> Amounts {
        Amounts {
            samples: self.samples.unwrap_or(512),
            length: self.length.unwrap_or(LENGTH),
            watch_samples: self.watch_samples.unwrap_or(8),
        }
    }

    /// Whether it comes from standard input, which can be read once only.
    pub(super) fn is_stdin(&self) -> bool {
        self.data.iter().any(|spec| named_share(spec).0 == Path::new("-"))
            || self.watch.iter().any(|w| w == Path::new("-"))
    }

    /// Reads all files for the tokenizer and the template of `made_from`; `note` is told what of them is not used.
    pub(super) fn sources(
        &self,
        amounts: Amounts,
        made_from: &Checkpoint,
        teacher: &Checkpoint,
        note: &mut dyn FnMut(&str),
    ) -> Result<Read> {
        let mixture = Mixture {
            data: self.data.iter().map(|spec| named_share(spec)).collect(),
            watch: self.watch.clone(),
            samples: amounts.samples,
            length: amounts.length,
            watch_samples: amounts.watch_samples,
            template_arguments: self.template.chat_template_kwargs.is_some(),
        };
        // The student's template is for files; what the teacher writes begins by its own.
        let template = mixture.reads_files().then_some(&self.template);
        let text = text_to_read(made_from.tensors.folder(), &made_from.config, template)?;
        let reader = Reader { text, assistant_only: self.assistant_only, ends: true };
        let begins =
            |opening| teacher_text::prompt(&text_of(teacher)?, opening, &self.template.arguments(), amounts.length);
        Ok(mixture.read(&reader, begins, note)?)
    }

    /// The training data, and what is watched; what the teacher, of that identity, writes is kept in `training`.
    pub(super) fn prepare(
        &self,
        read: Read,
        (teacher, identity): (&Checkpoint, &Value),
        training: &Path,
        seed: u64,
        asked_threads: usize,
    ) -> Result<Prepared> {
        let write = &mut |name: &str, wanted: teacher_text::Wanted<'_>| {
            let file = training.join(format!("{name}.json"));
            let load = || Ok(Decoder::load(on_cpu(threads(asked_threads))?, teacher)?);
            let bar = super::progress(wanted.count as u64, "the teacher writes");
            let rows = teacher_text::rows(&text_of(teacher)?, identity, wanted, &file, load, &mut || bar.inc(1))?;
            bar.finish();
            Ok(rows)
        };
        Ok(read.prepare(seed, write)?)
    }
}

/// The text side of the teacher, which need have none where it writes nothing.
fn text_of(teacher: &Checkpoint) -> Result<ModelText, TextError> {
    ModelText::to_read(teacher.tensors.folder(), &teacher.config)
}

/// A source and its weight; a file may have `=` in its name, and one whose name is no text has no weight.
fn named_share(spec: &OsStr) -> (PathBuf, f64) {
    match spec.to_str().and_then(|s| s.rsplit_once('=')).map(|(f, w)| (f, w.parse::<f64>())) {
        Some((file, Ok(share))) if !Path::new(spec).exists() => (file.into(), share),
        _ => (spec.into(), 1.0),
    }
}
