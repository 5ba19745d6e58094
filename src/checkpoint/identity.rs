//! What tells one checkpoint from another, wherever it lies: a hash of every byte of every file that is read from it.
//!
//! Answers, divergences, speeds, and text that a teacher wrote are kept on disk and given out again for the same
//! identity, so it may leave nothing out. Hashing a large model takes seconds, so hashes are remembered between runs: for
//! a file that has the same device, inode, size, time of modification and time of change (both to the nanosecond) as when
//! it was hashed. The time of change cannot be set back by tools that restore the time of modification (`cp -p`, `rsync -t`).

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};

use recoup_ground::cache::cache_folder;
use serde_json::{Map, Value};

use super::error::{CheckpointError, Result};
use super::tensors::TensorStore;

/// Bytes that are read at once.
const CHUNK: usize = 16 << 20;
/// Names of files beside the weights that may say how a model computes, reads or writes text, by their ending.
const ENDINGS: [&str; 7] = ["json", "jinja", "model", "txt", "tiktoken", "vocab", "bpe"];
/// What stands beside a model and says nothing about what it computes: cards, licences, and Recoup's own records.
const NO_PART: [&str; 5] = ["readme", "license", "notice", "usage", "recoup_"];
/// A folder of further templates.
const TEMPLATES: &str = "additional_chat_templates";
/// A file that changed so recently may change again within the resolution of its times (some file systems count in
/// whole seconds, FAT in two), and its hash is not remembered. Nanoseconds.
const SETTLED: i128 = 2_500_000_000;

/// The identity of the checkpoint that `tensors` were opened from: the hash of each text file that may be read, by name,
/// and one of all files of weights under `weights`. `progress` gets bytes done, and all, of files that must be hashed.
///
/// # Errors
/// When a file cannot be read, or changes while it is read.
pub fn identity(tensors: &TensorStore, progress: &mut dyn FnMut(u64, u64)) -> Result<Value> {
    identity_with(&mut Memory::of_user(), tensors, progress)
}

fn identity_with(memory: &mut Memory, tensors: &TensorStore, progress: &mut dyn FnMut(u64, u64)) -> Result<Value> {
    let weights: Vec<PathBuf> = tensors.files().map(Into::into).collect();
    let texts = text_files(tensors.folder())?;
    let mut unknown = 0;
    for path in weights.iter().chain(texts.values()) {
        let stamp = Stamp::of(path).map_err(|e| CheckpointError::io(path, "look at", e))?;
        unknown += if memory.get(&stamp).is_some() { 0 } else { stamp.size };
    }
    let mut done = 0;
    let mut hash = |path: &Path| {
        memory.hash(path, &mut |bytes| {
            done += bytes;
            progress(done, unknown);
        })
    };
    let mut all = blake3::Hasher::new();
    for path in &weights {
        // By their names: which shard is which is part of what the index says.
        let name = path.strip_prefix(tensors.folder()).unwrap_or(path).to_string_lossy();
        all.update(format!("{name}\0{}\n", hash(path)?).as_bytes());
    }
    let mut out = Map::new();
    out.insert("weights".into(), all.finalize().to_hex().as_str().into());
    for (name, path) in &texts {
        out.insert(name.clone(), hash(path)?.into());
    }
    Ok(Value::Object(out))
}

/// The hash of one file, remembered like those of weights.
///
/// # Errors
/// When it cannot be read, or changes while it is read.
pub fn file_hash(path: &Path) -> Result<String> {
    Memory::of_user().hash(path, &mut |_| {})
}

/// The hash of a description, for names of what is made by it.
#[must_use]
pub fn value_hash(value: &Value) -> String {
    blake3::hash(value.to_string().as_bytes()).to_hex().to_string()
}

/// Files of a checkpoint folder that are no weights but may matter, by name.
fn text_files(folder: &Path) -> Result<BTreeMap<String, PathBuf>> {
    let mut out = BTreeMap::new();
    for (prefix, folder) in [("", folder.to_owned()), ("additional_chat_templates/", folder.join(TEMPLATES))] {
        if !folder.is_dir() {
            continue;
        }
        let io = |e| CheckpointError::io(&folder, "list", e);
        for entry in fs::read_dir(&folder).map_err(io)? {
            let entry = entry.map_err(io)?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let lower = name.to_lowercase();
            let ending = Path::new(&lower).extension().and_then(|e| e.to_str()).unwrap_or_default();
            let counts = ENDINGS.contains(&ending) && !name.starts_with('.');
            if counts && !NO_PART.iter().any(|n| lower.starts_with(n)) && entry.path().is_file() {
                out.insert(format!("{prefix}{name}"), entry.path());
            }
        }
    }
    Ok(out)
}

/// What a file's contents cannot change without.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    /// Nanoseconds since 1970.
    modified: i128,
    changed: i128,
}

impl Stamp {
    #[cfg(unix)]
    fn of_open(file: &File) -> std::io::Result<Self> {
        use std::os::unix::fs::MetadataExt as _;
        let m = file.metadata()?;
        let time = |seconds: i64, nanoseconds: i64| i128::from(seconds) * 1_000_000_000 + i128::from(nanoseconds);
        Ok(Self {
            device: m.dev(),
            inode: m.ino(),
            size: m.size(),
            modified: time(m.mtime(), m.mtime_nsec()),
            changed: time(m.ctime(), m.ctime_nsec()),
        })
    }

    /// Without an inode and a time of change nothing can be remembered: the times are those of the future.
    #[cfg(not(unix))]
    fn of_open(file: &File) -> std::io::Result<Self> {
        Ok(Self { device: 0, inode: 0, size: file.metadata()?.len(), modified: i128::MAX, changed: i128::MAX })
    }

    fn of(path: &Path) -> std::io::Result<Self> {
        Self::of_open(&File::open(path)?)
    }

    /// Whether a later change of the file would show.
    fn is_settled(&self) -> bool {
        let now =
            std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_nanos() as i128);
        self.modified.max(self.changed).checked_add(SETTLED).is_some_and(|t| t < now)
    }
}

/// Hashes of earlier runs: a file of lines, which every run reads whole and adds to.
struct Memory {
    known: HashMap<Stamp, String>,
    file: Option<PathBuf>,
}

/// Lines after which the file is begun anew.
const MOST_LINES: usize = 20_000;
/// Name of the file; another form of lines needs another name.
const FILE: &str = "hashes-1.txt";

impl Memory {
    /// In the user's cache folder; where there is none, nothing is remembered.
    fn of_user() -> Self {
        Self::at(cache_folder().as_deref())
    }

    fn at(folder: Option<&Path>) -> Self {
        let file = folder.map(|f| f.join(FILE));
        let mut known = HashMap::new();
        let text = file.as_ref().and_then(|f| fs::read(f).ok()).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let mut lines = 0;
        // A line that another program damaged is as good as none.
        for line in text.lines() {
            lines += 1;
            if let Some((stamp, hash)) = Self::parse(line) {
                known.insert(stamp, hash);
            }
        }
        if lines > MOST_LINES {
            known.clear();
            file.iter().for_each(|f| drop(fs::remove_file(f)));
        }
        Self { known, file }
    }

    fn parse(line: &str) -> Option<(Stamp, String)> {
        let mut parts = line.split(' ');
        let mut next = || parts.next();
        let stamp = Stamp {
            device: next()?.parse().ok()?,
            inode: next()?.parse().ok()?,
            size: next()?.parse().ok()?,
            modified: next()?.parse().ok()?,
            changed: next()?.parse().ok()?,
        };
        let hash = blake3::Hash::from_hex(next()?).ok()?;
        next().is_none().then(|| (stamp, hash.to_hex().to_string()))
    }

    fn get(&self, stamp: &Stamp) -> Option<&str> {
        self.known.get(stamp).map(String::as_str)
    }

    /// The hash of a file, from memory or from its bytes; `progress` gets the bytes as they are read.
    fn hash(&mut self, path: &Path, progress: &mut dyn FnMut(u64)) -> Result<String> {
        let io = |e| CheckpointError::io(path, "read", e);
        let mut file = File::open(path).map_err(io)?;
        let stamp = Stamp::of_open(&file).map_err(io)?;
        if let Some(known) = self.get(&stamp) {
            return Ok(known.to_owned());
        }
        let mut hasher = blake3::Hasher::new();
        let mut chunk = vec![0; CHUNK.min(stamp.size as usize + 1)];
        loop {
            let mut filled = 0;
            while filled < chunk.len() {
                match file.read(&mut chunk[filled..]).map_err(io)? {
                    0 => break,
                    n => filled += n,
                }
            }
            if filled == 0 {
                break;
            }
            hasher.update_rayon(&chunk[..filled]);
            progress(filled as u64);
        }
        let hash = hasher.finalize().to_hex().to_string();
        if Stamp::of(path).map_err(io)? != stamp {
            let detail = "changed while it was read; wait until it is written, and start again";
            return Err(CheckpointError::NotACheckpoint { path: path.into(), detail: detail.into() });
        }
        if stamp.is_settled() {
            self.remember(stamp, &hash);
        }
        Ok(hash)
    }

    /// Not being able to remember is no reason to stop.
    fn remember(&mut self, stamp: Stamp, hash: &str) {
        self.known.insert(stamp, hash.to_owned());
        let Some(file) = &self.file else { return };
        let Stamp { device, inode, size, modified, changed } = stamp;
        // Written at once, so that two runs do not mix their lines.
        let line = format!("{device} {inode} {size} {modified} {changed} {hash}\n");
        let _ = file.parent().map(fs::create_dir_all);
        if let Ok(mut file) = OpenOptions::new().append(true).create(true).open(file) {
            let _ = file.write_all(line.as_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::write::{Pending, write_safetensors};
    use super::*;

    /// A folder with one small tensor, whose files look as if they had been written long ago.
    fn checkpoint(folder: &Path) -> TensorStore {
        let one = Pending::new("w", safetensors::Dtype::U8, &[5000], || Ok::<_, CheckpointError>(vec![7; 5000]));
        write_safetensors(&folder.join("model.safetensors"), vec![one], &Map::new()).unwrap();
        for (name, text) in [("config.json", "{}"), ("tokenizer.json", "{}"), ("README.md", "x"), ("notes.pdf", "x")] {
            fs::write(folder.join(name), text).unwrap();
        }
        TensorStore::open(folder).unwrap()
    }

    fn of(folder: &Path) -> Value {
        identity_with(&mut Memory::at(None), &TensorStore::open(folder).unwrap(), &mut |_, _| {}).unwrap()
    }

    #[test]
    fn every_byte_of_every_file_that_is_read_counts() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        checkpoint(folder);
        let before = of(folder);
        assert_eq!(
            before.as_object().unwrap().keys().collect::<Vec<_>>(),
            ["weights", "config.json", "tokenizer.json"]
        );
        fs::write(folder.join("README.md"), "another").unwrap();
        assert_eq!(of(folder), before, "a card is no part of the model");
        // One bit in the middle of the weights; the same size.
        let path = folder.join("model.safetensors");
        let mut bytes = fs::read(&path).unwrap();
        let middle = bytes.len() - 2500;
        bytes[middle] ^= 1;
        fs::write(&path, bytes).unwrap();
        assert_ne!(of(folder)["weights"], before["weights"]);
        for (name, text) in [("tokenizer.json", "{ }"), ("generation_config.json", "{}"), ("chat_template.jinja", "x")]
        {
            let before = of(folder);
            fs::write(folder.join(name), text).unwrap();
            let after = of(folder);
            assert_ne!(after[name], before[name], "{name}");
            assert_eq!(after["weights"], before["weights"]);
        }
        fs::create_dir(folder.join(TEMPLATES)).unwrap();
        fs::write(folder.join(TEMPLATES).join("tool_use.jinja"), "x").unwrap();
        assert!(of(folder)["additional_chat_templates/tool_use.jinja"].is_string());
    }

    #[test]
    fn a_copy_elsewhere_is_the_same_model() {
        let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        checkpoint(a.path());
        checkpoint(b.path());
        assert_eq!(of(a.path()), of(b.path()));
    }

    #[test]
    #[cfg(unix)]
    fn a_hash_is_remembered_until_the_file_changes_whatever_its_time_of_modification_says() {
        let (folder, cache) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let path = folder.path().join("file");
        fs::write(&path, [1; 100]).unwrap();
        let stamp = Stamp::of(&path).unwrap();
        let read = |memory: &mut Memory| {
            let mut bytes = 0;
            let hash = memory.hash(&path, &mut |n| bytes += n).unwrap();
            (hash, bytes)
        };
        // Just written: hashed each time.
        let mut memory = Memory::at(Some(cache.path()));
        let first = read(&mut memory);
        assert_eq!(first.1, 100);
        assert_eq!(read(&mut memory), first);
        // As of an old file, also in the next process.
        memory.remember(stamp, &first.0);
        let mut next = Memory::at(Some(cache.path()));
        assert_eq!(read(&mut next), (first.0.clone(), 0));
        // Other bytes, same size, and the old time of modification put back.
        fs::write(&path, [2; 100]).unwrap();
        let time = std::time::UNIX_EPOCH + std::time::Duration::from_nanos(stamp.modified as u64);
        File::options().write(true).open(&path).unwrap().set_modified(time).unwrap();
        assert_eq!(Stamp::of(&path).unwrap().modified, stamp.modified);
        let (hash, bytes) = read(&mut next);
        assert!(hash != first.0 && bytes == 100);
    }

    #[test]
    fn a_damaged_memory_is_none() {
        let cache = tempfile::tempdir().unwrap();
        fs::write(cache.path().join(FILE), b"\xff\xff\n1 2 3 4 5 zz\n1 2 3\n").unwrap();
        assert!(Memory::at(Some(cache.path())).known.is_empty());
        // A cache folder that cannot be made is no reason to stop.
        let mut memory = Memory::at(Some(&cache.path().join(FILE).join("below")));
        let stamp = Stamp { device: 1, inode: 2, size: 3, modified: 4, changed: 5 };
        memory.remember(stamp, &blake3::hash(b"x").to_hex());
        assert!(memory.get(&stamp).is_some());
    }
}
