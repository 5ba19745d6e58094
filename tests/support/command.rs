//! The binary as its users run it, in the project's folder: shipped models have the names that documents give them.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fmt::Debug;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

use super::{json, project};

/// The shipped model, unquantized.
pub const BF16: &str = "models/books-bf16";
/// The same in NVFP4.
pub const NVFP4: &str = "models/books-nvfp4";

pub fn recoup<S: AsRef<OsStr>>(args: &[S]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_recoup"));
    // Without a GPU, whatever the machine has: what is expected here are the CPU's bits.
    command.args(args).current_dir(project()).env("CUDA_VISIBLE_DEVICES", "");
    command
}

pub fn run<S: AsRef<OsStr>>(args: &[S]) -> Output {
    recoup(args).output().unwrap()
}

/// What is on stderr.
pub fn said(out: &Output) -> String {
    String::from_utf8_lossy(&out.stderr).into_owned()
}

/// Standard output and standard error of a run that must succeed.
#[track_caller]
pub fn succeed<S: AsRef<OsStr> + Debug>(args: &[S]) -> (String, String) {
    let out = run(args);
    assert!(out.status.success(), "{args:?}: {}", said(&out));
    let stderr = said(&out);
    (String::from_utf8(out.stdout).unwrap(), stderr)
}

/// What a run gives with `--json`.
#[track_caller]
pub fn shown_json<S: AsRef<OsStr> + Debug>(args: &[S]) -> Value {
    serde_json::from_str(&succeed(args).0).unwrap()
}

/// What stderr says of a run that must fail with 1.
#[track_caller]
pub fn fail<S: AsRef<OsStr> + Debug>(args: &[S]) -> String {
    let out = run(args);
    assert_eq!(out.status.code(), Some(1), "{args:?}: {}", said(&out));
    said(&out)
}

/// A folder for the time of a test, whose files are named as commands need them.
pub struct Folder(tempfile::TempDir);

impl Folder {
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    pub fn at(&self, name: impl AsRef<Path>) -> PathBuf {
        // Without a slash at the end, where the name is empty.
        self.path().join(name).components().collect()
    }

    /// The same as text.
    pub fn name(&self, name: impl AsRef<Path>) -> String {
        self.at(name).to_str().unwrap().to_owned()
    }

    /// Writes a file, and the folders that it is in; its name.
    pub fn write(&self, name: impl AsRef<Path>, content: impl AsRef<[u8]>) -> String {
        let file = self.at(name);
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(&file, content).unwrap();
        self.name(file)
    }

    pub fn read(&self, name: impl AsRef<Path>) -> String {
        std::fs::read_to_string(self.at(name)).unwrap()
    }

    pub fn json(&self, name: impl AsRef<Path>) -> Value {
        json(&self.at(name))
    }

    /// A copy of a shipped model that may be changed; its name.
    pub fn model(&self, name: &str, shipped: &str) -> String {
        copy_model(shipped, &self.at(name));
        self.name(name)
    }
}

pub fn copy_model(shipped: &str, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for (name, bytes) in files(&project().join(shipped)) {
        std::fs::write(to.join(name), bytes).unwrap();
    }
}

/// Whole lines of a file that may not be there yet.
pub fn lines(file: &Path) -> usize {
    std::fs::read(file).map_or(0, |bytes| bytes.iter().filter(|b| **b == b'\n').count())
}

/// Files of a folder by name, with what is in them.
pub fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(folder).unwrap().map(Result::unwrap);
    entries.map(|e| (e.file_name().into_string().unwrap(), std::fs::read(e.path()).unwrap())).collect()
}

#[track_caller]
pub fn assert_same_files(a: &Path, b: &Path) {
    let (a, b) = (files(a), files(b));
    assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
    for (name, bytes) in &a {
        assert!(*bytes == b[name], "{name} differs");
    }
}

/// Names in a folder, hidden ones included, in order.
pub fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// The data of a safetensors file, without the header.
pub fn tensor_data(file: &[u8]) -> &[u8] {
    let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    &file[8 + length..]
}
