//! Checkpoints by their Hugging Face id, downloaded into the cache that the Python tools use too.
//!
//! The cache is hf-hub's, whose layout is huggingface_hub's: `models--org--name/{refs/REVISION, snapshots/COMMIT/FILE →
//! blobs/HASH}`. Its downloads are not used: they read neither HF_TOKEN nor HF_HUB_OFFLINE, check no hash and know no proxies
//! or authorities of one's own. A file
//! is whole before it has its name: bytes go to `HASH.incomplete`, are resumed there, and where the hub gives a SHA-256 it
//! must be theirs.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use hf_hub::{Cache, CacheRepo, Repo, RepoType};
use recoup_eval::http::address::{Address, NoAddress};
use recoup_eval::http::{Broken, Client, ClientError, Reply, Settings, retry};
use serde::Deserialize;
use sha2::{Digest as _, Sha256};

/// Endings of the files at a repository's top that make a checkpoint: weights, configuration, tokenizer, templates.
const SUFFIXES: [&str; 5] = [".safetensors", ".json", ".jinja", ".model", ".txt"];
/// Folder of further chat templates, as transformers stores them.
const TEMPLATES: &str = "additional_chat_templates/";
/// The same weights again in Mistral's own layout, beside those of transformers.
const CONSOLIDATED: &str = "consolidated";
const ENDPOINT: &str = "https://huggingface.co";
const TRIES: usize = 6;
/// Without a byte for this long, a connection counts as broken.
const SILENCE: Duration = Duration::from_secs(30);
const MOST_REDIRECTS: usize = 10;
/// Of a listing of files.
const LARGEST_LISTING: u64 = 1 << 26;

/// Why a checkpoint could not be had from the hub.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    #[error("`{0}` is no id of the hub: expected org/name or org/name@revision")]
    Id(String),
    #[error("HF_ENDPOINT: {0}")]
    Endpoint(NoAddress),
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error(
        "{at} cannot be reached: {broken}; without a network, give a folder, or fill the cache elsewhere (hf download)"
    )]
    Unreachable { at: String, broken: Broken },
    #[error("HF_HUB_OFFLINE is set, and the cache ({}) does not hold the whole of {id} at {revision}", cache.display())]
    Offline { id: String, revision: String, cache: PathBuf },
    #[error(
        "{at}: HTTP {status}: the hub does not show {id}{}; is the id right? A private one needs HF_TOKEN with a token that \
         may read it",
        said(message)
    )]
    NoAccess { at: String, status: u16, id: String, message: String },
    #[error(
        "{at}: HTTP {status}: {id} is gated{}: accept its terms on its page, and set HF_TOKEN to a token of that account",
        said(message)
    )]
    Gated { at: String, status: u16, id: String, message: String },
    #[error("{at}: HTTP 404: {id} has no {what}{}", said(message))]
    NotFound { at: String, id: String, what: String, message: String },
    #[error("{at}: HTTP {status}{}", said(message))]
    Status { at: String, status: u16, message: String },
    #[error("{at}: not what a hub answers: {problem}")]
    Unexpected { at: String, problem: String },
    #[error("{0} holds no safetensors files at its top")]
    NoWeights(String),
    #[error("{file}: {expected} were announced and {found} came; start again")]
    Damaged { file: String, expected: String, found: String },
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: std::io::Error },
    #[error("no folder for the cache: set HF_HOME")]
    NoHome,
}

fn said(message: &str) -> String {
    if message.is_empty() { String::new() } else { format!(" ({message})") }
}

/// `org/name`, and a branch, tag or commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Id {
    pub name: String,
    pub revision: String,
}

impl Id {
    /// Reads `org/name` or `org/name@revision`.
    ///
    /// # Errors
    /// When it is neither.
    pub fn parse(text: &str) -> Result<Self, HubError> {
        let (name, revision) = text.split_once('@').unwrap_or((text, "main"));
        let plain = |part: &str| {
            let legal = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
            !part.is_empty() && part.chars().all(legal) && !part.starts_with('.') && !part.contains("..")
        };
        let is_name = name.split_once('/').is_some_and(|(org, name)| plain(org) && plain(name));
        if is_name && !revision.is_empty() && revision.split('/').all(plain) {
            Ok(Self { name: name.to_owned(), revision: revision.to_owned() })
        } else {
            Err(HubError::Id(text.to_owned()))
        }
    }
}

/// A listing of a repository's files, as the hub gives it.
#[derive(Deserialize)]
struct Listing {
    sha: String,
    siblings: Vec<Listed>,
}

#[derive(Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Listed {
    rfilename: String,
    size: Option<u64>,
    blob_id: Option<String>,
    lfs: Option<Lfs>,
}

#[derive(Clone, Deserialize)]
struct Lfs {
    sha256: Option<String>,
    size: Option<u64>,
}

impl Listed {
    fn size(&self) -> Option<u64> {
        self.lfs.as_ref().and_then(|l| l.size).or(self.size)
    }

    fn sha256(&self) -> Option<&str> {
        self.lfs.as_ref().and_then(|l| l.sha256.as_deref()).filter(|s| s.len() == 64)
    }
}

/// Where checkpoints are had from and kept, by the variables that huggingface_hub reads.
pub struct Hub {
    endpoint: Address,
    cache: PathBuf,
    token: Option<String>,
    offline: bool,
    variable: fn(&str) -> Option<String>,
}

impl Hub {
    /// By HF_ENDPOINT; HF_HUB_CACHE, HF_HOME, XDG_CACHE_HOME, HOME; HF_TOKEN, HF_TOKEN_PATH or the token of
    /// `hf auth login`; HF_HUB_OFFLINE.
    ///
    /// # Errors
    /// When HF_ENDPOINT is no address, or there is no place for the cache.
    pub fn from_env(variable: fn(&str) -> Option<String>) -> Result<Self, HubError> {
        let set = |name: &str| variable(name).filter(|v| !v.trim().is_empty());
        let endpoint = set("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.to_owned());
        let home = set("HF_HOME")
            .map(PathBuf::from)
            .or_else(|| set("XDG_CACHE_HOME").map(|x| Path::new(&x).join("huggingface")))
            .or_else(|| set("HOME").or_else(|| set("USERPROFILE")).map(|h| Path::new(&h).join(".cache/huggingface")));
        let cache = set("HF_HUB_CACHE").map(PathBuf::from).or_else(|| home.as_ref().map(|h| h.join("hub")));
        let stored = set("HF_TOKEN_PATH").map(PathBuf::from).or_else(|| home.map(|h| h.join("token")));
        let token = set("HF_TOKEN").or_else(|| stored.and_then(|path| std::fs::read_to_string(path).ok()));
        let offline = set("HF_HUB_OFFLINE")
            .is_some_and(|v| ["1", "ON", "YES", "TRUE"].contains(&v.trim().to_uppercase().as_str()));
        Ok(Self {
            endpoint: Address::parse(&endpoint).map_err(HubError::Endpoint)?,
            cache: cache.ok_or(HubError::NoHome)?,
            token: token.map(|t| t.trim().to_owned()).filter(|t| !t.is_empty()),
            offline,
            variable,
        })
    }

    /// The folder of `id`, with what it lacks downloaded. `progress` gets bytes done and bytes in all; `note` a sentence
    /// where the cache is used though the hub could not be asked.
    ///
    /// # Errors
    /// When the hub cannot be reached, refuses, or holds no safetensors under that id; when a download is not what was
    /// announced; when the cache cannot be written.
    pub fn folder(
        &self,
        id: &Id,
        progress: &mut dyn FnMut(u64, u64),
        note: &mut dyn FnMut(&str),
    ) -> Result<PathBuf, HubError> {
        let repo = Repo::with_revision(id.name.clone(), RepoType::Model, id.revision.clone());
        let place = self.cache.join(repo.folder_name());
        let cache = Cache::new(self.cache.clone()).repo(repo);
        let cached = cached(&cache, &id.revision);
        if self.offline {
            return cached.ok_or_else(|| HubError::Offline {
                id: id.name.clone(),
                revision: id.revision.clone(),
                cache: self.cache.clone(),
            });
        }
        if let Some(folder) = cached.as_ref().filter(|f| f.ends_with(&id.revision)) {
            // A commit does not change.
            return Ok(folder.clone());
        }
        let listing = match self.listing(id) {
            Err(e @ HubError::Unreachable { .. }) => {
                let Some(folder) = cached else { return Err(e) };
                note(&format!("note: {e}. Taken from the cache, as it was last downloaded: {}", folder.display()));
                return Ok(folder);
            }
            listing => listing?,
        };
        let files = wanted(&listing.siblings);
        if !files.iter().any(|f| f.rfilename.ends_with(".safetensors")) {
            return Err(HubError::NoWeights(id.name.clone()));
        }
        let snapshot = cache.pointer_path(&listing.sha);
        let all: u64 = files.iter().filter_map(Listed::size).sum();
        let mut done = 0;
        for file in &files {
            if !snapshot.join(&file.rfilename).exists() {
                self.download(id, &listing.sha, file, &place, &mut |bytes| progress(done + bytes, all))?;
            }
            done += file.size().unwrap_or(0);
            progress(done, all);
        }
        if id.revision != listing.sha {
            cache.create_ref(&listing.sha).map_err(|source| HubError::Io { path: place.clone(), source })?;
        }
        Ok(snapshot)
    }

    fn listing(&self, id: &Id) -> Result<Listing, HubError> {
        let revision = id.revision.replace('/', "%2F");
        let path = format!("/api/models/{}/revision/{revision}", id.name);
        let (client, mut reply, at) =
            self.ask(id, &path, Some("blobs=true"), 0, &format!("revision {}", id.revision))?;
        let bytes = client
            .bytes(&mut reply, LARGEST_LISTING)
            .map_err(|broken| HubError::Unreachable { at: at.clone(), broken })?;
        let listing: Listing = serde_json::from_slice(&bytes)
            .map_err(|e| HubError::Unexpected { at: at.clone(), problem: e.to_string() })?;
        let is_plain = |text: &str| !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric());
        if !is_plain(&listing.sha) {
            return Err(HubError::Unexpected { at, problem: format!("the commit `{}`", listing.sha) });
        }
        Ok(listing)
    }

    /// Brings one file into the cache and gives it its name in the snapshot.
    fn download(
        &self,
        id: &Id,
        commit: &str,
        file: &Listed,
        place: &Path,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(), HubError> {
        let name = &file.rfilename;
        let plain = |hash: &&str| !hash.is_empty() && hash.chars().all(|c| c.is_ascii_alphanumeric());
        // Without a hash from the hub, commit and name say which bytes these are.
        let hash = file
            .sha256()
            .or(file.blob_id.as_deref())
            .filter(plain)
            .map_or_else(|| format!("{commit}-{}", name.replace('/', "-")), str::to_owned);
        let blob = place.join("blobs").join(&hash);
        let partial = place.join("blobs").join(format!("{hash}.incomplete"));
        parent(&blob)?;
        if !blob.exists() {
            let io = |source| HubError::Io { path: partial.clone(), source };
            let mut out =
                OpenOptions::new().create(true).truncate(false).read(true).write(true).open(&partial).map_err(io)?;
            // Another process that downloads the same is waited for; what it leaves is gone on from.
            out.lock().map_err(io)?;
            if !blob.exists() {
                let mut tries = 0;
                while let Err((error, waited)) = self.fetch(id, commit, file, &mut out, &partial, progress) {
                    tries += 1;
                    if tries == TRIES || !is_transient(&error) {
                        return Err(error);
                    }
                    std::thread::sleep(waited.unwrap_or_else(|| retry::backoff(tries)));
                }
                check(file, &mut out, &partial)?;
                out.sync_all().map_err(io)?;
                std::fs::rename(&partial, &blob).map_err(|source| HubError::Io { path: blob.clone(), source })?;
            }
        }
        let named = place.join("snapshots").join(commit).join(name);
        parent(&named)?;
        let up = "../".repeat(2 + name.matches('/').count());
        link(&format!("{up}blobs/{hash}"), &blob, &named).map_err(|source| HubError::Io { path: named, source })
    }

    /// Appends to `out` what it lacks of the file.
    fn fetch(
        &self,
        id: &Id,
        commit: &str,
        file: &Listed,
        out: &mut File,
        path: &Path,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(), (HubError, Option<Duration>)> {
        let io = |source| (HubError::Io { path: path.to_owned(), source }, None);
        let mut have = out.seek(SeekFrom::End(0)).map_err(io)?;
        if file.size() == Some(have) {
            return Ok(());
        }
        if file.size().is_some_and(|size| size < have) {
            have = 0;
        }
        let from = format!("/{}/resolve/{commit}/{}", id.name, file.rfilename.replace(' ', "%20"));
        let (client, mut reply, at) =
            self.ask(id, &from, None, have, &format!("file {}", file.rfilename)).map_err(|e| (e, None))?;
        let wait = retry::asked(|name| reply.header(name), SystemTime::now());
        if reply.status != 206 {
            // The whole again: the server does not go on from the middle.
            have = 0;
        }
        out.set_len(have).map_err(io)?;
        out.seek(SeekFrom::Start(have)).map_err(io)?;
        let mut buffer = vec![0; 1 << 18];
        let mut reader = reply.reader();
        loop {
            let read = match reader.read(&mut buffer) {
                Ok(read) => read,
                Err(e) => return Err((HubError::Unreachable { at, broken: client.read_failure(e) }, wait)),
            };
            if read == 0 {
                break;
            }
            out.write_all(&buffer[..read]).map_err(io)?;
            have += read as u64;
            progress(have);
        }
        match file.size() {
            Some(size) if have < size => {
                let broken = Broken::Connection(format!("{have} of {size} bytes came"));
                Err((HubError::Unreachable { at, broken }, wait))
            }
            _ => Ok(()),
        }
    }

    /// An answer of success to a GET of `path` from byte `from` on, whatever it is redirected to; the token goes to the hub
    /// alone.
    fn ask(
        &self,
        id: &Id,
        path: &str,
        query: Option<&str>,
        from: u64,
        what: &str,
    ) -> Result<(Client, Reply, String), HubError> {
        let settings = Settings { whole: None, silence: SILENCE, ca_file: None };
        let query = query.map_or_else(String::new, |q| format!("?{q}"));
        let mut address = Address::parse(&format!("{}{query}", self.endpoint.url(path))).map_err(HubError::Endpoint)?;
        let token = self.token.as_ref().map(|t| format!("Bearer {t}")).or_else(|| self.endpoint.basic());
        let range = format!("bytes={from}-");
        for _ in 0..=MOST_REDIRECTS {
            let at = address.shown("").split('?').next().unwrap_or_default().to_owned();
            let client = Client::new(&address, &settings, &self.variable)?;
            let to_hub = address.origin() == self.endpoint.origin();
            let mut headers = vec![("user-agent", concat!("recoup/", env!("CARGO_PKG_VERSION")))];
            headers.extend(token.as_deref().filter(|_| to_hub).map(|t| ("authorization", t)));
            headers.extend((from > 0).then_some(("range", range.as_str())));
            let via = client.via().map_or_else(String::new, |v| format!(", {v}"));
            let at = format!("{at}{via}");
            let mut reply = client
                .ask(&address.url(""), &headers, None)
                .map_err(|broken| HubError::Unreachable { at: at.clone(), broken })?;
            match (reply.status, reply.header("location")) {
                (200..=299, _) => return Ok((client, reply, at)),
                (301 | 302 | 303 | 307 | 308, Some(location)) => {
                    let next = match location.strip_prefix('/') {
                        Some(rest) if !rest.starts_with('/') => format!("{}{location}", address.origin()),
                        _ => location.to_owned(),
                    };
                    address = Address::parse(&next)
                        .map_err(|e| HubError::Unexpected { at, problem: format!("it redirects to {e}") })?;
                }
                (status, _) => {
                    let code = reply.header("x-error-code").unwrap_or_default().to_owned();
                    let mut message = reply.header("x-error-message").unwrap_or_default().to_owned();
                    if message.is_empty() {
                        let bytes = client.bytes(&mut reply, 1 << 16).unwrap_or_default();
                        let said = serde_json::from_slice::<serde_json::Value>(&bytes).ok();
                        message = said.and_then(|v| Some(v.get("error")?.as_str()?.to_owned())).unwrap_or_default();
                    }
                    let id = id.name.clone();
                    let is_gated = code == "GatedRepo" || message.to_lowercase().contains("gated");
                    return Err(match status {
                        401 | 403 if is_gated => HubError::Gated { at, status, id, message },
                        401 | 403 => HubError::NoAccess { at, status, id, message },
                        404 if code == "RepoNotFound" => HubError::NoAccess { at, status, id, message },
                        404 => HubError::NotFound { at, id, what: what.to_owned(), message },
                        _ => HubError::Status { at, status, message },
                    });
                }
            }
        }
        Err(HubError::Unexpected { at: self.endpoint.shown(path), problem: "it redirects without end".to_owned() })
    }
}

/// Whether another try may succeed.
fn is_transient(error: &HubError) -> bool {
    match error {
        HubError::Unreachable { broken, .. } => {
            matches!(broken, Broken::Connection(_) | Broken::TimedOut(_) | Broken::Refused | Broken::Proxy(_))
        }
        HubError::Status { status, .. } => matches!(status, 408 | 429 | 500..=599),
        _ => false,
    }
}

/// The snapshot that the cache has of a revision, if it is whole.
fn cached(cache: &CacheRepo, revision: &str) -> Option<PathBuf> {
    // By a branch or tag that the cache knows, or by a commit.
    let folder = match cache.get("config.json") {
        Some(file) => file.parent()?.to_owned(),
        None => cache.pointer_path(revision),
    };
    is_whole(&folder).then_some(folder)
}

/// Whether a snapshot has its configuration and every file of weights that its index names.
fn is_whole(folder: &Path) -> bool {
    let index = std::fs::read(folder.join("model.safetensors.index.json")).ok();
    let weights = match index.and_then(|text| serde_json::from_slice::<serde_json::Value>(&text).ok()) {
        Some(index) => {
            let map = index.get("weight_map").and_then(serde_json::Value::as_object);
            map.is_some_and(|m| m.values().all(|f| f.as_str().is_some_and(|f| folder.join(f).exists())))
        }
        None => std::fs::read_dir(folder).is_ok_and(|files| {
            files.flatten().any(|f| f.file_name().to_string_lossy().ends_with(".safetensors") && f.path().exists())
        }),
    };
    weights && folder.join("config.json").exists()
}

/// What of a repository makes the checkpoint; other folders hold other formats of the same model.
fn wanted(all: &[Listed]) -> Vec<Listed> {
    let is_safe = |name: &str| !name.contains('\\') && name.split('/').all(|part| !part.is_empty() && part != "..");
    let is_wanted = |name: &str| {
        let here = !name.contains('/') || name.strip_prefix(TEMPLATES).is_some_and(|rest| !rest.contains('/'));
        here && is_safe(name) && SUFFIXES.iter().any(|s| name.ends_with(s))
    };
    let weights = |name: &str| name.ends_with(".safetensors");
    let files = || all.iter().filter(|f| is_wanted(&f.rfilename));
    let has_other = files().any(|f| weights(&f.rfilename) && !f.rfilename.starts_with(CONSOLIDATED));
    files().filter(|f| !(has_other && f.rfilename.starts_with(CONSOLIDATED))).cloned().collect()
}

/// Compares a downloaded file with what the hub announced; one that differs is taken away.
fn check(file: &Listed, out: &mut File, path: &Path) -> Result<(), HubError> {
    let io = |source| HubError::Io { path: path.to_owned(), source };
    let found = out.seek(SeekFrom::End(0)).map_err(io)?;
    let differs = |expected: String, found: String| {
        let _ = std::fs::remove_file(path);
        Err(HubError::Damaged { file: file.rfilename.clone(), expected, found })
    };
    if let Some(size) = file.size().filter(|size| *size != found) {
        return differs(format!("{size} bytes"), format!("{found}"));
    }
    let Some(expected) = file.sha256() else { return Ok(()) };
    out.seek(SeekFrom::Start(0)).map_err(io)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let read = out.read(&mut buffer).map_err(io)?;
        if read == 0 {
            break;
        }
        hash.update(&buffer[..read]);
    }
    let found: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    if found.eq_ignore_ascii_case(expected) {
        Ok(())
    } else {
        differs(format!("bytes of SHA-256 {expected}"), format!("bytes of {found}"))
    }
}

fn parent(path: &Path) -> Result<(), HubError> {
    match path.parent() {
        Some(folder) => {
            std::fs::create_dir_all(folder).map_err(|source| HubError::Io { path: folder.to_owned(), source })
        }
        None => Ok(()),
    }
}

#[cfg(unix)]
fn link(relative: &str, _: &Path, named: &Path) -> std::io::Result<()> {
    let _ = std::fs::remove_file(named);
    std::os::unix::fs::symlink(relative, named)
}

#[cfg(not(unix))]
fn link(_: &str, blob: &Path, named: &Path) -> std::io::Result<()> {
    std::fs::hard_link(blob, named).or_else(|_| std::fs::copy(blob, named).map(|_| ()))
}
