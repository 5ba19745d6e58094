//! Grammars of answers: JSON, JSON by a schema, regular expressions, choices, Lark and GBNF, calls of tools; llguidance keeps
//! account of which tokens may follow.
//!
//! What a request asks for and cannot be enforced is refused by name. Everything here comes from strangers: sizes are
//! bounded before a grammar is compiled, work and memory while it is and afterwards.

mod calls;
mod compile;
mod constraint;
mod factory;
mod gbnf;
mod lark;
mod parameters;
mod regex;
mod schema;
mod union;

use serde_json::Value;

use super::reply::ReplyFormat;
pub use factory::GrammarFactory;

/// What an answer has to be.
#[derive(Debug, Clone, PartialEq)]
pub enum Grammar {
    /// Any JSON object.
    JsonObject,
    /// JSON that this schema describes.
    JsonSchema(Value),
    /// A text that a regular expression of Python's `re` matches as a whole.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// What a grammar in llguidance's dialect of Lark derives from `start`; or in GBNF, from `root`, where it has `::=`.
    Lark(String),
    /// Calls of tools.
    Calls(Calls),
}

/// Calls of tools that an answer has to consist of.
#[derive(Debug, Clone, PartialEq)]
pub struct Calls {
    /// How the model writes them.
    pub format: ReplyFormat,
    /// The tools that the model was given, as the OpenAI API has them.
    pub tools: Vec<Value>,
    /// The one to call, where it is not for the model to choose; once.
    pub only: Option<String>,
    /// Whether there may be several calls.
    pub parallel: bool,
}

/// Why an answer cannot be held to a grammar.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GrammarError {
    /// A schema that is none, or says what cannot be enforced.
    #[error("JSON schema, at `{place}`: {detail}")]
    Schema {
        /// A JSON pointer; `#` is all of it.
        place: String,
        /// What was found, and what to do.
        detail: String,
    },
    /// A regular expression that is none, or none of a regular language.
    #[error("regular expression: {0}")]
    Regex(String),
    /// Choices among which none can be chosen.
    #[error("choices: {0}")]
    Choice(String),
    /// A grammar that is none.
    #[error("grammar: {0}")]
    Grammar(String),
    /// Tools that cannot be called.
    #[error("tool `{name}`: {source}")]
    Tool {
        /// Its name.
        name: String,
        /// Why.
        source: Box<GrammarError>,
    },
    /// Calls that cannot be asked for.
    #[error("calls of tools: {0}")]
    Calls(String),
}
