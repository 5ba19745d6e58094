//! Calls of one server's API: keys, tries again, and faults out of whatever came back.

use std::fmt;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use serde_json::Value;

use super::error::Fault;
use super::said::Said;
use super::tally::Tally;
use crate::http::address::{Address, HIDDEN};
use crate::http::{Broken, Client, Settings, retry};

/// A wait looks this often whether the evaluation has been stopped.
const NAP: Duration = Duration::from_millis(50);
/// A longer wait is told to who watches.
const LONG_WAIT: Duration = Duration::from_secs(8);
/// Bytes of an answer at most: log-probabilities of a context of 128 k tokens fit many times over.
const LARGEST_ANSWER: u64 = 1 << 28;
/// Characters of a server's message that go into an error.
const LONGEST_MESSAGE: usize = 400;

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

/// How to reach a server.
pub(super) struct Reach<'a> {
    pub key: Option<&'a ApiKey>,
    pub timeout: Duration,
    pub retries: usize,
    pub ca_file: Option<PathBuf>,
    /// Told of long waits.
    pub notice: Option<fn(&str)>,
}

/// One server's API.
pub(super) struct Http {
    client: Client,
    address: Address,
    /// The value of the `Authorization` header.
    authorization: Option<String>,
    /// Longest first.
    secrets: Vec<String>,
    retries: usize,
    notice: Option<fn(&str)>,
    /// Whether the server has ever said anything: one that is not there at all is not waited for.
    heard: AtomicBool,
}

impl Http {
    /// `base` as OpenAI's clients take it, up to and with `/v1`; a trailing `/completions` is forgiven. A user and password
    /// in it are sent instead of the key.
    pub fn new(base: &str, reach: &Reach) -> Result<Self, Fault> {
        let address = Address::parse(base)?.without(&["/chat/completions", "/completions"]);
        let key = reach.key.map(|k| k.0.clone());
        if key.as_ref().is_some_and(|k| ureq::http::HeaderValue::from_str(k).is_err()) {
            return Err(Fault::Key);
        }
        let settings = Settings { whole: Some(reach.timeout), silence: reach.timeout, ca_file: reach.ca_file.clone() };
        let client = Client::new(&address, &settings, &|name| std::env::var(name).ok())?;
        let mut secrets = address.secrets();
        secrets.extend(key.clone());
        secrets.sort_by_key(|s| std::cmp::Reverse(s.len()));
        let authorization = address.basic().or_else(|| key.map(|k| format!("Bearer {k}")));
        let heard = AtomicBool::new(false);
        let (retries, notice) = (reach.retries, reach.notice);
        Ok(Self { client, address, authorization, secrets, retries, notice, heard })
    }

    /// What `path` is asked at, for messages and files: without secrets.
    pub fn shown(&self, path: &str) -> String {
        self.address.shown(path)
    }

    /// The proxy that is asked, in words.
    pub fn via(&self) -> Option<String> {
        self.client.via().map(ToString::to_string)
    }

    /// The answer to a GET, or to a POST of `body`. Tries again while the fault may pass and `stop` is not set, and counts
    /// that in `tally`.
    pub fn call(
        &self,
        path: &str,
        body: Option<&Value>,
        stop: &AtomicBool,
        tally: &Mutex<Tally>,
    ) -> Result<Value, Fault> {
        let mut tries = 0;
        loop {
            let (fault, asked) = match self.try_once(path, body) {
                Ok(value) => return Ok(value),
                Err(failed) => failed,
            };
            if asked.is_some_and(|wait| wait > retry::LONGEST_ASKED) && fault.is_transient() {
                return Err(Fault::AsksToWait { fault: Box::new(fault), seconds: asked.unwrap_or_default().as_secs() });
            }
            let is_there = self.heard.load(Ordering::Relaxed) || !matches!(fault, Fault::Transport(Broken::Refused));
            if tries == self.retries || !fault.is_transient() || !is_there || stop.load(Ordering::Relaxed) {
                return Err(fault);
            }
            *super::locked(tally).retries.entry(fault.cause()).or_default() += 1;
            let wait = asked.unwrap_or_else(|| retry::backoff(tries));
            tries += 1;
            if let Some(notice) = self.notice.filter(|_| wait >= LONG_WAIT) {
                let left = self.retries - tries + 1;
                notice(&format!("{fault}; waiting {:.0} s, tries left: {left}", wait.as_secs_f64()));
            }
            let mut left = wait;
            while !left.is_zero() && !stop.load(Ordering::Relaxed) {
                std::thread::sleep(left.min(NAP));
                left = left.saturating_sub(NAP);
            }
        }
    }

    /// One try; with a fault the time that the server asks to wait.
    fn try_once(&self, path: &str, body: Option<&Value>) -> Result<Value, (Fault, Option<Duration>)> {
        let transport = |broken: Broken| (Fault::Transport(self.clean(broken)), None);
        let authorization = self.authorization.as_deref().map(|v| ("authorization", v));
        let headers: Vec<_> = authorization.into_iter().collect();
        let text = body.map(Value::to_string);
        let url = self.address.url(path);
        let mut reply = self.client.ask(&url, &headers, text.as_deref()).map_err(transport)?;
        self.heard.store(true, Ordering::Relaxed);
        let status = reply.status;
        let wait = retry::asked(|name| reply.header(name), SystemTime::now());
        let bytes = self.client.bytes(&mut reply, LARGEST_ANSWER).map_err(transport)?;
        let scores = body.is_some_and(|b| b.get("echo").is_some() || b.get("logprobs").is_some());
        if !(200..300).contains(&status) {
            return Err((self.fault(status, Said::refusal(&bytes), scores), wait));
        }
        let value: Value = serde_json::from_slice(&bytes).map_err(|e| (self.not_json(&bytes, &e), None))?;
        // Some servers report a failure with status 200.
        match Said::within(&value) {
            Some(said) => Err((self.fault(status, said, scores), wait)),
            None => Ok(value),
        }
    }

    /// A transport's words may hold the address.
    fn clean(&self, broken: Broken) -> Broken {
        match broken {
            Broken::Connection(words) => Broken::Connection(self.excerpt(&words)),
            Broken::Proxy(words) => Broken::Proxy(self.excerpt(&words)),
            other => other,
        }
    }

    /// The status decides, then the words. `scores`: what scoring needs was asked for.
    fn fault(&self, answered: u16, mut said: Said, scores: bool) -> Fault {
        said.message = self.without_secrets(&said.message);
        let is_within = (200..300).contains(&answered);
        let status = if is_within { said.status() } else { answered };
        let message = shorten(said.message.trim(), LONGEST_MESSAGE);
        if said.is_too_long(status) {
            return Fault::TooLong { message };
        }
        // Refusals of what scoring needs come as 400, 500 or 501 too, and no further try will change them.
        if scores && matches!(status, 400 | 422 | 500 | 501) {
            if said.names("echo") {
                return Fault::NoEcho { found: message };
            }
            if said.names("logprobs") {
                return Fault::NoPromptLogProbs { found: message };
            }
        }
        match status {
            _ if is_within => Fault::Said { status, message, said: Box::new(said) },
            401 | 403 => Fault::Unauthorized { status, message },
            404 => {
                let hint = if self.address.path().ends_with("/v1") {
                    "does the server have this model and this endpoint?"
                } else {
                    "the address has no /v1 at its end: is it missing?"
                };
                Fault::NotFound { message, hint }
            }
            _ => Fault::Status { status, message, said: Box::new(said) },
        }
    }

    fn not_json(&self, bytes: &[u8], error: &serde_json::Error) -> Fault {
        let text = String::from_utf8_lossy(bytes);
        let start = self.excerpt(&text);
        let trimmed = text.trim_start().to_lowercase();
        if trimmed.starts_with("<!doctype html") || trimmed.starts_with("<html") {
            Fault::Html { start }
        } else {
            Fault::NotJson { reason: error.to_string(), start }
        }
    }

    /// The start of what a server sent.
    fn excerpt(&self, message: &str) -> String {
        shorten(self.without_secrets(message).trim(), LONGEST_MESSAGE)
    }

    /// Some servers repeat what is secret.
    fn without_secrets(&self, message: &str) -> String {
        self.secrets.iter().fold(message.to_owned(), |text, secret| text.replace(secret.as_str(), HIDDEN))
    }
}

/// At most `limit` characters, and a sign that there were more.
pub(super) fn shorten(text: &str, limit: usize) -> String {
    match text.char_indices().nth(limit) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn http(base: &str) -> Result<Http, Fault> {
        let key = ApiKey::new("sk-secret");
        let reach = Reach { key: Some(&key), timeout: Duration::from_secs(1), retries: 0, ca_file: None, notice: None };
        Http::new(base, &reach)
    }

    #[test]
    fn an_address_may_end_as_other_clients_want_it() {
        for base in ["http://h:1/v1", "http://h:1/v1/", "http://h:1/v1/completions", "http://h:1/v1/chat/completions"] {
            assert_eq!(http(base).unwrap().shown("/models"), "http://h:1/v1/models");
        }
    }

    #[test]
    fn a_key_that_is_no_header_is_refused_unprinted() {
        let key = ApiKey::new("a\nb");
        let reach = Reach { key: Some(&key), timeout: NAP, retries: 0, ca_file: None, notice: None };
        let fault = Http::new("http://h/v1", &reach).err().unwrap();
        assert!(matches!(fault, Fault::Key));
        assert!(!format!("{:?}", ApiKey::new("sk-secret")).contains("secret"));
    }

    #[test]
    fn a_file_of_certificates_without_any_is_refused_before_anything_is_asked() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = Some(file.path().to_owned());
        let reach = Reach { key: None, timeout: NAP, retries: 0, ca_file: path, notice: None };
        let error = Http::new("https://h/v1", &reach).err().unwrap().to_string();
        assert!(error.contains("no certificate in PEM form"), "{error}");
        let reach = Reach { ca_file: Some("/no/such/file".into()), ..reach };
        assert!(Http::new("https://h/v1", &reach).err().unwrap().to_string().starts_with("/no/such/file: "));
    }

    #[test]
    fn words_are_looked_at_only_where_the_status_can_mean_them() {
        let http = http("http://h:1/v1").unwrap();
        let fault = |status, message: &str, scores| {
            http.fault(status, Said { message: message.into(), ..Said::default() }, scores)
        };
        assert!(matches!(fault(429, "shorten the context length", false), Fault::Status { status: 429, .. }));
        assert!(matches!(fault(400, "maximum context length is 8", false), Fault::TooLong { .. }));
        assert!(matches!(fault(503, "model 'echo' is loading", true), Fault::Status { status: 503, .. }));
        assert!(matches!(fault(400, "unsupported param: echo", true), Fault::NoEcho { .. }));
        assert!(matches!(fault(400, "unsupported param: echo", false), Fault::Status { status: 400, .. }));
        assert!(matches!(fault(500, "logprobs is not supported", true), Fault::NoPromptLogProbs { .. }));
        assert!(matches!(fault(401, "echo", true), Fault::Unauthorized { .. }));
    }
}
