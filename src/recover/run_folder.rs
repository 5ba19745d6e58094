//! What a run leaves on disk while it trains, so that it can be resumed after being killed at any moment.
//!
//! `run.json` says what is trained how; `curve.jsonl` has one line for every event; `state.safetensors` is where training
//! stood last, `block-*.safetensors` the blocks trained since, and `best.safetensors` the best weights so far; of a model that is
//! trained a block at a time there are `trained-*.safetensors` alone, the blocks as its checkpoint is to hold them. All appear
//! under their names only when whole.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use safetensors::Dtype;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::parameter::Parameter;
use super::streamed::kept;
use super::student::{BlockStudent, Student};
use super::{RecoverError, Result, differing};
use crate::checkpoint::CheckpointError;
use crate::checkpoint::tensors::TensorStore;
use crate::checkpoint::write::{Pending, atomically, write_safetensors};

/// How far a run is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    pub stage: usize,
    /// Blocks or steps of it that are done.
    pub done: usize,
    /// Lines of the curve until then.
    pub lines: usize,
}

/// The folder of one run.
pub struct RunFolder {
    folder: PathBuf,
    curve: File,
    lines: usize,
}

fn io<'a>(path: &'a Path, action: &'static str) -> impl Fn(std::io::Error) -> RecoverError + 'a {
    move |source| CheckpointError::io(path, action, source).into()
}

impl RunFolder {
    /// Begins a run; `about` says all that its result depends on.
    ///
    /// # Errors
    /// When the folder exists, i.e. another run was interrupted, or cannot be made.
    pub fn create(folder: &Path, about: &Value) -> Result<Self> {
        if folder.join(ABOUT).exists() {
            return Err(RecoverError::Interrupted(folder.into()));
        }
        fs::create_dir_all(folder).map_err(io(folder, "create"))?;
        let path = folder.join(CURVE);
        let curve = File::create(&path).map_err(io(&path, "create"))?;
        let path = folder.join(ABOUT);
        atomically(&path, |partial| fs::write(partial, format!("{about:#}\n")).map_err(io(&path, "write")))?;
        Ok(Self { folder: folder.into(), curve, lines: 0 })
    }

    /// Goes on with a run of the same `about`: where it stood last and the curve until then. `None` when nothing was
    /// begun.
    ///
    /// # Errors
    /// When the run was another, with what differs, or a file in it is damaged.
    pub fn resume(folder: &Path, about: &Value) -> Result<Option<Self>> {
        let path = folder.join(ABOUT);
        let Ok(text) = fs::read_to_string(&path) else { return Ok(None) };
        let found: Value = serde_json::from_str(&text)
            .map_err(|e| RecoverError::Run { path: path.clone(), detail: format!("is damaged ({e})") })?;
        if let Some((at, was, is)) = differing(&found, about) {
            let detail = format!("is of another run: {at} was {was}, and is {is} now");
            return Err(RecoverError::Run { path, detail });
        }
        let path = folder.join(CURVE);
        let curve = OpenOptions::new().read(true).append(true).open(&path).map_err(io(&path, "open"))?;
        Ok(Some(Self { folder: folder.into(), curve, lines: 0 }))
    }

    /// What a run that was begun in `folder` depends on, where one was and can be read.
    #[must_use]
    pub fn about(folder: &Path) -> Option<Value> {
        serde_json::from_str(&fs::read_to_string(folder.join(ABOUT)).ok()?).ok()
    }

    /// Where it is.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// A path within.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Adds a line to the curve.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn line(&mut self, line: &str) -> Result<()> {
        self.lines += 1;
        let path = self.folder.join(CURVE);
        self.curve.write_all(format!("{line}\n").as_bytes()).map_err(io(&path, "write"))
    }

    /// The first `count` lines of the curve; the rest, written after what is resumed from, is cut off.
    ///
    /// # Errors
    /// When there are fewer, or the file cannot be read.
    pub fn rewind(&mut self, count: usize) -> Result<Vec<String>> {
        let path = self.folder.join(CURVE);
        let file = File::open(&path).map_err(io(&path, "read"))?;
        let lines: Vec<String> =
            BufReader::new(file).lines().take(count).collect::<std::io::Result<_>>().map_err(io(&path, "read"))?;
        if lines.len() < count {
            let detail = format!("has {} lines where {count} were written", lines.len());
            return Err(RecoverError::Run { path, detail });
        }
        let bytes: usize = lines.iter().map(|l| l.len() + 1).sum();
        self.curve.set_len(bytes as u64).map_err(io(&path, "cut"))?;
        self.lines = count;
        Ok(lines)
    }

    /// The whole curve.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn curve(&self) -> Result<Vec<u8>> {
        let path = self.folder.join(CURVE);
        fs::read(&path).map_err(io(&path, "read"))
    }

    /// Keeps where the run stands: masters, and the optimizer's moments while it uses them.
    ///
    /// # Errors
    /// When the disk is full; the state before it is still there.
    pub fn save_state(&self, student: &Student, stage: usize, done: usize) -> Result<()> {
        self.curve.sync_data().map_err(io(&self.folder, "sync"))?;
        self.save(STATE, student, Position { stage, done, lines: self.lines }, None, true)
    }

    /// Keeps one block.
    ///
    /// # Errors
    /// As [`Self::save_state`].
    pub fn save_block(&self, student: &Student, stage: usize, block: usize) -> Result<()> {
        self.curve.sync_data().map_err(io(&self.folder, "sync"))?;
        let at = Position { stage, done: block + 1, lines: self.lines };
        self.save(&block_name(stage, block), student, at, Some(block), false)
    }

    /// Keeps the masters as the best so far.
    ///
    /// # Errors
    /// As [`Self::save_state`].
    pub fn save_best(&self, student: &Student, stage: usize, done: usize) -> Result<()> {
        self.save(BEST, student, Position { stage, done, lines: self.lines }, None, false)
    }

    /// Keeps what training made of a block that is trained alone: of what `learned` names, as its checkpoint holds it.
    ///
    /// # Errors
    /// As [`Self::save_state`].
    pub fn save_trained(
        &self,
        student: &BlockStudent,
        learned: impl Fn(&Parameter) -> bool,
        block: usize,
    ) -> Result<TensorStore> {
        self.curve.sync_data().map_err(io(&self.folder, "sync"))?;
        let parameters = student.parameters.iter().filter(|p| learned(p));
        let tensor =
            |(name, bytes): (String, Vec<u8>)| Pending::new(name, Dtype::U8, &[bytes.len()], move || Ok(bytes));
        let at = Position { stage: 0, done: block + 1, lines: self.lines };
        let name = trained_name(block);
        self.write(&name, parameters.flat_map(kept).map(tensor).collect(), at)?;
        Ok(TensorStore::open_file(&self.folder.join(name))?)
    }

    /// Where that is.
    pub(super) fn trained_path(&self, block: usize) -> PathBuf {
        self.folder.join(trained_name(block))
    }

    /// What was kept so, and where the run stood then; nothing, where the block was not trained yet.
    ///
    /// # Errors
    /// When the file is damaged.
    pub fn trained(&self, block: usize) -> Result<Option<(Position, TensorStore)>> {
        let name = trained_name(block);
        let Some((_, position)) = self.open(&name)? else { return Ok(None) };
        Ok(Some((position, TensorStore::open_file(&self.folder.join(name))?)))
    }

    fn save(&self, name: &str, student: &Student, at: Position, layer: Option<usize>, moments: bool) -> Result<()> {
        self.write(name, student.state(layer, moments), at)
    }

    fn write(&self, name: &str, tensors: Vec<Pending<'_, RecoverError>>, at: Position) -> Result<()> {
        let mut metadata = Map::new();
        metadata.insert("position".into(), Value::String(serde_json::to_string(&at).unwrap_or_default()));
        atomically(&self.folder.join(name), |partial| write_safetensors(partial, tensors, &metadata))
    }

    /// Puts the student where the run stood last.
    ///
    /// # Errors
    /// When a file is damaged.
    pub fn load_state(&self, student: &mut Student) -> Result<Position> {
        let Some(mut at) = self.load(STATE, student)? else { return Ok(Position::default()) };
        while let Some(next) = self.load(&block_name(at.stage, at.done), student)? {
            at = next;
        }
        Ok(at)
    }

    /// Puts the best weights into the student.
    ///
    /// # Errors
    /// When the file is damaged.
    pub fn load_best(&self, student: &mut Student) -> Result<Option<Position>> {
        self.load(BEST, student)
    }

    /// A file of a state, and where the run stood.
    fn open(&self, name: &str) -> Result<Option<(Mmap, Position)>> {
        let path = self.folder.join(name);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(io(&path, "open")(e)),
        };
        let damaged = |detail: String| RecoverError::Run { path: path.clone(), detail };
        // SAFETY: the file is this run's own and replaced by renaming only; nobody writes into it.
        let bytes = unsafe { Mmap::map(&file) }.map_err(io(&path, "map"))?;
        let (_, metadata) =
            safetensors::SafeTensors::read_metadata(&bytes).map_err(|e| damaged(format!("is damaged ({e})")))?;
        let position = metadata.metadata().as_ref().and_then(|m| m.get("position"));
        let position = position.and_then(|p| serde_json::from_str(p).ok());
        let position = position.ok_or_else(|| damaged("does not say where the run stood".into()))?;
        Ok(Some((bytes, position)))
    }

    fn load(&self, name: &str, student: &mut Student) -> Result<Option<Position>> {
        let Some((bytes, position)) = self.open(name)? else { return Ok(None) };
        let damaged = |detail: String| RecoverError::Run { path: self.folder.join(name), detail };
        let tensors =
            safetensors::SafeTensors::deserialize(&bytes).map_err(|e| damaged(format!("is damaged ({e})")))?;
        for (name, view) in tensors.tensors() {
            let values = view.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
            if !student.set_state(&name, values) {
                return Err(damaged(format!("holds {name}, which is no part of the student")));
            }
        }
        student.refresh();
        Ok(Some(position))
    }

    /// Removes the folder: the run is over.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub fn remove(self) -> Result<()> {
        fs::remove_dir_all(&self.folder).map_err(io(&self.folder, "remove"))
    }
}

const ABOUT: &str = "run.json";
const CURVE: &str = "curve.jsonl";
const STATE: &str = "state.safetensors";
const BEST: &str = "best.safetensors";

pub(super) fn trained_name(block: usize) -> String {
    format!("trained-{block}.safetensors")
}

fn block_name(stage: usize, block: usize) -> String {
    format!("block-{stage}-{block}.safetensors")
}
