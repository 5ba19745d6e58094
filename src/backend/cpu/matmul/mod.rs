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
#[cfg(target_arch = "aarch64")]
mod neon;
mod scalar;

use rayon::prelude::*;

use super::activation::{FloatInput, Input, IntegerInput};
use super::isa::{Isa, Kind};
use super::packed::{GROUP, PackedLinear};
use crate::formats::linear::Element;

/// Tokens that one kernel call computes side by side, at most.
const TILE: usize = 8;
/// Tokens that one task goes through: bounds the task's share of the input to what a second-level cache holds.
const TASK_TOKENS: usize = 128;

/// Doubled E2M1 values + 12: unsigned, as x86's byte products want their first factor. The sums of a block stay below
/// 2¹⁵. `IntegerTile::corrections` undoes the offset.
#[cfg(target_arch = "x86_64")]
const OFFSET_CODES: [u8; 16] = {
    let mut t = [0; 16];
    let mut i = 0;
    while i < 16 {
        t[i] = (crate::formats::e2m1::DOUBLED[i] + 12) as u8;
        i += 1;
    }
    t
};

/// One tile of tokens of an integer product over one group of rows.
struct IntegerTile<'a> {
    /// Packed elements of the group.
    weights: &'a [u8],
    /// [K/block] scales of the group's 16 rows.
    weight_scales: &'a [[f32; GROUP]],
    /// Elements of a block: 16 or 32.
    block: usize,
    /// First token's doubled values, K apart; likewise its corrections and scales, K/block apart.
    values: &'a [i8],
    corrections: &'a [i32],
    scales: &'a [f32],
    /// K.
    k: usize,
}

/// One tile of tokens of a float product over one group of rows.
struct FloatTile<'a> {
    element: Element,
    weights: &'a [u8],
    /// [blocks] scales of the group's 16 rows.
    weight_scales: &'a [[f32; GROUP]],
    /// Elements of a block, a multiple of 8.
    block: usize,
    /// First token's values, `k` apart.
    values: &'a [f32],
    /// First token's block scales, `scale_stride` apart (0: the same for all tokens).
    scales: &'a [f32],
    scale_stride: usize,
    /// K padded to a multiple of 8.
    k: usize,
}

/// Raw pointer to the output; tasks write disjoint parts of it.
#[derive(Clone, Copy)]
struct Output(*mut f32);
// SAFETY: every task writes its own rows and columns only, see `run`.
unsafe impl Send for Output {}
// SAFETY: as above.
unsafe impl Sync for Output {}

/// Computes several products of the same number of tokens in one parallel sweep.
pub(super) fn run(isa: Isa, jobs: &mut [(&PackedLinear, &Input<'_>, &mut [f32])], m: usize) {
    let spans = m.div_ceil(TASK_TOKENS);
    let mut tasks = Vec::new();
    let outputs: Vec<Output> = jobs.iter_mut().map(|j| Output(j.2.as_mut_ptr())).collect();
    for (job, (w, _, out)) in jobs.iter().enumerate() {
        assert_eq!(out.len(), m * w.n, "output of {} has the wrong size", w.name);
        for group in 0..w.groups() {
            tasks.extend((0..spans).map(|span| (job, group, span)));
        }
    }
    // A few groups make a task: enough work to pay for handing it over, little enough to balance.
    let per_task = (tasks.len() / (8 * rayon::current_num_threads())).clamp(1, 64);
    let jobs: Vec<(&PackedLinear, &Input<'_>)> = jobs.iter().map(|j| (j.0, j.1)).collect();
    tasks.par_chunks(per_task).for_each_init(Vec::new, |scratch, tasks| {
        for &(job, group, span) in tasks {
            let (w, input) = jobs[job];
            let tokens = span * TASK_TOKENS..m.min((span + 1) * TASK_TOKENS);
            match input {
                Input::Integer(x) => integer_group(isa, w, x, group, tokens, scratch, outputs[job]),
                Input::Float(x) => float_group(isa, w, x, group, tokens, scratch, outputs[job]),
            }
        }
    });
}

fn integer_group(
    isa: Isa,
    w: &PackedLinear,
    x: &IntegerInput,
    group: usize,
    tokens: std::ops::Range<usize>,
    scratch: &mut Vec<[f32; GROUP]>,
    out: Output,
) {
    let blocks = w.k / x.block;
    w.group_scales(group, x.block, scratch);
    let finish = Finish::new(w, group, out);
    let mut m = tokens.start;
    while m < tokens.end {
        let tile = IntegerTile {
            weights: w.group_data(group),
            weight_scales: scratch,
            block: x.block,
            values: &x.values[m * w.k..],
            corrections: &x.corrections[m * blocks..],
            scales: &x.scales[m * blocks..],
            k: w.k,
        };
        let mut acc = [[0.0f32; GROUP]; TILE];
        let rows = integer_tile(isa, &tile, tokens.end - m, &mut acc);
        for (i, acc) in acc[..rows].iter().enumerate() {
            finish.write(m + i, acc, x.global);
        }
        m += rows;
    }
}

fn float_group(
    isa: Isa,
    w: &PackedLinear,
    x: &FloatInput<'_>,
    group: usize,
    tokens: std::ops::Range<usize>,
    scratch: &mut Vec<[f32; GROUP]>,
    out: Output,
) {
    let block = if x.block == 0 { w.weight_block } else { w.weight_block.min(x.block) }.min(w.k_padded);
    let blocks = w.k_padded.div_ceil(block);
    w.group_scales(group, block, scratch);
    // Activation blocks longer than the weight's are repeated; none at all are ones, shared by every token.
    let repeat = if x.block == 0 { 0 } else { x.block / block };
    let expanded: Vec<f32> = match repeat {
        0 => vec![1.0; blocks],
        1 => Vec::new(),
        _ => {
            let per_row = w.k.div_ceil(x.block);
            let rows = x.scales[tokens.start * per_row..tokens.end * per_row].chunks_exact(per_row);
            rows.flat_map(|r| r.iter().flat_map(|&s| std::iter::repeat_n(s, repeat)).take(blocks)).collect()
        }
    };
    let finish = Finish::new(w, group, out);
    let mut m = tokens.start;
    while m < tokens.end {
        let (scales, scale_stride) = match repeat {
            0 => (&expanded[..], 0),
            1 => (&x.scales[m * blocks..], blocks),
            _ => (&expanded[(m - tokens.start) * blocks..], blocks),
        };
        let tile = FloatTile {
            element: w.element,
            weights: w.group_data(group),
            weight_scales: scratch,
            block,
            values: &x.values[m * w.k_padded..],
            scales,
            scale_stride,
            k: w.k_padded,
        };
        let mut acc = [[0.0f32; GROUP]; TILE];
        let rows = float_tile(isa, &tile, tokens.end - m, &mut acc);
        for (i, acc) in acc[..rows].iter().enumerate() {
            finish.write(m + i, acc, x.rows.get(m + i).copied().unwrap_or(1.0));
        }
        m += rows;
    }
}

/// What turns a group's sums into outputs.
struct Finish<'a> {
    scales: [f32; GROUP],
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
        let mut scales = [0.0; GROUP];
        scales[..count].iter_mut().enumerate().for_each(|(i, s)| *s = w.output_scale.at(n0 + i));
        Self { scales, bias: w.bias.as_ref().map(|b| &b[n0..n0 + count]), n0, count, n: w.n, out }
    }

    /// Applies output scale, input scale and bias and writes the outputs of token `m`.
    #[inline(always)]
    fn write(&self, m: usize, acc: &[f32; GROUP], input_scale: f32) {
        let mut y = [0.0f32; GROUP];
        for i in 0..GROUP {
            y[i] = acc[i] * (self.scales[i] * input_scale);
        }
        if let Some(bias) = self.bias {
            y.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
        }
        // SAFETY: this task owns the group's columns of token `m`, and those are `count` from `n0` on.
        unsafe {
            let to = self.out.0.add(m * self.n + self.n0);
            // A length known when compiling spares the call.
            if self.count == GROUP {
                to.cast::<[f32; GROUP]>().write_unaligned(y);
            } else {
                std::ptr::copy_nonoverlapping(y.as_ptr(), to, self.count);
            }
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
        #[cfg(target_arch = "aarch64")]
        Kind::Neon => unsafe { neon::integer(t, rows, acc) },
        _ => scalar::integer(t, rows, acc),
    }
    rows
}

/// As [`integer_tile`] for the float family.
fn float_tile(isa: Isa, t: &FloatTile<'_>, rows: usize, acc: &mut [[f32; GROUP]; TILE]) -> usize {
    let rows = tile_rows(rows);
    match isa.kind() {
        // SAFETY: an Isa of this kind exists only if the CPU has the features; slices cover `rows` tokens.
        #[cfg(target_arch = "x86_64")]
        Kind::Avx512 => unsafe { avx512::float(t, rows, acc) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Kind::Avx2 => unsafe { avx2::float(t, rows, acc) },
        // SAFETY: as above.
        #[cfg(target_arch = "aarch64")]
        Kind::Neon => unsafe { neon::float(t, rows, acc) },
        _ => scalar::float(t, rows, acc),
    }
    rows
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

    fn scales(seed: u64, blocks: usize) -> Vec<[f32; GROUP]> {
        floats(seed, blocks * GROUP).as_chunks::<GROUP>().0.to_vec()
    }

    fn bits(acc: &[[f32; GROUP]; TILE], rows: usize) -> Vec<u32> {
        acc[..rows].iter().flatten().map(|v| v.to_bits()).collect()
    }

    proptest! {
        #[test]
        fn integer_tiles_of_every_instruction_set_equal_scalar(seed in any::<u64>(), size in 0usize..4, blocks in 1usize..9, wide in any::<bool>()) {
            let (rows, block) = (1 << size, if wide { 32 } else { 16 });
            let k = blocks * block;
            let values: Vec<i8> = bytes(seed ^ 1, rows * k).iter().map(|b| crate::formats::e2m1::DOUBLED[usize::from(b & 15)]).collect();
            let corrections: Vec<i32> = values.chunks_exact(block).map(|b| -12 * b.iter().map(|&v| i32::from(v)).sum::<i32>()).collect();
            let (weights, weight_scales, scales) = (bytes(seed, k * GROUP / 2), scales(seed ^ 2, blocks), floats(seed ^ 3, rows * blocks));
            let t = IntegerTile { weights: &weights, weight_scales: &weight_scales, block, values: &values, corrections: &corrections, scales: &scales, k };
            let mut expected = [[0.0; GROUP]; TILE];
            scalar::integer(&t, rows, &mut expected);
            for isa in Isa::available() {
                let mut acc = [[0.0; GROUP]; TILE];
                prop_assert_eq!(integer_tile(isa, &t, rows, &mut acc), rows);
                prop_assert_eq!(bits(&acc, rows), bits(&expected, rows), "{}", isa);
            }
        }

        #[test]
        fn float_tiles_of_every_instruction_set_equal_scalar(seed in any::<u64>(), size in 0usize..4, chunks in 1usize..40, block in 1usize..20, which in 0usize..5, shared in any::<bool>()) {
            let element = [Element::F32, Element::F16, Element::Bf16, Element::E4m3, Element::E2m1][which];
            let (rows, k, block) = (1 << size, 8 * chunks, 8 * block);
            let blocks = k.div_ceil(block);
            let mut weights = bytes(seed, GROUP * element.row_bytes(k));
            match element {
                Element::F32 => weights = floats(seed, GROUP * k).iter().flat_map(|v| v.to_le_bytes()).collect(),
                // No NaN and no infinity: the loader refuses them. Exponent bits of all ones lose the lowest.
                Element::F16 => weights.chunks_exact_mut(2).filter(|b| b[1] & 0x7c == 0x7c).for_each(|b| b[1] &= !4),
                Element::Bf16 => weights.chunks_exact_mut(2).for_each(|b| b[1] = (b[1] & 0x80) | (0x3b + b[1] % 6)),
                Element::E4m3 => weights.iter_mut().filter(|b| **b & 0x7f == 0x7f).for_each(|b| *b &= !1),
                Element::E2m1 => {}
            }
            let stride = if shared { 0 } else { blocks };
            let (weight_scales, scales) = (scales(seed ^ 2, blocks), floats(seed ^ 3, rows * blocks));
            let values = floats(seed ^ 1, rows * k);
            let t = FloatTile { element, weights: &weights, weight_scales: &weight_scales, block, values: &values, scales: &scales, scale_stride: stride, k };
            let mut expected = [[0.0; GROUP]; TILE];
            scalar::float(&t, rows, &mut expected);
            for isa in Isa::available() {
                let mut acc = [[0.0; GROUP]; TILE];
                prop_assert_eq!(float_tile(isa, &t, rows, &mut acc), rows);
                prop_assert_eq!(bits(&acc, rows), bits(&expected, rows), "{} {:?}", isa, element);
            }
        }
    }
}
