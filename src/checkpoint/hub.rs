//! Checkpoints by their Hugging Face id, downloaded into the cache that the Python tools use too.

use std::path::PathBuf;

use hf_hub::api::sync::{ApiBuilder, ApiError};

/// Files of a repository that make a checkpoint: weights, configuration, tokenizer, templates.
const SUFFIXES: [&str; 4] = [".safetensors", ".json", ".jinja", "tokenizer.model"];

/// Downloads what a checkpoint needs of repository `id` (`org/name`, or `org/name@revision`) and returns the folder.
/// HF_HOME, HF_ENDPOINT and the token of `hf auth login` are respected.
///
/// # Errors
/// When the hub cannot be reached, refuses, or holds no safetensors under that id.
pub fn download(id: &str, progress: &mut dyn FnMut(usize, usize)) -> Result<PathBuf, HubError> {
    let api = ApiBuilder::from_env().with_progress(false).build()?;
    let (name, revision) = id.split_once('@').unwrap_or((id, "main"));
    let repo = api.repo(hf_hub::Repo::with_revision(name.into(), hf_hub::RepoType::Model, revision.into()));
    let files: Vec<String> = repo
        .info()?
        .siblings
        .into_iter()
        .map(|s| s.rfilename)
        // Only what lies at the top: other folders hold other formats of the same model.
        .filter(|f| !f.contains('/') && SUFFIXES.iter().any(|s| f.ends_with(s)))
        .collect();
    if !files.iter().any(|f| f.ends_with(".safetensors")) {
        return Err(HubError::NoWeights(id.into()));
    }
    let mut folder = None;
    for (i, file) in files.iter().enumerate() {
        progress(i, files.len());
        folder = repo.get(file)?.parent().map(Into::into);
    }
    folder.ok_or_else(|| HubError::NoWeights(id.into()))
}

/// Why a download failed.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    #[error("Hugging Face hub: {0}")]
    Api(#[from] ApiError),
    #[error("{0} holds no safetensors files at its top")]
    NoWeights(String),
}
