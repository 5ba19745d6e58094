//! Checks whether a response follows IFEval's instructions.

/// Per instruction, whether the response follows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// The response as it is.
    pub strict: Vec<bool>,
    /// Any of the eight variants without first line, last line, asterisks.
    pub loose: Vec<bool>,
}

/// What can be wrong with an instruction.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no checker of that name.
    #[error("no checker for instruction {0:?}")]
    Unknown(String),
}

/// Checks `response` against the instructions of a prompt.
///
/// # Errors
/// When an instruction is not known.
pub fn check(
    instruction_ids: &[String],
    _kwargs: &[serde_json::Value],
    _prompt: &str,
    _response: &str,
) -> Result<Verdict, Error> {
    Err(Error::Unknown(instruction_ids.join(", ")))
}
