//! Recovery: training a quantized model so that it gets back what the rounding cost.
//!
//! The student runs with the numerics it is deployed with; its scales stay as they were calibrated. What moves is a
//! *master* in f32 of each quantized weight, whose nearest codes are what the student computes with and what is written at
//! the end. Gradients pass straight through the rounding.

pub mod best_known;
pub mod block;
pub mod block_run;
pub mod budget;
pub mod data;
pub mod distill;
pub mod measure;
pub mod mixture;
pub mod optimizer;
pub mod pace;
pub mod parameter;
pub mod pretrain;
pub mod run_folder;
pub mod schedule;
pub mod session;
pub mod stage;
pub mod stored_plan;
pub mod streamed;
pub mod student;
pub mod teacher_text;
pub mod team;
pub mod trainee;
pub mod trainer;
pub mod written;

use std::path::PathBuf;

use recoup_ground::kept::difference;
use serde_json::Value;

use crate::backend::BackendError;
use crate::checkpoint::CheckpointError;
use crate::model::LoadError;

/// Why a model could not be recovered.
#[derive(Debug, thiserror::Error)]
pub enum RecoverError {
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error(transparent)]
    Backend(#[from] BackendError),
    #[error("{operation}: {source}")]
    Candle { operation: &'static str, source: candle_core::Error },
    #[error("{0}: no linear of its blocks is quantized, so there is nothing to recover; quantize it first")]
    NotQuantized(PathBuf),
    #[error(
        "{student} and {teacher} are different models: {what} is {found} in the first and {expected} in the second"
    )]
    Mismatch { student: PathBuf, teacher: PathBuf, what: &'static str, found: usize, expected: usize },
    #[error("training data: {0}")]
    Data(String),
    #[error("--method {text}: {detail}")]
    Method { text: String, detail: String },
    #[error("{}: a run was interrupted here: go on with --resume, or remove the folder", .0.display())]
    Interrupted(PathBuf),
    #[error("{}: {detail}", path.display())]
    Run { path: PathBuf, detail: String },
    /// A plan that is none, or of something else.
    #[error("{}: {detail}", path.display())]
    Plan { path: PathBuf, detail: String },
    #[error("the {what} of step {step} is {value}: training has left what numbers can hold; try a lower learning rate")]
    NotFinite { what: String, step: usize, value: f64 },
    #[error(transparent)]
    Engine(#[from] crate::engine::EngineError),
    #[error(transparent)]
    Text(#[from] crate::text::TextError),
    #[error(transparent)]
    Kept(#[from] recoup_ground::atomic::NotWritten),
    #[error("process {rank}, on {host}: {message}")]
    Rank { rank: usize, host: String, message: String },
    /// What is asked for makes no sense.
    #[error("{0}")]
    Asked(String),
    #[error("training data: {0}")]
    Corpus(#[from] crate::corpus::CorpusError),
}

/// Result of recovery.
pub type Result<T, E = RecoverError> = std::result::Result<T, E>;

/// Says which operation candle failed in.
trait During<T> {
    fn during(self, operation: &'static str) -> Result<T>;
}

impl<T> During<T> for candle_core::Result<T> {
    fn during(self, operation: &'static str) -> Result<T> {
        self.map_err(|source| RecoverError::Candle { operation, source })
    }
}

/// Where two descriptions of a run first differ, and what stands there, as [`difference`] has it. What multiplies is named where it
/// is not the CPU: here the CPU is named, too.
#[must_use]
pub fn differing(found: &Value, expected: &Value) -> Option<(String, String, String)> {
    let (at, was, is) = difference(found, expected)?;
    let told = |value: &Value| if at == "device" && value.is_null() { "cpu".to_owned() } else { value.to_string() };
    let (was, is) = (told(was), told(is));
    Some((at, was, is))
}
