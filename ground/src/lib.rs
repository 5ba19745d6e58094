//! What both the evaluator and the rest stand on: what is asked of a language model, how far two of them are apart, data in its
//! many formats, HTTP, and files that tell what they are, have safe names, and are written whole or not at all.

pub mod atomic;
pub mod cache;
pub mod digest;
pub mod divergence;
pub mod foreign;
pub mod http;
pub mod kept;
pub mod model;
pub mod names;
pub mod records;
pub mod shares;
pub mod shorten;
