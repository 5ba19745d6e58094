//! What fuzzing shares: how one input holds a whole checkpoint, and mutations that know its structure. The tests
//! use it too, without libFuzzer (tests/library/fuzz.rs).

#[path = "../../tests/support/fused.rs"]
pub mod fused;
#[path = "../../tests/support/random.rs"]
pub mod random;
#[path = "../../tests/support/tiny.rs"]
pub mod tiny;

#[cfg(feature = "targets")]
pub mod checkpoint;
#[cfg(feature = "targets")]
pub mod configuration;
pub mod corpus;
pub mod mutate;
mod parts;

pub use parts::Parts;
