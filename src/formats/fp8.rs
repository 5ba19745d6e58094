//! FP8: E4M3 elements under one f32 scale per tensor, per row (output channel or token), or per 128-wide block.

use super::{amax, e4m3};

/// Side of a two-dimensional weight block and width of an activation group (DeepSeek-V3, compressed-tensors `block`).
pub const BLOCK: usize = 128;

/// Scale (a multiplier) that maps `amax` to 448; 1 for an all-zero tensor.
#[inline(always)]
#[must_use]
pub fn scale(amax: f32) -> f32 {
    let s = amax / e4m3::MAX;
    if s > 0.0 { s } else { 1.0 }
}

/// E4M3 value (as a float, without the scale) of `x / scale`; finite values saturate, an infinity, which E4M3 does not have,
/// becomes NaN: what is no number must not come out as one.
#[inline(always)]
#[must_use]
pub fn round(x: f32, scale: f32) -> f32 {
    let value = e4m3::round(x / scale);
    if x.is_finite() { value } else { f32::NAN }
}

/// The code of [`round`].
#[inline(always)]
#[must_use]
pub fn encode(x: f32, scale: f32) -> u8 {
    let code = e4m3::encode(x / scale);
    if x.is_finite() { code } else { e4m3::NAN }
}

/// [`round`] of each element.
#[inline(always)]
pub fn quantize(x: &[f32], scale: f32, values: &mut [f32]) {
    for (v, &x) in values.iter_mut().zip(x) {
        *v = round(x, scale);
    }
}

/// Quantizes one token (or one group of it) by its own amax; returns the scale.
#[inline(always)]
pub fn quantize_dynamic(x: &[f32], values: &mut [f32]) -> f32 {
    let s = scale(amax(x));
    quantize(x, s, values);
    s
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_value_maps_to_448_and_zeros_stay_zero() {
        let mut v = [0.0f32; 3];
        assert_eq!(quantize_dynamic(&[1.0, -2.0, 0.5], &mut v), 2.0 / 448.0);
        assert_eq!(v, [224.0, -448.0, 112.0]);
        assert_eq!(quantize_dynamic(&[0.0; 3], &mut v), 1.0);
        assert_eq!(v, [0.0; 3]);
    }

    #[test]
    fn static_scales_saturate_what_calibration_never_saw() {
        let mut v = [0.0f32; 1];
        quantize(&[1e9], 1.0, &mut v);
        assert_eq!(v, [448.0]);
    }
}
