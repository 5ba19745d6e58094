//! Weights as FP4 and FP8 tensor cores read them (kernels/narrow.cu, kernels/tcgen.cu): codes and scales as they are, in the layouts of
//! kernels/weight.cuh.

use rayon::prelude::*;

use super::weight::{Packed, ROWS, SIDE, STEP, TILE};
use crate::formats::e8m0;
use crate::formats::linear::{BlockScales, LinearTensors};

/// The code of 1 in E8M0: what the largest scale of a row of MX blocks becomes.
const ONE: i32 = 127;

/// Codes and scales of a weight: E2M1 under E4M3 scales of 16 columns, or E2M1 and E4M3 under E8M0 of 32 or no block scales. MX scales are
/// those of a row divided by its largest, which its output scale is multiplied by: what is too small beside it then counts as nothing.
struct Codes<'a> {
    t: &'a LinearTensors<'a>,
    block: usize,
    scales: Option<&'a [u8]>,
    /// Of rows of MX blocks, the largest scale.
    tops: Option<Vec<u8>>,
}

impl<'a> Codes<'a> {
    fn of(t: &'a LinearTensors<'a>) -> Self {
        let (block, scales, power) = match &t.block_scales {
            BlockScales::E4m3 { block, codes } => (*block, Some(&codes[..]), false),
            BlockScales::E8m0 { block, codes } => (*block, Some(&codes[..]), true),
            BlockScales::None | BlockScales::Grid { .. } => (t.k.max(1), None, false),
        };
        let blocks = t.k / block;
        let top =
            |n: usize| scales.and_then(|c| c[n * blocks..(n + 1) * blocks].iter().copied().max()).unwrap_or(ONE as u8);
        Self { t, block, scales, tops: power.then(|| (0..t.n).map(top).collect()) }
    }

    /// The scale over column `k` of row `n` as the kernels read it; 0 beyond the edge and where it counts nothing.
    fn scale(&self, n: usize, k: usize) -> u8 {
        let blocks = self.t.k / self.block;
        let code =
            self.scales.and_then(|c| c.get(n * blocks + k / self.block)).filter(|_| n < self.t.n && k < self.t.k);
        match (code, &self.tops) {
            (None, _) => 0,
            (Some(code), Some(tops)) => (ONE + i32::from(*code) - i32::from(tops[n])).max(0) as u8,
            (Some(code), None) => code & 0x7f,
        }
    }

    /// A word of codes of row `n` from column `k` on; those of a block share a scale.
    fn word(&self, n: usize, k: usize) -> u32 {
        let t = self.t;
        if n >= t.n || k >= t.k || (self.scales.is_some() && self.scale(n, k) == 0) {
            return 0;
        }
        let (row_bytes, from) = (t.element.row_bytes(t.k), t.element.row_bytes(k));
        let bytes = &t.data[n * row_bytes + from..n * row_bytes + row_bytes.min(from + 4)];
        bytes.iter().rev().fold(0, |word, byte| word << 8 | u32::from(*byte))
    }

    /// Four scales in order, from column `k` of row `n` on.
    fn four(&self, n: usize, k: usize) -> u32 {
        (0..4).rev().fold(0, |word, b| word << 8 | u32::from(self.scale(n, k + b * self.block)))
    }

    /// What the scales of each row are to be multiplied by.
    fn rows(&self) -> Vec<f32> {
        (0..self.t.n).map(|n| self.tops.as_ref().map_or(1.0, |tops| e8m0::decode(tops[n]))).collect()
    }
}

/// Packs for tcgen05: tiles of 128 rows in the order of columns, by 32.
pub(super) fn pack_rows(t: &LinearTensors<'_>) -> Packed {
    let codes = Codes::of(t);
    let steps = t.k.div_ceil(STEP);
    let tiles = t.n.div_ceil(SIDE);
    let mut words = vec![0u32; tiles * steps * SIDE * STEP / 8];
    words.par_chunks_mut(SIDE * STEP / 8).enumerate().for_each(|(i, out)| {
        let (n0, k0) = (i / steps * SIDE, i % steps * STEP);
        for (at, out) in out.iter_mut().enumerate() {
            *out = codes.word(n0 + at / 4 % SIDE, k0 + at / 4 / SIDE * 32 + at % 4 * 8);
        }
    });
    let columns = 4 * codes.block;
    let pieces = STEP / columns;
    let mut scales = vec![0u32; tiles * steps * pieces * SIDE];
    scales.par_chunks_mut(SIDE).enumerate().for_each(|(i, out)| {
        let (n0, k0) = (i / (steps * pieces) * SIDE, i % (steps * pieces) * columns);
        for (at, word) in out.iter_mut().enumerate() {
            *word = codes.four(n0 + at % 4 * 32 + at / 4, k0);
        }
    });
    Packed { words, scales, rows: codes.rows() }
}

/// Packs for `mma.sync`.
pub(super) fn pack_codes(t: &LinearTensors<'_>) -> Packed {
    let codes = Codes::of(t);
    let steps = t.k.div_ceil(STEP);
    let tiles = t.n.next_multiple_of(ROWS) / TILE;
    // Columns of a product, and from a lane's first word of a row to its second.
    let (columns, second) = if t.element.row_bytes(2) == 1 { (64, 32) } else { (32, 4) };
    let mut words = vec![0u32; tiles * steps * (STEP / columns) * 128];
    words.par_chunks_mut(STEP / columns * 128).enumerate().for_each(|(i, out)| {
        let (n0, k0) = (i / steps * TILE, i % steps * STEP);
        for (at, out) in out.iter_mut().enumerate() {
            let (product, lane, part) = (at / 128, at / 4 % 32, at % 4);
            *out = codes.word(n0 + lane / 4 + part % 2 * 8, k0 + product * columns + lane % 4 * 8 + part / 2 * second);
        }
    });
    let width = if codes.tops.is_some() { 16 } else { 32 };
    let mut scales = vec![0u32; if codes.scales.is_some() { tiles * steps * width } else { 0 }];
    scales.par_chunks_mut(width).enumerate().for_each(|(i, out)| {
        let (n0, k0) = (i / steps * TILE, i % steps * STEP);
        for (at, word) in out.iter_mut().enumerate() {
            // Two lanes of a group have its two rows; where a row has two words, two more have the second.
            let lanes = width / 8;
            let (row, first) = (n0 + at / lanes + at % 2 * 8, k0 + at % lanes / 2 * 64);
            *word = codes.four(row, first);
        }
    });
    Packed { words, scales, rows: codes.rows() }
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

    /// The same of `pack_rows`.
    #[test]
    fn every_element_stands_where_tcgen05_reads_it() {
        for (weight, block, k) in [(WEIGHTS[6], 16, 288), (WEIGHTS[8], 32, 288)] {
            let n = 140;
            let t = synthetic::layer(&mut SplitMix64(9), n, k, weight, ActivationFormat::Float);
            let (BlockScales::E4m3 { codes, .. } | BlockScales::E8m0 { codes, .. }) = &t.block_scales else { panic!() };
            let packed = pack_rows(&t);
            assert_eq!((packed.words.len(), packed.scales.len()), (2 * 3 * 2048, 2 * 3 * 128 * 32 / block));
            for row in 0..n {
                let of_row = &codes[row * (k / block)..(row + 1) * (k / block)];
                let top = of_row.iter().max().unwrap();
                for column in 0..k {
                    let step = row / 128 * 3 + column / 128;
                    let expected = match block {
                        16 => i32::from(of_row[column / 16]),
                        _ => i32::from(of_row[column / 32]) + 127 - i32::from(*top),
                    };
                    let code = u32::from(t.data[(row * k + column) / 2] >> (4 * (column % 2)) & 15);
                    let word = packed.words[(step * 4 + column / 32 % 4) * 512 + row % 128 * 4 + column / 8 % 4];
                    let code = if expected == 0 { 0 } else { code };
                    assert_eq!(word >> (4 * (column % 8)) & 15, code, "{row} {column}");
                    let piece = if block == 16 { step * 2 + column / 64 % 2 } else { step };
                    let word = packed.scales[piece * 128 + row % 32 * 4 + row % 128 / 32];
                    assert_eq!((word >> (8 * (column / block % 4)) & 255) as i32, expected, "{row} {column}");
                }
            }
        }
    }
}
