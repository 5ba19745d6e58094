//! Evaluation of language models, whatever runs them: tasks, scores, statistics, reports.
//!
//! Knows nothing of any engine: an engine implements [`LanguageModel`] (and [`TokenModel`] where it can).

pub mod compare;
pub mod comparison;
pub mod divergence;
pub mod journal;
pub mod perplexity;
pub mod report;
pub mod run;
pub mod scores;
mod settings;
pub mod statistics;
pub mod tasks;

pub use divergence::{TokenModel, TokenReader};
pub use recoup_ground::model::{
    GenerationDefaults, GenerationOptions, LanguageModel, Message, Prompts, Request, Response,
};
