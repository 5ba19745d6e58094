//! How the next token is to be chosen: the parameters of one request, and which values they may have.

/// Below this temperature a sampler is greedy. Source: vLLM, v1/sample/sampler.py, `_SAMPLING_EPS`.
pub(super) const GREEDY_BELOW: f32 = 1e-5;

/// Sampling parameters of one request, with the meaning and the names of vLLM and OpenAI. The default is to draw from
/// the model's own distribution.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// Logits are divided by it; 0 is greedy: always the most probable token.
    pub temperature: f32,
    /// Only the `top_k` most probable tokens, and any as probable as the last of them; 0 is all.
    pub top_k: usize,
    /// Only the smallest set of most probable tokens that together have this probability; in (0, 1].
    pub top_p: f32,
    /// Only tokens at least this probable, relative to the most probable one; in [0, 1].
    pub min_p: f32,
    /// Divides the positive logits and multiplies the negative logits of tokens in the prompt or the generated text;
    /// above 0, and 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted from the logits of tokens in the generated text; in [-2, 2].
    pub presence_penalty: f32,
    /// Subtracted from the logits of tokens in the generated text, once for each time they occur; in [-2, 2].
    pub frequency_penalty: f32,
    /// Added to the logits of these tokens, ascending, before penalties; each in [-100, 100].
    pub logit_bias: Vec<(u32, f32)>,
    /// The same seed gives the same tokens for the same logits, on every machine; `None` takes a random one.
    pub seed: Option<u64>,
    /// Also report the log-probability of the token, and of this many most probable tokens (0 is allowed).
    pub logprobs: Option<usize>,
}

impl Default for SamplingParams {
    fn default() -> SamplingParams {
        SamplingParams {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: None,
            logprobs: None,
        }
    }
}

/// Why parameters were refused, or no token could be chosen.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SamplingError {
    /// A parameter has a value that means nothing.
    #[error("`{name}` must be {expected}, found {found}")]
    Parameter {
        /// Its name in the API.
        name: &'static str,
        /// The values it may have.
        expected: &'static str,
        /// The value it had.
        found: f32,
    },
    /// The model computed something that is not a number, or infinitely large.
    #[error(
        "the logit of token {token} is {logit}: the model's computation broke down (a wrong scale or a damaged \
         weight; `recoup inspect` checks the checkpoint)"
    )]
    Broken {
        /// The first such token id.
        token: u32,
        /// Its logit.
        logit: f32,
    },
    /// Every token is forbidden.
    #[error("no token may follow: all {vocab_size} logits are -inf (a grammar, or the model, excludes every token)")]
    NothingAllowed {
        /// Number of logits.
        vocab_size: usize,
    },
}

impl SamplingParams {
    /// Parameters for always taking the most probable token.
    pub fn greedy() -> SamplingParams {
        SamplingParams { temperature: 0.0, ..SamplingParams::default() }
    }

    /// Checks all values. The ranges are vLLM's.
    ///
    /// # Errors
    /// [`SamplingError::Parameter`] for the first value out of its range.
    pub fn validate(&self) -> Result<(), SamplingError> {
        let check = |name, found: f32, valid: bool, expected| {
            if valid && found.is_finite() { Ok(()) } else { Err(SamplingError::Parameter { name, expected, found }) }
        };
        let penalty = -2.0..=2.0;
        check("temperature", self.temperature, self.temperature >= 0.0, "0 or more")?;
        check("top_p", self.top_p, self.top_p > 0.0 && self.top_p <= 1.0, "above 0 and at most 1")?;
        check("min_p", self.min_p, (0.0..=1.0).contains(&self.min_p), "from 0 to 1")?;
        check("repetition_penalty", self.repetition_penalty, self.repetition_penalty > 0.0, "above 0 (1 is off)")?;
        check("presence_penalty", self.presence_penalty, penalty.contains(&self.presence_penalty), "from -2 to 2")?;
        check("frequency_penalty", self.frequency_penalty, penalty.contains(&self.frequency_penalty), "from -2 to 2")?;
        for &(_, bias) in &self.logit_bias {
            check("logit_bias", bias, (-100.0..=100.0).contains(&bias), "from -100 to 100")?;
        }
        let twice = self.logit_bias.windows(2).find(|pair| pair[0].0 >= pair[1].0).map_or(0, |pair| pair[1].0);
        let ascends = self.logit_bias.is_sorted_by(|a, b| a.0 < b.0);
        check("logit_bias", twice as f32, ascends, "a list of tokens that ascend, each once")
    }

    pub(super) fn is_greedy(&self) -> bool {
        self.temperature < GREEDY_BELOW
    }

    pub(super) fn has_penalties(&self) -> bool {
        self.repetition_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_out_of_range_are_refused_by_name() {
        let d = SamplingParams::default;
        assert_eq!(d().validate(), Ok(()));
        assert_eq!(SamplingParams::greedy().validate(), Ok(()));
        assert_eq!(SamplingParams { logit_bias: vec![(0, -100.0), (9, 100.0)], ..d() }.validate(), Ok(()));
        let cases = [
            ("temperature", SamplingParams { temperature: -0.1, ..d() }),
            ("temperature", SamplingParams { temperature: f32::NAN, ..d() }),
            ("temperature", SamplingParams { temperature: f32::INFINITY, ..d() }),
            ("top_p", SamplingParams { top_p: 0.0, ..d() }),
            ("top_p", SamplingParams { top_p: 1.1, ..d() }),
            ("min_p", SamplingParams { min_p: -0.1, ..d() }),
            ("min_p", SamplingParams { min_p: f32::NAN, ..d() }),
            ("repetition_penalty", SamplingParams { repetition_penalty: 0.0, ..d() }),
            ("presence_penalty", SamplingParams { presence_penalty: 2.5, ..d() }),
            ("frequency_penalty", SamplingParams { frequency_penalty: -2.5, ..d() }),
            ("logit_bias", SamplingParams { logit_bias: vec![(1, 0.0), (2, 100.5)], ..d() }),
            ("logit_bias", SamplingParams { logit_bias: vec![(1, f32::NAN)], ..d() }),
            ("logit_bias", SamplingParams { logit_bias: vec![(2, 1.0), (1, 1.0)], ..d() }),
            ("logit_bias", SamplingParams { logit_bias: vec![(2, 1.0), (2, 1.0)], ..d() }),
        ];
        for (name, params) in cases {
            let error = params.validate().unwrap_err().to_string();
            assert!(error.contains(&format!("`{name}`")), "{error}");
        }
    }
}
