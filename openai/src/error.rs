//! What can go wrong between an evaluation and a server, and what to do about it.

use std::fmt;

use thiserror::Error;

use super::said::Said;
use recoup_ground::http::{Broken, Unusable, retry};

/// A failure: what was asked, where, and what came of it. Never holds the API key, or a user or password of the address.
#[derive(Debug, Error)]
#[error("{asked} ({url}{}): {fault}", via.as_ref().map_or_else(String::new, |v| format!(", {v}")))]
pub struct Error {
    pub asked: Asked,
    pub url: String,
    /// The proxy that was asked.
    pub via: Option<String>,
    pub fault: Fault,
}

/// What the evaluation was asking when it failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// To be set up.
    Settings,
    /// Which models the server has.
    Models,
    /// Whether the server's log-probabilities of a prompt can be believed.
    EchoCheck,
    /// The request of this index in the slice given to `answer`.
    Request(usize),
    /// To render a chat.
    ChatPrompt,
    /// What it says of given tokens, or makes of a text.
    Tokens,
    /// For an answer whose speed is measured.
    Timed,
}

impl fmt::Display for Asked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Settings => f.write_str("settings of the server"),
            Self::Models => f.write_str("list of the server's models"),
            Self::EchoCheck => f.write_str("check of the server's log-probabilities"),
            Self::Request(index) => write!(f, "request {index}"),
            Self::ChatPrompt => f.write_str("chat prompt"),
            Self::Tokens => f.write_str("log-probabilities of tokens"),
            Self::Timed => f.write_str("a timed answer"),
        }
    }
}

/// The cause of an [`Error`].
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Fault {
    #[error("not a server's address: {0}; expected http://host:port/v1 or https://host/v1")]
    Url(Box<Unusable>),
    #[error("{0}")]
    Unusable(Box<Unusable>),
    #[error("the API key has characters that no HTTP header can hold")]
    Key,
    #[error("field `{field}`: {problem}")]
    Field { field: String, problem: &'static str },
    #[error(transparent)]
    Transport(#[from] Broken),
    /// `within`: inside of an answer of success; `status` is what it stands for then.
    #[error("{}{said}{hint}", if *within { "the server says: ".to_owned() } else { format!("HTTP {status}: ") })]
    Refused { status: u16, within: bool, said: Box<Said>, hint: &'static str },
    #[error("{fault}; the server asks to wait {seconds} s, which is too long: start the same command again then")]
    AsksToWait { fault: Box<Fault>, seconds: u64 },
    #[error("longer than the server's context: {0}")]
    TooLong(String),
    #[error("an HTML page instead of JSON (`{start}`); is this the address of an API, with /v1?")]
    Html { start: String },
    #[error("not JSON ({reason}): `{start}`")]
    NotJson { reason: String, start: String },
    #[error("the answer is not of the OpenAI API: {0}")]
    Unexpected(String),
    #[error("the server has no model; load one")]
    NoModel,
    #[error("the server has {} models, name one of them: {}", .0.len(), .0.join(", "))]
    SeveralModels(Vec<String>),
    #[error(
        "the server does not echo the prompt ({found}), so it cannot score given text; use a server that supports `echo` \
         with `logprobs` in /v1/completions"
    )]
    NoEcho { found: String },
    #[error(
        "the server echoes the prompt without log-probabilities of its tokens ({found}); use a server that supports \
         `echo` with `logprobs`"
    )]
    NoPromptLogProbs { found: String },
    #[error(
        "the server contradicts itself: it generated `{token}` with log-probability {generated:.3} and gives the same \
         token {echoed:.3} when it is part of the prompt, so its scores mean nothing. llama-cpp-python does this to \
         models that have no BOS token of their own; there the option `prefix` with the BOS token's text helps"
    )]
    EchoContradicts { token: String, generated: f64, echoed: f64 },
    #[error("the server generated nothing with log-probabilities, so its scores of given text cannot be checked")]
    EchoUnchecked,
    #[error(
        "no log-probability for `{token}`, which needs scoring: nothing stands before it; set the option `prefix` to \
         the text of the model's BOS token. Where that is set, the server hides it (llama-cpp-python does): tasks with \
         empty contexts, such as BLiMP, cannot be scored there"
    )]
    NothingBefore { token: String },
    #[error("the server's tokens do not add up: {0}")]
    Misaligned(String),
    #[error("chat mode can only generate; score with chat mode off, with prompts that hold the template's text")]
    ChatScoring,
    #[error("the chat template is the server's: turn on chat mode to have it applied")]
    NoTemplate,
    #[error("a plain prompt in chat mode; have the task make chats (apply the chat template), or turn chat mode off")]
    NotChat,
}

impl Fault {
    /// Whether another try of the same request may succeed.
    pub(super) fn is_transient(&self) -> bool {
        match self {
            Self::Transport(broken) => broken.may_pass(),
            Self::Refused { status, .. } => retry::may_pass(*status),
            _ => false,
        }
    }

    /// What to count a further try under.
    pub(super) fn cause(&self) -> String {
        match self {
            Self::Refused { within: true, .. } => "an error inside of an answer".to_owned(),
            Self::Refused { status, .. } => format!("HTTP {status}"),
            Self::Transport(Broken::TimedOut(_)) => "a time-out".to_owned(),
            _ => "a broken connection".to_owned(),
        }
    }
}
