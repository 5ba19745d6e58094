//! Whether a server is off to one side. Valid computations of one checkpoint differ by noise, to both sides alike, so that it goes
//! with the number of tokens; another checkpoint's difference, or a fault's, does not.

use serde::Serialize;

use super::agreement::RULED_OUT;
use super::facts::{Fact, Sequence};

/// Standard errors that the mean may be off.
const ERRORS: f64 = 4.0;
/// Tokens whose differences are one sample: those of a text are not independent of each other.
const SAMPLE: usize = 32;
/// Samples without which nothing is said.
const SAMPLES: usize = 8;
/// A difference counts this much at most.
const MOST: f64 = 5.0;

/// The mean difference of log-probabilities of given tokens.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Bias {
    /// Server minus here, and its standard error; nats a token.
    pub mean: f64,
    pub error: f64,
    /// What rounding to BF16 makes of it here.
    pub own: f64,
    pub allowed: f64,
    pub within: bool,
}

impl Bias {
    /// Of what a server says; `rounded`: the facts of the same tokens, computed with rounding. `None` where there is too little
    /// to tell.
    #[must_use]
    pub fn of(sequences: &[Sequence], facts: &[Vec<Fact>], rounded: &[Vec<Fact>], floor: f64) -> Option<Self> {
        let (mut samples, mut own) = (Vec::new(), Vec::new());
        for ((sequence, facts), rounded) in sequences.iter().zip(facts).zip(rounded) {
            let said: Vec<Option<f64>> = sequence.said.iter().map(|s| s.logprob.filter(|l| *l > RULED_OUT)).collect();
            let places: Vec<_> = said.iter().zip(facts).zip(rounded).collect();
            for places in places.chunks(SAMPLE).filter(|c| 2 * c.len() >= SAMPLE) {
                let of = |d: f64| d.clamp(-MOST, MOST);
                let theirs = places.iter().filter_map(|((said, fact), _)| Some(of((**said)? - fact.logprob)));
                samples.extend(mean(theirs));
                own.extend(mean(places.iter().map(|((_, fact), rounded)| of(rounded.logprob - fact.logprob))));
            }
        }
        let count = samples.len();
        if count < SAMPLES {
            return None;
        }
        let (all, own) = (mean(samples.iter().copied())?, mean(own.into_iter())?);
        let variance = samples.iter().map(|s| (s - all) * (s - all)).sum::<f64>() / (count - 1) as f64;
        let error = (variance / count as f64).sqrt();
        let allowed = ERRORS * error + 2.0 * own.abs() + floor;
        Some(Self { mean: all, error, own, allowed, within: all.abs() <= allowed })
    }
}

fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (sum, count) = values.filter(|v| v.is_finite()).fold((0.0, 0usize), |(sum, n), v| (sum + v, n + 1));
    (count > 0).then(|| sum / count as f64)
}

#[cfg(test)]
mod tests {
    use super::super::facts::Said;
    use super::*;
    use crate::random::SplitMix64;

    /// Differences of `size` to both sides, and `shift` to one.
    fn bias(tokens: usize, size: f64, shift: f64) -> Option<Bias> {
        let mut random = SplitMix64(7);
        let mut noise = || size * ((random.draw() >> 11) as f64 / (1u64 << 52) as f64 - 1.0);
        let (mut said, mut here, mut rounded) = (Vec::new(), Vec::new(), Vec::new());
        for i in 0..tokens {
            let logprob = -1.0 - (i % 7) as f64;
            said.push(Said { logprob: Some(logprob + noise() + shift), top: Vec::new() });
            here.push(Fact { logprob, ..Fact::default() });
            rounded.push(Fact { logprob: logprob + noise(), ..Fact::default() });
        }
        let sequence =
            Sequence { name: "t".into(), tokens: vec![0; tokens + 1], first: 1, generated: tokens + 1, said };
        Bias::of(&[sequence], &[here], &[rounded], 0.005)
    }

    #[test]
    fn noise_of_any_size_is_no_bias_and_a_shift_is_one() {
        for size in [0.0, 0.01, 0.5, 1.0] {
            let found = bias(1600, size, 0.0).unwrap();
            assert!(found.within, "{size}: {found:?}");
        }
        for (size, shift) in [(0.0, 0.01), (0.5, 0.13), (1.0, -0.25)] {
            let found = bias(1600, size, shift).unwrap();
            assert!(!found.within && (found.mean - shift).abs() < 4.0 * found.error + 1e-9, "{size}: {found:?}");
        }
        assert_eq!(bias(100, 0.1, 0.0), None);
    }
}
