//! What can go wrong with a template, where, and whose fault it is.

/// Why a template does not parse or render.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    pub kind: ErrorKind,
    pub message: String,
    /// Line of the template, from 1; 0 where it is not known.
    pub line: usize,
}

/// Whose fault it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The template is no Jinja2.
    Syntax,
    /// Something that is not there was used.
    Undefined,
    /// An operation failed as it does in Python.
    Failed,
    /// Jinja2 has it and this implementation does not.
    Unsupported,
    /// The template called `raise_exception`.
    Raised,
    /// The template did too much: steps, text or depth.
    Limit,
}

pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(super) fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), line: 0 }
    }

    pub(super) fn failed(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Failed, message)
    }

    pub(super) fn unsupported(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Unsupported, message)
    }

    /// The same error with the line where it happened, unless a line closer to it is known.
    pub(super) fn at(mut self, line: u32) -> Self {
        if self.line == 0 {
            self.line = line as usize;
        }
        self
    }
}
