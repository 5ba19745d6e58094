//! What `recover` trains on and what it watches: files, a shipped text, and what the teacher writes.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use recoup_eval::records;
use serde_json::{Value, json};

use super::generated::{self, Opening, Wanted};
use super::options::{TemplateOptions, reader};
use crate::checkpoint::Checkpoint;
use crate::recover::data::{self, Data, Document, Part, Row};
use crate::recover::sources::{Counts, Reader};

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
    /// Sequences to train on, in all
    #[arg(long, default_value_t = 512)]
    pub samples: usize,
    /// Tokens in a sequence
    #[arg(long, default_value_t = 256)]
    pub length: usize,
    /// Sequences of each watched text
    #[arg(long, default_value_t = 8)]
    watch_samples: usize,
}

/// The name of the shipped text as data.
const BUILT_IN: &str = "built-in";
/// What is watched where nothing is named.
const HELD_OUT_NAME: &str = "data, held out";
const BUILT_IN_NAME: &str = "built-in text";
/// Held-out sequences are at most this share of the data.
const HELD_OUT: usize = 8;

/// Data that is read, and what the teacher is to write: all that can be wrong with it before a model is loaded.
pub(super) struct Sources {
    sources: Vec<Source>,
    watched: Vec<(String, Vec<Row>, Counts)>,
    built_in: Vec<Row>,
}

struct Source {
    name: String,
    share: f64,
    rows: Rows,
}

enum Rows {
    Read(Vec<Row>, Option<Counts>),
    /// By the teacher, from these tokens on.
    Written(Vec<u32>),
}

/// What is trained on and watched, and what the record beside the model says of where it came from.
pub(super) struct Prepared {
    pub data: Data,
    pub watched: Vec<(String, Data)>,
    /// For each source its name and what was read of it.
    pub sources: Value,
    /// The same for each watched text, with its hash.
    pub watched_sources: Value,
}

/// Words that stand for data that is no file.
const WORDS: [&str; 3] = ["teacher", "teacher-chat", BUILT_IN];

impl DataOptions {
    /// Whether no text is looked at while training.
    pub(super) fn watches_nothing(&self) -> bool {
        self.watch_samples == 0
    }

    /// Reads all files for the tokenizer and the template in `folder`, and says what of them is not used.
    pub(super) fn sources(&self, folder: &Path, teacher: &Checkpoint) -> Result<Sources> {
        // The student's template is for files; what the teacher writes begins by its own.
        let reads = !self.watch.is_empty() || self.data.iter().any(|spec| word(named_share(spec).0).is_none());
        let reader = reader(folder, self.assistant_only, reads.then_some(&self.template))?;
        let written = |opening| {
            anyhow::Ok(Rows::Written(generated::prompt(teacher, opening, &self.template.arguments(), self.length)?))
        };
        let specs: Vec<(&Path, f64)> = self.data.iter().map(|spec| named_share(spec)).collect();
        let total: f64 = specs.iter().map(|s| s.1).sum();
        for (source, share) in &specs {
            if *share <= 0.0 || !share.is_finite() {
                bail!("--data {}={share}: expected a weight above 0", source.display());
            }
            if let Some(word) = word(source).filter(|_| source.exists()) {
                super::say!("note: --data {word} is what that word stands for; the file of this name is ./{word}");
            }
        }
        if let Some(twice) = specs.iter().enumerate().find(|(i, s)| specs[..*i].iter().any(|t| t.0 == s.0)) {
            bail!("--data {}: given twice; give it once, with a weight ({0}=2)", twice.1.0.display());
        }
        let files: Vec<PathBuf> = specs.iter().filter(|s| word(s.0).is_none()).map(|s| s.0.into()).collect();
        records::same_file_twice(&files)?;
        records::same_file_twice(&self.watch)?;
        if self.watch_samples == 0 && !self.watch.is_empty() {
            bail!("--watch with --watch-samples 0: nothing would be watched");
        }
        for file in &self.watch {
            if records::same_file_twice(&[&files[..], std::slice::from_ref(file)].concat()).is_err() {
                super::say!(
                    "warning: {} is trained on and watched; what does best on it may have learned it by heart",
                    file.display()
                );
            }
        }
        let mut names = records::distinct_file_names(&files, &WORDS).into_iter();
        let mut sources = Vec::new();
        for (source, share) in specs {
            let (name, rows) = match word(source) {
                Some(word @ "teacher") => (word.into(), written(Opening::Document)?),
                Some(word @ "teacher-chat") => (word.into(), written(Opening::Chat)?),
                Some(word) => (word.into(), Rows::Read(built_in(&reader, self.length)?, None)),
                None => {
                    let name = names.next().unwrap_or_else(|| source.display().to_string());
                    let wanted = share / total * self.samples as f64 + self.watch_samples as f64;
                    let (rows, counts) = told(&reader, source, &name, self.length, Some(wanted.ceil() as usize))?;
                    (name, Rows::Read(rows, Some(counts)))
                }
            };
            sources.push(Source { name, share, rows });
        }
        let names = records::distinct_names(&self.watch, &[HELD_OUT_NAME, BUILT_IN_NAME]);
        let mut watched = Vec::new();
        for (file, name) in self.watch.iter().zip(names) {
            let (rows, counts) = told(&reader, file, &name, self.length, Some(self.watch_samples))?;
            watched.push((name, rows, counts));
        }
        let read =
            sources.iter().filter_map(|s| if let Rows::Read(_, counts) = &s.rows { counts.as_ref() } else { None });
        let conversations: usize = read.chain(watched.iter().map(|w| &w.2)).map(|c| c.conversations).sum();
        let writes = |word: &str| sources.iter().any(|s| s.name == word && matches!(s.rows, Rows::Written(_)));
        if self.assistant_only && conversations == 0 {
            super::say!("note: --assistant-only is without effect: no data is conversations of others");
        } else if self.assistant_only && writes("teacher-chat") {
            super::say!("note: --assistant-only is not for what the teacher writes itself: all of that is learned");
        }
        if self.template.chat_template_kwargs.is_some() && conversations == 0 && !writes("teacher-chat") {
            super::say!("note: --chat-template-kwargs is without effect: no data is conversations");
        }
        Ok(Sources { sources, watched, built_in: built_in(&reader, self.length)? })
    }

    /// The training data, and what is watched; what the teacher, of that identity, writes is kept in `training`.
    pub(super) fn prepare(
        &self,
        read: Sources,
        (teacher, identity): (&Checkpoint, &Value),
        training: &Path,
        seed: u64,
        threads: usize,
    ) -> Result<Prepared> {
        let total: f64 = read.sources.iter().map(|s| s.share).sum();
        let count = read.sources.len();
        let mut parts = Vec::new();
        let mut held_out = Vec::new();
        let mut sources = Vec::new();
        for Source { name, share, rows } in read.sources {
            let (rows, counts) = match rows {
                Rows::Read(mut rows, counts) => {
                    if self.watch.is_empty() {
                        let count = self.watch_samples.div_ceil(count).min(rows.len() / HELD_OUT);
                        held_out.extend(rows.split_off(rows.len() - count));
                    }
                    (rows, counts)
                }
                Rows::Written(prompt) => {
                    let count = (share / total * self.samples as f64).ceil().max(1.0) as usize;
                    let file = training.join(format!("{name}.json"));
                    let wanted = Wanted { prompt: &prompt, count, length: self.length, seed };
                    (generated::rows((teacher, identity), wanted, threads, &file)?, None)
                }
            };
            sources.push(json!({"name": name, "weight": share, "read": counts}));
            parts.push(Part { name, rows, share });
        }
        let data = Data::mix(&parts, self.samples)?;
        let mut watched = Vec::new();
        let mut watched_sources = Vec::new();
        let mut watch = |name: &str, rows: &[Row], counts: Option<&Counts>| {
            let rows = data::spread(rows, self.watch_samples);
            if !rows.is_empty() {
                let data = Data { rows, description: name.into() };
                watched_sources.push(json!({"name": name, "sha256": data.hash(), "read": counts}));
                watched.push((name.to_owned(), data));
            }
        };
        if self.watch.is_empty() {
            watch(HELD_OUT_NAME, &held_out, None);
            if !parts.iter().any(|p| p.name == BUILT_IN) {
                watch(BUILT_IN_NAME, &read.built_in, None);
            }
        }
        for (name, rows, counts) in &read.watched {
            watch(name, rows, Some(counts));
        }
        Ok(Prepared { data, watched, sources: sources.into(), watched_sources: watched_sources.into() })
    }
}

/// A source and its weight; a file may have `=` in its name, and one whose name is no text has no weight.
fn named_share(spec: &OsStr) -> (&Path, f64) {
    match spec.to_str().and_then(|s| s.rsplit_once('=')).map(|(f, w)| (f, w.parse::<f64>())) {
        Some((file, Ok(share))) if !Path::new(spec).exists() => (Path::new(file), share),
        _ => (Path::new(spec), 1.0),
    }
}

/// The word that stands for data that is no file.
fn word(source: &Path) -> Option<&'static str> {
    WORDS.into_iter().find(|word| Path::new(word) == source)
}

/// The shipped text as rows.
fn built_in(reader: &Reader, length: usize) -> Result<Vec<Row>> {
    let text = reader.tokenizer.encode(super::quantize::BUILT_IN_TEXT, false)?;
    Ok(data::pack(&[Document::text(text)], length, false))
}

/// A file as rows of at most `length` tokens; of a long text several times the rows that are `wanted` if only so many are.
/// What is not used of it is said, under its `name`.
pub(super) fn told(
    reader: &Reader,
    file: &Path,
    name: &str,
    length: usize,
    wanted: Option<usize>,
) -> Result<(Vec<Row>, Counts)> {
    let (rows, counts) = reader.rows(file, length, wanted)?;
    counts.notes(name, length).iter().for_each(|n| super::say!("{n}"));
    Ok((rows, counts))
}
