//! Writes a checkpoint folder: safetensors shards streamed tensor by tensor, everything under a temporary name until
//! it is whole.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use serde_json::{Map, Value, json};

use super::error::{CheckpointError, Result};
use super::tensors::{TensorStore, TensorView};
use super::text_files;
use crate::output::{self, Claim};

/// Bytes of tensors in one shard, unless one tensor alone is larger.
pub const SHARD_BYTES: u64 = 4 << 30;

/// What the header of a model's file says about itself: its framework, who wrote it, and `more`.
#[must_use]
pub fn metadata<const N: usize>(more: [(&str, String); N]) -> Map<String, Value> {
    let fixed = [("format", "pt".to_owned()), ("recoup_version", env!("CARGO_PKG_VERSION").to_owned())];
    fixed.into_iter().chain(more).map(|(key, value)| (key.to_owned(), value.into())).collect()
}

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
                if let Some(what) = recoup_ground::foreign::pointer(&bytes) {
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

    /// Writes `model.safetensors`, or shards of at most `shard_bytes` and their index, one tensor (or what is made together)
    /// in memory at a time. Returns the number of files.
    ///
    /// # Errors
    /// From making a tensor, and when the disk is full.
    pub fn tensors<E: From<CheckpointError>>(
        &self,
        tensors: Vec<Pending<'_, E>>,
        shard_bytes: u64,
        metadata: &Map<String, Value>,
    ) -> std::result::Result<usize, E> {
        let (specs, mut bytes) = queue(tensors);
        let mut shards: Vec<Vec<&TensorSpec>> = vec![Vec::new()];
        let mut size = 0;
        for t in &specs {
            if size + t.bytes() > shard_bytes && size > 0 {
                shards.push(Vec::new());
                size = 0;
            }
            size += t.bytes();
            if let Some(last) = shards.last_mut() {
                last.push(t);
            }
        }
        let all: u64 = specs.iter().map(TensorSpec::bytes).sum();
        self.claim.room("the model", all).map_err(CheckpointError::from)?;
        let count = shards.len();
        let mut weight_map = Map::new();
        for (i, shard) in shards.iter().enumerate() {
            let name = match count {
                1 => "model.safetensors".to_owned(),
                _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
            };
            write_file(&self.partial.join(&name), shard, metadata, &mut bytes)?;
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

/// Writes one safetensors file, tensor by tensor.
///
/// # Errors
/// From making a tensor, and when the disk is full.
pub fn write_safetensors<E: From<CheckpointError>>(
    path: &Path,
    tensors: Vec<Pending<'_, E>>,
    metadata: &Map<String, Value>,
) -> std::result::Result<(), E> {
    let (specs, mut bytes) = queue(tensors);
    write_file(path, &specs.iter().collect::<Vec<_>>(), metadata, &mut bytes)
}

fn write_file<E: From<CheckpointError>>(
    path: &Path,
    tensors: &[&TensorSpec],
    metadata: &Map<String, Value>,
    bytes: &mut dyn Iterator<Item = std::result::Result<Vec<u8>, E>>,
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
        let bytes = bytes.next().transpose()?.unwrap_or_default();
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

/// Tensors to be written, and how their bytes are made when their turn comes: one, or several that are made together.
pub struct Pending<'a, E> {
    specs: Vec<TensorSpec>,
    make: Make<'a, E>,
}

type Make<'a, E> = Box<dyn FnOnce() -> std::result::Result<Vec<Vec<u8>>, E> + 'a>;

impl<'a, E> Pending<'a, E> {
    /// One tensor.
    pub fn new(
        name: impl Into<String>,
        dtype: Dtype,
        shape: &[usize],
        make: impl FnOnce() -> std::result::Result<Vec<u8>, E> + 'a,
    ) -> Self {
        let spec = TensorSpec { name: name.into(), dtype, shape: shape.to_vec() };
        Self::together(vec![spec], move || Ok(vec![make()?]))
    }

    /// Several tensors whose bytes `make` gives in the order of `specs`.
    pub fn together(specs: Vec<TensorSpec>, make: impl FnOnce() -> std::result::Result<Vec<Vec<u8>>, E> + 'a) -> Self {
        Self { specs, make: Box::new(make) }
    }

    /// Tensor `name` of `store` as it is, under the name that it has in its files, or nothing where there is none.
    pub fn copy(store: &'a TensorStore, name: &str) -> Option<Self> {
        Some(Self::copy_view(store, store.peek(name)?, store.stored_name(name)))
    }

    /// The tensors of `store` that are of other parts than the text model, as they are.
    pub fn aside(store: &'a TensorStore) -> impl Iterator<Item = Self> {
        store.aside().map(|view| Self::copy_view(store, view, view.name.to_owned()))
    }

    fn copy_view(store: &'a TensorStore, view: TensorView<'a>, name: String) -> Self {
        Self::new(name, view.dtype, view.shape, move || {
            store.release_pages();
            Ok(view.bytes.to_vec())
        })
    }

    /// Bytes of all its tensors.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.specs.iter().map(TensorSpec::bytes).sum()
    }
}

/// Floats as the bytes of a type, rounded to it.
#[must_use]
pub fn float_bytes(dtype: Dtype, values: &[f32]) -> Vec<u8> {
    match dtype {
        Dtype::BF16 => values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect(),
        Dtype::F16 => values.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
    }
}

/// What is written, and the bytes of each tensor in turn.
fn queue<'a, E>(
    tensors: Vec<Pending<'a, E>>,
) -> (Vec<TensorSpec>, impl Iterator<Item = std::result::Result<Vec<u8>, E>> + use<'a, E>) {
    let specs = tensors.iter().flat_map(|p| p.specs.iter().cloned()).collect();
    let made = tensors.into_iter().flat_map(|p| match (p.make)() {
        Ok(all) => all.into_iter().map(Ok).collect::<Vec<_>>(),
        Err(e) => vec![Err(e)],
    });
    (specs, made)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Five tensors, the second and third made together.
    fn pending(fails: bool) -> Vec<Pending<'static, CheckpointError>> {
        let spec = |i: usize| TensorSpec { name: format!("t{i}"), dtype: Dtype::F32, shape: vec![4, i + 1] };
        let one = |i: usize| {
            Pending::new(format!("t{i}"), Dtype::F32, &[4, i + 1], move || match i {
                3 if fails => Err(CheckpointError::NotACheckpoint { path: "x".into(), detail: "no".into() }),
                _ => Ok(bytes(i)),
            })
        };
        vec![one(0), Pending::together(vec![spec(1), spec(2)], || Ok(vec![bytes(1), bytes(2)])), one(3), one(4)]
    }

    fn bytes(i: usize) -> Vec<u8> {
        vec![i as u8; 16 * (i + 1)]
    }

    #[test]
    fn shards_are_read_back_as_one_checkpoint() {
        let folder = tempfile::tempdir().unwrap();
        for limit in [1, 100, u64::MAX] {
            let target = folder.path().join(format!("out{limit}"));
            let writer = FolderWriter::create(&target).unwrap();
            writer.tensors(pending(false), limit, &Map::new()).unwrap();
            writer.commit().unwrap();
            let store = TensorStore::open(&target).unwrap();
            for i in 0..5 {
                let view = store.peek(&format!("t{i}")).unwrap();
                assert_eq!((view.shape, view.bytes), (&[4, i + 1][..], &bytes(i)[..]));
            }
        }
    }

    #[test]
    fn a_tensor_that_makes_too_few_bytes_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let short = || vec![Pending::new("w", Dtype::F32, &[2], || Ok(vec![0u8; 4]))];
        let failed: Result<()> = write_safetensors(&folder.path().join("x"), short(), &Map::new());
        let message = failed.unwrap_err().to_string();
        assert!(message.contains("`w`") && message.contains("4 bytes were produced for a tensor of 8"), "{message}");
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_full_disk_is_reported_as_such() {
        // /dev/full answers every write with ENOSPC.
        let failed = write_safetensors(Path::new("/dev/full"), pending(false), &Map::new());
        assert!(matches!(failed, Err(CheckpointError::DiskFull { .. })), "{failed:?}");
    }

    #[test]
    fn a_failure_leaves_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("out");
        let writer = FolderWriter::create(&target).unwrap();
        assert!(writer.tensors(pending(true), u64::MAX, &Map::new()).is_err());
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
