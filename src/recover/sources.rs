//! Files as documents of tokens: plain text, and lines of JSON with documents or conversations.

use std::path::Path;

use serde_json::Value;

use super::data::Document;
use super::{RecoverError, Result};
use crate::text::{ChatInput, ChatTemplate, Tokenizer};

/// What a file holds.
#[derive(Clone, Debug, Default)]
pub struct Documents {
    pub documents: Vec<Document>,
    /// Whether they are conversations, which are not to be cut.
    pub whole: bool,
}

/// A model's tokenizer and, if it has one, its template.
pub struct Reader {
    pub tokenizer: Tokenizer,
    pub template: Option<ChatTemplate>,
    /// Of conversations, only what the assistant says is learned.
    pub assistant_only: bool,
}

impl Reader {
    /// The reader of a model's folder.
    ///
    /// # Errors
    /// When it has no tokenizer, or a template that cannot be read.
    pub fn of(folder: &Path, assistant_only: bool) -> Result<Self> {
        Ok(Self {
            tokenizer: Tokenizer::from_folder(folder)?,
            template: ChatTemplate::from_folder(folder)?,
            assistant_only,
        })
    }

    /// Reads a file: `.jsonl` has `messages` (a conversation) or `text` (a document) in each line, all else is one text.
    ///
    /// # Errors
    /// A file that cannot be read, or a line in it, by number.
    pub fn read(&self, file: &Path) -> Result<Documents> {
        let read = |source| RecoverError::Read { path: file.into(), source };
        let text = std::fs::read_to_string(file).map_err(read)?;
        if file.extension().is_none_or(|e| e != "jsonl") {
            let text = text.replace("\r\n", "\n");
            return Ok(Documents {
                documents: vec![Document::text(self.tokenizer.encode(&text, false)?)],
                whole: false,
            });
        }
        let mut out = Documents::default();
        for (number, line) in text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()) {
            let wrong =
                |detail: String| RecoverError::Data(format!("{}, line {}: {detail}", file.display(), number + 1));
            let value: Value = serde_json::from_str(line).map_err(|e| wrong(format!("no JSON ({e})")))?;
            match (value.get("messages"), value.get("text")) {
                (Some(Value::Array(messages)), _) => {
                    out.whole = true;
                    out.documents.push(self.conversation(messages).map_err(|e| wrong(e.to_string()))?);
                }
                (None, Some(Value::String(text))) => {
                    let mut tokens = self.tokenizer.encode(text, false)?;
                    tokens.extend(self.tokenizer.eos_id());
                    out.documents.push(Document::text(tokens));
                }
                _ => return Err(wrong("expected `messages` (a list of turns) or `text` (a string)".into())),
            }
        }
        Ok(out)
    }

    /// A conversation as the template writes it. What the assistant says is what a turn of its adds to the opening of it.
    fn conversation(&self, messages: &[Value]) -> Result<Document> {
        let Some(template) = &self.template else {
            return Err(RecoverError::Data("`messages` need a chat template, and the student has none".into()));
        };
        let render = |messages, add_generation_prompt| {
            template.render(&ChatInput { messages, add_generation_prompt, ..ChatInput::default() })
        };
        let text = render(messages, false)?;
        let (tokens, starts) = self.tokenizer.encode_with_starts(&text)?;
        if !self.assistant_only {
            return Ok(Document::text(tokens));
        }
        let mut learned = vec![false; tokens.len()];
        for (i, _) in messages.iter().enumerate().filter(|(_, m)| m["role"] == "assistant") {
            let (opening, whole) = (render(&messages[..i], true)?, render(&messages[..=i], false)?);
            if !text.starts_with(&whole) || !whole.starts_with(&opening) {
                let detail = "the chat template writes earlier turns differently later on, so what the assistant said cannot \
                              be told apart; leave --assistant-only out";
                return Err(RecoverError::Data(detail.into()));
            }
            for (learned, start) in learned.iter_mut().zip(&starts) {
                *learned |= (opening.len()..whole.len()).contains(start);
            }
        }
        Ok(Document { tokens, learned })
    }
}
