//! Where a verb puts what it finds: a folder, or, in a build with the feature `object-store`, an address in an object store.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Result, bail};

#[cfg(feature = "object-store")]
use super::store::Store;

/// The output of a verb.
pub(super) struct Place {
    folder: Option<PathBuf>,
    store: Option<Store>,
}

impl Place {
    /// A folder as it is; of an address what is there already is fetched into a temporary folder.
    pub(super) fn of(output: Option<&Path>) -> Result<Self> {
        let address = output.and_then(address);
        let store = address.map(Store::open).transpose()?;
        let folder = store.as_ref().map(|store| store.folder().into()).or_else(|| output.map(Into::into));
        Ok(Self { folder, store })
    }

    /// Where the verb works.
    pub(super) fn folder(&self) -> Option<PathBuf> {
        self.folder.clone()
    }

    /// What lies at an address is what the verb left, whatever came of it.
    pub(super) fn finish(self, outcome: Result<ExitCode>) -> Result<ExitCode> {
        match self.store {
            Some(store) => store.finish(outcome),
            None => outcome,
        }
    }
}

/// The folders, those at addresses fetched; they last as long as what they come with.
pub(super) fn fetched(folders: &[PathBuf]) -> Result<(Vec<PathBuf>, Vec<Store>)> {
    let (mut out, mut stores) = (Vec::new(), Vec::new());
    for folder in folders {
        match address(folder) {
            Some(address) => {
                let store = Store::fetch(address)?;
                if !store.folder().exists() {
                    bail!("{address}: there is nothing");
                }
                out.push(store.folder().into());
                stores.push(store);
            }
            None => out.push(folder.clone()),
        }
    }
    Ok((out, stores))
}

/// What names no folder but a place in a store: `s3://bucket/path`.
fn address(path: &Path) -> Option<&str> {
    path.to_str().filter(|text| text.contains("://"))
}

/// None can be made in a build without the feature.
#[cfg(not(feature = "object-store"))]
pub(super) enum Store {}

#[cfg(not(feature = "object-store"))]
impl Store {
    fn open(address: &str) -> Result<Self> {
        bail!(
            "{address}: this build reads and writes folders only; build it with `--features object-store` for S3, Google Cloud Storage and \
             Azure"
        )
    }

    fn fetch(address: &str) -> Result<Self> {
        Self::open(address)
    }

    fn folder(&self) -> &Path {
        match *self {}
    }

    fn finish(self, _: Result<ExitCode>) -> Result<ExitCode> {
        match self {}
    }
}
