//! Turns a GGUF file into a Hugging Face folder: BF16 safetensors, config.json, tokenizer.json and their companions.
//!
//! It stands above the model, which judges the configuration and lists the tensors; here is how llama.cpp calls and stores
//! them. Everything that the file says is checked before it is used, and what is not understood is refused by name. A GGUF
//! file of 4-bit blocks does not become better by this: the BF16 weights are the values of its blocks, rounded to
//! nearest even.

mod blocks;
mod config;
mod error;
mod header;
mod pretokenizer;
mod rope;
mod sentencepiece;
mod tensors;
mod tokenizer;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;

use half::bf16;
use safetensors::Dtype;
use serde_json::{Map, Value as Json};

pub use error::{GgufError, Result};

use crate::checkpoint::write::{FolderWriter, Pending};
use blocks::Blocks;
use config::Config;
use header::Gguf;
use tokenizer::Tokenizer;

/// Bytes of tensors in one safetensors file before the model is split.
pub const DEFAULT_SHARD_BYTES: u64 = 4_000_000_000;

/// What an import did, for whoever reports it.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ImportReport {
    /// `general.architecture`: llama, qwen2, qwen3 or qwen3moe.
    pub architecture: String,
    /// `general.name`, where the file has one.
    pub name: Option<String>,
    /// Tensors written.
    pub tensors: usize,
    /// Elements in all tensors.
    pub parameters: u64,
    /// Bytes of BF16 weights written.
    pub bytes: u64,
    /// Safetensors files written.
    pub shards: usize,
    /// How many tensors of the GGUF file had each ggml type.
    pub source_types: BTreeMap<&'static str, usize>,
    /// What a user should know: things left out, filled in or unusual.
    pub notes: Vec<String>,
}

/// The tokenizer of a GGUF file in Hugging Face's terms.
#[derive(Clone, Debug)]
pub struct TokenizerFiles {
    /// tokenizer.json, as the `tokenizers` crate reads it.
    pub tokenizer: Json,
    /// tokenizer_config.json: special tokens and the chat template.
    pub config: Json,
    /// What a user should know about the conversion.
    pub notes: Vec<String>,
}

/// Imports the model in `gguf` into the folder `out`, which must not exist or be empty, in files of at most
/// [`DEFAULT_SHARD_BYTES`]. `progress` is called after each tensor with how many are done, how many there are, and
/// the name of the one just written. The folder appears complete or not at all.
///
/// # Errors
/// See [`GgufError`].
pub fn import(gguf: &Path, out: &Path, progress: &mut dyn FnMut(usize, usize, &str)) -> Result<ImportReport> {
    import_sharded(gguf, out, DEFAULT_SHARD_BYTES, progress)
}

/// [`import`] with another limit on the bytes of tensors in one file; a larger tensor still gets a file of its own.
///
/// # Errors
/// See [`GgufError`].
pub fn import_sharded(
    gguf: &Path,
    out: &Path,
    max_shard_bytes: u64,
    progress: &mut dyn FnMut(usize, usize, &str),
) -> Result<ImportReport> {
    let gguf = Gguf::open(gguf)?;
    let config = Config::read(&gguf)?;
    let (outputs, mut notes) = tensors::plan(&gguf, &config)?;
    let tokenizer = Tokenizer::read(&gguf)?;
    let files = tokenizer.to_files(&gguf)?;

    let writer = FolderWriter::create(out)?;
    writer.json("config.json", &config.to_json(&tokenizer.special))?;
    writer.json("generation_config.json", &config::generation_json(&tokenizer.special))?;
    // Compact: indenting 50,000 merges by one token a line would quadruple the file.
    writer.file("tokenizer.json", files.tokenizer.to_string().as_bytes())?;
    writer.json("tokenizer_config.json", &files.config)?;
    let (shards, bytes) = write_tensors(&gguf, &outputs, &writer, max_shard_bytes, progress)?;
    writer.commit()?;

    notes.extend(files.notes);
    let mut source_types = BTreeMap::new();
    for info in gguf.tensors.values() {
        *source_types.entry(info.kind.name()).or_insert(0) += 1;
    }
    Ok(ImportReport {
        architecture: config.architecture.name.into(),
        name: gguf.string("general.name")?.map(Into::into),
        tensors: outputs.len(),
        parameters: outputs.iter().map(tensors::Output::elements).sum(),
        bytes,
        shards,
        source_types,
        notes,
    })
}

/// Writes `outputs` in BF16, one tensor after the other, so that memory does not grow with the model. Returns how many
/// files there are and how many bytes of tensors.
fn write_tensors(
    gguf: &Gguf,
    outputs: &[tensors::Output<'_>],
    writer: &FolderWriter,
    max_shard_bytes: u64,
    progress: &mut dyn FnMut(usize, usize, &str),
) -> Result<(usize, u64)> {
    let state = &RefCell::new((Blocks::new(), 0, progress));
    let tensors = outputs.iter().map(|output| {
        let shape: Vec<usize> = output.shape.iter().map(|&d| d as usize).collect();
        Pending::new(&output.name, Dtype::BF16, &shape, move || -> Result<Vec<u8>> {
            let (blocks, done, progress) = &mut *state.borrow_mut();
            let mut bytes = Vec::with_capacity(2 * output.elements() as usize);
            output.read(gguf, blocks, |values| {
                for &value in values {
                    let rounded = bf16::from_f32(value);
                    if !rounded.is_finite() {
                        let detail = format!("holds {value}, which is no finite BF16 number; the file is damaged");
                        return Err(output.error(gguf, detail));
                    }
                    bytes.extend_from_slice(&rounded.to_le_bytes());
                }
                Ok(())
            })?;
            *done += 1;
            progress(*done, outputs.len(), &output.name);
            Ok(bytes)
        })
    });
    // transformers refuses a file without it.
    let metadata = Map::from_iter([("format".to_owned(), Json::from("pt"))]);
    let tensors: Vec<Pending<'_, GgufError>> = tensors.collect();
    let bytes = tensors.iter().map(Pending::bytes).sum();
    Ok((writer.tensors(tensors, max_shard_bytes, &metadata)?, bytes))
}

/// Converts only the tokenizer; works on a vocabulary-only file of any architecture.
///
/// # Errors
/// See [`GgufError`].
pub fn read_tokenizer(gguf: &Path) -> Result<TokenizerFiles> {
    let gguf = Gguf::open(gguf)?;
    Tokenizer::read(&gguf)?.to_files(&gguf)
}
