//! Models behind HTTP: OpenAI's API with vLLM's additions, their metrics, and a page.
//!
//! Requests are understood in [`api`], computed by a [`worker`] for each model, which owns an engine, and written back as they
//! come. Nothing of a request reaches the file system or the network.

mod api;
pub mod error;
pub mod http;
pub mod metrics;
pub mod model;
mod page;
mod peers;
mod reports;
pub mod state;
pub mod worker;
