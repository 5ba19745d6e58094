//! How probable a token is under a row of logits.

/// How probable a token is where it stands.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenScore {
    /// Natural log of its probability.
    pub log_prob: f64,
    /// Whether no token is more probable, and none as probable has a lower id.
    pub is_greedy: bool,
}

/// The score of `token` under the softmax of `logits`, in f64.
#[must_use]
pub fn score_row(logits: &[f32], token: u32) -> TokenScore {
    let target = logits[token as usize];
    let max = logits.iter().fold(f32::NEG_INFINITY, |m, &v| m.max(v));
    let total: f64 = logits.iter().map(|&v| f64::from(v - max).exp()).sum();
    let is_greedy = logits.iter().position(|&v| v == max) == Some(token as usize);
    TokenScore { log_prob: f64::from(target - max) - total.ln(), is_greedy }
}
