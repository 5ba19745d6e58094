//! Checkpoints by hub id, from a hub on this machine that answers as huggingface.co does, and fails as told.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::TcpListener;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use sha2::{Digest as _, Sha256};

use crate::support::command::{files, recoup, said};
use crate::support::project;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

struct Hub {
    url: String,
    /// Path, `Range` and `Authorization` of each request.
    seen: Arc<Mutex<Vec<(String, String, String)>>>,
}

type Answer = (u16, Vec<(&'static str, String)>, Vec<u8>);

impl Hub {
    fn start(answer: impl Fn(&str, &str) -> Answer + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let seen = Arc::new(Mutex::new(Vec::new()));
        let record = seen.clone();
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
                let Some(first) = lines.next() else { continue };
                let path = first.split(' ').nth(1).unwrap_or_default().to_owned();
                let (mut range, mut authorization) = (String::new(), String::new());
                for line in lines.take_while(|l| !l.is_empty()) {
                    let (name, value) = line.split_once(": ").unwrap_or_default();
                    match name.to_lowercase().as_str() {
                        "range" => range = value.to_owned(),
                        "authorization" => authorization = value.to_owned(),
                        _ => {}
                    }
                }
                record.lock().unwrap().push((path.clone(), range.clone(), authorization));
                let (status, headers, body) = answer(&path, &range);
                let headers: String = headers.iter().map(|(n, v)| format!("{n}: {v}\r\n")).collect();
                let length = body.len();
                let _ = write!(
                    stream,
                    "HTTP/1.1 {status} X\r\nconnection: close\r\n{headers}content-length: {length}\r\n\r\n"
                );
                let _ = stream.write_all(&body);
            }
        });
        Self { url, seen }
    }

    /// One that has the tiny model of the tests, and is too busy for the first download.
    fn of_tiny(tamper: bool) -> Self {
        let mut files: Vec<(String, Vec<u8>)> =
            files(&project().join("tests/fixtures/transformers/qwen2_tied")).into_iter().collect();
        files.push(("README.md".into(), b"not part of the model".to_vec()));
        files.push(("onnx/model.safetensors".into(), b"another format".to_vec()));
        let busy = AtomicBool::new(true);
        Self::start(move |path, range| {
            if path == "/api/models/org/tiny/revision/main?blobs=true" {
                let listed: Vec<_> = files
                    .iter()
                    .map(|(name, bytes)| {
                        let hash: String = Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect();
                        let lfs = name
                            .ends_with(".safetensors")
                            .then(|| serde_json::json!({"sha256": hash, "size": bytes.len()}));
                        serde_json::json!({"rfilename": name, "size": bytes.len(), "blobId": &hash[..40], "lfs": lfs})
                    })
                    .collect();
                let body = serde_json::json!({"sha": COMMIT, "siblings": listed});
                return (200, vec![], body.to_string().into_bytes());
            }
            // The hub redirects to where files are stored.
            if let Some(file) = path.strip_prefix(&format!("/org/tiny/resolve/{COMMIT}/")) {
                return (302, vec![("location", format!("/stored/{file}?signed=yes"))], vec![]);
            }
            if path.starts_with("/stored/") && busy.swap(false, Ordering::Relaxed) {
                return (429, vec![("retry-after", "0".into())], vec![]);
            }
            let name = path.strip_prefix("/stored/").and_then(|p| p.strip_suffix("?signed=yes"));
            let Some((_, bytes)) = files.iter().find(|(n, _)| Some(n.as_str()) == name) else {
                return (404, vec![("x-error-code", "RepoNotFound".into())], vec![]);
            };
            let from: usize =
                range.strip_prefix("bytes=").and_then(|r| r.trim_end_matches('-').parse().ok()).unwrap_or(0);
            let mut bytes = bytes[from..].to_vec();
            if tamper && name.is_some_and(|n| n.ends_with(".safetensors")) {
                bytes[0] ^= 1;
            }
            (if from > 0 { 206 } else { 200 }, vec![], bytes)
        })
    }

    fn asked(&self, part: &str) -> usize {
        self.seen.lock().unwrap().iter().filter(|(path, ..)| path.contains(part)).count()
    }
}

/// `recoup inspect ID` with a cache of its own; success, and what it said.
fn inspect(hub: &str, home: &Path, id: &str, more: &[(&str, &str)]) -> (bool, String) {
    let mut command = recoup(&["inspect", id]);
    command.env_clear().env("HF_ENDPOINT", hub).env("HF_HOME", home).env("HF_TOKEN", "hf_secret");
    let out = command.envs(more.iter().copied()).output().unwrap();
    (out.status.success(), said(&out))
}

#[test]
fn a_model_comes_by_its_id_once_and_is_there_without_a_network() {
    let hub = Hub::of_tiny(false);
    let home = tempfile::tempdir().unwrap();
    let (ok, said) = inspect(&hub.url, home.path(), "org/tiny", &[]);
    assert!(ok, "{said}");
    let snapshot = home.path().join("hub/models--org--tiny/snapshots").join(COMMIT);
    assert!(snapshot.join("config.json").exists() && !snapshot.join("README.md").exists());
    assert_eq!(hub.asked("onnx"), 0);
    assert!(hub.seen.lock().unwrap().iter().all(|(.., token)| token == "Bearer hf_secret"));
    let stored = hub.asked("/stored/");
    assert!(inspect(&hub.url, home.path(), "org/tiny@main", &[]).0);
    assert_eq!(hub.asked("/stored/"), stored);
    // A hub that is gone, and none wanted; and a commit, which does not change.
    let (ok, said) = inspect("http://127.0.0.1:9", home.path(), "org/tiny", &[]);
    assert!(ok && said.contains("Taken from the cache"), "{said}");
    assert!(inspect("http://127.0.0.1:9", home.path(), "org/tiny", &[("HF_HUB_OFFLINE", "1")]).0);
    let (ok, said) = inspect("http://127.0.0.1:9", home.path(), &format!("org/tiny@{COMMIT}"), &[]);
    assert!(ok && !said.contains("cache"), "{said}");
    let (ok, said) = inspect(&hub.url, home.path(), "org/other", &[("HF_HUB_OFFLINE", "1")]);
    assert!(!ok && said.contains("HF_HUB_OFFLINE is set"), "{said}");
    let (ok, said) = inspect("http://127.0.0.1:9", home.path(), "org/other", &[]);
    assert!(!ok && said.contains("cannot be reached: connection refused"), "{said}");
}

#[test]
fn a_download_goes_on_from_what_is_there_and_must_have_the_announced_hash() {
    let home = tempfile::tempdir().unwrap();
    let hub = Hub::of_tiny(true);
    let (ok, said) = inspect(&hub.url, home.path(), "org/tiny", &[]);
    assert!(!ok && said.contains("bytes of SHA-256"), "{said}");
    assert!(!home.path().join("hub/models--org--tiny/refs/main").exists());
    let hub = Hub::of_tiny(false);
    let blobs = home.path().join("hub/models--org--tiny/blobs");
    assert!(inspect(&hub.url, home.path(), "org/tiny", &[]).0);
    // As a kill would leave it: a beginning, and no file of that name yet.
    let snapshot = blobs.with_file_name("snapshots").join(COMMIT);
    let weights = std::fs::read_dir(&snapshot).unwrap().flatten().map(|f| f.path());
    let weights = weights.into_iter().find(|f| f.to_string_lossy().ends_with(".safetensors")).unwrap();
    let blob = std::fs::canonicalize(&weights).unwrap();
    let bytes = std::fs::read(&blob).unwrap();
    let partial = blob.with_file_name(format!("{}.incomplete", blob.file_name().unwrap().to_string_lossy()));
    std::fs::write(partial, &bytes[..100]).unwrap();
    std::fs::remove_file(&blob).unwrap();
    assert!(inspect(&hub.url, home.path(), "org/tiny", &[]).0);
    assert_eq!(std::fs::read(&weights).unwrap(), bytes);
    assert!(hub.seen.lock().unwrap().iter().any(|(_, range, _)| range == "bytes=100-"));
}

#[test]
fn each_refusal_of_the_hub_has_its_own_words() {
    for (status, code, words) in [
        (401, "RepoNotFound", "is the id right? A private one needs HF_TOKEN"),
        (403, "GatedRepo", "is gated"),
        (404, "RevisionNotFound", "org/tiny has no revision main"),
        (418, "", "HTTP 418"),
    ] {
        let hub = Hub::start(move |_, _| (status, vec![("x-error-code", code.to_owned())], vec![]));
        let home = tempfile::tempdir().unwrap();
        let (ok, said) = inspect(&hub.url, home.path(), "org/tiny", &[]);
        assert!(!ok && said.contains(words) && !said.contains("hf_secret"), "{said}");
    }
    for id in ["org/../x", "org/name@", "org/na me"] {
        let (ok, said) = inspect("http://127.0.0.1:9", Path::new("/nonexistent"), id, &[]);
        assert!(!ok && said.contains("no such folder"), "{said}");
    }
}
