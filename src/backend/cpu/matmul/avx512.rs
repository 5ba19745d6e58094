//! AVX-512 with VNNI: 16 rows in one register. Equals `scalar` bit for bit.

use std::arch::x86_64::*;

use super::{FloatTile, GROUP, IntegerTile, TILE};
use crate::formats::e2m1;
use crate::formats::linear::Element;

/// Doubled E2M1 values + 12: unsigned, as vpdpbusd wants its first factor.
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
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) unsafe fn integer(t: &IntegerTile<'_>, rows: usize, acc: &mut [[f32; GROUP]; TILE]) {
    // SAFETY: the caller's.
    unsafe {
        match rows {
            8 => integer_rows::<8>(t, acc),
            4 => integer_rows::<4>(t, acc),
            2 => integer_rows::<2>(t, acc),
            _ => integer_rows::<1>(t, acc),
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn integer_rows<const M: usize>(t: &IntegerTile<'_>, acc: &mut [[f32; GROUP]; TILE]) {
    let blocks = t.k / t.block;
    let chunks = t.block / 8;
    debug_assert!(t.weights.len() >= t.k * GROUP / 2 && t.values.len() >= M * t.k);
    debug_assert!(t.scales.len() >= M * blocks && t.corrections.len() >= M * blocks);
    // SAFETY: every access is below the lengths asserted above, by the shapes that `packed` and `activation` make.
    unsafe {
        let table = _mm512_broadcast_i32x4(_mm_loadu_si128(OFFSET_CODES.as_ptr().cast()));
        let nibble = _mm512_set1_epi8(15);
        let mut sum = [_mm512_setzero_ps(); M];
        let mut weights = t.weights.as_ptr();
        let values = t.values.as_ptr();
        for b in 0..blocks {
            let mut dot = [_mm512_setzero_si512(); M];
            for m in 0..M {
                dot[m] = _mm512_set1_epi32(*t.corrections.get_unchecked(m * blocks + b));
            }
            for c in 0..chunks {
                let packed = _mm512_loadu_si512(weights.cast());
                weights = weights.add(4 * GROUP);
                let low = _mm512_shuffle_epi8(table, _mm512_and_si512(packed, nibble));
                let high = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(packed, 4), nibble));
                for m in 0..M {
                    let x = values.add(m * t.k + b * t.block + 8 * c).cast::<i32>();
                    dot[m] = _mm512_dpbusd_epi32(dot[m], low, _mm512_set1_epi32(x.read_unaligned()));
                    dot[m] = _mm512_dpbusd_epi32(dot[m], high, _mm512_set1_epi32(x.add(1).read_unaligned()));
                }
            }
            let scale = _mm512_loadu_ps(t.weight_scales.get_unchecked(b).as_ptr());
            for m in 0..M {
                let s = _mm512_mul_ps(scale, _mm512_set1_ps(*t.scales.get_unchecked(m * blocks + b)));
                sum[m] = _mm512_fmadd_ps(s, _mm512_cvtepi32_ps(dot[m]), sum[m]);
            }
        }
        for m in 0..M {
            _mm512_storeu_ps(acc[m].as_mut_ptr(), sum[m]);
        }
    }
}

const E2M1: u8 = 0;
const E4M3: u8 = 1;
const BF16: u8 = 2;
const F16: u8 = 3;
const F32: u8 = 4;

/// # Safety
/// The CPU has the features below; the tile's slices cover `rows` (8, 4, 2 or 1) tokens.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) unsafe fn float(t: &FloatTile<'_>, rows: usize, acc: &mut [[f32; GROUP]; TILE]) {
    // SAFETY: the caller's.
    unsafe {
        match t.element {
            Element::E2m1 => float_element::<E2M1>(t, rows, acc),
            Element::E4m3 => float_element::<E4M3>(t, rows, acc),
            Element::Bf16 => float_element::<BF16>(t, rows, acc),
            Element::F16 => float_element::<F16>(t, rows, acc),
            Element::F32 => float_element::<F32>(t, rows, acc),
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn float_element<const ELEMENT: u8>(t: &FloatTile<'_>, rows: usize, acc: &mut [[f32; GROUP]; TILE]) {
    // SAFETY: the caller's.
    unsafe {
        match rows {
            8 => float_rows::<ELEMENT, 8>(t, acc),
            4 => float_rows::<ELEMENT, 4>(t, acc),
            2 => float_rows::<ELEMENT, 2>(t, acc),
            _ => float_rows::<ELEMENT, 1>(t, acc),
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn float_rows<const ELEMENT: u8, const M: usize>(t: &FloatTile<'_>, acc: &mut [[f32; GROUP]; TILE]) {
    let blocks = t.k.div_ceil(t.block);
    debug_assert!(t.weights.len() >= GROUP * t.element.row_bytes(t.k) && t.values.len() >= M * t.k);
    debug_assert!(t.scales.len() >= (M - 1) * t.scale_stride + blocks && t.weight_scales.len() >= blocks);
    // SAFETY: every access is below the lengths asserted above, by the shapes that `packed` and `activation` make.
    unsafe {
        let mut sum = [_mm512_setzero_ps(); M];
        let mut weights = t.weights.as_ptr();
        let mut values = t.values.as_ptr();
        for b in 0..blocks {
            let mut dot = [_mm512_setzero_ps(); M];
            for _ in 0..(t.k - b * t.block).min(t.block) / 8 {
                let w = decode8::<ELEMENT>(weights);
                for (i, w) in w.into_iter().enumerate() {
                    for m in 0..M {
                        dot[m] = _mm512_fmadd_ps(w, _mm512_set1_ps(*values.add(m * t.k + i)), dot[m]);
                    }
                }
                weights = weights.add(GROUP * t.element.row_bytes(8));
                values = values.add(8);
            }
            let scale = _mm512_loadu_ps(t.weight_scales.get_unchecked(b).as_ptr());
            for m in 0..M {
                let s = _mm512_mul_ps(scale, _mm512_set1_ps(*t.scales.get_unchecked(m * t.scale_stride + b)));
                sum[m] = _mm512_fmadd_ps(s, dot[m], sum[m]);
            }
        }
        for m in 0..M {
            _mm512_storeu_ps(acc[m].as_mut_ptr(), sum[m]);
        }
    }
}

/// 8 consecutive k of 16 rows in f32.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn decode8<const ELEMENT: u8>(p: *const u8) -> [__m512; 8] {
    let mut out = [_mm512_setzero_ps(); 8];
    // SAFETY: the caller gives 8 · 16 readable elements.
    unsafe {
        match ELEMENT {
            E2M1 => {
                let table = _mm512_loadu_ps(e2m1::VALUES.as_ptr());
                let words = _mm512_loadu_si512(p.cast());
                // vpermps reads the low four bits of each index. Byte i of a word holds k = i low and k = 4 + i high.
                out[0] = _mm512_permutexvar_ps(words, table);
                out[1] = _mm512_permutexvar_ps(_mm512_srli_epi32(words, 8), table);
                out[2] = _mm512_permutexvar_ps(_mm512_srli_epi32(words, 16), table);
                out[3] = _mm512_permutexvar_ps(_mm512_srli_epi32(words, 24), table);
                out[4] = _mm512_permutexvar_ps(_mm512_srli_epi32(words, 4), table);
                out[5] = _mm512_permutexvar_ps(_mm512_srli_epi32(words, 12), table);
                out[6] = _mm512_permutexvar_ps(_mm512_srli_epi32(words, 20), table);
                out[7] = _mm512_permutexvar_ps(_mm512_srli_epi32(words, 28), table);
            }
            E4M3 => {
                for half in 0..2 {
                    let words = _mm512_loadu_si512(p.add(64 * half).cast());
                    out[4 * half] = e4m3(_mm512_slli_epi32(words, 24));
                    out[4 * half + 1] = e4m3(_mm512_slli_epi32(words, 16));
                    out[4 * half + 2] = e4m3(_mm512_slli_epi32(words, 8));
                    out[4 * half + 3] = e4m3(words);
                }
            }
            BF16 => {
                for (i, o) in out.iter_mut().enumerate() {
                    let half = _mm256_loadu_si256(p.add(32 * i).cast());
                    *o = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
                }
            }
            F16 => {
                for (i, o) in out.iter_mut().enumerate() {
                    *o = _mm512_cvtph_ps(_mm256_loadu_si256(p.add(32 * i).cast()));
                }
            }
            _ => {
                for (i, o) in out.iter_mut().enumerate() {
                    *o = _mm512_loadu_ps(p.add(64 * i).cast());
                }
            }
        }
    }
    out
}

/// The E4M3 code in the top byte of each word, in f32.
///
/// Exponent and mantissa moved into place make 2^-120 times the value (subnormals included); the product is exact.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn e4m3(words: __m512i) -> __m512 {
    const TWO_120: f32 = f32::from_bits((120 + 127) << 23);
    let sign = _mm512_and_si512(words, _mm512_set1_epi32(i32::MIN));
    let magnitude = _mm512_and_si512(_mm512_srli_epi32(words, 4), _mm512_set1_epi32(0x07f0_0000));
    let bits = _mm512_or_si512(sign, magnitude);
    _mm512_mul_ps(_mm512_castsi512_ps(bits), _mm512_set1_ps(TWO_120))
}
