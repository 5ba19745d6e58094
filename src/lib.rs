//! Recoup: quantize language models to NVFP4 and FP8, recover what that cost, prove it, and run them on any CPU.
//!
//! ARCHITECTURE.md is the map. Dependencies point one way:
//! {formats, output} ← checkpoint ← model ← {gguf, engine ← {quantize, recover, evaluate}} ← cli, {checkpoint, logits} ← text
//! ← {corpus, engine}, and
//! {formats, logits} ← backend ← model.

#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::todo))]

pub mod backend;
pub mod checkpoint;
pub mod cli;
pub mod corpus;
pub mod engine;
pub mod evaluate;
pub mod formats;
pub mod gguf;
pub mod logits;
pub mod model;
pub mod output;
pub mod quantize;
pub mod random;
pub mod ranks;
pub mod recover;
pub mod serve;
pub mod text;
