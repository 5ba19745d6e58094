//! Why a model could not be quantized.

use std::path::PathBuf;

use crate::checkpoint::CheckpointError;
use crate::checkpoint::dialect::Dialect;
use crate::model::LoadError;

/// Why a model could not be quantized.
#[derive(Debug, thiserror::Error)]
pub enum QuantizeError {
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error(transparent)]
    Backend(#[from] crate::backend::BackendError),
    #[error(transparent)]
    Engine(#[from] crate::engine::EngineError),
    #[error("calibration: {0}")]
    Calibration(String),
    #[error("calibration: {0}")]
    Corpus(#[from] crate::corpus::CorpusError),
    #[error("{of}: {detail}")]
    Text { of: String, detail: String },
    #[error("recipe `{file}`: {detail}")]
    Recipe { file: String, detail: String },
    #[error("module `{module}`: {detail}")]
    Module { module: String, detail: String },
    #[error("{0}: nothing in it is quantized, it is a plain model already")]
    Nothing(PathBuf),
    #[error("{0}: its KV cache is quantized; `recoup convert` it to BF16 first")]
    KvCache(PathBuf),
    #[error("--model-shape: {0}")]
    Shape(String),
    #[error("the {0} dialect is read only; those that can be written: {known}", known = written())]
    Dialect(Dialect),
}

fn written() -> String {
    Dialect::written().map(Dialect::name).collect::<Vec<_>>().join(", ")
}
