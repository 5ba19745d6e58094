//! Numbers for people: errors with two significant digits, values to match, and a dash where there is no number.

use crate::comparison::{Estimate, Interval};

/// Stands where a number is missing or not finite.
pub(super) const MISSING: &str = "–";

/// Digits behind the point that errors are cut to, at most.
const MAX_DECIMALS: usize = 7;

/// `0.563 ± 0.014`.
pub(super) fn value_and_error(value: f64, error: Option<f64>) -> String {
    match error.filter(|e| e.is_finite() && *e > 0.0) {
        _ if !value.is_finite() => MISSING.to_owned(),
        Some(error) => {
            let decimals = decimals_of_error(error);
            format!("{} ± {}", fixed(value, decimals), fixed(error, decimals))
        }
        None => plain(value),
    }
}

pub(super) fn estimate(e: Estimate) -> String {
    value_and_error(e.value, Some(e.standard_error))
}

/// `1.23 ± 0.12 %` of a share.
pub(super) fn percent_estimate(e: Estimate) -> String {
    let text = value_and_error(100.0 * e.value, Some(100.0 * e.standard_error));
    if text == MISSING { text } else { format!("{text} %") }
}

/// `-0.023 [-0.041, -0.005]`, with a sign.
pub(super) fn difference(i: Interval) -> String {
    interval_with(i, 3, "", signed)
}

/// `98.1 % [96.9, 99.2]` of a share.
pub(super) fn percent_interval(i: Interval) -> String {
    interval_with(in_percent(i), 1, " %", fixed)
}

/// A share as its number of percent.
pub(super) fn in_percent(share: Interval) -> Interval {
    Interval { estimate: 100.0 * share.estimate, low: 100.0 * share.low, high: 100.0 * share.high }
}

/// `98.1 %` of a share, with the digits that its interval warrants.
pub(super) fn percent_estimate_of(i: Interval) -> String {
    percent_with(i.estimate, decimals_of_interval(100.0 * i.low, 100.0 * i.high, 1))
}

/// A share in percent with so many digits behind the point.
pub(super) fn percent_with(share: f64, decimals: usize) -> String {
    if share.is_finite() { format!("{} %", fixed(100.0 * share, decimals)) } else { MISSING.to_owned() }
}

/// `64.3 %`, `1.2 %`, `0.012 %`: a share with two significant digits, three from 10 % on.
pub(super) fn percent(share: f64) -> String {
    let value = 100.0 * share;
    let decimals = match value.abs() {
        0.0 | 100.0 => 0,
        10.0.. => 1,
        _ => decimals_of_error(value).min(4),
    };
    percent_with(share, decimals)
}

/// Three significant digits, no exponent between 0.0001 and a million; thousands separated.
pub(super) fn plain(value: f64) -> String {
    significant(value, 3)
}

/// `digits` significant digits; an exponent only for the very small.
pub(super) fn significant(value: f64, digits: usize) -> String {
    if !value.is_finite() {
        return MISSING.to_owned();
    }
    if value == 0.0 {
        return "0".to_owned();
    }
    let exponent = exponent_of(value, digits);
    if exponent < -4 {
        return format!("{value:.*e}", digits.saturating_sub(1)).replace('-', "−");
    }
    fixed(value, usize::try_from(digits as i32 - 1 - exponent).unwrap_or(0))
}

/// A p-value: two significant digits, and `< 0.0001` below that.
pub(super) fn p_value(p: f64) -> String {
    if !p.is_finite() {
        MISSING.to_owned()
    } else if p < 1e-4 {
        "< 0.0001".to_owned()
    } else if p > 0.995 {
        "1".to_owned()
    } else {
        significant(p, 2)
    }
}

/// `1,234,567`.
pub(super) fn count(n: usize) -> String {
    separate(&n.to_string())
}

/// `271 MB`, `1.53 GB`: decimal units.
pub(super) fn bytes(n: u64) -> String {
    let (unit, name) = match n {
        0..1_000 => (1.0, "B"),
        1_000..1_000_000 => (1e3, "kB"),
        1_000_000..1_000_000_000 => (1e6, "MB"),
        _ => (1e9, "GB"),
    };
    format!("{} {name}", plain(n as f64 / unit))
}

/// With exactly `decimals` digits behind the point, a true minus sign, thousands separated; never `-0`.
pub(super) fn fixed(value: f64, decimals: usize) -> String {
    if !value.is_finite() {
        return MISSING.to_owned();
    }
    let text = format!("{value:.decimals$}");
    let (sign, digits) = match text.strip_prefix('-') {
        Some(rest) if rest.bytes().all(|b| matches!(b, b'0' | b'.')) => ("", rest),
        Some(rest) => ("−", rest),
        None => ("", text.as_str()),
    };
    match digits.split_once('.') {
        Some((whole, fraction)) => format!("{sign}{}.{fraction}", separate(whole)),
        None => format!("{sign}{}", separate(digits)),
    }
}

fn signed(value: f64, decimals: usize) -> String {
    let text = fixed(value, decimals);
    let zero = text.bytes().all(|b| matches!(b, b'0' | b'.'));
    if value > 0.0 && !zero { format!("+{text}") } else { text }
}

fn interval_with(i: Interval, default: usize, unit: &str, write: fn(f64, usize) -> String) -> String {
    if !i.estimate.is_finite() {
        return MISSING.to_owned();
    }
    let decimals = decimals_of_interval(i.low, i.high, default);
    format!("{}{unit} [{}, {}]", write(i.estimate, decimals), write(i.low, decimals), write(i.high, decimals))
}

/// Two significant digits of half the interval's width.
fn decimals_of_interval(low: f64, high: f64, default: usize) -> usize {
    let half = (high - low) / 2.0;
    if half.is_finite() && half > 0.0 { decimals_of_error(half) } else { default }
}

fn decimals_of_error(error: f64) -> usize {
    usize::try_from(1 - exponent_of(error, 2)).unwrap_or(0).min(MAX_DECIMALS)
}

/// Power of ten of the first digit after rounding to `digits` significant ones.
fn exponent_of(value: f64, digits: usize) -> i32 {
    let text = format!("{:.*e}", digits.saturating_sub(1), value.abs());
    text.split_once('e').and_then(|(_, e)| e.parse().ok()).unwrap_or_default()
}

fn separate(digits: &str) -> String {
    let groups = digits.as_bytes().rchunks(3).rev().map(|group| std::str::from_utf8(group).unwrap_or_default());
    groups.collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_have_two_significant_digits_and_values_match_them() {
        assert_eq!(value_and_error(0.56321, Some(0.01443)), "0.563 ± 0.014");
        assert_eq!(value_and_error(35.1234, Some(0.996)), "35.1 ± 1.0");
        assert_eq!(value_and_error(35.1234, Some(0.0996)), "35.12 ± 0.10");
        assert_eq!(value_and_error(12345.6, Some(123.0)), "12,346 ± 123");
        assert_eq!(value_and_error(0.5, Some(0.0)), "0.500");
        assert_eq!(value_and_error(0.5, None), "0.500");
    }

    #[test]
    fn intervals_show_the_digits_that_their_width_warrants() {
        let i = |estimate, low, high| Interval { estimate, low, high };
        assert_eq!(percent_interval(i(0.981, 0.969, 0.992)), "98.1 % [96.9, 99.2]");
        assert_eq!(percent_interval(i(1.0, 1.0, 1.0)), "100.0 % [100.0, 100.0]");
        assert_eq!(percent_interval(i(-0.3, -2.0, 1.5)), "−30 % [−200, 150]");
        assert_eq!(difference(i(-0.0231, -0.0412, -0.0049)), "−0.023 [−0.041, −0.005]");
        assert_eq!(difference(i(0.01, -0.0001, 0.02)), "+0.010 [0.000, +0.020]");
    }

    #[test]
    fn what_is_no_number_is_a_dash() {
        assert_eq!(value_and_error(f64::NAN, Some(0.1)), MISSING);
        assert_eq!(percent_interval(Interval { estimate: f64::INFINITY, low: 0.0, high: f64::INFINITY }), MISSING);
        assert_eq!(value_and_error(0.5, Some(f64::NAN)), "0.500");
        assert_eq!(percent(f64::NAN), MISSING);
        assert_eq!(p_value(f64::NAN), MISSING);
    }

    #[test]
    fn small_and_large_numbers_stay_readable() {
        assert_eq!(plain(0.000_012_34), "1.23e−5");
        assert_eq!(plain(0.000_123_4), "0.000123");
        assert_eq!(plain(1_234_567.0), "1,234,567");
        assert_eq!(plain(999.96), "1,000");
        assert_eq!(count(1_234_567), "1,234,567");
        assert_eq!(count(999), "999");
        assert_eq!(bytes(1_530_000_000), "1.53 GB");
        assert_eq!(bytes(271_000_000), "271 MB");
        assert_eq!(p_value(0.000_02), "< 0.0001");
        assert_eq!(p_value(0.0432), "0.043");
        assert_eq!(p_value(1.0), "1");
        assert_eq!(percent(0.643), "64.3 %");
        assert_eq!(percent(0.0123), "1.2 %");
        assert_eq!(percent(0.0), "0 %");
        assert_eq!(percent(1.0), "100 %");
    }
}
