//! The tensors of a checkpoint folder: one or many memory-mapped safetensors files, checked before anything is read.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::{Component, Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use memmap2::Mmap;
use safetensors::Dtype;

use super::error::{CheckpointError, Result};
use super::header::{self, Stored};
use super::json::Object;
use super::text_model::Spelling;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

struct Shard {
    path: PathBuf,
    map: Mmap,
}

struct Entry {
    shard: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    start: usize,
    end: usize,
}

/// One stored tensor: where it lies, what it is, its bytes (little-endian, row-major).
#[derive(Clone, Copy)]
pub struct TensorView<'a> {
    pub name: &'a str,
    pub file: &'a Path,
    pub dtype: Dtype,
    pub shape: &'a [usize],
    pub bytes: &'a [u8],
}

/// All tensors of a folder by name, and which of them have been used.
pub struct TensorStore {
    folder: PathBuf,
    shards: Vec<Shard>,
    entries: BTreeMap<String, Entry>,
    /// What is of other parts than the text model, by the names in the files.
    aside: BTreeMap<String, Entry>,
    spelling: Spelling,
    used: Mutex<BTreeSet<String>>,
    /// What the folder says twice or in another way than usual, and how it was taken.
    notes: Vec<String>,
}

impl TensorStore {
    /// Maps `model.safetensors`, or the shards that `model.safetensors.index.json` lists; where both are there the first,
    /// as transformers does.
    ///
    /// # Errors
    /// Names the file that is missing, truncated or inconsistent, and the tensor where one is to blame.
    pub fn open(folder: &Path) -> Result<Self> {
        let index = folder.join(INDEX);
        let mut notes = Vec::new();
        let single = folder.join(SINGLE).is_file();
        let mut listed = index.is_file().then(|| read_index(&index)).transpose()?;
        if single && let Some(other) = listed.take_if(|l| l.values().any(|f| Path::new(f) != Path::new(SINGLE))) {
            let shards = other.values().collect::<BTreeSet<_>>().len();
            notes.push(format!(
                "{}: {SINGLE} lies beside it and is read, as transformers does, and not the {shards} shards that the index \
                 lists; remove the one that is not meant",
                index.display()
            ));
        }
        let files: Vec<PathBuf> = if let Some(listed) = &listed {
            listed.values().collect::<BTreeSet<_>>().into_iter().map(|f| folder.join(f)).collect()
        } else if single {
            vec![folder.join(SINGLE)]
        } else {
            return Err(CheckpointError::NotACheckpoint {
                path: folder.into(),
                detail: format!("holds neither {SINGLE} nor {INDEX}{}", super::folder::instead(folder)),
            });
        };
        notes.extend(unread(folder, &files));
        let mut store = Self {
            folder: folder.into(),
            shards: Vec::new(),
            entries: BTreeMap::new(),
            aside: BTreeMap::new(),
            spelling: Spelling::default(),
            used: Mutex::new(BTreeSet::new()),
            notes,
        };
        for (name, file) in listed.iter().flatten() {
            // A folder or a pipe of that name would be as bad as nothing.
            if !folder.join(file).is_file() {
                return Err(CheckpointError::Index {
                    file: index,
                    detail: format!(
                        "lists tensor `{name}` in {file}, but there is no such file beside it; download the missing \
                         shard, or write the index anew"
                    ),
                });
            }
        }
        for file in files {
            store.add_shard(&file)?;
        }
        for (name, file) in listed.iter().flatten() {
            let found = store.entries.get(name).map(|e| &store.shards[e.shard].path);
            if found != Some(&folder.join(file)) {
                return Err(CheckpointError::Index {
                    file: index,
                    detail: format!("lists tensor `{name}` in {file}, but that file does not hold it"),
                });
            }
        }
        Ok(store)
    }

    /// Gives tensor `from` the name `to`, if that is free.
    pub(super) fn rename(&mut self, from: &str, to: &str) {
        if !self.entries.contains_key(to)
            && let Some(entry) = self.entries.remove(from)
        {
            self.entries.insert(to.to_owned(), entry);
        }
    }

    /// Sets the spelling of names in the files, under which all that is written of this store appears.
    pub(super) fn spell(&mut self, spelling: Spelling) {
        self.spelling = spelling;
    }

    /// The name that a tensor or module of the text model has in the files.
    #[must_use]
    pub fn stored_name(&self, name: &str) -> String {
        self.spelling.stored(name)
    }

    /// Tensors of other parts than the text model, under the names that they have in the files.
    pub fn aside(&self) -> impl Iterator<Item = TensorView<'_>> {
        self.aside.iter().map(|(name, e)| self.view(name, e))
    }

    /// Sets those tensors aside for which `of` names the part that they are of: part, tensors, bytes.
    pub(super) fn set_aside(&mut self, of: &dyn Fn(&str) -> Option<String>) -> Vec<(String, usize, usize)> {
        let mut parts: BTreeMap<String, (usize, usize)> = BTreeMap::new();
        for (name, entry) in std::mem::take(&mut self.entries) {
            let Some(part) = of(&name) else {
                self.entries.insert(name, entry);
                continue;
            };
            let (count, bytes) = parts.entry(part).or_default();
            (*count, *bytes) = (*count + 1, *bytes + (entry.end - entry.start));
            self.aside.insert(self.spelling.stored(&name), entry);
        }
        parts.into_iter().map(|(part, (count, bytes))| (part, count, bytes)).collect()
    }

    /// Adds something to tell of the folder.
    pub(super) fn note(&mut self, note: String) {
        self.notes.push(note);
    }

    /// What the folder says twice or in another way than usual, and how it was taken.
    #[must_use]
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Maps one safetensors file on its own, whatever it is called.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_file(file: &Path) -> Result<Self> {
        let mut store = Self {
            folder: file.into(),
            shards: Vec::new(),
            entries: BTreeMap::new(),
            aside: BTreeMap::new(),
            spelling: Spelling::default(),
            used: Mutex::new(BTreeSet::new()),
            notes: Vec::new(),
        };
        store.add_shard(file)?;
        Ok(store)
    }

    fn add_shard(&mut self, path: &Path) -> Result<()> {
        let io = |action| move |source| CheckpointError::Io { path: path.into(), action, source };
        let refuse = |detail: String| CheckpointError::Header { file: path.into(), detail };
        let file = File::open(path).map_err(io("open"))?;
        if file.metadata().map_err(io("read"))?.len() == 0 {
            // An empty file cannot be mapped.
            return header::read(&[]).map(drop).map_err(refuse);
        }
        // SAFETY: the map is read-only and private. As with every memory map, another process that truncates the file
        // while it is mapped would fault this one; model files are not modified while in use.
        let map = unsafe { Mmap::map(&file) }.map_err(io("map"))?;
        let shard = self.shards.len();
        for Stored { name, dtype, shape, start, end } in header::read(&map).map_err(refuse)? {
            let Some(other) = self.entries.get(&name) else {
                self.entries.insert(name, Entry { shard, dtype, shape, start, end });
                continue;
            };
            let Some(first) = self.shards.get(other.shard) else {
                return Err(refuse(format!("tensor `{name}` is there twice")));
            };
            let same =
                (other.dtype, &other.shape) == (dtype, &shape) && first.map[other.start..other.end] == map[start..end];
            let also = format!("tensor `{name}` is also in {}", first.path.display());
            if !same {
                let detail = format!("{also}, with other contents; remove the one that is not meant");
                return Err(CheckpointError::Index { file: path.into(), detail });
            }
            self.notes.push(format!("{}: {also}, the same in every byte", path.display()));
        }
        self.shards.push(Shard { path: path.into(), map });
        Ok(())
    }

    /// The folder the tensors came from.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// Bytes of all files together.
    #[must_use]
    pub fn file_bytes(&self) -> u64 {
        self.shards.iter().map(|s| s.map.len() as u64).sum()
    }

    /// Whether the folder holds tensor `name`.
    #[must_use]
    pub fn contains(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    /// Looks at a tensor without using it up.
    #[must_use]
    pub fn peek(&self, name: &str) -> Option<TensorView<'_>> {
        let (name, e) = self.entries.get_key_value(name)?;
        Some(self.view(name, e))
    }

    fn view<'a>(&'a self, name: &'a str, e: &'a Entry) -> TensorView<'a> {
        let shard = &self.shards[e.shard];
        TensorView { name, file: &shard.path, dtype: e.dtype, shape: &e.shape, bytes: &shard.map[e.start..e.end] }
    }

    /// Takes a tensor if it is there, and marks it as used.
    pub fn take(&self, name: &str) -> Option<TensorView<'_>> {
        let view = self.peek(name)?;
        self.used.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned());
        Some(view)
    }

    /// Takes a tensor that must be there; `why` says what it is needed for.
    ///
    /// # Errors
    /// When it is missing.
    pub fn require(&self, name: &str, why: &str) -> Result<TensorView<'_>> {
        self.take(name).ok_or_else(|| CheckpointError::MissingTensor {
            folder: self.folder.clone(),
            tensor: name.into(),
            why: why.into(),
        })
    }

    /// Names of tensors that nothing took.
    #[must_use]
    pub fn unused(&self) -> Vec<String> {
        let used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        self.entries.keys().filter(|n| !used.contains(*n)).cloned().collect()
    }

    /// Checks that every tensor was used; `hint` may say more of the first that was not.
    ///
    /// # Errors
    /// Names the first of those that were not.
    pub fn finish(&self, hint: impl Fn(&str) -> Option<String>) -> Result<()> {
        let names = self.unused();
        let Some(first) = names.first().and_then(|n| self.peek(n)) else { return Ok(()) };
        let hint = hint(first.name).map(|h| format!(": {h}")).unwrap_or_default();
        Err(CheckpointError::Leftover { file: first.file.into(), first: first.name.into(), total: names.len(), hint })
    }

    /// The files that the tensors lie in.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.shards.iter().map(|s| s.path.as_path())
    }

    /// Tells the kernel that the mapped pages are no longer needed, so that they stop counting as resident.
    pub fn release_pages(&self) {
        #[cfg(unix)]
        for shard in &self.shards {
            // SAFETY: the mapping is private, read-only and file-backed: dropped pages are read again from the file.
            let _ = unsafe { shard.map.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) };
        }
    }
}

impl<'a> TensorView<'a> {
    /// Values of a float tensor (F32, F16, BF16) in f32.
    ///
    /// # Errors
    /// When the dtype is another.
    pub fn floats(&self) -> Result<Vec<f32>> {
        use crate::formats::linear::{Element, decode_elements};
        let element = match self.dtype {
            Dtype::F32 => Element::F32,
            Dtype::F16 => Element::F16,
            Dtype::BF16 => Element::Bf16,
            _ => return Err(self.wrong_dtype("F32, F16 or BF16")),
        };
        let mut out = vec![0.0; self.shape.iter().product()];
        decode_elements(element, self.bytes, &mut out);
        Ok(out)
    }

    /// Whether it holds plain numbers: F32, F16 or BF16.
    #[must_use]
    pub fn is_float(&self) -> bool {
        matches!(self.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16)
    }

    /// Refuses a NaN or an infinity in a float tensor, by its position.
    ///
    /// # Errors
    /// Names the first.
    pub fn expect_finite(&self) -> Result<()> {
        // All exponent bits set; the top two bytes of an element hold them in each of the three types.
        let (size, exponent) = match self.dtype {
            Dtype::F32 => (4, 0x7f80),
            Dtype::BF16 => (2, 0x7f80),
            Dtype::F16 => (2, 0x7c00),
            _ => return Ok(()),
        };
        let bad = |b: &[u8]| u16::from_le_bytes([b[size - 2], b[size - 1]]) & exponent == exponent;
        match self.bytes.chunks_exact(size).position(bad) {
            None => Ok(()),
            Some(i) => Err(self.bad_value(format!("element {i} is NaN or infinite; the export is broken"))),
        }
    }

    /// Checks the shape.
    ///
    /// # Errors
    /// When it is another.
    pub fn expect_shape(&self, shape: &[usize]) -> Result<()> {
        if self.shape == shape { Ok(()) } else { Err(self.wrong_shape(format!("{shape:?}"))) }
    }

    /// The error that says which dtype was expected.
    #[must_use]
    pub fn wrong_dtype(&self, expected: &str) -> CheckpointError {
        CheckpointError::Dtype {
            file: self.file.into(),
            tensor: self.name.into(),
            expected: expected.into(),
            found: self.dtype.to_string(),
        }
    }

    /// The error that says which shape was expected.
    #[must_use]
    pub fn wrong_shape(&self, expected: impl Into<String>) -> CheckpointError {
        CheckpointError::Shape {
            file: self.file.into(),
            tensor: self.name.into(),
            expected: expected.into(),
            found: self.shape.to_vec(),
        }
    }

    /// The error that says which value is wrong.
    #[must_use]
    pub fn bad_value(&self, detail: impl Into<String>) -> CheckpointError {
        CheckpointError::Value { file: self.file.into(), tensor: self.name.into(), detail: detail.into() }
    }
}

/// Files of the folder that are called like a model's and are not among `files`, as a note.
fn unread(folder: &Path, files: &[PathBuf]) -> Option<String> {
    let mut others: Vec<String> = std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|p| p.extension().is_some_and(|e| e == "safetensors") && p.is_file() && !files.contains(p))
        .filter_map(|p| Some(p.file_name()?.to_string_lossy().into_owned()))
        .filter(|name| name.starts_with("model"))
        .collect();
    others.sort();
    let first = others.first()?;
    let rest = if others.len() > 1 { format!(" and {} more", others.len() - 1) } else { String::new() };
    Some(format!("{}: {first}{rest} not read: not among the files of this checkpoint", folder.display()))
}

/// Reads `weight_map`, tensor name to file name; file names may not leave the folder.
fn read_index(index: &Path) -> Result<BTreeMap<String, String>> {
    let object = Object::read(index)?;
    let map = object.object("weight_map")?.ok_or_else(|| object.error("weight_map", "an object"))?;
    let mut listed = BTreeMap::new();
    for (name, file) in map.value().as_object().into_iter().flatten() {
        let file = file.as_str().ok_or_else(|| map.error(name, "a file name"))?;
        // A backslash separates elsewhere, so it is in no name here either.
        let inside = |part: &Component<'_>| matches!(part, Component::Normal(_) | Component::CurDir);
        let parts: PathBuf = Path::new(file).components().filter(|part| !matches!(part, Component::CurDir)).collect();
        let plain = Path::new(file).components().all(|part| inside(&part)) && !file.contains(['\\', '\0']);
        let Some(file) = parts.to_str().filter(|p| plain && !p.is_empty() && !file.ends_with(['/', '.'])) else {
            return Err(CheckpointError::Index {
                file: index.into(),
                detail: format!(
                    "tensor `{name}` is said to be in {file:?}; only names of files beside the index or in folders there \
                     are allowed"
                ),
            });
        };
        listed.insert(name.clone(), file.to_owned());
    }
    if listed.is_empty() {
        return Err(object.error("weight_map", "at least one tensor"));
    }
    Ok(listed)
}
