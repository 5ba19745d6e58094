//! The random numbers of resampling: xoshiro256++, seeded by SplitMix64, so that a seed gives the same bytes everywhere.

use rand_xoshiro::rand_core::{Rng, SeedableRng};
use rand_xoshiro::{SplitMix64, Xoshiro256PlusPlus};

/// A stream of random numbers.
#[derive(Clone, Debug)]
pub struct Random(Xoshiro256PlusPlus);

impl Random {
    /// A generator of its own for each seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(Xoshiro256PlusPlus::seed_from_u64(seed))
    }

    /// A generator of its own for each seed and name: what is drawn for one task does not depend on which other tasks
    /// there are.
    #[must_use]
    pub fn named(seed: u64, name: &str) -> Self {
        // FNV-1a, 64 bits.
        let hash =
            name.bytes().fold(0xcbf2_9ce4_8422_2325, |h: u64, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
        Self::new(SplitMix64::seed_from_u64(seed).next_u64() ^ hash)
    }

    /// 64 random bits.
    #[inline]
    pub fn bits(&mut self) -> u64 {
        self.0.next_u64()
    }

    /// Uniform in [0, 1), a multiple of 2⁻⁵³.
    #[inline]
    pub fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Uniform in 0..n, without bias (Lemire, "Fast random integer generation in an interval", 2019); 0 for n = 0.
    #[inline]
    pub fn below(&mut self, n: usize) -> usize {
        let n = n as u64;
        let mut product = u128::from(self.bits()) * u128::from(n);
        if (product as u64) < n {
            let threshold = n.wrapping_neg().checked_rem(n).unwrap_or(0);
            while (product as u64) < threshold {
                product = u128::from(self.bits()) * u128::from(n);
            }
        }
        (product >> 64) as usize
    }

    /// How often something of probability `p` happens in `n` trials: inversion where few are expected, otherwise
    /// Hörmann's transformed rejection ("The generation of binomial random variates", 1993, algorithm BTRD without the
    /// decomposition: BTRS).
    pub fn binomial(&mut self, n: u64, p: f64) -> u64 {
        /// Below this expectation Hörmann's bounds do not hold.
        const FEW: f64 = 10.0;
        if p > 0.5 {
            return n - self.binomial(n, 1.0 - p);
        }
        if n == 0 || p <= 0.0 {
            return 0;
        }
        let trials = n as f64;
        let odds = p / (1.0 - p);
        if trials * p < FEW {
            // The smallest k below which a uniform number falls, summing probabilities from 0 on.
            let mut term = (trials * (-p).ln_1p()).exp();
            let mut u = self.unit();
            let mut k = 0;
            while u >= term && k < n {
                u -= term;
                term *= odds * (n - k) as f64 / (k + 1) as f64;
                k += 1;
            }
            return k;
        }
        let deviation = (trials * p * (1.0 - p)).sqrt();
        let b = 1.15 + 2.53 * deviation;
        let a = -0.0873 + 0.0248 * b + 0.01 * p;
        let centre = trials * p + 0.5;
        let squeeze = 0.92 - 4.2 / b;
        let alpha = (2.83 + 5.1 / b) * deviation;
        let mode = ((trials + 1.0) * p).floor();
        let log_factorial = |k: f64| libm::lgamma(k + 1.0);
        loop {
            let u = self.unit() - 0.5;
            let v = self.unit();
            let us = 0.5 - u.abs();
            let k = ((2.0 * a / us + b) * u + centre).floor();
            if us >= 0.07 && v <= squeeze {
                return k as u64;
            }
            if k < 0.0 || k > trials {
                continue;
            }
            let bound = (v * alpha / (a / (us * us) + b)).ln();
            let density =
                log_factorial(mode) + log_factorial(trials - mode) - log_factorial(k) - log_factorial(trials - k)
                    + (k - mode) * odds.ln();
            if bound <= density {
                return k as u64;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_the_same_bits_for_ever() {
        let bits = |mut random: Random| [random.bits(), random.bits()];
        assert_eq!(bits(Random::new(1)), [14_971_601_782_005_023_387, 13_781_649_495_232_077_965]);
        assert_eq!(bits(Random::named(1, "arc")), [10_962_253_519_313_648_306, 633_716_046_583_299_237]);
        assert_ne!(bits(Random::named(1, "arc")), bits(Random::named(1, "piqa")));
        assert_ne!(bits(Random::named(1, "arc")), bits(Random::named(2, "arc")));
    }

    #[test]
    fn small_numbers_are_uniform() {
        let mut random = Random::new(1);
        let mut counts = [0f64; 7];
        for _ in 0..70_000 {
            counts[random.below(7)] += 1.0;
        }
        let chi_square: f64 = counts.iter().map(|c| (c - 1e4).powi(2) / 1e4).sum();
        // 99.9 % point of chi-square with 6 degrees of freedom.
        assert!(chi_square < 22.46, "{counts:?}");
        assert_eq!(random.below(0), 0);
        assert_eq!(random.below(1), 0);
    }

    #[test]
    fn binomial_numbers_have_their_distribution() {
        let mut random = Random::new(3);
        for (n, p) in [(4, 0.5), (30, 0.2), (60, 0.9), (30, 0.5), (1000, 0.03), (10_000, 0.3)] {
            // Cells of about half a standard deviation; their probabilities from the recurrence of the binomial ones.
            let trials = 100_000;
            let width = ((n as f64 * p * (1.0 - p)).sqrt() / 2.0).ceil();
            let cell = |k: u64| ((k as f64 - n as f64 * p) / width).floor() as i64;
            let mut cells = std::collections::BTreeMap::<i64, [f64; 2]>::new();
            for k in 0..=n {
                let (kf, nf) = (k as f64, n as f64);
                let log = libm::lgamma(nf + 1.0) - libm::lgamma(kf + 1.0) - libm::lgamma(nf - kf + 1.0)
                    + kf * p.ln()
                    + (nf - kf) * (-p).ln_1p();
                cells.entry(cell(k)).or_default()[0] += f64::from(trials) * log.exp();
            }
            for _ in 0..trials {
                cells.entry(cell(random.binomial(n, p))).or_default()[1] += 1.0;
            }
            let full: Vec<[f64; 2]> = cells.into_values().filter(|c| c[0] >= 10.0).collect();
            let chi_square: f64 = full.iter().map(|[e, o]| (o - e).powi(2) / e).sum();
            let freedom = full.len() as f64 - 1.0;
            // The 99.9 % point of chi-square after Wilson and Hilferty.
            let limit = freedom * (1.0 - 2.0 / (9.0 * freedom) + 3.09 * (2.0 / (9.0 * freedom)).sqrt()).powi(3);
            assert!(chi_square < limit && full.len() > 3, "{n} {p}: {chi_square} of {limit}");
        }
        assert_eq!((random.binomial(0, 0.5), random.binomial(5, 0.0), random.binomial(5, 1.0)), (0, 0, 5));
    }
}
