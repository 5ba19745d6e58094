//! AVX-512 with VNNI: 16 rows in one register. Equals `scalar` bit for bit.

use std::arch::x86_64::*;

use super::{BytesTile, FloatTile, GROUP, IntegerTile, OFFSET_CODES, Scales, TILE, TWO_120, ahead};
use crate::formats::e2m1;
use crate::formats::linear::Element;

/// # Safety
/// The CPU has the features below; the tile's slices cover `rows` (8, 4, 2 or 1) tokens.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) unsafe fn integer(t: &IntegerTile<'_>, rows: usize, acc: &mut [[f32; GROUP]; TILE]) {
    // SAFETY: the caller's.
    unsafe {
        match (rows, t.streamed) {
            (8, true) => integer_rows::<8, true>(t, acc),
            (8, false) => integer_rows::<8, false>(t, acc),
            (4, true) => integer_rows::<4, true>(t, acc),
            (4, false) => integer_rows::<4, false>(t, acc),
            (2, true) => integer_rows::<2, true>(t, acc),
            (2, false) => integer_rows::<2, false>(t, acc),
            (_, true) => integer_rows::<1, true>(t, acc),
            (_, false) => integer_rows::<1, false>(t, acc),
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn integer_rows<const M: usize, const STREAMED: bool>(t: &IntegerTile<'_>, acc: &mut [[f32; GROUP]; TILE]) {
    let blocks = t.k / t.block;
    let chunks = t.block / 8;
    assert!(t.weights.len() >= t.k * GROUP / 2 && t.values.len() >= M * t.k);
    assert!(t.scales.len() >= M * blocks && t.corrections.len() >= M * blocks && t.weight_scales.cover(blocks));
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
                dot[m] = _mm512_set1_epi32(t.corrections.as_ptr().add(m * blocks + b).read_unaligned());
            }
            for c in 0..chunks {
                if STREAMED {
                    _mm_prefetch::<_MM_HINT_T0>(weights.wrapping_add(ahead(M)).cast());
                }
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
            let scale = scales(t.weight_scales, b);
            for m in 0..M {
                let s = _mm512_mul_ps(scale, _mm512_set1_ps(t.scales.as_ptr().add(m * blocks + b).read_unaligned()));
                sum[m] = _mm512_fmadd_ps(s, _mm512_cvtepi32_ps(dot[m]), sum[m]);
            }
        }
        for m in 0..M {
            _mm512_storeu_ps(acc[m].as_mut_ptr(), sum[m]);
        }
    }
}

/// # Safety
/// The CPU has the features below; the tile's slices cover `rows` (4, 2 or 1) tokens and its groups (2 or 1).
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) unsafe fn bytes(t: &BytesTile<'_>, rows: usize, acc: &mut [[f32; GROUP]; TILE]) {
    // SAFETY: the caller's.
    unsafe {
        match (rows, t.groups) {
            (4, 2) => bytes_rows::<4, 2>(t, acc),
            (4, _) => bytes_rows::<4, 1>(t, acc),
            (2, 2) => bytes_rows::<2, 2>(t, acc),
            (2, _) => bytes_rows::<2, 1>(t, acc),
            (_, 2) => bytes_rows::<1, 2>(t, acc),
            _ => bytes_rows::<1, 1>(t, acc),
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn bytes_rows<const M: usize, const G: usize>(t: &BytesTile<'_>, acc: &mut [[f32; GROUP]; TILE]) {
    let blocks = t.k / t.block;
    assert!(t.groups == G && t.weights.len() >= G * t.k * GROUP && t.weight_scales.len() >= G * blocks * GROUP);
    assert!(t.values.len() >= M * t.k && t.scales.len() >= M * blocks && t.corrections.len() >= M * blocks);
    // SAFETY: every access is below the lengths asserted above.
    unsafe {
        let mut sum = [[_mm512_setzero_ps(); M]; G];
        let mut weights = t.weights.as_ptr();
        let mut values = t.values.as_ptr();
        for b in 0..blocks {
            let mut dot = [[_mm512_setzero_si512(); M]; G];
            for m in 0..M {
                let correction = _mm512_set1_epi32(t.corrections.as_ptr().add(m * blocks + b).read_unaligned());
                for g in 0..G {
                    dot[g][m] = correction;
                }
            }
            for _ in 0..t.block / 16 {
                for c in 0..4 {
                    let mut w = [_mm512_setzero_si512(); G];
                    for g in 0..G {
                        w[g] = _mm512_loadu_si512(weights.add(g * t.k * GROUP + 4 * c * GROUP).cast());
                    }
                    for m in 0..M {
                        let x = values.add(m * t.k + 4 * c).cast::<i32>().read_unaligned();
                        for g in 0..G {
                            dot[g][m] = _mm512_dpbusd_epi32(dot[g][m], w[g], _mm512_set1_epi32(x));
                        }
                    }
                }
                weights = weights.add(16 * GROUP);
                values = values.add(16);
            }
            let mut scale = [_mm512_setzero_ps(); G];
            for g in 0..G {
                scale[g] = _mm512_loadu_ps(t.weight_scales.as_ptr().add((g * blocks + b) * GROUP));
            }
            for m in 0..M {
                let x = _mm512_set1_ps(t.scales.as_ptr().add(m * blocks + b).read_unaligned());
                for g in 0..G {
                    sum[g][m] = _mm512_fmadd_ps(_mm512_mul_ps(scale[g], x), _mm512_cvtepi32_ps(dot[g][m]), sum[g][m]);
                }
            }
        }
        for g in 0..G {
            for m in 0..M {
                _mm512_storeu_ps(acc[g * M + m].as_mut_ptr(), sum[g][m]);
            }
        }
    }
}

/// What [`BytesTile`] has of packed elements and scales of some groups.
///
/// # Safety
/// The CPU has the features below.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) unsafe fn decode_bytes(packed: &[u8], of: Scales<'_>, bytes: &mut [u8], values: &mut [f32]) {
    let (packed, bytes) = (packed.as_chunks::<{ 4 * GROUP }>().0, bytes.as_chunks_mut::<{ 8 * GROUP }>().0);
    assert!(of.cover(values.len() / GROUP));
    // SAFETY: a chunk of the packed elements and its bytes; there are as many scales as asserted above.
    unsafe {
        let table = _mm512_broadcast_i32x4(_mm_loadu_si128(OFFSET_CODES.as_ptr().cast()));
        let nibble = _mm512_set1_epi8(15);
        for (packed, bytes) in packed.iter().zip(bytes) {
            let packed = _mm512_loadu_si512(packed.as_ptr().cast());
            let low = _mm512_shuffle_epi8(table, _mm512_and_si512(packed, nibble));
            let high = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(packed, 4), nibble));
            _mm512_storeu_si512(bytes.as_mut_ptr().cast(), low);
            _mm512_storeu_si512(bytes.as_mut_ptr().add(4 * GROUP).cast(), high);
        }
        for (i, values) in values.as_chunks_mut::<GROUP>().0.iter_mut().enumerate() {
            _mm512_storeu_ps(values.as_mut_ptr(), scales(of, i));
        }
    }
}

/// The scales of the 16 rows in block `i`.
///
/// # Safety
/// There are more than `i`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn scales(scales: Scales<'_>, i: usize) -> __m512 {
    // SAFETY: the caller's, in every arm.
    let codes = |codes: &[[u8; GROUP]]| unsafe { _mm512_cvtepu8_epi32(_mm_loadu_si128(codes.as_ptr().add(i).cast())) };
    match scales {
        Scales::None => _mm512_set1_ps(1.0),
        // As `e4m3` below, without a sign.
        Scales::E4m3(c) => _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(codes(c), 20)), _mm512_set1_ps(TWO_120)),
        // Code 0 is 2^-127, which is no normal number.
        Scales::E8m0(c) => {
            let normal = _mm512_slli_epi32(codes(c), 23);
            _mm512_castsi512_ps(_mm512_max_epi32(normal, _mm512_set1_epi32(0x0040_0000)))
        }
        // SAFETY: as above.
        Scales::Grid(values) => _mm512_set1_ps(unsafe { *values.as_ptr().add(i) }),
    }
}

/// # Safety
/// The CPU has the features below; the tile's slices cover `rows` (8, 4, 2 or 1) tokens; `rows` times its groups (4, 2 or 1)
/// are 8 at most.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) unsafe fn float(t: &FloatTile<'_>, rows: usize, acc: &mut [[f32; GROUP]; TILE]) {
    macro_rules! tiles {
        ($kernel:ident) => {
            // SAFETY: the caller's.
            unsafe {
                match (rows, t.groups) {
                    (8, 1) => $kernel::<8, 1>(t, acc),
                    (4, 2) => $kernel::<4, 2>(t, acc),
                    (4, 1) => $kernel::<4, 1>(t, acc),
                    (2, 4) => $kernel::<2, 4>(t, acc),
                    (2, 2) => $kernel::<2, 2>(t, acc),
                    (2, 1) => $kernel::<2, 1>(t, acc),
                    (1, 4) => $kernel::<1, 4>(t, acc),
                    (1, 2) => $kernel::<1, 2>(t, acc),
                    _ => $kernel::<1, 1>(t, acc),
                }
            }
        };
    }
    match t.element {
        Element::E2m1 => tiles!(float_e2m1),
        Element::E4m3 => tiles!(float_e4m3),
        Element::Bf16 => tiles!(float_bf16),
        Element::F16 => tiles!(float_f16),
        Element::F32 => tiles!(float_f32),
    }
}

/// A group's elements in f32, per k one of each row.
///
/// # Safety
/// The CPU has the features below.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) unsafe fn decode(element: Element, packed: &[u8], values: &mut [f32]) {
    // SAFETY: the caller's.
    unsafe {
        match element {
            Element::E2m1 => decode_e2m1(packed, values),
            Element::E4m3 => decode_e4m3(packed, values),
            Element::Bf16 => decode_bf16(packed, values),
            Element::F16 => decode_f16(packed, values),
            Element::F32 => decode_f32(packed, values),
        }
    }
}

/// The kernel of one element, and what decodes it alone: `$load` makes what 8 consecutive k of 16 rows need from pointer `$p`, `$decode` one k of
/// it in f32. A macro, because a function with target features cannot be forced inline, and a call in the inner loop
/// would spill every accumulator.
macro_rules! float_kernel {
    ($name:ident, $decode_name:ident, $chunk_bytes:literal, $p:ident, $state:ident = $load:expr, $($k:literal => $decode:expr),+ $(,)?) => {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
        unsafe fn $name<const M: usize, const G: usize>(t: &FloatTile<'_>, acc: &mut [[f32; GROUP]; TILE]) {
            let blocks = t.k.div_ceil(t.block);
            let group_bytes = t.k / 8 * $chunk_bytes;
            assert!(t.groups == G && t.weights.len() >= G * group_bytes && t.values.len() >= M * t.k);
            assert!(t.scales_cover(M));
            // SAFETY: every access is below the lengths asserted above, by the shapes that `packed` and `activation`
            // make.
            unsafe {
                let mut sum = [[_mm512_setzero_ps(); M]; G];
                let mut weights = t.weights.as_ptr();
                let mut values = t.values.as_ptr();
                for b in 0..blocks {
                    let mut dot = [[_mm512_setzero_ps(); M]; G];
                    for _ in 0..(t.k - b * t.block).min(t.block) / 8 {
                        // Elements of two bytes are read fast enough by so many streams as there are groups.
                        if t.streamed && (M >= 4 || $chunk_bytes <= 128) {
                            let ahead = ahead(M) / G;
                            // After a group's end comes what the next tile reads.
                            let read = weights.offset_from_unsigned(t.weights.as_ptr());
                            let over = if read + ahead < group_bytes { 0 } else { (G - 1) * group_bytes };
                            for g in 0..G {
                                for line in (0..$chunk_bytes).step_by(64) {
                                    let at = weights.wrapping_add(g * group_bytes + line + ahead + over);
                                    _mm_prefetch::<_MM_HINT_T0>(at.cast());
                                }
                            }
                        }
                        $(
                            for g in 0..G {
                                let $p = weights.add(g * group_bytes);
                                let $state = $load;
                                let w = $decode;
                                for m in 0..M {
                                    let x = values.add(m * t.k + $k).read_unaligned();
                                    dot[g][m] = _mm512_fmadd_ps(w, _mm512_set1_ps(x), dot[g][m]);
                                }
                            }
                        )+
                        weights = weights.add($chunk_bytes);
                        values = values.add(8);
                    }
                    for g in 0..G {
                        let scale = scales(t.weight_scales, t.weight_block(g, b));
                        for m in 0..M {
                            let s = _mm512_mul_ps(scale, _mm512_set1_ps(t.scale(m, b)));
                            sum[g][m] = _mm512_fmadd_ps(s, dot[g][m], sum[g][m]);
                        }
                    }
                }
                for g in 0..G {
                    for m in 0..M {
                        _mm512_storeu_ps(acc[g * M + m].as_mut_ptr(), sum[g][m]);
                    }
                }
            }
        }

        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
        unsafe fn $decode_name(packed: &[u8], values: &mut [f32]) {
            let packed = packed.as_chunks::<$chunk_bytes>().0;
            for (packed, values) in packed.iter().zip(values.as_chunks_mut::<{ 8 * GROUP }>().0) {
                let $p = packed.as_ptr();
                // SAFETY: a chunk of the packed elements and their values.
                unsafe {
                    let $state = $load;
                    $(_mm512_storeu_ps(values.as_mut_ptr().add($k * GROUP), $decode);)+
                }
            }
        }
    };
}

// vpermps reads the low four bits of each index. Byte i of a word holds k = i low and k = 4 + i high.
float_kernel!(float_e2m1, decode_e2m1, 64, p, s = (_mm512_loadu_si512(p.cast()), _mm512_loadu_ps(e2m1::VALUES.as_ptr())),
    0 => _mm512_permutexvar_ps(s.0, s.1),
    1 => _mm512_permutexvar_ps(_mm512_srli_epi32(s.0, 8), s.1),
    2 => _mm512_permutexvar_ps(_mm512_srli_epi32(s.0, 16), s.1),
    3 => _mm512_permutexvar_ps(_mm512_srli_epi32(s.0, 24), s.1),
    4 => _mm512_permutexvar_ps(_mm512_srli_epi32(s.0, 4), s.1),
    5 => _mm512_permutexvar_ps(_mm512_srli_epi32(s.0, 12), s.1),
    6 => _mm512_permutexvar_ps(_mm512_srli_epi32(s.0, 20), s.1),
    7 => _mm512_permutexvar_ps(_mm512_srli_epi32(s.0, 28), s.1),
);
float_kernel!(float_e4m3, decode_e4m3, 128, p, s = (_mm512_loadu_si512(p.cast()), _mm512_loadu_si512(p.add(64).cast())),
    0 => e4m3(_mm512_slli_epi32(s.0, 24)),
    1 => e4m3(_mm512_slli_epi32(s.0, 16)),
    2 => e4m3(_mm512_slli_epi32(s.0, 8)),
    3 => e4m3(s.0),
    4 => e4m3(_mm512_slli_epi32(s.1, 24)),
    5 => e4m3(_mm512_slli_epi32(s.1, 16)),
    6 => e4m3(_mm512_slli_epi32(s.1, 8)),
    7 => e4m3(s.1),
);
float_kernel!(float_bf16, decode_bf16, 256, p, s = p,
    0 => bf16(s), 1 => bf16(s.add(32)), 2 => bf16(s.add(64)), 3 => bf16(s.add(96)),
    4 => bf16(s.add(128)), 5 => bf16(s.add(160)), 6 => bf16(s.add(192)), 7 => bf16(s.add(224)),
);
float_kernel!(float_f16, decode_f16, 256, p, s = p,
    0 => f16(s), 1 => f16(s.add(32)), 2 => f16(s.add(64)), 3 => f16(s.add(96)),
    4 => f16(s.add(128)), 5 => f16(s.add(160)), 6 => f16(s.add(192)), 7 => f16(s.add(224)),
);
float_kernel!(float_f32, decode_f32, 512, p, s = p.cast::<f32>(),
    0 => _mm512_loadu_ps(s), 1 => _mm512_loadu_ps(s.add(16)), 2 => _mm512_loadu_ps(s.add(32)),
    3 => _mm512_loadu_ps(s.add(48)), 4 => _mm512_loadu_ps(s.add(64)), 5 => _mm512_loadu_ps(s.add(80)),
    6 => _mm512_loadu_ps(s.add(96)), 7 => _mm512_loadu_ps(s.add(112)),
);

/// 16 BF16 in f32.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn bf16(p: *const u8) -> __m512 {
    // SAFETY: the caller gives 32 readable bytes.
    let half = unsafe { _mm256_loadu_si256(p.cast()) };
    _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))
}

/// 16 F16 in f32.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn f16(p: *const u8) -> __m512 {
    // SAFETY: the caller gives 32 readable bytes.
    _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(p.cast()) })
}

/// The E4M3 code in the top byte of each word, in f32.
///
/// Exponent and mantissa moved into place make 2^-120 times the value (subnormals included); the product is exact.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn e4m3(words: __m512i) -> __m512 {
    // The shift leaves the sign where it is.
    let bits = _mm512_and_si512(_mm512_srai_epi32(words, 4), _mm512_set1_epi32(0x87f0_0000_u32 as i32));
    _mm512_mul_ps(_mm512_castsi512_ps(bits), _mm512_set1_ps(TWO_120))
}
