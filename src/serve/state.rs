//! What all requests share: the models, who may ask, and whether the server is going down.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::error::ApiError;
use super::metrics::Metrics;
use super::model::ServedModel;

/// The models that are served; one at least.
pub struct Models(Vec<Arc<ServedModel>>);

impl Models {
    /// Of these, whose names differ.
    #[must_use]
    pub fn new(models: Vec<ServedModel>) -> Self {
        Self(models.into_iter().map(Arc::new).collect())
    }

    /// The model of this name; the first where none is named.
    ///
    /// # Errors
    /// When there is none.
    pub fn named(&self, name: Option<&str>) -> Result<Arc<ServedModel>, ApiError> {
        let found = match name {
            None => self.0.first(),
            Some(name) => self.0.iter().find(|model| model.names.iter().any(|known| known == name)),
        };
        found.cloned().ok_or_else(|| {
            let there: Vec<&str> = self.all().map(ServedModel::name).collect();
            ApiError::no_model(name.unwrap_or_default(), &there.join(", "))
        })
    }

    /// All of them.
    pub fn all(&self) -> impl Iterator<Item = &ServedModel> {
        self.0.iter().map(Arc::as_ref)
    }
}

/// What all requests share.
pub struct State {
    pub models: Models,
    pub metrics: Metrics,
    /// Hashes of the keys that may ask; everybody may where there are none.
    pub keys: Vec<blake3::Hash>,
    /// Connections at a time, of all clients and of one.
    pub connections: usize,
    pub connections_of_one: usize,
    /// Bytes of a body at most.
    pub body: usize,
    /// Folder whose reports are shown.
    pub reports: Option<PathBuf>,
    /// Origins of other pages that may ask, `*` for all.
    pub origins: Vec<String>,
    /// It listens for this machine only, and asks for no key.
    pub local: bool,
    /// Names by which it may be asked then, beside the machine's own.
    pub hosts: Vec<String>,
    /// The page is shown.
    pub page: bool,
    /// No new requests are taken.
    pub draining: AtomicBool,
}

impl State {
    /// Whether new requests are taken: the models work, and the server is not going down.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        !self.draining.load(Ordering::Acquire) && self.models.all().all(|model| model.worker.is_alive())
    }

    /// Sequences on their way, waiting or running.
    #[must_use]
    pub fn inside(&self) -> usize {
        self.models.all().map(|model| model.worker.inside()).sum()
    }

    /// Whether a key may ask. Hashes are compared in constant time.
    #[must_use]
    pub fn admits(&self, key: Option<&str>) -> bool {
        if self.keys.is_empty() {
            return true;
        }
        let Some(given) = key.map(|key| blake3::hash(key.as_bytes())) else { return false };
        // All are looked at, so that the time says nothing of which one it was.
        self.keys.iter().fold(false, |found, known| found | (*known == given))
    }
}
