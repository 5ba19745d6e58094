//! HTTP and HTTPS as all of Recoup speaks it: one client for an origin, its certificates, and proxies as curl has them.

pub mod address;
pub mod proxy;
pub mod retry;

use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::time::Duration;
pub use ureq::http::HeaderValue;

use thiserror::Error;
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, ProxyProtocol};

use address::Address;
use proxy::Via;

/// Names a file of certificates to be trusted, as for OpenSSL and curl.
pub const CA_VARIABLE: &str = "SSL_CERT_FILE";

/// Why a setting cannot be used, before anything is asked. Holds no secret.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum Unusable {
    #[error("`{shown}`: {problem}")]
    Address { shown: String, problem: &'static str },
    #[error("{variable} is `{shown}`{problem}")]
    Proxy { variable: &'static str, shown: String, problem: &'static str },
    #[error("{path}: {problem}")]
    Certificates { path: PathBuf, problem: String },
}

/// Why nothing came back.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum Broken {
    #[error("connection refused; does the server run, and on this port?")]
    Refused,
    #[error("no such host; is the name right?")]
    HostNotFound,
    #[error("no answer within {0:?}; raise the time-out, or lower the concurrency")]
    TimedOut(Duration),
    #[error(
        "the server's certificate is not accepted: {0}; where a private authority signed it, give that authority's \
         certificate (--ca-file, or SSL_CERT_FILE)"
    )]
    Certificate(String),
    #[error("no TLS spoken: {0}; is it an http:// address?")]
    Tls(String),
    #[error("the proxy does not connect: {0}")]
    Proxy(String),
    #[error("the connection broke: {0}; did the server die?")]
    Connection(String),
}

impl Broken {
    fn of(error: ureq::Error, timeout: Duration) -> Self {
        match error {
            ureq::Error::HostNotFound => Self::HostNotFound,
            ureq::Error::Timeout(_) => Self::TimedOut(timeout),
            ureq::Error::ConnectProxyFailed(reason) => Self::Proxy(reason),
            ureq::Error::Rustls(e) => Self::tls(e.to_string()),
            ureq::Error::Io(e) => match e.kind() {
                io::ErrorKind::ConnectionRefused => Self::Refused,
                io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => Self::TimedOut(timeout),
                // rustls's errors arrive inside of one of the stream.
                io::ErrorKind::InvalidData => Self::tls(e.to_string()),
                // getaddrinfo's own words: the standard library has no kind for a name that is not found.
                _ if e.to_string().starts_with("failed to lookup address") => Self::HostNotFound,
                _ => Self::Connection(e.to_string()),
            },
            other => Self::Connection(other.to_string()),
        }
    }

    fn tls(message: String) -> Self {
        if message.contains("certificate") { Self::Certificate(message) } else { Self::Tls(message) }
    }

    /// Whether another try may succeed.
    #[must_use]
    pub fn may_pass(&self) -> bool {
        matches!(self, Self::Refused | Self::Connection(_) | Self::TimedOut(_) | Self::Proxy(_))
    }
}

/// An answer of any status.
pub struct Reply {
    pub status: u16,
    headers: ureq::http::HeaderMap,
    body: ureq::Body,
    timeout: Duration,
}

impl Reply {
    /// A header's text; `None` where it is absent or no text.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|v| v.to_str().ok())
    }

    /// The next bytes of the body; 0: it has ended.
    ///
    /// # Errors
    /// When it breaks off.
    pub fn read(&mut self, buffer: &mut [u8]) -> Result<usize, Broken> {
        self.body.as_reader().read(buffer).map_err(|e| Broken::of(e.into(), self.timeout))
    }

    /// The whole body, of `limit` bytes at most.
    ///
    /// # Errors
    /// When it breaks off, or is longer.
    pub fn bytes(&mut self, limit: u64) -> Result<Vec<u8>, Broken> {
        self.body.with_config().limit(limit).read_to_vec().map_err(|e| Broken::of(e, self.timeout))
    }
}

/// How to speak to a server.
#[derive(Clone, Debug)]
pub struct Settings {
    /// For one request, its answer included; `None`: as long as bytes come, each within `silence`.
    pub whole: Option<Duration>,
    /// For a connection, and for the next bytes.
    pub silence: Duration,
    /// Certificates in PEM form, trusted instead of the public authorities as with curl's `--cacert`; else what
    /// `SSL_CERT_FILE` names.
    pub ca_file: Option<PathBuf>,
}

/// Speaks to one origin.
pub struct Client {
    agent: Agent,
    via: Option<Via>,
    /// A header of every request.
    proxy_authorization: Option<String>,
    timeout: Duration,
}

impl Client {
    /// A client for the origin of `address`; `variable` gives environment variables.
    ///
    /// # Errors
    /// When the environment names a proxy that cannot be used, or a file of certificates holds none.
    pub fn new(
        address: &Address,
        settings: &Settings,
        variable: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Self, Unusable> {
        let via = Via::of(address, variable)?;
        let mut config = Agent::config_builder()
            .http_status_as_error(false)
            // A redirected POST would arrive as a GET.
            .max_redirects(0)
            .max_redirects_will_error(false)
            .proxy(None)
            .timeout_global(settings.whole)
            .timeout_connect(Some(settings.silence))
            .timeout_recv_response(Some(settings.silence))
            .timeout_per_read(Some(settings.silence));
        let variable_file = || variable(CA_VARIABLE).filter(|v| !v.is_empty()).map(PathBuf::from);
        if let Some(path) = settings.ca_file.clone().or_else(variable_file).filter(|_| address.is_https()) {
            let roots = RootCerts::new_with_certs(&certificates(&path)?);
            config = config.tls_config(TlsConfig::builder().root_certs(roots).build());
        }
        let plain = via.as_ref().filter(|v| !address.is_https() && v.proxy.protocol() == ProxyProtocol::Http);
        let agent = match plain {
            Some(via) => via.agent_by_whole_urls(config.build(), address),
            None => config.proxy(via.as_ref().map(|v| v.proxy.clone())).build().into(),
        };
        let proxy_authorization = plain.and_then(|via| {
            let password = via.proxy.password().unwrap_or_default();
            Some(address::basic(&format!("{}:{password}", via.proxy.username()?)))
        });
        Ok(Self { agent, via, proxy_authorization, timeout: settings.whole.unwrap_or(settings.silence) })
    }

    /// The proxy that is asked.
    #[must_use]
    pub fn via(&self) -> Option<&Via> {
        self.via.as_ref()
    }

    /// Asks for `url`, of this client's origin: a POST where there is a body, otherwise a GET. Follows no redirection.
    ///
    /// # Errors
    /// When no answer begins.
    pub fn ask(&self, url: &str, headers: &[(&str, &str)], json: Option<&str>) -> Result<Reply, Broken> {
        let proxy = self.proxy_authorization.as_deref().map(|v| ("proxy-authorization", v));
        let headers = headers.iter().copied().chain(proxy);
        let answer = match json {
            Some(body) => {
                let request = self.agent.post(url).content_type("application/json");
                headers.fold(request, |r, (name, value)| r.header(name, value)).send(body)
            }
            None => headers.fold(self.agent.get(url), |r, (name, value)| r.header(name, value)).call(),
        };
        let (parts, body) = answer.map_err(|e| Broken::of(e, self.timeout))?.into_parts();
        Ok(Reply { status: parts.status.as_u16(), headers: parts.headers, body, timeout: self.timeout })
    }
}

fn certificates(path: &Path) -> Result<Vec<Certificate<'static>>, Unusable> {
    let fail = |problem| Unusable::Certificates { path: path.into(), problem };
    let text = std::fs::read(path).map_err(|e| fail(format!("cannot read certificates: {e}")))?;
    let none = "holds no certificate in PEM form (-----BEGIN CERTIFICATE-----)";
    let items: Result<Vec<_>, _> = parse_pem(&text).collect();
    let items = items.map_err(|e| fail(format!("{none}: {e}")))?.into_iter();
    let found = items.filter_map(|item| if let PemItem::Certificate(c) = item { Some(c) } else { None });
    Some(found.collect::<Vec<_>>()).filter(|found| !found.is_empty()).ok_or_else(|| fail(none.into()))
}
