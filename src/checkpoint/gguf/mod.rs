//! Turns a GGUF file into a Hugging Face folder: BF16 safetensors, config.json, tokenizer.json and their companions.
//!
//! Everything that the file says is checked before it is used, and what is not understood is refused by name. A GGUF
//! file of 4-bit blocks does not become better by this: the BF16 weights are the values of its blocks, rounded to
//! nearest even.

mod blocks;
mod config;
mod error;
mod header;
mod pretokenizer;
mod rope;
mod sentencepiece;
mod shards;
mod staging;
mod tensors;
mod tokenizer;

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value as Json;

pub use error::{GgufError, Result};

use config::ModelConfig;
use header::Gguf;
use staging::{Staging, write_json};
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
    let config = ModelConfig::read(&gguf)?;
    let outputs = tensors::plan(&gguf, &config)?;
    let tokenizer = Tokenizer::read(&gguf)?;
    let files = tokenizer.to_files(&gguf)?;

    let staging = Staging::create(out)?;
    write_json(&staging.file("config.json"), &config.to_json(&tokenizer.special), true)?;
    write_json(&staging.file("generation_config.json"), &config::generation_json(&tokenizer.special), true)?;
    // Compact: indenting 50,000 merges by one token a line would quadruple the file.
    write_json(&staging.file("tokenizer.json"), &files.tokenizer, false)?;
    write_json(&staging.file("tokenizer_config.json"), &files.config, true)?;
    let (shards, bytes) = shards::write(&gguf, &outputs, &staging, max_shard_bytes, progress)?;
    staging.commit()?;

    let mut source_types = BTreeMap::new();
    for info in gguf.tensors.values() {
        *source_types.entry(info.kind.name()).or_insert(0) += 1;
    }
    Ok(ImportReport {
        architecture: config.architecture.prefix().into(),
        name: gguf.string("general.name")?.map(Into::into),
        tensors: outputs.len(),
        parameters: outputs.iter().map(tensors::Output::elements).sum(),
        bytes,
        shards,
        source_types,
        notes: files.notes,
    })
}

/// Converts only the tokenizer; works on a vocabulary-only file of any architecture.
///
/// # Errors
/// See [`GgufError`].
pub fn read_tokenizer(gguf: &Path) -> Result<TokenizerFiles> {
    let gguf = Gguf::open(gguf)?;
    Tokenizer::read(&gguf)?.to_files(&gguf)
}
