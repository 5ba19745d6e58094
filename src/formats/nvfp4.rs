//! NVFP4: E2M1 elements, one E4M3 scale per 16 along K, one f32 scale per tensor. Value = code · block · global.

use rayon::prelude::*;

use super::{e2m1, e4m3, largest};

/// Elements that share a block scale.
pub const BLOCK: usize = 16;
/// `amax / RANGE` is the global scale: the largest block then has scale 448 and reaches code 6.
pub const RANGE: f32 = e2m1::MAX * e4m3::MAX;

/// Global scale (a multiplier) of a tensor whose largest magnitude is `amax`.
#[must_use]
pub fn global_scale(amax: f32) -> f32 {
    amax / RANGE
}

/// E4M3 code of a weight block's scale; an all-zero block gets 1, and no scale is below 2⁻⁹ (ModelOpt 0.47).
#[inline(always)]
#[must_use]
pub fn weight_block_scale(block_amax: f32, global_scale: f32) -> u8 {
    let s = block_amax / (e2m1::MAX * global_scale);
    let s = if s == 0.0 { 1.0 } else { s };
    e4m3::encode(s.clamp(e4m3::MIN_POSITIVE, e4m3::MAX))
}

/// Codes of a weight block under the given scale code.
#[inline(always)]
pub fn encode_weight_block(block: &[f32], scale_code: u8, global_scale: f32, codes: &mut [u8]) {
    let scale = e4m3::decode(scale_code) * global_scale;
    for (code, &w) in codes.iter_mut().zip(block) {
        *code = e2m1::encode(w / scale);
    }
}

/// E2M1 codes, two to a byte, and E4M3 block scales of a weight [.., k] in blocks of `block`. `scale` chooses a block's
/// scale; `step` is what its elements are divided by under it, the global scale included.
pub fn encode_weight(
    w: &[f32],
    k: usize,
    block: usize,
    scale: impl Fn(&[f32]) -> u8 + Sync,
    step: impl Fn(f32) -> f32 + Sync,
) -> (Vec<u8>, Vec<u8>) {
    let mut codes = vec![0u8; w.len() / 2];
    let mut scales = vec![0u8; w.len() / k * (k / block)];
    let rows = codes.par_chunks_mut(k / 2).zip(scales.par_chunks_mut(k / block)).zip(w.par_chunks(k));
    rows.for_each(|((codes, scales), row)| {
        for ((values, codes), s) in row.chunks(block).zip(codes.chunks_mut(block / 2)).zip(scales) {
            *s = scale(values);
            let step = step(e4m3::decode(*s));
            for (byte, pair) in codes.iter_mut().zip(values.as_chunks::<2>().0) {
                *byte = e2m1::pack(e2m1::encode(pair[0] / step), e2m1::encode(pair[1] / step));
            }
        }
    });
    (codes, scales)
}

/// Quantizes one activation block to doubled E2M1 values (`2·value`, integers -12..=12) and returns its scale, as the deployed
/// kernels compute it per call: `e4m3(min(amax / (6·g), 448))`, the value and not its code.
///
/// A scale of 0 means the whole block is zero. E2M1 has neither NaN nor infinity, so a block that holds one gets the scale
/// NaN: what is no number must not come out as one.
#[inline(always)]
pub fn quantize_activation_block(block: &[f32], global_scale: f32, doubled: &mut [i8]) -> f32 {
    let largest = largest(block);
    let scale = e4m3::round(largest / (e2m1::MAX * global_scale));
    let scale = if largest < f32::INFINITY { scale } else { f32::NAN };
    quantize_with_scale(block, scale * global_scale, doubled);
    scale
}

/// Doubled E2M1 values of `block / scale`; zeros where `scale` is 0. Shared with MXFP4.
#[inline(always)]
pub(crate) fn quantize_with_scale(block: &[f32], scale: f32, doubled: &mut [i8]) {
    if scale > 0.0 {
        for (d, &x) in doubled.iter_mut().zip(block) {
            *d = e2m1::nearest_doubled(x / scale);
        }
    } else {
        doubled.fill(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn all_code_and_scale_pairs_decode_to_the_product() {
        // The full table of 16 x 256 = 4,096 products is exact in f32: at most 2 + 4 significant bits.
        for code in 0..16u8 {
            for scale in (0..=255u8).filter(|s| s & 0x7f != e4m3::NAN) {
                let exact = f64::from(e2m1::decode(code)) * f64::from(e4m3::decode(scale));
                assert_eq!(f64::from(e2m1::decode(code) * e4m3::decode(scale)), exact);
            }
        }
    }

    #[test]
    fn all_65536_pairs_of_scales_multiply_exactly() {
        for a in 0..=255u8 {
            for b in 0..=255u8 {
                let (x, y) = (e4m3::decode(a), e4m3::decode(b));
                if !x.is_nan() && !y.is_nan() {
                    assert_eq!(f64::from(x * y), f64::from(x) * f64::from(y));
                }
            }
        }
    }

    #[test]
    fn the_largest_block_uses_the_whole_range() {
        let g = global_scale(3.0);
        assert_eq!(weight_block_scale(3.0, g), 0x7e);
        assert_eq!(weight_block_scale(0.0, g), e4m3::encode(1.0));
        assert_eq!(weight_block_scale(1e-9, g), 1);
    }

    proptest! {
        #[test]
        fn doubled_activations_are_the_codes_of_e2m1(x in prop::array::uniform16(-10.0f32..10.0), g in 1e-4f32..1e-1) {
            let mut doubled = [0i8; BLOCK];
            let s = quantize_activation_block(&x, g, &mut doubled);
            for (d, v) in doubled.iter().zip(x) {
                let expected = if s == 0.0 { 0 } else { e2m1::DOUBLED[e2m1::encode(v / (s * g)) as usize] };
                prop_assert_eq!(*d, expected);
            }
        }
    }
}
