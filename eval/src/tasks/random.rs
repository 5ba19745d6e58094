//! Python's `random.Random`: the Mersenne Twister MT19937 and the choices that `sample` and `choices` make with it.
//!
//! lm-evaluation-harness draws few-shot examples and bootstrap resamples with it, so equal prompts need equal draws.

const N: usize = 624;
const M: usize = 397;

/// `random.Random(seed)` for a seed of at most 32 bits.
#[derive(Clone, Debug)]
pub struct Random {
    state: [u32; N],
    index: usize,
}

impl Random {
    /// Seeds as CPython does: `init_by_array` of the seed's 32-bit words.
    #[must_use]
    pub fn new(seed: u32) -> Self {
        // Matsumoto and Nishimura, mt19937ar.c.
        let mut state = [0u32; N];
        state[0] = 19_650_218;
        for i in 1..N {
            state[i] = 1_812_433_253u32.wrapping_mul(state[i - 1] ^ (state[i - 1] >> 30)).wrapping_add(i as u32);
        }
        let mut i = 1;
        for _ in 0..N {
            state[i] = (state[i] ^ (state[i - 1] ^ (state[i - 1] >> 30)).wrapping_mul(1_664_525)).wrapping_add(seed);
            i += 1;
            if i >= N {
                state[0] = state[N - 1];
                i = 1;
            }
        }
        for _ in 0..N - 1 {
            state[i] =
                (state[i] ^ (state[i - 1] ^ (state[i - 1] >> 30)).wrapping_mul(1_566_083_941)).wrapping_sub(i as u32);
            i += 1;
            if i >= N {
                state[0] = state[N - 1];
                i = 1;
            }
        }
        state[0] = 0x8000_0000;
        Self { state, index: N }
    }

    /// 32 random bits.
    pub fn bits(&mut self) -> u32 {
        if self.index == N {
            for i in 0..N {
                let y = (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % N] & 0x7fff_ffff);
                let twist = if y & 1 == 0 { 0 } else { 0x9908_b0df };
                self.state[i] = self.state[(i + M) % N] ^ (y >> 1) ^ twist;
            }
            self.index = 0;
        }
        let mut y = self.state[self.index];
        self.index += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    /// `random()`: 53 bits in [0, 1).
    pub fn float(&mut self) -> f64 {
        let (a, b) = (self.bits() >> 5, self.bits() >> 6);
        (f64::from(a) * 67_108_864.0 + f64::from(b)) / 9_007_199_254_740_992.0
    }

    /// `sample(range(n), k)`, for `k` of at most `n`.
    pub fn sample(&mut self, n: usize, k: usize) -> Vec<usize> {
        let k = k.min(n);
        // CPython's limit: a pool of indices where it is smaller than a set of those already taken would be.
        let mut set_size = 21;
        if k > 5 {
            set_size += 4usize.pow((3.0 * k as f64).log(4.0).ceil() as u32);
        }
        let mut taken = Vec::with_capacity(k);
        if n <= set_size {
            let mut pool: Vec<usize> = (0..n).collect();
            for i in 0..k {
                let j = self.below(n - i);
                taken.push(pool[j]);
                pool[j] = pool[n - i - 1];
            }
        } else {
            let mut seen = std::collections::BTreeSet::new();
            while taken.len() < k {
                let j = self.below(n);
                if seen.insert(j) {
                    taken.push(j);
                }
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
            let r = (self.bits() >> (32 - bits.clamp(1, 32))) as usize;
            if r < n {
                return r;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_are_those_of_python() {
        // r = random.Random(1234); r.getrandbits(32) three times; r.random().
        let mut r = Random::new(1234);
        assert_eq!([r.bits(), r.bits(), r.bits()], PYTHON_BITS);
        assert_eq!(r.float(), PYTHON_FLOAT);
    }

    #[test]
    fn samples_are_those_of_python_on_both_of_its_ways() {
        let mut r = Random::new(1234);
        assert_eq!(r.sample(10, 5), PYTHON_POOL);
        assert_eq!(r.sample(7473, 6), PYTHON_SET);
        assert_eq!(r.sample(85, 6), PYTHON_EDGE);
        assert_eq!(r.sample(86, 17), PYTHON_LARGE);
        assert_eq!((0..5).map(|_| r.choice(100)).collect::<Vec<_>>(), PYTHON_CHOICES);
    }

    // Written by Python 3.11.
    const PYTHON_BITS: [u32; 3] = [4150886329, 3342196574, 1892932127];
    const PYTHON_FLOAT: f64 = 0.11685051774599753;
    const PYTHON_POOL: [usize; 5] = [7, 1, 0, 9, 4];
    const PYTHON_SET: [usize; 6] = [286, 5501, 5677, 687, 806, 6279];
    const PYTHON_EDGE: [usize; 6] = [45, 30, 2, 3, 82, 44];
    const PYTHON_LARGE: [usize; 17] = [82, 79, 61, 78, 59, 19, 11, 23, 14, 1, 64, 62, 31, 8, 85, 69, 76];
    const PYTHON_CHOICES: [usize; 5] = [67, 51, 4, 82, 6];
}
