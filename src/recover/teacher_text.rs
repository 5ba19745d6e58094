//! Text that a model writes by itself, for training without data of one's own.

use std::ops::ControlFlow;
use std::path::Path;

use recoup_ground::kept::kept;
use serde_json::{Map, Value, json};

use super::{RecoverError, Result};
use crate::backend::{Backend, NUMERICS_VERSION};
use crate::checkpoint::CheckpointError;
use crate::corpus::Row;
use crate::engine::{Engine, Limits, Request, answer_all};
use crate::formats::kv::KvFormat;
use crate::logits::SamplingParams;
use crate::model::Decoder;
use crate::text::{ChatInput, ChatTemplate, ModelText};

/// What such text begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opening {
    /// The token that begins (or separates) documents.
    Document,
    /// A user's turn, which the model writes as well as the answer (as Magpie does).
    Chat,
}

/// Sequences that are written side by side.
const WIDTH: usize = 32;

/// The tokens that every sequence begins with.
#[derive(Clone, Debug, PartialEq)]
pub struct Prompt {
    pub tokens: Vec<u32>,
    /// Arguments of the chat template that change nothing up to where the user begins to speak, and the rest is the
    /// teacher's.
    pub idle_arguments: bool,
}

/// What is to be written.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    /// The tokens that each sequence begins with.
    pub prompt: &'a [u32],
    /// Sequences.
    pub count: usize,
    /// Tokens in each.
    pub length: usize,
    pub seed: u64,
}

/// What sequences of `opening` begin with, of `length` tokens each by the model that `text` is of; `arguments` are its chat
/// template's.
///
/// # Errors
/// When it names no token that begins a text, or its template does not write a user's words; no room after them.
pub fn prompt(text: &ModelText, opening: Opening, arguments: &Map<String, Value>, length: usize) -> Result<Prompt> {
    let prompt = match opening {
        Opening::Document => Prompt { tokens: vec![text.beginning()?], idle_arguments: false },
        Opening::Chat => {
            let template = text.template().ok_or_else(|| wrong(text, "the teacher has no chat template"))?;
            let tokens = user_turn(text, template, arguments)?;
            let idle_arguments = !arguments.is_empty() && tokens == user_turn(text, template, &Map::new())?;
            Prompt { tokens, idle_arguments }
        }
    };
    let opened = prompt.tokens.len();
    if opened + 2 > length {
        return Err(RecoverError::Asked(format!(
            "--length {length} leaves no room after the {opened} tokens that open a conversation"
        )));
    }
    Ok(prompt)
}

/// Sequences as the model writes them, sampled at temperature 1; kept in `file` for the model's `identity`. The model that
/// `load` gives is loaded only if they are not there; `progress` is told of each sequence.
///
/// # Errors
/// Those of `load`; when the model computes what is no number, or the sequences cannot be kept.
pub fn rows<B: Backend>(
    text: &ModelText,
    identity: &Value,
    wanted: Wanted<'_>,
    file: &Path,
    load: impl FnOnce() -> Result<Decoder<B>>,
    progress: &mut dyn FnMut(),
) -> Result<Vec<Row>> {
    let Wanted { prompt, count, length, seed } = wanted;
    let key = json!({"prompt": prompt, "count": count, "length": length, "seed": seed, "teacher": identity,
        "numerics": NUMERICS_VERSION});
    if let Some(folder) = file.parent() {
        std::fs::create_dir_all(folder).map_err(|e| CheckpointError::io(folder, "create", e))?;
    }
    let written = kept(file, &key, || write(&load()?, text, wanted, progress))?;
    Ok(written.into_iter().map(Row::text).collect())
}

/// The tokens of each sequence, those of the prompt included.
fn write<B: Backend>(
    model: &Decoder<B>,
    text: &ModelText,
    Wanted { prompt, count, length, seed }: Wanted<'_>,
    progress: &mut dyn FnMut(),
) -> Result<Vec<Vec<u32>>> {
    let request = |i: usize| Request {
        prompt: prompt.to_vec(),
        max_tokens: length - prompt.len(),
        sampling: SamplingParams {
            temperature: 1.0,
            seed: Some(seed.wrapping_add(i as u64)),
            ..SamplingParams::default()
        },
        ..Request::default()
    };
    let width = WIDTH.min(count);
    let mut engine = Engine::new(model, Limits::new(length, width), KvFormat::F32)?;
    let mut out = vec![Vec::new(); count];
    answer_all(&mut engine, text.tokenizer(), (0..count).map(request).collect(), width, &mut |index, answer| {
        out[index] = prompt.iter().copied().chain(answer.tokens.iter().map(|t| t.token)).collect();
        progress();
        ControlFlow::Continue(())
    })?;
    Ok(out)
}

/// Tokens up to where a user begins to speak, in the model's template with these arguments.
fn user_turn(text: &ModelText, template: &ChatTemplate, arguments: &Map<String, Value>) -> Result<Vec<u32>> {
    const MARK: &str = "\u{1}the user speaks\u{1}";
    let messages = [json!({"role": "user", "content": MARK})];
    let extra = (!arguments.is_empty()).then_some(arguments);
    let written = template.render(&ChatInput { messages: &messages, extra, ..ChatInput::default() })?;
    let (opening, _) = written
        .split_once(MARK)
        .ok_or_else(|| wrong(text, "the chat template does not write a user's words as they are"))?;
    let tokens = text.tokenizer().encode(opening, false)?;
    if tokens.is_empty() {
        return Err(wrong(text, "the chat template begins with the user's words, so there is nothing to start from"));
    }
    Ok(tokens)
}

fn wrong(text: &ModelText, detail: &str) -> RecoverError {
    RecoverError::Asked(format!("{}: {detail}", text.folder().display()))
}
