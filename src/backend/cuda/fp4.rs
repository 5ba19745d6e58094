//! Weights of four bits for FP4 tensor cores (kernels/fp4.cu): codes and scales as the instruction reads them, the layout of
//! kernels/weight.cuh.

use rayon::prelude::*;

use super::weight::{Packed, ROWS, STEP, TILE};
use crate::formats::e8m0;
use crate::formats::linear::{BlockScales, LinearTensors};

/// The code of 1 in E8M0: what the largest scale of a row of MX blocks becomes.
const ONE: i32 = 127;

/// Packs E2M1 under E4M3 scales of 16 columns, or E8M0 of 32. MX scales are those of a row divided by its largest, which its
/// output scale is multiplied by: what is too small beside it then counts as nothing.
pub(super) fn pack(t: &LinearTensors<'_>) -> Packed {
    let (block, codes, power) = match &t.block_scales {
        BlockScales::E4m3 { block, codes } => (*block, &codes[..], false),
        BlockScales::E8m0 { block, codes } => (*block, &codes[..], true),
        BlockScales::None | BlockScales::Grid { .. } => (t.k.max(1), &[][..], false),
    };
    let blocks = t.k / block;
    let steps = t.k.div_ceil(STEP);
    let tiles = t.n.next_multiple_of(ROWS) / TILE;
    let top = |n: usize| codes[n * blocks..(n + 1) * blocks].iter().copied().max().unwrap_or(ONE as u8);
    let tops: Vec<u8> = if power { (0..t.n).map(top).collect() } else { Vec::new() };
    // The scale over column `k` of row `n` as the kernels read it; 0 beyond the edge and where it counts nothing.
    let scale = |n: usize, k: usize| -> u8 {
        match codes.get(n * blocks + k / block).filter(|_| n < t.n && k < t.k) {
            None => 0,
            Some(code) if power => (ONE + i32::from(*code) - i32::from(tops[n])).max(0) as u8,
            Some(code) => code & 0x7f,
        }
    };
    // Eight codes of row `n` from column `k` on; they share a scale.
    let eight = |n: usize, k: usize| -> u32 {
        if n >= t.n || k >= t.k || scale(n, k) == 0 {
            return 0;
        }
        let from = (n * t.k + k) / 2;
        t.data[from..from + 4].iter().rev().fold(0, |word, byte| word << 8 | u32::from(*byte))
    };
    let mut words = vec![0u32; tiles * steps * 2 * 32 * 4];
    words.par_chunks_mut(2 * 32 * 4).enumerate().for_each(|(i, out)| {
        let (n0, k0) = (i / steps * TILE, i % steps * STEP);
        for (at, word) in out.iter_mut().enumerate() {
            let (half, lane, part) = (at / 128, at / 4 % 32, at % 4);
            *word = eight(n0 + lane / 4 + part % 2 * 8, k0 + half * 64 + part / 2 * 32 + lane % 4 * 8);
        }
    });
    let width = if power { 16 } else { 32 };
    let mut scales = vec![0u32; tiles * steps * width];
    scales.par_chunks_mut(width).enumerate().for_each(|(i, out)| {
        let (n0, k0) = (i / steps * TILE, i % steps * STEP);
        for (at, word) in out.iter_mut().enumerate() {
            // Two lanes of a group have its two rows; where a row has two words, two more have the second.
            let lanes = width / 8;
            let (row, first) = (n0 + at / lanes + at % 2 * 8, k0 + at % lanes / 2 * 64);
            *word = (0..4).rev().fold(0, |word, b| word << 8 | u32::from(scale(row, first + b * block)));
        }
    });
    let rows = (0..t.n).map(|n| if power { e8m0::decode(tops[n]) } else { 1.0 }).collect();
    Packed { words, scales, rows }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::linear::ActivationFormat;
    use crate::formats::synthetic::{self, WEIGHTS};
    use crate::random::SplitMix64;

    /// From the comment in kernels/weight.cuh, the other way round: where an element and its scale stand.
    #[test]
    fn every_element_stands_where_the_instruction_reads_it() {
        for (weight, block) in [(WEIGHTS[6], 16), (WEIGHTS[8], 32)] {
            let (n, k) = (40, 288);
            let t = synthetic::layer(&mut SplitMix64(9), n, k, weight, ActivationFormat::Float);
            let (BlockScales::E4m3 { codes, .. } | BlockScales::E8m0 { codes, .. }) = &t.block_scales else {
                panic!("{weight:?}")
            };
            let packed = pack(&t);
            for row in 0..n {
                let of_row = &codes[row * k / block..(row + 1) * k / block];
                let top = *of_row.iter().max().unwrap();
                for column in 0..k {
                    let at = row / 16 * 3 + column / 128;
                    let lane = row % 8 * 4 + column % 32 / 8;
                    let (part, half) = (row / 8 % 2 + column / 32 % 2 * 2, column / 64 % 2);
                    let word = packed.words[((at * 2 + half) * 32 + lane) * 4 + part];
                    let expected =
                        i32::from(of_row[column / block]) + if block == 16 { 0 } else { 127 - i32::from(top) };
                    let code = t.data[(row * k + column) / 2] >> (4 * (column % 2)) & 15;
                    // Under a scale of 0 nothing is left.
                    let code = if expected == 0 { 0 } else { u32::from(code) };
                    assert_eq!(word >> (4 * (column % 8)) & 15, code, "{row} {column}");
                    let (word, byte) = match block {
                        16 => (at * 32 + row % 8 * 4 + half * 2 + row / 8 % 2, column / 16 % 4),
                        _ => (at * 16 + row % 8 * 2 + row / 8 % 2, column / 32 % 4),
                    };
                    assert_eq!((packed.scales[word] >> (8 * byte) & 255) as i32, expected, "{row} {column}");
                }
            }
        }
    }
}
