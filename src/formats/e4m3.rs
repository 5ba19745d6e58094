//! E4M3 "fn": the eight-bit float of FP8 tensors and of NVFP4 block scales. No infinity; NaN is 0x7f and 0xff.

/// Largest finite magnitude.
pub const MAX: f32 = 448.0;
/// Smallest positive (subnormal) value, 2⁻⁹.
pub const MIN_POSITIVE: f32 = 0.001_953_125;
/// Unbiased exponent of [`MAX`].
pub const EMAX: i32 = 8;
/// Code of NaN.
pub const NAN: u8 = 0x7f;

/// Value of each of the 256 codes.
pub static VALUES: [f32; 256] = table();

const fn table() -> [f32; 256] {
    let mut t = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        t[code] = decode_bits(code as u8);
        code += 1;
    }
    t
}

const fn decode_bits(code: u8) -> f32 {
    let exponent = ((code >> 3) & 15) as u32;
    let mantissa = (code & 7) as u32;
    let magnitude = if code & 0x7f == NAN {
        f32::NAN
    } else if exponent == 0 {
        mantissa as f32 * MIN_POSITIVE
    } else {
        // Rebias 7 -> 127 and widen the mantissa 3 -> 23 bits.
        f32::from_bits(((exponent + 120) << 23) | (mantissa << 20))
    };
    if code & 0x80 != 0 { -magnitude } else { magnitude }
}

/// Value of `code`.
#[inline(always)]
#[must_use]
pub fn decode(code: u8) -> f32 {
    VALUES[code as usize]
}

/// Code of the value nearest to `x`, ties to even; magnitudes over 448 saturate; NaN stays NaN.
#[inline(always)]
#[must_use]
pub fn encode(x: f32) -> u8 {
    let sign = ((x.to_bits() >> 24) & 0x80) as u8;
    let a = x.abs();
    let a = if a > MAX { MAX } else { a };
    let bits = a.to_bits();
    // Normal: keep 3 mantissa bits, round half to even, rebias. Subnormal: the code counts units of 2⁻⁹; adding
    // 2²³ to the count makes the FPU round it half to even.
    let normal = ((bits + 0x7_ffff + ((bits >> 20) & 1)) >> 20).wrapping_sub(120 << 3) as u8;
    let subnormal = (a * 512.0 + 8_388_608.0).to_bits() as u8;
    let code = if a < 0.015_625 { subnormal } else { normal };
    let code = if x.is_nan() { NAN } else { code };
    code | sign
}

/// `x` rounded to E4M3 and back: `decode(encode(x))`, without a table, so that it vectorises.
#[inline(always)]
#[must_use]
pub fn round(x: f32) -> f32 {
    /// The last bit of a sum with this is 2⁻⁹.
    const UNITS: f32 = 16_384.0;
    let a = x.abs();
    let a = if a > MAX { MAX } else { a };
    let bits = a.to_bits();
    let normal = f32::from_bits((bits.wrapping_add(0x7_ffff + ((bits >> 20) & 1))) & 0xfff0_0000);
    let subnormal = (a + UNITS) - UNITS;
    let value = if a < 0.015_625 { subnormal } else { normal };
    let value = if x.is_nan() { f32::NAN } else { value };
    value.copysign(x)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_survives_decode_and_encode() {
        for code in 0..=255u8 {
            if code & 0x7f == NAN {
                assert!(decode(code).is_nan());
                assert_eq!(encode(decode(code)) & 0x7f, NAN);
            } else {
                assert_eq!(encode(decode(code)), code);
            }
        }
        assert_eq!((decode(0x7e), decode(1), decode(8)), (448.0, MIN_POSITIVE, 2f32.powi(-6)));
    }

    #[test]
    fn between_any_two_neighbours_the_nearest_wins_and_ties_go_to_even() {
        for code in 0..0x7eu8 {
            let (low, high) = (decode(code), decode(code + 1));
            let tie = (low + high) / 2.0;
            let even = code + (code & 1);
            for sign in [0u8, 0x80] {
                let s = if sign == 0 { 1.0 } else { -1.0 };
                assert_eq!(encode(s * tie), even | sign);
                assert_eq!(encode(s * f32::from_bits(tie.to_bits() - 1)), code | sign);
                assert_eq!(encode(s * f32::from_bits(tie.to_bits() + 1)), (code + 1) | sign);
            }
        }
    }

    #[test]
    fn every_bf16_value_rounds_as_exhaustive_search_says() {
        for top in 0..=u16::MAX {
            let x = f32::from_bits(u32::from(top) << 16);
            let got = encode(x);
            if x.is_nan() {
                assert_eq!(got & 0x7f, NAN);
                continue;
            }
            let distance = |c: u8| (f64::from(decode(c)) - f64::from(x.clamp(-MAX, MAX))).abs();
            let best = (0..=255u8).filter(|c| c & 0x7f != NAN).map(distance).fold(f64::MAX, f64::min);
            assert_eq!(distance(got), best, "{x}");
        }
    }

    #[test]
    fn overflow_saturates_instead_of_becoming_nan() {
        assert_eq!(encode(464.1), 0x7e);
        assert_eq!(encode(f32::INFINITY), 0x7e);
        assert_eq!(encode(f32::NEG_INFINITY), 0xfe);
        assert_eq!(encode(-0.0), 0x80);
    }
}
