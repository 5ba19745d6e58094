//! Why a GGUF file was not imported: always the file, the tensor or key, what was expected, what was found, what to do.

use std::io;
use std::path::{Path, PathBuf};

use crate::checkpoint::CheckpointError;

/// Everything that can stop an import.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GgufError {
    /// The operating system said no.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io { path: PathBuf, action: &'static str, source: io::Error },
    /// The output folder could not be written, or the model cannot be run.
    #[error(transparent)]
    Write(#[from] CheckpointError),
    /// The file is no GGUF file of a version that Recoup reads.
    #[error("{}: {detail}", file.display())]
    NotGguf { file: PathBuf, detail: String },
    /// The header contradicts itself or the length of the file.
    #[error("{}: damaged GGUF header at byte {at}: {detail}; download or convert the file again", file.display())]
    Header { file: PathBuf, at: u64, detail: String },
    /// A metadata value that is missing, of the wrong type or out of range.
    #[error("{}: metadata `{key}`: expected {expected}, found {found}", file.display())]
    Key { file: PathBuf, key: String, expected: String, found: String },
    /// A metadata key that changes the model in a way Recoup does not know.
    #[error("{}: metadata `{key}` = {found} is not known for this architecture, and ignoring it could change what the model computes", file.display())]
    UnknownKey { file: PathBuf, key: String, found: String },
    /// An architecture, tokenizer, pre-tokenizer or scaling that Recoup does not read.
    #[error("{}: unknown {what} `{found}`; Recoup imports {known}", file.display())]
    Unknown { file: PathBuf, what: &'static str, found: String, known: String },
    /// A tensor stored in a block format that Recoup does not decode.
    #[error("{}: tensor `{tensor}`: unsupported ggml type {found}; Recoup decodes {known}: convert the model to one of them (llama-quantize), or start from a BF16 or Q8_0 file", file.display())]
    TensorType { file: PathBuf, tensor: String, found: String, known: String },
    /// A tensor that the configuration calls for and the file does not have.
    #[error("{}: tensor `{tensor}` is missing: {why}", file.display())]
    MissingTensor { file: PathBuf, tensor: String, why: String },
    /// A tensor whose shape contradicts the configuration. Shapes are row-major, outermost dimension first.
    #[error("{}: tensor `{tensor}`: expected shape {expected:?}, found {found:?}", file.display())]
    Shape { file: PathBuf, tensor: String, expected: Vec<u64>, found: Vec<u64> },
    /// A tensor whose place, size or content is impossible.
    #[error("{}: tensor `{tensor}`: {detail}", file.display())]
    Tensor { file: PathBuf, tensor: String, detail: String },
    /// Tensors that the architecture does not have: going on would silently drop weights.
    #[error("{}: {total} tensor(s) that a {architecture} model does not use: {}{}; the file is of another architecture than it says, or of a newer variant",
        file.display(), names.join(", "), if *total > names.len() { ", …" } else { "" })]
    Leftover { file: PathBuf, architecture: String, names: Vec<String>, total: usize },
    /// A tokenizer whose tokens, merges or scores contradict each other.
    #[error("{}: tokenizer: {detail}", file.display())]
    Tokenizer { file: PathBuf, detail: String },
}

/// Result of importing.
pub type Result<T> = std::result::Result<T, GgufError>;

impl GgufError {
    pub(super) fn io(path: &Path, action: &'static str, source: io::Error) -> Self {
        Self::Io { path: path.into(), action, source }
    }
}
