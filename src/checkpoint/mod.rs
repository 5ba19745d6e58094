//! Checkpoints as people have them: safetensors folders in every dialect, and writing them.
//!
//! Everything a file says is checked here once; what leaves this module is typed and cannot be wrong.

pub mod dialect;
pub mod error;
mod folder;
pub mod fused;
pub mod fused_write;
mod header;
pub mod hub;
pub mod identity;
pub mod json;
pub mod resolve;
mod rotation;
pub mod tensors;
pub mod text_files;
pub mod text_model;
pub mod write;

use std::path::Path;
use std::sync::Arc;

pub use error::{CheckpointError, Result};
use json::Object;
pub use text_model::untie;

use dialect::{Announced, kv};
use tensors::TensorStore;

/// An opened checkpoint folder: config.json, what it announces, and the mapped tensors, which clones share.
#[derive(Clone)]
pub struct Checkpoint {
    /// The text model's, which a wrapper's config.json has inside.
    pub config: Object,
    /// config.json as it is: a wrapper's, or the same.
    pub whole_config: Object,
    /// What its configuration says of each module.
    pub announced: Announced,
    pub tensors: Arc<TensorStore>,
    /// What its files say twice, or in a way that has to be told, and how it was taken.
    pub notes: Vec<String>,
    /// An FP8 KV cache is announced and not one scale of it is stored: all are 1.
    pub unit_kv_scales: bool,
}

impl Checkpoint {
    /// Opens a folder: reads config.json and hf_quant_config.json, maps the tensors. Reads no weights yet.
    ///
    /// # Errors
    /// Anything wrong with the files themselves; see [`CheckpointError`].
    pub fn open(folder: &Path) -> Result<Self> {
        if folder.is_file() {
            let detail = folder::file_instead(folder);
            return Err(CheckpointError::NotACheckpoint { path: folder.into(), detail });
        }
        if !folder.is_dir() {
            return Err(CheckpointError::NotACheckpoint { path: folder.into(), detail: "no such folder".into() });
        }
        if !folder.join("config.json").exists() {
            let detail = format!("holds no config.json{}", folder::instead(folder));
            return Err(CheckpointError::NotACheckpoint { path: folder.into(), detail });
        }
        let whole_config = Object::read(&folder.join("config.json"))?;
        let mut announced = Announced::read(&whole_config, folder)?;
        let mut tensors = TensorStore::open(folder)?;
        let config = text_model::config(whole_config.clone())?;
        announced.wrapped = text_model::canonical_names(&mut tensors, &config)?;
        let mut notes = tensors.notes().to_vec();
        if let Some(note) = tied_head(&config, &mut tensors)? {
            notes.push(note);
        }
        notes.extend_from_slice(&announced.notes);
        let unit_kv_scales = announced.fp8_kv_cache && !tensors.names().any(kv::is_scale);
        if unit_kv_scales {
            if let Some(error) = announced.kv_cache_in_doubt() {
                return Err(error);
            }
            notes.push(format!(
                "{}: an FP8 KV cache is announced and no scale of it is stored: keys and values are rounded to E4M3 as \
                 they are, under scales of 1.0",
                folder.display()
            ));
        }
        let tensors = Arc::new(tensors);
        Ok(Self { config, whole_config, announced, tensors, notes, unit_kv_scales })
    }

    /// Checks that every tensor was used, but for those that follow from the configuration (old Llama files store the
    /// rotary frequencies).
    ///
    /// # Errors
    /// Names the tensors that nothing used.
    pub fn finish(&self) -> Result<()> {
        for name in self.tensors.unused() {
            if [".inv_freq", ".cos_cached", ".sin_cached"].iter().any(|b| name.ends_with(&format!("rotary_emb{b}"))) {
                self.tensors.take(&name);
            }
        }
        let layers = self.config.get("num_hidden_layers").and_then(json::whole);
        self.tensors.finish(|name| {
            if kv::is_scale(name) {
                return Some("it is a scale of a quantized KV cache, and no configuration announces one".into());
            }
            let layer: u64 = text_model::ROOTS
                .iter()
                .find_map(|r| name.strip_prefix(r))?
                .strip_prefix("layers.")?
                .split('.')
                .next()?
                .parse()
                .ok()?;
            let layers = layers.filter(|&n| layer >= n)?;
            Some(format!("it is of layer {layer}, and `num_hidden_layers` is {layers}"))
        })
    }
}

/// A tied model that holds its one table only under the head's name, as safetensors' `save_model` may leave it.
fn tied_head(config: &Object, tensors: &mut TensorStore) -> Result<Option<String>> {
    const HEAD: &str = "lm_head.weight";
    const EMBEDDING: &str = "model.embed_tokens.weight";
    let tied = config.bool_or("tie_word_embeddings", false)?;
    let alone =
        |t: &TensorStore| t.peek(HEAD).is_some_and(|h| h.is_float()) && !t.names().any(|n| n.contains("embed_tokens"));
    if !tied || !alone(tensors) {
        return Ok(None);
    }
    tensors.rename(HEAD, EMBEDDING);
    Ok(Some(format!(
        "{}: `{EMBEDDING}` is not stored; config.json ties it to `{HEAD}` (tie_word_embeddings), which is read as both",
        tensors.folder().display()
    )))
}
