//! Answers on disk as they come: what was answered survives a kill at any moment, and a run that is started again goes on
//! from there.
//!
//! A JSONL file: first what the run is about, then a line per answer, in the order they came. [`Journal::finish`] sorts
//! them, so that the file's bytes do not depend on that order.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{BufRead as _, BufReader, ErrorKind, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use recoup_ground::atomic::{NotWritten, write_atomically};
use recoup_ground::kept::difference;
use recoup_ground::shorten::shorten;

use crate::Response;

/// Why answers could not be read or kept.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    #[error("{path}: {source}{}", if source.kind() == std::io::ErrorKind::StorageFull { "; free some space and start the same command again: what was answered so far is kept" } else { "" })]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{path}: another process writes answers there; wait for its end, or choose another output folder")]
    InUse { path: PathBuf },
    #[error(
        "{path} holds answers of another run: `{key}` is {found} there and {expected} here; \
         choose another output folder, or delete this one to begin anew"
    )]
    OtherRun { path: PathBuf, key: String, expected: String, found: String },
    #[error(
        "{path} and {other} are no shards of one run: `{key}` is {found} in the first and {expected} in the second; merge \
         shards that one command made, on devices of one kind"
    )]
    ShardsDiffer { path: PathBuf, other: PathBuf, key: String, found: String, expected: String },
    #[error("{path}, line {line}: {problem}; the file was changed or damaged, delete the folder to begin anew")]
    Damaged { path: PathBuf, line: usize, problem: String },
    #[error(
        "task `{}`, document {}, request {}: the log-likelihood of the answer is {found}: the model or the server computes \
         what is no number; nothing of it was kept, the answers before it are in {path}", key.task, key.doc_id, key.request
    )]
    NotANumber { path: PathBuf, key: Key, found: f64 },
    #[error(
        "{path}: shard {shard} of {shards} is missing {missing} answers, the first to {first}; let it run to its end"
    )]
    Incomplete { path: PathBuf, shard: usize, shards: usize, missing: usize, first: String },
}

/// Which request an answer belongs to.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Key {
    pub task: String,
    pub doc_id: usize,
    /// Which of the seeds, where answers are sampled several times.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub seed: usize,
    /// Of the document's requests.
    pub request: usize,
}

fn is_zero(n: &usize) -> bool {
    *n == 0
}

#[derive(Serialize, Deserialize)]
struct Line {
    #[serde(flatten)]
    key: Key,
    response: Response,
}

/// Seconds of answers that a power cut takes at most. A kill takes none.
const UNSYNCED: Duration = Duration::from_secs(10);

/// A run's answers, in memory and on disk.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
    /// When the file last went to the disk itself.
    synced: Instant,
    header: Value,
    answers: BTreeMap<Key, Response>,
}

impl From<NotWritten> for JournalError {
    fn from(e: NotWritten) -> Self {
        Self::Io { path: e.path, source: e.source }
    }
}

impl Journal {
    /// Opens the journal at `path`, or begins it. `about` says what the run is about (an object); answers of a run about
    /// anything else are refused. An unfinished last line, which a kill may leave, is dropped.
    ///
    /// # Errors
    /// When the file cannot be read or written, is damaged, or holds another run.
    pub fn open(path: &Path, about: &Value) -> Result<Self, JournalError> {
        let io = |source| JournalError::Io { path: path.into(), source };
        let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).map_err(io)?;
        // A file system without locks is taken at its word: the lock only keeps mistakes away.
        if matches!(file.try_lock(), Err(TryLockError::WouldBlock)) {
            return Err(JournalError::InUse { path: path.into() });
        }
        let mut text = String::new();
        file.read_to_string(&mut text).map_err(io)?;
        let whole = text.rfind('\n').map_or(0, |end| end + 1);
        let answers = read(path, &text[..whole], Some(about))?;
        file.set_len(whole as u64).map_err(io)?;
        file.seek(SeekFrom::Start(whole as u64)).map_err(io)?;
        let mut journal = Self { path: path.into(), file, synced: Instant::now(), header: about.clone(), answers };
        if whole == 0 {
            let line = about.to_string() + "\n";
            journal.write(line.as_bytes())?;
        }
        Ok(journal)
    }

    /// The answers so far.
    #[must_use]
    pub fn answers(&self) -> &BTreeMap<Key, Response> {
        &self.answers
    }

    /// Adds an answer; it is with the operating system when this returns, and on the disk some seconds later.
    ///
    /// # Errors
    /// When it cannot be written, or is no number: what stands in the file can be read back.
    pub fn add(&mut self, key: Key, response: Response) -> Result<(), JournalError> {
        if let Some(found) = response.impossible() {
            return Err(JournalError::NotANumber { path: self.path.clone(), key, found });
        }
        let line = Line { key, response };
        let mut text =
            serde_json::to_vec(&line).map_err(|e| JournalError::Io { path: self.path.clone(), source: e.into() })?;
        text.push(b'\n');
        self.write(&text)?;
        self.answers.insert(line.key, line.response);
        Ok(())
    }

    /// Rewrites the file in the order of keys.
    ///
    /// # Errors
    /// When it cannot be written; the old file is whole then.
    pub fn finish(self) -> Result<BTreeMap<Key, Response>, JournalError> {
        write(&self.path, &self.header, &self.answers)?;
        Ok(self.answers)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), JournalError> {
        let io = |source| JournalError::Io { path: self.path.clone(), source };
        self.file.write_all(bytes).map_err(io)?;
        if self.synced.elapsed() >= UNSYNCED {
            // Some file systems cannot; then it is as without.
            match self.file.sync_data() {
                Err(e) if !matches!(e.kind(), ErrorKind::InvalidInput | ErrorKind::Unsupported) => return Err(io(e)),
                _ => self.synced = Instant::now(),
            }
        }
        Ok(())
    }
}

/// What the run at `path` is about, and its answers.
///
/// # Errors
/// When the file cannot be read or is damaged.
pub fn load(path: &Path) -> Result<(Value, BTreeMap<Key, Response>), JournalError> {
    let io = |source| JournalError::Io { path: path.into(), source };
    let text = std::fs::read_to_string(path).map_err(io)?;
    let whole = text.rfind('\n').map_or(0, |end| end + 1);
    let answers = read(path, &text[..whole], None)?;
    let header = text.lines().next().and_then(|l| serde_json::from_str(l).ok()).unwrap_or(Value::Null);
    Ok((header, answers))
}

/// What the run at `path` is about; its answers are not read.
///
/// # Errors
/// When the file cannot be read, or its first line is none of a journal.
pub fn about(path: &Path) -> Result<Value, JournalError> {
    let io = |source| JournalError::Io { path: path.into(), source };
    let mut line = String::new();
    BufReader::new(File::open(path).map_err(io)?).read_line(&mut line).map_err(io)?;
    serde_json::from_str(&line).map_err(|e| JournalError::Damaged {
        path: path.into(),
        line: 1,
        problem: e.to_string(),
    })
}

/// Writes a whole journal at once.
///
/// # Errors
/// When it cannot be written.
pub fn write(path: &Path, about: &Value, answers: &BTreeMap<Key, Response>) -> Result<(), JournalError> {
    let mut text = about.to_string() + "\n";
    for (key, response) in answers {
        let line = Line { key: key.clone(), response: response.clone() };
        text += &serde_json::to_string(&line).map_err(|e| JournalError::Io { path: path.into(), source: e.into() })?;
        text.push('\n');
    }
    Ok(write_atomically(path, text.as_bytes())?)
}

fn read(path: &Path, text: &str, about: Option<&Value>) -> Result<BTreeMap<Key, Response>, JournalError> {
    let damaged = |line: usize, e: &dyn std::fmt::Display| JournalError::Damaged {
        path: path.into(),
        line: line + 1,
        problem: e.to_string(),
    };
    let mut answers = BTreeMap::new();
    for (i, line) in text.lines().enumerate() {
        if i == 0 {
            let header: Value = serde_json::from_str(line).map_err(|e| damaged(i, &e))?;
            about.map_or(Ok(()), |about| same(path, &header, about))?;
            continue;
        }
        let line: Line = serde_json::from_str(line).map_err(|e| damaged(i, &e))?;
        answers.insert(line.key, line.response);
    }
    Ok(answers)
}

/// Names the first key in which two runs differ, with the keys that it lies under.
pub(crate) fn same(path: &Path, found: &Value, expected: &Value) -> Result<(), JournalError> {
    let Some((key, found, expected)) = difference(found, expected) else { return Ok(()) };
    Err(JournalError::OtherRun { path: path.into(), key, expected: short(expected), found: short(found) })
}

/// Names the first key in which two shards' models differ, with the keys that it lies under.
pub(crate) fn alike(shard: (&Path, &Value), other: (&Path, &Value)) -> Result<(), JournalError> {
    let Some((key, found, expected)) = difference(shard.1, other.1) else { return Ok(()) };
    let (found, expected, key) = (short(found), short(expected), format!("model.{key}"));
    Err(JournalError::ShardsDiffer { path: shard.0.into(), other: other.0.into(), key, found, expected })
}

fn short(value: &Value) -> String {
    shorten(&value.to_string(), 80)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn key(doc_id: usize) -> Key {
        Key { task: "t".into(), doc_id, seed: 0, request: 0 }
    }

    fn answer(x: f64) -> Response {
        Response::LogLikelihood { log_likelihood: x, is_greedy: false }
    }

    #[test]
    fn a_run_killed_at_any_byte_resumes_and_ends_with_the_same_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let about = json!({"model": "m", "tasks": ["t"]});
        let path = folder.path().join("whole.jsonl");
        let mut whole = Journal::open(&path, &about).unwrap();
        for i in [2, 0, 1] {
            whole.add(key(i), answer(-0.1 - i as f64 / 3.0)).unwrap();
        }
        let unsorted = std::fs::read(&path).unwrap();
        whole.finish().unwrap();
        let expected = std::fs::read(&path).unwrap();
        for cut in 0..unsorted.len() {
            let path = folder.path().join("cut.jsonl");
            std::fs::write(&path, &unsorted[..cut]).unwrap();
            let mut journal = Journal::open(&path, &about).unwrap();
            for i in 0..3 {
                if !journal.answers().contains_key(&key(i)) {
                    journal.add(key(i), answer(-0.1 - i as f64 / 3.0)).unwrap();
                }
            }
            journal.finish().unwrap();
            assert!(std::fs::read(&path).unwrap() == expected, "cut at {cut}");
        }
    }

    #[test]
    fn answers_of_another_run_are_refused_by_what_differs() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("r.jsonl");
        drop(Journal::open(&path, &json!({"model": "a", "limit": 5})).unwrap());
        let error = Journal::open(&path, &json!({"model": "a", "limit": 6})).unwrap_err().to_string();
        assert!(error.contains("`limit` is 5 there and 6 here"), "{error}");
        let path = folder.path().join("nested.jsonl");
        drop(Journal::open(&path, &json!({"model": {"files": {"tokenizer.json": "a"}}})).unwrap());
        let now = json!({"model": {"files": {"tokenizer.json": "b"}}});
        let error = Journal::open(&path, &now).unwrap_err().to_string();
        assert!(error.contains("`model.files.tokenizer.json` is \"a\" there and \"b\" here"), "{error}");
    }

    #[test]
    fn what_is_no_number_is_refused_before_it_is_written_and_minus_infinity_is_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("r.jsonl");
        let about = json!({"model": "m"});
        let mut journal = Journal::open(&path, &about).unwrap();
        journal.add(key(0), answer(f64::NEG_INFINITY)).unwrap();
        journal.add(key(1), Response::Rolling { log_likelihood: f64::NEG_INFINITY, tokens: Some(3) }).unwrap();
        for bad in [f64::NAN, f64::INFINITY] {
            let error = journal.add(key(2), answer(bad)).unwrap_err().to_string();
            assert!(error.contains("task `t`, document 2") && error.contains(&bad.to_string()), "{error}");
        }
        drop(journal);
        let resumed = Journal::open(&path, &about).unwrap();
        assert_eq!(resumed.answers().len(), 2);
        assert_eq!(resumed.answers()[&key(0)], answer(f64::NEG_INFINITY));
        let finished = resumed.finish().unwrap();
        assert_eq!(load(&path).unwrap(), (about, finished));
    }

    #[test]
    fn a_null_that_an_earlier_version_wrote_for_nan_is_explained() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("r.jsonl");
        let line = r#"{"task":"t","doc_id":0,"request":0,"response":{"log_likelihood":{"log_likelihood":null,"is_greedy":false}}}"#;
        std::fs::write(&path, format!("{{}}\n{line}\n")).unwrap();
        let error = Journal::open(&path, &json!({})).unwrap_err().to_string();
        assert!(error.contains("line 2") && error.contains("is null") && error.contains("no number"), "{error}");
    }

    #[test]
    fn a_damaged_line_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("r.jsonl");
        std::fs::write(&path, "{}\n{\"task\":\n").unwrap();
        let error = Journal::open(&path, &json!({})).unwrap_err().to_string();
        assert!(error.contains("line 2"), "{error}");
    }
}
