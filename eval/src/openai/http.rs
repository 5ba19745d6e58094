//! JSON over HTTP: addresses, keys, time-outs, retries, and faults out of whatever came back.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::Value;
use ureq::Agent;

use super::error::Fault;

/// First wait between two tries; doubles with each.
const BACKOFF: Duration = Duration::from_millis(500);
/// Longest wait between two tries, even if the server asks for more.
const LONGEST_WAIT: Duration = Duration::from_secs(60);
/// A wait looks this often whether the evaluation has been stopped.
const NAP: Duration = Duration::from_millis(50);
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

/// One server's API.
pub(super) struct Http {
    agent: Agent,
    base: String,
    key: Option<ApiKey>,
    timeout: Duration,
    retries: usize,
}

impl Http {
    /// `base` as OpenAI's clients take it, up to and with `/v1`; a trailing `/completions` is forgiven.
    pub fn new(base: &str, key: Option<ApiKey>, timeout: Duration, retries: usize) -> Result<Self, Fault> {
        let base = base.trim().trim_end_matches('/');
        let base = base.strip_suffix("/completions").unwrap_or(base);
        let base = base.strip_suffix("/chat").unwrap_or(base);
        let uri: ureq::http::Uri = base.parse().map_err(|_| Fault::Url(format!("`{base}`")))?;
        let host = match (uri.scheme_str(), uri.host()) {
            (Some("https"), Some(_)) if !cfg!(feature = "tls") => return Err(Fault::NoTls),
            (Some("http" | "https"), Some(host)) => host,
            _ => return Err(Fault::Url(format!("`{base}`"))),
        };
        if key.as_ref().is_some_and(|k| ureq::http::HeaderValue::from_str(&k.0).is_err()) {
            return Err(Fault::Key);
        }
        let loopback = host == "localhost" || host == "[::1]" || host.starts_with("127.");
        let config = Agent::config_builder()
            .http_status_as_error(false)
            // A redirected POST would arrive as a GET.
            .max_redirects(0)
            .max_redirects_will_error(false)
            .timeout_global(Some(timeout));
        // A proxy cannot reach this machine's own loopback.
        let config = if loopback { config.proxy(None) } else { config };
        Ok(Self { agent: config.build().into(), base: base.to_owned(), key, timeout, retries })
    }

    pub fn url(&self, path: &str) -> String {
        format!("{}{path}", self.base)
    }

    /// The answer to a GET, or to a POST of `body`. Tries again while the fault may pass and `stop` is not set.
    pub fn call(&self, path: &str, body: Option<&Value>, stop: &AtomicBool) -> Result<Value, Fault> {
        let mut backoff = BACKOFF;
        let mut tries = 0;
        loop {
            let (fault, asked_to_wait) = match self.try_once(path, body) {
                Ok(value) => return Ok(value),
                Err(failed) => failed,
            };
            if tries == self.retries || !fault.is_transient() || stop.load(Ordering::Relaxed) {
                return Err(fault);
            }
            tries += 1;
            let mut left = asked_to_wait.unwrap_or(backoff).min(LONGEST_WAIT);
            while !left.is_zero() && !stop.load(Ordering::Relaxed) {
                std::thread::sleep(left.min(NAP));
                left = left.saturating_sub(NAP);
            }
            backoff *= 2;
        }
    }

    /// One try; with a fault the time that the server asks to wait.
    fn try_once(&self, path: &str, body: Option<&Value>) -> Result<Value, (Fault, Option<Duration>)> {
        let transport = |e| (self.transport(e), None);
        let url = self.url(path);
        let key = self.key.as_ref().map(|k| format!("Bearer {}", k.0));
        let mut answer = match body {
            Some(body) => {
                let request = self.agent.post(url).content_type("application/json");
                let request = key.iter().fold(request, |r, key| r.header("authorization", key));
                request.send(body.to_string())
            }
            None => key.iter().fold(self.agent.get(url), |r, key| r.header("authorization", key)).call(),
        }
        .map_err(transport)?;
        let status = answer.status().as_u16();
        let header = |name| answer.headers().get(name).and_then(|v| v.to_str().ok());
        let wait = header("retry-after").and_then(|v| v.trim().parse().ok()).map(Duration::from_secs);
        let bytes = answer.body_mut().with_config().limit(LARGEST_ANSWER).read_to_vec().map_err(transport)?;
        let parsed = serde_json::from_slice::<Value>(&bytes);
        if !(200..300).contains(&status) {
            let message = match &parsed {
                Ok(value) => server_message(value),
                Err(_) => String::from_utf8_lossy(&bytes).into_owned(),
            };
            return Err((self.status(status, &message), wait));
        }
        let value = parsed.map_err(|e| (self.not_json(&bytes, &e), None))?;
        // Some servers report an error with status 200.
        match value.get("error").filter(|e| !e.is_null()) {
            Some(_) => Err((self.status(status, &server_message(&value)), wait)),
            None => Ok(value),
        }
    }

    fn transport(&self, error: ureq::Error) -> Fault {
        match error {
            ureq::Error::HostNotFound => Fault::HostNotFound,
            ureq::Error::Timeout(_) => Fault::TimedOut(self.timeout),
            ureq::Error::Io(e) => match e.kind() {
                io::ErrorKind::ConnectionRefused => Fault::Refused,
                io::ErrorKind::TimedOut => Fault::TimedOut(self.timeout),
                _ => Fault::Broken(e.to_string()),
            },
            other => Fault::Broken(other.to_string()),
        }
    }

    fn status(&self, status: u16, message: &str) -> Fault {
        let message = self.excerpt(message);
        match status {
            _ if is_too_long(&message) => Fault::TooLong { message },
            // Refusals of what scoring needs come as 400, 500 or 501, and no further try will change them.
            _ if message.contains("echo") => Fault::NoEcho { found: message },
            _ if message.contains("logprobs") => Fault::NoPromptLogProbs { found: message },
            401 | 403 => Fault::Unauthorized { status, message },
            404 => {
                let hint = if self.base.ends_with("/v1") {
                    "does the server have this model and this endpoint?"
                } else {
                    "the address has no /v1 at its end: is it missing?"
                };
                Fault::NotFound { message, hint }
            }
            _ => Fault::Status { status, message },
        }
    }

    fn not_json(&self, bytes: &[u8], error: &serde_json::Error) -> Fault {
        let start = self.excerpt(&String::from_utf8_lossy(bytes));
        if start.starts_with('<') { Fault::Html { start } } else { Fault::NotJson { reason: error.to_string(), start } }
    }

    /// A message short enough for an error, without the key that some servers repeat in it.
    fn excerpt(&self, message: &str) -> String {
        let message = match &self.key {
            Some(key) => message.replace(&key.0, "(hidden)"),
            None => message.to_owned(),
        };
        shorten(message.trim(), LONGEST_MESSAGE)
    }
}

/// At most `longest` characters.
pub(super) fn shorten(text: &str, longest: usize) -> String {
    match text.char_indices().nth(longest) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

/// What the servers' dialects call their message: `error.message` (OpenAI, vLLM, llama.cpp), `error` (Ollama, TGI),
/// `detail` (FastAPI), `message`.
fn server_message(value: &Value) -> String {
    let error = value.get("error").unwrap_or(value);
    let message = ["message", "detail"].iter().find_map(|key| error.get(key)).unwrap_or(error);
    let text = message.as_str().map_or_else(|| message.to_string(), str::to_owned);
    match error.get("code").and_then(Value::as_str) {
        Some(code) => format!("{text} ({code})"),
        None => text,
    }
}

/// Whether a refusal is about length. Wordings of OpenAI and llama-cpp-python ("maximum context length"), vLLM ("maximum
/// model length"), SGLang ("context length"), llama.cpp ("context size"), TGI ("`inputs` must have less than").
fn is_too_long(message: &str) -> bool {
    let message = message.to_lowercase();
    let known = ["context length", "context_length", "context size", "context window", "maximum model length"];
    known.iter().any(|wording| message.contains(wording)) || message.contains("`inputs` must have less than")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn http(base: &str) -> Result<Http, Fault> {
        Http::new(base, Some(ApiKey::new("sk-secret")), Duration::from_secs(1), 0)
    }

    #[test]
    fn an_address_may_end_as_other_clients_want_it() {
        for base in ["http://h:1/v1", "http://h:1/v1/", "http://h:1/v1/completions", "http://h:1/v1/chat/completions"] {
            assert_eq!(http(base).unwrap().url("/models"), "http://h:1/v1/models");
        }
    }

    #[test]
    fn addresses_that_are_none_are_refused() {
        for base in ["", "localhost:8000", "ftp://h/v1", "http://", "/v1"] {
            assert!(matches!(http(base), Err(Fault::Url(_))), "{base}");
        }
    }

    #[test]
    #[cfg(not(feature = "tls"))]
    fn https_without_the_feature_says_so() {
        let fault = http("https://api.example.com/v1").err().unwrap();
        assert!(matches!(fault, Fault::NoTls) && fault.to_string().contains("feature `tls`"));
    }

    #[test]
    fn a_key_that_is_no_header_is_refused_unprinted() {
        let fault = Http::new("http://h/v1", Some(ApiKey::new("a\nb")), BACKOFF, 0).err().unwrap();
        assert!(matches!(fault, Fault::Key));
        assert!(!format!("{:?}", ApiKey::new("sk-secret")).contains("secret"));
    }

    #[test]
    fn a_host_that_cannot_be_resolved_is_named_as_such() {
        assert!(matches!(http("http://h/v1").unwrap().transport(ureq::Error::HostNotFound), Fault::HostNotFound));
    }

    #[test]
    fn refusals_for_length_are_recognised_in_every_dialect() {
        for message in [
            "This model's maximum context length is 2048 tokens, however you requested 3000 tokens",
            "The decoder prompt (length 3000) is longer than the maximum model length of 2048.",
            "The input (3000 tokens) is longer than the model's context length (2048 tokens).",
            "the request exceeds the available context size",
            "Requested tokens (3000) exceed context window of 2048",
            "Input validation error: `inputs` must have less than 1024 tokens. Given: 3000",
        ] {
            assert!(is_too_long(message), "{message}");
        }
        assert!(!is_too_long("Unsupported param: echo"));
    }
}
