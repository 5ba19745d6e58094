//! Text that a model writes by itself, for training without data of one's own.

use std::ops::ControlFlow;
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use serde_json::{Map, Value, json};

use crate::backend::NUMERICS_VERSION;
use crate::backend::cpu::{CpuBackend, isa::Isa};
use crate::checkpoint::Checkpoint;
use crate::engine::{Engine, Limits, Request, answer_all};
use crate::formats::kv::KvFormat;
use crate::logits::SamplingParams;
use crate::model::Decoder;
use crate::recover::data::Row;
use crate::text::{ChatInput, Tokenizer};

/// What such text begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Opening {
    /// The token that begins (or separates) documents.
    Document,
    /// A user's turn, which the model writes as well as the answer (as Magpie does).
    Chat,
}

/// Sequences that are written side by side.
const WIDTH: usize = 32;

/// What is to be written.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted<'a> {
    /// The tokens that each sequence begins with.
    pub prompt: &'a [u32],
    /// Sequences.
    pub count: usize,
    /// Tokens in each.
    pub length: usize,
    pub seed: u64,
}

/// What sequences of `opening` begin with, of `length` tokens each by the model of `checkpoint`; `arguments` are its chat
/// template's.
pub(super) fn prompt(
    checkpoint: &Checkpoint,
    opening: Opening,
    arguments: &Map<String, Value>,
    length: usize,
) -> Result<Vec<u32>> {
    let folder = checkpoint.tensors.folder();
    let tokenizer = Tokenizer::from_folder(folder)?;
    let prompt = match opening {
        Opening::Document => {
            let configured = || {
                let id =
                    ["bos_token_id", "eos_token_id"].into_iter().find_map(|k| checkpoint.config.value()[k].as_u64());
                id.and_then(|id| u32::try_from(id).ok())
            };
            let token = tokenizer.bos_id().or(tokenizer.eos_id()).or_else(configured);
            let token = token.with_context(|| {
                format!("{}: the tokenizer names no token that begins a text, so the teacher cannot", folder.display())
            })?;
            vec![token]
        }
        Opening::Chat => {
            let turn = user_turn(folder, &tokenizer, arguments)?;
            if !arguments.is_empty() && turn == user_turn(folder, &tokenizer, &Map::new())? {
                super::say!(
                    "note: --chat-template-kwargs changes nothing of the conversations that the teacher writes itself: up \
                     to the user's words its template writes the same, and the rest is the teacher's"
                );
            }
            turn
        }
    };
    if prompt.len() + 2 > length {
        bail!("--length {length} leaves no room after the {} tokens that open a conversation", prompt.len());
    }
    Ok(prompt)
}

/// Sequences as the model of `checkpoint` writes them, sampled at temperature 1; kept in `file` for its `identity`.
pub(super) fn rows(
    (checkpoint, identity): (&Checkpoint, &Value),
    Wanted { prompt, count, length, seed }: Wanted<'_>,
    threads: usize,
    file: &Path,
) -> Result<Vec<Row>> {
    let key = json!({"prompt": prompt, "count": count, "length": length, "seed": seed, "teacher": identity,
        "numerics": NUMERICS_VERSION});
    if let Some(rows) = kept(file, &key) {
        return Ok(rows);
    }
    let tokenizer = Tokenizer::from_folder(checkpoint.tensors.folder())?;
    let decoder = Decoder::load(CpuBackend::new(Isa::detect(), super::options::threads(threads))?, checkpoint)?;
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
    let mut engine = Engine::new(&decoder, Limits::new(length, width), KvFormat::F32)?;
    let bar = super::progress(count as u64, "the teacher writes");
    let mut out = vec![Row::default(); count];
    answer_all(&mut engine, &tokenizer, (0..count).map(request).collect(), width, &mut |index, answer| {
        let tokens = prompt.iter().copied().chain(answer.tokens.iter().map(|t| t.token)).collect();
        out[index] = Row::text(tokens);
        bar.inc(1);
        ControlFlow::Continue(())
    })?;
    bar.finish();
    let tokens: Vec<&Vec<u32>> = out.iter().flat_map(|r| r.0.iter().map(|d| &d.tokens)).collect();
    if let Some(parent) = file.parent() {
        std::fs::create_dir_all(parent).with_context(|| format!("{}: cannot be created", parent.display()))?;
    }
    recoup_eval::journal::write_atomically(file, json!({"key": key, "tokens": tokens}).to_string().as_bytes())?;
    Ok(out)
}

/// What an earlier run of the same kind wrote.
fn kept(file: &Path, key: &Value) -> Option<Vec<Row>> {
    let stored: Value = serde_json::from_slice(&std::fs::read(file).ok()?).ok()?;
    let tokens: Vec<Vec<u32>> = serde_json::from_value(stored.get("tokens")?.clone()).ok()?;
    (stored.get("key") == Some(key)).then(|| tokens.into_iter().map(Row::text).collect())
}

/// Tokens up to where a user begins to speak, in the model's template.
fn user_turn(folder: &Path, tokenizer: &Tokenizer, arguments: &Map<String, Value>) -> Result<Vec<u32>> {
    const MARK: &str = "\u{1}the user speaks\u{1}";
    let template = crate::text::ChatTemplate::from_folder(folder)?
        .with_context(|| format!("{}: the teacher has no chat template", folder.display()))?;
    let template = if arguments.is_empty() { template } else { template.with_arguments(arguments.clone())? };
    let messages = [json!({"role": "user", "content": MARK})];
    let text = template.render(&ChatInput { messages: &messages, ..ChatInput::default() })?;
    let (opening, _) = text.split_once(MARK).with_context(|| {
        format!("{}: the chat template does not write a user's words as they are", folder.display())
    })?;
    let tokens = tokenizer.encode(opening, false)?;
    if tokens.is_empty() {
        bail!(
            "{}: the chat template begins with the user's words, so there is nothing to start from",
            folder.display()
        );
    }
    Ok(tokens)
}
