//! A server's address as people write it, taken apart; what is secret in it gets into no message and no file.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use percent_encoding::percent_decode_str;
use thiserror::Error;
use ureq::http::Uri;

/// What stands in a message in the place of a secret.
pub const HIDDEN: &str = "(hidden)";
/// Parts of the names of query fields whose values are secret, in lower case: `api_key`, `sig`, `access_token`, `code`, …
const SECRET_NAMES: [&str; 8] = ["key", "token", "secret", "sig", "pass", "auth", "credential", "code"];
/// A shorter text is not looked for in messages: it would be found in words that have nothing to do with it.
const SHORTEST_SECRET: usize = 3;

/// `scheme://user:password@host:port/path?query`, read.
#[derive(Clone, PartialEq, Eq)]
pub struct Address {
    https: bool,
    /// As in a URL, in lower case: an IPv6 address stands in brackets.
    host: String,
    port: Option<u16>,
    /// Without a slash at its end.
    path: String,
    /// Goes behind every path.
    query: Option<String>,
    /// `user:password`, as sent.
    credentials: Option<String>,
}

/// Why a text is no address. Holds no secret.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("`{shown}`: {problem}")]
pub struct NoAddress {
    shown: String,
    problem: &'static str,
}

impl std::fmt::Debug for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Address({})", self.shown(""))
    }
}

/// Whether `text` is meant as the address of a server and not as a folder: `http://` or `https://`, in any case.
#[must_use]
pub fn is_address(text: &str) -> bool {
    let scheme = text.trim_start().split_once("://").map(|(scheme, _)| scheme);
    scheme.is_some_and(|s| s.eq_ignore_ascii_case("http") || s.eq_ignore_ascii_case("https"))
}

impl Address {
    /// Reads `scheme://[user[:password]@]host[:port][/path][?query][#ignored]`; scheme and host in any case, user and
    /// password percent-encoded or not.
    ///
    /// # Errors
    /// When it has another scheme, no host, or a port that is none.
    pub fn parse(text: &str) -> Result<Self, NoAddress> {
        let failed = |problem| NoAddress { shown: mask(text.trim()), problem };
        let (scheme, rest) = text.trim().split_once("://").ok_or_else(|| failed("no http:// at its start"))?;
        let https = scheme.eq_ignore_ascii_case("https");
        if !https && !scheme.eq_ignore_ascii_case("http") {
            return Err(failed("the scheme is neither http nor https"));
        }
        let rest = rest.split('#').next().unwrap_or_default();
        let (before, query) = rest.split_once('?').map_or((rest, None), |(b, q)| (b, Some(q)));
        let (authority, path) = before.find('/').map_or((before, ""), |at| before.split_at(at));
        let (user, host) = authority.rsplit_once('@').map_or((None, authority), |(u, h)| (Some(u), h));
        if user.is_none() && rest.contains('@') && !path.is_empty() && authority.contains(':') {
            // `user:pass/word@host`: the slash ends what can hold a password.
            let port = authority.rsplit(':').next().unwrap_or_default();
            if port.parse::<u16>().is_err() && !authority.ends_with(']') {
                return Err(failed("write `/`, `?`, `#` and `@` in a password as %2F, %3F, %23 and %40"));
            }
        }
        let uri: Uri = format!("http://{host}/").parse().map_err(|_| failed("no host and port that can be one"))?;
        let name = uri.host().filter(|h| !h.is_empty()).ok_or_else(|| failed("no host"))?;
        let port = match host[name.len().min(host.len())..].strip_prefix(':') {
            None | Some("") => None,
            Some(port) => Some(port.parse().map_err(|_| failed("the port is no number up to 65535"))?),
        };
        let path = path.trim_end_matches('/');
        let address = Self {
            https,
            host: name.to_lowercase(),
            port,
            path: path.to_owned(),
            query: query.filter(|q| !q.is_empty()).map(str::to_owned),
            credentials: user.map(|user| match user.split_once(':') {
                Some((name, password)) => format!("{}:{}", decoded(name), decoded(password)),
                None => format!("{}:", decoded(user)),
            }),
        };
        let usable = address.url("").parse::<Uri>().is_ok() && address.url("/x").parse::<Uri>().is_ok();
        if usable { Ok(address) } else { Err(failed("a character that no address can have")) }
    }

    /// Without these endings of the path, the first that fits.
    #[must_use]
    pub fn without(mut self, endings: &[&str]) -> Self {
        if let Some(shorter) = endings.iter().find_map(|e| self.path.strip_suffix(e)) {
            self.path = shorter.trim_end_matches('/').to_owned();
        }
        self
    }

    #[must_use]
    pub fn is_https(&self) -> bool {
        self.https
    }

    /// In lower case; an IPv6 address in brackets.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.host
    }

    #[must_use]
    pub fn port(&self) -> u16 {
        self.port.unwrap_or(if self.https { 443 } else { 80 })
    }

    #[must_use]
    pub fn path(&self) -> &str {
        &self.path
    }

    /// `scheme://host:port`.
    #[must_use]
    pub fn origin(&self) -> String {
        let scheme = if self.https { "https" } else { "http" };
        let port = self.port.map_or_else(String::new, |p| format!(":{p}"));
        format!("{scheme}://{}{port}", self.host)
    }

    /// What a request goes to: `path` behind the address's own, the query at the end, no user and password.
    #[must_use]
    pub fn url(&self, path: &str) -> String {
        let query = self.query.as_ref().map_or_else(String::new, |q| format!("?{q}"));
        format!("{}{}{path}{query}", self.origin(), self.path)
    }

    /// [`Self::url`] for messages and files: secret values in the query are masked, and a user is only hinted at.
    #[must_use]
    pub fn shown(&self, path: &str) -> String {
        let user = if self.credentials.is_some() { format!("{HIDDEN}@") } else { String::new() };
        self.url(path).replacen("://", &format!("://{user}"), 1).split_once('?').map_or_else(
            || self.url(path).replacen("://", &format!("://{user}"), 1),
            |(before, query)| format!("{before}?{}", masked_query(query)),
        )
    }

    /// The value of an `Authorization` header for the user and password of the address.
    #[must_use]
    pub fn basic(&self) -> Option<String> {
        self.credentials.as_ref().map(|c| format!("Basic {}", BASE64_STANDARD.encode(c)))
    }

    /// Texts that must not appear in a message.
    #[must_use]
    pub fn secrets(&self) -> Vec<String> {
        let mut all = Vec::new();
        if let Some(credentials) = &self.credentials {
            all.push(BASE64_STANDARD.encode(credentials));
            all.push(credentials.clone());
            all.extend(credentials.split_once(':').map(|(_, password)| password.to_owned()));
        }
        for (name, value) in self.query.iter().flat_map(|q| fields(q)) {
            if is_secret(name) {
                all.extend([value.to_owned(), decoded(value)]);
            }
        }
        all.retain(|s| s.len() >= SHORTEST_SECRET);
        all.sort_by_key(|s| std::cmp::Reverse(s.len()));
        all.dedup();
        all
    }
}

/// An address that could not be read, or any other text, without what may be a password or a key in it.
#[must_use]
pub fn mask(text: &str) -> String {
    let (scheme, rest) = text.split_once("://").map_or(("", text), |(s, r)| (&text[..s.len() + 3], r));
    let rest = match rest.rsplit_once('@') {
        Some((_, host)) => format!("{HIDDEN}@{host}"),
        None => rest.to_owned(),
    };
    match rest.split_once('?') {
        Some((before, query)) => format!("{scheme}{before}?{}", masked_query(query)),
        None => format!("{scheme}{rest}"),
    }
}

fn masked_query(query: &str) -> String {
    let masked: Vec<String> = query
        .split('&')
        .map(|field| match field.split_once('=') {
            Some((name, _)) if is_secret(name) => format!("{name}={HIDDEN}"),
            _ => field.to_owned(),
        })
        .collect();
    masked.join("&")
}

fn fields(query: &str) -> impl Iterator<Item = (&str, &str)> {
    query.split('&').filter_map(|field| field.split_once('='))
}

fn is_secret(name: &str) -> bool {
    let name = name.to_lowercase();
    SECRET_NAMES.iter().any(|part| name.contains(part))
}

fn decoded(text: &str) -> String {
    percent_decode_str(text).decode_utf8().map_or_else(|_| text.to_owned(), |t| t.into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Address {
        Address::parse(text).unwrap()
    }

    #[test]
    fn a_query_stays_at_the_end() {
        let address = read("http://h:1/v1/?api-version=2024-02-01&x=/y");
        assert_eq!(address.url("/completions"), "http://h:1/v1/completions?api-version=2024-02-01&x=/y");
        let full = read("http://h:1/v1/completions?a=b").without(&["/chat/completions", "/completions"]);
        assert_eq!(full.url("/models"), "http://h:1/v1/models?a=b");
        assert_eq!(read("http://h:1?a=b#c").url("/v1"), "http://h:1/v1?a=b");
    }

    #[test]
    fn scheme_and_host_may_be_in_capitals() {
        assert!(is_address("HTTP://h") && is_address(" hTTps://h/v1") && !is_address("httpx://h"));
        assert!(!is_address("./http:/h") && !is_address("org/name"));
        assert_eq!(read("HTTP://Host:80/V1").url("/x"), "http://host:80/V1/x");
        assert!(read("HTTPS://h").is_https());
        assert_eq!((read("https://h").port(), read("http://h").port(), read("http://h:0/").port()), (443, 80, 0));
    }

    #[test]
    fn an_ipv6_host_keeps_its_brackets() {
        let address = read("http://u:p@[::1]:8000/v1");
        assert_eq!((address.host(), address.port()), ("[::1]", 8000));
        assert_eq!(address.url(""), "http://[::1]:8000/v1");
    }

    #[test]
    fn user_and_password_are_sent_and_never_shown() {
        let address = read("http://us%40er:p%2Fs%20:x@h:1/v1?sig=abc%2Bd&v=2");
        assert_eq!(address.basic().unwrap(), format!("Basic {}", BASE64_STANDARD.encode("us@er:p/s :x")));
        assert_eq!(address.url("/m"), "http://h:1/v1/m?sig=abc%2Bd&v=2");
        assert_eq!(address.shown("/m"), "http://(hidden)@h:1/v1/m?sig=(hidden)&v=2");
        assert!(!format!("{address:?}").contains("abc"));
        for secret in ["p/s :x", "abc+d", "abc%2Bd", "us@er:p/s :x"] {
            assert!(address.secrets().iter().any(|s| s == secret), "{secret}");
        }
        assert_eq!(read("http://token@h").basic().unwrap(), format!("Basic {}", BASE64_STANDARD.encode("token:")));
    }

    #[test]
    fn what_is_no_address_is_refused_without_its_password() {
        for text in ["", "localhost:8000", "ftp://u:s3cret@h/v1", "http://", "/v1", "http://u:s3cret@", "http://h:x/v1"]
        {
            let error = Address::parse(text).unwrap_err().to_string();
            assert!(!error.contains("s3cret"), "{error}");
        }
        for text in ["http://u:s3c/ret@h:1/v1", "http://u:s3cret@h h/", "http://u:s3cret@h:99999"] {
            let error = Address::parse(text).unwrap_err().to_string();
            assert!(!error.contains("s3c") && error.contains(HIDDEN), "{error}");
        }
        assert_eq!(mask("http://a:b@h/v1?api_key=x&b=c"), "http://(hidden)@h/v1?api_key=(hidden)&b=c");
    }
}
