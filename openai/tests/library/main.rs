//! The client against servers that misbehave, through proxies and TLS.

mod client;
mod http;
mod support;
