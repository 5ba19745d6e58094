//! What a model wrote, taken apart while it comes: its thinking, its answer, its calls of tools, by the format of its family.
//!
//! Nothing is lost: the texts of all [`Piece`]s, one after the other, are what was written, however the stream was cut into
//! parts.

mod format;
mod kinds;
mod splitter;
mod tool_call;

use serde_json::{Value, json};

pub(crate) use format::CallStyle;
pub use format::{Calls, Reasoning, ReplyFormat};
pub(crate) use kinds::{kinds, name, parameters};
pub use splitter::Splitter;

/// What a part of a reply is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Thinking, which is not for the user.
    Thinking,
    /// The answer to the user.
    Answer,
    /// A call of a tool as the model writes it, to be read as a whole: see [`Reply::calls`].
    Call,
    /// What separates these: tags, headers of messages, line ends around them.
    Markup,
}

/// A part of a reply, as far as it is certain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    pub kind: Kind,
    pub text: String,
}

/// A call of a tool.
#[derive(Debug, Clone, PartialEq)]
pub struct ToolCall {
    pub name: String,
    /// An object by parameter; a text where a tool takes none (code).
    pub arguments: Value,
}

impl ToolCall {
    /// As messages of a conversation have it: templates expect arguments as an object, and some nine signs of `id`.
    #[must_use]
    pub fn message(&self, id: &str) -> Value {
        json!({"id": id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}})
    }
}

/// A call that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Malformed {
    /// As it was written.
    pub text: String,
    /// What was expected and what is there.
    pub why: String,
}

/// A whole reply. Several messages of one kind are apart by an empty line.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Reply {
    pub thinking: String,
    pub answer: String,
    pub calls: Vec<ToolCall>,
    pub malformed: Vec<Malformed>,
    /// The reply ended inside of the thinking: there is no answer yet.
    pub unfinished: bool,
}

impl Reply {
    /// The assistant's message that this reply is in a conversation, for the chat template to write as its maker wants it:
    /// most drop the thinking of earlier turns. gpt-oss's has no place for words to the user before a call; it refuses them
    /// beside thinking, which counts more there.
    #[must_use]
    pub fn message(&self, format: &ReplyFormat) -> Value {
        let of_call = !self.calls.is_empty() && !self.thinking.is_empty();
        let is_left_out = of_call && format.reasoning == Some(Reasoning::Harmony);
        let mut message = json!({"role": "assistant", "content": if is_left_out { "" } else { &self.answer }});
        if !self.thinking.is_empty() {
            message["reasoning_content"] = self.thinking.clone().into();
        }
        if !self.calls.is_empty() {
            let with_id = |(i, call): (usize, &ToolCall)| call.message(&format!("call{i:05}"));
            message["tool_calls"] = self.calls.iter().enumerate().map(with_id).collect();
        }
        message
    }
}
