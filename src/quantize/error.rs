//! Why a model could not be quantized.

use std::path::PathBuf;

use crate::checkpoint::CheckpointError;
use crate::checkpoint::dialect::Dialect;
use crate::model::config::Plain;
use crate::model::{LoadError, ModelConfig};

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
    #[error(
        "{what} is for decoders whose layers are attention and a SiLU-gated feed-forward, which {architecture} is not; leave it \
         out of the recipe"
    )]
    Architecture { what: &'static str, architecture: String },
    #[error("--model-shape: {0}")]
    Shape(String),
    #[error("the {0} dialect is read only; those that can be written: {known}", known = written())]
    Dialect(Dialect),
}

/// What is alike in all layers of a plain decoder.
///
/// # Errors
/// When it is none, which `what` needs.
pub(super) fn plain(config: &ModelConfig, what: &'static str) -> Result<Plain, QuantizeError> {
    let architecture = || config.architecture.class();
    config.plain().ok_or_else(|| QuantizeError::Architecture { what, architecture: architecture() })
}

fn written() -> String {
    Dialect::written().map(Dialect::name).collect::<Vec<_>>().join(", ")
}
