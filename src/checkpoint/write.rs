//! Writes a checkpoint folder: safetensors shards streamed tensor by tensor, everything under a temporary name until
//! it is whole.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use serde_json::{Map, Value, json};

use super::error::{CheckpointError, Result};
use super::text_files;
use crate::output::{self, Claim};

/// Bytes of tensors in one shard, unless one tensor alone is larger.
pub const SHARD_BYTES: u64 = 4 << 30;

/// A folder that appears under its name only when [`FolderWriter::commit`] is called; dropped before, it vanishes.
pub struct FolderWriter {
    partial: PathBuf,
    claim: Claim,
    committed: bool,
}

impl FolderWriter {
    /// Starts the folder `target`, which must not exist, or be empty.
    ///
    /// # Errors
    /// When it exists and is not empty, cannot be written, or another run writes there.
    pub fn create(target: &Path) -> Result<Self> {
        let claim = output::folder(target)?;
        let partial = claim.scratch("whole");
        fs::create_dir(&partial).map_err(|e| CheckpointError::io(&partial, "create", e))?;
        Ok(Self { partial, claim, committed: false })
    }

    /// Where files are written until the commit.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.partial
    }

    /// Writes a small file.
    ///
    /// # Errors
    /// When the disk is full or the folder cannot be written.
    pub fn file(&self, name: impl AsRef<Path>, contents: &[u8]) -> Result<()> {
        let path = self.partial.join(name);
        let io = |source| CheckpointError::io(&path, "write", source);
        let mut file = File::create(&path).map_err(io)?;
        file.write_all(contents).and_then(|()| file.sync_all()).map_err(io)
    }

    /// Writes `value` as indented JSON.
    ///
    /// # Errors
    /// As [`Self::file`].
    pub fn json(&self, name: &str, value: &Value) -> Result<()> {
        self.file(name, format!("{value:#}\n").as_bytes())
    }

    /// Copies the configuration of model and quantization, and how the weights came to be, from another checkpoint folder.
    ///
    /// # Errors
    /// When a file cannot be read or written.
    pub fn copy_settings(&self, from: &Path) -> Result<()> {
        self.copy(&["config.json", "hf_quant_config.json", "recoup_recipe.json", "recoup_sensitivity.json"], from)
    }

    /// Copies tokenizer, templates, generation settings and terms of use from another checkpoint folder.
    ///
    /// # Errors
    /// When a file cannot be read or written.
    pub fn copy_text_files(&self, from: &Path) -> Result<()> {
        self.copy(&text_files::to_copy(from), from)
    }

    fn copy<P: AsRef<Path>>(&self, names: &[P], from: &Path) -> Result<()> {
        for name in names {
            let name = name.as_ref();
            let source = from.join(name);
            if source.is_file() {
                let io = |error| CheckpointError::Io { path: source.clone(), action: "read", source: error };
                let bytes = fs::read(&source).map_err(io)?;
                if let Some(what) = recoup_eval::foreign::pointer(&bytes) {
                    return Err(CheckpointError::Foreign { file: source, what });
                }
                if let Some(folder) = name.parent().map(|p| self.partial.join(p)) {
                    fs::create_dir_all(&folder).map_err(|e| CheckpointError::io(&folder, "create", e))?;
                }
                self.file(name, &bytes)?;
            }
        }
        Ok(())
    }

    /// Writes `model.safetensors`, or shards of at most `shard_bytes` and their index. `produce` gives the bytes of
    /// one tensor at a time, in the order of `tensors`. Returns the number of files.
    ///
    /// # Errors
    /// From `produce`, and when the disk is full.
    pub fn tensors<E: From<CheckpointError>>(
        &self,
        tensors: &[TensorSpec],
        shard_bytes: u64,
        metadata: &Map<String, Value>,
        mut produce: impl FnMut(&TensorSpec) -> std::result::Result<Vec<u8>, E>,
    ) -> std::result::Result<usize, E> {
        let mut shards: Vec<Vec<&TensorSpec>> = vec![Vec::new()];
        let mut size = 0;
        for t in tensors {
            if size + t.bytes() > shard_bytes && size > 0 {
                shards.push(Vec::new());
                size = 0;
            }
            size += t.bytes();
            if let Some(last) = shards.last_mut() {
                last.push(t);
            }
        }
        let all: u64 = tensors.iter().map(TensorSpec::bytes).sum();
        self.claim.room("the model", all).map_err(CheckpointError::from)?;
        let count = shards.len();
        let mut weight_map = Map::new();
        for (i, shard) in shards.iter().enumerate() {
            let name = match count {
                1 => "model.safetensors".to_owned(),
                _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
            };
            write_safetensors(&self.partial.join(&name), shard, metadata, &mut produce)?;
            weight_map.extend(shard.iter().map(|t| (t.name.clone(), Value::from(name.clone()))));
        }
        if count > 1 {
            weight_map.sort_keys();
            let index = json!({"metadata": {"total_size": all}, "weight_map": weight_map});
            self.json("model.safetensors.index.json", &index)?;
        }
        Ok(count)
    }

    /// Gives the folder its name.
    ///
    /// # Errors
    /// When it cannot be moved, e.g. because the target came into being meanwhile; it stays on disk then, and the error
    /// says where.
    pub fn commit(mut self) -> Result<()> {
        self.committed = true;
        Ok(self.claim.finish(&self.partial)?)
    }
}

impl Drop for FolderWriter {
    fn drop(&mut self) {
        if !self.committed {
            // Nothing can be done about a failure here; it lies with the scratch.
            let _ = fs::remove_dir_all(&self.partial);
        }
    }
}

/// Writes one safetensors file, tensor by tensor; `produce` gives the bytes of each in turn.
///
/// # Errors
/// From `produce`, and when the disk is full.
pub fn write_safetensors<E: From<CheckpointError>>(
    path: &Path,
    tensors: &[&TensorSpec],
    metadata: &Map<String, Value>,
    produce: &mut impl FnMut(&TensorSpec) -> std::result::Result<Vec<u8>, E>,
) -> std::result::Result<(), E> {
    let io = |source| CheckpointError::io(path, "write", source);
    let mut header = Map::new();
    header.insert("__metadata__".into(), Value::Object(metadata.clone()));
    let mut offset = 0;
    for t in tensors {
        let end = offset + t.bytes();
        header.insert(
            t.name.clone(),
            json!({"dtype": t.dtype.to_string(), "shape": t.shape, "data_offsets": [offset, end]}),
        );
        offset = end;
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    // Data starts at a multiple of 8.
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut out = BufWriter::with_capacity(1 << 20, File::create(path).map_err(io)?);
    out.write_all(&(header.len() as u64).to_le_bytes()).and_then(|()| out.write_all(&header)).map_err(io)?;
    for t in tensors {
        let bytes = produce(t)?;
        if bytes.len() as u64 != t.bytes() {
            return Err(CheckpointError::Value {
                file: path.into(),
                tensor: t.name.clone(),
                detail: format!("{} bytes were produced for a tensor of {}", bytes.len(), t.bytes()),
            }
            .into());
        }
        out.write_all(&bytes).map_err(io)?;
    }
    let file = out.into_inner().map_err(|e| io(e.into_error()))?;
    match file.sync_all() {
        // A pipe.
        Err(e) if e.kind() == std::io::ErrorKind::InvalidInput => Ok(()),
        synced => Ok(synced.map_err(io)?),
    }
}

/// Writes `path` by way of `write`, which gets a temporary name beside it; the file appears only when whole.
///
/// # Errors
/// From `write`, and when the rename fails.
pub fn atomically<E: From<CheckpointError>>(
    path: &Path,
    write: impl FnOnce(&Path) -> std::result::Result<(), E>,
) -> std::result::Result<(), E> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let partial = output::partial_in(folder).map_err(CheckpointError::from)?;
    write(&partial)?;
    partial.persist(path).map_err(|e| CheckpointError::io(path, "rename the finished file to", e.error))?;
    Ok(())
}

/// Name, dtype and shape of a tensor to be written.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorSpec {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// Bytes of its data.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        (self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::super::tensors::TensorStore;
    use super::*;

    fn specs() -> Vec<TensorSpec> {
        (0..5).map(|i| TensorSpec { name: format!("t{i}"), dtype: Dtype::F32, shape: vec![4, i + 1] }).collect()
    }

    fn bytes(t: &TensorSpec) -> Result<Vec<u8>> {
        Ok(vec![t.shape[1] as u8; t.bytes() as usize])
    }

    #[test]
    fn shards_are_read_back_as_one_checkpoint() {
        let folder = tempfile::tempdir().unwrap();
        for limit in [1, 100, u64::MAX] {
            let target = folder.path().join(format!("out{limit}"));
            let writer = FolderWriter::create(&target).unwrap();
            writer.tensors(&specs(), limit, &Map::new(), bytes).unwrap();
            writer.commit().unwrap();
            let store = TensorStore::open(&target).unwrap();
            for t in specs() {
                let view = store.peek(&t.name).unwrap();
                assert_eq!((view.shape, view.bytes), (&t.shape[..], &bytes(&t).unwrap()[..]));
            }
        }
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_full_disk_is_reported_as_such() {
        // /dev/full answers every write with ENOSPC.
        let spec = &specs()[0];
        let failed = write_safetensors(Path::new("/dev/full"), &[spec], &Map::new(), &mut bytes);
        assert!(matches!(failed, Err(CheckpointError::DiskFull { .. })), "{failed:?}");
    }

    #[test]
    fn a_failure_leaves_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("out");
        let writer = FolderWriter::create(&target).unwrap();
        let failed = writer.tensors(&specs(), u64::MAX, &Map::new(), |t| {
            if t.name == "t3" {
                Err(CheckpointError::NotACheckpoint { path: "x".into(), detail: "no".into() })
            } else {
                bytes(t)
            }
        });
        assert!(failed.is_err());
        drop(writer);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_folder_with_content_is_never_overwritten() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("precious"), "x").unwrap();
        assert!(FolderWriter::create(folder.path()).is_err());
    }
}
