//! E8M0, the power-of-two block scale of MX formats: value 2^(b-127); 0xff is NaN.

use serde::{Deserialize, Serialize};

/// Code of NaN.
pub const NAN: u8 = 0xff;

/// How a quantizer picks the scale of a block from its amax. A stored weight's scales are read, never recomputed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ScaleRule {
    /// The smallest power of two with `amax / scale <= max_elem`: nothing saturates (ModelOpt, NVIDIA).
    Ceil,
    /// `floor(log2 amax) - emax_elem` (OCP MX v1.0): the largest elements may saturate.
    Floor,
    /// As `Floor` after rounding the mantissa of amax up from 1.75 (compressed-tensors 0.20, AMD Quark).
    Even,
}

/// Value of `code`; NaN for 0xff. Code 0 is the subnormal 2⁻¹²⁷.
#[inline(always)]
#[must_use]
pub fn decode(code: u8) -> f32 {
    match code {
        NAN => f32::NAN,
        0 => f32::from_bits(0x0040_0000),
        _ => f32::from_bits(u32::from(code) << 23),
    }
}

/// Scale code for a block of largest magnitude `amax` whose elements reach `max_elem` (exponent `emax_elem`).
///
/// An all-zero block gets the smallest scale. `amax` is finite and not negative.
#[inline(always)]
#[must_use]
pub fn scale_code(amax: f32, max_elem: f32, emax_elem: i32, rule: ScaleRule) -> u8 {
    let exponent = match rule {
        ScaleRule::Ceil => ceil_log2(f64::from(amax) / f64::from(max_elem)),
        ScaleRule::Floor => (amax.to_bits() >> 23) as i32 - 127 - emax_elem,
        ScaleRule::Even => (amax.to_bits().wrapping_add(1 << 21) >> 23) as i32 - 127 - emax_elem,
    };
    (exponent.clamp(-127, 127) + 127) as u8
}

/// Smallest integer `e` with `2^e >= x`; -1023 for 0 and subnormals.
#[inline(always)]
fn ceil_log2(x: f64) -> i32 {
    let bits = x.to_bits();
    let exponent = (bits >> 52) as i32 - 1023;
    exponent + i32::from(bits & ((1 << 52) - 1) != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::{e2m1, e4m3};

    #[test]
    fn every_code_is_its_power_of_two() {
        for code in 0..255u8 {
            assert_eq!(f64::from(decode(code)), 2f64.powi(i32::from(code) - 127));
        }
        assert!(decode(NAN).is_nan());
    }

    #[test]
    fn ceil_is_the_smallest_power_of_two_that_saturates_nothing() {
        for top in 0x0100..0x7f00u16 {
            let amax = f32::from_bits(u32::from(top) << 16);
            for (max, emax) in [(e2m1::MAX, e2m1::EMAX), (e4m3::MAX, e4m3::EMAX)] {
                let code = scale_code(amax, max, emax, ScaleRule::Ceil);
                let s = f64::from(decode(code));
                assert!(f64::from(amax) / s <= f64::from(max), "{amax}");
                assert!(code == 0 || f64::from(amax) / (s / 2.0) > f64::from(max), "{amax}");
            }
        }
    }

    #[test]
    fn floor_and_even_differ_only_from_mantissa_1_75() {
        for top in 0x2000..0x7f00u16 {
            let amax = f32::from_bits(u32::from(top) << 16);
            let mantissa = f32::from_bits((u32::from(top) << 16) & 0x007f_ffff | 0x3f80_0000);
            let floor = scale_code(amax, 6.0, 2, ScaleRule::Floor);
            let even = scale_code(amax, 6.0, 2, ScaleRule::Even);
            assert_eq!(even, if mantissa >= 1.75 { floor + 1 } else { floor }, "{amax}");
            assert_eq!(f64::from(decode(floor)), 2f64.powf(f64::from(amax).log2().floor() - 2.0));
        }
    }

    #[test]
    fn a_zero_block_gets_the_smallest_scale() {
        for rule in [ScaleRule::Ceil, ScaleRule::Floor, ScaleRule::Even] {
            assert_eq!(scale_code(0.0, 6.0, 2, rule), 0);
        }
    }
}
