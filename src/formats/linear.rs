//! What one linear layer is stored as: the formats of its weight and of its input, as data.
//!
//! Both dialects are normalised to this at the checkpoint's edge: every scale is a positive finite multiplier, every
//! shape is checked. Backends pack it; nothing after this point knows a dialect.

use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use super::e8m0::{self, ScaleRule};
use super::fp_quant::{self, Method};
use super::{e2m1, e4m3, fp8, mx, nvfp4};

/// How one weight element is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Element {
    F32,
    F16,
    Bf16,
    E4m3,
    E2m1,
}

impl Element {
    /// Whether it is a float of 16 or 32 bits: not quantized.
    #[must_use]
    pub fn is_float(self) -> bool {
        matches!(self, Self::F32 | Self::F16 | Self::Bf16)
    }

    /// Bytes that `k` elements of one row take.
    #[must_use]
    pub fn row_bytes(self, k: usize) -> usize {
        match self {
            Self::F32 => 4 * k,
            Self::F16 | Self::Bf16 => 2 * k,
            Self::E4m3 => k,
            Self::E2m1 => k / 2,
        }
    }

    /// The largest value of a quantized element; of a float, infinity.
    #[must_use]
    pub fn max(self) -> f32 {
        match self {
            Self::E2m1 => e2m1::MAX,
            Self::E4m3 => e4m3::MAX,
            Self::F32 | Self::F16 | Self::Bf16 => f32::INFINITY,
        }
    }

    /// The values of a quantized element just below and above `x`, one of them `x` itself if it is such a value; beyond
    /// the largest, the last two. A float is its own neighbour.
    #[must_use]
    pub fn neighbours(self, x: f32) -> (f32, f32) {
        let (encode, decode, last): Codec = match self {
            Self::E2m1 => (e2m1::encode_magnitude, e2m1::decode, 7),
            Self::E4m3 => (e4m3::encode, e4m3::decode, 0x7e),
            Self::F32 | Self::F16 | Self::Bf16 => return (x, x),
        };
        let a = x.abs();
        let nearest = encode(a).min(last);
        let low = if decode(nearest) > a { nearest - 1 } else { nearest.min(last - 1) };
        let (low, high) = (decode(low), decode(low + 1));
        if x < 0.0 { (-high, -low) } else { (low, high) }
    }
}

/// Encoding, decoding, and the code of the largest magnitude.
type Codec = (fn(f32) -> u8, fn(u8) -> f32, u8);

/// Scales below the level of a row.
#[derive(Clone, Debug, PartialEq)]
pub enum BlockScales<'a> {
    None,
    /// E4M3 codes, row-major [N, K/block].
    E4m3 {
        block: usize,
        codes: Cow<'a, [u8]>,
    },
    /// E8M0 codes, row-major [N, K/block].
    E8m0 {
        block: usize,
        codes: Cow<'a, [u8]>,
    },
    /// f32, row-major [⌈N/128⌉, ⌈K/128⌉].
    Grid {
        values: Vec<f32>,
    },
}

impl BlockScales<'_> {
    /// Elements along K under one scale; `k` where there is no block scale.
    #[must_use]
    pub fn block(&self, k: usize) -> usize {
        match self {
            Self::None => k,
            Self::E4m3 { block, .. } | Self::E8m0 { block, .. } => *block,
            Self::Grid { .. } => fp8::BLOCK,
        }
    }

    /// Scale of row `n`, block `b`.
    #[must_use]
    pub fn at(&self, n: usize, b: usize, k: usize) -> f32 {
        match self {
            Self::None => 1.0,
            Self::E4m3 { block, codes } => e4m3::decode(codes[n * (k / block) + b]),
            Self::E8m0 { block, codes } => e8m0::decode(codes[n * (k / block) + b]),
            Self::Grid { values } => values[n / fp8::BLOCK * k.div_ceil(fp8::BLOCK) + b],
        }
    }
}

/// The scale applied once per output.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum OutputScale {
    One,
    Tensor(f32),
    /// One per row of W, [N].
    Row(Vec<f32>),
}

impl OutputScale {
    /// Scale of row `n`.
    #[must_use]
    pub fn at(&self, n: usize) -> f32 {
        match self {
            Self::One => 1.0,
            Self::Tensor(s) => *s,
            Self::Row(s) => s[n],
        }
    }
}

/// How the input of a linear is quantized when deployed.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum ActivationFormat {
    /// Not at all.
    Float,
    /// E2M1 with E4M3 scales per 16 computed per call under a calibrated global scale (a multiplier).
    Nvfp4 { global_scale: f32 },
    /// E4M3 under a calibrated scale (a multiplier).
    Fp8Static { scale: f32 },
    /// E4M3, scale per token.
    Fp8Token,
    /// E4M3, scale per token and 128 along K.
    Fp8Group,
    /// E2M1, E8M0 scale per 32.
    Mxfp4 { rule: ScaleRule },
    /// E4M3, E8M0 scale per 32.
    Mxfp8 { rule: ScaleRule },
    /// E2M1, power-of-two scale per 32 by fp_quant's `method`, under a fixed global scale (a multiplier).
    FpQuant { method: Method, global_scale: f32 },
}

impl ActivationFormat {
    /// Quantizes and dequantizes one token's features in place: the definition that packed kernels are held to.
    pub fn fake_quantize(&self, row: &mut [f32]) {
        let mut doubled = [0i8; mx::BLOCK];
        let mut values = vec![0.0f32; row.len()];
        match *self {
            Self::Float => {}
            Self::Nvfp4 { global_scale } => {
                for block in row.chunks_mut(nvfp4::BLOCK) {
                    let s = nvfp4::quantize_activation_block(block, global_scale, &mut doubled) * global_scale;
                    block.iter_mut().zip(doubled).for_each(|(x, d)| *x = 0.5 * f32::from(d) * s);
                }
            }
            Self::Mxfp4 { rule } => {
                for block in row.chunks_mut(mx::BLOCK) {
                    let s = mx::quantize_fp4_block(block, rule, &mut doubled);
                    block.iter_mut().zip(doubled).for_each(|(x, d)| *x = 0.5 * f32::from(d) * s);
                }
            }
            Self::FpQuant { method, global_scale } => {
                for block in row.chunks_mut(mx::BLOCK) {
                    let s = fp_quant::quantize_block(block, method, global_scale, &mut doubled) * global_scale;
                    block.iter_mut().zip(doubled).for_each(|(x, d)| *x = 0.5 * f32::from(d) * s);
                }
            }
            Self::Fp8Static { scale } => {
                fp8::quantize(row, scale, &mut values);
                row.iter_mut().zip(values).for_each(|(x, v)| *x = v * scale);
            }
            Self::Fp8Token => {
                let s = fp8::quantize_dynamic(row, &mut values);
                row.iter_mut().zip(values).for_each(|(x, v)| *x = v * s);
            }
            Self::Fp8Group => {
                for block in row.chunks_mut(fp8::BLOCK) {
                    let s = fp8::quantize_dynamic(block, &mut values);
                    block.iter_mut().zip(&values).for_each(|(x, v)| *x = v * s);
                }
            }
            Self::Mxfp8 { rule } => {
                for block in row.chunks_mut(mx::BLOCK) {
                    let s = mx::quantize_fp8_block(block, rule, &mut values);
                    block.iter_mut().zip(&values).for_each(|(x, v)| *x = v * s);
                }
            }
        }
    }
}

impl fmt::Display for ActivationFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Float => "float",
            Self::Nvfp4 { .. } => "nvfp4",
            Self::Fp8Static { .. } => "fp8 static",
            Self::Fp8Token => "fp8 per token",
            Self::Fp8Group => "fp8 per 128",
            Self::Mxfp4 { .. } => "mxfp4",
            Self::Mxfp8 { .. } => "mxfp8",
            Self::FpQuant { method: Method::AbsMax, .. } => "mxfp4 abs_max",
            Self::FpQuant { method: Method::Quest, .. } => "mxfp4 quest",
        })
    }
}

/// The largest rotation there is room for.
pub const MAX_ROTATION: usize = 256;

/// What an input is multiplied by, in runs, before it is quantized: x ← x · H.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct InputRotation {
    /// Values in a run.
    group: usize,
    /// H [group, group], row-major.
    matrix: Vec<f32>,
}

impl InputRotation {
    /// Of a matrix [group, group]; `None` where it is not that, empty, or group is beyond [`MAX_ROTATION`].
    #[must_use]
    pub fn new(matrix: Vec<f32>, group: usize) -> Option<Self> {
        let fits = (1..=MAX_ROTATION).contains(&group) && matrix.len() == group * group;
        fits.then_some(Self { group, matrix })
    }

    /// Rotates each run of `row` in place: every output one chain of fused multiply-adds in the order of the inputs.
    #[inline(always)]
    pub fn apply(&self, row: &mut [f32]) {
        let mut buffer = [0.0f32; MAX_ROTATION];
        let out = &mut buffer[..self.group];
        for run in row.chunks_exact_mut(self.group) {
            out.fill(0.0);
            for (x, h) in run.iter().zip(self.matrix.chunks_exact(self.group)) {
                out.iter_mut().zip(h).for_each(|(o, h)| *o = x.mul_add(*h, *o));
            }
            run.copy_from_slice(out);
        }
    }

    /// Makes of each run of a weight's row, which meets rotated inputs, what meets them as they are: H · w.
    pub fn fold(&self, row: &mut [f32]) {
        for run in row.chunks_exact_mut(self.group) {
            let folded: Vec<f32> = self
                .matrix
                .chunks_exact(self.group)
                .map(|h| h.iter().zip(run.iter()).fold(0.0f32, |sum, (h, w)| h.mul_add(*w, sum)))
                .collect();
            run.copy_from_slice(&folded);
        }
    }

    /// Bytes of the matrix.
    #[must_use]
    pub fn bytes(&self) -> usize {
        4 * self.matrix.len()
    }

    /// Values in a run.
    #[must_use]
    pub fn group(&self) -> usize {
        self.group
    }

    /// H [group, group], row-major.
    #[must_use]
    pub fn matrix(&self) -> &[f32] {
        &self.matrix
    }
}

/// A linear layer as stored: y = x · Wᵀ + bias, W [N, K].
#[derive(Clone, Debug)]
pub struct LinearTensors<'a> {
    /// Module name, `model.layers.0.self_attn.q_proj`.
    pub name: String,
    /// Output features.
    pub n: usize,
    /// Input features.
    pub k: usize,
    pub element: Element,
    /// Row-major elements; E2M1 two to a byte, the first in the low nibble.
    pub data: Cow<'a, [u8]>,
    pub block_scales: BlockScales<'a>,
    pub output_scale: OutputScale,
    pub activation: ActivationFormat,
    /// Multiplies the input per channel before it is quantized, [K] (AWQ).
    pub pre_quant_scale: Option<Vec<f32>>,
    /// Rotates the input after that and before it is quantized (fp_quant).
    pub rotation: Option<Arc<InputRotation>>,
    /// [N].
    pub bias: Option<Vec<f32>>,
}

impl LinearTensors<'_> {
    /// Row `n` of W in f32, all scales applied: `code · block · output` rounded as the reference does,
    /// `code · (block · output)`.
    pub fn decode_row(&self, n: usize, out: &mut [f32]) {
        let bytes = self.element.row_bytes(self.k);
        let row = &self.data[n * bytes..(n + 1) * bytes];
        decode_elements(self.element, row, out);
        let block = self.block_scales.block(self.k);
        let scale = self.output_scale.at(n);
        for (b, values) in out[..self.k].chunks_mut(block).enumerate() {
            let s = self.block_scales.at(n, b, self.k) * scale;
            values.iter_mut().for_each(|v| *v *= s);
        }
    }

    /// The rows `first` to before `first + count` of W, as a linear of their own; where scales are in a grid, `first` is one of its
    /// lines.
    #[must_use]
    pub fn rows(&self, first: usize, count: usize) -> LinearTensors<'_> {
        fn some(bytes: &[u8], row: usize, (first, count): (usize, usize)) -> Cow<'_, [u8]> {
            Cow::Borrowed(&bytes[first * row..(first + count) * row])
        }
        let part = (first, count);
        LinearTensors {
            name: self.name.clone(),
            n: count,
            data: some(&self.data, self.element.row_bytes(self.k), part),
            block_scales: match &self.block_scales {
                BlockScales::None => BlockScales::None,
                BlockScales::E4m3 { block, codes: all } => {
                    BlockScales::E4m3 { block: *block, codes: some(all, self.k / block, part) }
                }
                BlockScales::E8m0 { block, codes: all } => {
                    BlockScales::E8m0 { block: *block, codes: some(all, self.k / block, part) }
                }
                BlockScales::Grid { values } => {
                    let line = self.k.div_ceil(fp8::BLOCK);
                    let lines = first / fp8::BLOCK..(first + count).div_ceil(fp8::BLOCK);
                    BlockScales::Grid { values: values[lines.start * line..lines.end * line].to_vec() }
                }
            },
            output_scale: match &self.output_scale {
                OutputScale::Row(scales) => OutputScale::Row(scales[first..first + count].to_vec()),
                other => other.clone(),
            },
            bias: self.bias.as_ref().map(|bias| bias[first..first + count].to_vec()),
            pre_quant_scale: self.pre_quant_scale.clone(),
            rotation: self.rotation.clone(),
            k: self.k,
            element: self.element,
            activation: self.activation,
        }
    }

    /// W in f32, row-major [N, K].
    #[must_use]
    pub fn decode(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.n * self.k];
        for (n, row) in out.chunks_mut(self.k).enumerate() {
            self.decode_row(n, row);
        }
        out
    }

    /// What the weight is called in tables: `nvfp4`, `fp8 per channel`, `bf16`, …
    #[must_use]
    pub fn weight_format(&self) -> &'static str {
        match (self.element, &self.block_scales, &self.output_scale) {
            (Element::F32, ..) => "f32",
            (Element::F16, ..) => "f16",
            (Element::Bf16, ..) => "bf16",
            (Element::E2m1, BlockScales::E8m0 { .. }, _) => "mxfp4",
            (Element::E2m1, BlockScales::E4m3 { block: nvfp4::BLOCK, .. }, _) => "nvfp4",
            (Element::E2m1, ..) => "nvfp4 block 32",
            (Element::E4m3, BlockScales::E8m0 { .. }, _) => "mxfp8",
            (Element::E4m3, BlockScales::Grid { .. }, _) => "fp8 128x128",
            (Element::E4m3, _, OutputScale::Row(_)) => "fp8 per channel",
            (Element::E4m3, ..) => "fp8",
        }
    }

    /// Bytes that elements and scales take together, by their shapes.
    #[must_use]
    pub fn stored_bytes(&self) -> usize {
        let scales = match &self.block_scales {
            BlockScales::None => 0,
            BlockScales::E4m3 { block, .. } | BlockScales::E8m0 { block, .. } => self.n * (self.k / block),
            BlockScales::Grid { values } => 4 * values.len(),
        };
        self.n * self.element.row_bytes(self.k) + scales
    }
}

/// Element codes as f32, without any scale. `out` holds as many values as `row` codes.
pub fn decode_elements(element: Element, row: &[u8], out: &mut [f32]) {
    match element {
        Element::F32 => {
            for (v, b) in out.iter_mut().zip(row.chunks_exact(4)) {
                *v = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            }
        }
        Element::F16 => {
            for (v, b) in out.iter_mut().zip(row.chunks_exact(2)) {
                *v = half::f16::from_le_bytes([b[0], b[1]]).to_f32();
            }
        }
        Element::Bf16 => {
            for (v, b) in out.iter_mut().zip(row.chunks_exact(2)) {
                *v = f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16);
            }
        }
        Element::E4m3 => {
            for (v, &b) in out.iter_mut().zip(row) {
                *v = e4m3::decode(b);
            }
        }
        Element::E2m1 => {
            for (v, &b) in out.chunks_exact_mut(2).zip(row) {
                v[0] = e2m1::decode(b);
                v[1] = e2m1::decode(b >> 4);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_enclose_a_value_and_are_next_to_each_other() {
        assert_eq!(Element::E2m1.neighbours(2.2), (2.0, 3.0));
        assert_eq!(Element::E2m1.neighbours(-0.6), (-1.0, -0.5));
        assert_eq!(Element::E2m1.neighbours(3.0), (3.0, 4.0));
        assert_eq!(Element::E2m1.neighbours(9.0), (4.0, 6.0));
        assert_eq!(Element::E2m1.neighbours(0.0), (0.0, 0.5));
        for i in -20_000..20_000 {
            let x = i as f32 * 0.021;
            let (low, high) = Element::E4m3.neighbours(x);
            assert!(low <= x && x <= high && low < high, "{low} {x} {high}");
            let between = e4m3::round(0.5 * (low + high));
            assert!(between == low || between == high, "{low} {between} {high}");
        }
    }
}
