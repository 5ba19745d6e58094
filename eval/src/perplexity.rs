//! Perplexity of a text of any length: rolling log-likelihood, per word, per byte, in bits.
//!
//! Windows and metric names are lm-evaluation-harness's (`loglikelihood_rolling`, `word_perplexity`,
//! `byte_perplexity`, `bits_per_byte`): disjoint windows, each token predicted exactly once, the first after the prefix
//! token, later windows after one token of the window before.

/// Log-likelihood of a text and what it is divided by.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rolling {
    /// Sum over tokens, natural log.
    pub log_likelihood: f64,
    pub tokens: usize,
    /// Pieces between runs of white space, as `re.split(r"\s+", text)` counts them.
    pub words: usize,
    pub bytes: usize,
}

impl Rolling {
    /// exp(-log-likelihood per token).
    #[must_use]
    pub fn token_perplexity(&self) -> f64 {
        (-self.log_likelihood / self.tokens as f64).exp()
    }

    /// exp(-log-likelihood per word).
    #[must_use]
    pub fn word_perplexity(&self) -> f64 {
        (-self.log_likelihood / self.words as f64).exp()
    }

    /// exp(-log-likelihood per byte of UTF-8).
    #[must_use]
    pub fn byte_perplexity(&self) -> f64 {
        (-self.log_likelihood / self.bytes as f64).exp()
    }

    /// -log₂-likelihood per byte of UTF-8.
    #[must_use]
    pub fn bits_per_byte(&self) -> f64 {
        -self.log_likelihood / self.bytes as f64 / std::f64::consts::LN_2
    }
}

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
    fn a_uniform_model_has_its_number_of_choices_as_perplexity() {
        let r = Rolling { log_likelihood: -14.0 * 3f64.ln(), tokens: 14, words: 3, bytes: 14 };
        assert!((r.token_perplexity() - 3.0).abs() < 1e-12);
        assert!((r.bits_per_byte() - 3f64.log2()).abs() < 1e-12);
        assert!((r.word_perplexity() - 3f64.powf(14.0 / 3.0)).abs() < 1e-9);
    }

    #[test]
    fn white_space_at_the_ends_counts_as_in_python() {
        assert_eq!(words(" a b\n"), 4);
        assert_eq!(words("a"), 1);
    }
}
