//! What training multiplies: inputs and weights at the values they have when deployed, as operands of a dense product.
//!
//! An E2M1 or E4M3 code times its E4M3 or E8M0 block scale has at most six significant bits, so it is exact in BF16; the
//! scales above it (per tensor, row or token) are taken out of the product and applied to its result. So a BF16 product of
//! quantized operands loses nothing but the order of its f32 sums. Rounded are: floats that are not quantized, and codes
//! under scales per group of 128, which are any f32.

use std::sync::Arc;

use rayon::prelude::*;

use super::dense::to_bf16;
use crate::backend::cpu::isa::{Isa, multiversion};
use crate::formats::linear::{ActivationFormat, BlockScales, Element, LinearTensors, OutputScale};
use crate::formats::{e2m1, e4m3, fp8, nvfp4};

/// What operands of products are held in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// f32 throughout: the reference.
    #[default]
    F32,
    /// BF16 operands, f32 sums.
    Bf16,
}

impl Precision {
    /// Bytes of a value.
    #[must_use]
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }

    /// Bytes of the largest of the products of a linear [N, K] and `rows` rows, forward and backward, with operands and result.
    #[must_use]
    pub fn product_bytes(self, rows: usize, n: usize, k: usize) -> usize {
        let (x, y, weight) = (rows * k, rows * n, n * k);
        let of = |operands: usize, result: usize| self.bytes() * operands + 4 * result;
        of(x + weight, y).max(of(y + weight, x)).max(of(y + x, weight))
    }
}

/// Values of a matrix, row-major.
#[derive(Clone, Debug)]
pub enum Operand {
    F32(Vec<f32>),
    Bf16(Vec<u16>),
}

/// Values that one task takes at a time.
const CHUNK: usize = 1 << 14;

impl Operand {
    /// `values`, rounded where the precision asks for it.
    #[must_use]
    pub fn new(precision: Precision, values: &[f32]) -> Self {
        match precision {
            Precision::F32 => Self::F32(values.to_vec()),
            Precision::Bf16 => {
                let mut bits = vec![0; values.len()];
                let chunks = bits.par_chunks_mut(CHUNK).zip(values.par_chunks(CHUNK));
                chunks.for_each(|(bits, values)| round_all(Isa::detect(), values, bits));
                Self::Bf16(bits)
            }
        }
    }

    /// `values` times one scale per row or per column.
    #[must_use]
    pub fn scaled(precision: Precision, values: &[f32], columns: usize, by: &Scaling<'_>) -> Self {
        if let Scaling::Rows(OutputScale::One) | Scaling::Columns(OutputScale::One) = by {
            return Self::new(precision, values);
        }
        if precision == Precision::F32 {
            let mut scaled = values.to_vec();
            by.apply(&mut scaled, columns);
            return Self::F32(scaled);
        }
        let mut bits = vec![0; values.len()];
        let rows = bits.par_chunks_mut(columns).zip(values.par_chunks(columns)).with_min_len(8).enumerate();
        rows.for_each(|(row, (bits, values))| match by {
            Scaling::Columns(OutputScale::Row(scales)) => round_products(Isa::detect(), values, scales, bits),
            Scaling::Rows(s) => round_scaled(Isa::detect(), values, s.at(row), bits),
            Scaling::Columns(s) => round_scaled(Isa::detect(), values, s.at(0), bits),
        });
        Self::Bf16(bits)
    }

    /// How many values there are.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "no operand is asked whether it is empty")]
    pub fn len(&self) -> usize {
        match self {
            Self::F32(v) => v.len(),
            Self::Bf16(v) => v.len(),
        }
    }

    /// Row `row` of a matrix of `columns` columns, in f32.
    #[must_use]
    pub fn row(&self, row: usize, columns: usize) -> Vec<f32> {
        let range = row * columns..(row + 1) * columns;
        match self {
            Self::F32(v) => v[range].to_vec(),
            Self::Bf16(v) => v[range].iter().map(|v| f32::from_bits(u32::from(*v) << 16)).collect(),
        }
    }
}

/// Scales of rows or of columns of a matrix.
#[derive(Clone, Copy, Debug)]
pub enum Scaling<'a> {
    Rows(&'a OutputScale),
    Columns(&'a OutputScale),
}

impl Scaling<'_> {
    /// The one number that it is, unless it differs from row to row or column to column.
    #[must_use]
    pub fn scalar(&self) -> Option<f32> {
        match self {
            Self::Rows(OutputScale::One) | Self::Columns(OutputScale::One) => Some(1.0),
            Self::Rows(OutputScale::Tensor(s)) | Self::Columns(OutputScale::Tensor(s)) => Some(*s),
            Self::Rows(OutputScale::Row(_)) | Self::Columns(OutputScale::Row(_)) => None,
        }
    }

    /// Multiplies `values`, rows of `columns`.
    pub fn apply(&self, values: &mut [f32], columns: usize) {
        match self {
            Self::Rows(OutputScale::One) | Self::Columns(OutputScale::One) => {}
            Self::Rows(OutputScale::Tensor(s)) | Self::Columns(OutputScale::Tensor(s)) => {
                values.par_chunks_mut(CHUNK).for_each(|chunk| chunk.iter_mut().for_each(|v| *v *= s));
            }
            Self::Rows(OutputScale::Row(scales)) => {
                let rows = values.par_chunks_mut(columns).zip(scales);
                rows.for_each(|(row, s)| row.iter_mut().for_each(|v| *v *= s));
            }
            Self::Columns(OutputScale::Row(scales)) => {
                values.par_chunks_mut(columns).for_each(|row| row.iter_mut().zip(scales).for_each(|(v, s)| *v *= s));
            }
        }
    }
}

multiversion! {
    fn round_all(values: &[f32], bits: &mut [u16]) {
        for (b, v) in bits.iter_mut().zip(values) {
            *b = to_bf16(*v);
        }
    }
}

multiversion! {
    fn round_scaled(values: &[f32], scale: f32, bits: &mut [u16]) {
        for (b, v) in bits.iter_mut().zip(values) {
            *b = to_bf16(*v * scale);
        }
    }
}

multiversion! {
    fn round_products(values: &[f32], scales: &[f32], bits: &mut [u16]) {
        for ((b, v), s) in bits.iter_mut().zip(values).zip(scales) {
            *b = to_bf16(*v * s);
        }
    }
}

multiversion! {
    fn nvfp4_row(x: &[f32], global_scale: f32, bits: &mut [u16]) {
        let mut doubled = [0i8; nvfp4::BLOCK];
        for (x, bits) in x.chunks_exact(nvfp4::BLOCK).zip(bits.chunks_exact_mut(nvfp4::BLOCK)) {
            let scale = nvfp4::quantize_activation_block(x, global_scale, &mut doubled);
            for (b, d) in bits.iter_mut().zip(&doubled) {
                *b = ((0.5 * f32::from(*d) * scale).to_bits() >> 16) as u16;
            }
        }
    }
}

multiversion! {
    fn fp8_row(x: &[f32], scale: f32, bits: &mut [u16]) {
        for (b, x) in bits.iter_mut().zip(x) {
            *b = (e4m3::round(x / scale).to_bits() >> 16) as u16;
        }
    }
}

/// Rows of `x`, K values each, as the deployed kernels see them, and the scales taken out of them.
#[must_use]
pub fn quantize_input(precision: Precision, format: ActivationFormat, x: &[f32], k: usize) -> (Operand, OutputScale) {
    if precision == Precision::F32
        || !matches!(
            format,
            ActivationFormat::Nvfp4 { .. } | ActivationFormat::Fp8Static { .. } | ActivationFormat::Fp8Token
        )
    {
        if format == ActivationFormat::Float {
            return (Operand::new(precision, x), OutputScale::One);
        }
        let mut values = x.to_vec();
        values.par_chunks_mut(k).for_each(|row| format.fake_quantize(row));
        let operand = if precision == Precision::F32 { Operand::F32(values) } else { Operand::new(precision, &values) };
        return (operand, OutputScale::One);
    }
    let isa = Isa::detect();
    let mut bits = vec![0; x.len()];
    let rows = bits.par_chunks_mut(k).zip(x.par_chunks(k));
    let scale = match format {
        ActivationFormat::Nvfp4 { global_scale } => {
            rows.for_each(|(bits, x)| nvfp4_row(isa, x, global_scale, bits));
            OutputScale::Tensor(global_scale)
        }
        ActivationFormat::Fp8Static { scale } => {
            rows.for_each(|(bits, x)| fp8_row(isa, x, scale, bits));
            OutputScale::Tensor(scale)
        }
        _ => {
            let one = |(bits, x): (&mut [u16], &[f32])| {
                let scale = fp8::scale(crate::formats::amax(x));
                fp8_row(isa, x, scale, bits);
                scale
            };
            OutputScale::Row(rows.map(one).collect())
        }
    };
    (Operand::Bf16(bits), scale)
}

/// The values that a weight can take under its frozen scales.
#[derive(Clone, Debug)]
pub struct WeightGrid {
    pub n: usize,
    pub k: usize,
    element: Element,
    /// Elements along K under one scale of `block_scales`.
    block: usize,
    /// [N, ⌈K/block⌉].
    block_scales: Vec<f32>,
    /// What weights are divided by before they are rounded, where that is not the scales that codes are multiplied by.
    divisors: Option<Arc<Vec<f32>>>,
    /// Whether those are E4M3 codes.
    e4m3_scales: bool,
    output_scale: OutputScale,
}

impl WeightGrid {
    /// The grid of a stored linear; of a float one, all values.
    #[must_use]
    pub fn of(linear: &LinearTensors<'_>) -> Self {
        let (n, k) = (linear.n, linear.k);
        let block = linear.block_scales.block(k).max(1);
        let scales = match &linear.block_scales {
            BlockScales::None => vec![1.0; n],
            some => (0..n).flat_map(|row| (0..k.div_ceil(block)).map(move |b| some.at(row, b, k))).collect(),
        };
        Self {
            n,
            k,
            element: linear.element,
            block,
            block_scales: scales,
            divisors: None,
            e4m3_scales: matches!(linear.block_scales, BlockScales::E4m3 { .. }),
            output_scale: linear.output_scale.clone(),
        }
    }

    /// Whether the weight is not quantized: the grid is as fine as its floats.
    #[must_use]
    pub fn is_float(&self) -> bool {
        self.element.is_float()
    }

    /// Whether its elements have four bits.
    #[must_use]
    pub fn has_four_bits(&self) -> bool {
        self.element == Element::E2m1
    }

    /// The scales that [`Self::operand`] leaves out in BF16.
    #[must_use]
    pub fn outer_scale(&self, precision: Precision) -> OutputScale {
        match precision {
            Precision::F32 => OutputScale::One,
            Precision::Bf16 => self.output_scale.clone(),
        }
    }

    /// Block scales [N, ⌈K/block⌉], where training may change them: E4M3 codes of NVFP4 and its like.
    #[must_use]
    pub fn learnable_scales(&self) -> Option<&[f32]> {
        (self.e4m3_scales && self.element == Element::E2m1).then_some(&self.block_scales)
    }

    /// The same grid under other block scales, each rounded to a positive E4M3 code; scales of 0 stay.
    #[must_use]
    pub fn with_block_scales(&self, scales: impl Iterator<Item = f32>) -> Self {
        let nearest = |(scale, old): (f32, &f32)| {
            if *old == 0.0 { 0.0 } else { e4m3::round(scale.clamp(e4m3::MIN_POSITIVE, e4m3::MAX)) }
        };
        let block_scales: Vec<f32> = scales.zip(&self.block_scales).map(nearest).collect();
        assert_eq!(block_scales.len(), self.block_scales.len(), "block scales of a grid");
        let (output_scale, divisors) = (self.output_scale.clone(), self.divisors.clone());
        Self { block_scales, output_scale, divisors, ..*self }
    }

    /// The same grid, whose codes stay those nearest under its present block scales, whatever scales they are then
    /// multiplied by.
    #[must_use]
    pub fn with_frozen_divisors(&self) -> Self {
        Self { divisors: Some(Arc::new(self.block_scales.clone())), ..self.clone() }
    }

    /// Whether [`Self::with_frozen_divisors`] made it.
    #[must_use]
    pub fn has_frozen_divisors(&self) -> bool {
        self.divisors.is_some()
    }

    /// Block scales as E4M3 codes, as the checkpoint holds them.
    #[must_use]
    pub fn scale_codes(&self) -> Vec<u8> {
        self.block_scales.iter().map(|s| e4m3::encode(*s)).collect()
    }

    /// The whole scale that the codes of a block are multiplied by.
    fn scale_at(&self, row: usize, block: usize) -> f32 {
        self.block_scales[row * self.k.div_ceil(self.block) + block] * self.output_scale.at(row)
    }

    /// And the one that its weights are divided by.
    fn divisor_at(&self, row: usize, block: usize) -> f32 {
        let divisors = self.divisors.as_deref().unwrap_or(&self.block_scales);
        divisors[row * self.k.div_ceil(self.block) + block] * self.output_scale.at(row)
    }

    /// The gradient of the logarithms of block scales, [N, ⌈K/block⌉], of that of the weight, straight through the rounding
    /// of both (Esser et al. 2020): Σ g · (value - master). Where a master is beyond its scale's reach, the value moves with
    /// the scale alone, and `gradient` becomes 0. Under [frozen divisors](Self::with_frozen_divisors) all values do: Σ g ·
    /// value.
    #[must_use]
    pub fn scale_gradient(&self, master: &[f32], gradient: &mut [f32]) -> Vec<f32> {
        let isa = Isa::detect();
        let blocks = self.k.div_ceil(self.block);
        let mut out = vec![0.0; self.n * blocks];
        let rows = out.par_chunks_mut(blocks).zip(master.par_chunks(self.k)).zip(gradient.par_chunks_mut(self.k));
        rows.enumerate().for_each(|(row, ((out, master), gradient))| {
            let mut values = vec![0.0; self.block];
            let parts = master.chunks(self.block).zip(gradient.chunks_mut(self.block));
            for (b, (out, (master, gradient))) in out.iter_mut().zip(parts).enumerate() {
                let divisor = self.divisor_at(row, b);
                let values = &mut values[..master.len()];
                round_block(isa, self.element, divisor, self.scale_at(row, b), master, values);
                let most = self.element.max() * divisor;
                for ((g, w), v) in gradient.iter_mut().zip(master).zip(values.iter()) {
                    if w.abs() > most {
                        *out += *g * v;
                        *g = 0.0;
                    } else if self.divisors.is_some() {
                        *out += *g * v;
                    } else {
                        *out += *g * (v - w);
                    }
                }
            }
        });
        out
    }

    /// The values of the grid just below and above each of `master` [N, K]; a value that is on the grid is one of them.
    #[must_use]
    pub fn neighbours(&self, master: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let (mut low, mut high) = (vec![0.0; master.len()], vec![0.0; master.len()]);
        let rows = low.par_chunks_mut(self.k).zip(high.par_chunks_mut(self.k)).zip(master.par_chunks(self.k));
        rows.enumerate().for_each(|(row, ((low, high), master))| {
            for (i, ((low, high), w)) in low.iter_mut().zip(high).zip(master).enumerate() {
                let (divisor, scale) = (self.divisor_at(row, i / self.block), self.scale_at(row, i / self.block));
                let (l, h) = if divisor > 0.0 { self.element.neighbours(w / divisor) } else { (0.0, 0.0) };
                (*low, *high) = (l * scale, h * scale);
            }
        });
        (low, high)
    }

    /// Moves each of `master` [N, K] into the range of its scale.
    pub fn move_into_reach(&self, master: &mut [f32]) {
        if self.element.is_float() {
            return;
        }
        master.par_chunks_mut(self.k).enumerate().for_each(|(row, master)| {
            for (b, master) in master.chunks_mut(self.block).enumerate() {
                let most = self.element.max() * self.divisor_at(row, b);
                master.iter_mut().for_each(|w| *w = w.clamp(-most, most));
            }
        });
    }

    /// The values of the grid nearest to `master` [N, K]: in f32 all of them, in BF16 without [`Self::outer_scale`].
    #[must_use]
    pub fn operand(&self, precision: Precision, master: &[f32]) -> Operand {
        assert_eq!(master.len(), self.n * self.k, "weights of a grid");
        let isa = Isa::detect();
        let blocks = self.k.div_ceil(self.block);
        match precision {
            Precision::F32 => {
                let mut values = vec![0.0; master.len()];
                let rows = values.par_chunks_mut(self.k).zip(master.par_chunks(self.k)).enumerate();
                rows.for_each(|(row, (values, master))| {
                    for (b, (values, master)) in
                        values.chunks_mut(self.block).zip(master.chunks(self.block)).enumerate()
                    {
                        round_block(isa, self.element, self.divisor_at(row, b), self.scale_at(row, b), master, values);
                    }
                });
                Operand::F32(values)
            }
            Precision::Bf16 => {
                let mut bits = vec![0; master.len()];
                let rows = bits.par_chunks_mut(self.k).zip(master.par_chunks(self.k)).enumerate();
                rows.for_each(|(row, (bits, master))| {
                    let mut values = vec![0.0; self.k];
                    for (b, (values, master)) in
                        values.chunks_mut(self.block).zip(master.chunks(self.block)).enumerate()
                    {
                        let inner = self.block_scales[row * blocks + b];
                        round_block(isa, self.element, self.divisor_at(row, b), inner, master, values);
                    }
                    round_all(isa, &values, bits);
                });
                Operand::Bf16(bits)
            }
        }
    }

    /// The codes nearest to `values` [N, K], as [`LinearTensors::data`] holds them; of a float format the values.
    #[must_use]
    pub fn encode(&self, values: &[f32]) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.n * self.element.row_bytes(self.k));
        for (row, values) in values.chunks_exact(self.k).enumerate() {
            let scale = |i: usize| self.divisor_at(row, i / self.block);
            let over = |(i, v): (usize, &f32)| if scale(i) == 0.0 { 0.0 } else { v / scale(i) };
            let scaled = values.iter().enumerate();
            match self.element {
                Element::F32 => out.extend(values.iter().flat_map(|v| v.to_le_bytes())),
                Element::F16 => out.extend(values.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes())),
                Element::Bf16 => out.extend(values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes())),
                Element::E4m3 => out.extend(scaled.map(|v| e4m3::encode(over(v)))),
                Element::E2m1 => {
                    let codes: Vec<u8> = scaled.map(|v| e2m1::encode(over(v))).collect();
                    out.extend(codes.chunks_exact(2).map(|pair| e2m1::pack(pair[0], pair[1])));
                }
            }
        }
        out
    }
}

multiversion! {
    /// `values` = the codes nearest to `master` under `scale`, times `inner`.
    fn round_block(element: Element, scale: f32, inner: f32, master: &[f32], values: &mut [f32]) {
        match element {
            _ if scale == 0.0 => values.fill(0.0),
            Element::E2m1 => {
                for (v, w) in values.iter_mut().zip(master) {
                    let magnitude = 0.5 * f32::from(e2m1::nearest_doubled((*w / scale).abs())) * inner;
                    *v = if *w < 0.0 { -magnitude } else { magnitude };
                }
            }
            Element::E4m3 => {
                for (v, w) in values.iter_mut().zip(master) {
                    *v = e4m3::round(*w / scale) * inner;
                }
            }
            _ => values.copy_from_slice(master),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::borrow::Cow;

    fn linear(
        element: Element,
        block_scales: BlockScales<'static>,
        output_scale: OutputScale,
    ) -> LinearTensors<'static> {
        let (n, k) = (3, 64);
        let data: Vec<u8> = (0..n * element.row_bytes(k)).map(|i| (i * 37 % 256) as u8).collect();
        // No NaN among E4M3 codes.
        let data = if element == Element::E4m3 {
            data.iter().map(|d| if d & 0x7f == 0x7f { 0 } else { *d }).collect()
        } else {
            data
        };
        LinearTensors {
            name: "m".into(),
            n,
            k,
            element,
            data: Cow::Owned(data),
            block_scales,
            output_scale,
            activation: ActivationFormat::Float,
            pre_quant_scale: None,
            rotation: None,
            bias: None,
        }
    }

    /// Stored weights are on their own grid: rounding and encoding them changes nothing, in either precision.
    #[test]
    fn a_stored_weight_is_its_own_nearest_value() {
        let e4m3_scales = |block: usize| BlockScales::E4m3 {
            block,
            codes: Cow::Owned((0..3 * 64 / block).map(|i| 0x28 + (i * 11 % 64) as u8).collect()),
        };
        let e8m0 = BlockScales::E8m0 { block: 32, codes: Cow::Owned((0..6).map(|i| 120 + i as u8).collect()) };
        for l in [
            linear(Element::E2m1, e4m3_scales(16), OutputScale::Tensor(0.0123)),
            linear(Element::E2m1, e8m0.clone(), OutputScale::One),
            linear(Element::E4m3, e8m0, OutputScale::One),
            linear(Element::E4m3, BlockScales::None, OutputScale::Tensor(0.0321)),
            linear(Element::E4m3, BlockScales::None, OutputScale::Row(vec![0.1, 0.02, 0.003])),
        ] {
            let grid = WeightGrid::of(&l);
            let exact = l.decode();
            let master = exact.clone();
            let Operand::F32(values) = grid.operand(Precision::F32, &master) else { unreachable!() };
            assert_eq!(values, exact, "{}", l.weight_format());
            assert_eq!(master, exact);
            let operand = grid.operand(Precision::Bf16, &master);
            for row in 0..l.n {
                let outer = grid.outer_scale(Precision::Bf16).at(row);
                for (v, e) in operand.row(row, l.k).iter().zip(&exact[row * l.k..]) {
                    assert!((v * outer - e).abs() <= 2e-7 * e.abs(), "{} {v} {outer} {e}", l.weight_format());
                }
            }
            let again = LinearTensors { data: Cow::Owned(grid.encode(&exact)), ..l.clone() };
            assert_eq!(again.decode(), exact, "{}", l.weight_format());
        }
    }

    /// Inputs in BF16 times the scale that was taken out are what the deployed kernels are held to.
    #[test]
    fn quantized_inputs_are_exact_in_bf16() {
        let x: Vec<f32> = (0..4 * 64).map(|i| ((i * 7919 % 1000) as f32 / 500.0 - 1.0) * 3.0).collect();
        for format in [
            ActivationFormat::Nvfp4 { global_scale: 0.0011 },
            ActivationFormat::Fp8Static { scale: 0.0072 },
            ActivationFormat::Fp8Token,
            ActivationFormat::Mxfp4 { rule: crate::formats::e8m0::ScaleRule::Ceil },
            ActivationFormat::Mxfp8 { rule: crate::formats::e8m0::ScaleRule::Ceil },
        ] {
            let (operand, scale) = quantize_input(Precision::Bf16, format, &x, 64);
            for row in 0..4 {
                let mut exact = x[row * 64..][..64].to_vec();
                format.fake_quantize(&mut exact);
                for (v, e) in operand.row(row, 64).iter().zip(exact) {
                    assert!((v * scale.at(row) - e).abs() <= 2e-7 * e.abs(), "{format}: {v} {e}");
                }
            }
        }
    }

    #[test]
    fn masters_are_kept_within_reach_of_their_codes() {
        let l = linear(Element::E2m1, BlockScales::None, OutputScale::Tensor(0.5));
        let mut master = vec![100.0; 3 * 64];
        let grid = WeightGrid::of(&l);
        grid.move_into_reach(&mut master);
        let Operand::F32(values) = grid.operand(Precision::F32, &master) else { unreachable!() };
        assert!(master.iter().chain(&values).all(|v| *v == 3.0));
    }
}
