//! HTTP and HTTPS as all of Recoup speaks it: one client for an origin, its certificates, and proxies as curl has them.

pub mod address;
pub mod proxy;
pub mod retry;

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use thiserror::Error;
use ureq::Agent;
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::unversioned::transport::{Connector as _, TcpConnector};

use address::Address;
use proxy::{ProxyError, ProxyResolver, Via, WholeUrl};

/// Names a file of certificates to be trusted, as for OpenSSL and curl.
pub const CA_VARIABLE: &str = "SSL_CERT_FILE";

/// Why no client could be made.
#[derive(Debug, Error)]
pub enum ClientError {
    #[error(transparent)]
    Proxy(#[from] ProxyError),
    #[error("{path}: cannot read certificates: {source}")]
    CaFile { path: PathBuf, source: io::Error },
    #[error("{path}: holds no certificate in PEM form (-----BEGIN CERTIFICATE-----){}", problem.as_ref().map_or_else(String::new, |p| format!(": {p}")))]
    NoCertificate { path: PathBuf, problem: Option<String> },
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

/// An answer of any status.
pub struct Reply {
    pub status: u16,
    headers: ureq::http::HeaderMap,
    body: ureq::Body,
}

impl Reply {
    /// A header's text; `None` where it is absent or no text.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|v| v.to_str().ok())
    }

    /// The body as it comes.
    pub fn reader(&mut self) -> impl io::Read + '_ {
        self.body.with_config().limit(u64::MAX).reader()
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
    ) -> Result<Self, ClientError> {
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
        let ca_file = settings.ca_file.clone().or_else(variable_file).filter(|_| address.is_https());
        if let Some(path) = ca_file {
            let roots = RootCerts::new_with_certs(&certificates(&path)?);
            config = config.tls_config(TlsConfig::builder().root_certs(roots).build());
        }
        let whole_url = via.as_ref().filter(|v| !address.is_https() && v.proxy.protocol() == ureq::ProxyProtocol::Http);
        let agent = match whole_url {
            Some(via) => Agent::with_parts(
                config.build(),
                TcpConnector::default().chain(WholeUrl(address.origin())),
                ProxyResolver(via.proxy.uri().clone()),
            ),
            None => config.proxy(via.as_ref().map(|v| v.proxy.clone())).build().into(),
        };
        let proxy_authorization = whole_url.and_then(|via| {
            use base64::Engine as _;
            let user = via.proxy.username()?;
            let both = format!("{user}:{}", via.proxy.password().unwrap_or_default());
            Some(format!("Basic {}", base64::prelude::BASE64_STANDARD.encode(both)))
        });
        let timeout = settings.whole.unwrap_or(settings.silence);
        Ok(Self { agent, via, proxy_authorization, timeout })
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
        let (parts, body) = answer.map_err(|e| self.broken(e))?.into_parts();
        Ok(Reply { status: parts.status.as_u16(), headers: parts.headers, body })
    }

    /// The whole body, of `limit` bytes at most.
    ///
    /// # Errors
    /// When it breaks off, or is longer.
    pub fn bytes(&self, reply: &mut Reply, limit: u64) -> Result<Vec<u8>, Broken> {
        reply.body.with_config().limit(limit).read_to_vec().map_err(|e| self.broken(e))
    }

    /// What a failure to read a body is.
    #[must_use]
    pub fn read_failure(&self, error: io::Error) -> Broken {
        self.broken(ureq::Error::from(error))
    }

    fn broken(&self, error: ureq::Error) -> Broken {
        match error {
            ureq::Error::HostNotFound => Broken::HostNotFound,
            ureq::Error::Timeout(_) => Broken::TimedOut(self.timeout),
            ureq::Error::ConnectProxyFailed(reason) => Broken::Proxy(reason),
            ureq::Error::Rustls(e) => tls(&e.to_string()),
            ureq::Error::Io(e) => match e.kind() {
                io::ErrorKind::ConnectionRefused => Broken::Refused,
                io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => Broken::TimedOut(self.timeout),
                // rustls's errors arrive inside of one of the stream.
                io::ErrorKind::InvalidData => tls(&e.to_string()),
                // getaddrinfo's own words: the standard library has no kind for a name that is not found.
                _ if e.to_string().starts_with("failed to lookup address") => Broken::HostNotFound,
                _ => Broken::Connection(e.to_string()),
            },
            other => Broken::Connection(other.to_string()),
        }
    }
}

fn tls(message: &str) -> Broken {
    if message.contains("certificate") { Broken::Certificate(message.into()) } else { Broken::Tls(message.into()) }
}

fn certificates(path: &Path) -> Result<Vec<Certificate<'static>>, ClientError> {
    let text = std::fs::read(path).map_err(|source| ClientError::CaFile { path: path.into(), source })?;
    let none = |problem| ClientError::NoCertificate { path: path.into(), problem };
    let mut found = Vec::new();
    for item in parse_pem(&text) {
        if let PemItem::Certificate(certificate) = item.map_err(|e| none(Some(e.to_string())))? {
            found.push(certificate);
        }
    }
    if found.is_empty() { Err(none(None)) } else { Ok(found) }
}
