//! Which proxy a request goes through, as curl reads the environment, and the transport of plain http through one.
//!
//! curl (<https://curl.se/libcurl/c/CURLOPT_PROXY.html>): `http_proxy`, in lower case only, for http; `https_proxy` or
//! `HTTPS_PROXY` for https; then `all_proxy` or `ALL_PROXY`; an empty one counts as unset. `no_proxy` or `NO_PROXY` lists
//! what is asked directly: names with everything below them, addresses, networks (`10.0.0.0/8`), `*`; separated by commas
//! or spaces. Beyond curl: `host:port` there, as Python and Go have it; and this machine's own addresses are never asked
//! for through a proxy. Plain http is asked of a proxy by the whole URL (RFC 9112, 3.2.2), since many proxies allow `CONNECT`
//! for https only.

use std::fmt;
use std::net::IpAddr;

use thiserror::Error;
use ureq::config::Config;
use ureq::http::Uri;
use ureq::unversioned::resolver::{DefaultResolver, ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{Buffers, ConnectionDetails, Connector, NextTimeout, Transport};

use super::address::{Address, mask};

/// A proxy and the variable that names it.
#[derive(Clone)]
pub struct Via {
    pub variable: &'static str,
    pub proxy: ureq::Proxy,
}

/// Why a proxy's variable cannot be followed.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum ProxyError {
    #[error("{variable} is `{shown}`, which is no proxy: expected http://host:port, https://… or socks5://…")]
    Unreadable { variable: &'static str, shown: String },
    #[error(
        "{variable} is `{shown}`: plain http through a proxy that is itself asked by TLS is not supported; use an http:// \
         or socks5:// proxy, or list the server in no_proxy"
    )]
    TlsToProxy { variable: &'static str, shown: String },
}

impl fmt::Display for Via {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "through the proxy {}:{} of {}", self.proxy.host(), self.proxy.port(), self.variable)
    }
}

impl Via {
    /// For `address` by the variables that `variable` gives; `None`: directly.
    ///
    /// # Errors
    /// When the variable holds no proxy, or one of a kind that is not supported.
    pub fn of(address: &Address, variable: &dyn Fn(&str) -> Option<String>) -> Result<Option<Self>, ProxyError> {
        let set = |name: &str| variable(name).map(|v| v.trim().to_owned()).filter(|v| !v.is_empty());
        if is_this_machine(address.host()) {
            return Ok(None);
        }
        let listed = set("no_proxy").or_else(|| set("NO_PROXY"));
        if listed.is_some_and(|list| is_listed(&list, address.host(), address.port())) {
            return Ok(None);
        }
        let names: &[&'static str] = if address.is_https() {
            &["https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"]
        } else {
            // HTTP_PROXY is not read: a web server that runs a program sets it from a header `Proxy:` of the request.
            &["http_proxy", "all_proxy", "ALL_PROXY"]
        };
        let Some((variable, value)) = names.iter().find_map(|name| Some((*name, set(name)?))) else { return Ok(None) };
        let shown = || mask(&value);
        let proxy = ureq::Proxy::new(&value).map_err(|_| ProxyError::Unreadable { variable, shown: shown() })?;
        if proxy.protocol() == ureq::ProxyProtocol::Https && !address.is_https() {
            return Err(ProxyError::TlsToProxy { variable, shown: shown() });
        }
        Ok(Some(Self { variable, proxy }))
    }
}

/// localhost, 127.0.0.0/8, ::1, and 0.0.0.0 and ::, by which servers say that they listen everywhere.
fn is_this_machine(host: &str) -> bool {
    let name = host.trim_end_matches('.');
    match address_of(name) {
        Some(IpAddr::V6(ip)) if ip.to_ipv4_mapped().is_some_and(|ip| ip.is_loopback()) => true,
        Some(ip) => ip.is_loopback() || ip.is_unspecified(),
        None => name == "localhost" || name.ends_with(".localhost"),
    }
}

fn address_of(host: &str) -> Option<IpAddr> {
    host.trim_start_matches('[').trim_end_matches(']').parse().ok()
}

fn is_listed(list: &str, host: &str, port: u16) -> bool {
    let host = host.trim_end_matches('.').to_lowercase();
    let entries = list.split([',', ' ', '\t']).filter(|e| !e.is_empty());
    entries.map(str::to_lowercase).any(|entry| {
        let (name, only) = without_port(&entry);
        only.is_none_or(|only| only == port) && matches(name, &host)
    })
}

/// An entry's host, and its port if it has one.
fn without_port(entry: &str) -> (&str, Option<u16>) {
    match entry.rsplit_once(':') {
        // An IPv6 address without brackets has more than one colon.
        Some((name, port)) if name.ends_with(']') || !name.contains(':') => match port.parse() {
            Ok(port) => (name, Some(port)),
            Err(_) => (entry, None),
        },
        _ => (entry, None),
    }
}

fn matches(entry: &str, host: &str) -> bool {
    if entry == "*" {
        return true;
    }
    if let Some(ip) = address_of(host) {
        return match entry.split_once('/') {
            Some((network, bits)) => {
                address_of(network).zip(bits.parse().ok()).is_some_and(|(network, bits)| is_in(ip, network, bits))
            }
            None => address_of(entry) == Some(ip),
        };
    }
    let name = entry.trim_start_matches('*').trim_start_matches('.').trim_end_matches('.');
    !name.is_empty() && (host == name || host.strip_suffix(name).is_some_and(|rest| rest.ends_with('.')))
}

fn is_in(ip: IpAddr, network: IpAddr, bits: u32) -> bool {
    let same = |a: u128, b: u128, width: u32| bits <= width && (a ^ b).checked_shr(width - bits).unwrap_or(0) == 0;
    match (ip, network) {
        (IpAddr::V4(a), IpAddr::V4(b)) => same(u32::from(a).into(), u32::from(b).into(), 32),
        (IpAddr::V6(a), IpAddr::V6(b)) => same(u128::from(a), u128::from(b), 128),
        _ => false,
    }
}

/// Finds the proxy's address instead of the server's.
#[derive(Debug)]
pub(super) struct ProxyResolver(pub Uri);

impl Resolver for ProxyResolver {
    fn resolve(&self, _: &Uri, config: &Config, timeout: NextTimeout) -> Result<ResolvedSocketAddrs, ureq::Error> {
        DefaultResolver::default().resolve(&self.0, config, timeout)
    }
}

/// Turns the first line of each request into one for a proxy: `POST http://server:port/path HTTP/1.1`.
#[derive(Debug)]
pub(super) struct WholeUrl(pub String);

impl<In: Transport> Connector<In> for WholeUrl {
    type Out = WholeUrlTransport<In>;

    fn connect(&self, _: &ConnectionDetails, chained: Option<In>) -> Result<Option<Self::Out>, ureq::Error> {
        Ok(chained.map(|inner| WholeUrlTransport { inner, origin: self.0.clone(), at_start: true }))
    }
}

pub(super) struct WholeUrlTransport<In> {
    inner: In,
    origin: String,
    /// Whether what is sent next is the start of a request.
    at_start: bool,
}

impl<In> fmt::Debug for WholeUrlTransport<In> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("WholeUrlTransport")
    }
}

impl<In: Transport> Transport for WholeUrlTransport<In> {
    fn buffers(&mut self) -> &mut dyn Buffers {
        self.inner.buffers()
    }

    fn transmit_output(&mut self, amount: usize, timeout: NextTimeout) -> Result<(), ureq::Error> {
        let output = &self.inner.buffers().output()[..amount];
        let Some(space) = output.iter().position(|b| *b == b' ').filter(|_| self.at_start) else {
            return self.inner.transmit_output(amount, timeout);
        };
        self.at_start = false;
        let whole = [&output[..=space], self.origin.as_bytes(), &output[space + 1..]].concat();
        let mut rest = whole.as_slice();
        while !rest.is_empty() {
            let output = self.inner.buffers().output();
            let now = rest.len().min(output.len());
            output[..now].copy_from_slice(&rest[..now]);
            self.inner.transmit_output(now, timeout)?;
            rest = &rest[now..];
        }
        Ok(())
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, ureq::Error> {
        // The server speaks: what is sent after this is another request.
        self.at_start = true;
        self.inner.await_input(timeout)
    }

    fn is_open(&mut self) -> bool {
        self.inner.is_open()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn via(url: &str, variables: &[(&str, &str)]) -> Result<Option<String>, ProxyError> {
        let address = Address::parse(url).unwrap();
        let find = |name: &str| variables.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned());
        Ok(Via::of(&address, &find)?.map(|v| format!("{}:{} {}", v.proxy.host(), v.proxy.port(), v.variable)))
    }

    #[test]
    fn variables_are_read_as_curl_reads_them() {
        let p = "http://p:1";
        assert_eq!(via("http://h/", &[("http_proxy", p)]), Ok(Some("p:1 http_proxy".into())));
        assert_eq!(via("http://h/", &[("HTTP_PROXY", p)]), Ok(None));
        assert_eq!(via("http://h/", &[("https_proxy", p), ("HTTPS_PROXY", p)]), Ok(None));
        assert_eq!(via("https://h/", &[("http_proxy", p)]), Ok(None));
        assert_eq!(via("https://h/", &[("HTTPS_PROXY", p)]), Ok(Some("p:1 HTTPS_PROXY".into())));
        let both = [("HTTPS_PROXY", p), ("https_proxy", "q:2"), ("ALL_PROXY", "r:3")];
        assert_eq!(via("https://h/", &both), Ok(Some("q:2 https_proxy".into())));
        assert_eq!(via("http://h/", &both), Ok(Some("r:3 ALL_PROXY".into())));
        assert_eq!(via("http://h/", &[("http_proxy", ""), ("all_proxy", p)]), Ok(Some("p:1 all_proxy".into())));
        assert_eq!(via("http://h/", &[("all_proxy", "socks5://s:9")]), Ok(Some("s:9 all_proxy".into())));
    }

    #[test]
    fn no_proxy_knows_names_addresses_networks_ports_and_spaces() {
        let direct = |url: &str, list: &str| via(url, &[("all_proxy", "http://p:1"), ("NO_PROXY", list)]) == Ok(None);
        for (url, list) in [
            ("http://h.example.com/", "example.com"),
            ("http://example.com/", ".example.com"),
            ("http://a.example.com/", "*.example.com"),
            ("http://EXAMPLE.com./", "x, Example.COM"),
            ("http://h/", "x  h"),
            ("http://h/", "*"),
            ("http://10.1.2.3/", "10.0.0.0/8"),
            ("http://10.1.2.3/", "a,10.1.2.3"),
            ("http://[fd00::5]:80/", "fd00::/8"),
            ("http://[fd00::5]/", "[fd00::5]"),
            ("http://h:8000/", "h:8000"),
            ("https://h/", "h:443"),
            ("http://1.2.3.4/", "0.0.0.0/0"),
        ] {
            assert!(direct(url, list), "{url} {list}");
        }
        for (url, list) in [
            ("http://badexample.com/", "example.com"),
            ("http://h:8000/", "h:8001"),
            ("http://11.1.2.3/", "10.0.0.0/8"),
            ("http://10.1.2.3/", "10.1.2"),
            ("http://10.1.2.3/", "10.1.2.3/33"),
            ("http://[fe00::5]/", "fd00::/8"),
            ("http://h/", ""),
            ("http://h/", "."),
        ] {
            assert!(!direct(url, list), "{url} {list}");
        }
        let lower_first = [("http_proxy", "p:1"), ("no_proxy", "x"), ("NO_PROXY", "h")];
        assert!(via("http://h/", &lower_first).unwrap().is_some());
    }

    #[test]
    fn this_machine_is_never_asked_through_a_proxy() {
        for host in ["localhost", "LOCALHOST", "127.0.0.1", "127.8.8.8", "0.0.0.0", "[::1]", "[::]", "a.localhost"] {
            assert_eq!(via(&format!("http://{host}:1/v1"), &[("http_proxy", "http://p:1")]), Ok(None), "{host}");
        }
    }

    #[test]
    fn a_proxy_that_cannot_be_used_is_named_without_its_password() {
        for value in ["gopher://u:s3cret@p:1", "http://u:s3cret@", "https://u:s3cret@p"] {
            let error = via("http://h/", &[("http_proxy", value)]).unwrap_err().to_string();
            assert!(error.starts_with("http_proxy is `") && !error.contains("s3cret"), "{error}");
        }
    }
}
