//! The HTTP client: proxies as curl has them, and TLS with a private authority.

use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::support::{Reply, Server};
use recoup_ground::http::address::Address;
use recoup_ground::http::{Broken, Client, Settings};
use recoup_openai::{OpenAi, Options};
use serde_json::json;

fn settings(ca_file: Option<PathBuf>) -> Settings {
    // Longer than the slowest machine takes.
    let never = Duration::from_secs(3600);
    Settings { whole: Some(never), silence: never, ca_file }
}

#[test]
fn plain_http_is_asked_of_a_proxy_by_the_whole_url() {
    let proxy = Server::start(|number, request| Reply::Json(200, json!({"number": number, "path": request.path})));
    let via = proxy.url.replace("http://", "http://me:pass@").replace("/v1", "");
    let variable = move |name: &str| (name == "http_proxy").then(|| via.clone());
    // A name that nobody can resolve: the proxy has to.
    let address = Address::parse("http://server.invalid:81/v1?a=b").unwrap();
    let client = Client::new(&address, &settings(None), &variable).unwrap();
    let long = "x".repeat(300_000);
    for (number, body) in [None, Some(long.as_str()), Some("{}")].into_iter().enumerate() {
        let mut reply = client.ask(&address.url("/x"), &[], body).unwrap();
        let bytes = reply.bytes(1000).unwrap();
        let expected = json!({"number": number, "path": "http://server.invalid:81/v1/x?a=b"});
        assert_eq!(serde_json::from_slice::<serde_json::Value>(&bytes).unwrap(), expected);
    }
    assert!(client.via().unwrap().to_string().ends_with(" of http_proxy"));
    assert!(!client.via().unwrap().to_string().contains("pass"));
    assert_eq!(proxy.seen()[0].proxy_authorization.as_deref(), Some("Basic bWU6cGFzcw=="));
}

#[test]
fn https_is_asked_of_a_proxy_by_a_tunnel_and_its_refusal_is_the_proxys() {
    let proxy = Server::start(|_, _| Reply::Json(403, json!({})));
    let via = proxy.url.replace("/v1", "");
    let variable = move |name: &str| (name == "HTTPS_PROXY").then(|| via.clone());
    let address = Address::parse("https://server.invalid/v1").unwrap();
    let client = Client::new(&address, &settings(None), &variable).unwrap();
    let broken = client.ask(&address.url(""), &[], None).err().unwrap();
    assert!(matches!(&broken, Broken::Proxy(words) if words.contains("403")), "{broken:?}");
    assert_eq!(proxy.seen()[0].path, "server.invalid:443");
}

fn certificate(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/library/support/tls").join(name)
}

/// A TLS server with a certificate of a private authority that gives every request the same answer; its port.
fn tls_server(answer: serde_json::Value) -> u16 {
    use rustls::pki_types::pem::PemObject as _;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer};
    let chain = CertificateDer::from_pem_file(certificate("server.pem")).unwrap();
    let key = PrivateKeyDer::from_pem_file(certificate("server.key")).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let config = Arc::new(config.with_no_client_auth().with_single_cert(vec![chain], key).unwrap());
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let connection = rustls::ServerConnection::new(config.clone()).unwrap();
            let mut tls = rustls::StreamOwned::new(connection, stream);
            let mut read = Vec::new();
            let mut buffer = [0; 4096];
            while let Ok(n @ 1..) = tls.read(&mut buffer) {
                read.extend_from_slice(&buffer[..n]);
                let text = String::from_utf8_lossy(&read).into_owned();
                let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
                let length = head.lines().find_map(|l| l.to_lowercase().strip_prefix("content-length: ")?.parse().ok());
                if body.len() < length.unwrap_or(0usize) {
                    continue;
                }
                let body = answer.to_string();
                let head = format!("HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {}\r\n\r\n", body.len());
                let _ = tls.write_all((head + &body).as_bytes());
                break;
            }
            tls.conn.send_close_notify();
            let _ = tls.flush();
        }
    });
    port
}

#[test]
fn a_server_with_a_private_authority_is_trusted_with_its_certificate_and_not_without() {
    let port = tls_server(json!({"data": [{"id": "m"}]}));
    for host in ["localhost", "127.0.0.1"] {
        let url = format!("HTTPS://{host}:{port}/v1");
        let options = Options { retries: 0, ca_file: Some(certificate("ca.pem")), ..Options::default() };
        assert_eq!(OpenAi::new(&url, options).unwrap().model(), "m");
    }
    let address = Address::parse(&format!("https://localhost:{port}/v1")).unwrap();
    let ask = |settings: &Settings, variable: &dyn Fn(&str) -> Option<String>| {
        Client::new(&address, settings, variable).unwrap().ask(&address.url(""), &[], None).map(|r| r.status)
    };
    let broken = ask(&settings(None), &|_| None).unwrap_err();
    assert!(matches!(broken, Broken::Certificate(_)) && broken.to_string().contains("--ca-file"), "{broken}");
    let file = certificate("ca.pem").to_string_lossy().into_owned();
    assert_eq!(ask(&settings(None), &|name| (name == "SSL_CERT_FILE").then(|| file.clone())), Ok(200));
}

#[test]
fn a_server_that_speaks_no_tls_is_named_as_such() {
    let server = Server::start(|_, _| Reply::Json(200, json!({})));
    let address = Address::parse(&server.url.replace("http://", "https://")).unwrap();
    let client = Client::new(&address, &settings(None), &|_| None).unwrap();
    let broken = client.ask(&address.url(""), &[], None).err().unwrap();
    assert!(matches!(broken, Broken::Tls(_) | Broken::Connection(_)), "{broken:?}");
}
