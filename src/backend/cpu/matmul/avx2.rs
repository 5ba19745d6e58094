//! AVX2 with FMA, and AVX-VNNI: the 16 rows of a group in two registers. Equals `scalar` bit for bit.

use std::arch::x86_64::*;

use super::{BytesTile, FloatTile, GROUP, IntegerTile, OFFSET_CODES, Scales, TILE, TWO_120, ahead};
use crate::formats::e2m1;
use crate::formats::linear::Element;

/// Rows in one register.
const HALF: usize = GROUP / 2;

/// The integer kernel of one set of features: `$dot` adds four byte products to each 32-bit sum, or to each pair of 16-bit sums, and
/// `$exact` makes 32-bit sums of them, to which the correction is added.
macro_rules! integer_kernel {
    ($(#[$meta:meta])* $name:ident, $rows:ident, $bytes:ident, $bytes_rows:ident, $features:literal, |$sum:ident, $w:ident, $x:ident| $dot:expr, $exact:expr) => {
        $(#[$meta])*
        ///
        /// # Safety
        /// The CPU has the features; the tile's slices cover `rows` (8, 4, 2 or 1) tokens.
        #[target_feature(enable = $features)]
        pub(super) unsafe fn $name(t: &IntegerTile<'_>, rows: usize, acc: &mut [[f32; GROUP]; TILE]) {
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
                        2 => $rows::<2>(&part, &mut acc[m..]),
                        _ => $rows::<1>(&part, &mut acc[m..]),
                    }
                }
                m += step;
            }
        }

        #[target_feature(enable = $features)]
        unsafe fn $rows<const M: usize>(t: &IntegerTile<'_>, acc: &mut [[f32; GROUP]]) {
            let blocks = t.k / t.block;
            let chunks = t.block / 8;
            assert!(t.weights.len() >= t.k * GROUP / 2 && t.values.len() >= M * t.k);
            assert!(t.scales.len() >= M * blocks && t.corrections.len() >= M * blocks && t.weight_scales.cover(blocks));
            // SAFETY: every access is below the lengths asserted above, by the shapes that `packed` and `activation` make.
            unsafe {
                let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(OFFSET_CODES.as_ptr().cast()));
                let nibble = _mm256_set1_epi8(15);
                let mut sum = [[_mm256_setzero_ps(); 2]; M];
                let mut weights = t.weights.as_ptr();
                let values = t.values.as_ptr();
                for b in 0..blocks {
                    let mut dot = [[_mm256_setzero_si256(); 2]; M];
                    for c in 0..chunks {
                        for h in 0..2 {
                            let packed = _mm256_loadu_si256(weights.add(4 * HALF * h).cast());
                            let low = _mm256_shuffle_epi8(table, _mm256_and_si256(packed, nibble));
                            let high =
                                _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(packed, 4), nibble));
                            for m in 0..M {
                                let x = values.add(m * t.k + b * t.block + 8 * c).cast::<i32>();
                                for (i, $w) in [low, high].into_iter().enumerate() {
                                    let $x = _mm256_set1_epi32(x.add(i).read_unaligned());
                                    let $sum = dot[m][h];
                                    dot[m][h] = $dot;
                                }
                            }
                        }
                        weights = weights.add(4 * GROUP);
                    }
                    let scale = [scales(t.weight_scales, b, 0), scales(t.weight_scales, b, 1)];
                    for m in 0..M {
                        let correction = _mm256_set1_epi32(t.corrections.as_ptr().add(m * blocks + b).read_unaligned());
                        let x_scale = _mm256_set1_ps(t.scales.as_ptr().add(m * blocks + b).read_unaligned());
                        for h in 0..2 {
                            let exact = _mm256_add_epi32($exact(dot[m][h]), correction);
                            let scale = _mm256_mul_ps(scale[h], x_scale);
                            sum[m][h] = _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(exact), sum[m][h]);
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

        /// The same of weights that are bytes already.
        ///
        /// # Safety
        /// The CPU has the features; the tile's slices cover `rows` (4, 2 or 1) tokens and its groups.
        #[target_feature(enable = $features)]
        pub(super) unsafe fn $bytes(t: &BytesTile<'_>, rows: usize, acc: &mut [[f32; GROUP]; TILE]) {
            let step = rows.min(2);
            for group in 0..t.groups {
                for m in (0..rows).step_by(step) {
                    let part = Part { half: 2 * group, m, rows };
                    // SAFETY: the caller's.
                    unsafe {
                        match step {
                            2 => $bytes_rows::<2>(t, part, acc),
                            _ => $bytes_rows::<1>(t, part, acc),
                        }
                    }
                }
            }
        }

        #[target_feature(enable = $features)]
        unsafe fn $bytes_rows<const M: usize>(t: &BytesTile<'_>, part: Part, acc: &mut [[f32; GROUP]; TILE]) {
            let blocks = t.k / t.block;
            let group = part.half / 2;
            assert!(group < t.groups && part.m + M <= part.rows && t.values.len() >= part.rows * t.k);
            assert!(t.weights.len() >= t.groups * t.k * GROUP && t.weight_scales.len() >= t.groups * blocks * GROUP);
            assert!(t.scales.len() >= part.rows * blocks && t.corrections.len() >= part.rows * blocks);
            // SAFETY: every access is below the lengths asserted above.
            unsafe {
                let mut sum = [[_mm256_setzero_ps(); 2]; M];
                let mut weights = t.weights.as_ptr().add(group * t.k * GROUP);
                let weight_scales = t.weight_scales.as_ptr().add(group * blocks * GROUP);
                let mut values = t.values.as_ptr().add(part.m * t.k);
                for b in 0..blocks {
                    let mut dot = [[_mm256_setzero_si256(); 2]; M];
                    for _ in 0..t.block / 4 {
                        for h in 0..2 {
                            let $w = _mm256_loadu_si256(weights.add(4 * HALF * h).cast());
                            for m in 0..M {
                                let $x = _mm256_set1_epi32(values.add(m * t.k).cast::<i32>().read_unaligned());
                                let $sum = dot[m][h];
                                dot[m][h] = $dot;
                            }
                        }
                        weights = weights.add(4 * GROUP);
                        values = values.add(4);
                    }
                    for m in 0..M {
                        let at = (part.m + m) * blocks + b;
                        let correction = _mm256_set1_epi32(t.corrections.as_ptr().add(at).read_unaligned());
                        let x_scale = _mm256_set1_ps(t.scales.as_ptr().add(at).read_unaligned());
                        for h in 0..2 {
                            let exact = _mm256_add_epi32($exact(dot[m][h]), correction);
                            let scale = _mm256_loadu_ps(weight_scales.add(b * GROUP + HALF * h));
                            let scale = _mm256_mul_ps(scale, x_scale);
                            sum[m][h] = _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(exact), sum[m][h]);
                        }
                    }
                }
                for m in 0..M {
                    for h in 0..2 {
                        let to = acc[group * part.rows + part.m + m].as_mut_ptr().add(HALF * h);
                        _mm256_storeu_ps(to, sum[m][h]);
                    }
                }
            }
        }
    };
}

integer_kernel!(
    /// Sums of pairs in 16 bits, which hold a block's.
    integer, integer_rows, bytes, bytes_rows, "avx2,fma,f16c",
    |sum, w, x| _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, x)),
    |sums: __m256i| _mm256_madd_epi16(sums, _mm256_set1_epi16(1))
);
integer_kernel!(
    /// By AVX-VNNI, one instruction where AVX2 has two.
    integer_vnni, integer_vnni_rows, bytes_vnni, bytes_vnni_rows, "avx2,fma,f16c,avxvnni",
    |sum, w, x| _mm256_dpbusd_avx_epi32(sum, w, x),
    |sums: __m256i| sums
);
#[cfg(test)]
integer_kernel!(
    /// The same instruction as AVX-512 writes it, for machines that have it in no other way.
    integer_vnni_512, integer_vnni_512_rows, bytes_vnni_512, bytes_vnni_512_rows, "avx2,fma,f16c,avx512vl,avx512vnni",
    |sum, w, x| _mm256_dpbusd_epi32(sum, w, x),
    |sums: __m256i| sums
);

/// What [`BytesTile`] has of packed elements and scales of some groups.
///
/// # Safety
/// The CPU has the features below.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn decode_bytes(packed: &[u8], of: Scales<'_>, bytes: &mut [u8], values: &mut [f32]) {
    let (packed, bytes) = (packed.as_chunks::<{ 4 * GROUP }>().0, bytes.as_chunks_mut::<{ 8 * GROUP }>().0);
    assert!(of.cover(values.len() / GROUP));
    // SAFETY: a chunk of the packed elements and its bytes; there are as many scales as asserted above.
    unsafe {
        let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(OFFSET_CODES.as_ptr().cast()));
        let nibble = _mm256_set1_epi8(15);
        for (packed, bytes) in packed.iter().zip(bytes) {
            for half in [0, 4 * HALF] {
                let packed = _mm256_loadu_si256(packed.as_ptr().add(half).cast());
                let low = _mm256_shuffle_epi8(table, _mm256_and_si256(packed, nibble));
                let high = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(packed, 4), nibble));
                _mm256_storeu_si256(bytes.as_mut_ptr().add(half).cast(), low);
                _mm256_storeu_si256(bytes.as_mut_ptr().add(4 * GROUP + half).cast(), high);
            }
        }
        for (i, values) in values.as_chunks_mut::<GROUP>().0.iter_mut().enumerate() {
            for half in 0..2 {
                _mm256_storeu_ps(values.as_mut_ptr().add(HALF * half), scales(of, i, half));
            }
        }
    }
}

/// The scales of a half of the 16 rows in block `i`.
///
/// # Safety
/// There are more than `i`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn scales(scales: Scales<'_>, i: usize, half: usize) -> __m256 {
    let codes = |codes: &[[u8; GROUP]]| {
        // SAFETY: the caller's, in every arm.
        let half = unsafe { _mm_loadl_epi64(codes.as_ptr().add(i).cast::<u8>().add(HALF * half).cast()) };
        _mm256_cvtepu8_epi32(half)
    };
    match scales {
        Scales::None => _mm256_set1_ps(1.0),
        // As `e4m3` below, without a sign.
        Scales::E4m3(c) => _mm256_mul_ps(_mm256_castsi256_ps(_mm256_slli_epi32(codes(c), 20)), _mm256_set1_ps(TWO_120)),
        // Code 0 is 2^-127, which is no normal number.
        Scales::E8m0(c) => {
            let normal = _mm256_slli_epi32(codes(c), 23);
            _mm256_castsi256_ps(_mm256_max_epi32(normal, _mm256_set1_epi32(0x0040_0000)))
        }
        // SAFETY: as above.
        Scales::Grid(values) => _mm256_set1_ps(unsafe { *values.as_ptr().add(i) }),
    }
}

/// # Safety
/// The CPU has the features below; the tile's slices cover `rows` (8, 4, 2 or 1) tokens; `rows` times its groups (4, 2 or 1)
/// are 8 at most.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn float(t: &FloatTile<'_>, rows: usize, acc: &mut [[f32; GROUP]; TILE]) {
    // 16 registers: one token takes both halves of two groups, two tokens those of one: four sums, each of the block and of all.
    // Four take both halves too: eight sums of the block, so that none waits for another; those of all wait in memory.
    let (step, wide) = match (rows, t.groups) {
        (1, 2..) => (1, 4),
        (1 | 2, _) => (rows, 2),
        _ => (4, 2),
    };
    for half in (0..2 * t.groups).step_by(wide) {
        for m in (0..rows).step_by(step) {
            let part = Part { half, m, rows };
            macro_rules! tiles {
                ($kernel:ident) => {
                    // SAFETY: the caller's.
                    unsafe {
                        match (step, wide) {
                            (1, 4) => $kernel::<1, 4>(t, part, acc),
                            (1, _) => $kernel::<1, 2>(t, part, acc),
                            (2, _) => $kernel::<2, 2>(t, part, acc),
                            _ => $kernel::<4, 2>(t, part, acc),
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
    }
}

/// A group's elements in f32, per k one of each row.
///
/// # Safety
/// The CPU has the features below.
#[target_feature(enable = "avx2,fma,f16c")]
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

/// What a kernel computes of a tile of `rows` tokens: from this half of a group (counted over all groups) and this token on.
#[derive(Clone, Copy)]
struct Part {
    half: usize,
    m: usize,
    rows: usize,
}

/// The kernel of one element for `H` consecutive halves of groups, and what decodes it alone: `$load` makes what 8 consecutive k of half `$half` of a group
/// need from pointer `$p`, `$decode` one k of it in f32. A macro for the reason given in `avx512`.
macro_rules! float_kernel {
    ($name:ident, $decode_name:ident, $chunk_bytes:literal, $p:ident, $half:ident, $state:ident = $load:expr, $($k:literal => $decode:expr),+ $(,)?) => {
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn $name<const M: usize, const H: usize>(t: &FloatTile<'_>, part: Part, acc: &mut [[f32; GROUP]; TILE]) {
            let blocks = t.k.div_ceil(t.block);
            let group_bytes = t.k / 8 * $chunk_bytes;
            assert!(part.half + H <= 2 * t.groups && part.m + M <= part.rows);
            assert!(t.weights.len() >= t.groups * group_bytes && t.values.len() >= part.rows * t.k);
            assert!(t.scales_cover(part.rows));
            // SAFETY: every access is below the lengths asserted above, by the shapes that `packed` and `activation`
            // make.
            unsafe {
                let mut sum = [[_mm256_setzero_ps(); M]; H];
                let mut weights = t.weights.as_ptr();
                let mut values = t.values.as_ptr().add(part.m * t.k);
                for b in 0..blocks {
                    let mut dot = [[_mm256_setzero_ps(); M]; H];
                    for _ in 0..(t.k - b * t.block).min(t.block) / 8 {
                        // One or two tokens' weights are read no faster for it.
                        if t.streamed && M >= 4 && part.m == 0 {
                            let at = weights.wrapping_add(part.half / 2 * group_bytes + ahead(M));
                            for line in (0..$chunk_bytes).step_by(64) {
                                _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(line).cast());
                            }
                        }
                        $(
                            for h in 0..H {
                                let $half = (part.half + h) % 2;
                                let $p = weights.add((part.half + h) / 2 * group_bytes);
                                let $state = $load;
                                let w = $decode;
                                for m in 0..M {
                                    let x = values.add(m * t.k + $k).read_unaligned();
                                    dot[h][m] = _mm256_fmadd_ps(w, _mm256_set1_ps(x), dot[h][m]);
                                }
                            }
                        )+
                        weights = weights.add($chunk_bytes);
                        values = values.add(8);
                    }
                    for h in 0..H {
                        let half = part.half + h;
                        let scale = scales(t.weight_scales, t.weight_block(half / 2, b), half % 2);
                        for m in 0..M {
                            let s = _mm256_mul_ps(scale, _mm256_set1_ps(t.scale(part.m + m, b)));
                            sum[h][m] = _mm256_fmadd_ps(s, dot[h][m], sum[h][m]);
                        }
                    }
                }
                for h in 0..H {
                    let half = part.half + h;
                    for m in 0..M {
                        let to = acc[half / 2 * part.rows + part.m + m].as_mut_ptr().add(HALF * (half % 2));
                        _mm256_storeu_ps(to, sum[h][m]);
                    }
                }
            }
        }

        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn $decode_name(packed: &[u8], values: &mut [f32]) {
            let packed = packed.as_chunks::<$chunk_bytes>().0;
            for (packed, values) in packed.iter().zip(values.as_chunks_mut::<{ 8 * GROUP }>().0) {
                let $p = packed.as_ptr();
                for $half in 0..2 {
                    // SAFETY: a chunk of the packed elements and their values.
                    unsafe {
                        let $state = $load;
                        $(_mm256_storeu_ps(values.as_mut_ptr().add($k * GROUP + HALF * $half), $decode);)+
                    }
                }
            }
        }
    };
}

// Byte i of a word holds k = i low and k = 4 + i high.
float_kernel!(float_e2m1, decode_e2m1, 64, p, half,
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
float_kernel!(float_e4m3, decode_e4m3, 128, p, half,
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
float_kernel!(float_bf16, decode_bf16, 256, p, half, s = p.add(16 * half),
    0 => bf16(s), 1 => bf16(s.add(32)), 2 => bf16(s.add(64)), 3 => bf16(s.add(96)),
    4 => bf16(s.add(128)), 5 => bf16(s.add(160)), 6 => bf16(s.add(192)), 7 => bf16(s.add(224)),
);
float_kernel!(float_f16, decode_f16, 256, p, half, s = p.add(16 * half),
    0 => f16(s), 1 => f16(s.add(32)), 2 => f16(s.add(64)), 3 => f16(s.add(96)),
    4 => f16(s.add(128)), 5 => f16(s.add(160)), 6 => f16(s.add(192)), 7 => f16(s.add(224)),
);
float_kernel!(float_f32, decode_f32, 512, p, half, s = p.cast::<f32>().add(HALF * half),
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
    let bits = _mm256_and_si256(_mm256_srai_epi32(words, 4), _mm256_set1_epi32(0x87f0_0000_u32 as i32));
    _mm256_mul_ps(_mm256_castsi256_ps(bits), _mm256_set1_ps(TWO_120))
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
