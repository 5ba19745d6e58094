//! A folder that an object store keeps: fetched when a verb begins, written back while it works and when it ends.
//!
//! Objects are written whole or not at all. A file that grows, such as a journal of answers, is written again from time to time, so
//! that a process that is killed loses little; the same command then goes on from what the store has.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, anyhow, bail};
use object_store::path::Path as Key;
use object_store::{ObjectStore, ObjectStoreExt as _, PutPayload, WriteMultipart, parse_url_opts};
use tokio::runtime::Runtime;
use tokio_stream::StreamExt as _;
use url::Url;

use crate::output::{self, Temporary};

/// Larger files are sent in parts.
const PART: usize = 16 << 20;
/// Between two looks at what has changed; RECOUP_STORE_SECONDS says otherwise.
const EVERY: Duration = Duration::from_secs(30);

/// Temporary folders, and the addresses that people know them by.
static NAMES: Mutex<Vec<(String, String)>> = Mutex::new(Vec::new());

fn names() -> MutexGuard<'static, Vec<(String, String)>> {
    NAMES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What is to be said, with the address in the place of the folder that stands for it here.
pub(super) fn named(text: String) -> String {
    names().iter().fold(text, |text, (folder, address)| text.replace(folder, address))
}

/// A folder below an address.
pub(super) struct Store {
    address: String,
    folder: PathBuf,
    temporary: Option<Temporary>,
    /// Writes back until it is told that the work is over; nothing of what is only read.
    writer: Option<(Sender<()>, JoinHandle<Result<()>>)>,
}

impl Store {
    /// With what the store has there, and what changes is written back.
    pub(super) fn open(address: &str) -> Result<Self> {
        let mut store = Self::fetch(address)?;
        let mut remote = Remote::new(address)?;
        remote.known = files(&store.folder)?;
        let (folder, address) = (store.folder.clone(), store.address.clone());
        let (over, told) = mpsc::channel();
        let writer = std::thread::spawn(move || {
            let mut failed = false;
            loop {
                match told.recv_timeout(every()) {
                    Err(RecvTimeoutError::Timeout) => match remote.write_back(&folder) {
                        Ok(()) => failed = false,
                        Err(e) if !failed => {
                            failed = true;
                            super::say!("warning: {address}: {e:#}; trying again until the work is over");
                        }
                        Err(_) => {}
                    },
                    Ok(()) | Err(RecvTimeoutError::Disconnected) => return remote.write_back(&folder),
                }
            }
        });
        store.writer = Some((over, writer));
        Ok(store)
    }

    /// With what the store has there.
    pub(super) fn fetch(address: &str) -> Result<Self> {
        let remote = Remote::new(address)?;
        let temporary = output::temporary()?;
        let folder = temporary.path().join("output");
        remote.fetch(&folder).with_context(|| format!("{address} cannot be read"))?;
        names().push((folder.display().to_string(), address.into()));
        Ok(Self { address: address.into(), folder, temporary: Some(temporary), writer: None })
    }

    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Writes back what is left to be, and gives `outcome` where all of it is in the store.
    pub(super) fn finish(mut self, outcome: Result<ExitCode>) -> Result<ExitCode> {
        let Some((over, writer)) = self.writer.take() else { return outcome };
        drop(over);
        let written = writer.join().unwrap_or_else(|_| Err(anyhow!("writing back ended in a fault of its own")));
        match written {
            Ok(()) => outcome,
            Err(e) => {
                names().retain(|(_, address)| *address != self.address);
                let kept = self.temporary.take().map_or_else(|| self.folder.clone(), |t| t.keep().join("output"));
                let place = kept.display();
                let e = e.context(format!(
                    "{} cannot be written; what was found is in the folder {place}: copy it there, or start the same command again",
                    self.address
                ));
                // What ended the work comes first.
                match outcome {
                    Ok(_) => Err(e),
                    Err(first) => Err(first.context(format!("and {e:#}"))),
                }
            }
        }
    }
}

fn every() -> Duration {
    let seconds = std::env::var("RECOUP_STORE_SECONDS").ok().and_then(|v| v.trim().parse::<f64>().ok());
    seconds.and_then(|s| Duration::try_from_secs_f64(s).ok()).unwrap_or(EVERY)
}

/// The far end.
struct Remote {
    store: Box<dyn ObjectStore>,
    prefix: Key,
    runtime: Runtime,
    /// Files as they were when they were read or written last.
    known: BTreeMap<PathBuf, (u64, SystemTime)>,
}

impl Remote {
    fn new(address: &str) -> Result<Self> {
        // One for all that speaks TLS in this process; a second time it is there already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let url = Url::parse(address).with_context(|| format!("{address} is no address"))?;
        let environment = std::env::vars_os().filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?)));
        let (store, prefix) = parse_url_opts(&url, environment).with_context(|| {
            format!("{address}: expected s3://BUCKET/PATH, gs://BUCKET/PATH, az://CONTAINER/PATH or file:///PATH")
        })?;
        if prefix.as_ref().is_empty() {
            bail!("{address}: names a whole bucket; give a path in it");
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        Ok(Self { store, prefix, runtime, known: BTreeMap::new() })
    }

    /// Brings every object below the address into `folder`, which is made if there is any.
    fn fetch(&self, folder: &Path) -> Result<()> {
        self.runtime.block_on(async {
            let mut objects = self.store.list(Some(&self.prefix));
            while let Some(object) = objects.next().await {
                let key = object?.location;
                let parts: Option<Vec<_>> = key.prefix_match(&self.prefix).map(Iterator::collect);
                // The address itself may be an object, which is no folder.
                let Some(parts) = parts.filter(|parts| !parts.is_empty()) else { continue };
                let names: Vec<&str> = parts.iter().map(AsRef::as_ref).collect();
                if names.iter().any(|name| matches!(*name, "." | "..") || name.contains(['/', '\\'])) {
                    bail!("{key}: is no name for a file");
                }
                let file = names.iter().fold(folder.to_path_buf(), |path, name| path.join(name));
                file.parent().map_or(Ok(()), fs::create_dir_all)?;
                let mut out = create(&file)?;
                let mut bytes = self.store.get(&key).await?.into_stream();
                while let Some(bytes) = bytes.next().await {
                    std::io::Write::write_all(&mut out, &bytes?).with_context(|| file.display().to_string())?;
                }
            }
            Ok(())
        })
    }

    /// Writes every file of `folder` that is new or has changed.
    fn write_back(&mut self, folder: &Path) -> Result<()> {
        for (name, state) in files(folder)? {
            if self.known.get(&name) == Some(&state) {
                continue;
            }
            // Gone since, or replaced: the next look finds what is there then.
            let Ok(bytes) = fs::read(folder.join(&name)) else { continue };
            let names: Option<Vec<&str>> = name.iter().map(|part| part.to_str()).collect();
            let Some(names) = names else { bail!("{}: its name is no text, which objects need", name.display()) };
            let key = names.iter().fold(self.prefix.clone(), |key, name| key.join(*name));
            self.runtime.block_on(async {
                if bytes.len() <= PART {
                    return self.store.put(&key, PutPayload::from(bytes)).await.map(|_| ());
                }
                let upload = self.store.put_multipart(&key).await?;
                let mut write = WriteMultipart::new_with_chunk_size(upload, PART);
                for part in bytes.chunks(PART) {
                    write.wait_for_capacity(4).await?;
                    write.write(part);
                }
                write.finish().await.map(|_| ())
            })?;
            self.known.insert(name, state);
        }
        Ok(())
    }
}

fn create(file: &Path) -> Result<fs::File> {
    fs::File::create(file).with_context(|| format!("{}: cannot be written", file.display()))
}

/// The files below a folder with their sizes and times, by what they are called there; what is hidden is on its way.
fn files(folder: &Path) -> Result<BTreeMap<PathBuf, (u64, SystemTime)>> {
    let mut found = BTreeMap::new();
    let mut open = vec![PathBuf::new()];
    while let Some(below) = open.pop() {
        let Ok(entries) = fs::read_dir(folder.join(&below)) else { continue };
        for entry in entries.flatten() {
            if entry.file_name().to_string_lossy().starts_with('.') {
                continue;
            }
            let Ok(about) = entry.metadata() else { continue };
            let name = below.join(entry.file_name());
            if about.is_dir() {
                open.push(name);
            } else {
                found.insert(name, (about.len(), about.modified()?));
            }
        }
    }
    Ok(found)
}
