//! Packed matrix products: y [M, N] = input [M, K] · Wᵀ, in the canonical order of accumulation.
//!
//! One output per SIMD lane; blocks in K order; inside a block an exact integer sum (E2M1 by E2M1) or one fused
//! multiply-add per element in K order; one fused multiply-add per block. Hence every instruction set, tile, batch and
//! thread count gives the same bits, and `scalar` is the definition.

// Kernels walk several arrays in step by lane or token; iterators over one of them would hide that.
#![allow(clippy::needless_range_loop)]

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod decoded;
#[cfg(target_arch = "aarch64")]
mod neon;
mod scalar;

use std::ops::Range;

use super::activation::{FloatInput, Input, IntegerInput};
use super::isa::{Isa, Kind, multiversion};
use super::packed::{GROUP, PackedLinear, Scales};
use super::threads::Threads;
use crate::formats::linear::{Element, OutputScale};

/// Runs of 16 outputs that one kernel call computes side by side, at most: tokens, or groups of rows where tokens are few, so that
/// one sum needs not wait for another.
const TILE: usize = 8;
/// Tokens that one task goes through: bounds the task's share of the input to what a second-level cache holds.
const TASK_TOKENS: usize = 128;

/// Doubled E2M1 values + 12: unsigned, as x86's byte products want their first factor. The sums of a block stay below
/// 2¹⁵. `IntegerTile::corrections` undoes the offset.
const OFFSET_CODES: [u8; 16] = {
    let mut t = [0; 16];
    let mut i = 0;
    while i < 16 {
        t[i] = (crate::formats::e2m1::DOUBLED[i] + 12) as u8;
        i += 1;
    }
    t
};

/// How many bytes ahead of the products of so many tokens weights are asked for that come from memory: cores' own prefetching ends with
/// a page, and where arithmetic takes longer than reading, they have no time for it.
#[cfg(target_arch = "x86_64")]
const fn ahead(tokens: usize) -> usize {
    if tokens < 4 { 2048 } else { 8192 }
}

/// What an E4M3 code moved to where f32 has exponent and mantissa is multiplied by; exact, subnormals included.
const TWO_120: f32 = f32::from_bits((120 + 127) << 23);

/// One tile of tokens of an integer product over one group of rows.
struct IntegerTile<'a> {
    /// Packed elements of the group, and whether they come from memory: another tile did not just read them.
    weights: &'a [u8],
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    streamed: bool,
    /// Scales of the group's K/block blocks.
    weight_scales: Scales<'a>,
    /// Elements of a block: 16 or 32.
    block: usize,
    /// First token's doubled values, K apart; likewise its corrections and scales, K/block apart.
    values: &'a [i8],
    corrections: &'a [i32],
    scales: &'a [f32],
    /// K.
    k: usize,
}

/// One tile of an integer product whose weights are bytes already: some tokens and consecutive groups of rows.
struct BytesTile<'a> {
    groups: usize,
    /// [groups][K/4][16][4]: of each row 4 of K, 12 added.
    weights: &'a [u8],
    /// [groups][K/block][16]
    weight_scales: &'a [f32],
    /// As those of [`IntegerTile`].
    block: usize,
    values: &'a [i8],
    corrections: &'a [i32],
    scales: &'a [f32],
    k: usize,
}

/// One tile of a float product: some tokens and consecutive groups of rows.
struct FloatTile<'a> {
    element: Element,
    groups: usize,
    /// Packed elements of the groups, and whether they come from memory.
    weights: &'a [u8],
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    streamed: bool,
    weight_scales: Scales<'a>,
    /// Elements of a block, a multiple of 8, and how many blocks share a scale of the weight.
    block: usize,
    repeat: usize,
    /// First token's values, `k` apart.
    values: &'a [f32],
    /// First token's scales, `scale_stride` apart, and how many blocks share one; none where they are all 1.
    scales: &'a [f32],
    scale_stride: usize,
    scale_repeat: usize,
    /// K padded to a multiple of 8.
    k: usize,
}

impl FloatTile<'_> {
    /// Bytes of a group's elements.
    fn group_bytes(&self) -> usize {
        GROUP * self.element.row_bytes(self.k)
    }

    /// Where the scales of block `b` of a group are.
    #[inline(always)]
    fn weight_block(&self, group: usize, b: usize) -> usize {
        group * self.k.div_ceil(self.block * self.repeat) + if self.repeat == 1 { b } else { b / self.repeat }
    }

    /// Token `m`'s scale in block `b`.
    #[inline(always)]
    fn scale(&self, m: usize, b: usize) -> f32 {
        if self.scales.is_empty() { 1.0 } else { self.scales[m * self.scale_stride + b / self.scale_repeat] }
    }

    /// Whether there are scales for all groups and `rows` tokens.
    fn scales_cover(&self, rows: usize) -> bool {
        let last = self.k.div_ceil(self.block).max(1) - 1;
        let of_tokens =
            self.scales.is_empty() || self.scales.len() > (rows - 1) * self.scale_stride + last / self.scale_repeat;
        of_tokens && self.weight_scales.cover(self.weight_block(self.groups - 1, last) + 1)
    }
}

/// Raw pointer to the output; tasks write disjoint parts of it.
#[derive(Clone, Copy)]
struct Output(*mut f32);
// SAFETY: every task writes its own rows and columns only, see `run`.
unsafe impl Send for Output {}
// SAFETY: as above.
unsafe impl Sync for Output {}

/// Some groups of rows of one product, and some tokens.
struct Task {
    job: usize,
    groups: Range<usize>,
    tokens: Range<usize>,
}

/// Computes several products of the same number of tokens in one parallel sweep.
pub(super) fn run(isa: Isa, threads: &Threads, jobs: &mut [(&PackedLinear, &Input<'_>, &mut [f32])], m: usize) {
    let spans = m.div_ceil(TASK_TOKENS);
    let outputs: Vec<Output> = jobs.iter_mut().map(|j| Output(j.2.as_mut_ptr())).collect();
    // A few groups make a task: enough work to pay for handing it over, little enough to balance.
    let groups: usize = jobs.iter().map(|j| j.0.groups()).sum();
    let per_task = (groups * spans / (8 * threads.count())).clamp(1, 64);
    let mut tasks = Vec::new();
    for (job, (w, _, out)) in jobs.iter().enumerate() {
        assert_eq!(out.len(), m * w.n, "output of {} has the wrong size", w.name);
        for first in (0..w.groups()).step_by(per_task) {
            tasks.extend((0..m).step_by(TASK_TOKENS).map(|token| Task {
                job,
                groups: first..w.groups().min(first + per_task),
                tokens: token..m.min(token + TASK_TOKENS),
            }));
        }
    }
    let jobs: Vec<(&PackedLinear, &Input<'_>)> = jobs.iter().map(|j| (j.0, j.1)).collect();
    threads.run(tasks.len(), |i| {
        let task = &tasks[i];
        let (w, input) = jobs[task.job];
        match input {
            Input::Integer(x) => integer_groups(isa, w, x, task, outputs[task.job]),
            Input::Float(x) => float_groups(isa, w, x, task, outputs[task.job]),
        }
    });
}

fn integer_groups(isa: Isa, w: &PackedLinear, x: &IntegerInput, task: &Task, out: Output) {
    if decoded::bytes_are_worthwhile(isa, task.tokens.len()) {
        return bytes_groups(isa, w, x, task, out);
    }
    let blocks = w.k / x.block;
    for group in task.groups.clone() {
        let finish = Finish::new(w, group, out);
        let mut m = task.tokens.start;
        while m < task.tokens.end {
            let tile = IntegerTile {
                weights: w.groups_data(group..group + 1),
                streamed: m == task.tokens.start,
                weight_scales: w.groups_scales(group..group + 1),
                block: x.block,
                values: &x.values[m * w.k..],
                corrections: &x.corrections[m * blocks..],
                scales: &x.scales[m * blocks..],
                k: w.k,
            };
            let mut acc = [[0.0f32; GROUP]; TILE];
            let rows = integer_tile(isa, &tile, task.tokens.end - m, &mut acc);
            finish.write(isa, m, &acc[..rows], [x.global; TILE]);
            m += rows;
        }
    }
}

/// [`integer_groups`] for many tokens: each group's elements are made bytes once, and two groups share what is read of a token.
fn bytes_groups(isa: Isa, w: &PackedLinear, x: &IntegerInput, task: &Task, out: Output) {
    const SIDE_BY_SIDE: usize = 2;
    let blocks = w.k / x.block;
    for first in task.groups.clone().step_by(SIDE_BY_SIDE) {
        let groups = first..task.groups.end.min(first + SIDE_BY_SIDE);
        let (packed, scales) = (w.groups_data(groups.clone()), w.groups_scales(groups.clone()));
        // What comes next is asked for a piece with each tile, and is there when its turn comes.
        let next = w.groups_data(groups.end..task.groups.end.min(groups.end + SIDE_BY_SIDE));
        let mut pieces = next.chunks((next.len() * TILE / SIDE_BY_SIDE).div_ceil(task.tokens.len()).max(1));
        decoded::with_bytes(isa, packed, scales, groups.len() * blocks, |weights, weight_scales| {
            let mut m = task.tokens.start;
            while m < task.tokens.end {
                let rows = tile_rows(task.tokens.end - m).min(TILE / SIDE_BY_SIDE);
                fetch(pieces.next().unwrap_or_default());
                let tile = BytesTile {
                    groups: groups.len(),
                    weights,
                    weight_scales,
                    block: x.block,
                    values: &x.values[m * w.k..],
                    corrections: &x.corrections[m * blocks..],
                    scales: &x.scales[m * blocks..],
                    k: w.k,
                };
                let mut acc = [[0.0f32; GROUP]; TILE];
                bytes_tile(isa, &tile, rows, &mut acc);
                for (acc, group) in acc.chunks_exact(rows).zip(groups.clone()) {
                    Finish::new(w, group, out).write(isa, m, acc, [x.global; TILE]);
                }
                m += rows;
            }
        });
    }
}

/// Asks for bytes that will be read soon.
fn fetch(bytes: &[u8]) {
    #[cfg(target_arch = "x86_64")]
    for line in bytes.chunks(64) {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: every x86-64 has the instruction, and asking changes nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(line.as_ptr().cast()) }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = bytes;
}

fn float_groups(isa: Isa, w: &PackedLinear, x: &FloatInput<'_>, task: &Task, out: Output) {
    // Groups that tiles may take side by side: with many tokens, one after the other, which stays in the first cache.
    let side_by_side = if task.tokens.len() < TILE { TILE / 2 } else { 1 };
    for first in task.groups.clone().step_by(side_by_side) {
        let groups = first..task.groups.end.min(first + side_by_side);
        let packed = w.groups_data(groups.clone());
        if decoded::worthwhile(w.element, task.tokens.len()) {
            decoded::with(isa, w.element, packed, |values| {
                float_tokens(isa, w, Element::F32, values, x, groups, task.tokens.clone(), out);
            });
        } else {
            float_tokens(isa, w, w.element, packed, x, groups, task.tokens.clone(), out);
        }
    }
}

/// Some groups of a float product, whose elements are `weights`, for some tokens.
#[allow(clippy::too_many_arguments)]
fn float_tokens(
    isa: Isa,
    w: &PackedLinear,
    element: Element,
    weights: &[u8],
    x: &FloatInput<'_>,
    groups: Range<usize>,
    tokens: Range<usize>,
    out: Output,
) {
    let block = if x.block == 0 { w.weight_block } else { w.weight_block.min(x.block) }.min(w.k_padded);
    let repeat = w.weight_block / block;
    let (scale_stride, scale_repeat) = if x.block == 0 { (0, 1) } else { (w.k.div_ceil(x.block), x.block / block) };
    let group_bytes = GROUP * element.row_bytes(w.k_padded);
    let mut m = tokens.start;
    while m < tokens.end {
        let rows = tile_rows(tokens.end - m);
        let mut first = groups.start;
        while first < groups.end {
            let count = tile_groups(rows, groups.end - first);
            let tile = FloatTile {
                element,
                groups: count,
                weights: &weights[(first - groups.start) * group_bytes..][..count * group_bytes],
                streamed: m == tokens.start && element == w.element,
                weight_scales: w.groups_scales(first..first + count),
                block,
                repeat,
                values: &x.values[m * w.k_padded..],
                scales: if x.block == 0 { &[] } else { &x.scales[m * scale_stride..] },
                scale_stride,
                scale_repeat,
                k: w.k_padded,
            };
            let mut acc = [[0.0f32; GROUP]; TILE];
            float_tile(isa, &tile, rows, &mut acc);
            let mut scales = [1.0; TILE];
            scales.iter_mut().zip(x.rows.get(m..).unwrap_or_default()).for_each(|(s, row)| *s = *row);
            for (g, acc) in acc[..count * rows].chunks_exact(rows).enumerate() {
                Finish::new(w, first + g, out).write(isa, m, acc, scales);
            }
            first += count;
        }
        m += rows;
    }
}

/// What turns a group's sums into outputs.
struct Finish<'a> {
    /// Scale of all rows, or of each.
    scale: f32,
    scales: Option<&'a [f32]>,
    bias: Option<&'a [f32]>,
    /// First row of the group, and how many of its 16 rows there are.
    n0: usize,
    count: usize,
    /// Row length of the output.
    n: usize,
    out: Output,
}

impl<'a> Finish<'a> {
    fn new(w: &'a PackedLinear, group: usize, out: Output) -> Self {
        let n0 = group * GROUP;
        let count = GROUP.min(w.n - n0);
        let (scale, scales) = match &w.output_scale {
            OutputScale::One => (1.0, None),
            OutputScale::Tensor(scale) => (*scale, None),
            OutputScale::Row(scales) => (1.0, Some(&scales[n0..n0 + count])),
        };
        Self { scale, scales, bias: w.bias.as_ref().map(|b| &b[n0..n0 + count]), n0, count, n: w.n, out }
    }

    /// Applies output scale, input scales and bias to the sums of tokens `m` and following, and writes their outputs.
    fn write(&self, isa: Isa, m: usize, acc: &[[f32; GROUP]], input_scales: [f32; TILE]) {
        let first = m * self.n + self.n0;
        if self.count == GROUP {
            let (scales, bias) = (self.scales.and_then(<[f32]>::first_chunk), self.bias.and_then(<[f32]>::first_chunk));
            return finish(isa, acc, self.scale, scales, &input_scales, bias, self.out, first, self.n);
        }
        let whole = |part: &[f32]| -> [f32; GROUP] { std::array::from_fn(|i| part.get(i).copied().unwrap_or(0.0)) };
        let (scales, bias) = (self.scales.map(whole), self.bias.map(whole));
        let mut y = [[0.0f32; GROUP]; TILE];
        let to = Output(y.as_mut_ptr().cast());
        finish(isa, acc, self.scale, scales.as_ref(), &input_scales, bias.as_ref(), to, 0, GROUP);
        for (i, y) in y[..acc.len()].iter().enumerate() {
            // SAFETY: this task owns the group's columns of these tokens, and those are `count` from `n0` on.
            unsafe { std::ptr::copy_nonoverlapping(y.as_ptr(), self.out.0.add(first + i * self.n), self.count) }
        }
    }
}

multiversion! {
    /// Writes `acc · (scale · input_scales[i]) + bias` of row `i` to `out` from `first + i · stride` on, which is the caller's; with
    /// `scales`, each column has its own.
    fn finish(
        acc: &[[f32; GROUP]], scale: f32, scales: Option<&[f32; GROUP]>, input_scales: &[f32; TILE],
        bias: Option<&[f32; GROUP]>, out: Output, first: usize, stride: usize,
    ) {
        // Made here, in a register: what is stored in pieces is slow to load as a whole.
        let scales = match scales {
            Some(scales) => *scales,
            None => [scale; GROUP],
        };
        for (i, (acc, input_scale)) in acc.iter().zip(input_scales).enumerate() {
            let mut y = [0.0f32; GROUP];
            for lane in 0..GROUP {
                y[lane] = acc[lane] * (scales[lane] * input_scale);
            }
            if let Some(bias) = bias {
                for lane in 0..GROUP {
                    y[lane] += bias[lane];
                }
            }
            // SAFETY: the caller owns 16 columns of these rows.
            unsafe { out.0.add(first + i * stride).cast::<[f32; GROUP]>().write_unaligned(y) }
        }
    }
}

/// Computes the first 8, 4, 2 or 1 of `rows` tokens and returns how many that were.
fn integer_tile(isa: Isa, t: &IntegerTile<'_>, rows: usize, acc: &mut [[f32; GROUP]; TILE]) -> usize {
    let rows = tile_rows(rows);
    match isa.kind() {
        // SAFETY: an Isa of this kind exists only if the CPU has the features; slices cover `rows` tokens.
        #[cfg(target_arch = "x86_64")]
        Kind::Avx512 => unsafe { avx512::integer(t, rows, acc) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Kind::Avx2 => unsafe { avx2::integer(t, rows, acc) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Kind::AvxVnni => unsafe { avx2::integer_vnni(t, rows, acc) },
        // SAFETY: as above.
        #[cfg(target_arch = "aarch64")]
        Kind::Neon => unsafe { neon::integer(t, rows, acc) },
        _ => scalar::integer(t, rows, acc),
    }
    rows
}

/// Computes `rows` (4, 2 or 1) tokens of all groups of the tile.
fn bytes_tile(isa: Isa, t: &BytesTile<'_>, rows: usize, acc: &mut [[f32; GROUP]; TILE]) {
    match isa.kind() {
        // SAFETY: an Isa of this kind exists only if the CPU has the features; slices cover `rows` tokens.
        #[cfg(target_arch = "x86_64")]
        Kind::Avx512 => unsafe { avx512::bytes(t, rows, acc) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Kind::Avx2 => unsafe { avx2::bytes(t, rows, acc) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Kind::AvxVnni => unsafe { avx2::bytes_vnni(t, rows, acc) },
        _ => scalar::bytes(t, rows, acc),
    }
}

/// Computes `rows` tokens of all groups of the tile.
fn float_tile(isa: Isa, t: &FloatTile<'_>, rows: usize, acc: &mut [[f32; GROUP]; TILE]) {
    match isa.kind() {
        // SAFETY: an Isa of this kind exists only if the CPU has the features; slices cover `rows` tokens.
        #[cfg(target_arch = "x86_64")]
        Kind::Avx512 => unsafe { avx512::float(t, rows, acc) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Kind::Avx2 | Kind::AvxVnni => unsafe { avx2::float(t, rows, acc) },
        // SAFETY: as above.
        #[cfg(target_arch = "aarch64")]
        Kind::Neon => unsafe { neon::float(t, rows, acc) },
        _ => scalar::float(t, rows, acc),
    }
}

/// How many of `groups` groups a float tile of so many tokens takes side by side.
fn tile_groups(rows: usize, groups: usize) -> usize {
    match (rows, groups) {
        (1 | 2, 4..) => 4,
        (1 | 2 | 4, 2..) => 2,
        _ => 1,
    }
}

fn tile_rows(rows: usize) -> usize {
    match rows {
        8.. => 8,
        4..8 => 4,
        2..4 => 2,
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Bytes from a seed; good enough to be any code.
    fn bytes(seed: u64, count: usize) -> Vec<u8> {
        let mut state = seed | 1;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        };
        (0..count).map(|_| next()).collect()
    }

    /// Floats in ±2 with many exponents.
    fn floats(seed: u64, count: usize) -> Vec<f32> {
        let part = |b: &[u8]| (f32::from(b[0]) - 127.5) / 64.0 * 2f32.powi(-i32::from(b[1] % 24));
        bytes(seed, 2 * count).as_chunks::<2>().0.iter().map(|b| part(b)).collect()
    }

    /// Codes of scales, none of them NaN.
    fn codes(seed: u64, blocks: usize, e4m3: bool) -> Vec<[u8; GROUP]> {
        let code = |b: u8| if e4m3 { (b & 0x7f).min(0x7e) } else { b.min(0xfe) };
        bytes(seed, blocks * GROUP).as_chunks::<GROUP>().0.iter().map(|c| c.map(code)).collect()
    }

    fn bits(acc: &[[f32; GROUP]], rows: usize) -> Vec<u32> {
        acc[..rows].iter().flatten().map(|v| v.to_bits()).collect()
    }

    proptest! {
        #[test]
        fn integer_tiles_of_every_instruction_set_equal_scalar(seed in any::<u64>(), size in 0usize..4, blocks in 1usize..9, wide in any::<bool>(), e4m3 in any::<bool>()) {
            let (rows, block) = (1 << size, if wide { 32 } else { 16 });
            let k = blocks * block;
            let values: Vec<i8> = bytes(seed ^ 1, rows * k).iter().map(|b| crate::formats::e2m1::DOUBLED[usize::from(b & 15)]).collect();
            let corrections: Vec<i32> = values.chunks_exact(block).map(|b| -12 * b.iter().map(|&v| i32::from(v)).sum::<i32>()).collect();
            let (weights, codes, scales) = (bytes(seed, k * GROUP / 2), codes(seed ^ 2, blocks, e4m3), floats(seed ^ 3, rows * blocks));
            let weight_scales = if e4m3 { Scales::E4m3(&codes) } else { Scales::E8m0(&codes) };
            let t = IntegerTile { weights: &weights, streamed: wide, weight_scales, block, values: &values, corrections: &corrections, scales: &scales, k };
            let mut expected = [[0.0; GROUP]; TILE];
            scalar::integer(&t, rows, &mut expected);
            for isa in Isa::available() {
                let mut acc = [[0.0; GROUP]; TILE];
                prop_assert_eq!(integer_tile(isa, &t, rows, &mut acc), rows);
                prop_assert_eq!(bits(&acc, rows), bits(&expected, rows), "{}", isa);
            }
            #[cfg(target_arch = "x86_64")]
            if Isa::available().iter().any(|isa| isa.kind() == Kind::Avx512) {
                let mut acc = [[0.0; GROUP]; TILE];
                // SAFETY: an Isa of this kind exists only if the CPU has the features; slices cover `rows` tokens.
                unsafe { avx2::integer_vnni_512(&t, rows, &mut acc) }
                prop_assert_eq!(bits(&acc, rows), bits(&expected, rows), "AVX-VNNI's kernel");
            }
        }

        #[test]
        fn byte_tiles_of_every_instruction_set_equal_scalar(seed in any::<u64>(), size in 0usize..3, groups in 1usize..3, blocks in 1usize..9, wide in any::<bool>(), e4m3 in any::<bool>()) {
            let (rows, block) = (1 << size, if wide { 32 } else { 16 });
            let k = blocks * block;
            let values: Vec<i8> = bytes(seed ^ 1, rows * k).iter().map(|b| crate::formats::e2m1::DOUBLED[usize::from(b & 15)]).collect();
            let corrections: Vec<i32> = values.chunks_exact(block).map(|b| -12 * b.iter().map(|&v| i32::from(v)).sum::<i32>()).collect();
            let (weights, codes) = (bytes(seed, groups * k * GROUP / 2), codes(seed ^ 2, groups * blocks, e4m3));
            let scales = floats(seed ^ 3, rows * blocks);
            let of = |codes| if e4m3 { Scales::E4m3(codes) } else { Scales::E8m0(codes) };
            let mut expected = Vec::new();
            for (weights, codes) in weights.chunks_exact(k * GROUP / 2).zip(codes.chunks_exact(blocks)) {
                let t = IntegerTile { weights, streamed: false, weight_scales: of(codes), block, values: &values, corrections: &corrections, scales: &scales, k };
                let mut acc = [[0.0; GROUP]; TILE];
                scalar::integer(&t, rows, &mut acc);
                expected.extend(bits(&acc, rows));
            }
            for isa in Isa::available() {
                decoded::with_bytes(isa, &weights, of(&codes), groups * blocks, |weights, weight_scales| {
                    let t = BytesTile { groups, weights, weight_scales, block, values: &values, corrections: &corrections, scales: &scales, k };
                    let mut acc = [[0.0; GROUP]; TILE];
                    bytes_tile(isa, &t, rows, &mut acc);
                    assert_eq!(bits(&acc, groups * rows), expected, "{isa}");
                    #[cfg(target_arch = "x86_64")]
                    if isa.kind() == Kind::Avx512 {
                        let mut acc = [[0.0; GROUP]; TILE];
                        // SAFETY: an Isa of this kind exists only if the CPU has the features; slices cover `rows` tokens.
                        unsafe { avx2::bytes_vnni_512(&t, rows, &mut acc) }
                        assert_eq!(bits(&acc, groups * rows), expected, "AVX-VNNI's kernel");
                    }
                });
            }
        }

        #[test]
        fn float_tiles_of_every_instruction_set_equal_scalar(
            seed in any::<u64>(), size in 0usize..4, wide in 0usize..3, chunks in 1usize..40, block in 1usize..20, which in 0usize..5,
            kind in 0usize..4, repeat in 1usize..4, scale_repeat in 0usize..4,
        ) {
            let element = [Element::F32, Element::F16, Element::Bf16, Element::E4m3, Element::E2m1][which];
            let (rows, k, block) = (1 << size, 8 * chunks, 8 * block);
            let groups = tile_groups(rows, 1 << wide);
            let blocks = k.div_ceil(block);
            let mut weights = bytes(seed, groups * GROUP * element.row_bytes(k));
            match element {
                Element::F32 => weights = floats(seed, groups * GROUP * k).iter().flat_map(|v| v.to_le_bytes()).collect(),
                // No NaN and no infinity: the loader refuses them. Exponent bits of all ones lose the lowest.
                Element::F16 => weights.chunks_exact_mut(2).filter(|b| b[1] & 0x7c == 0x7c).for_each(|b| b[1] &= !4),
                Element::Bf16 => weights.chunks_exact_mut(2).for_each(|b| b[1] = (b[1] & 0x80) | (0x3b + b[1] % 6)),
                Element::E4m3 => weights.iter_mut().filter(|b| **b & 0x7f == 0x7f).for_each(|b| *b &= !1),
                Element::E2m1 => {}
            }
            let weight_blocks = groups * k.div_ceil(block * repeat);
            let (codes, grid) = (codes(seed ^ 2, weight_blocks, kind == 1), floats(seed ^ 2, weight_blocks));
            let weight_scales = [Scales::None, Scales::E4m3(&codes), Scales::E8m0(&codes), Scales::Grid(&grid)][kind];
            let scale_stride = blocks.div_ceil(scale_repeat.max(1));
            let scales = floats(seed ^ 3, if scale_repeat == 0 { 0 } else { rows * scale_stride });
            let values = floats(seed ^ 1, rows * k);
            let t = FloatTile {
                element, groups, weights: &weights, streamed: wide == 0, weight_scales, block, repeat, values: &values, scales: &scales, scale_stride,
                scale_repeat: scale_repeat.max(1), k,
            };
            let mut expected = [[0.0; GROUP]; TILE];
            scalar::float(&t, rows, &mut expected);
            for isa in Isa::available() {
                let mut acc = [[0.0; GROUP]; TILE];
                float_tile(isa, &t, rows, &mut acc);
                prop_assert_eq!(bits(&acc, groups * rows), bits(&expected, groups * rows), "{} {:?}", isa, element);
            }
        }
    }
}
