//! Which failures are worth another try, and how long to wait before it: what a server asks for, in every form it may, or a
//! doubling wait.

use std::time::{Duration, SystemTime};

/// Tries after the first, where nothing else is said: enough to outlast a limit per minute.
pub const RETRIES: usize = 8;
/// First wait between two tries; doubles with each.
const FIRST: Duration = Duration::from_millis(500);
/// Where the doubling ends: as long as the limits per minute that servers have.
const LONGEST: Duration = Duration::from_secs(60);
/// A server that asks for more is not waited for: a quota of a day, most likely.
pub const LONGEST_ASKED: Duration = Duration::from_secs(600);

/// Whether the cause of this status may pass: Request Timeout, a lock that is held, Too Early, Too Many Requests; and the
/// server's or a gateway's own troubles (Cloudflare's 520 to 530, 529 of overload), but not what it does not implement.
#[must_use]
pub fn may_pass(status: u16) -> bool {
    matches!(status, 408 | 409 | 425 | 429 | 500 | 502..=504 | 506..=599)
}

/// The wait before the try after `tries` that failed: 0.5 s, 1 s, 2 s, … 60 s, 60 s.
#[must_use]
pub fn backoff(tries: usize) -> Duration {
    FIRST.saturating_mul(1 << tries.min(16)).min(LONGEST)
}

/// What the answer's headers ask to wait: `Retry-After` as seconds, with a fraction or not, or as a date (RFC 9110,
/// 10.2.3), and OpenAI's `retry-after-ms`. A date is taken relative to the server's own `Date`, since clocks differ.
#[must_use]
pub fn asked<'a>(header: impl Fn(&str) -> Option<&'a str>, now: SystemTime) -> Option<Duration> {
    let number = |name| header(name).and_then(|v: &str| v.trim().parse::<f64>().ok()).filter(|n| *n >= 0.0);
    let seconds = |n: f64| Duration::try_from_secs_f64(n).unwrap_or(Duration::MAX);
    if let Some(wait) = number("retry-after-ms").map(|n| seconds(n / 1000.0)).or(number("retry-after").map(seconds)) {
        return Some(wait);
    }
    let date = |name| header(name).and_then(|v: &str| httpdate::parse_http_date(v.trim()).ok());
    let until = date("retry-after")?;
    Some(until.duration_since(date("date").unwrap_or(now)).unwrap_or(Duration::ZERO))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_of_retry_after_is_understood() {
        let now = httpdate::parse_http_date("Sun, 06 Nov 1994 08:49:37 GMT").unwrap();
        let ms = [("retry-after-ms", "250"), ("retry-after", "1")];
        let dated = [("retry-after", "Sun, 06 Nov 1994 10:00:05 GMT"), ("date", "Sun, 06 Nov 1994 10:00:00 GMT")];
        type Case<'a> = (&'a [(&'a str, &'a str)], Option<f64>);
        let cases: [Case; 14] = [
            (&[("retry-after", "5")], Some(5.0)),
            (&[("retry-after", " 4.5 ")], Some(4.5)),
            (&[("retry-after", "0")], Some(0.0)),
            (&ms, Some(0.25)),
            // The three forms of a date (RFC 9110, 5.6.7).
            (&[("retry-after", "Sun, 06 Nov 1994 08:49:47 GMT")], Some(10.0)),
            (&[("retry-after", "Sunday, 06-Nov-94 08:49:47 GMT")], Some(10.0)),
            (&[("retry-after", "Sun Nov  6 08:49:47 1994")], Some(10.0)),
            (&dated, Some(5.0)),
            (&[("retry-after", "Sun, 06 Nov 1994 08:00:00 GMT")], Some(0.0)),
            (&[("retry-after", "soon")], None),
            (&[("retry-after", "-1")], None),
            (&[("retry-after", "nan")], None),
            (&[("retry-after", "")], None),
            (&[], None),
        ];
        for (headers, wait) in cases {
            let header = |name: &str| headers.iter().find(|(n, _)| *n == name).map(|(_, v)| *v);
            assert_eq!(asked(header, now).map(|d| d.as_secs_f64()), wait, "{headers:?}");
        }
    }

    #[test]
    fn the_default_tries_outlast_a_limit_per_minute() {
        assert_eq!((0..3).map(|t| backoff(t).as_secs_f64()).collect::<Vec<_>>(), [0.5, 1.0, 2.0]);
        assert_eq!(backoff(200), LONGEST);
        let all: Duration = (0..RETRIES).map(backoff).sum();
        assert!(all > Duration::from_secs(60) && all < Duration::from_secs(180), "{all:?}");
    }
}
