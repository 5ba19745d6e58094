//! A server's address as people write it, taken apart; what is secret in it gets into no message and no file.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use percent_encoding::percent_decode_str;
use ureq::http::Uri;

use super::Unusable;

/// What stands in a message in the place of a secret.
pub const HIDDEN: &str = "(hidden)";
/// Parts of the names of query fields whose values are secret, in lower case: `api_key`, `sig`, `access_token`, `code`, …
const SECRET_NAMES: [&str; 8] = ["key", "token", "secret", "sig", "pass", "auth", "credential", "code"];
/// A shorter text is not looked for in messages: it would be found in words that have nothing to do with it.
const SHORTEST_SECRET: usize = 3;

/// `scheme://user:password@host:port/path?query`, read.
#[derive(Clone, PartialEq, Eq)]
pub struct Address {
    /// Scheme and host in lower case, no user: an IPv6 address stands in brackets. Its query goes behind every path.
    uri: Uri,
    /// Without a slash at its end.
    path: String,
    /// `user:password`, as sent.
    credentials: Option<String>,
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
    pub fn parse(text: &str) -> Result<Self, Unusable> {
        let text = text.trim();
        let failed = |problem| Unusable::Address { shown: mask(text), problem };
        if !is_address(text) {
            return Err(failed("neither http:// nor https:// at its start"));
        }
        let (scheme, rest) = text.split_once("://").unwrap_or_default();
        let rest = rest.split('#').next().unwrap_or_default();
        let (authority, path) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
        let (user, host) = authority.rsplit_once('@').map_or((None, authority), |(u, h)| (Some(u), h));
        let (scheme, host) = (scheme.to_lowercase(), host.to_lowercase());
        let uri: Uri = format!("{scheme}://{host}{path}")
            .parse()
            .map_err(|_| failed("no host, or a character that no address can have"))?;
        let port = &host[uri.host().map_or(0, str::len)..];
        if !matches!(port, "" | ":") && uri.port_u16().is_none() {
            return Err(failed(match user {
                // `user:pass/word@host`: the slash ends what can hold a password.
                None if path.contains('@') => "write `/`, `?`, `#` and `@` in a password as %2F, %3F, %23 and %40",
                _ => "the port is no number up to 65535",
            }));
        }
        let credentials = user.map(|user| {
            let (name, password) = user.split_once(':').unwrap_or((user, ""));
            format!("{}:{}", decoded(name), decoded(password))
        });
        let path = uri.path().trim_end_matches('/').to_owned();
        Ok(Self { uri, path, credentials })
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
        self.uri.scheme_str() == Some("https")
    }

    /// In lower case; an IPv6 address in brackets.
    #[must_use]
    pub fn host(&self) -> &str {
        self.uri.host().unwrap_or_default()
    }

    #[must_use]
    pub fn port(&self) -> u16 {
        self.uri.port_u16().unwrap_or(if self.is_https() { 443 } else { 80 })
    }

    #[must_use]
    pub fn path(&self) -> &str {
        &self.path
    }

    /// `scheme://host:port`.
    #[must_use]
    pub fn origin(&self) -> String {
        self.before_path("")
    }

    fn before_path(&self, user: &str) -> String {
        let port = self.uri.port_u16().map_or_else(String::new, |p| format!(":{p}"));
        format!("{}://{user}{}{port}", self.uri.scheme_str().unwrap_or_default(), self.host())
    }

    /// What a request goes to: `path` behind the address's own, the query at the end, no user and password.
    #[must_use]
    pub fn url(&self, path: &str) -> String {
        let query = self.query().map_or_else(String::new, |q| format!("?{q}"));
        format!("{}{}{path}{query}", self.origin(), self.path)
    }

    /// [`Self::url`] for messages and files: secret values in the query are masked, and a user is only hinted at.
    #[must_use]
    pub fn shown(&self, path: &str) -> String {
        let user = if self.credentials.is_some() { format!("{HIDDEN}@") } else { String::new() };
        let query = self.query().map_or_else(String::new, |q| format!("?{}", masked_query(q)));
        format!("{}{}{path}{query}", self.before_path(&user), self.path)
    }

    fn query(&self) -> Option<&str> {
        self.uri.query().filter(|q| !q.is_empty())
    }

    /// The value of an `Authorization` header for the user and password of the address.
    #[must_use]
    pub fn basic(&self) -> Option<String> {
        self.credentials.as_deref().map(basic)
    }

    /// Texts that must not appear in a message.
    #[must_use]
    pub fn secrets(&self) -> Vec<String> {
        let mut all = Vec::new();
        if let Some(credentials) = &self.credentials {
            all.extend([BASE64_STANDARD.encode(credentials), credentials.clone()]);
            all.extend(credentials.split_once(':').map(|(_, password)| password.to_owned()));
        }
        for (name, value) in self.query().into_iter().flat_map(|q| q.split('&').filter_map(|f| f.split_once('='))) {
            if is_secret(name) {
                all.extend([value.to_owned(), decoded(value)]);
            }
        }
        all.retain(|s| s.len() >= SHORTEST_SECRET);
        all
    }
}

/// The value of an authorizing header for `user:password`.
pub(super) fn basic(credentials: &str) -> String {
    format!("Basic {}", BASE64_STANDARD.encode(credentials))
}

/// An address that could not be read, or any other text, without what may be a password or a key in it.
#[must_use]
pub fn mask(text: &str) -> String {
    let (scheme, rest) = text.split_at(text.find("://").map_or(0, |at| at + 3));
    let (user, rest) = rest.rsplit_once('@').map_or_else(Default::default, |(_, host)| (format!("{HIDDEN}@"), host));
    let (before, query) = rest.split_at(rest.find('?').unwrap_or(rest.len()));
    format!("{scheme}{user}{before}{}", masked_query(query))
}

/// `query` with its secret values hidden; a question mark may stand before it.
fn masked_query(query: &str) -> String {
    let masked = query.split('&').map(|field| match field.split_once('=') {
        Some((name, _)) if is_secret(name) => format!("{name}={HIDDEN}"),
        _ => field.to_owned(),
    });
    masked.collect::<Vec<_>>().join("&")
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
    fn addresses_are_read_as_people_write_them() {
        for (text, path, url) in [
            ("http://h:1/v1/?api-version=2024-02-01&x=/y", "/m", "http://h:1/v1/m?api-version=2024-02-01&x=/y"),
            ("http://h:1?a=b#c", "/v1", "http://h:1/v1?a=b"),
            ("HTTP://Host:80/V1", "/x", "http://host:80/V1/x"),
            (" https://h:?", "", "https://h"),
            ("http://u:p@[::1]:8000/v1", "", "http://[::1]:8000/v1"),
            ("http://u^ é:p@q@h/@x", "", "http://h/@x"),
        ] {
            assert_eq!(read(text).url(path), url, "{text}");
        }
        let full = read("http://h:1/v1/completions?a=b").without(&["/chat/completions", "/completions"]);
        assert_eq!(full.url("/models"), "http://h:1/v1/models?a=b");
        assert!(is_address("HTTP://h") && is_address(" hTTps://h/v1") && !is_address("httpx://h"));
        assert!(!is_address("./http:/h") && !is_address("org/name") && read("HTTPS://h").is_https());
        assert_eq!((read("https://h").port(), read("http://h").port(), read("http://h:0/").port()), (443, 80, 0));
        assert_eq!(read("http://[::1]:8000").host(), "[::1]");
    }

    #[test]
    fn user_and_password_are_sent_and_never_shown() {
        let address = read("http://us%40er:p%2Fs%20:x@h:1/v1?sig=abc%2Bd&v=a@b");
        assert_eq!(address.basic().unwrap(), basic("us@er:p/s :x"));
        assert_eq!(address.url("/m"), "http://h:1/v1/m?sig=abc%2Bd&v=a@b");
        assert_eq!(address.shown("/m"), "http://(hidden)@h:1/v1/m?sig=(hidden)&v=a@b");
        assert!(!format!("{address:?}").contains("abc"));
        for secret in ["p/s :x", "abc+d", "abc%2Bd", "us@er:p/s :x"] {
            assert!(address.secrets().iter().any(|s| s == secret), "{secret}");
        }
        assert_eq!(read("http://token@h").basic().unwrap(), basic("token:"));
    }

    #[test]
    fn what_is_no_address_is_refused_without_its_password() {
        for (text, problem) in [
            ("", "neither http:// nor"),
            ("localhost:8000", "neither http:// nor"),
            ("/v1", "neither http:// nor"),
            ("ftp://u:s3cret@h/v1", "`ftp://(hidden)@h/v1`: neither http:// nor"),
            ("http://", "no host"),
            ("http://u:s3cret@", "`http://(hidden)@`: no host"),
            ("http://u:s3cret@h h/", "(hidden)@h h/`: no host, or a character"),
            ("http://h/a b", "or a character"),
            ("http://h:x/v1", "the port is no number"),
            ("http://u:s3cret@h:99999", "(hidden)@h:99999`: the port is no number"),
            ("http://u:s3c/ret@h:1/v1", "(hidden)@h:1/v1`: write `/`, `?`"),
        ] {
            let error = Address::parse(text).unwrap_err().to_string();
            assert!(!error.contains("s3c") && error.contains(problem), "{error}");
        }
        assert_eq!(mask("http://a:b@h/v1?api_key=x&b=c"), "http://(hidden)@h/v1?api_key=(hidden)&b=c");
    }
}
