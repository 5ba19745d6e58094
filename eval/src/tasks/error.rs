//! What can be wrong with a task, its data or its answers: for people.

use std::path::PathBuf;

use recoup_ground::records::RecordsError;

/// Why a task cannot be loaded, asked or scored.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file whose content is wrong there: a task's, or one of data.
    #[error("{file}:{line}: {message}")]
    File { file: String, line: usize, message: String },
    /// A key that no task, group or list in it has.
    #[error("{file}:{line}: unknown key `{key}`; the nearest known one is `{nearest}`")]
    UnknownKey { file: String, line: usize, key: String, nearest: String },
    /// A Python function.
    #[error(
        "{file}:{line}: `{key}: !function {function}` names Python code, which is not run here; write it as a Jinja \
         template (filters `replace`, `regex_replace`, `split`, … are there) or prepare the data file beforehand"
    )]
    Function { file: String, line: usize, key: String, function: String },
    /// Files that include each other.
    #[error("these files include each other: {chain}; remove one of the `include` lines")]
    IncludeCycle { chain: String },
    /// Groups that contain each other.
    #[error("group `{name}` contains itself: {chain}; remove it from one of the `task` lists")]
    GroupCycle { name: String, chain: String },
    /// Two files that define the same task.
    #[error("task or group `{name}` is defined twice, in {first} and in {second}; rename one")]
    Duplicate { name: String, first: String, second: String },
    /// A file that cannot be read, or not without doubt, and something in it was asked for.
    #[error("`{name}` cannot be used: {why}")]
    Broken { name: String, why: String },
    /// No task, group or tag of this name.
    #[error("there is no task, group or tag `{name}`; the nearest is `{nearest}`")]
    UnknownTask { name: String, nearest: String },
    /// A data file that is not where it should be.
    #[error("task `{task}` ({file}) needs the data file `{data}`, which is in none of: {looked}; {advice}")]
    NoData { task: String, file: String, data: String, looked: String, advice: String },
    /// A folder for data that is none.
    #[error("--data-dir {path}: {problem}; name the folder that the data files are in")]
    DataFolder { path: PathBuf, problem: String },
    /// A split that `data_files` does not have.
    #[error("task `{task}` ({file}): `{key}: {split}`, but the data set has only: {known}")]
    NoSplit { task: String, file: String, key: String, split: String, known: String },
    /// A file that cannot be read, or is something else.
    #[error(transparent)]
    Records(RecordsError),
    /// A data file without documents.
    #[error("task `{task}`: split `{split}` has no documents ({file} is empty)")]
    NoDocuments { task: String, split: String, file: String },
    /// A document that the task can make nothing of, or whose prompt the chat template refuses, or whose answers are none.
    #[error("task `{task}`, document {document}: {message}")]
    Document { task: String, document: String, message: String },
    /// A setting of generation that the command gives.
    #[error("--gen-kwargs: {0}")]
    Generation(#[from] super::generation::Wrong),
    /// Fewer few-shot examples than asked for.
    #[error("task `{task}`: {wanted} few-shot examples asked for, its split `{split}` has {available} to draw from")]
    FewShot { task: String, wanted: usize, split: String, available: usize },
    /// Few-shot examples whose file is not there.
    #[error("{wanted} few-shot examples asked for, but {why}")]
    NoExamples { wanted: usize, why: String },
}

impl From<RecordsError> for Error {
    fn from(e: RecordsError) -> Self {
        match e {
            RecordsError::Wrong { file, line, message } => Self::File { file, line, message },
            other => Self::Records(other),
        }
    }
}
