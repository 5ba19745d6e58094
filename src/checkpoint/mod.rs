//! Checkpoints as people have them: safetensors folders in every dialect, GGUF import, and writing them.
//!
//! Everything a file says is checked here once; what leaves this module is typed and cannot be wrong.

pub mod dialect;
pub mod error;
mod folder;
pub mod gguf;
mod header;
#[cfg(feature = "hub")]
pub mod hub;
pub mod identity;
pub mod json;
pub mod resolve;
pub mod tensors;
pub mod text_files;
pub mod write;

use std::path::Path;

pub use error::{CheckpointError, Result};
use json::Object;

use dialect::Scheme;
use tensors::TensorStore;

/// An opened checkpoint folder: config.json, its quantization scheme, and the mapped tensors.
pub struct Checkpoint {
    pub config: Object,
    pub scheme: Scheme,
    pub tensors: TensorStore,
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
        let config = Object::read(&folder.join("config.json"))?;
        let scheme = Scheme::read(&config, folder)?;
        let tensors = TensorStore::open(folder)?;
        Ok(Self { config, scheme, tensors })
    }

    /// Checks that every tensor was used, but for those that follow from the configuration (old Llama files store the
    /// rotary frequencies).
    ///
    /// # Errors
    /// Names the tensors that nothing used.
    pub fn finish(&self) -> Result<()> {
        for name in self.tensors.unused() {
            if name.ends_with(".rotary_emb.inv_freq") {
                self.tensors.take(&name);
            }
        }
        self.tensors.finish()
    }
}
