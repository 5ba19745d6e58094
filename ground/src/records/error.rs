//! What can be wrong with a file of data: for people.

use std::path::PathBuf;

/// Why data cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum RecordsError {
    /// A file could not be read.
    #[error("{}: cannot be read: {source}", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    /// A place in a file whose content is wrong; lines count from 1.
    #[error("{file}, line {line}: {message}")]
    Wrong { file: String, line: usize, message: String },
    /// A whole file that is something else than data that can be read.
    #[error("{file}: {message}")]
    Unreadable { file: String, message: String },
    /// A folder or a pattern without any file of data.
    #[error(
        "{pattern}: no file of data there{found}; expected .jsonl, .json, .csv, .tsv, .parquet or .txt, also .gz or .zst"
    )]
    NoFiles { pattern: String, found: String },
    /// A pattern that means nothing.
    #[error("{pattern}: no pattern of file names: {message}")]
    Pattern { pattern: String, message: String },
    /// The same file under two names, or twice.
    #[error("{first} and {second} are the same file; give it once")]
    Twice { first: String, second: String },
}
