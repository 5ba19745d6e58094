//! AVX2 with FMA: the 16 rows of a group in two registers. Equals `scalar` bit for bit.

use std::arch::x86_64::*;

use super::{FloatTile, GROUP, IntegerTile, OFFSET_CODES, TILE};
use crate::formats::e2m1;
use crate::formats::linear::Element;

/// Rows in one register.
const HALF: usize = GROUP / 2;

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
    assert!(t.weights.len() >= t.k * GROUP / 2 && t.values.len() >= M * t.k);
    assert!(t.scales.len() >= M * blocks && t.corrections.len() >= M * blocks);
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
                let correction = _mm256_set1_epi32(t.corrections.as_ptr().add(m * blocks + b).read_unaligned());
                let x_scale = _mm256_set1_ps(t.scales.as_ptr().add(m * blocks + b).read_unaligned());
                for h in 0..2 {
                    let scale = _mm256_loadu_ps(t.weight_scales.as_ptr().add(b).cast::<f32>().add(HALF * h));
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
    macro_rules! tiles {
        ($kernel:ident, $part:expr, $step:expr, $half:expr, $acc:expr) => {
            // SAFETY: the caller's.
            unsafe {
                match $step {
                    4 => $kernel::<4>($part, $half, $acc),
                    2 => $kernel::<2>($part, $half, $acc),
                    _ => $kernel::<1>($part, $half, $acc),
                }
            }
        };
    }
    // 16 registers: one half at a time of at most 4 tokens.
    let mut m = 0;
    while m < rows {
        let step = if rows - m >= 4 { 4 } else { (rows - m).min(2) };
        let part = FloatTile { values: &t.values[m * t.k..], scales: &t.scales[m * t.scale_stride..], ..*t };
        for half in 0..2 {
            match t.element {
                Element::E2m1 => tiles!(float_e2m1, &part, step, half, &mut acc[m..]),
                Element::E4m3 => tiles!(float_e4m3, &part, step, half, &mut acc[m..]),
                Element::Bf16 => tiles!(float_bf16, &part, step, half, &mut acc[m..]),
                Element::F16 => tiles!(float_f16, &part, step, half, &mut acc[m..]),
                Element::F32 => tiles!(float_f32, &part, step, half, &mut acc[m..]),
            }
        }
        m += step;
    }
}

/// The kernel of one element for 8 rows, the first or second half of the group: `$load` makes what 8 consecutive k need
/// from pointer `$p`, `$decode` one k of it in f32. A macro for the reason given in `avx512`.
macro_rules! float_kernel {
    ($name:ident, $chunk_bytes:literal, $p:ident, $half:ident, $state:ident = $load:expr, $($k:literal => $decode:expr),+ $(,)?) => {
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn $name<const M: usize>(t: &FloatTile<'_>, $half: usize, acc: &mut [[f32; GROUP]]) {
            let blocks = t.k.div_ceil(t.block);
            assert!(t.weights.len() >= t.k / 8 * $chunk_bytes && t.values.len() >= M * t.k);
            assert!(t.scales.len() >= (M - 1) * t.scale_stride + blocks && t.weight_scales.len() >= blocks);
            // SAFETY: every access is below the lengths asserted above, by the shapes that `packed` and `activation`
            // make.
            unsafe {
                let mut sum = [_mm256_setzero_ps(); M];
                let mut weights = t.weights.as_ptr();
                let mut values = t.values.as_ptr();
                for b in 0..blocks {
                    let mut dot = [_mm256_setzero_ps(); M];
                    for _ in 0..(t.k - b * t.block).min(t.block) / 8 {
                        let $p = weights;
                        let $state = $load;
                        $(
                            let w = $decode;
                            for m in 0..M {
                                let x = values.add(m * t.k + $k).read_unaligned();
                                dot[m] = _mm256_fmadd_ps(w, _mm256_set1_ps(x), dot[m]);
                            }
                        )+
                        weights = weights.add($chunk_bytes);
                        values = values.add(8);
                    }
                    let scale = _mm256_loadu_ps(t.weight_scales.as_ptr().add(b).cast::<f32>().add(HALF * $half));
                    for m in 0..M {
                        let x = t.scales.as_ptr().add(m * t.scale_stride + b).read_unaligned();
                        sum[m] = _mm256_fmadd_ps(_mm256_mul_ps(scale, _mm256_set1_ps(x)), dot[m], sum[m]);
                    }
                }
                for m in 0..M {
                    _mm256_storeu_ps(acc[m].as_mut_ptr().add(HALF * $half), sum[m]);
                }
            }
        }
    };
}

// Byte i of a word holds k = i low and k = 4 + i high.
float_kernel!(float_e2m1, 64, p, half,
    s = (_mm256_loadu_si256(p.add(32 * half).cast()), _mm256_loadu_ps(e2m1::VALUES.as_ptr())),
    0 => e2m1(s.0, s.1),
    1 => e2m1(_mm256_srli_epi32(s.0, 8), s.1),
    2 => e2m1(_mm256_srli_epi32(s.0, 16), s.1),
    3 => e2m1(_mm256_srli_epi32(s.0, 24), s.1),
    4 => e2m1(_mm256_srli_epi32(s.0, 4), s.1),
    5 => e2m1(_mm256_srli_epi32(s.0, 12), s.1),
    6 => e2m1(_mm256_srli_epi32(s.0, 20), s.1),
    7 => e2m1(_mm256_srli_epi32(s.0, 28), s.1),
);
float_kernel!(float_e4m3, 128, p, half,
    s = (_mm256_loadu_si256(p.add(32 * half).cast()), _mm256_loadu_si256(p.add(64 + 32 * half).cast())),
    0 => e4m3(_mm256_slli_epi32(s.0, 24)),
    1 => e4m3(_mm256_slli_epi32(s.0, 16)),
    2 => e4m3(_mm256_slli_epi32(s.0, 8)),
    3 => e4m3(s.0),
    4 => e4m3(_mm256_slli_epi32(s.1, 24)),
    5 => e4m3(_mm256_slli_epi32(s.1, 16)),
    6 => e4m3(_mm256_slli_epi32(s.1, 8)),
    7 => e4m3(s.1),
);
float_kernel!(float_bf16, 256, p, half, s = p.add(16 * half),
    0 => bf16(s), 1 => bf16(s.add(32)), 2 => bf16(s.add(64)), 3 => bf16(s.add(96)),
    4 => bf16(s.add(128)), 5 => bf16(s.add(160)), 6 => bf16(s.add(192)), 7 => bf16(s.add(224)),
);
float_kernel!(float_f16, 256, p, half, s = p.add(16 * half),
    0 => f16(s), 1 => f16(s.add(32)), 2 => f16(s.add(64)), 3 => f16(s.add(96)),
    4 => f16(s.add(128)), 5 => f16(s.add(160)), 6 => f16(s.add(192)), 7 => f16(s.add(224)),
);
float_kernel!(float_f32, 512, p, half, s = p.cast::<f32>().add(HALF * half),
    0 => _mm256_loadu_ps(s), 1 => _mm256_loadu_ps(s.add(16)), 2 => _mm256_loadu_ps(s.add(32)),
    3 => _mm256_loadu_ps(s.add(48)), 4 => _mm256_loadu_ps(s.add(64)), 5 => _mm256_loadu_ps(s.add(80)),
    6 => _mm256_loadu_ps(s.add(96)), 7 => _mm256_loadu_ps(s.add(112)),
);

/// The E2M1 code in the low four bits of each word, in f32: vpermps reads the magnitude's three bits of an index; bit 3
/// is the sign.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn e2m1(words: __m256i, table: __m256) -> __m256 {
    let sign = _mm256_and_si256(_mm256_slli_epi32(words, 28), _mm256_set1_epi32(i32::MIN));
    _mm256_or_ps(_mm256_permutevar8x32_ps(table, words), _mm256_castsi256_ps(sign))
}

/// The E4M3 code in the top byte of each word, in f32; as in `avx512`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn e4m3(words: __m256i) -> __m256 {
    const TWO_120: f32 = f32::from_bits((120 + 127) << 23);
    let sign = _mm256_and_si256(words, _mm256_set1_epi32(i32::MIN));
    let magnitude = _mm256_and_si256(_mm256_srli_epi32(words, 4), _mm256_set1_epi32(0x07f0_0000));
    _mm256_mul_ps(_mm256_castsi256_ps(_mm256_or_si256(sign, magnitude)), _mm256_set1_ps(TWO_120))
}

/// 8 BF16 in f32.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn bf16(p: *const u8) -> __m256 {
    // SAFETY: the caller gives 16 readable bytes.
    let half = unsafe { _mm_loadu_si128(p.cast()) };
    _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))
}

/// 8 F16 in f32.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn f16(p: *const u8) -> __m256 {
    // SAFETY: the caller gives 16 readable bytes.
    _mm256_cvtph_ps(unsafe { _mm_loadu_si128(p.cast()) })
}
