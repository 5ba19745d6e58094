//! Calls of one server's API: keys, tries again, and faults out of whatever came back.

use std::fmt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use serde_json::Value;

use super::error::Fault;
use super::said::{LONGEST_MESSAGE, Said};
use super::tally::Tally;
use super::{Options, locked};
use recoup_ground::http::address::{Address, HIDDEN};
use recoup_ground::http::{Broken, Client, Reply, Settings, retry};
use recoup_ground::shorten::shorten;

/// A wait looks this often whether the evaluation has been stopped.
const NAP: Duration = Duration::from_millis(50);
/// A longer wait is told to who watches.
const LONG_WAIT: Duration = Duration::from_secs(8);
/// Bytes of an answer at most: log-probabilities of a context of 128 k tokens fit many times over.
const LARGEST_ANSWER: u64 = 1 << 28;

/// A secret that cannot be printed.
#[derive(Clone, PartialEq, Eq)]
pub struct ApiKey(String);

impl ApiKey {
    /// From the environment variable `OPENAI_API_KEY`; `None` where that is unset or empty.
    #[must_use]
    pub fn from_env() -> Option<Self> {
        std::env::var("OPENAI_API_KEY").ok().filter(|key| !key.is_empty()).map(Self)
    }

    #[must_use]
    pub fn new(key: impl Into<String>) -> Self {
        Self(key.into())
    }
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ApiKey(hidden)")
    }
}

/// One server's API.
pub(super) struct Http {
    client: Client,
    address: Address,
    /// Without the API's version: where engines have what is their own.
    root: Address,
    /// The value of the `Authorization` header.
    authorization: Option<String>,
    /// Longest first.
    secrets: Vec<String>,
    retries: usize,
    notice: Option<fn(&str)>,
    /// Whether the server has ever said anything: one that is not there at all is not waited for.
    heard: AtomicBool,
    /// Ends waits for another try.
    pub stop: AtomicBool,
    pub tally: Mutex<Tally>,
}

impl Http {
    /// `base` as OpenAI's clients take it, up to and with `/v1`; a trailing `/completions` is forgiven. A user and password
    /// in it are sent instead of the key.
    pub fn new(base: &str, options: &Options) -> Result<Self, Fault> {
        let address = Address::parse(base).map_err(|e| Fault::Url(Box::new(e)))?;
        let address = address.without(&["/chat/completions", "/completions"]);
        let key = options.api_key.as_ref().map(|k| k.0.clone());
        if key.as_ref().is_some_and(|k| recoup_ground::http::HeaderValue::from_str(k).is_err()) {
            return Err(Fault::Key);
        }
        let (timeout, ca_file) = (options.timeout, options.ca_file.clone());
        let settings = Settings { whole: Some(timeout), silence: timeout, ca_file };
        let client = Client::new(&address, &settings, &|name| std::env::var(name).ok());
        let mut secrets = address.secrets();
        secrets.extend(key.clone());
        secrets.sort_by_key(|s| std::cmp::Reverse(s.len()));
        Ok(Self {
            client: client.map_err(|e| Fault::Unusable(Box::new(e)))?,
            root: address.clone().without(&["/v1"]),
            authorization: address.basic().or_else(|| key.map(|k| format!("Bearer {k}"))),
            address,
            secrets,
            retries: options.retries,
            notice: options.notice,
            heard: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            tally: Mutex::default(),
        })
    }

    /// What `path` is asked at, for messages and files: without secrets.
    pub fn shown(&self, path: &str) -> String {
        self.address.shown(path)
    }

    /// The same of a path outside of OpenAI's API.
    pub fn shown_root(&self, path: &str) -> String {
        self.root.shown(path)
    }

    /// The proxy that is asked, in words.
    pub fn via(&self) -> Option<String> {
        self.client.via().map(ToString::to_string)
    }

    /// The answer to a GET, or to a POST of `body`. Tries again while the fault may pass and nobody said stop.
    pub fn call(&self, path: &str, body: Option<&Value>) -> Result<Value, Fault> {
        self.persist(&self.address.url(path), body)
    }

    /// The same of a path outside of OpenAI's API.
    pub fn call_root(&self, path: &str, body: Option<&Value>) -> Result<Value, Fault> {
        self.persist(&self.root.url(path), body)
    }

    fn persist(&self, url: &str, body: Option<&Value>) -> Result<Value, Fault> {
        let stopped = || self.stop.load(Ordering::Relaxed);
        let mut tries = 0;
        loop {
            let (fault, asked) = match self.try_once(url, body) {
                Ok(value) => return Ok(value),
                Err((fault, _)) if !fault.is_transient() => return Err(fault),
                Err(failed) => failed,
            };
            if let Some(wait) = asked.filter(|wait| *wait > retry::LONGEST_ASKED) {
                return Err(Fault::AsksToWait { fault: Box::new(fault), seconds: wait.as_secs() });
            }
            let is_there = self.heard.load(Ordering::Relaxed) || !matches!(fault, Fault::Transport(Broken::Refused));
            if tries == self.retries || !is_there || stopped() {
                return Err(fault);
            }
            *locked(&self.tally).retries.entry(fault.cause()).or_default() += 1;
            let mut wait = asked.unwrap_or_else(|| retry::backoff(tries));
            if let Some(notice) = self.notice.filter(|_| wait >= LONG_WAIT) {
                let left = self.retries - tries;
                notice(&format!("{fault}; waiting {:.0} s, tries left: {left}", wait.as_secs_f64()));
            }
            tries += 1;
            while !wait.is_zero() && !stopped() {
                std::thread::sleep(wait.min(NAP));
                wait = wait.saturating_sub(NAP);
            }
        }
    }

    /// A POST whose answer comes as events, of which `each` is given as it arrives. One try: what is timed is not repeated.
    pub fn stream(&self, path: &str, body: &Value, each: &mut dyn FnMut(&Value)) -> Result<(), Fault> {
        let mut reply = self.asked(&self.address.url(path), Some(body))?;
        if !(200..300).contains(&reply.status) {
            let bytes = reply.bytes(LARGEST_ANSWER).map_err(|broken| self.broken(broken))?;
            return Err(self.fault(Some(reply.status), Said::refusal(&bytes), false));
        }
        let kind = reply.header("content-type").unwrap_or_default().to_owned();
        if !kind.contains("event-stream") {
            return Err(Fault::Unexpected(format!("`stream` was asked for, and `{}` came", self.excerpt(&kind))));
        }
        let (mut pending, mut buffer) = (Vec::new(), [0; 1 << 14]);
        loop {
            let read = reply.read(&mut buffer).map_err(|broken| self.broken(broken))?;
            if read == 0 {
                return Err(Fault::Unexpected("the stream ends before its `[DONE]`".into()));
            }
            pending.extend_from_slice(&buffer[..read]);
            if pending.len() as u64 > LARGEST_ANSWER {
                return Err(Fault::Unexpected("an event of the stream has no end".into()));
            }
            while let Some(end) = pending.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = pending.drain(..=end).collect();
                let Some(data) = line.trim_ascii().strip_prefix(b"data:") else { continue };
                if data.trim_ascii() == b"[DONE]" {
                    return Ok(());
                }
                let value: Value = serde_json::from_slice(data).map_err(|e| self.not_json(data, &e))?;
                if let Some(said) = Said::within(&value) {
                    return Err(self.fault(None, said, false));
                }
                each(&value);
            }
        }
    }

    /// A reply, whatever its status.
    fn asked(&self, url: &str, body: Option<&Value>) -> Result<Reply, Fault> {
        let authorization = self.authorization.as_deref().map(|v| ("authorization", v));
        let text = body.map(Value::to_string);
        let reply = self.client.ask(url, authorization.as_slice(), text.as_deref());
        let reply = reply.map_err(|broken| self.broken(broken))?;
        self.heard.store(true, Ordering::Relaxed);
        Ok(reply)
    }

    fn broken(&self, broken: Broken) -> Fault {
        // A transport's words may hold the address.
        Fault::Transport(match broken {
            Broken::Connection(words) => Broken::Connection(self.excerpt(&words)),
            Broken::Proxy(words) => Broken::Proxy(self.excerpt(&words)),
            other => other,
        })
    }

    /// One try; with a fault the time that the server asks to wait.
    fn try_once(&self, url: &str, body: Option<&Value>) -> Result<Value, (Fault, Option<Duration>)> {
        let mut reply = self.asked(url, body).map_err(|fault| (fault, None))?;
        let wait = retry::asked(|name| reply.header(name), SystemTime::now());
        let bytes = reply.bytes(LARGEST_ANSWER).map_err(|broken| (self.broken(broken), None))?;
        let scores = body.is_some_and(|b| b.get("echo").is_some() || b.get("logprobs").is_some());
        if !(200..300).contains(&reply.status) {
            return Err((self.fault(Some(reply.status), Said::refusal(&bytes), scores), wait));
        }
        let value: Value = serde_json::from_slice(&bytes).map_err(|e| (self.not_json(&bytes, &e), None))?;
        // Some servers report a failure with status 200.
        match Said::within(&value) {
            Some(said) => Err((self.fault(None, said, scores), wait)),
            None => Ok(value),
        }
    }

    /// The status decides, then the words. `answered`: a status that is not of success; `scores`: what scoring needs was
    /// asked for.
    fn fault(&self, answered: Option<u16>, mut said: Said, scores: bool) -> Fault {
        said.message = self.without_secrets(&said.message);
        let status = answered.unwrap_or_else(|| said.status());
        if said.is_too_long(status) {
            return Fault::TooLong(said.to_string());
        }
        // Refusals of what scoring needs come as 400, 500 or 501 too, and no further try will change them.
        if scores && matches!(status, 400 | 422 | 500 | 501) {
            if said.names("echo") {
                return Fault::NoEcho { found: said.to_string() };
            }
            if said.names("logprobs") {
                return Fault::NoPromptLogProbs { found: said.to_string() };
            }
        }
        let hint = match answered {
            Some(401 | 403) => "; set OPENAI_API_KEY to a key that this server accepts",
            Some(404) if self.address.path().ends_with("/v1") => "; does the server have this model and this endpoint?",
            Some(404) => "; the address has no /v1 at its end: is it missing?",
            _ => "",
        };
        Fault::Refused { status, within: answered.is_none(), said: Box::new(said), hint }
    }

    fn not_json(&self, bytes: &[u8], error: &serde_json::Error) -> Fault {
        let text = String::from_utf8_lossy(bytes);
        let start = self.excerpt(&text);
        let lower = start.to_lowercase();
        if lower.starts_with("<!doctype html") || lower.starts_with("<html") {
            Fault::Html { start }
        } else {
            Fault::NotJson { reason: error.to_string(), start }
        }
    }

    /// The start of what a server sent.
    fn excerpt(&self, text: &str) -> String {
        shorten(self.without_secrets(text).trim(), LONGEST_MESSAGE)
    }

    /// Some servers repeat what is secret.
    fn without_secrets(&self, text: &str) -> String {
        self.secrets.iter().fold(text.to_owned(), |text, secret| text.replace(secret.as_str(), HIDDEN))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_that_cannot_be_used_are_refused_before_anything_is_asked() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let failed = |key: Option<&str>, ca_file: Option<&std::path::Path>| {
            let (api_key, ca_file) = (key.map(ApiKey::new), ca_file.map(Into::into));
            Http::new("https://h/v1", &Options { api_key, ca_file, ..Options::default() }).err().unwrap().to_string()
        };
        let error = failed(Some("se\ncret"), None);
        assert!(error.contains("no HTTP header can hold") && !error.contains("cret"), "{error}");
        let error = failed(None, Some(file.path()));
        assert!(error.contains("no certificate in PEM form"), "{error}");
        assert!(failed(None, Some("/no/such/file".as_ref())).starts_with("/no/such/file: "));
    }

    #[test]
    fn words_are_looked_at_only_where_the_status_can_mean_them() {
        let http = Http::new("http://h:1/v1", &Options::default()).unwrap();
        type Is = fn(&Fault) -> bool;
        let refused: Is = |f| matches!(f, Fault::Refused { within: false, .. });
        let no_echo: Is = |f| matches!(f, Fault::NoEcho { .. });
        let too_long: Is = |f| matches!(f, Fault::TooLong(_));
        let no_logprobs: Is = |f| matches!(f, Fault::NoPromptLogProbs { .. });
        for (status, message, scores, is) in [
            (429, "shorten the context length", false, refused),
            (400, "maximum context length is 8", false, too_long),
            (503, "model 'echo' is loading", true, refused),
            (400, "unsupported param: echo", true, no_echo),
            (400, "unsupported param: echo", false, refused),
            (500, "logprobs is not supported", true, no_logprobs),
            (401, "echo", true, refused),
        ] {
            let fault = http.fault(Some(status), Said::words(message), scores);
            assert!(is(&fault), "{status} {message}: {fault:?}");
        }
    }
}
