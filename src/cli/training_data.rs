//! What `recover` trains on and what it watches: files, a shipped text, and what the teacher writes.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use serde_json::Value;

use super::generated::{self, Opening, Wanted};
use crate::checkpoint::Checkpoint;
use crate::recover::data::{self, Data, Document, Part, Row};
use crate::recover::sources::Reader;

#[derive(clap::Args)]
pub(super) struct DataOptions {
    /// What to train on: text, or conversations or documents (.jsonl with `messages` or `text` in each line); `teacher`
    /// and `teacher-chat` are texts and conversations that the teacher writes itself, `built-in` is a short shipped text.
    /// Several share the sequences equally, or as their weights say
    #[arg(long, value_name = "FILE[=WEIGHT]", required = true)]
    data: Vec<String>,
    /// Text to measure the KL on while training, best of another kind than the data; the weights that do best on it are
    /// kept [default: a part of the data that is held out, and a short built-in text]
    #[arg(long, value_name = "FILE")]
    watch: Vec<PathBuf>,
    /// Of conversations, learn only what the assistant says
    #[arg(long)]
    assistant_only: bool,
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
/// Held-out sequences are at most this share of the data.
const HELD_OUT: usize = 8;

impl DataOptions {
    /// The training data, and what is watched, by name, for the student in `folder`; what the teacher, of
    /// that identity, writes is kept in `training`.
    pub(super) fn read(
        &self,
        folder: &Path,
        (teacher, identity): (&Checkpoint, &Value),
        training: &Path,
        seed: u64,
        threads: usize,
    ) -> Result<(Data, Vec<(String, Data)>)> {
        let reader = Reader::of(folder, self.assistant_only)?;
        let mut parts = Vec::new();
        let mut held_out = Vec::new();
        let specs = self.data.iter().map(|spec| match spec.rsplit_once('=').map(|(f, w)| (f, w.parse::<f64>())) {
            Some((file, Ok(share))) => (file, share),
            _ => (spec.as_str(), 1.0),
        });
        let specs: Vec<(&str, f64)> = specs.collect();
        let total: f64 = specs.iter().map(|s| s.1).sum();
        for (source, share) in specs {
            let opening = match source {
                "teacher" => Some(Opening::Document),
                "teacher-chat" => Some(Opening::Chat),
                _ => None,
            };
            let file = Path::new(source);
            let mut rows = match opening {
                None if source == BUILT_IN => built_in(&reader, self.length)?,
                None => {
                    let wanted = share / total * self.samples as f64 + self.watch_samples as f64;
                    rows(&reader, file, self.length, Some(wanted.ceil() as usize))?
                }
                Some(opening) => {
                    let count = (share / total * self.samples as f64).ceil().max(1.0) as usize;
                    let file = training.join(format!("{source}.json"));
                    let wanted = Wanted { opening, count, length: self.length, seed };
                    generated::rows((teacher, identity), wanted, threads, &file)?
                }
            };
            let name = file.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
            if self.watch.is_empty() && opening.is_none() {
                let count = self.watch_samples.div_ceil(self.data.len()).min(rows.len() / HELD_OUT);
                held_out.extend(rows.split_off(rows.len() - count));
            }
            parts.push(Part { name, rows, share });
        }
        let data = Data::mix(&parts, self.samples)?;
        let mut watched = Vec::new();
        let mut watch = |name: &str, rows: &[Row]| {
            let rows = data::spread(rows, self.watch_samples);
            if !rows.is_empty() {
                watched.push((name.to_owned(), Data { rows, description: name.into() }));
            }
        };
        if self.watch.is_empty() {
            watch("data, held out", &held_out);
            if !self.data.iter().any(|d| d.split('=').next() == Some(BUILT_IN)) {
                watch("built-in text", &built_in(&reader, self.length)?);
            }
        }
        for file in &self.watch {
            let name = file.file_stem().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
            watch(&name, &rows(&reader, file, self.length, Some(self.watch_samples))?);
        }
        Ok((data, watched))
    }
}

/// The shipped text as rows.
fn built_in(reader: &Reader, length: usize) -> Result<Vec<Row>> {
    let text = reader.tokenizer.encode(super::quantize::BUILT_IN_TEXT, false)?;
    Ok(data::pack(&[Document::text(text)], length, false))
}

/// A file as rows of at most `length` tokens; of a long text several times the rows that are `wanted` if only so many are.
pub(super) fn rows(reader: &Reader, file: &Path, length: usize, wanted: Option<usize>) -> Result<Vec<Row>> {
    let source = reader.read(file, wanted.map(|rows| rows.saturating_mul(length)))?;
    let tokens: usize = source.documents.iter().map(|d| d.tokens.len()).sum();
    if tokens == 0 {
        bail!("{}: the text is empty", file.display());
    }
    if tokens < length && !source.whole {
        bail!(
            "{}: {tokens} tokens are less than one sequence of {length}; give more text, or --length {tokens}",
            file.display()
        );
    }
    Ok(data::pack(&source.documents, length, source.whole))
}
