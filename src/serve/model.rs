//! One model as it is served: its name, the text side of it, and the worker that computes.

use serde_json::{Map, Value};

use super::error::ApiError;
use super::worker::Worker;
use crate::text::grammar::GrammarFactory;
use crate::text::reply::ReplyFormat;
use crate::text::{ChatInput, ModelText};

/// How many times shorter a tokenizer may make a text before it cuts it: accents composed, spaces stripped.
const SHRINKING: usize = 4;

/// A model that is served.
pub struct ServedModel {
    /// What requests call it; the first is its own name.
    pub names: Vec<String>,
    /// Made [`ModelText::with_replies`] of the format.
    pub text: ModelText,
    pub format: ReplyFormat,
    pub grammars: GrammarFactory,
    /// Whether requests can switch thinking on and off by an argument of the template.
    pub thinking_switch: bool,
    /// Tokens of prompt and answer at most.
    pub context: usize,
    /// Bytes of its longest token.
    pub longest: usize,
    /// Logits that the model has for each token.
    pub vocab: usize,
    /// When it was loaded, in seconds since 1970.
    pub created: u64,
    /// What its weights are stored as, for people.
    pub formats: String,
    pub worker: Worker,
}

/// A conversation to be written as a prompt.
#[derive(Debug, Default)]
pub struct Conversation {
    pub messages: Vec<Value>,
    pub tools: Option<Vec<Value>>,
    pub documents: Option<Vec<Value>>,
    /// For the template.
    pub arguments: Map<String, Value>,
    /// Open the assistant's turn at the end.
    pub open: bool,
    /// The last message is to be continued.
    pub continue_last: bool,
}

impl ServedModel {
    /// Its own name.
    #[must_use]
    pub fn name(&self) -> &str {
        self.names.first().map_or("", String::as_str)
    }

    /// A conversation as the model's template writes it, and its tokens.
    ///
    /// # Errors
    /// Without a template, and where the template refuses it.
    pub fn write(&self, conversation: &Conversation) -> Result<(String, Vec<u32>), ApiError> {
        let Some(template) = self.text.template() else {
            return Err(ApiError::bad(format!(
                "{} has no chat template: it is a base model, which /v1/completions continues",
                self.name()
            )));
        };
        let unknown: Vec<&str> =
            conversation.arguments.keys().map(String::as_str).filter(|name| !template.mentions(name)).collect();
        if !unknown.is_empty() {
            let message = format!("`chat_template_kwargs`: the chat template reads none of {}", unknown.join(", "));
            return Err(ApiError::parameter("chat_template_kwargs", message));
        }
        let input = ChatInput {
            messages: &conversation.messages,
            tools: conversation.tools.as_deref(),
            documents: conversation.documents.as_deref(),
            add_generation_prompt: conversation.open,
            extra: Some(&conversation.arguments),
        };
        let text = match conversation.continue_last {
            true => template.render_continued(&input)?,
            false => template.render(&input)?,
        };
        let tokens = self.encode(&text, false)?;
        Ok((text, tokens))
    }

    /// The tokens of a text. One that is certain to be too long is not looked at: that would take its time.
    ///
    /// # Errors
    /// When it is too long, or cannot be tokenized.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>, ApiError> {
        let least = text.len() / (self.longest.max(1) * SHRINKING);
        if least > self.context {
            return Err(ApiError::too_long(least, self.context));
        }
        Ok(self.text.tokenizer().encode(text, special)?)
    }

    /// The text of a token by itself, and its bytes where they are no text of their own.
    #[must_use]
    pub fn token_text(&self, id: u32) -> (String, Vec<u8>) {
        let bytes = self.text.tokenizer().token_bytes(id).unwrap_or_default();
        (String::from_utf8_lossy(&bytes).into_owned(), bytes)
    }
}
