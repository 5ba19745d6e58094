//! What a training is given: sources by their shares, what is held out or watched, and the record of where it came from.
//!
//! All that can be wrong with it is found before a model is loaded ([`Mixture::read`]); what the teacher is to write comes
//! after that ([`Read::prepare`]).

use std::path::{Path, PathBuf};

use recoup_ground::records;
use serde_json::{Value, json};

use super::data::{Data, Part};
use super::teacher_text::{Opening, Prompt, Wanted};
use super::{RecoverError, Result};
use crate::corpus::{self, Counts, Document, Reader, Row, pack, spread};

/// What is trained on and watched, as it is named, and how much of it is wanted.
#[derive(Clone, Debug)]
pub struct Mixture {
    /// Sources with their shares: files, folders, patterns, `-`, or words.
    pub data: Vec<(PathBuf, f64)>,
    /// What to measure on while training; nothing: a part of the data that is held out, and the built-in text.
    pub watch: Vec<PathBuf>,
    /// Sequences to train on, in all.
    pub samples: usize,
    /// Tokens in a sequence.
    pub length: usize,
    /// Sequences of each watched text.
    pub watch_samples: usize,
    /// Whether the chat template is given arguments of the user's.
    pub template_arguments: bool,
}

/// The built-in text as data.
const BUILT_IN: &str = "built-in";
/// What the teacher writes by itself: texts, and conversations.
const TEACHER: &str = "teacher";
const TEACHER_CHAT: &str = "teacher-chat";
/// Words that stand for data that is no file.
const WORDS: [&str; 3] = [TEACHER, TEACHER_CHAT, BUILT_IN];
/// What is watched where nothing is named.
const HELD_OUT_NAME: &str = "data, held out";
const BUILT_IN_NAME: &str = "built-in text";
/// Held-out sequences are at most this share of the data.
const HELD_OUT: usize = 8;

/// Data that is read, and what the teacher is to write.
pub struct Read {
    mixture: Mixture,
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
pub struct Prepared {
    pub data: Data,
    pub watched: Vec<(String, Data)>,
    /// For each source its name and what was read of it.
    pub sources: Value,
    /// The same for each watched text, with its hash.
    pub watched_sources: Value,
}

impl Mixture {
    /// Whether the student's chat template has a part in it: what the teacher writes begins by its own.
    #[must_use]
    pub fn reads_files(&self) -> bool {
        !self.watch.is_empty() || self.data.iter().any(|(source, _)| word(source).is_none())
    }

    /// Reads all files by `reader`; `teacher` gives what the text that it writes begins with. `note` is told what is not
    /// used, line by line, with the word that says how much it matters.
    ///
    /// # Errors
    /// A source that cannot be read, is empty or is given twice; a share that is none.
    pub fn read(
        self,
        reader: &Reader,
        teacher: impl Fn(Opening) -> Result<Prompt>,
        note: &mut dyn FnMut(&str),
    ) -> Result<Read> {
        self.check(note)?;
        let files = self.files();
        let total: f64 = self.data.iter().map(|s| s.1).sum();
        let mut names = records::distinct_file_names(&files, &WORDS).into_iter();
        let mut sources = Vec::new();
        for (source, share) in &self.data {
            let mut written = |opening| {
                let Prompt { tokens, idle_arguments } = teacher(opening)?;
                if idle_arguments {
                    note(
                        "note: --chat-template-kwargs changes nothing of the conversations that the teacher writes itself: \
                         up to the user's words its template writes the same, and the rest is the teacher's",
                    );
                }
                Ok::<_, RecoverError>(Rows::Written(tokens))
            };
            let (name, rows) = match word(source) {
                Some(word @ TEACHER) => (word.into(), written(Opening::Document)?),
                Some(word @ TEACHER_CHAT) => (word.into(), written(Opening::Chat)?),
                Some(word) => (word.into(), Rows::Read(built_in(reader, self.length)?, None)),
                None => {
                    let name = names.next().unwrap_or_else(|| source.display().to_string());
                    let wanted = share / total * self.samples as f64 + self.watch_samples as f64;
                    let (rows, counts) = told(reader, source, &name, self.length, Some(wanted.ceil() as usize), note)?;
                    (name, Rows::Read(rows, Some(counts)))
                }
            };
            sources.push(Source { name, share: *share, rows });
        }
        let names = records::distinct_names(&self.watch, &[HELD_OUT_NAME, BUILT_IN_NAME]);
        let mut watched = Vec::new();
        for (file, name) in self.watch.iter().zip(names) {
            let (rows, counts) = told(reader, file, &name, self.length, Some(self.watch_samples), note)?;
            watched.push((name, rows, counts));
        }
        let read =
            sources.iter().filter_map(|s| if let Rows::Read(_, counts) = &s.rows { counts.as_ref() } else { None });
        let conversations: usize = read.chain(watched.iter().map(|w| &w.2)).map(|c| c.conversations).sum();
        let writes = |word: &str| sources.iter().any(|s| s.name == word && matches!(s.rows, Rows::Written(_)));
        if reader.assistant_only && conversations == 0 {
            note("note: --assistant-only is without effect: no data is conversations of others");
        } else if reader.assistant_only && writes(TEACHER_CHAT) {
            note("note: --assistant-only is not for what the teacher writes itself: all of that is learned");
        }
        if self.template_arguments && conversations == 0 && !writes(TEACHER_CHAT) {
            note("note: --chat-template-kwargs is without effect: no data is conversations");
        }
        let built_in = built_in(reader, self.length)?;
        Ok(Read { mixture: self, sources, watched, built_in })
    }

    /// What can be said before anything is read.
    fn check(&self, note: &mut dyn FnMut(&str)) -> Result<()> {
        for (source, share) in &self.data {
            if *share <= 0.0 || !share.is_finite() {
                let source = source.display();
                return Err(RecoverError::Asked(format!("--data {source}={share}: expected a weight above 0")));
            }
            if let Some(word) = word(source).filter(|_| source.exists()) {
                note(&format!("note: --data {word} is what that word stands for; the file of this name is ./{word}"));
            }
        }
        let given = |i: usize, source: &Path| self.data[..i].iter().any(|other| other.0 == source);
        if let Some((_, (twice, _))) = self.data.iter().enumerate().find(|(i, (source, _))| given(*i, source)) {
            let twice = twice.display();
            return Err(RecoverError::Asked(format!(
                "--data {twice}: given twice; give it once, with a weight ({twice}=2)"
            )));
        }
        let files = self.files();
        same_file_twice(&files)?;
        same_file_twice(&self.watch)?;
        if self.watch_samples == 0 && !self.watch.is_empty() {
            return Err(RecoverError::Asked("--watch with --watch-samples 0: nothing would be watched".into()));
        }
        for file in &self.watch {
            if same_file_twice(&[&files[..], std::slice::from_ref(file)].concat()).is_err() {
                note(&format!(
                    "warning: {} is trained on and watched; what does best on it may have learned it by heart",
                    file.display()
                ));
            }
        }
        Ok(())
    }

    /// The sources that are no words.
    fn files(&self) -> Vec<PathBuf> {
        self.data.iter().filter(|s| word(&s.0).is_none()).map(|s| s.0.clone()).collect()
    }
}

impl Read {
    /// The training data, and what is watched; `write` gives the sequences of a source that the teacher writes.
    ///
    /// # Errors
    /// Those of `write`.
    pub fn prepare(self, seed: u64, write: &mut dyn FnMut(&str, Wanted<'_>) -> Result<Vec<Row>>) -> Result<Prepared> {
        let Mixture { samples, length, watch_samples, watch: named, .. } = self.mixture;
        let total: f64 = self.sources.iter().map(|s| s.share).sum();
        let count = self.sources.len();
        let mut parts = Vec::new();
        let mut held_out = Vec::new();
        let mut sources = Vec::new();
        for Source { name, share, rows } in self.sources {
            let (rows, counts) = match rows {
                Rows::Read(mut rows, counts) => {
                    if named.is_empty() {
                        let count = watch_samples.div_ceil(count).min(rows.len() / HELD_OUT);
                        held_out.extend(rows.split_off(rows.len() - count));
                    }
                    (rows, counts)
                }
                Rows::Written(prompt) => {
                    let count = (share / total * samples as f64).ceil().max(1.0) as usize;
                    (write(&name, Wanted { prompt: &prompt, count, length, seed })?, None)
                }
            };
            sources.push(json!({"name": name, "weight": share, "read": counts}));
            parts.push(Part { name, rows, share });
        }
        let data = Data::mix(&parts, samples)?;
        let mut watched = Vec::new();
        let mut watched_sources = Vec::new();
        let mut watch = |name: &str, rows: &[Row], counts: Option<&Counts>| {
            let rows = spread(rows, watch_samples);
            if !rows.is_empty() {
                let data = Data { rows, description: name.into() };
                watched_sources.push(json!({"name": name, "sha256": data.hash(), "read": counts}));
                watched.push((name.to_owned(), data));
            }
        };
        if named.is_empty() {
            watch(HELD_OUT_NAME, &held_out, None);
            if !parts.iter().any(|p| p.name == BUILT_IN) {
                watch(BUILT_IN_NAME, &self.built_in, None);
            }
        }
        for (name, rows, counts) in &self.watched {
            watch(name, rows, Some(counts));
        }
        Ok(Prepared { data, watched, sources: sources.into(), watched_sources: watched_sources.into() })
    }
}

/// Refuses a file that is named twice.
///
/// # Errors
/// Names it.
pub fn same_file_twice(files: &[PathBuf]) -> Result<()> {
    Ok(records::same_file_twice(files).map_err(corpus::CorpusError::from)?)
}

/// A file as rows of at most `length` tokens; of a long text several times the rows that are `wanted` if only so many are.
/// `note` is told what is not used of it, under its `name`.
///
/// # Errors
/// A file that cannot be read, or has nothing to learn from.
pub fn told(
    reader: &Reader,
    file: &Path,
    name: &str,
    length: usize,
    wanted: Option<usize>,
    note: &mut dyn FnMut(&str),
) -> Result<(Vec<Row>, Counts)> {
    let (rows, counts) = reader.rows(file, length, wanted)?;
    counts.notes(name, length).iter().for_each(|n| note(n));
    Ok((rows, counts))
}

/// The word that stands for data that is no file.
fn word(source: &Path) -> Option<&'static str> {
    WORDS.into_iter().find(|word| Path::new(word) == source)
}

/// The built-in text as rows.
fn built_in(reader: &Reader, length: usize) -> Result<Vec<Row>> {
    let text = reader.text.tokenizer().encode(corpus::BUILT_IN, false)?;
    Ok(pack(&[Document::text(text)], length, false))
}
