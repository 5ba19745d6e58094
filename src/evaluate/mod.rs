//! Our models under the evaluator: what `recoup_eval` asks, answered by the packed decoder.

pub mod attribution;
pub mod facts;
pub mod kernel_check;
mod language_model;

pub use language_model::{EvaluateError, EvaluatedModel, ModelText, Rows};
