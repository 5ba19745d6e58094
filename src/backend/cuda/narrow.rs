//! Weights as FP4 and FP8 tensor cores read them (kernels/narrow.cu): codes and scales as they are, in the layout of
//! kernels/weight.cuh.

use rayon::prelude::*;

use super::weight::{Packed, ROWS, STEP, TILE};
use crate::formats::e8m0;
use crate::formats::linear::{BlockScales, LinearTensors};

/// The code of 1 in E8M0: what the largest scale of a row of MX blocks becomes.
const ONE: i32 = 127;

/// Packs E2M1 under E4M3 scales of 16 columns, or E2M1 and E4M3 under E8M0 of 32 or no block scales. MX scales are those of a row
/// divided by its largest, which its output scale is multiplied by: what is too small beside it then counts as nothing.
pub(super) fn pack_codes(t: &LinearTensors<'_>) -> Packed {
    let (block, codes, power) = match &t.block_scales {
        BlockScales::E4m3 { block, codes } => (*block, Some(&codes[..]), false),
        BlockScales::E8m0 { block, codes } => (*block, Some(&codes[..]), true),
        BlockScales::None | BlockScales::Grid { .. } => (t.k.max(1), None, false),
    };
    let blocks = t.k / block;
    let steps = t.k.div_ceil(STEP);
    let tiles = t.n.next_multiple_of(ROWS) / TILE;
    let of_row = |n: usize| codes.map(|c| &c[n * blocks..(n + 1) * blocks]);
    let top = |n: usize| of_row(n).and_then(|c| c.iter().copied().max()).unwrap_or(ONE as u8);
    let tops: Vec<u8> = if power { (0..t.n).map(top).collect() } else { Vec::new() };
    // The scale over column `k` of row `n` as the kernels read it; 0 beyond the edge and where it counts nothing.
    let scale = |n: usize, k: usize| -> u8 {
        match codes.and_then(|c| c.get(n * blocks + k / block)).filter(|_| n < t.n && k < t.k) {
            None => 0,
            Some(code) if power => (ONE + i32::from(*code) - i32::from(tops[n])).max(0) as u8,
            Some(code) => code & 0x7f,
        }
    };
    let row_bytes = t.element.row_bytes(t.k);
    // A word of codes of row `n` from column `k` on; those of a block share a scale.
    let word = |n: usize, k: usize| -> u32 {
        if n >= t.n || k >= t.k || (codes.is_some() && scale(n, k) == 0) {
            return 0;
        }
        let from = t.element.row_bytes(k);
        let bytes = &t.data[n * row_bytes + from..n * row_bytes + row_bytes.min(from + 4)];
        bytes.iter().rev().fold(0, |word, byte| word << 8 | u32::from(*byte))
    };
    // Columns of a product, and from a lane's first word of a row to its second.
    let (columns, second) = if t.element.row_bytes(2) == 1 { (64, 32) } else { (32, 4) };
    let mut words = vec![0u32; tiles * steps * (STEP / columns) * 128];
    words.par_chunks_mut(STEP / columns * 128).enumerate().for_each(|(i, out)| {
        let (n0, k0) = (i / steps * TILE, i % steps * STEP);
        for (at, out) in out.iter_mut().enumerate() {
            let (product, lane, part) = (at / 128, at / 4 % 32, at % 4);
            *out = word(n0 + lane / 4 + part % 2 * 8, k0 + product * columns + lane % 4 * 8 + part / 2 * second);
        }
    });
    let width = if power { 16 } else { 32 };
    let mut scales = vec![0u32; if codes.is_some() { tiles * steps * width } else { 0 }];
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
        for (weight, block, k) in
            [(WEIGHTS[6], 16, 288), (WEIGHTS[8], 32, 288), (WEIGHTS[3], 0, 301), (WEIGHTS[4], 32, 288)]
        {
            let n = 40;
            let t = synthetic::layer(&mut SplitMix64(9), n, k, weight, ActivationFormat::Float);
            let codes = match &t.block_scales {
                BlockScales::E4m3 { codes, .. } | BlockScales::E8m0 { codes, .. } => &codes[..],
                _ => &[],
            };
            let four = weight.0.row_bytes(2) == 1;
            let packed = pack_codes(&t);
            assert_eq!(packed.scales.is_empty(), block == 0);
            for row in 0..n {
                let first = (row * k).checked_div(block);
                let of_row = first.map_or(&[][..], |first| &codes[first..first + k / block]);
                for column in 0..k {
                    let at = row / 16 * 3 + column / 128;
                    let lane = row % 8 * 4 + column % 32 / 8;
                    let (word, bits, code) = if four {
                        let (part, half) = (row / 8 % 2 + column / 32 % 2 * 2, column / 64 % 2);
                        let code = t.data[(row * k + column) / 2] >> (4 * (column % 2)) & 15;
                        (((at * 2 + half) * 32 + lane) * 4 + part, 4 * (column % 8), code)
                    } else {
                        let (part, product) = (row / 8 % 2 + column / 4 % 2 * 2, column / 32 % 4);
                        (((at * 4 + product) * 32 + lane) * 4 + part, 8 * (column % 4), t.data[row * k + column])
                    };
                    let expected = match of_row.iter().max() {
                        None => 1,
                        Some(_) if block == 16 => i32::from(of_row[column / block]),
                        Some(top) => i32::from(of_row[column / block]) + 127 - i32::from(*top),
                    };
                    // Under a scale of 0 nothing is left.
                    let code = if expected == 0 { 0 } else { u32::from(code) };
                    assert_eq!(packed.words[word] >> bits & if four { 15 } else { 255 }, code, "{row} {column}");
                    let (half, upper) = (column / 64 % 2, row / 8 % 2);
                    let (word, byte) = match block {
                        0 => continue,
                        16 => (at * 32 + row % 8 * 4 + half * 2 + upper, column / 16 % 4),
                        _ => (at * 16 + row % 8 * 2 + upper, column / 32 % 4),
                    };
                    assert_eq!((packed.scales[word] >> (8 * byte) & 255) as i32, expected, "{row} {column}");
                }
            }
        }
    }
}
