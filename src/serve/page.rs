//! The page at `/`: one file, which loads nothing from elsewhere.

use std::sync::LazyLock;

use axum::http::header;
use axum::response::{IntoResponse as _, Response};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use recoup_ground::digest::sha256;

const PAGE: &str = include_str!("page.html");

/// What the page may do: run its own script and style, ask this server.
static POLICY: LazyLock<String> = LazyLock::new(|| {
    format!(
        "default-src 'none'; script-src 'sha256-{}'; style-src 'unsafe-inline'; connect-src 'self'; frame-src 'self' blob:; \
         img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        script_hash(PAGE)
    )
});

/// The page.
pub fn page() -> Response {
    let headers = [
        (header::CONTENT_TYPE, "text/html; charset=utf-8"),
        (header::CONTENT_SECURITY_POLICY, POLICY.as_str()),
        (header::CACHE_CONTROL, "no-cache"),
    ];
    (headers, PAGE).into_response()
}

/// SHA-256 of the only script's text, in base 64.
fn script_hash(page: &str) -> String {
    let script = page.split_once("<script>").and_then(|(_, rest)| rest.split_once("</script>")).map_or("", |(s, _)| s);
    let digits = sha256(script);
    let byte = |at: usize| u8::from_str_radix(&digits[at..at + 2], 16).unwrap_or_default();
    BASE64_STANDARD.encode((0..digits.len()).step_by(2).map(byte).collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_loads_nothing_and_has_one_script_and_one_style() {
        for (tag, count) in [("<script", 1), ("<script>", 1), ("<style", 1), (" onclick=", 0), (" onload=", 0)] {
            assert_eq!(PAGE.matches(tag).count(), count, "{tag}");
        }
        for outside in ["src=\"http", "href=\"http", "url(http", "@import", "import("] {
            assert!(!PAGE.contains(outside), "{outside}");
        }
        assert!(PAGE.len() < 100_000, "{} bytes", PAGE.len());
    }

    #[test]
    fn the_policy_names_the_script_by_its_hash() {
        // `printf 'a' | openssl dgst -sha256 -binary | base64`
        assert_eq!(script_hash("<script>a</script>"), "ypeBEsobvcr6wjGzmiPcTaeG7/gUfE5yuYB3ha/uSLs=");
    }
}
