//! How probable a token is under a row of logits.

/// How probable a token is where it stands.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenScore {
    /// Natural log of its probability.
    pub log_prob: f64,
    /// Whether no token is more probable, and none as probable has a lower id.
    pub is_greedy: bool,
}

/// How probable a token is where it stands, and which others are.
#[derive(Clone, Debug, PartialEq)]
pub struct RankedScore {
    /// Natural log of its probability.
    pub log_prob: f64,
    /// How many tokens are at least as probable; 1 is the most probable.
    pub rank: usize,
    /// The most probable tokens and the logs of their probabilities, the most probable first, of equal ones the lower id.
    pub top: Vec<(u32, f64)>,
}

/// The score of `token` under the softmax of `logits`, in f64.
#[must_use]
pub fn score_row(logits: &[f32], token: u32) -> TokenScore {
    let target = logits[token as usize];
    let (max, total) = softmax_total(logits);
    let is_greedy = logits.iter().position(|&v| v == max) == Some(token as usize);
    TokenScore { log_prob: f64::from(target - max) - total.ln(), is_greedy }
}

/// The maximum of `logits`, and the sum of exp(logit - maximum), in f64.
#[must_use]
pub fn softmax_total(logits: &[f32]) -> (f32, f64) {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    (max, logits.iter().map(|v| f64::from(v - max).exp()).sum())
}
