//! How far what a server says is from what is computed here, and how far that may be: the noise of valid computations.

use serde::Serialize;

use super::facts::{Fact, Said, Sequence};

/// A log-probability below this rules a token out.
pub const RULED_OUT: f64 = -1000.0;
/// Standard errors by which the mean difference may be off 0: neighbouring places are not independent, so that a few are
/// nothing.
const BIASED: f64 = 6.0;
/// A difference counts this much at most, so that one token cannot outweigh the rest.
const MOST: f64 = 5.0;
/// Places that are judged together.
const SEGMENT: usize = 64;

/// How much difference is noise.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Tolerance {
    /// Times the noise that was measured here.
    pub factor: f64,
    /// Nats that are always allowed.
    pub floor: f64,
    /// Root mean square of what rounding to BF16 on the way does to the log-probabilities of these tokens.
    pub noise: f64,
}

impl Tolerance {
    /// What the root mean square over `places` places may be: more where there are few.
    #[must_use]
    pub fn all(&self, places: usize) -> f64 {
        self.factor * self.noise * (1.0 + 2.0 / (places.max(1) as f64).sqrt()) + self.floor
    }

    /// What it may be over one segment whose own noise is `noise`, and the difference at one place.
    #[must_use]
    pub fn one(&self, noise: f64) -> f64 {
        2.0 * self.factor * self.noise.max(noise) + self.floor
    }
}

/// How far two accounts of one place are apart: the root mean square over its token and the most probable ones. `None`
/// where there is nothing to compare.
#[must_use]
pub fn apart(said: &Said, fact: &Fact) -> Option<f64> {
    let pairs = said.logprob.map(|s| (s, fact.logprob)).into_iter();
    let pairs = pairs.chain(said.top.iter().map(|t| t.1).zip(fact.top.iter().copied()));
    root_mean_square(pairs.filter_map(difference))
}

/// The same of two computations.
#[must_use]
pub fn spread(one: &Fact, other: &Fact) -> Option<f64> {
    let pairs =
        std::iter::once((one.logprob, other.logprob)).chain(one.top.iter().copied().zip(other.top.iter().copied()));
    root_mean_square(pairs.filter_map(difference))
}

fn difference((a, b): (f64, f64)) -> Option<f64> {
    (a > RULED_OUT && b > RULED_OUT).then(|| (a - b).clamp(-MOST, MOST)).filter(|d| d.is_finite())
}

/// The root of the mean of squares; `None` of nothing.
pub fn root_mean_square(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (sum, n) = values.fold((0.0, 0usize), |(sum, n), v| (sum + v * v, n + 1));
    (n > 0).then(|| (sum / n as f64).sqrt())
}

/// Places, one after the other: what is said and what is so.
pub fn pairs<'a>(
    sequences: &'a [Sequence],
    facts: &'a [Vec<Fact>],
) -> impl Iterator<Item = (&'a Said, &'a Fact)> + Clone {
    sequences.iter().zip(facts).flat_map(|(s, f)| s.said.iter().zip(f))
}

/// How much places agree.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Agreement {
    pub tokens: usize,
    /// Of them, those whose log-probabilities are within the noise.
    pub within: usize,
    /// Root mean square of differences, the most probable tokens' included; nats.
    pub rms: f64,
    /// Of the tokens themselves: the mean, the mean magnitude and the largest difference, server minus here.
    pub mean: f64,
    pub mean_magnitude: f64,
    pub largest: f64,
    /// What the mean may be: valid computations of one model are as often above as below each other.
    pub mean_allowed: f64,
    /// Mean KL divergence of the distribution here from the server's, over the tokens that it names.
    pub kl: Option<f64>,
    /// Places where the server names the most probable token, and where that is the same here.
    pub greedy: usize,
    pub greedy_same: usize,
    /// Tokens that the server rules out, and those it says nothing of.
    pub ruled_out: usize,
    pub missing: usize,
}

impl Agreement {
    /// Of these places.
    pub fn of<'a>(places: impl Iterator<Item = (&'a Said, &'a Fact)>, tolerance: &Tolerance) -> Self {
        let mut out = Self::default();
        let (mut squares, mut kl, mut own) = (Vec::new(), Vec::new(), Vec::new());
        let (mut compared, mut counted) = (0usize, 0usize);
        for (said, fact) in places {
            out.tokens += 1;
            match said.logprob {
                None => out.missing += 1,
                Some(l) if l <= RULED_OUT => out.ruled_out += 1,
                Some(logprob) => {
                    let d = logprob - fact.logprob;
                    if d.is_finite() {
                        own.push(d.clamp(-MOST, MOST));
                        out.mean += d.clamp(-MOST, MOST);
                        out.mean_magnitude += d.abs();
                        out.largest = if d.abs() > out.largest.abs() { d } else { out.largest };
                        counted += 1;
                    }
                }
            }
            if let Some(apart) = apart(said, fact) {
                squares.push(apart);
                compared += 1;
                out.within += usize::from(apart <= tolerance.one(0.0));
            }
            kl.extend(divergence(said, fact));
            if let Some(best) = said.top.iter().max_by(|a, b| a.1.total_cmp(&b.1)) {
                out.greedy += 1;
                out.greedy_same += usize::from(best.0 == fact.best);
            }
        }
        out.tokens = out.tokens.max(compared);
        out.mean /= counted.max(1) as f64;
        out.mean_magnitude /= counted.max(1) as f64;
        let error = root_mean_square(own.into_iter()).unwrap_or(0.0) / (counted.max(1) as f64).sqrt();
        out.mean_allowed = BIASED * error + tolerance.floor;
        out.rms = root_mean_square(squares.into_iter()).unwrap_or(0.0);
        out.kl = (!kl.is_empty()).then(|| kl.iter().sum::<f64>() / kl.len() as f64);
        out
    }
}

/// KL divergence over the tokens that the server names, all others taken as one.
fn divergence(said: &Said, fact: &Fact) -> Option<f64> {
    if said.top.is_empty() {
        return None;
    }
    let term = |s: f64, h: f64| if s > 0.0 { s * (s / h.max(f64::MIN_POSITIVE)).ln() } else { 0.0 };
    let (mut sum, mut server, mut here) = (0.0, 0.0, 0.0);
    for ((_, s), h) in said.top.iter().zip(&fact.top) {
        let (s, h) = (s.exp(), h.exp());
        sum += term(s, h);
        (server, here) = (server + s, here + h);
    }
    Some((sum + term((1.0 - server).max(0.0), (1.0 - here).max(1e-12))).max(0.0))
}

/// A run of one sequence's places that are judged together.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Segment {
    pub text: String,
    /// Positions of its tokens.
    pub from: usize,
    pub to: usize,
    /// Whether the server generated them.
    pub generated: bool,
    /// Root mean square of differences, and of this checkpoint's own noise.
    pub rms: f64,
    pub noise: f64,
    pub within: bool,
}

/// All segments. `rounded`: the facts of the same tokens, computed with rounding.
#[must_use]
pub fn segments(
    sequences: &[Sequence],
    facts: &[Vec<Fact>],
    rounded: &[Vec<Fact>],
    tolerance: &Tolerance,
) -> Vec<Segment> {
    let mut out = Vec::new();
    for ((sequence, facts), rounded) in sequences.iter().zip(facts).zip(rounded) {
        let split = sequence.generated - sequence.first.min(sequence.generated);
        for (range, generated) in [(0..split, false), (split..sequence.said.len(), true)] {
            let pieces = range.len().div_ceil(SEGMENT).max(1);
            let size = range.len().div_ceil(pieces);
            for from in range.clone().step_by(size.max(1)) {
                let part = from..range.end.min(from + size);
                let said = sequence.said[part.clone()].iter().zip(&facts[part.clone()]);
                let own = facts[part.clone()].iter().zip(&rounded[part.clone()]);
                let Some(rms) = root_mean_square(said.filter_map(|(s, f)| apart(s, f))) else { continue };
                let noise = root_mean_square(own.filter_map(|(a, b)| spread(a, b))).unwrap_or(0.0);
                out.push(Segment {
                    text: sequence.name.clone(),
                    from: sequence.first + part.start,
                    to: sequence.first + part.end,
                    generated,
                    rms,
                    noise,
                    within: rms <= tolerance.one(noise),
                });
            }
        }
    }
    out
}

/// Tokens of prompts, or those that the server generated: other kernels compute them.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Phase {
    pub tokens: usize,
    /// Root mean square of differences, and of this checkpoint's own noise.
    pub rms: f64,
    pub noise: f64,
    pub within: bool,
}

/// One of the two; nothing where it has no tokens.
#[must_use]
pub fn phase(
    sequences: &[Sequence],
    facts: &[Vec<Fact>],
    rounded: &[Vec<Fact>],
    generated: bool,
    tolerance: &Tolerance,
) -> Option<Phase> {
    let places = sequences.iter().zip(facts).zip(rounded).flat_map(|((s, facts), rounded)| {
        let here = move |i: &usize| (s.first + i >= s.generated) == generated;
        (0..s.said.len()).filter(here).map(move |i| (&s.said[i], &facts[i], &rounded[i]))
    });
    let apart: Vec<f64> = places.clone().filter_map(|(s, f, _)| apart(s, f)).collect();
    let tokens = apart.len();
    let rms = root_mean_square(apart.into_iter())?;
    let noise = root_mean_square(places.filter_map(|(_, f, r)| spread(f, r))).unwrap_or(0.0);
    // By their own noise: what is generated is more certain than what people write.
    Some(Phase { tokens, rms, noise, within: rms <= Tolerance { noise, ..*tolerance }.all(tokens) })
}

/// Root mean square of differences over ranges of positions: what grows with the position is of the cache.
#[must_use]
pub fn by_position(sequences: &[Sequence], facts: &[Vec<Fact>]) -> Vec<(usize, usize, f64)> {
    const BOUNDS: [usize; 8] = [0, 16, 64, 128, 256, 512, 1024, usize::MAX];
    let bounds = BOUNDS.windows(2).filter_map(|b| {
        let places = sequences.iter().zip(facts).flat_map(|(s, facts)| {
            let at = |i: &usize| (b[0]..b[1]).contains(&(s.first + i));
            (0..s.said.len()).filter(at).filter_map(|i| apart(&s.said[i], &facts[i]))
        });
        let longest = sequences.iter().map(|s| s.tokens.len()).max().unwrap_or(0);
        Some((b[0], b[1].min(longest), root_mean_square(places)?))
    });
    bounds.collect()
}

/// How one account of the same places compares with another: root mean squares, and where the other is nearer.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rivals {
    pub before: f64,
    pub after: f64,
    nearer: usize,
    pub places: usize,
}

impl Rivals {
    /// `one` and `other` give the distance of each place from what is said.
    pub fn of(places: impl Iterator<Item = (Option<f64>, Option<f64>)>) -> Self {
        let both: Vec<(f64, f64)> = places.filter_map(|(a, b)| Some((a?, b?))).collect();
        let side = |of: fn(&(f64, f64)) -> f64| root_mean_square(both.iter().map(of)).unwrap_or(0.0);
        Self {
            before: side(|p| p.0),
            after: side(|p| p.1),
            nearer: both.iter().filter(|(a, b)| b < a).count(),
            places: both.len(),
        }
    }

    /// Whether the other is nearer beyond chance (a sign test at four standard deviations), and by a third at least.
    #[must_use]
    pub fn is_nearer(&self) -> bool {
        let n = self.places as f64;
        self.places >= 8 && self.nearer as f64 - n / 2.0 > 2.0 * n.sqrt() && self.after <= self.before / 1.5
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(logprob: f64, top: &[(u32, f64)]) -> Said {
        Said { logprob: Some(logprob), top: top.to_vec() }
    }

    fn fact(logprob: f64, top: &[f64]) -> Fact {
        Fact { logprob, best: 1, top: top.to_vec(), late: None }
    }

    #[test]
    fn distances_are_over_all_tokens_of_a_place_and_bounded() {
        assert_eq!(apart(&said(-1.0, &[]), &fact(-1.0, &[])), Some(0.0));
        assert_eq!(apart(&said(-1.0, &[(3, -2.0)]), &fact(-2.0, &[-3.0])), Some(1.0));
        assert_eq!(apart(&said(-90.0, &[]), &fact(-1.0, &[])), Some(MOST));
        assert_eq!(apart(&said(-9999.0, &[]), &fact(-1.0, &[])), None);
        assert_eq!(apart(&Said::default(), &fact(-1.0, &[])), None);
        assert_eq!(apart(&said(f64::NAN, &[]), &fact(-1.0, &[])), None);
    }

    #[test]
    fn agreement_counts_what_is_ruled_out_missing_and_greedy() {
        let tolerance = Tolerance { factor: 3.0, floor: 0.01, noise: 0.01 };
        let places = [
            (said(-1.0, &[(1, -0.5), (2, -1.0)]), fact(-1.0, &[-0.5, -1.0])),
            (said(-1.5, &[(2, -0.5)]), fact(-1.0, &[-0.5])),
            (said(-9999.0, &[]), fact(-1.0, &[])),
            (Said::default(), fact(-1.0, &[])),
        ];
        let a = Agreement::of(places.iter().map(|(s, f)| (s, f)), &tolerance);
        assert_eq!((a.tokens, a.within, a.ruled_out, a.missing), (4, 1, 1, 1));
        assert_eq!((a.greedy, a.greedy_same, a.largest), (2, 1, -0.5));
        assert!(a.kl.unwrap() < 1e-9, "what is the same on both sides diverges by nothing");
        let other = divergence(&said(-0.1, &[(1, -0.1)]), &fact(-3.0, &[-3.0])).unwrap();
        assert!(other > 1.0);
    }

    #[test]
    fn a_mean_off_zero_shows_where_noise_of_the_same_size_does_not() {
        let tolerance = Tolerance { factor: 1.5, floor: 0.005, noise: 0.5 };
        let agreement = |bias: f64| {
            let places: Vec<_> = (0..400)
                .map(|i| (said(-2.0 + bias + if i % 2 == 0 { 0.5 } else { -0.5 }, &[]), fact(-2.0, &[])))
                .collect();
            Agreement::of(places.iter().map(|(s, f)| (s, f)), &tolerance)
        };
        let (fair, biased) = (agreement(0.0), agreement(0.3));
        assert!(fair.mean.abs() <= fair.mean_allowed && biased.mean > biased.mean_allowed);
        assert!(
            fair.rms <= tolerance.all(400) && biased.rms <= tolerance.all(400) && tolerance.all(4) > tolerance.all(400)
        );
    }

    #[test]
    fn a_few_places_nearer_by_chance_are_no_rival() {
        let rivals =
            |n: usize, better: usize| Rivals::of((0..n).map(|i| (Some(1.0), Some(if i < better { 0.1 } else { 1.1 }))));
        assert!(rivals(100, 95).is_nearer());
        assert!(!rivals(100, 60).is_nearer() && !rivals(6, 6).is_nearer());
    }
}
