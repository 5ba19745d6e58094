//! Python's `random.Random`: the choices that `sample` and `choices` make with the Mersenne Twister.
//!
//! lm-evaluation-harness draws few-shot examples and bootstrap resamples with it, so equal prompts need equal draws.

use std::collections::BTreeSet;

use rand_mt::Mt;

/// `random.Random(seed)` for a seed of at most 32 bits.
#[derive(Clone, Debug)]
pub struct Random(Mt);

impl Random {
    /// Seeds as CPython does: by the array of the seed's 32-bit words.
    pub fn new(seed: u32) -> Self {
        Self(Mt::new_with_key([seed]))
    }

    /// `random()`: 53 bits in [0, 1).
    fn float(&mut self) -> f64 {
        let (a, b) = (self.0.next_u32() >> 5, self.0.next_u32() >> 6);
        (f64::from(a) * 67_108_864.0 + f64::from(b)) / 9_007_199_254_740_992.0
    }

    /// `sample(range(n), k)`, for `k` of at most `n`.
    pub fn sample(&mut self, n: usize, k: usize) -> Vec<usize> {
        // CPython's limit: a pool of indices where it is smaller than a set of those already taken would be.
        let mut set_size = 21;
        if k > 5 {
            set_size += 4usize.pow((3.0 * k as f64).log(4.0).ceil() as u32);
        }
        if n <= set_size {
            let mut pool: Vec<usize> = (0..n).collect();
            // The last that is left takes the place of the one taken.
            let draw = |_| {
                let at = self.below(pool.len());
                pool.swap_remove(at)
            };
            return (0..k).map(draw).collect();
        }
        let (mut taken, mut seen) = (Vec::with_capacity(k), BTreeSet::new());
        while taken.len() < k {
            let at = self.below(n);
            if seen.insert(at) {
                taken.push(at);
            }
        }
        taken
    }

    /// One index of `choices(range(n))`.
    pub fn choice(&mut self, n: usize) -> usize {
        (self.float() * n as f64).floor() as usize
    }

    /// `_randbelow`: rejection over the bits that `n` has.
    fn below(&mut self, n: usize) -> usize {
        let bits = usize::BITS - n.leading_zeros();
        loop {
            let drawn = (self.0.next_u32() >> (32 - bits.clamp(1, 32))) as usize;
            if drawn < n {
                return drawn;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_are_those_of_python() {
        // r = random.Random(1234); r.getrandbits(32) three times; r.random(). Python 3.11.
        let mut r = Random::new(1234);
        assert_eq!([(); 3].map(|()| r.0.next_u32()), [4150886329, 3342196574, 1892932127]);
        assert_eq!(r.float(), 0.11685051774599753);
    }

    #[test]
    fn samples_are_those_of_python_on_both_of_its_ways() {
        let mut r = Random::new(1234);
        assert_eq!(r.sample(10, 5), [7, 1, 0, 9, 4]);
        assert_eq!(r.sample(7473, 6), [286, 5501, 5677, 687, 806, 6279]);
        assert_eq!(r.sample(85, 6), [45, 30, 2, 3, 82, 44]);
        let expected = [82, 79, 61, 78, 59, 19, 11, 23, 14, 1, 64, 62, 31, 8, 85, 69, 76];
        assert_eq!(r.sample(86, 17), expected);
        assert_eq!([(); 5].map(|()| r.choice(100)), [67, 51, 4, 82, 6]);
    }
}
