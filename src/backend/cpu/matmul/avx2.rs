//! AVX2 with FMA: the 16 rows of a group in two registers. Equals `scalar` bit for bit.

use std::arch::x86_64::*;

use super::{FloatTile, GROUP, IntegerTile, TILE};
use crate::formats::e2m1;
use crate::formats::linear::Element;

/// Rows in one register.
const HALF: usize = GROUP / 2;

/// Doubled E2M1 values + 12: unsigned, as vpmaddubsw wants its first factor. Sums of a block stay below 2¹⁵.
const OFFSET_CODES: [u8; 16] = {
    let mut t = [0; 16];
    let mut i = 0;
    while i < 16 {
        t[i] = (e2m1::DOUBLED[i] + 12) as u8;
        i += 1;
    }
    t
};

/// # Safety
/// The CPU has the features below; the tile's slices cover `rows` (8, 4, 2 or 1) tokens.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn integer(t: &IntegerTile<'_>, rows: usize, acc: &mut [[f32; GROUP]; TILE]) {
    // 16 registers: two halves of at most 2 tokens, each with an integer and a float accumulator.
    let mut m = 0;
    while m < rows {
        let step = if rows - m >= 2 { 2 } else { 1 };
        let blocks = t.k / t.block;
        let part = IntegerTile {
            values: &t.values[m * t.k..],
            corrections: &t.corrections[m * blocks..],
            scales: &t.scales[m * blocks..],
            ..*t
        };
        // SAFETY: the caller's.
        unsafe {
            match step {
                2 => integer_rows::<2>(&part, &mut acc[m..]),
                _ => integer_rows::<1>(&part, &mut acc[m..]),
            }
        }
        m += step;
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn integer_rows<const M: usize>(t: &IntegerTile<'_>, acc: &mut [[f32; GROUP]]) {
    let blocks = t.k / t.block;
    let chunks = t.block / 8;
    debug_assert!(t.weights.len() >= t.k * GROUP / 2 && t.values.len() >= M * t.k);
    debug_assert!(t.scales.len() >= M * blocks && t.corrections.len() >= M * blocks);
    // SAFETY: every access is below the lengths asserted above, by the shapes that `packed` and `activation` make.
    unsafe {
        let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(OFFSET_CODES.as_ptr().cast()));
        let nibble = _mm256_set1_epi8(15);
        let ones = _mm256_set1_epi16(1);
        let mut sum = [[_mm256_setzero_ps(); 2]; M];
        let mut weights = t.weights.as_ptr();
        let values = t.values.as_ptr();
        for b in 0..blocks {
            let mut dot = [[_mm256_setzero_si256(); 2]; M];
            for c in 0..chunks {
                for h in 0..2 {
                    let packed = _mm256_loadu_si256(weights.add(4 * HALF * h).cast());
                    let low = _mm256_shuffle_epi8(table, _mm256_and_si256(packed, nibble));
                    let high = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(packed, 4), nibble));
                    for m in 0..M {
                        let x = values.add(m * t.k + b * t.block + 8 * c).cast::<i32>();
                        let first = _mm256_maddubs_epi16(low, _mm256_set1_epi32(x.read_unaligned()));
                        let second = _mm256_maddubs_epi16(high, _mm256_set1_epi32(x.add(1).read_unaligned()));
                        dot[m][h] = _mm256_add_epi16(dot[m][h], _mm256_add_epi16(first, second));
                    }
                }
                weights = weights.add(4 * GROUP);
            }
            for m in 0..M {
                let correction = _mm256_set1_epi32(*t.corrections.get_unchecked(m * blocks + b));
                let x_scale = _mm256_set1_ps(*t.scales.get_unchecked(m * blocks + b));
                for h in 0..2 {
                    let scale = _mm256_loadu_ps(t.weight_scales.get_unchecked(b).as_ptr().add(HALF * h));
                    let exact = _mm256_add_epi32(_mm256_madd_epi16(dot[m][h], ones), correction);
                    sum[m][h] = _mm256_fmadd_ps(_mm256_mul_ps(scale, x_scale), _mm256_cvtepi32_ps(exact), sum[m][h]);
                }
            }
        }
        for m in 0..M {
            for h in 0..2 {
                _mm256_storeu_ps(acc[m].as_mut_ptr().add(HALF * h), sum[m][h]);
            }
        }
    }
}

/// # Safety
/// The CPU has the features below; the tile's slices cover `rows` (8, 4, 2 or 1) tokens.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn float(t: &FloatTile<'_>, rows: usize, acc: &mut [[f32; GROUP]; TILE]) {
    // 16 registers: one half at a time of at most 4 tokens.
    let mut m = 0;
    while m < rows {
        let step = tile(rows - m);
        let part = FloatTile { values: &t.values[m * t.k..], scales: &t.scales[m * t.scale_stride..], ..*t };
        for half in 0..2 {
            // SAFETY: the caller's.
            unsafe {
                match step {
                    4 => float_rows::<4>(&part, half, &mut acc[m..]),
                    2 => float_rows::<2>(&part, half, &mut acc[m..]),
                    _ => float_rows::<1>(&part, half, &mut acc[m..]),
                }
            }
        }
        m += step;
    }
}

fn tile(rows: usize) -> usize {
    match rows {
        4.. => 4,
        2..4 => 2,
        _ => 1,
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn float_rows<const M: usize>(t: &FloatTile<'_>, half: usize, acc: &mut [[f32; GROUP]]) {
    let blocks = t.k.div_ceil(t.block);
    debug_assert!(t.weights.len() >= GROUP * t.element.row_bytes(t.k) && t.values.len() >= M * t.k);
    debug_assert!(t.scales.len() >= (M - 1) * t.scale_stride + blocks && t.weight_scales.len() >= blocks);
    // SAFETY: every access is below the lengths asserted above, by the shapes that `packed` and `activation` make.
    unsafe {
        let mut sum = [_mm256_setzero_ps(); M];
        let mut weights = t.weights.as_ptr();
        let mut values = t.values.as_ptr();
        for b in 0..blocks {
            let mut dot = [_mm256_setzero_ps(); M];
            for _ in 0..(t.k - b * t.block).min(t.block) / 8 {
                for i in 0..8 {
                    let w = decode(t.element, weights, half, i);
                    for m in 0..M {
                        dot[m] = _mm256_fmadd_ps(w, _mm256_set1_ps(*values.add(m * t.k + i)), dot[m]);
                    }
                }
                weights = weights.add(GROUP * t.element.row_bytes(8));
                values = values.add(8);
            }
            let scale = _mm256_loadu_ps(t.weight_scales.get_unchecked(b).as_ptr().add(HALF * half));
            for m in 0..M {
                let s = _mm256_mul_ps(scale, _mm256_set1_ps(*t.scales.get_unchecked(m * t.scale_stride + b)));
                sum[m] = _mm256_fmadd_ps(s, dot[m], sum[m]);
            }
        }
        for m in 0..M {
            _mm256_storeu_ps(acc[m].as_mut_ptr().add(HALF * half), sum[m]);
        }
    }
}

/// Element `i` of 8 consecutive k, 8 rows (the first or second half of the group), in f32.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn decode(element: Element, p: *const u8, half: usize, i: usize) -> __m256 {
    // SAFETY: the caller gives 8 · 16 readable elements.
    unsafe {
        match element {
            Element::E2m1 => {
                let words = _mm256_loadu_si256(p.add(32 * half).cast());
                // Byte i of a word holds k = i low and k = 4 + i high.
                let shift = _mm_cvtsi32_si128((8 * (i % 4) + 4 * (i / 4)) as i32);
                let code = _mm256_srl_epi32(words, shift);
                // vpermps reads the low three bits: the magnitude; bit 3 is the sign.
                let magnitude = _mm256_permutevar8x32_ps(_mm256_loadu_ps(e2m1::VALUES.as_ptr()), code);
                let sign = _mm256_and_si256(_mm256_slli_epi32(code, 28), _mm256_set1_epi32(i32::MIN));
                _mm256_or_ps(magnitude, _mm256_castsi256_ps(sign))
            }
            Element::E4m3 => {
                const TWO_120: f32 = f32::from_bits((120 + 127) << 23);
                let words = _mm256_loadu_si256(p.add(64 * (i / 4) + 32 * half).cast());
                let top = _mm256_sll_epi32(words, _mm_cvtsi32_si128(24 - 8 * (i % 4) as i32));
                let sign = _mm256_and_si256(top, _mm256_set1_epi32(i32::MIN));
                let magnitude = _mm256_and_si256(_mm256_srli_epi32(top, 4), _mm256_set1_epi32(0x07f0_0000));
                let bits = _mm256_castsi256_ps(_mm256_or_si256(sign, magnitude));
                _mm256_mul_ps(bits, _mm256_set1_ps(TWO_120))
            }
            Element::Bf16 => {
                let half = _mm_loadu_si128(p.add(32 * i + 16 * half).cast());
                _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))
            }
            Element::F16 => _mm256_cvtph_ps(_mm_loadu_si128(p.add(32 * i + 16 * half).cast())),
            Element::F32 => _mm256_loadu_ps(p.add(64 * i + 32 * half).cast()),
        }
    }
}
