//! Long texts in messages.

/// At most `limit` characters, and a sign that there were more.
#[must_use]
pub fn shorten(text: &str, limit: usize) -> String {
    match text.char_indices().nth(limit) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn characters_are_counted_and_never_cut() {
        assert_eq!(["", "éé", "ééé"].map(|text| shorten(text, 2)), ["", "éé", "éé…"]);
    }
}
