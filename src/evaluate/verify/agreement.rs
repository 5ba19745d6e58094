//! How far what a server says is from what is computed here, and how far valid computations are from each other.

use serde::Serialize;

use super::facts::{Fact, Sequence};
use super::statistics::{mean, root_mean_square, standard_error};

/// A log-probability below this rules a token out.
pub const RULED_OUT: f64 = -1000.0;
/// Standard errors beyond which a difference is none of chance.
const BEYOND_CHANCE: f64 = 4.0;
/// The same where many runs are looked at, of which the worst counts.
const BEYOND_CHANCE_OF_MANY: f64 = 6.0;
/// A difference counts this much at most, so that one token cannot outweigh the rest.
const MOST: f64 = 5.0;
/// What a difference has beyond the noise, over the noise, for an explanation to take it: what rounds nothing is nearer to every
/// valid computation than they are to each other, and explains nothing of one.
const BEYOND_NOISE: f64 = 0.1;
/// Places that are judged together.
const SEGMENT: usize = 64;
/// Mean squares of fewer places are this uncertain, over their number.
const FEW: f64 = 8.0;

/// What a checkpoint says of the same places, in several ways that are all valid.
pub struct Valid {
    /// Computed exactly.
    pub exact: Vec<Vec<Fact>>,
    /// Computed with results rounded to BF16, each run in its own way: as engines do.
    pub runs: Vec<Vec<Vec<Fact>>>,
}

/// How much difference is noise.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Tolerance {
    /// A server's rounding may be coarser by this than rounding to BF16 everywhere.
    pub factor: f64,
    /// Nats that are always allowed.
    pub floor: f64,
    /// Root mean square of the differences between two valid computations.
    pub noise: f64,
    /// How noise grows with what is rounded: 1 in proportion, 0 not at all. Then any rounding flips codes of quantized
    /// activations, which change all that follows.
    pub growth: f64,
}

impl Tolerance {
    /// Times the noise that a server may be off.
    #[must_use]
    pub fn times(&self) -> f64 {
        self.factor.powf(self.growth)
    }

    /// Root mean square that is allowed of `places` places of the same noise.
    #[must_use]
    pub fn all(&self, places: usize) -> f64 {
        let chance = BEYOND_CHANCE * (self.times() * self.noise).powi(2) / (places.max(1) as f64).sqrt();
        (self.square(self.times(), self.noise.powi(2)) + chance).sqrt()
    }

    /// Mean square that is allowed where that of valid computations is `noise`, beside chance.
    fn square(&self, times: f64, noise: f64) -> f64 {
        (times * noise.sqrt() + self.floor).powi(2)
    }

    /// What the difference at one place may be where that of valid computations is `noise`.
    fn one(&self, noise: f64) -> f64 {
        2.0 * self.factor * self.noise.max(noise.sqrt()) + self.floor
    }
}

/// The mean square of differences between two accounts of one place, over the tokens that are compared. `None` where there
/// is nothing to compare.
#[must_use]
pub fn square(one: &[f64], other: &[f64]) -> Option<f64> {
    mean(one.iter().zip(other).filter_map(|(a, b)| Some(difference(*a, *b)?.powi(2))))
}

fn difference(a: f64, b: f64) -> Option<f64> {
    (a > RULED_OUT && b > RULED_OUT).then(|| (a - b).clamp(-MOST, MOST)).filter(|d| d.is_finite())
}

/// One place: how far the server is off, and how far valid computations are.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Place {
    /// Mean square of the server's differences to valid computations; `None` where it says nothing.
    pub server: Option<f64>,
    /// Mean square of the differences between two of them.
    pub noise: f64,
    /// In how many of them the server is farther from the others than they are: a half by chance.
    pub farther: f64,
    /// Of the given token, or of the most probable one where the server generated: server minus valid ones.
    pub own: Option<f64>,
    /// KL divergence from the server's distribution, and between two valid ones.
    pub kl: Option<f64>,
    pub noise_kl: f64,
}

impl Place {
    /// Whether the server's difference is noise; so is nothing.
    #[must_use]
    pub fn is_within(&self, tolerance: &Tolerance) -> bool {
        self.server.is_none_or(|server| server.sqrt() <= tolerance.one(self.noise))
    }
}

/// All places, in the order of sequences. `times`: how much farther than they are from each other the server may be.
#[must_use]
pub fn places(sequences: &[Sequence], valid: &Valid, tolerance: &Tolerance) -> Vec<Vec<Place>> {
    let of = |(at, sequence): (usize, &Sequence)| {
        let place = |i: usize| {
            let runs: Vec<&Fact> = valid.runs.iter().map(|run| &run[at][i]).collect();
            place(sequence, i, &runs, tolerance)
        };
        (0..sequence.said.len()).map(place).collect()
    };
    sequences.iter().enumerate().map(of).collect()
}

fn place(sequence: &Sequence, i: usize, runs: &[&Fact], tolerance: &Tolerance) -> Place {
    let said = sequence.said_at(i);
    let server: Vec<Option<f64>> = runs.iter().map(|r| square(&said, &r.values)).collect();
    let between = |a: usize, b: usize| square(&runs[a].values, &runs[b].values).unwrap_or(0.0);
    let count = runs.len();
    let pairs = || (0..count).flat_map(|a| (0..a).map(move |b| (a, b)));
    let farther = (0..count).filter_map(|k| {
        let others = || (0..count).filter(move |j| *j != k);
        let (own, run) = (mean(others().filter_map(|j| server[j]))?, mean(others().map(|j| between(k, j)))?);
        Some(f64::from(u8::from(own > tolerance.square(tolerance.times(), run))))
    });
    let token = sequence.tokens[sequence.first + i];
    // What a server generates it chose by its own errors; so the one that is most probable here.
    let at = match sequence.is_generated(i) {
        true => sequence.compared[i].first().filter(|_| !sequence.said[i].top.is_empty()),
        false => sequence.compared[i].iter().find(|id| **id == token),
    };
    let at = at.and_then(|id| sequence.compared[i].iter().position(|c| c == id));
    let own = at.and_then(|at| mean(runs.iter().filter_map(|r| difference(said[at], r.values[at]))));
    Place {
        server: mean(server.iter().copied().flatten()),
        noise: mean(pairs().map(|(a, b)| between(a, b))).unwrap_or(0.0),
        farther: mean(farther).unwrap_or(0.0),
        own,
        kl: mean(runs.iter().filter_map(|r| divergence(&said, &r.values))),
        noise_kl: mean(pairs().filter_map(|(a, b)| divergence(&runs[a].values, &runs[b].values))).unwrap_or(0.0),
    }
}

/// KL divergence of `other` from `one` over the tokens that are compared, all others taken as one; nothing of a single token.
fn divergence(one: &[f64], other: &[f64]) -> Option<f64> {
    let term = |s: f64, h: f64| if s > 0.0 { s * (s / h.max(f64::MIN_POSITIVE)).ln() } else { 0.0 };
    let (mut sum, mut left, mut right) = (0.0, 1.0, 1.0);
    let known = one.iter().zip(other).filter(|(a, b)| !a.is_nan() && !b.is_nan());
    for (a, b) in known.clone() {
        let (a, b) = (a.exp(), b.exp());
        sum += term(a, b);
        (left, right) = (left - a, right - b);
    }
    (known.count() > 1).then(|| (sum + term(left.max(0.0), right.max(1e-12))).max(0.0))
}

/// How noise grows between rounding to `fine` and to `coarse`, of which the latter is coarser by `by`: an exponent from 0 to 1.
#[must_use]
pub fn growth(exact: &[Vec<Fact>], fine: &[Vec<Fact>], coarse: &[Vec<Fact>], by: f64) -> f64 {
    let apart = |run: &[Vec<Fact>]| {
        let places = exact.iter().flatten().zip(run.iter().flatten());
        mean(places.filter_map(|(a, b)| square(&a.values, &b.values))).unwrap_or(0.0).sqrt()
    };
    let (fine, coarse) = (apart(fine), apart(coarse));
    if fine <= 0.0 { 1.0 } else { ((coarse / fine).ln() / by.ln()).clamp(0.0, 1.0) }
}

/// Some places, judged together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Judged {
    pub tokens: usize,
    /// Root mean square of the server's differences to valid computations, of theirs to each other, and what is allowed.
    pub rms: f64,
    pub noise: f64,
    pub allowed: f64,
    /// The share of comparisons in which the server is farther from valid computations than they are, and what is allowed:
    /// a half, but for chance.
    pub farther: f64,
    pub farther_allowed: f64,
    /// Whether both are.
    pub agrees: bool,
}

impl Judged {
    /// `runs` of places that follow one another.
    #[must_use]
    pub fn of<'a>(runs: impl Iterator<Item = &'a [Place]>, tolerance: &Tolerance) -> Self {
        let runs: Vec<Vec<&Place>> = runs.map(|run| run.iter().filter(|p| p.server.is_some()).collect()).collect();
        let places = || runs.iter().flatten().copied();
        let tokens = places().count();
        let Some(square) = mean(places().filter_map(|p| p.server)) else {
            return Self { agrees: true, ..Self::default() };
        };
        let noise = mean(places().map(|p| p.noise)).unwrap_or(0.0);
        let times = tolerance.times().powi(2);
        let excess = |p: &&Place| p.server.unwrap_or(0.0) - times * p.noise;
        let chance = standard_error(runs.iter().map(|run| run.iter().map(excess)));
        let chance = (BEYOND_CHANCE * chance).max(FEW * times * noise / tokens as f64);
        let allowed = (tolerance.square(times.sqrt(), noise) + chance).sqrt();
        let farther = mean(places().map(|p| p.farther)).unwrap_or(0.0);
        let chance = standard_error(runs.iter().map(|run| run.iter().map(|p| p.farther)));
        let farther_allowed = 0.5 + BEYOND_CHANCE * chance.max(0.5 / (tokens as f64).sqrt());
        let agrees = square.sqrt() <= allowed && farther <= farther_allowed;
        Self { tokens, rms: square.sqrt(), noise: noise.sqrt(), allowed, farther, farther_allowed, agrees }
    }

    /// Root mean square of what a fault must add to be seen.
    #[must_use]
    pub fn least_seen(&self) -> f64 {
        (self.allowed.powi(2) - self.noise.powi(2)).max(0.0).sqrt()
    }
}

/// How much all places agree.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Agreement {
    /// Those that the server says something of.
    #[serde(flatten)]
    pub all: Judged,
    /// Of them, those whose log-probabilities are within the noise.
    pub within: usize,
    /// Root mean square of the server's differences to what is computed here exactly: next to nothing where its arithmetic is
    /// the same.
    pub rms_exact: f64,
    /// Of the tokens themselves: the mean, the mean magnitude and the largest difference, server minus here.
    pub mean: f64,
    pub mean_magnitude: f64,
    pub largest: f64,
    /// What the mean may be: valid computations of one model are as often above as below each other.
    pub mean_allowed: f64,
    /// Mean KL divergence from the server's distribution, over the tokens that are compared, and between valid ones.
    pub kl: Option<f64>,
    pub noise_kl: f64,
    /// Places where the server names the most probable token, and where that is the same here.
    pub greedy: usize,
    pub greedy_same: usize,
    /// Tokens that the server rules out, and those it says nothing of.
    pub ruled_out: usize,
    pub missing: usize,
}

impl Agreement {
    /// Of all `places`; `exact`: what is computed here.
    #[must_use]
    pub fn of(sequences: &[Sequence], exact: &[Vec<Fact>], places: &[Vec<Place>], tolerance: &Tolerance) -> Self {
        let flat = || places.iter().flatten();
        let own = || flat().filter_map(|p| p.own);
        let chance = standard_error(places.iter().map(|run| run.iter().filter_map(|p| p.own)));
        let by_number = root_mean_square(own()).unwrap_or(0.0) / (own().count().max(1) as f64).sqrt();
        let within = |p: &&Place| p.server.is_some() && p.is_within(tolerance);
        let to_exact = sequences.iter().zip(exact).flat_map(|(sequence, exact)| {
            exact.iter().enumerate().filter_map(|(i, fact)| square(&sequence.said_at(i), &fact.values))
        });
        let mut out = Self {
            within: flat().filter(within).count(),
            all: Judged::of(places.iter().map(|run| &run[..]), tolerance),
            rms_exact: mean(to_exact).unwrap_or(0.0).sqrt(),
            mean: mean(own()).unwrap_or(0.0),
            mean_magnitude: mean(own().map(f64::abs)).unwrap_or(0.0),
            largest: own().fold(0.0, |largest, d| if d.abs() > f64::abs(largest) { d } else { largest }),
            mean_allowed: BEYOND_CHANCE * chance.max(by_number) + tolerance.floor,
            kl: mean(flat().filter_map(|p| p.kl)),
            noise_kl: mean(flat().map(|p| p.noise_kl)).unwrap_or(0.0),
            ..Self::default()
        };
        for (said, fact) in sequences.iter().flat_map(|s| &s.said).zip(exact.iter().flatten()) {
            match said.logprob {
                None => out.missing += 1,
                Some(l) if l <= RULED_OUT => out.ruled_out += 1,
                Some(_) => {}
            }
            if let Some(best) = said.top.iter().max_by(|a, b| a.1.total_cmp(&b.1)) {
                out.greedy += 1;
                out.greedy_same += usize::from(best.0 == fact.best);
            }
        }
        out
    }

    /// Whether neither the size of the differences nor their mean is beyond the noise.
    #[must_use]
    pub fn is_within(&self) -> bool {
        self.all.agrees && self.mean.abs() <= self.mean_allowed
    }
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
    /// Root mean square of the server's differences, and of those between valid computations.
    pub rms: f64,
    pub noise: f64,
    pub within: bool,
}

/// All segments.
#[must_use]
pub fn segments(sequences: &[Sequence], places: &[Vec<Place>], tolerance: &Tolerance) -> Vec<Segment> {
    let mut out = Vec::new();
    for (sequence, places) in sequences.iter().zip(places) {
        let split = sequence.generated - sequence.first.min(sequence.generated);
        for (range, generated) in [(0..split, false), (split..sequence.said.len(), true)] {
            let pieces = range.len().div_ceil(SEGMENT).max(1);
            let size = range.len().div_ceil(pieces);
            for from in range.clone().step_by(size.max(1)) {
                let to = range.end.min(from + size);
                let told: Vec<(f64, f64)> =
                    places[from..to].iter().filter_map(|p| Some((p.server?, p.noise))).collect();
                let Some(square) = mean(told.iter().map(|p| p.0)) else { continue };
                let noise = mean(told.iter().map(|p| p.1)).unwrap_or(0.0);
                // One run may be noisier than the whole, and less noisy only as far as its own noise is all there is.
                let least = (tolerance.noise * tolerance.growth).powi(2);
                let times = (2.0 * tolerance.factor).powf(tolerance.growth);
                let apart: Vec<f64> = told.iter().map(|p| p.0 - times.powi(2) * p.1).collect();
                let chance = standard_error(apart.iter().map(|e| std::iter::once(*e)));
                let chance = (BEYOND_CHANCE_OF_MANY * chance).max(FEW * times.powi(2) * noise / told.len() as f64);
                out.push(Segment {
                    text: sequence.name.clone(),
                    from: sequence.first + from,
                    to: sequence.first + to,
                    generated,
                    rms: square.sqrt(),
                    noise: noise.sqrt(),
                    within: square <= tolerance.square(times, noise.max(least)) + chance,
                });
            }
        }
    }
    out
}

/// Tokens of prompts, or those that the server generated, which other kernels compute; nothing where there are none.
#[must_use]
pub fn phase(sequences: &[Sequence], places: &[Vec<Place>], generated: bool, tolerance: &Tolerance) -> Option<Judged> {
    let runs = sequences.iter().zip(places).map(|(s, places)| {
        let split = s.generated.saturating_sub(s.first).min(places.len());
        if generated { &places[split..] } else { &places[..split] }
    });
    // By their own noise: what is generated is more certain than what people write.
    Some(Judged::of(runs, tolerance)).filter(|judged| judged.tokens > 0)
}

/// Root mean square of differences over ranges of positions: what grows with the position is of the cache.
#[must_use]
pub fn by_position(sequences: &[Sequence], places: &[Vec<Place>]) -> Vec<(usize, usize, f64)> {
    const BOUNDS: [usize; 8] = [0, 16, 64, 128, 256, 512, 1024, usize::MAX];
    let bounds = BOUNDS.windows(2).filter_map(|b| {
        let there = sequences.iter().zip(places).flat_map(|(s, places)| {
            let at = move |(i, _): &(usize, &Place)| (b[0]..b[1]).contains(&(s.first + i));
            places.iter().enumerate().filter(at).filter_map(|(_, p)| p.server)
        });
        let longest = sequences.iter().map(|s| s.tokens.len()).max().unwrap_or(0);
        Some((b[0], b[1].min(longest), mean(there)?.sqrt()))
    });
    bounds.collect()
}

/// How an explanation compares with the checkpoint as it is, at the same places.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rivals {
    /// Root mean squares of the server's differences to the two.
    pub before: f64,
    pub after: f64,
    /// The share of places where the explanation is nearer, and what chance could make of a half.
    nearer: f64,
    chance: f64,
    pub places: usize,
}

impl Rivals {
    /// `pairs`: of each place, the mean squares of the server's differences to one valid computation of either.
    pub fn of(pairs: impl Iterator<Item = (Option<f64>, Option<f64>)>) -> Self {
        let both: Vec<(f64, f64)> = pairs.filter_map(|(a, b)| Some((a?, b?))).collect();
        let side = |of: fn(&(f64, f64)) -> f64| mean(both.iter().map(of)).unwrap_or(0.0).sqrt();
        let nearer = both.iter().map(|(a, b)| f64::from(u8::from(b < a)));
        let error = standard_error(std::iter::once(nearer.clone()));
        Self {
            before: side(|p| p.0),
            after: side(|p| p.1),
            nearer: mean(nearer).unwrap_or(0.0),
            chance: BEYOND_CHANCE * error.max(0.5 / (both.len().max(1) as f64).sqrt()),
            places: both.len(),
        }
    }

    /// Whether the explanation is nearer in more places than chance allows, and takes most of what noise leaves of the
    /// difference.
    #[must_use]
    pub fn is_nearer(&self, noise: f64) -> bool {
        let excess = |rms: f64| rms.powi(2) - noise.powi(2);
        let smaller = self.after <= self.before / 1.5
            || excess(self.before) > BEYOND_NOISE * noise.powi(2) && excess(self.after) <= excess(self.before) / 2.25;
        self.places >= 8 && self.nearer > 0.5 + self.chance && smaller
    }
}

#[cfg(test)]
mod tests {
    use super::super::facts::Said;
    use super::*;

    const SEQUENCES: usize = 8;
    const LENGTH: usize = 150;
    const TOKENS: usize = 4;

    /// Numbers about as normally distributed as twelve drawn ones make them, of standard deviation 1.
    struct Draws(u64);

    impl Draws {
        fn next(&mut self) -> f64 {
            let draw = |_| {
                self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (self.0 >> 11) as f64 / (1u64 << 53) as f64
            };
            (0..12).map(draw).sum::<f64>() - 6.0
        }
    }

    /// A computation of tokens that are `truth(i)` probable: off by `noise` at every place and token, and by `more(i)`.
    fn computed(seed: u64, noise: f64, more: impl Fn(usize) -> f64) -> Vec<Vec<Vec<f64>>> {
        let mut draws = Draws(seed);
        let place = |i: usize, draws: &mut Draws| {
            let token = |t: usize| -2.0 - 0.5 * t as f64 + noise * draws.next() + more(i);
            (0..TOKENS).map(token).collect::<Vec<f64>>()
        };
        (0..SEQUENCES).map(|_| (0..LENGTH).map(|i| place(i, &mut draws)).collect()).collect()
    }

    fn facts(of: &[Vec<Vec<f64>>]) -> Vec<Vec<Fact>> {
        let fact = |values: &Vec<f64>| Fact { logprob: values[0], values: values.clone(), ..Fact::default() };
        of.iter().map(|places| places.iter().map(fact).collect()).collect()
    }

    /// What a server says, and how it is judged beside three computations of this noise.
    fn judged(server: &[Vec<Vec<f64>>], noise: f64, growth: f64) -> (Agreement, Vec<Segment>) {
        let sequences: Vec<Sequence> = server
            .iter()
            .enumerate()
            .map(|(n, places)| Sequence {
                name: n.to_string(),
                tokens: vec![0; LENGTH + 1],
                first: 1,
                generated: LENGTH + 1,
                said: places
                    .iter()
                    .map(|v| Said {
                        logprob: Some(v[0]),
                        top: v.iter().enumerate().map(|(t, l)| (t as u32, *l)).collect(),
                        complete: true,
                    })
                    .collect(),
                compared: vec![(0..TOKENS as u32).collect(); LENGTH],
            })
            .collect();
        let runs = (1..=3).map(|seed| facts(&computed(seed, noise, |_| 0.0))).collect();
        let valid = Valid { exact: facts(&computed(0, 0.0, |_| 0.0)), runs };
        let tolerance = Tolerance { factor: 1.3, floor: 0.005, noise: noise * 2.0f64.sqrt(), growth };
        let places = places(&sequences, &valid, &tolerance);
        (Agreement::of(&sequences, &valid.exact, &places, &tolerance), segments(&sequences, &places, &tolerance))
    }

    #[test]
    fn differences_are_bounded_and_those_that_are_none_do_not_count() {
        assert_eq!(square(&[-1.0], &[-1.0]), Some(0.0));
        assert_eq!(square(&[-1.0, -2.0], &[-2.0, -3.0]), Some(1.0));
        assert_eq!(square(&[-90.0], &[-1.0]), Some(MOST * MOST));
        assert_eq!((square(&[-9999.0], &[-1.0]), square(&[f64::NAN], &[-1.0]), square(&[], &[])), (None, None, None));
        assert_eq!(square(&[f64::NAN, -1.0], &[-1.0, -1.0]), Some(0.0));
    }

    #[test]
    fn a_computation_like_the_others_is_within_and_twice_the_noise_is_not() {
        for (noise, growth) in [(0.05, 1.0), (0.8, 0.0)] {
            for seed in 10..20 {
                let (agreement, segments) = judged(&computed(seed, noise, |_| 0.0), noise, growth);
                assert!(agreement.is_within() && segments.iter().all(|s| s.within), "{agreement:?}");
            }
            let (agreement, _) = judged(&computed(10, 2.0 * noise, |_| 0.0), noise, growth);
            assert!(!agreement.is_within(), "{agreement:?}");
        }
    }

    #[test]
    fn chaos_hides_no_more_than_a_part_of_its_noise() {
        // Up and down in turn, so that no mean tells.
        let fault = |size: f64| move |i: usize| if i.is_multiple_of(2) { size } else { -size };
        let (agreement, _) = judged(&computed(10, 0.8, fault(0.5)), 0.8, 0.0);
        assert!(!agreement.all.agrees && agreement.all.least_seen() < 0.5, "{agreement:?}");
        // Where noise grows with rounding, a server's may be larger.
        let (agreement, _) = judged(&computed(10, 0.8, fault(0.5)), 0.8, 1.0);
        assert!(agreement.all.agrees && agreement.all.least_seen() > 0.5, "{agreement:?}");
    }

    #[test]
    fn a_mean_off_zero_shows_where_noise_of_the_same_size_does_not() {
        let (agreement, _) = judged(&computed(10, 0.8, |_| 0.2), 0.8, 0.0);
        assert!(agreement.mean > agreement.mean_allowed && !agreement.is_within(), "{agreement:?}");
        // A server that rounds nothing is in the middle of those that do.
        let (agreement, segments) = judged(&computed(10, 0.0, |_| 0.0), 0.8, 0.0);
        assert!(agreement.is_within() && segments.iter().all(|s| s.within));
    }

    #[test]
    fn a_fault_that_begins_late_is_seen_in_its_segments() {
        let (_, segments) = judged(&computed(10, 0.05, |i| if i >= 100 { 0.5 } else { 0.0 }), 0.05, 1.0);
        assert!(segments.iter().all(|s| s.within == (s.from < 100)), "{segments:?}");
    }

    #[test]
    fn what_a_server_rules_out_or_does_not_say_is_counted_and_not_compared() {
        let mut server = computed(10, 0.05, |_| 0.0);
        server[0][0][0] = -9999.0;
        server[0][1] = vec![f64::NAN; TOKENS];
        let (agreement, _) = judged(&server, 0.05, 1.0);
        assert_eq!((agreement.all.tokens, agreement.ruled_out), (SEQUENCES * LENGTH - 1, 1));
        assert!(agreement.is_within());
    }

    #[test]
    fn divergence_takes_all_that_is_not_named_as_one() {
        let (one, other) = ([0.5f64.ln(), 0.25f64.ln()], [0.25f64.ln(), 0.25f64.ln()]);
        let expected = 0.5 * 2.0f64.ln() + 0.25 * 0.5f64.ln();
        assert!((divergence(&one, &other).unwrap() - expected).abs() < 1e-9);
        assert_eq!(divergence(&one, &one), Some(0.0));
        assert_eq!(divergence(&one[..1], &other[..1]), None);
    }

    #[test]
    fn growth_is_one_in_proportion_and_none_in_chaos() {
        let exact = facts(&computed(0, 0.0, |_| 0.0));
        let run = |seed, noise| facts(&computed(seed, noise, |_| 0.0));
        assert!((growth(&exact, &run(1, 0.1), &run(2, 0.8), 8.0) - 1.0).abs() < 0.05);
        assert!(growth(&exact, &run(1, 0.8), &run(2, 0.8), 8.0) < 0.05);
        assert_eq!(growth(&exact, &exact, &exact, 8.0), 1.0);
    }

    #[test]
    fn a_few_places_nearer_by_chance_are_no_rival() {
        let rivals = |n: usize, better: usize| {
            Rivals::of((0..n).map(|i| (Some(1.0), Some(if i * 37 % n < better { 0.1 } else { 1.1 }))))
        };
        assert!(rivals(100, 95).is_nearer(0.1));
        assert!(!rivals(100, 60).is_nearer(0.1) && !rivals(6, 6).is_nearer(0.1));
        // Most of what is left beside the noise.
        let slight = |noise| Rivals::of((0..400).map(|_| (Some(1.2), Some(1.02)))).is_nearer(noise);
        assert!(slight(1.0) && !slight(0.1));
        // A server that is one more valid computation, and an explanation in the middle of them all.
        let middle = Rivals::of((0..400).map(|_| (Some(0.81), Some(0.75))));
        assert!(!middle.is_nearer(0.9) && !middle.is_nearer(0.895));
    }
}
