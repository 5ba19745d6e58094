//! fp_quant's MXFP4 inputs (IST Austria): blocks of 32 along K, a power-of-two scale by one of two methods, and a fixed
//! global scale that lets the largest value of a block use all codes. Value = code · block · global.
//!
//! Source: fp_quant 0.3.2, `module/pseudoquant_linear_fns.py`. Its NVFP4 inputs are those of [`super::nvfp4`].

use super::{all_finite, amax, e2m1};
use serde::{Deserialize, Serialize};

/// How the scale of a block is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Method {
    /// The largest power of two that its largest magnitude reaches.
    AbsMax,
    /// From its standard deviation, as fits normally distributed values best; what is beyond saturates.
    Quest,
}

/// The best largest value for four bits of a standard normal distribution, over that of E2M1.
const QUEST: f32 = 2.922_478_6 / e2m1::MAX;
/// Keeps the logarithm finite.
const QUEST_LEAST: f32 = 1e-8;
/// The least scale; products with it stay normal.
const LEAST: f32 = super::LEAST;

/// The largest power of two that `x` reaches, [`LEAST`] at least.
#[inline(always)]
fn power_of_two(x: f32) -> f32 {
    let x = if x > LEAST { x } else { LEAST };
    f32::from_bits(x.to_bits() & 0x7f80_0000)
}

/// Standard deviation of a block, the mean removed. Eight partial sums by index modulo 8, then halves onto halves.
#[inline(always)]
fn deviation(block: &[f32]) -> f32 {
    let mean = sum(block, |x| x) / block.len() as f32;
    (sum(block, |x| (x - mean) * (x - mean)) / block.len() as f32).sqrt()
}

#[inline(always)]
fn sum(block: &[f32], of: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0.0f32; 8];
    for run in block.as_chunks::<8>().0 {
        lanes.iter_mut().zip(run).for_each(|(lane, x)| *lane += of(*x));
    }
    for width in [4, 2, 1] {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
    }
    lanes[0]
}

/// Quantizes a block of 32 under a global scale (a multiplier): doubled E2M1 values, and the block's scale. NaN, with
/// zeros, where the block is not finite.
#[inline(always)]
pub fn quantize_block(block: &[f32], method: Method, global_scale: f32, doubled: &mut [i8]) -> f32 {
    if !all_finite(block) {
        doubled.fill(0);
        return f32::NAN;
    }
    let scale = match method {
        Method::AbsMax => power_of_two(amax(block)),
        Method::Quest => power_of_two(QUEST * deviation(block) + QUEST_LEAST),
    };
    // Exact, since `scale` is a power of two: x is rounded once, as in x · divisor / scale.
    let factor = (1.0 / global_scale) / scale;
    for (d, &x) in doubled.iter_mut().zip(block) {
        *d = e2m1::nearest_doubled(x * factor);
    }
    scale
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_value_of_a_block_uses_the_codes_from_three_to_six() {
        let mut doubled = [0i8; 32];
        for (largest, scale, code) in [(1.0, 1.0, 6), (1.99, 1.0, 12), (2.0, 2.0, 6), (0.34, 0.25, 8)] {
            let mut block = [0.01f32; 32];
            block[5] = -largest;
            assert_eq!(quantize_block(&block, Method::AbsMax, 1.0 / 3.0, &mut doubled), scale);
            assert_eq!(doubled[5], -code, "{largest}");
        }
        assert_eq!(quantize_block(&[0.0; 32], Method::AbsMax, 1.0 / 3.0, &mut doubled), LEAST);
        assert_eq!(doubled, [0; 32]);
    }

    #[test]
    fn quest_scales_by_the_deviation_and_saturates() {
        // ±1: deviation 1, 2.92247856 / 6 = 0.487, so the scale is 1/4.
        let mut block: [f32; 32] = std::array::from_fn(|i| if i % 2 == 0 { 1.0 } else { -1.0 });
        let mut doubled = [0i8; 32];
        assert_eq!(quantize_block(&block, Method::Quest, 1.0, &mut doubled), 0.25);
        assert_eq!(doubled[..2], [8, -8]);
        // The mean does not count.
        block.iter_mut().for_each(|x| *x += 1.0);
        assert_eq!(quantize_block(&block, Method::Quest, 1.0, &mut doubled), 0.25);
        assert_eq!(doubled[..2], [12, 0]);
        assert_eq!(quantize_block(&[0.0; 32], Method::Quest, 1.0, &mut doubled), power_of_two(1e-8));
    }
}
