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

use ureq::config::Config;
use ureq::http::Uri;
use ureq::unversioned::resolver::{DefaultResolver, ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{Buffers, ConnectionDetails, Connector, NextTimeout, TcpConnector, Transport};
use ureq::{Agent, Proxy, ProxyProtocol};

use super::Unusable;
use super::address::{Address, mask};

/// A proxy and the variable that names it.
#[derive(Clone)]
pub struct Via {
    pub variable: &'static str,
    pub proxy: Proxy,
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
    pub fn of(address: &Address, variable: &dyn Fn(&str) -> Option<String>) -> Result<Option<Self>, Unusable> {
        let set = |name: &str| variable(name).map(|v| v.trim().to_owned()).filter(|v| !v.is_empty());
        let listed = set("no_proxy").or_else(|| set("NO_PROXY"));
        if is_this_machine(address.host()) || listed.is_some_and(|l| is_listed(&l, address.host(), address.port())) {
            return Ok(None);
        }
        let names: &[&'static str] = if address.is_https() {
            &["https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"]
        } else {
            // HTTP_PROXY is not read: a web server that runs a program sets it from a header `Proxy:` of the request.
            &["http_proxy", "all_proxy", "ALL_PROXY"]
        };
        let Some((variable, value)) = names.iter().find_map(|name| Some((*name, set(name)?))) else { return Ok(None) };
        let unusable = |problem| Unusable::Proxy { variable, shown: mask(&value), problem };
        let none = ", which is no proxy: expected http://host:port, https://… or socks5://…";
        let proxy = Proxy::new(&value).map_err(|_| unusable(none))?;
        if proxy.protocol() == ProxyProtocol::Https && !address.is_https() {
            return Err(unusable(
                ": plain http through a proxy that is itself asked by TLS is not supported; use an http:// or socks5:// \
                 proxy, or list the server in no_proxy",
            ));
        }
        Ok(Some(Self { variable, proxy }))
    }

    /// Asks the proxy for whole URLs below the origin of `address`; ureq by itself knows only `CONNECT`.
    pub(super) fn agent_by_whole_urls(&self, config: Config, address: &Address) -> Agent {
        let connector = TcpConnector::default().chain(WholeUrl(address.origin()));
        Agent::with_parts(config, connector, ProxyResolver(self.proxy.uri().clone()))
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
    let host = host.trim_end_matches('.');
    let list = list.to_lowercase();
    list.split([',', ' ', '\t']).filter(|e| !e.is_empty()).any(|entry| {
        // An IPv6 address without brackets has more than one colon.
        let parts = entry.rsplit_once(':').filter(|(name, _)| name.ends_with(']') || !name.contains(':'));
        let parts = parts.and_then(|(name, port)| Some((name, port.parse::<u16>().ok()?)));
        let (name, only) = parts.map_or((entry, None), |(name, port)| (name, Some(port)));
        only.is_none_or(|only| only == port) && matches(name, host)
    })
}

fn matches(entry: &str, host: &str) -> bool {
    if entry == "*" {
        return true;
    }
    if let Some(ip) = address_of(host) {
        let network =
            entry.split_once('/').and_then(|(network, bits)| Some((address_of(network)?, bits.parse().ok()?)));
        return address_of(entry) == Some(ip) || network.is_some_and(|(network, bits)| is_in(ip, network, bits));
    }
    let name = entry.trim_start_matches('*').trim_start_matches('.').trim_end_matches('.');
    !name.is_empty() && host.strip_suffix(name).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

fn is_in(ip: IpAddr, network: IpAddr, prefix: u32) -> bool {
    let bits = |ip| match ip {
        IpAddr::V4(ip) => (u128::from(u32::from(ip)), 32),
        IpAddr::V6(ip) => (u128::from(ip), 128),
    };
    let ((ip, width), (network, other)) = (bits(ip), bits(network));
    width == other && prefix <= width && (ip ^ network).checked_shr(width - prefix).unwrap_or(0) == 0
}

/// Finds the proxy's address instead of the server's.
#[derive(Debug)]
struct ProxyResolver(Uri);

impl Resolver for ProxyResolver {
    fn resolve(&self, _: &Uri, config: &Config, timeout: NextTimeout) -> Result<ResolvedSocketAddrs, ureq::Error> {
        DefaultResolver::default().resolve(&self.0, config, timeout)
    }
}

/// Turns the first line of each request into one for a proxy: `POST http://server:port/path HTTP/1.1`.
#[derive(Debug)]
struct WholeUrl(String);

impl<In: Transport> Connector<In> for WholeUrl {
    type Out = WholeUrlTransport<In>;

    fn connect(&self, _: &ConnectionDetails, chained: Option<In>) -> Result<Option<Self::Out>, ureq::Error> {
        Ok(chained.map(|inner| WholeUrlTransport { inner, origin: self.0.clone(), at_start: true }))
    }
}

struct WholeUrlTransport<In> {
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

    fn via(url: &str, variables: &[(&str, &str)]) -> Result<Option<String>, Unusable> {
        let address = Address::parse(url).unwrap();
        let find = |name: &str| variables.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned());
        Ok(Via::of(&address, &find)?.map(|v| format!("{}:{} {}", v.proxy.host(), v.proxy.port(), v.variable)))
    }

    #[test]
    fn variables_are_read_as_curl_reads_them() {
        let p = "http://p:1";
        let both = [("HTTPS_PROXY", p), ("https_proxy", "q:2"), ("ALL_PROXY", "r:3")];
        type Case<'a> = (&'a str, &'a [(&'a str, &'a str)], Option<&'a str>);
        let cases: [Case; 9] = [
            ("http://h/", &[("http_proxy", p)], Some("p:1 http_proxy")),
            ("http://h/", &[("HTTP_PROXY", p)], None),
            ("http://h/", &[("https_proxy", p), ("HTTPS_PROXY", p)], None),
            ("https://h/", &[("http_proxy", p)], None),
            ("https://h/", &[("HTTPS_PROXY", p)], Some("p:1 HTTPS_PROXY")),
            ("https://h/", &both, Some("q:2 https_proxy")),
            ("http://h/", &both, Some("r:3 ALL_PROXY")),
            ("http://h/", &[("http_proxy", ""), ("all_proxy", p)], Some("p:1 all_proxy")),
            ("http://h/", &[("all_proxy", "socks5://s:9")], Some("s:9 all_proxy")),
        ];
        for (url, variables, expected) in cases {
            assert_eq!(via(url, variables), Ok(expected.map(str::to_owned)), "{url} {variables:?}");
        }
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
