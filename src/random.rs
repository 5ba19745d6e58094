//! Random numbers that are the same everywhere: SplitMix64 of Steele, Lea and Flood (2014).

const GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

/// The generator and its state, which at the beginning is the seed.
#[derive(Clone, Debug)]
pub struct SplitMix64(pub u64);

impl SplitMix64 {
    /// The next number.
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(GAMMA);
        mix(self.0)
    }

    /// Draw number `index` (from 0) of the generator of this `seed`, without those before it.
    #[must_use]
    pub fn at(seed: u64, index: u64) -> u64 {
        mix(seed.wrapping_add(index.wrapping_add(1).wrapping_mul(GAMMA)))
    }
}

fn mix(z: u64) -> u64 {
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_are_the_published_ones_one_by_one_and_by_their_index() {
        // From 1234567, published with Rosetta Code's and Vigna's sources.
        let published = [
            6_457_827_717_110_365_317,
            3_203_168_211_198_807_973,
            9_817_491_932_198_370_423,
            4_593_380_528_125_082_431,
        ];
        let mut random = SplitMix64(1_234_567);
        for (index, expected) in published.into_iter().enumerate() {
            assert_eq!([random.draw(), SplitMix64::at(1_234_567, index as u64)], [expected; 2]);
        }
    }
}
