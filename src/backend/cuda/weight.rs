//! A linear's weight as the kernels read it: the layout of kernels/weight.cuh, made on the host at load.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rayon::prelude::*;

use super::Narrow;
use super::driver::{Device, Memory};
use super::narrow::{pack_codes, pack_rows};
use crate::backend::{BackendError, Result};
use crate::formats::e8m0;
use crate::formats::fp8;
use crate::formats::linear::{ActivationFormat, BlockScales, Element, InputRotation, LinearTensors, decode_elements};

/// Columns of one step along K; K is padded to a multiple.
pub const STEP: usize = 128;
/// Rows of one tile, and tiles of one block; N is padded to a multiple of their product.
pub(super) const TILE: usize = 16;
pub(super) const ROWS: usize = 2 * TILE;
/// Rows of a tile for tcgen05.
pub(super) const SIDE: usize = 128;

/// How a weight's elements and block scales are stored: names end the kernels'.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    E2m1 {
        block: usize,
    },
    Mxfp4,
    E4m3,
    Mxfp8,
    Bf16,
    F32,
    /// E2M1 whose inputs are E2M1 too, for FP4 tensor cores: NVFP4 in blocks of 16, or MXFP4 in blocks of 32.
    Fp4 {
        block: usize,
    },
    /// E4M3 whose inputs are E4M3 too, for FP8 tensor cores: FP8 with scales of any kind but blocks of 32.
    Fp8,
    /// MXFP8 whose inputs are MXFP8 too, for the same.
    Fp8Mx,
    /// As `Fp4`, for tcgen05.
    Tcgen {
        block: usize,
    },
}

impl Kind {
    /// How FP4 and FP8 tensor cores multiply these weights and inputs; `None` where they do not, as they have another format.
    fn narrow(t: &LinearTensors<'_>, cores: Narrow) -> Option<Self> {
        use ActivationFormat as A;
        let four = |block| if cores == Narrow::Tcgen { Self::Tcgen { block } } else { Self::Fp4 { block } };
        match (t.element, &t.block_scales, t.activation) {
            _ if cores == Narrow::None => None,
            (Element::E2m1, BlockScales::E4m3 { block: 16, .. }, A::Nvfp4 { .. }) => Some(four(16)),
            (Element::E2m1, BlockScales::E8m0 { block: 32, .. }, A::Mxfp4 { .. }) => Some(four(32)),
            _ if cores == Narrow::Tcgen => None,
            (
                Element::E4m3,
                BlockScales::None | BlockScales::Grid { .. },
                A::Fp8Static { .. } | A::Fp8Token | A::Fp8Group,
            ) => Some(Self::Fp8),
            (Element::E4m3, BlockScales::E8m0 { block: 32, .. }, A::Mxfp8 { .. }) => Some(Self::Fp8Mx),
            _ => None,
        }
    }

    /// Whether it is for FP4 or FP8 tensor cores, which read inputs as codes and scales, and not as BF16.
    pub fn is_narrow(self) -> bool {
        matches!(self, Self::Fp4 { .. } | Self::Fp8 | Self::Fp8Mx | Self::Tcgen { .. })
    }
}

/// How many were loaded.
static LOADED: AtomicU64 = AtomicU64::new(0);

/// A linear on the device.
pub struct CudaLinear {
    /// Another one for each linear that was ever loaded.
    pub id: u64,
    pub name: String,
    pub n: usize,
    pub k: usize,
    pub kind: Kind,
    pub activation: ActivationFormat,
    /// Elements; of `Kind::F32` row-major [N, K].
    pub words: Memory,
    pub scales: Option<Memory>,
    /// One f32 per 128 rows and 128 columns.
    pub grid: Option<Memory>,
    /// One f32 per row.
    pub row_scales: Memory,
    pub bias: Option<Memory>,
    /// Multiplies the input before it is quantized.
    pub pre_quant_scale: Option<(Vec<f32>, Memory)>,
    /// Turns the scaled input, run by run, before it is quantized.
    pub rotation: Option<(Arc<InputRotation>, Memory)>,
}

/// A weight in the kernels' layout, on the host.
pub(super) struct Packed {
    pub words: Vec<u32>,
    pub scales: Vec<u32>,
    /// What the block scales of a row are to be multiplied by beside its output scale.
    pub rows: Vec<f32>,
}

impl CudaLinear {
    /// Packs `t` and takes it over; for FP4 or FP8 tensor cores where both sides have formats of `narrow`.
    ///
    /// # Errors
    /// No kernel for these formats, or not enough memory.
    pub fn load(device: &Arc<Device>, narrow: Narrow, t: &LinearTensors<'_>) -> Result<Self> {
        let unsupported = |what: String| BackendError::Unsupported { module: t.name.clone(), backend: "cuda", what };
        let usual = match (t.element, &t.block_scales) {
            (Element::E2m1, BlockScales::E4m3 { block: block @ (16 | 32), .. }) => Kind::E2m1 { block: *block },
            (Element::E2m1, BlockScales::E8m0 { block: 32, .. }) => Kind::Mxfp4,
            (Element::E4m3, BlockScales::None | BlockScales::Grid { .. }) => Kind::E4m3,
            (Element::E4m3, BlockScales::E8m0 { block: 32, .. }) => Kind::Mxfp8,
            (Element::Bf16, BlockScales::None) => Kind::Bf16,
            (Element::F32 | Element::F16, BlockScales::None) => Kind::F32,
            _ => return Err(unsupported(format!("{} weights in such blocks", t.weight_format()))),
        };
        let kind = Kind::narrow(t, narrow).unwrap_or(usual);
        if kind == Kind::F32 && t.activation != ActivationFormat::Float {
            return Err(unsupported(format!("{} weights with {} inputs", t.weight_format(), t.activation)));
        }
        if kind == Kind::F32 && t.rotation.is_some() {
            return Err(unsupported(format!("{} weights with rotated inputs", t.weight_format())));
        }
        let packed = match kind {
            Kind::F32 => plain(t),
            Kind::Tcgen { .. } => pack_rows(t),
            _ if kind.is_narrow() => pack_codes(t),
            _ => pack(t, kind),
        };
        let upload = |v: &Vec<f32>| device.upload(v);
        let grid = match &t.block_scales {
            BlockScales::Grid { values } => Some(upload(values)?),
            _ => None,
        };
        // Padded rows are computed and thrown away.
        let rows = t.n.next_multiple_of(ROWS);
        let row_scales: Vec<f32> =
            (0..rows).map(|n| if n < t.n { t.output_scale.at(n) * packed.rows[n] } else { 0.0 }).collect();
        let pre_quant_scale = match &t.pre_quant_scale {
            Some(s) => Some((s.clone(), upload(s)?)),
            None => None,
        };
        let rotation = match &t.rotation {
            Some(rotation) => Some((rotation.clone(), device.upload(rotation.matrix())?)),
            None => None,
        };
        Ok(Self {
            id: LOADED.fetch_add(1, Ordering::Relaxed),
            name: t.name.clone(),
            n: t.n,
            k: t.k,
            kind,
            activation: t.activation,
            words: device.upload(&packed.words)?,
            scales: if packed.scales.is_empty() { None } else { Some(device.upload(&packed.scales)?) },
            grid,
            row_scales: upload(&row_scales)?,
            bias: t.bias.as_ref().map(upload).transpose()?,
            pre_quant_scale,
            rotation,
        })
    }

    /// Bytes on the device.
    pub fn bytes(&self) -> usize {
        let optional = [&self.scales, &self.grid, &self.bias];
        self.words.bytes()
            + self.row_scales.bytes()
            + optional.iter().filter_map(|m| m.as_ref()).map(Memory::bytes).sum::<usize>()
    }

    /// Whether inputs are codes and scales, and not BF16.
    pub fn reads_codes(&self) -> bool {
        self.kind.is_narrow()
    }

    /// Whether a product has a scale for each 128 columns.
    pub fn grouped(&self) -> bool {
        self.grid.is_some() || self.activation == ActivationFormat::Fp8Group
    }
}

fn plain(t: &LinearTensors<'_>) -> Packed {
    let mut values = vec![0.0; t.n * t.k];
    let bytes = t.element.row_bytes(t.k);
    for (row, out) in t.data.chunks_exact(bytes.max(1)).zip(values.chunks_exact_mut(t.k.max(1))) {
        decode_elements(t.element, row, out);
        // Nothing is quantized between this scale of the input and the weight.
        for (w, scale) in out.iter_mut().zip(t.pre_quant_scale.iter().flatten()) {
            *w *= scale;
        }
    }
    Packed { words: values.into_iter().map(f32::to_bits).collect(), scales: Vec::new(), rows: vec![1.0; t.n] }
}

/// Where bit `bit` of E2M1 (0 the mantissa, 3 the sign) of half `half` of pair `pair` stands in a word of eight codes:
/// the inverse of `unpack_e2m1`.
const fn e2m1_bit(pair: usize, half: usize, bit: usize) -> usize {
    let to = (if bit == 3 { 15 } else { 6 + bit }) + 16 * half;
    match pair {
        0 => to,
        1 => (to + 6) % 32,
        2 => (to + 12) % 32,
        _ if bit == 2 => to + 2,
        _ => (to + 10) % 32,
    }
}

/// The same of E4M3 and a word of four codes: the inverse of `unpack_e4m3`.
const fn e4m3_bit(pair: usize, half: usize, bit: usize) -> usize {
    let to = (if bit == 7 { 15 } else { 4 + bit }) + 16 * half;
    match pair {
        0 => to,
        _ if bit >= 4 && bit < 7 => to + 4,
        _ => (to + 12) % 32,
    }
}

/// By pair and byte: its two codes, the low one first.
const fn spread_e2m1() -> [[u32; 256]; 4] {
    let mut table = [[0; 256]; 4];
    let mut i = 0;
    while i < 4 * 256 * 8 {
        let (pair, byte, bit) = (i / 2048, i / 8 % 256, i % 8);
        table[pair][byte] |= ((byte >> bit & 1) as u32) << e2m1_bit(pair, bit / 4, bit % 4);
        i += 1;
    }
    table
}

/// By place in the word, 2·pair + half, and code.
const fn spread_e4m3() -> [[u32; 256]; 4] {
    let mut table = [[0; 256]; 4];
    let mut i = 0;
    while i < 4 * 256 * 8 {
        let (place, code, bit) = (i / 2048, i / 8 % 256, i % 8);
        table[place][code] |= ((code >> bit & 1) as u32) << e4m3_bit(place / 2, place % 2, bit);
        i += 1;
    }
    table
}

/// Codes to where they stand in a word.
static E2M1: [[u32; 256]; 4] = spread_e2m1();
static E4M3: [[u32; 256]; 4] = spread_e4m3();

/// An E4M3 scale as the kernels take it: (exponent + 20) << 3 | mantissa. `None` for 0.
fn scale_byte(code: u8) -> Option<u8> {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), code & 7);
    if exponent > 0 {
        return Some(((exponent - 7 + 20) as u8) << 3 | mantissa);
    }
    // Subnormals, m · 2^-9, become normal.
    let top = mantissa.checked_ilog2()?;
    let rest = (mantissa << (3 - top)) & 7;
    Some(((top as i32 - 9 + 20) as u8) << 3 | rest)
}

/// The exponent under BF16's bias that stands for the largest scale of a row of MX blocks: 2^117.
const E8M0_TOP: i32 = 244;

fn pack(t: &LinearTensors<'_>, kind: Kind) -> Packed {
    let steps = t.k.div_ceil(STEP);
    let tiles = t.n.next_multiple_of(ROWS) / TILE;
    // Words of 32 bits of a lane in a half step, and words of scales of a tile in a step.
    let (words, scale_words) = match kind {
        Kind::E2m1 { block: 16 } => (4, 32),
        Kind::E2m1 { .. } | Kind::Mxfp4 => (4, 16),
        Kind::E4m3 => (8, 0),
        Kind::Mxfp8 => (8, 16),
        _ => (16, 0),
    };
    let block = t.block_scales.block(t.k);
    let codes = match &t.block_scales {
        BlockScales::E4m3 { codes, .. } | BlockScales::E8m0 { codes, .. } => Some(&codes[..]),
        BlockScales::None | BlockScales::Grid { .. } => None,
    };
    // The block scale of a row's column: E4M3 or E8M0 code.
    let scale = |n: usize, k: usize| codes.filter(|_| n < t.n && k < t.k).map(|c| c[n * (t.k / block) + k / block]);
    let power = matches!(kind, Kind::Mxfp4 | Kind::Mxfp8);
    let largest = |n: usize| (0..t.k / block).filter_map(|b| scale(n, b * block)).max().unwrap_or(127);
    let tops: Vec<u8> = if power { (0..t.n).into_par_iter().map(largest).collect() } else { Vec::new() };
    let byte = |n: usize, k: usize| -> Option<u8> {
        let code = scale(n, k)?;
        if !power {
            return scale_byte(code);
        }
        let exponent = E8M0_TOP + i32::from(code) - i32::from(tops[n]);
        (exponent > 0).then_some(exponent as u8)
    };
    let row_bytes = t.element.row_bytes(t.k);
    // Sixteen elements of row `n` from column `k` on; 0 beyond the edge, and under a scale that is 0 or too small to count.
    // They share a block scale.
    let sixteen = |n: usize, k: usize| -> [u8; 32] {
        let mut out = [0; 32];
        if n >= t.n || k >= t.k || (codes.is_some() && byte(n, k).is_none()) {
            return out;
        }
        let row = &t.data[n * row_bytes..(n + 1) * row_bytes];
        let from = t.element.row_bytes(k);
        let bytes = t.element.row_bytes(16).min(row_bytes - from);
        out[..bytes].copy_from_slice(&row[from..from + bytes]);
        out
    };
    let mut out = vec![0u32; tiles * steps * 2 * 32 * words];
    out.par_chunks_mut(2 * 32 * words).enumerate().for_each(|(i, out)| {
        let (tile, step) = (i / steps, i % steps);
        for at in 0..2 * 32 {
            let (half, lane) = (at / 32, at % 32);
            let (n, k) = (tile * TILE + lane / 4, step * STEP + half * 64 + lane % 4 * 16);
            let rows = [sixteen(n, k), sixteen(n + 8, k)];
            // Pair `pair` of product `j`: row half pair % 2, columns 4j + 2·(pair / 2) and the next.
            let code = |j: usize, pair: usize, h: usize| rows[pair % 2][4 * j + 2 * (pair / 2) + h];
            // U4 number `quad` of the half step, and word in the U4.
            for (quad, part) in (0..words / 4).flat_map(|quad| (0..4).map(move |part| (quad, part))) {
                out[half * 32 * words + quad * 128 + lane * 4 + part] = match t.element {
                    Element::E2m1 => (0..4).fold(0, |w, pair| {
                        // Two columns are a byte.
                        w | E2M1[pair][usize::from(rows[pair % 2][2 * part + pair / 2])]
                    }),
                    Element::E4m3 => {
                        // Two products a U4, two words each: rows g and g+8 of two columns.
                        let (j, first) = (2 * quad + part / 2, part % 2 * 2);
                        (0..4).fold(0, |w, place| w | E4M3[place][usize::from(code(j, first + place / 2, place % 2))])
                    }
                    _ => {
                        let first = 2 * (4 * quad + 2 * (part / 2));
                        u32::from_le_bytes(std::array::from_fn(|b| rows[part % 2][first + b]))
                    }
                };
            }
        }
    });
    let mut scales = vec![0u32; tiles * steps * scale_words];
    if scale_words > 0 {
        scales.par_chunks_mut(scale_words).enumerate().for_each(|(i, out)| {
            let (tile, step) = (i / steps, i % steps);
            let lanes = scale_words / 8;
            for (at, word) in out.iter_mut().enumerate() {
                let (g, t16) = (at / lanes, at % lanes * 4 / lanes);
                for (index, shift) in [(0, 0), (1, 8), (2, 16), (3, 24)] {
                    let (n, k) = (tile * TILE + g + 8 * (index % 2), step * STEP + index / 2 * 64 + t16 * 16);
                    // A scale that counts nothing stands over zeros; any finite one will do.
                    *word |= u32::from(byte(n, k).unwrap_or(if power { 0 } else { 20 << 3 })) << shift;
                }
            }
        });
    }
    let rows = (0..t.n).map(|n| if power { e8m0::decode(tops[n]) } else { 1.0 }).collect();
    debug_assert_eq!(STEP, fp8::BLOCK);
    Packed { words: out, scales, rows }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::e4m3;

    #[test]
    fn every_bit_of_a_word_has_one_place() {
        let mut seen = [0u32; 2];
        for place in 0..8 {
            for bit in 0..4 {
                seen[0] |= 1 << e2m1_bit(place / 2, place % 2, bit);
            }
        }
        for place in 0..4 {
            for bit in 0..8 {
                seen[1] |= 1 << e4m3_bit(place / 2, place % 2, bit);
            }
        }
        assert_eq!(seen, [u32::MAX; 2]);
    }

    #[test]
    fn scale_bytes_are_the_scales() {
        for code in 0..0x7fu8 {
            let value = scale_byte(code).map_or(0.0, |b| {
                let (exponent, mantissa) = (i32::from(b >> 3) - 20, f32::from(b & 7));
                (1.0 + mantissa / 8.0) * 2f32.powi(exponent)
            });
            assert_eq!(value, e4m3::decode(code), "{code}");
        }
    }
}
