//! The engine that every use of a model runs on: sequences, their pages, who computes next, sampling. No HTTP, no printing.

#[allow(clippy::module_inception)]
mod engine;
mod generate;
mod logits;
mod pages;
mod runner;
mod scheduler;
mod scoring;
mod sequence;
mod speculation;
mod stats;

pub use engine::{Engine, EngineError, Event};
pub use generate::{Finish, Generated, PromptScore, Request, StopReason, answer, answer_all};
pub use logits::logits;
pub use scheduler::Limits;
pub use scoring::{Sequence, score_all};
pub use sequence::Id;
pub use speculation::Speculation;
pub use stats::Stats;
