//! Our models under the evaluator: what `recoup_eval` asks, answered by the packed decoder; one model evaluated, several
//! compared. Nothing here prints.

pub mod attribution;
pub mod bench;
pub mod device_check;
pub mod evaluation;
pub mod experiment;
pub mod facts;
pub mod kernel_check;
mod language_model;
#[cfg(feature = "parallel")]
pub mod scale;
pub mod throughput;
pub mod verify;
mod watch;

pub use crate::text::ModelText;
pub use language_model::{EvaluateError, EvaluatedModel, Rows};
pub use watch::Watch;
