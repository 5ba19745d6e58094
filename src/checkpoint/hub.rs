//! Checkpoints by their Hugging Face id, downloaded into the cache that the Python tools use too.
//!
//! The cache's layout is huggingface_hub's: `models--org--name/{refs/REVISION, snapshots/COMMIT/FILE → blobs/HASH}`. A file
//! is whole before it has its name: bytes go to `HASH.incomplete`, are resumed there, and where the hub gives a SHA-256 it
//! must be theirs.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use hf_hub::{Cache, CacheRepo, Repo, RepoType};
use recoup_ground::digest::sha256_of;
use recoup_ground::http::address::Address;
use recoup_ground::http::{Broken, Client, Reply, Settings, Unusable, retry};
use serde::Deserialize;
use serde_json::Value;

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
    Endpoint(Unusable),
    #[error(transparent)]
    Unusable(#[from] Unusable),
    #[error(
        "{at} cannot be reached: {broken}; without a network, give a folder, or fill the cache elsewhere (hf download)"
    )]
    Unreachable { at: String, broken: Broken },
    #[error("HF_HUB_OFFLINE is set, and the cache ({}) does not hold the whole of {id} at {revision}", cache.display())]
    Offline { id: String, revision: String, cache: PathBuf },
    /// `wait`: what the hub asks to wait before another try.
    #[error("{at}: HTTP {status}{words}")]
    Refused { at: String, status: u16, words: String, wait: Option<Duration> },
    #[error("{at}: not what a hub answers: {problem}")]
    Unexpected { at: String, problem: String },
    #[error("{0} holds no safetensors files at its top")]
    NoWeights(String),
    #[error("{file}: {expected} were announced and {found} came; start again")]
    Damaged { file: String, expected: String, found: String },
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error("no folder for the cache: set HF_HOME")]
    NoHome,
}

impl HubError {
    /// How long to wait before try `tries` + 1; `None` where no further one is worth it.
    fn wait(&self, tries: usize) -> Option<Duration> {
        let (may_pass, asked) = match self {
            Self::Unreachable { broken, .. } => (broken.may_pass(), None),
            Self::Refused { status, wait, .. } => (retry::may_pass(*status), *wait),
            _ => (false, None),
        };
        let wait = asked.unwrap_or_else(|| retry::backoff(tries));
        Some(wait).filter(|wait| may_pass && tries < TRIES && *wait <= retry::LONGEST_ASKED)
    }
}

fn io_at(path: &Path) -> impl Fn(io::Error) -> HubError + '_ {
    move |source| HubError::Io { path: path.to_owned(), source }
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

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Listed {
    rfilename: String,
    size: Option<u64>,
    blob_id: Option<String>,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
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
            let (id, revision, cache) = (id.name.clone(), id.revision.clone(), self.cache.clone());
            return cached.ok_or(HubError::Offline { id, revision, cache });
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
        let all: u64 = files.iter().filter_map(|f| f.size()).sum();
        let mut done = 0;
        for file in files {
            if !snapshot.join(&file.rfilename).exists() {
                self.download(id, &listing.sha, file, &place, &mut |bytes| progress(done + bytes, all))?;
            }
            done += file.size().unwrap_or(0);
            progress(done, all);
        }
        if id.revision != listing.sha {
            cache.create_ref(&listing.sha).map_err(io_at(&place))?;
        }
        Ok(snapshot)
    }

    fn listing(&self, id: &Id) -> Result<Listing, HubError> {
        let path = format!("/api/models/{}/revision/{}?blobs=true", id.name, id.revision.replace('/', "%2F"));
        let (mut reply, at) = self.ask(id, &path, 0, &format!("revision {}", id.revision))?;
        let bytes = reply.bytes(LARGEST_LISTING);
        let bytes = bytes.map_err(|broken| HubError::Unreachable { at: at.clone(), broken })?;
        let unexpected = |problem| HubError::Unexpected { at: at.clone(), problem };
        let listing: Listing = serde_json::from_slice(&bytes).map_err(|e| unexpected(e.to_string()))?;
        if is_hash(&listing.sha) { Ok(listing) } else { Err(unexpected(format!("the commit `{}`", listing.sha))) }
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
        // Without a hash from the hub, commit and name say which bytes these are.
        let hash = file.sha256().or(file.blob_id.as_deref()).filter(|hash| is_hash(hash));
        let hash = hash.map_or_else(|| format!("{commit}-{}", name.replace('/', "-")), str::to_owned);
        let blob = place.join("blobs").join(&hash);
        let partial = place.join("blobs").join(format!("{hash}.incomplete"));
        parent(&blob)?;
        if !blob.exists() {
            let io = io_at(&partial);
            let mut out =
                OpenOptions::new().create(true).truncate(false).read(true).write(true).open(&partial).map_err(&io)?;
            // Another process that downloads the same is waited for; what it leaves is gone on from.
            out.lock().map_err(&io)?;
            if !blob.exists() {
                let mut tries = 0;
                while let Err(error) = self.fetch(id, commit, file, &mut out, &partial, progress) {
                    tries += 1;
                    let Some(wait) = error.wait(tries) else { return Err(error) };
                    std::thread::sleep(wait);
                }
                check(file, &mut out, &partial)?;
                out.sync_all().map_err(&io)?;
                std::fs::rename(&partial, &blob).map_err(io_at(&blob))?;
            }
        }
        let named = place.join("snapshots").join(commit).join(name);
        parent(&named)?;
        let up = "../".repeat(2 + name.matches('/').count());
        link(&format!("{up}blobs/{hash}"), &blob, &named).map_err(io_at(&named))
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
    ) -> Result<(), HubError> {
        let io = io_at(path);
        let mut have = out.seek(SeekFrom::End(0)).map_err(&io)?;
        if file.size() == Some(have) {
            return Ok(());
        }
        if file.size().is_some_and(|size| size < have) {
            have = 0;
        }
        let from = format!("/{}/resolve/{commit}/{}", id.name, file.rfilename.replace(' ', "%20"));
        let (mut reply, at) = self.ask(id, &from, have, &format!("file {}", file.rfilename))?;
        if reply.status != 206 {
            // The whole again: the server does not go on from the middle.
            have = 0;
        }
        out.set_len(have).map_err(&io)?;
        out.seek(SeekFrom::Start(have)).map_err(&io)?;
        let mut buffer = vec![0; 1 << 18];
        let unreachable = |broken| HubError::Unreachable { at: at.clone(), broken };
        loop {
            let read = reply.read(&mut buffer).map_err(unreachable)?;
            if read == 0 {
                break;
            }
            out.write_all(&buffer[..read]).map_err(&io)?;
            have += read as u64;
            progress(have);
        }
        match file.size() {
            Some(size) if have < size => Err(unreachable(Broken::Connection(format!("{have} of {size} bytes came")))),
            _ => Ok(()),
        }
    }

    /// An answer of success to a GET of `path` from byte `from` on, whatever it is redirected to, and where it came from; the
    /// token goes to the hub alone. `what` is asked for, for messages.
    fn ask(&self, id: &Id, path: &str, from: u64, what: &str) -> Result<(Reply, String), HubError> {
        let settings = Settings { whole: None, silence: SILENCE, ca_file: None };
        let mut address = Address::parse(&self.endpoint.url(path)).map_err(HubError::Endpoint)?;
        let token = self.token.as_ref().map(|t| format!("Bearer {t}")).or_else(|| self.endpoint.basic());
        let range = format!("bytes={from}-");
        for _ in 0..=MOST_REDIRECTS {
            let client = Client::new(&address, &settings, &self.variable)?;
            let via = client.via().map_or_else(String::new, |v| format!(", {v}"));
            let at = format!("{}{}{via}", address.origin(), address.path());
            let to_hub = address.origin() == self.endpoint.origin();
            let mut headers = vec![("user-agent", concat!("recoup/", env!("CARGO_PKG_VERSION")))];
            headers.extend(token.as_deref().filter(|_| to_hub).map(|t| ("authorization", t)));
            headers.extend((from > 0).then_some(("range", range.as_str())));
            let reply = client.ask(&address.url(""), &headers, None);
            let reply = reply.map_err(|broken| HubError::Unreachable { at: at.clone(), broken })?;
            match (reply.status, reply.header("location")) {
                (200..=299, _) => return Ok((reply, at)),
                (301 | 302 | 303 | 307 | 308, Some(location)) => {
                    let next = match location.strip_prefix('/') {
                        Some(rest) if !rest.starts_with('/') => format!("{}{location}", address.origin()),
                        _ => location.to_owned(),
                    };
                    let unexpected = |e: Unusable| HubError::Unexpected { at, problem: format!("it redirects to {e}") };
                    address = Address::parse(&next).map_err(unexpected)?;
                }
                _ => return Err(refused(reply, at, id, what)),
            }
        }
        Err(HubError::Unexpected { at: self.endpoint.shown(path), problem: "it redirects without end".to_owned() })
    }
}

/// What a refusal means, by the hub's own headers or its text.
fn refused(mut reply: Reply, at: String, id: &Id, what: &str) -> HubError {
    let (status, id) = (reply.status, &id.name);
    let wait = retry::asked(|name| reply.header(name), SystemTime::now());
    let header = |name: &str| reply.header(name).unwrap_or_default().to_owned();
    let (code, mut message) = (header("x-error-code"), header("x-error-message"));
    if message.is_empty() {
        let value: Value = serde_json::from_slice(&reply.bytes(1 << 16).unwrap_or_default()).unwrap_or_default();
        message = value["error"].as_str().unwrap_or_default().to_owned();
    }
    let is_gated = code == "GatedRepo" || message.to_lowercase().contains("gated");
    let said = if message.is_empty() { String::new() } else { format!(" ({message})") };
    let words = match status {
        401 | 403 if is_gated => {
            format!(": {id} is gated{said}: accept its terms on its page, and set HF_TOKEN to a token of that account")
        }
        404 if code != "RepoNotFound" => format!(": {id} has no {what}{said}"),
        401 | 403 | 404 => format!(
            ": the hub does not show {id}{said}; is the id right? A private one needs HF_TOKEN with a token that may read it"
        ),
        _ => said,
    };
    HubError::Refused { at, status, words, wait }
}

fn is_hash(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric())
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
    let weights = match index.and_then(|text| serde_json::from_slice::<Value>(&text).ok()) {
        Some(index) => index["weight_map"]
            .as_object()
            .is_some_and(|map| map.values().all(|f| f.as_str().is_some_and(|f| folder.join(f).exists()))),
        None => std::fs::read_dir(folder).is_ok_and(|files| {
            files.flatten().any(|f| f.file_name().to_string_lossy().ends_with(".safetensors") && f.path().exists())
        }),
    };
    weights && folder.join("config.json").exists()
}

/// What of a repository makes the checkpoint; other folders hold other formats of the same model.
fn wanted(all: &[Listed]) -> Vec<&Listed> {
    let is_safe = |name: &str| !name.contains('\\') && name.split('/').all(|part| !part.is_empty() && part != "..");
    let is_wanted = |name: &str| {
        let here = !name.contains('/') || name.strip_prefix(TEMPLATES).is_some_and(|rest| !rest.contains('/'));
        here && is_safe(name) && SUFFIXES.iter().any(|s| name.ends_with(s))
    };
    let mut files: Vec<_> = all.iter().filter(|f| is_wanted(&f.rfilename)).collect();
    let is_again = |f: &&Listed| f.rfilename.starts_with(CONSOLIDATED);
    if files.iter().any(|f| f.rfilename.ends_with(".safetensors") && !is_again(f)) {
        files.retain(|f| !is_again(f));
    }
    files
}

/// Compares a downloaded file with what the hub announced; one that differs is taken away.
fn check(file: &Listed, out: &mut File, path: &Path) -> Result<(), HubError> {
    let io = io_at(path);
    let found = out.seek(SeekFrom::End(0)).map_err(&io)?;
    let differs = |expected: String, found: String| {
        let _ = std::fs::remove_file(path);
        Err(HubError::Damaged { file: file.rfilename.clone(), expected, found })
    };
    if let Some(size) = file.size().filter(|size| *size != found) {
        return differs(format!("{size} bytes"), format!("{found}"));
    }
    let Some(expected) = file.sha256() else { return Ok(()) };
    out.seek(SeekFrom::Start(0)).map_err(&io)?;
    let found = sha256_of(out).map_err(&io)?;
    if found.eq_ignore_ascii_case(expected) {
        Ok(())
    } else {
        differs(format!("bytes of SHA-256 {expected}"), format!("bytes of {found}"))
    }
}

fn parent(path: &Path) -> Result<(), HubError> {
    let folder = path.parent().unwrap_or(path);
    std::fs::create_dir_all(folder).map_err(io_at(folder))
}

#[cfg(unix)]
fn link(relative: &str, _: &Path, named: &Path) -> io::Result<()> {
    let _ = std::fs::remove_file(named);
    std::os::unix::fs::symlink(relative, named)
}

#[cfg(not(unix))]
fn link(_: &str, blob: &Path, named: &Path) -> io::Result<()> {
    std::fs::hard_link(blob, named).or_else(|_| std::fs::copy(blob, named).map(|_| ()))
}
