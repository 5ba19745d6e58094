//! Sequences, their cache, sampling and generation: no HTTP, no printing.

pub mod generate;
mod sampler;
mod sampling_params;
pub mod session;

pub use generate::{Finish, GenerateError, Generated, Request, generate};
pub use sampler::{History, Sampled, Sampler, Scratch};
pub use sampling_params::{SamplingError, SamplingParams};
pub use session::Session;
