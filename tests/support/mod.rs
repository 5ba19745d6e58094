//! What tests share: where things are, checkpoints with reference data or made byte by byte, GGUF files, noise, the binary.
#![allow(dead_code)] // Each binary uses a part of this.

pub mod command;
pub mod engine_server;
pub mod fixtures;
pub mod fused;
pub mod gguf;
#[cfg(unix)]
pub mod held;
pub mod http;
pub mod random;
pub mod tiny;

use std::path::{Path, PathBuf};

use serde_json::Value;

pub fn project() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The path in an environment variable, or a note that the test does nothing.
pub fn path_from(variable: &str) -> Option<PathBuf> {
    let path = std::env::var_os(variable).map(PathBuf::from);
    if path.is_none() {
        println!("skipped: {variable} is not set");
    }
    path
}

pub fn json(file: &Path) -> Value {
    let bytes = std::fs::read(file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
    serde_json::from_slice(&bytes).unwrap()
}

/// The records of a file of JSON lines.
pub fn json_lines(file: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}
