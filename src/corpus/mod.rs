//! Text to work on, from files: what they hold as documents of tokens or as one text, and what of them is not used.
//!
//! Training, calibration and the texts of a comparison are all read here.

mod cut;
mod reader;
mod record;

pub use cut::{Document, Row, pack, spread, windows};
pub use reader::{Counts, Documents, Enough, Opened, Reader, text_of};

use crate::text::TextError;

/// Public-domain prose for whoever gives no text: the opening of a novel (Standard Ebooks, CC0).
pub const BUILT_IN: &str = include_str!("calibration.txt");

/// Why a text could not be read.
#[derive(Debug, thiserror::Error)]
pub enum CorpusError {
    /// What is wrong, with the file and where it has lines, the line.
    #[error("{0}")]
    Data(String),
    #[error(transparent)]
    Records(#[from] recoup_ground::records::RecordsError),
    #[error(transparent)]
    Text(#[from] TextError),
}

/// Result of reading texts.
pub type Result<T, E = CorpusError> = std::result::Result<T, E>;
