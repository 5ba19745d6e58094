//! Why a checkpoint was refused: always the file, the tensor or key, what was expected, what was found, what to do.

use std::borrow::Cow;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crate::output::OutputError;

/// Everything that can be wrong with a checkpoint on disk.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The operating system said no.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io { path: PathBuf, action: &'static str, source: std::io::Error },
    /// The volume or the quota of the output is exhausted; nothing is left behind.
    #[error("{}: no space left to {action} it; free some space or choose another output", path.display())]
    DiskFull { path: PathBuf, action: &'static str },
    /// The output cannot be claimed, or the finished work not be given its name.
    #[error(transparent)]
    Output(#[from] OutputError),
    /// The path is no checkpoint folder.
    #[error("{}: {detail}", path.display())]
    NotACheckpoint { path: PathBuf, detail: String },
    /// A safetensors file whose header or length is wrong.
    #[error("{}: not a valid safetensors file: {detail}", file.display())]
    Header { file: PathBuf, detail: String },
    /// A file that is something else than its name says.
    #[error("{}: it is {what}", file.display())]
    Foreign { file: PathBuf, what: String },
    /// A JSON file that does not parse.
    #[error("{}: not valid JSON: {detail}", file.display())]
    Json { file: PathBuf, detail: String },
    /// The shard index is inconsistent with the folder.
    #[error("{}: {detail}", file.display())]
    Index { file: PathBuf, detail: String },
    /// A configuration value that is missing, of the wrong type or out of range.
    #[error("{}: `{key}`: expected {expected}, found {found}", file.display())]
    Config { file: PathBuf, key: String, expected: String, found: String },
    /// A quantization method or algorithm that Recoup does not know.
    #[error("{}: unknown {what} `{found}`; Recoup reads {known}", file.display())]
    Unknown { file: PathBuf, what: &'static str, found: String, known: Cow<'static, str> },
    /// A tensor that must be there is not.
    #[error("{}: tensor `{tensor}` is missing: {why}", folder.display())]
    MissingTensor { folder: PathBuf, tensor: String, why: String },
    /// A tensor of a data type its role does not allow.
    #[error("{}: tensor `{tensor}`: expected dtype {expected}, found {found}", file.display())]
    Dtype { file: PathBuf, tensor: String, expected: String, found: String },
    /// A tensor of a shape its role does not allow.
    #[error("{}: tensor `{tensor}`: expected shape {expected}, found {found:?}", file.display())]
    Shape { file: PathBuf, tensor: String, expected: String, found: Vec<usize> },
    /// A scale that is zero, negative, NaN or infinite, or an element that is NaN.
    #[error("{}: tensor `{tensor}`: {detail}", file.display())]
    Value { file: PathBuf, tensor: String, detail: String },
    /// Configuration and stored tensors contradict each other.
    #[error("{}: module `{module}`: {detail}", file.display())]
    Conflict { file: PathBuf, module: String, detail: String },
    /// Tensors that nothing in the model uses: loading on would silently drop weights.
    #[error("{}: {total} tensor(s) that this model does not use, the first of them `{first}`; the checkpoint is of another architecture or format than its config.json says{hint}", file.display())]
    Leftover { file: PathBuf, first: String, total: usize, hint: String },
}

/// Result of reading a checkpoint.
pub type Result<T> = std::result::Result<T, CheckpointError>;

impl CheckpointError {
    /// Wraps an operating system error, telling a full disk or quota apart from the rest.
    pub(crate) fn io(path: &Path, action: &'static str, source: std::io::Error) -> Self {
        match source.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Self::DiskFull { path: path.into(), action },
            _ => Self::Io { path: path.into(), action, source },
        }
    }
}
