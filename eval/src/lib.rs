//! Evaluation of language models, whatever runs them: tasks, scores, statistics, reports.
//!
//! Knows nothing of any engine: an engine implements [`LanguageModel`] (and [`TokenModel`] where it can); the crate itself
//! implements it for any OpenAI-compatible server.

pub mod compare;
pub mod comparison;
pub mod divergence;
pub mod foreign;
pub mod http;
pub mod ifeval;
pub mod journal;
pub mod model;
pub mod names;
pub mod openai;
pub mod perplexity;
pub mod records;
pub mod report;
pub mod run;
pub mod scores;
mod settings;
pub mod statistics;
pub mod tasks;

pub use divergence::TokenModel;
pub use model::{GenerationDefaults, GenerationOptions, LanguageModel, Message, Request, Response};

/// SHA-256 in hexadecimal.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    use sha2::Digest as _;
    sha2::Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}
