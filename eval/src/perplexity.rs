//! Perplexity of a text of any length: the windows that its tokens are predicted in, and the words that count.
//!
//! Both are lm-evaluation-harness's (`loglikelihood_rolling`, `word_perplexity`): disjoint windows, each token predicted
//! exactly once, the first after the prefix token, later windows after one token of the window before.

/// Windows of at most `length` predicted tokens over `tokens`: (context, continuation) of each. The last window, where
/// it is short, gets as much context as fits.
#[must_use]
pub fn windows(tokens: &[u32], prefix: u32, length: usize) -> Vec<(Vec<u32>, Vec<u32>)> {
    let length = length.max(1);
    let mut out = Vec::new();
    let mut start = 0;
    while start < tokens.len() {
        let end = tokens.len().min(start + length);
        let context = match start {
            0 => vec![prefix],
            _ => tokens[(end - 1).saturating_sub(length)..start].to_vec(),
        };
        out.push((context, tokens[start..end].to_vec()));
        start = end;
    }
    out
}

/// Pieces between runs of white space, as `len(re.split(r"\s+", text))` counts them: white space at either end makes an
/// empty piece, which counts.
#[must_use]
pub fn words(text: &str) -> usize {
    let mut previous = false;
    1 + text
        .chars()
        .filter(|c| {
            let starts = c.is_whitespace() && !previous;
            previous = c.is_whitespace();
            starts
        })
        .count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_those_of_lm_evaluation_harness() {
        // get_rolling_token_windows(range(1, 11), 0, 4, 1), each through make_disjoint_window.
        let tokens: Vec<u32> = (1..=10).collect();
        let expected = [(vec![0], vec![1, 2, 3, 4]), (vec![4], vec![5, 6, 7, 8]), (vec![6, 7, 8], vec![9, 10])];
        assert_eq!(windows(&tokens, 0, 4), expected);
        assert!(windows(&[], 0, 4).is_empty());
    }

    #[test]
    fn white_space_at_the_ends_counts_as_in_python() {
        assert_eq!(words(" a b\n"), 4);
        assert_eq!(words("a"), 1);
    }
}
