//! Where a run writes: checked and claimed in its first second, scratch in one hidden folder, and at the end the work is
//! kept, whatever becomes of its last step.
//!
//! The hidden folder is `.OUT.recoup` beside an output `OUT` that is still to appear, so that one rename makes it, and
//! `OUT/.recoup` within a folder that exists: a mount point, or the target of a symlink, cannot be renamed to, and a folder
//! keeps its owner and rights. It is locked while its run lives. A second run for the same output is refused; what a run
//! that was killed left there is taken away by the next.

mod lock;
pub mod space;

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use recoup_ground::digest::sha256;

use lock::Lock;
use space::human_bytes;

/// Why a run cannot write where it was told to.
#[derive(Debug, thiserror::Error)]
pub enum OutputError {
    /// The operating system said no.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io { path: PathBuf, action: &'static str, source: io::Error },
    /// The name cannot be that of an output, or something has it already.
    #[error("{}: {detail}", path.display())]
    Refused { path: PathBuf, detail: String },
    /// Another process writes there.
    #[error("{}: another run writes there: {owner}; wait for its end, or choose another output", path.display())]
    InUse { path: PathBuf, owner: String },
    /// By the estimate, in bytes, the disk would be full before the end.
    #[error(
        "{}: {what} needs about {} of disk, and {} are free; free some space or choose another output",
        path.display(), human_bytes(*needed), human_bytes(*free)
    )]
    NoSpace { path: PathBuf, what: String, needed: u64, free: u64 },
    /// The work is done and on disk, but not under its name.
    #[error(
        "{}: the result is finished and whole, but cannot be moved to its name: {source}; it lies in {}: move it from \
         there by hand",
        target.display(), finished.display()
    )]
    NotNamed { target: PathBuf, finished: PathBuf, source: io::Error },
}

/// Result of claiming or finishing an output.
pub type Result<T> = std::result::Result<T, OutputError>;

/// The finished work, where it could not get its name. Never taken away.
const FINISHED: &str = "finished";
/// The state of a training run, where it has no other place. Taken away by the run itself.
const TRAINING: &str = "training";
/// The hidden folder within an output that exists.
const INSIDE: &str = ".recoup";
/// Longest name of a file, in bytes, that every usual file system takes.
const LONGEST_NAME: usize = 255;

/// An output that belongs to this process until the last clone goes; its scratch goes with it.
#[derive(Clone, Debug)]
pub struct Claim(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// Absolute, without symlinks.
    target: PathBuf,
    hidden: PathBuf,
    /// Within the target rather than beside it.
    inside: bool,
    /// What a run that was killed had left.
    cleared: bool,
    /// Last, so that it is held until all else is gone.
    lock: Lock,
}

/// Outputs that this process has claimed, so that the parts of a run share a claim and a signal can end them all.
static CLAIMS: Mutex<Vec<Weak<Inner>>> = Mutex::new(Vec::new());
/// Temporary folders that belong to no output.
static TEMPORARY: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());
/// Held while finished work gets its name, which a signal must not come between.
static FINISHING: Mutex<()> = Mutex::new(());

fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn fault<'a>(path: &'a Path, action: &'static str) -> impl Fn(io::Error) -> OutputError + 'a {
    move |source| OutputError::Io { path: path.into(), action, source }
}

fn refused<T>(path: &Path, detail: &str) -> Result<T> {
    Err(OutputError::Refused { path: path.into(), detail: detail.into() })
}

/// Claims a folder that will appear when it is whole: it must not exist, or be empty.
///
/// # Errors
/// When it holds something, is no folder, cannot be written, or another run writes there.
pub fn folder(target: &Path) -> Result<Claim> {
    let (target, exists) = resolved(target)?;
    if exists {
        if !target.is_dir() {
            return refused(&target, "exists and is no folder; choose another output folder");
        }
        let mut names = fs::read_dir(&target).map_err(fault(&target, "list"))?.map(|e| e.map(|e| e.file_name()));
        // A file system of its own begins with lost+found.
        if names.any(|n| n.is_ok_and(|n| n != INSIDE && n != "lost+found")) {
            let detail = "exists and is not empty; nothing is overwritten, choose another output folder";
            return refused(&target, detail);
        }
    }
    claim(target, exists)
}

/// Claims a folder that grows, such as one of answers and reports: it may exist and hold what an earlier run kept.
///
/// # Errors
/// As [`folder`], but for what the folder holds.
pub fn growing(target: &Path) -> Result<Claim> {
    no_address(target)?;
    fs::create_dir_all(target).map_err(fault(target, "create"))?;
    let claim = claim(resolved(target)?.0, true)?;
    sweep(claim.target());
    fs::read_dir(claim.target()).into_iter().flatten().flatten().for_each(|e| sweep(&e.path()));
    Ok(claim)
}

/// Beginning and end of the names of files that are not whole yet.
const PARTIAL: (&str, &str) = (".recoup-", ".tmp");

/// A file to write beside one that it will replace; it goes with this value unless it is given the other's name.
///
/// # Errors
/// When it cannot be made.
pub fn partial_in(folder: &Path) -> Result<tempfile::TempPath> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(PARTIAL.0).suffix(PARTIAL.1);
    // As any other file, by the user's umask.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    Ok(builder.tempfile_in(folder).map_err(fault(folder, "create a file in"))?.into_temp_path())
}

/// Removes files that were not whole when the process that wrote them was killed. The folder must be claimed.
pub fn sweep(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let name = name.as_encoded_bytes();
        if name.starts_with(PARTIAL.0.as_bytes()) && name.ends_with(PARTIAL.1.as_bytes()) {
            remove(&entry.path());
        }
    }
}

/// Claims a file, which is replaced when the new one is whole.
///
/// # Errors
/// When a folder has the name, its folder cannot be written, or another run writes it.
pub fn file(target: &Path) -> Result<Claim> {
    let (target, _) = resolved(target)?;
    if target.is_dir() {
        return refused(&target, "is a folder; name a file");
    }
    claim(target, false)
}

/// A folder for what nobody keeps; it goes with this value, and when the process is told to end.
///
/// # Errors
/// When the system's folder for temporary files cannot be written.
pub fn temporary() -> Result<Temporary> {
    let folder = tempfile::Builder::new().prefix("recoup-").tempdir();
    let folder = folder.map_err(fault(&std::env::temp_dir(), "create a temporary folder in"))?;
    held(&TEMPORARY).push(folder.path().into());
    Ok(Temporary(folder))
}

/// See [`temporary`].
#[derive(Debug)]
pub struct Temporary(tempfile::TempDir);

impl Temporary {
    /// It stays when this value goes; where it is.
    #[must_use]
    pub fn keep(mut self) -> PathBuf {
        self.0.disable_cleanup(true);
        self.0.path().into()
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        held(&TEMPORARY).retain(|p| p != self.0.path());
    }
}

/// Takes away the scratch of all that this process writes, which is about to end; nothing gets its name after that.
pub fn abandon() {
    std::mem::forget(held(&FINISHING));
    let claims: Vec<Arc<Inner>> = held(&CLAIMS).iter().filter_map(Weak::upgrade).collect();
    for claim in &claims {
        claim.clear();
        claim.lock.remove();
        let _ = fs::remove_dir(&claim.hidden);
    }
    held(&TEMPORARY).iter().for_each(|folder| remove(folder));
    // Dropped, they would be cleared once more, by which time another run may have claimed them.
    std::mem::forget(claims);
}

/// An address would be taken for a folder of that name.
fn no_address(target: &Path) -> Result<()> {
    if target.to_str().is_some_and(|text| text.contains("://")) {
        let detail = "is an address, and outputs are folders (eval, compare and quantize write to object stores in a build with \
                      --features object-store)";
        return refused(target, detail);
    }
    Ok(())
}

/// The target without symlinks and relative parts, its parents made; whether it exists.
fn resolved(target: &Path) -> Result<(PathBuf, bool)> {
    no_address(target)?;
    match fs::metadata(target) {
        Ok(_) => Ok((fs::canonicalize(target).map_err(fault(target, "resolve"))?, true)),
        Err(e) if e.kind() == ErrorKind::NotFound && fs::symlink_metadata(target).is_ok() => {
            refused(target, "is a symlink to nothing; make the folder it names, or remove it")
        }
        Err(e) if e.kind() == ErrorKind::NotFound => {
            let Some(name) = target.file_name() else { return refused(target, "is no name for an output") };
            let parent = target.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
            fs::create_dir_all(parent).map_err(fault(parent, "create"))?;
            Ok((fs::canonicalize(parent).map_err(fault(parent, "resolve"))?.join(name), false))
        }
        Err(e) => Err(fault(target, "look at")(e)),
    }
}

/// `.NAME.recoup`, or a digest of the name where that would be too long.
fn hidden_name(name: &OsStr) -> OsString {
    let mut hidden = OsString::from(".");
    hidden.push(name);
    hidden.push(".recoup");
    if hidden.len() > LONGEST_NAME {
        hidden = format!(".recoup-{}", &sha256(name.as_encoded_bytes())[..16]).into();
    }
    hidden
}

fn claim(target: PathBuf, inside: bool) -> Result<Claim> {
    let mut claims = held(&CLAIMS);
    claims.retain(|c| c.strong_count() > 0);
    if let Some(held) = claims.iter().filter_map(Weak::upgrade).find(|c| c.target == target) {
        return Ok(Claim(held));
    }
    let beside = target.file_name().map(|name| target.with_file_name(hidden_name(name)));
    let hidden = match beside {
        Some(beside) if !inside => beside,
        beside => {
            // A run that began before the folder was there.
            if let Some(beside) = beside.filter(|b| b.exists()) {
                drop(inner(target.clone(), beside, false)?);
            }
            target.join(INSIDE)
        }
    };
    let inner = Arc::new(inner(target, hidden, inside)?);
    claims.push(Arc::downgrade(&inner));
    Ok(Claim(inner))
}

fn inner(target: PathBuf, hidden: PathBuf, inside: bool) -> Result<Inner> {
    let lock = Lock::take(&hidden, &target)?;
    let mut inner = Inner { target, hidden, inside, cleared: false, lock };
    let finished = inner.hidden.join(FINISHED);
    if finished.exists() {
        let detail = "is the finished result of an earlier run that could not be moved to its name; move or remove it";
        return refused(&finished, detail);
    }
    inner.cleared = inner.clear();
    Ok(inner)
}

impl Inner {
    /// Removes the scratch; whether there was any.
    fn clear(&self) -> bool {
        let mut any = false;
        for entry in fs::read_dir(&self.hidden).into_iter().flatten().flatten() {
            if ![FINISHED, TRAINING, lock::FILE].iter().any(|kept| entry.file_name() == *kept) {
                any = true;
                remove(&entry.path());
            }
        }
        any
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.clear();
        self.lock.remove();
        // Where finished work or a training's state is left, it stays.
        let _ = fs::remove_dir(&self.hidden);
    }
}

/// Removes what is there. Another thread may still write into it: tried again a few times.
fn remove(path: &Path) {
    for _ in 0..10 {
        let removed = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
        if removed.is_ok() || fs::symlink_metadata(path).is_err() {
            return;
        }
    }
}

impl Claim {
    /// Where the result will be.
    #[must_use]
    pub fn target(&self) -> &Path {
        &self.0.target
    }

    /// A path in the hidden folder, for what is removed when the claim goes.
    #[must_use]
    pub fn scratch(&self, name: &str) -> PathBuf {
        self.0.hidden.join(name)
    }

    /// Whether something of a run that was killed was there, and taken away.
    #[must_use]
    pub fn cleared(&self) -> bool {
        self.0.cleared
    }

    /// Where a training keeps its state beside the output: `OUT.training`, or within an output that is a file system of
    /// its own or whose parent cannot be written, which outlives what is around it.
    #[must_use]
    pub fn training(&self) -> PathBuf {
        let mut name = self.0.target.file_name().unwrap_or_default().to_os_string();
        name.push(".training");
        let beside = self.0.target.with_file_name(name);
        let within = self.0.hidden.join(TRAINING);
        let fits = !self.0.inside || !space::is_mount(&self.0.target) && writable(&self.0.target);
        if beside.exists() || fits && !within.exists() { beside } else { within }
    }

    /// Refuses where fewer than `needed` bytes, an estimate, are free for `what`.
    ///
    /// # Errors
    /// When the file system has less room.
    pub fn room(&self, what: &str, needed: u64) -> Result<()> {
        match space::free(&self.0.hidden) {
            Some(free) if free < needed => {
                Err(OutputError::NoSpace { path: self.0.target.clone(), what: what.into(), needed, free })
            }
            _ => Ok(()),
        }
    }

    /// Writes a small file whole and gives it its name.
    ///
    /// # Errors
    /// When it cannot be written or named.
    pub fn write(&self, contents: &str) -> Result<()> {
        let work = self.scratch("whole");
        fs::write(&work, contents).map_err(fault(&work, "write"))?;
        self.finish(&work)
    }

    /// Gives finished work, a path in the hidden folder, its name. Where that fails it stays in the hidden folder.
    ///
    /// # Errors
    /// When it cannot be moved, such as because something came to have the name meanwhile.
    pub fn finish(&self, work: &Path) -> Result<()> {
        let _finishing = held(&FINISHING);
        let finished = self.0.hidden.join(FINISHED);
        fs::rename(work, &finished).map_err(fault(work, "rename"))?;
        let moved = sync(&finished).and_then(|()| match self.0.inside {
            true => move_into(&finished, &self.0.target),
            false => rename(&finished, &self.0.target),
        });
        moved.map_err(|source| OutputError::NotNamed { target: self.0.target.clone(), finished, source })?;
        let folder = if self.0.inside { Some(&*self.0.target) } else { self.0.target.parent() };
        folder.map_or(Ok(()), |f| sync(f).map_err(fault(f, "sync")))
    }
}

/// Whether a folder can be made beside `target`.
fn writable(target: &Path) -> bool {
    target.parent().is_some_and(|p| tempfile::Builder::new().prefix(".recoup-").tempdir_in(p).is_ok())
}

fn rename(from: &Path, to: &Path) -> io::Result<()> {
    // POSIX replaces an empty folder in the rename; Windows does not.
    if cfg!(windows) && to.is_dir() {
        fs::remove_dir(to)?;
    }
    fs::rename(from, to)
}

/// Moves what a folder holds into another; config.json last, so that until then it is no checkpoint.
fn move_into(from: &Path, to: &Path) -> io::Result<()> {
    let mut names: Vec<OsString> = fs::read_dir(from)?.map(|e| e.map(|e| e.file_name())).collect::<io::Result<_>>()?;
    names.sort_by_key(|n| n == "config.json");
    if let Some(name) = names.iter().find(|n| fs::symlink_metadata(to.join(n)).is_ok()) {
        return Err(io::Error::new(ErrorKind::AlreadyExists, format!("it holds {} by now", name.display())));
    }
    names.iter().try_for_each(|name| fs::rename(from.join(name), to.join(name)))?;
    fs::remove_dir(from)
}

/// Makes the names in a folder durable. Only POSIX can open a folder to do that, and some file systems cannot at all.
///
/// # Errors
/// When the device fails.
pub fn sync(folder: &Path) -> io::Result<()> {
    if !cfg!(unix) {
        return Ok(());
    }
    match fs::File::open(folder)?.sync_all() {
        Err(e) if matches!(e.kind(), ErrorKind::InvalidInput | ErrorKind::Unsupported) => Ok(()),
        synced => synced,
    }
}

#[cfg(test)]
mod tests;
