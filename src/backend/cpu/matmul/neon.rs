//! NEON: the 16 rows of a group in four registers. Equals `scalar` bit for bit.
//!
//! Run under qemu-aarch64 against `scalar` (the property test in `super`, and whole models); no AArch64 hardware has
//! run or timed it.

// Every AArch64 CPU has NEON, so nothing here needs `target_feature`, and helpers may be forced inline.
use std::arch::aarch64::*;

use super::{FloatTile, GROUP, IntegerTile, Scales, TILE, TWO_120};
use crate::formats::e2m1;
use crate::formats::linear::Element;

/// Rows computed at a time: two registers, so that four tokens' sums fit the 32 there are.
const HALF: usize = GROUP / 2;
/// Rows in one register.
const QUARTER: usize = GROUP / 4;

/// # Safety
/// The tile's slices cover `rows` (8, 4, 2 or 1) tokens.
pub(super) unsafe fn integer(t: &IntegerTile<'_>, rows: usize, acc: &mut [[f32; GROUP]; TILE]) {
    let blocks = t.k / t.block;
    let mut m = 0;
    while m < rows {
        let step = tile(rows - m);
        let part = IntegerTile {
            values: &t.values[m * t.k..],
            corrections: &t.corrections[m * blocks..],
            scales: &t.scales[m * blocks..],
            ..*t
        };
        for half in 0..2 {
            // SAFETY: the caller's.
            unsafe {
                match step {
                    4 => integer_rows::<4>(&part, half, &mut acc[m..]),
                    2 => integer_rows::<2>(&part, half, &mut acc[m..]),
                    _ => integer_rows::<1>(&part, half, &mut acc[m..]),
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

/// Signed codes, so the corrections that unsigned kernels need are not: a product is at most 144, the at most eight of
/// a block that meet in one 16-bit lane at most 1152.
unsafe fn integer_rows<const M: usize>(t: &IntegerTile<'_>, half: usize, acc: &mut [[f32; GROUP]]) {
    let blocks = t.k / t.block;
    let chunks = t.block / 8;
    assert!(t.weights.len() >= t.k * GROUP / 2 && t.values.len() >= M * t.k);
    assert!(t.scales.len() >= M * blocks && t.weight_scales.cover(blocks));
    // SAFETY: every access is below the lengths asserted above, by the shapes that `packed` and `activation` make.
    unsafe {
        let table = vld1q_s8(e2m1::DOUBLED.as_ptr());
        let nibble = vdupq_n_u8(15);
        let mut sum = [[vdupq_n_f32(0.0); 2]; M];
        let mut weights = t.weights.as_ptr().add(4 * HALF * half);
        let values = t.values.as_ptr();
        for b in 0..blocks {
            // Of each quarter, rows 0 and 1, then 2 and 3: four lanes a row.
            let mut dot = [[[vdupq_n_s16(0); 2]; 2]; M];
            for c in 0..chunks {
                for q in 0..2 {
                    let packed = vld1q_u8(weights.add(4 * QUARTER * q));
                    let low = vqtbl1q_s8(table, vandq_u8(packed, nibble));
                    let high = vqtbl1q_s8(table, vshrq_n_u8::<4>(packed));
                    for m in 0..M {
                        let x = values.add(m * t.k + b * t.block + 8 * c).cast::<i32>();
                        let first = vreinterpretq_s8_s32(vdupq_n_s32(x.read_unaligned()));
                        let second = vreinterpretq_s8_s32(vdupq_n_s32(x.add(1).read_unaligned()));
                        let d = &mut dot[m][q];
                        d[0] = vmlal_s8(d[0], vget_low_s8(low), vget_low_s8(first));
                        d[0] = vmlal_s8(d[0], vget_low_s8(high), vget_low_s8(second));
                        d[1] = vmlal_high_s8(d[1], low, first);
                        d[1] = vmlal_high_s8(d[1], high, second);
                    }
                }
                weights = weights.add(4 * GROUP);
            }
            let scale = [0, 1].map(|q| scales(t.weight_scales, b, HALF * half + QUARTER * q));
            for m in 0..M {
                let x_scale = t.scales.as_ptr().add(m * blocks + b).read_unaligned();
                for q in 0..2 {
                    let exact = vpaddq_s32(vpaddlq_s16(dot[m][q][0]), vpaddlq_s16(dot[m][q][1]));
                    let s = vmulq_n_f32(scale[q], x_scale);
                    sum[m][q] = vfmaq_f32(sum[m][q], s, vcvtq_f32_s32(exact));
                }
            }
        }
        for m in 0..M {
            for q in 0..2 {
                vst1q_f32(acc[m].as_mut_ptr().add(HALF * half + QUARTER * q), sum[m][q]);
            }
        }
    }
}

/// The scales of 4 of the 16 rows, from `row` on, in block `i`.
///
/// # Safety
/// There are more than `i`.
#[inline(always)]
unsafe fn scales(scales: Scales<'_>, i: usize, row: usize) -> float32x4_t {
    // SAFETY: the caller's, in every arm.
    unsafe {
        let codes = |codes: &[[u8; GROUP]]| {
            let four = codes.as_ptr().add(i).cast::<u8>().add(row).cast::<u32>().read_unaligned();
            vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(u64::from(four)))))
        };
        match scales {
            Scales::None => vdupq_n_f32(1.0),
            // The code without a sign, moved to where f32 has exponent and mantissa.
            Scales::E4m3(c) => vmulq_n_f32(vreinterpretq_f32_u32(vshlq_n_u32::<20>(codes(c))), TWO_120),
            // Code 0 is 2^-127, which is no normal number.
            Scales::E8m0(c) => vreinterpretq_f32_u32(vmaxq_u32(vshlq_n_u32::<23>(codes(c)), vdupq_n_u32(0x0040_0000))),
            Scales::Grid(values) => vdupq_n_f32(*values.as_ptr().add(i)),
        }
    }
}

/// # Safety
/// The tile's slices cover `rows` (8, 4, 2 or 1) tokens; `rows` times its groups (4, 2 or 1) are 8 at most.
pub(super) unsafe fn float(t: &FloatTile<'_>, rows: usize, acc: &mut [[f32; GROUP]; TILE]) {
    // SAFETY: the caller's.
    unsafe {
        match t.element {
            Element::E2m1 => float_element::<E2m1>(t, rows, acc),
            Element::E4m3 => float_element::<E4m3>(t, rows, acc),
            Element::Bf16 => float_element::<Bf16>(t, rows, acc),
            Element::F16 => float_element::<F16>(t, rows, acc),
            Element::F32 => float_element::<F32>(t, rows, acc),
        }
    }
}

unsafe fn float_element<D: Decode>(t: &FloatTile<'_>, rows: usize, acc: &mut [[f32; GROUP]; TILE]) {
    // 32 registers: four tokens of one half of a group, or one token of both halves of two.
    if rows == 1 && t.groups > 1 {
        for group in (0..t.groups).step_by(2) {
            // SAFETY: the caller's.
            unsafe { float_rows::<D, 1, 4>(t, Part { half: 2 * group, m: 0, rows }, acc) }
        }
        return;
    }
    let step = tile(rows);
    for half in 0..2 * t.groups {
        for m in (0..rows).step_by(step) {
            let part = Part { half, m, rows };
            // SAFETY: the caller's.
            unsafe {
                match step {
                    4 => float_rows::<D, 4, 1>(t, part, acc),
                    2 => float_rows::<D, 2, 1>(t, part, acc),
                    _ => float_rows::<D, 1, 1>(t, part, acc),
                }
            }
        }
    }
}

/// A group's elements in f32, per k one of each row.
///
/// # Safety
/// Every AArch64 CPU has NEON.
pub(super) unsafe fn decode(element: Element, packed: &[u8], values: &mut [f32]) {
    unsafe fn each<D: Decode>(packed: &[u8], values: &mut [f32]) {
        let chunks = packed.chunks_exact(GROUP * D::ELEMENT.row_bytes(8));
        for (packed, values) in chunks.zip(values.as_chunks_mut::<{ 8 * GROUP }>().0) {
            macro_rules! positions {
                ($($i:literal)+) => {$(
                    for row in (0..GROUP).step_by(QUARTER) {
                        // SAFETY: a chunk of the packed elements and their values.
                        unsafe { vst1q_f32(values.as_mut_ptr().add($i * GROUP + row), D::quarter::<$i>(packed.as_ptr(), row)) }
                    }
                )+};
            }
            positions!(0 1 2 3 4 5 6 7);
        }
    }
    // SAFETY: the caller's.
    unsafe {
        match element {
            Element::E2m1 => each::<E2m1>(packed, values),
            Element::E4m3 => each::<E4m3>(packed, values),
            Element::Bf16 => each::<Bf16>(packed, values),
            Element::F16 => each::<F16>(packed, values),
            Element::F32 => each::<F32>(packed, values),
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

/// `H` consecutive halves of groups.
unsafe fn float_rows<D: Decode, const M: usize, const H: usize>(
    t: &FloatTile<'_>,
    part: Part,
    acc: &mut [[f32; GROUP]; TILE],
) {
    let blocks = t.k.div_ceil(t.block);
    let chunk_bytes = GROUP * D::ELEMENT.row_bytes(8);
    let group_bytes = t.k / 8 * chunk_bytes;
    assert!(part.half + H <= 2 * t.groups && part.m + M <= part.rows);
    assert!(t.weights.len() >= t.groups * group_bytes && t.values.len() >= part.rows * t.k);
    assert!(t.scales_cover(part.rows));
    // SAFETY: every access is below the lengths asserted above, by the shapes that `packed` and `activation` make.
    unsafe {
        let mut sum = [[[vdupq_n_f32(0.0); 2]; M]; H];
        let mut weights = t.weights.as_ptr();
        let mut values = t.values.as_ptr().add(part.m * t.k);
        for b in 0..blocks {
            let mut dot = [[[vdupq_n_f32(0.0); 2]; M]; H];
            for _ in 0..(t.k - b * t.block).min(t.block) / 8 {
                // Unrolled by hand: with the position known, what decoding shares between positions is loaded once.
                macro_rules! positions {
                    ($($i:literal)+) => {$(
                        for h in 0..H {
                            let (group, row) = ((part.half + h) / 2, (part.half + h) % 2 * HALF);
                            let from = weights.add(group * group_bytes);
                            let first = D::quarter::<$i>(from, row);
                            let second = D::quarter::<$i>(from, row + QUARTER);
                            for m in 0..M {
                                let x = values.add(m * t.k + $i).read_unaligned();
                                dot[h][m][0] = vfmaq_n_f32(dot[h][m][0], first, x);
                                dot[h][m][1] = vfmaq_n_f32(dot[h][m][1], second, x);
                            }
                        }
                    )+};
                }
                positions!(0 1 2 3 4 5 6 7);
                weights = weights.add(chunk_bytes);
                values = values.add(8);
            }
            for h in 0..H {
                let (group, row) = ((part.half + h) / 2, (part.half + h) % 2 * HALF);
                for q in 0..2 {
                    let scale = scales(t.weight_scales, t.weight_block(group, b), row + QUARTER * q);
                    for m in 0..M {
                        let s = vmulq_n_f32(scale, t.scale(part.m + m, b));
                        sum[h][m][q] = vfmaq_f32(sum[h][m][q], s, dot[h][m][q]);
                    }
                }
            }
        }
        for h in 0..H {
            let (group, row) = ((part.half + h) / 2, (part.half + h) % 2 * HALF);
            for m in 0..M {
                for q in 0..2 {
                    let to = acc[group * part.rows + part.m + m].as_mut_ptr().add(row + QUARTER * q);
                    vst1q_f32(to, sum[h][m][q]);
                }
            }
        }
    }
}

/// How elements become f32.
///
/// Small floats are moved to where f32 has exponent and mantissa and multiplied by the difference of the biases: exact,
/// subnormals included.
trait Decode {
    const ELEMENT: Element;

    /// Element `I` of 8 consecutive k, 4 rows from `row` of the group on.
    ///
    /// # Safety
    /// 8 · 16 elements are readable at `p`.
    unsafe fn quarter<const I: usize>(p: *const u8, row: usize) -> float32x4_t;
}

struct E2m1;
struct E4m3;
struct Bf16;
struct F16;
struct F32;

impl Decode for E2m1 {
    const ELEMENT: Element = Element::E2m1;

    #[inline(always)]
    unsafe fn quarter<const I: usize>(p: *const u8, row: usize) -> float32x4_t {
        // SAFETY: the caller's. Byte i of a word holds k = i low and k = 4 + i high.
        unsafe {
            let words = vld1q_u32(p.add(4 * row).cast());
            let top = vshlq_u32(words, vdupq_n_s32(28 - (8 * (I % 4) + 4 * (I / 4)) as i32));
            small_float::<6>(top, 0x01c0_0000, 126)
        }
    }
}

impl Decode for E4m3 {
    const ELEMENT: Element = Element::E4m3;

    #[inline(always)]
    unsafe fn quarter<const I: usize>(p: *const u8, row: usize) -> float32x4_t {
        // SAFETY: the caller's.
        unsafe {
            let words = vld1q_u32(p.add(64 * (I / 4) + 4 * row).cast());
            small_float::<4>(vshlq_u32(words, vdupq_n_s32(24 - 8 * (I % 4) as i32)), 0x07f0_0000, 120)
        }
    }
}

impl Decode for Bf16 {
    const ELEMENT: Element = Element::Bf16;

    #[inline(always)]
    unsafe fn quarter<const I: usize>(p: *const u8, row: usize) -> float32x4_t {
        // SAFETY: the caller's.
        unsafe { vreinterpretq_f32_u32(vshlq_n_u32::<16>(vmovl_u16(vld1_u16(p.add(32 * I + 2 * row).cast())))) }
    }
}

impl Decode for F16 {
    const ELEMENT: Element = Element::F16;

    #[inline(always)]
    unsafe fn quarter<const I: usize>(p: *const u8, row: usize) -> float32x4_t {
        // SAFETY: the caller's.
        unsafe {
            let top = vshlq_n_u32::<16>(vmovl_u16(vld1_u16(p.add(32 * I + 2 * row).cast())));
            let finite = small_float::<3>(top, 0x0fff_e000, 112);
            // An exponent of ones stays one: infinity and NaN.
            let exponent = vdupq_n_u32(0x7c00_0000);
            let special = vandq_u32(vceqq_u32(vandq_u32(top, exponent), exponent), vdupq_n_u32(0x7f80_0000));
            vreinterpretq_f32_u32(vorrq_u32(vreinterpretq_u32_f32(finite), special))
        }
    }
}

impl Decode for F32 {
    const ELEMENT: Element = Element::F32;

    #[inline(always)]
    unsafe fn quarter<const I: usize>(p: *const u8, row: usize) -> float32x4_t {
        // SAFETY: the caller's.
        unsafe { vld1q_f32(p.add(64 * I + 4 * row).cast()) }
    }
}

/// A float whose sign is the top bit and whose magnitude, shifted right by `SHIFT`, is `mask` in f32's layout with an
/// exponent too small by `bias`.
#[inline(always)]
fn small_float<const SHIFT: i32>(top: uint32x4_t, mask: u32, bias: u32) -> float32x4_t {
    // SAFETY: every AArch64 CPU has NEON.
    unsafe {
        let sign = vandq_u32(top, vdupq_n_u32(1 << 31));
        let magnitude = vandq_u32(vshrq_n_u32::<SHIFT>(top), vdupq_n_u32(mask));
        let bits = vreinterpretq_f32_u32(vorrq_u32(sign, magnitude));
        vmulq_n_f32(bits, f32::from_bits((bias + 127) << 23))
    }
}
