//! OCP Microscaling: blocks of 32 along K with a power-of-two (E8M0) scale; elements E2M1 (MXFP4) or E4M3 (MXFP8).

use rayon::prelude::*;

use super::e8m0::{self, ScaleRule};
use super::{all_finite, amax, e2m1, e4m3, nvfp4};

/// Elements that share a scale.
pub const BLOCK: usize = 32;

/// Scale code of an MXFP4 block.
#[inline(always)]
#[must_use]
pub fn fp4_scale(block: &[f32], rule: ScaleRule) -> u8 {
    e8m0::scale_code(amax(block), e2m1::MAX, e2m1::EMAX, rule)
}

/// Scale code of an MXFP8 block.
#[inline(always)]
#[must_use]
pub fn fp8_scale(block: &[f32], rule: ScaleRule) -> u8 {
    e8m0::scale_code(amax(block), e4m3::MAX, e4m3::EMAX, rule)
}

/// Quantizes one activation block to doubled E2M1 values and returns its scale: NaN where the block holds what is no
/// finite number.
#[inline(always)]
pub fn quantize_fp4_block(block: &[f32], rule: ScaleRule, doubled: &mut [i8]) -> f32 {
    let scale = if all_finite(block) { e8m0::decode(fp4_scale(block, rule)) } else { f32::NAN };
    nvfp4::quantize_with_scale(block, scale, doubled);
    scale
}

/// Quantizes one activation block to E4M3 values (as floats, without the scale) and returns its scale: NaN where the block
/// holds what is no finite number.
#[inline(always)]
pub fn quantize_fp8_block(block: &[f32], rule: ScaleRule, values: &mut [f32]) -> f32 {
    let scale = if all_finite(block) { e8m0::decode(fp8_scale(block, rule)) } else { f32::NAN };
    for (v, &x) in values.iter_mut().zip(block) {
        *v = e4m3::round(x / scale);
    }
    scale
}

/// E2M1 codes, two to a byte, and E8M0 scales of a weight whose blocks divide its rows; `scale` chooses a block's scale,
/// `element` encodes a scaled value.
pub fn encode_fp4_weight(
    w: &[f32],
    scale: impl Fn(&[f32]) -> u8 + Sync,
    element: impl Fn(f32) -> u8 + Sync,
) -> (Vec<u8>, Vec<u8>) {
    let mut codes = vec![0u8; w.len() / 2];
    let mut scales = vec![0u8; w.len() / BLOCK];
    let blocks = codes.par_chunks_mut(BLOCK / 2).zip(&mut scales).zip(w.par_chunks(BLOCK));
    blocks.for_each(|((codes, s), block)| {
        *s = scale(block);
        let scale = e8m0::decode(*s);
        for (byte, pair) in codes.iter_mut().zip(block.as_chunks::<2>().0) {
            *byte = e2m1::pack(element(pair[0] / scale), element(pair[1] / scale));
        }
    });
    (codes, scales)
}

/// E4M3 codes and E8M0 scales of a weight whose blocks divide its rows.
#[must_use]
pub fn encode_fp8_weight(w: &[f32], rule: ScaleRule) -> (Vec<u8>, Vec<u8>) {
    let mut codes = vec![0u8; w.len()];
    let mut scales = vec![0u8; w.len() / BLOCK];
    let blocks = codes.par_chunks_mut(BLOCK).zip(&mut scales).zip(w.par_chunks(BLOCK));
    blocks.for_each(|((codes, s), block)| {
        *s = fp8_scale(block, rule);
        let scale = e8m0::decode(*s);
        codes.iter_mut().zip(block).for_each(|(c, w)| *c = e4m3::encode(w / scale));
    });
    (codes, scales)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_with_amax_six_needs_no_scaling() {
        let mut block = [0.0f32; BLOCK];
        block[3] = -6.0;
        for rule in [ScaleRule::Ceil, ScaleRule::Floor, ScaleRule::Even] {
            let mut doubled = [0i8; BLOCK];
            assert_eq!(quantize_fp4_block(&block, rule, &mut doubled), 1.0);
            assert_eq!(doubled[3], -12);
        }
    }

    #[test]
    fn ceil_never_saturates_where_floor_and_even_may() {
        let mut block = [0.0f32; BLOCK];
        block[0] = 7.0;
        let mut doubled = [0i8; BLOCK];
        assert_eq!(quantize_fp4_block(&block, ScaleRule::Ceil, &mut doubled), 2.0);
        assert_eq!(doubled[0], 8); // 3.5 ties to the even code, 4
        assert_eq!(quantize_fp4_block(&block, ScaleRule::Floor, &mut doubled), 1.0);
        assert_eq!(doubled[0], 12); // saturated at 6
        assert_eq!(quantize_fp4_block(&block, ScaleRule::Even, &mut doubled), 2.0); // mantissa 1.75 rounds up
    }

    #[test]
    fn fp8_elements_are_e4m3_of_the_scaled_value() {
        let block: Vec<f32> = (0..BLOCK).map(|i| (i as f32 - 15.5) * 40.0).collect();
        let mut values = [0.0f32; BLOCK];
        let s = quantize_fp8_block(&block, ScaleRule::Ceil, &mut values);
        assert_eq!(s, 2.0);
        for (v, x) in values.iter().zip(&block) {
            assert_eq!(*v, e4m3::round(x / 2.0));
        }
    }
}
