//! Files as documents of tokens: texts, and records of documents, conversations or token ids; and the count of what was not
//! taken.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use recoup_ground::records::{self, Content, Records};
use serde::Serialize;
use serde_json::Value;

use super::record::{self, Meaning, Meant};
use super::{CorpusError, Document, Result, Row, pack};
use crate::text::{ChatTemplate, ModelText};

/// What a file, or the files of a folder or pattern, hold.
#[derive(Clone, Debug, Default)]
pub struct Documents {
    /// They go on in the next row where one is full.
    pub texts: Vec<Document>,
    /// Conversations and prompts with their answers, which are not to be cut.
    pub whole: Vec<Document>,
    /// Sequences that were given as token ids.
    pub ids: Vec<Document>,
    pub counts: Counts,
}

/// What was read, and what of it is not used: told to the user, and kept beside the model.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    pub texts: usize,
    pub conversations: usize,
    pub token_sequences: usize,
    /// Conversations that were longer than a row and lost their ends.
    pub cut: usize,
    pub tokens: usize,
    pub tokens_cut: usize,
    /// What has no token left to predict: empty texts, conversations without a word of the assistant.
    pub nothing_to_learn: usize,
    /// Fields that no part of what was read was made from, with the number of records that have them.
    pub unused_fields: BTreeMap<String, usize>,
    /// Files of a folder whose names tell no format.
    pub files_not_read: Vec<String>,
}

/// Fields and files that are named at most.
const NAMED: usize = 8;

impl Counts {
    /// What there is to say of the data called `name`, where a row has `length` tokens, with the word that says how much it
    /// matters.
    #[must_use]
    pub fn notes(&self, name: &str, length: usize) -> Vec<String> {
        let mut notes = Vec::new();
        let of = |n: usize, what: &str| (n > 0).then(|| format!("{n} {what}"));
        let all =
            [of(self.conversations, "conversations"), of(self.texts, "texts"), of(self.token_sequences, "sequences")];
        let all = all.into_iter().flatten().collect::<Vec<_>>().join(" and ");
        let several = |names: Vec<String>| {
            let more = names.len().saturating_sub(NAMED);
            let more = if more == 0 { String::new() } else { format!(" and {more} more") };
            names.into_iter().take(NAMED).collect::<Vec<_>>().join(", ") + &more
        };
        if self.cut > 0 {
            notes.push(format!(
                "warning: {name}: {} of {all} are longer than {length} tokens (--length) and were cut: {} of {} tokens are lost",
                self.cut, self.tokens_cut, self.tokens
            ));
        }
        if self.nothing_to_learn > 0 {
            notes.push(format!(
                "warning: {name}: {} of {all} have nothing to learn from and were left out",
                self.nothing_to_learn
            ));
        }
        if !self.unused_fields.is_empty() {
            let fields = self.unused_fields.iter().map(|(field, n)| format!("{field} ({n})")).collect();
            notes.push(format!(
                "note: {name}: fields that are not used, with the number of records: {}",
                several(fields)
            ));
        }
        if !self.files_not_read.is_empty() {
            let files = self.files_not_read.clone();
            notes.push(format!(
                "note: {name}: files that are not read, as their names tell no format: {}",
                several(files)
            ));
        }
        notes
    }

    fn unused(&mut self, fields: Vec<String>) {
        fields.into_iter().for_each(|f| *self.unused_fields.entry(f).or_default() += 1);
    }
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

/// A source as it was read, before any of it is tokens.
#[derive(Clone, Debug, Default)]
pub struct Opened {
    pub texts: Vec<String>,
    pub records: Vec<Records>,
    /// Files of a folder whose names tell no format.
    pub files_not_read: Vec<String>,
}

impl Opened {
    /// Reads a file, the files of a folder, those that a pattern fits, or standard input (`-`).
    ///
    /// # Errors
    /// A file that cannot be read, or is not what it seems to be.
    pub fn read(source: &Path) -> Result<Self> {
        let found = records::expand(source)?;
        let name = |p: PathBuf| p.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let files_not_read = found.others.into_iter().map(name).collect();
        let mut out = Self { files_not_read, ..Self::default() };
        for file in found.files {
            match records::read(&file)? {
                Content::Text(text) => out.texts.push(text),
                Content::Records(records) => out.records.push(records),
            }
        }
        Ok(out)
    }

    /// The sequences, where all that it holds is token ids, which need no tokenizer.
    ///
    /// # Errors
    /// What is wrong with a record, with its line.
    pub fn token_ids(&self) -> Result<Option<Vec<Vec<u32>>>> {
        let mut all = Vec::new();
        for records in &self.records {
            for i in 0..records.len() {
                let meant = placed(records, i, |v| record::meaning(v).map_err(CorpusError::Data))?;
                match meant.meaning {
                    Meaning::Tokens(rows) => all.extend(rows),
                    _ => return Ok(None),
                }
            }
        }
        Ok(self.texts.iter().all(String::is_empty).then_some(all).filter(|a| !a.is_empty()))
    }
}

/// How much of the data is needed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Enough {
    /// So many tokens: evenly spaced pieces of a long text that hold several times as many are read.
    pub tokens: Option<usize>,
    /// So many records, evenly spaced.
    pub records: Option<usize>,
}

/// Reads files for a model.
pub struct Reader {
    pub text: ModelText,
    /// Of conversations, only what the assistant says is learned.
    pub assistant_only: bool,
    /// Whether the token that ends a text is written after each document.
    pub ends: bool,
}

/// What one record gave.
#[derive(Default)]
struct One {
    texts: Vec<Document>,
    whole: Vec<Document>,
    ids: Vec<Document>,
    unused: Vec<String>,
}

impl Reader {
    /// What files hold as tokens: records are documents, conversations or token ids, see `record::meaning`; a
    /// text is cut at line ends into documents of some 16 KiB.
    ///
    /// # Errors
    /// What is wrong with a record, with its line.
    pub fn read(&self, opened: &Opened, enough: Enough) -> Result<Documents> {
        let mut out = Documents::default();
        for text in &opened.texts {
            out.texts.extend(self.text(text, enough.tokens)?);
        }
        for records in &opened.records {
            let share = |n: usize| n.div_ceil(opened.records.len());
            self.records(records, enough.records.map(share), &mut out)?;
        }
        out.counts.files_not_read.clone_from(&opened.files_not_read);
        out.counts.texts = out.texts.len();
        out.counts.conversations = out.whole.len();
        out.counts.token_sequences = out.ids.len();
        out.counts.tokens = [&out.texts, &out.whole, &out.ids].into_iter().flatten().map(|d| d.tokens.len()).sum();
        Ok(out)
    }

    fn text(&self, text: &str, wanted: Option<usize>) -> Result<Vec<Document>> {
        let pieces = pieces(text, PIECE);
        let enough =
            wanted.map_or(pieces.len(), |w| (w.saturating_mul(BYTES_PER_WANTED) / PIECE + 1).min(pieces.len()));
        let chosen: Vec<&str> = (0..enough).map(|i| pieces[i * pieces.len() / enough]).collect();
        chosen.par_iter().map(|piece| Ok(Document::text(self.text.tokenizer().encode(piece, false)?))).collect()
    }

    fn records(&self, records: &Records, wanted: Option<usize>, out: &mut Documents) -> Result<()> {
        let enough = wanted.unwrap_or(usize::MAX).min(records.len());
        let chosen: Vec<usize> = (0..enough).map(|i| i * records.len() / enough).collect();
        let one = |i: &usize| placed(records, *i, |value| self.record(value));
        let read: Vec<Result<One>> = chosen.par_iter().map(one).collect();
        for one in read {
            let one = one?;
            out.texts.extend(one.texts);
            out.whole.extend(one.whole);
            out.ids.extend(one.ids);
            out.counts.unused(one.unused);
        }
        Ok(())
    }

    fn record(&self, value: &Value) -> Result<One> {
        let Meant { meaning, unused } = record::meaning(value).map_err(CorpusError::Data)?;
        let mut one = One { unused, ..One::default() };
        let end = || self.text.tokenizer().eos_id().filter(|_| self.ends);
        match meaning {
            Meaning::Text(text) => {
                let mut tokens = self.text.tokenizer().encode(&text, false)?;
                tokens.extend(end());
                one.texts.push(Document::text(tokens));
            }
            Meaning::Completion { prompt, completion } => {
                let learned = if self.assistant_only { prompt.len()..usize::MAX } else { 0..usize::MAX };
                let mut document = record::document(self.text.tokenizer(), &(prompt + &completion), &[learned])?;
                document.tokens.extend(end());
                document.learned.resize(document.tokens.len(), true);
                one.whole.push(document);
            }
            Meaning::Conversation(conversation) => {
                let (text, said) = conversation.render(needed(self.text.template())?, self.assistant_only)?;
                one.unused.extend(unwritten(&conversation, self.text.template(), &text)?);
                let all = 0..usize::MAX;
                let said = if self.assistant_only { said } else { vec![all] };
                one.whole.push(record::document(self.text.tokenizer(), &text, &said)?);
            }
            Meaning::Tokens(rows) => one.ids.extend(rows.into_iter().map(Document::text)),
        }
        Ok(one)
    }

    /// What `source` holds as rows of at most `length` tokens; of a long text several times the rows that are `wanted` if
    /// only so many are. What has nothing to learn is left out, and counted.
    ///
    /// # Errors
    /// As [`read`](Self::read); data of less than one row, or without anything to learn.
    pub fn rows(&self, source: &Path, length: usize, wanted: Option<usize>) -> Result<(Vec<Row>, Counts)> {
        let tokens = wanted.map(|rows| rows.saturating_mul(length));
        let Documents { texts, mut whole, ids, mut counts } =
            self.read(&Opened::read(source)?, Enough { tokens, records: None })?;
        let wrong = |detail: String| CorpusError::Data(format!("{}: {detail}", source.display()));
        if counts.tokens == 0 {
            return Err(wrong("the text is empty".into()));
        }
        let nothing_said = whole.iter().filter(|d| !d.teaches()).count();
        let longest = whole.iter().map(|d| d.tokens.len()).max().unwrap_or(0);
        for document in &mut whole {
            let lost = document.cut(length);
            counts.tokens_cut += lost;
            counts.cut += usize::from(lost > 0);
        }
        let before = texts.len() + whole.len() + ids.len();
        let taught = |d: Vec<Document>| d.into_iter().filter(Document::teaches).collect::<Vec<_>>();
        let (texts, whole, ids) = (taught(texts), taught(whole), taught(ids));
        counts.nothing_to_learn = before - texts.len() - whole.len() - ids.len();
        if counts.nothing_to_learn == before {
            let because = match (nothing_said == counts.conversations, self.assistant_only) {
                (false, true) => format!(
                    "{} of {} conversations were cut at {length} tokens, before the assistant says anything; give a larger \
                     --length (the longest has {longest} tokens), or leave --assistant-only out",
                    counts.cut, counts.conversations
                ),
                (true, true) if counts.conversations > 0 => {
                    format!("the assistant says nothing in any of the {} conversations", counts.conversations)
                }
                _ => "no text in it has two tokens".into(),
            };
            return Err(wrong(format!("nothing is left to learn: {because}")));
        }
        let running: usize = texts.iter().chain(&ids).map(|d| d.tokens.len()).sum();
        if running < length && whole.is_empty() {
            return Err(wrong(format!(
                "{running} tokens are less than one sequence of {length}; give more text, or --length {running}"
            )));
        }
        let mut rows = pack(&whole, length, true);
        rows.extend(pack(&[texts, ids].concat(), length, false));
        Ok((rows, counts))
    }
}

/// What `read` makes of record `i`; what is wrong with it is told with its place.
fn placed<T>(records: &Records, i: usize, read: impl FnOnce(&Value) -> Result<T>) -> Result<T> {
    read(&*records.get(i)?).map_err(|e| {
        let detail = if let CorpusError::Data(detail) = e { detail } else { e.to_string() };
        CorpusError::Data(records.wrong(i, detail).to_string())
    })
}

fn needed(template: Option<&ChatTemplate>) -> Result<&ChatTemplate> {
    template.ok_or_else(|| {
        CorpusError::Data("a conversation (`messages`) needs a chat template, and the model has none".into())
    })
}

/// Tools that the template does not write are not used.
fn unwritten(
    conversation: &record::Conversation,
    template: Option<&ChatTemplate>,
    text: &str,
) -> Result<Option<String>> {
    let (Some(template), Some(_)) = (template, &conversation.tools) else { return Ok(None) };
    let written = conversation.tools_are_written(template, text)?;
    Ok((!written).then(|| "tools, which the chat template does not write".into()))
}

/// What files hold as one text: documents with an empty line between them, conversations as the template writes them.
///
/// # Errors
/// What is wrong with a record, with its line; token ids.
pub fn text_of(opened: &Opened, template: Option<&ChatTemplate>) -> Result<(String, Counts)> {
    let mut counts = Counts { files_not_read: opened.files_not_read.clone(), ..Counts::default() };
    let mut all = String::new();
    // After a text an empty line; conversations end as the template ends them.
    let mut gap = "";
    let mut add = |text: &str, chat: bool| {
        all += gap;
        all += text;
        gap = if chat { "" } else { "\n\n" };
    };
    for text in &opened.texts {
        counts.texts += 1;
        add(text, false);
    }
    let one = |value: &Value| -> Result<(String, bool, Vec<String>)> {
        let Meant { meaning, mut unused } = record::meaning(value).map_err(CorpusError::Data)?;
        let (text, chat) = match meaning {
            Meaning::Text(text) => (text, false),
            Meaning::Completion { prompt, completion } => (prompt + &completion, false),
            Meaning::Conversation(conversation) => {
                let (text, _) = conversation.render(needed(template)?, false)?;
                unused.extend(unwritten(&conversation, template, &text)?);
                (text, true)
            }
            Meaning::Tokens(_) => return Err(CorpusError::Data("token ids, where a text is needed".into())),
        };
        Ok((text, chat, unused))
    };
    for records in &opened.records {
        let read: Vec<Result<_>> = (0..records.len()).into_par_iter().map(|i| placed(records, i, one)).collect();
        for read in read {
            let (text, chat, unused) = read?;
            counts.conversations += usize::from(chat);
            counts.texts += usize::from(!chat);
            counts.unused(unused);
            add(&text, chat);
        }
    }
    Ok((all, counts))
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
