//! The decoder: one for every supported architecture, generic over the backend.

pub mod blocks;
pub mod config;
pub mod consistency;
pub mod decoder;
pub mod inspection;
mod layer;
mod load;
pub mod memory;
pub mod modules;
#[cfg(feature = "parallel")]
pub mod parallel;
pub mod rope;

pub use blocks::Blocks;
pub use config::ModelConfig;
pub use decoder::{Decoder, LoadError, Wanted};
pub use load::Source;
