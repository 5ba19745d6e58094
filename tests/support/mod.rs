//! What tests share: checkpoints with reference data, checkpoints made byte by byte, GGUF files, and commands that are held.
#![allow(dead_code)] // Each binary uses a part of this.

pub mod fixtures;
pub mod gguf;
#[cfg(unix)]
pub mod held;
pub mod tiny;
