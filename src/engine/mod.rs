//! Sequences, their cache, sampling and generation: no HTTP, no printing.

pub mod generate;
mod generate_many;
pub mod generation_config;
mod page_pool;
pub mod pages;
pub mod scheduler;
pub mod scoring;
mod sequence;
pub mod session;

pub use generate::{Finish, GenerateError, Generated, Request, generate};
pub use generate_many::generate_many;
pub use generation_config::GenerationConfig;
pub use page_pool::PagePool;
pub use scheduler::{Limits, Plan, Scheduler};
pub use scoring::{Scorer, Sequence};
pub use sequence::Id;
pub use session::Session;

pub use crate::logits::{History, Sampled, Sampler, SamplingError, SamplingParams, Scratch};
