//! Files as documents of tokens: plain text, and lines of JSON with documents or conversations.

use std::path::Path;

use rayon::prelude::*;
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

/// Length of a document that a long text is cut into, bytes: the memory that a tokenizer takes is some hundred times that.
const PIECE: usize = 1 << 14;
/// Text that is read for each token that is wanted, bytes.
const BYTES_PER_WANTED: usize = 16;

/// Cuts a text after line ends into pieces of `size` bytes or somewhat more; within a line only where that is as long.
fn pieces(text: &str, size: usize) -> Vec<&str> {
    let mut pieces = Vec::new();
    let mut rest = text;
    while rest.len() > size {
        let bytes = rest.as_bytes();
        let near = &bytes[size..bytes.len().min(2 * size)];
        // After all of the line ends there, so that no piece begins with one.
        let line = near.iter().position(|b| *b == b'\n').map(|at| {
            let end = size + at;
            end + bytes[end..].iter().take_while(|b| **b == b'\n').count()
        });
        let word = || near.iter().position(|b| *b == b' ').map(|at| size + at);
        let cut =
            line.or_else(word).unwrap_or_else(|| (size..).find(|i| rest.is_char_boundary(*i)).unwrap_or(rest.len()));
        let (piece, next) = rest.split_at(cut);
        pieces.push(piece);
        rest = next;
    }
    if !rest.is_empty() {
        pieces.push(rest);
    }
    pieces
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

    /// Reads a file: `.jsonl` has `messages` (a conversation) or `text` (a document) in each line, all else is one text,
    /// cut at line ends into documents of some 16 KiB. Where only so many tokens are `wanted`, evenly spaced documents of
    /// the text that hold several times as many are enough.
    ///
    /// # Errors
    /// A file that cannot be read, or a line in it, by number.
    pub fn read(&self, file: &Path, wanted: Option<usize>) -> Result<Documents> {
        let read = |source| RecoverError::Read { path: file.into(), source };
        let mut text = std::fs::read_to_string(file).map_err(read)?;
        if file.extension().is_none_or(|e| e != "jsonl") {
            if text.contains('\r') {
                text = text.replace("\r\n", "\n");
            }
            let pieces = pieces(&text, PIECE);
            let enough =
                wanted.map_or(pieces.len(), |w| (w.saturating_mul(BYTES_PER_WANTED) / PIECE + 1).min(pieces.len()));
            let chosen: Vec<&str> = (0..enough).map(|i| pieces[i * pieces.len() / enough]).collect();
            let one = |piece: &&str| Ok(Document::text(self.tokenizer.encode(piece, false)?));
            let documents: Vec<Result<Document>> = chosen.par_iter().map(one).collect();
            return Ok(Documents { documents: documents.into_iter().collect::<Result<_>>()?, whole: false });
        }
        let lines: Vec<(usize, &str)> = text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()).collect();
        let read: Vec<Result<(Document, bool)>> = lines
            .par_iter()
            .map(|(number, line)| {
                self.line(line).map_err(|e| {
                    let detail = if let RecoverError::Data(detail) = e { detail } else { e.to_string() };
                    RecoverError::Data(format!("{}, line {}: {detail}", file.display(), number + 1))
                })
            })
            .collect();
        let mut out = Documents::default();
        for one in read {
            let (document, whole) = one?;
            out.whole |= whole;
            out.documents.push(document);
        }
        Ok(out)
    }

    /// A line of JSON, and whether it is a conversation.
    fn line(&self, line: &str) -> Result<(Document, bool)> {
        let wrong = |detail: String| RecoverError::Data(detail);
        let value: Value = serde_json::from_str(line).map_err(|e| wrong(format!("no JSON ({e})")))?;
        match (value.get("messages"), value.get("text")) {
            (Some(Value::Array(messages)), _) => Ok((self.conversation(messages)?, true)),
            (None, Some(Value::String(text))) => {
                let mut tokens = self.tokenizer.encode(text, false)?;
                tokens.extend(self.tokenizer.eos_id());
                Ok((Document::text(tokens), false))
            }
            _ => Err(wrong("expected `messages` (a list of turns) or `text` (a string)".into())),
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_cut_after_lines_where_it_has_them_and_nothing_is_lost() {
        let lines = "one\ntwo three\n\n\nfour\n".repeat(40);
        let cut = pieces(&lines, 64);
        assert!(cut.len() > 8);
        assert_eq!(cut.concat(), lines);
        assert!(cut.iter().all(|p| p.ends_with('\n') && !p.starts_with('\n') && p.len() < 128), "{cut:?}");
        let words = "word ".repeat(100);
        let cut = pieces(&words, 64);
        assert_eq!(cut.concat(), words);
        assert!(cut.iter().skip(1).all(|p| p.starts_with(" word")), "{cut:?}");
        let one = "ä".repeat(100);
        let cut = pieces(&one, 63);
        assert_eq!((cut.concat(), cut[0].len()), (one, 64));
        assert_eq!(pieces("short", 64), ["short"]);
        assert!(pieces("", 64).is_empty());
    }
}
