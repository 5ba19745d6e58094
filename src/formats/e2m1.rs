//! E2M1, the four-bit float of NVFP4 and MXFP4: sign, two exponent bits, one mantissa bit.

/// Largest magnitude.
pub const MAX: f32 = 6.0;
/// Unbiased exponent of [`MAX`], what OCP's MX scale rule subtracts.
pub const EMAX: i32 = 2;
/// Value of each of the 16 codes. Code 8 is -0.
pub const VALUES: [f32; 16] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];
/// Twice the value of each code: integers, so that the dot product of two blocks is exact in integers.
pub const DOUBLED: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// Code of the value nearest to `x`: ties go to the even code, magnitudes over 6 saturate. A negative value that rounds
/// to zero gives code 8 (-0), as ModelOpt and compressed-tensors write it; a zero of either sign gives 0.
///
/// NaN gives code 0; callers refuse NaN before they quantize.
#[inline(always)]
#[must_use]
pub fn encode(x: f32) -> u8 {
    encode_magnitude(x.abs()) | (((x < 0.0) as u8) << 3)
}

/// Code 0-7 of the magnitude `a >= 0`. Branch-free, so that it vectorises.
#[inline(always)]
#[must_use]
pub fn encode_magnitude(a: f32) -> u8 {
    let [a, b, c, d, e, f, g] = reached(a);
    a as u8 + b as u8 + c as u8 + d as u8 + e as u8 + f as u8 + g as u8
}

/// Twice the value nearest to `x`, an integer of its sign: ties go to the even code, magnitudes over 6 saturate. Without branches and
/// tables, so that it vectorises. Callers refuse NaN.
#[inline(always)]
#[must_use]
pub fn nearest_doubled(x: f32) -> i8 {
    /// Of a sum of an integer and this, the low bits are the integer.
    const INTEGER: f32 = 12_582_912.0;
    let a = x.abs();
    let a = if a > MAX { MAX } else { a };
    // A value has one bit behind its leading one, and steps are 0.5 below 2. The last bit of a sum with `step` is that bit, so that
    // the FPU rounds there, half to even.
    let leading = if a > 1.0 { a } else { 1.0 };
    let step = f32::from_bits((leading.to_bits() & 0x7f80_0000) + (22 << 23));
    let doubled = 2.0 * ((a + step) - step);
    (doubled.copysign(x) + INTEGER).to_bits() as i8
}

/// Whether the magnitude `a` is nearer to code 1, 2, ..., 7 than to the one below.
#[inline(always)]
fn reached(a: f32) -> [bool; 7] {
    // A tie belongs to the even code: bounds below an odd code are exclusive, below an even code inclusive.
    [a > 0.25, a >= 0.75, a > 1.25, a >= 1.75, a > 2.5, a >= 3.5, a > 5.0]
}

/// Value of `code`; only the low four bits count.
#[inline(always)]
#[must_use]
pub fn decode(code: u8) -> f32 {
    VALUES[(code & 15) as usize]
}

/// Two codes in one byte, the first element in the low nibble.
#[inline(always)]
#[must_use]
pub fn pack(first: u8, second: u8) -> u8 {
    (first & 15) | (second << 4)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_survives_decode_and_encode() {
        for code in 0..16u8 {
            assert_eq!(encode(decode(code)), if code == 8 { 0 } else { code });
            assert_eq!(decode(code) * 2.0, f32::from(DOUBLED[code as usize]));
        }
    }

    #[test]
    fn every_tie_goes_to_the_even_code_and_its_neighbours_do_not() {
        for code in 0..7u8 {
            let tie = (decode(code) + decode(code + 1)) / 2.0;
            let even = if code % 2 == 0 { code } else { code + 1 };
            assert_eq!(encode(tie), even, "{tie}");
            assert_eq!(encode(-tie), even | 8);
            assert_eq!(encode(f32::from_bits(tie.to_bits() - 1)), code);
            assert_eq!(encode(f32::from_bits(tie.to_bits() + 1)), code + 1);
            for x in [-1, 0, 1].map(|ulp| f32::from_bits(tie.to_bits().wrapping_add_signed(ulp))) {
                assert_eq!(nearest_doubled(x), DOUBLED[encode(x) as usize], "{x}");
                assert_eq!(nearest_doubled(-x), DOUBLED[encode(-x) as usize], "-{x}");
            }
        }
    }

    #[test]
    fn encoding_is_nearest_over_a_fine_grid_and_saturates() {
        for i in -80_000..=80_000i32 {
            let x = i as f32 / 10_000.0;
            let got = (decode(encode(x)) - x).abs();
            let best = VALUES.iter().map(|v| (v - x).abs()).fold(f32::MAX, f32::min);
            assert_eq!(got, best, "{x}");
            assert_eq!(nearest_doubled(x), DOUBLED[encode(x) as usize], "{x}");
        }
        assert_eq!(encode(f32::INFINITY), 7);
        assert_eq!(encode(-1e30), 15);
        assert_eq!(encode(-0.1), 8);
        for x in [0.0, f32::MIN_POSITIVE, 1e-40, 1e30, f32::MAX, f32::INFINITY] {
            assert_eq!([x, -x].map(nearest_doubled), [x, -x].map(|x| DOUBLED[encode(x) as usize]), "{x}");
        }
    }
}
