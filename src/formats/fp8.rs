//! FP8: E4M3 elements under one f32 scale per tensor, per row (output channel or token), or per 128-wide block.

use rayon::prelude::*;

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

/// Largest magnitude of each block of `height` rows by `width` columns of a weight [.., k], row-major.
#[must_use]
pub fn block_peaks(w: &[f32], k: usize, [height, width]: [usize; 2]) -> Vec<f32> {
    let columns = k.div_ceil(width);
    let mut peaks = vec![0.0f32; (w.len() / k).div_ceil(height) * columns];
    for (r, row) in w.chunks(k).enumerate() {
        for (c, block) in row.chunks(width).enumerate() {
            let peak = &mut peaks[r / height * columns + c];
            *peak = peak.max(amax(block));
        }
    }
    peaks
}

/// E4M3 codes of a weight [.., k] under one scale per block of `height` rows by `width` columns; `round` is what is done to
/// quotients before they are encoded.
pub fn encode_weight(
    w: &[f32],
    k: usize,
    [height, width]: [usize; 2],
    scales: &[f32],
    round: impl Fn(f32) -> f32 + Sync,
) -> Vec<u8> {
    let columns = k.div_ceil(width);
    let mut codes = vec![0u8; w.len()];
    codes.par_chunks_mut(k).zip(w.par_chunks(k)).enumerate().for_each(|(r, (codes, row))| {
        let scales = &scales[r / height * columns..];
        for ((codes, row), scale) in codes.chunks_mut(width).zip(row.chunks(width)).zip(scales) {
            codes.iter_mut().zip(row).for_each(|(c, w)| *c = e4m3::encode(round(w / scale)));
        }
    });
    codes
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

    #[test]
    fn weights_are_encoded_under_the_scale_of_their_block() {
        // Two rows by three columns in blocks of 1x2: the last block of a row is narrower.
        let w = [1.0, -2.0, 3.0, 8.0, 4.0, 0.5];
        let block = [1, 2];
        assert_eq!(block_peaks(&w, 3, block), [2.0, 3.0, 8.0, 0.5]);
        let codes = encode_weight(&w, 3, block, &[0.5, 1.0, 2.0, 0.25], |q| q);
        let values: Vec<f32> = codes.iter().map(|c| e4m3::decode(*c)).collect();
        assert_eq!(values, [2.0, -4.0, 3.0, 4.0, 2.0, 2.0]);
    }
}
