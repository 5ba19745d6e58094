//! Number formats: pure functions between `f32` and the codes that checkpoints store. No candle, no IO.
//!
//! Every function here is the definition that the fast kernels in `backend/` are held to, bit for bit.
//! Sources: OCP Microscaling v1.0 (E2M1, E4M3, E8M0, MX), NVIDIA's NVFP4, and the exporting tools' own files.

pub mod e2m1;
pub mod e4m3;
pub mod e8m0;
pub mod fp8;
pub mod fp_quant;
pub mod kv;
pub mod linear;
pub mod mx;
pub mod nvfp4;
pub mod scheme;
pub mod synthetic;

/// Whether no element is NaN or infinite.
#[inline(always)]
#[must_use]
pub fn all_finite(values: &[f32]) -> bool {
    // Without branches within a piece, so that it vectorises.
    const PIECE: usize = 1 << 10;
    const INFINITY: u32 = 0x7f80_0000;
    values.chunks(PIECE).all(|piece| {
        let mut largest = 0u32;
        for v in piece {
            largest = largest.max(v.to_bits() & 0x7fff_ffff);
        }
        largest < INFINITY
    })
}

/// Whether the sum of squares of each row of `width` values is a finite f32: what a norm divides by its root. A row for which
/// it is not would come out of the norm as zeros, NaN or infinite as its values may be.
#[must_use]
pub fn squares_finite(values: &[f32], width: usize) -> bool {
    const LANES: usize = 16;
    values.chunks(width.max(1)).all(|row| {
        let mut sums = [0.0f32; LANES];
        let (whole, rest) = row.as_chunks::<LANES>();
        for chunk in whole {
            sums.iter_mut().zip(chunk).for_each(|(s, v)| *s += v * v);
        }
        (sums.iter().sum::<f32>() + rest.iter().map(|v| v * v).sum::<f32>()).is_finite()
    })
}

/// Largest absolute value of `values`, 0 for an empty slice: infinite or NaN where an element is.
#[inline(always)]
#[must_use]
pub fn largest(values: &[f32]) -> f32 {
    // As integers, magnitudes have the order that they have as floats, and NaN comes last.
    f32::from_bits(values.iter().fold(0, |largest, v| largest.max(v.to_bits() & 0x7fff_ffff)))
}

/// Largest absolute value of `values`; 0 for an empty slice. NaN elements are passed over: check for them first.
#[inline(always)]
#[must_use]
pub fn amax(values: &[f32]) -> f32 {
    let larger = |max: f32, v: &f32| if v.abs() > max { v.abs() } else { max };
    // Side by side, so that none waits for another.
    let (runs, rest) = values.as_chunks::<AMAX_LANES>();
    let mut max = [0.0f32; AMAX_LANES];
    for run in runs {
        max.iter_mut().zip(run).for_each(|(max, v)| *max = larger(*max, v));
    }
    max.iter().chain(rest).fold(0.0, larger)
}

/// Maxima that are found side by side.
const AMAX_LANES: usize = 16;

/// The least largest magnitude that a scale is computed from: below it, quotients and products with the smallest block
/// scale would leave f32's normal numbers, and a divisor (6·448 / amax, in BF16) its range. Smaller values become zeros.
pub const LEAST: f32 = f32::from_bits((127 - 96) << 23);

/// What a scale of largest magnitude `amax` is computed from. An all-zero weight or input has no scale of its own and any
/// will do: 1, which every loader takes.
#[must_use]
pub fn scalable(amax: f32) -> f32 {
    if amax == 0.0 { 1.0 } else { amax.max(LEAST) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use e8m0::ScaleRule;

    #[test]
    fn all_finite_sees_a_nan_or_an_infinity_anywhere() {
        let mut values = vec![f32::MAX; 3000];
        assert!(all_finite(&values) && all_finite(&[]) && all_finite(&[-0.0, f32::MIN, f32::MIN_POSITIVE]));
        for at in [0, 1023, 1024, 2999] {
            for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                values[at] = bad;
                assert!(!all_finite(&values), "{bad} at {at}");
                values[at] = 1.0;
            }
        }
    }

    #[test]
    fn squares_that_overflow_are_seen_in_any_row_and_place() {
        assert!(squares_finite(&[1e18; 200], 100) && squares_finite(&[], 7));
        for at in [0, 15, 99, 100, 199] {
            for bad in [2e19, -3e38, f32::NAN, f32::INFINITY] {
                let mut values = [1.0; 200];
                values[at] = bad;
                assert!(!squares_finite(&values, 100), "{bad} at {at}");
            }
        }
    }

    #[test]
    fn no_activation_format_makes_a_number_of_what_is_none() {
        use linear::ActivationFormat as A;
        let formats = [
            A::Float,
            A::Nvfp4 { global_scale: 0.01 },
            A::Fp8Static { scale: 0.01 },
            A::Fp8Token,
            A::Fp8Group,
            A::Mxfp4 { rule: ScaleRule::Ceil },
            A::Mxfp8 { rule: ScaleRule::Even },
            A::FpQuant { method: fp_quant::Method::AbsMax, global_scale: 1.0 / 3.0 },
            A::FpQuant { method: fp_quant::Method::Quest, global_scale: 1.0 },
        ];
        for format in formats {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut row = vec![0.5f32; 128];
                row[37] = bad;
                format.fake_quantize(&mut row);
                assert!(!row[37].is_finite(), "{format} made {} of {bad}", row[37]);
            }
        }
        assert_eq!(fp8::encode(f32::NEG_INFINITY, 1.0), e4m3::NAN);
        assert_eq!(fp8::encode(1e9, 1.0), e4m3::encode(448.0));
    }
}
