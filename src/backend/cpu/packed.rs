//! A linear's weight as the kernels read it: groups of 16 output rows interleaved, one row per SIMD lane.
//!
//! Layout of one group, K padded to a multiple of 8 with zeros (N to a multiple of 16 likewise):
//! - E2M1: per 8 of K, 64 bytes: lane r has 4 bytes, byte i = code k=i low, k=4+i high.
//! - E4M3: per 4 of K, 64 bytes: lane r has 4 bytes, k ascending.
//! - BF16, F16, F32: per k, 16 elements.
//! - Block scales: per block, 16 codes (E4M3, E8M0), or one f32 per group and block (128x128 grid).
//!
//! The packed size is the stored size but for the padding.

use std::ops::Range;
use std::sync::Arc;

use super::memory::{Arena, Lines};
use super::threads::Threads;
use crate::backend::{BackendError, Result};
use crate::formats::fp_quant::Method;
use crate::formats::linear::{
    ActivationFormat, BlockScales, Element, InputRotation, LinearTensors, OutputScale, decode_elements,
};
use crate::formats::{e4m3, e8m0, fp8, mx, nvfp4};

/// Output rows that are interleaved.
pub const GROUP: usize = 16;
/// K is padded to a multiple of this: one E2M1 lane word.
pub const K_STEP: usize = 8;
/// Bytes that one task interleaves, about.
const TASK_BYTES: usize = 256 << 10;

/// Block scales of a packed weight.
#[derive(Debug)]
pub(super) enum PackedScales {
    None,
    E4m3(Lines),
    E8m0(Lines),
    /// [N/16][blocks]
    Grid(Vec<f32>),
}

/// Block scales of some consecutive groups as they are stored; kernels decode them in registers. All are positive: the loader
/// sees to that.
#[derive(Clone, Copy, Debug)]
pub(super) enum Scales<'a> {
    /// Ones.
    None,
    /// [groups · blocks][16]
    E4m3(&'a [[u8; GROUP]]),
    E8m0(&'a [[u8; GROUP]]),
    /// [groups · blocks], of all 16 rows.
    Grid(&'a [f32]),
}

impl Scales<'_> {
    /// The scale of a lane in block `i`, counted over all groups: what every kernel equals.
    #[inline(always)]
    pub(super) fn at(&self, i: usize, lane: usize) -> f32 {
        match self {
            Self::None => 1.0,
            Self::E4m3(codes) => e4m3::decode(codes[i][lane]),
            Self::E8m0(codes) => e8m0::decode(codes[i][lane]),
            Self::Grid(values) => values[i],
        }
    }

    /// Whether there are `blocks` of them, or all are one.
    pub(super) fn cover(&self, blocks: usize) -> bool {
        match self {
            Self::None => true,
            Self::E4m3(codes) | Self::E8m0(codes) => codes.len() >= blocks,
            Self::Grid(values) => values.len() >= blocks,
        }
    }
}

/// Which kernel family computes a linear.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// E2M1 by E2M1: exact integer dot products per block.
    Integer,
    /// Any element by f32 values: one fused multiply-add per element.
    Float,
}

/// A linear layer in kernel layout.
#[derive(Debug)]
pub struct PackedLinear {
    pub name: String,
    /// What the weight is called in tables.
    pub weight_format: &'static str,
    pub n: usize,
    pub k: usize,
    pub element: Element,
    pub activation: ActivationFormat,
    pub(super) family: Family,
    /// K padded to [`K_STEP`].
    pub(super) k_padded: usize,
    /// Elements along K under one weight scale; `k_padded` where there is none.
    pub(super) weight_block: usize,
    pub(super) data: Lines,
    pub(super) scales: PackedScales,
    pub(super) output_scale: OutputScale,
    pub(super) pre_quant_scale: Option<Vec<f32>>,
    pub(super) rotation: Option<Arc<InputRotation>>,
    pub(super) bias: Option<Vec<f32>>,
}

impl PackedLinear {
    /// Interleaves the rows of `t`, by `threads`, in memory of `arena`.
    ///
    /// # Errors
    /// When no kernel takes this weight with this activation.
    pub(super) fn pack(t: &LinearTensors<'_>, threads: &Threads, arena: &Arena) -> Result<Self> {
        let family = family(t)?;
        let k_padded = t.k.next_multiple_of(K_STEP);
        let groups = t.n.div_ceil(GROUP);
        let mut data = arena.zeros(groups * GROUP * t.element.row_bytes(k_padded));
        let row_bytes = t.element.row_bytes(t.k);
        let group_bytes = GROUP * t.element.row_bytes(k_padded);
        let per_task = (TASK_BYTES / group_bytes.max(1)).max(1);
        threads.pieces(&mut data, per_task * group_bytes, |task, piece| {
            let rows = t.data.chunks_exact(row_bytes.max(1)).take(t.n).skip(task * per_task * GROUP);
            for (n, row) in rows.take(per_task * GROUP).enumerate() {
                let group = &mut piece[n / GROUP * group_bytes..][..group_bytes];
                interleave(t.element, row, n % GROUP, group);
            }
        });
        let (weight_block, scales) = match &t.block_scales {
            BlockScales::None => (k_padded, PackedScales::None),
            BlockScales::E4m3 { block, codes } => {
                let mut codes = interleave_scales(codes, t.n, t.k / block, arena);
                // A block of zeros may have -0, the only scale with a sign.
                codes.iter_mut().for_each(|code| *code &= 0x7f);
                (*block, PackedScales::E4m3(codes))
            }
            BlockScales::E8m0 { block, codes } => {
                (*block, PackedScales::E8m0(interleave_scales(codes, t.n, t.k / block, arena)))
            }
            BlockScales::Grid { values } => {
                let blocks = t.k.div_ceil(fp8::BLOCK);
                let per_group = (0..groups).flat_map(|g| &values[g * GROUP / fp8::BLOCK * blocks..][..blocks]);
                (fp8::BLOCK, PackedScales::Grid(per_group.copied().collect()))
            }
        };
        Ok(Self {
            name: t.name.clone(),
            weight_format: t.weight_format(),
            n: t.n,
            k: t.k,
            element: t.element,
            activation: t.activation,
            family,
            k_padded,
            weight_block,
            data,
            scales,
            output_scale: t.output_scale.clone(),
            pre_quant_scale: t.pre_quant_scale.clone(),
            rotation: t.rotation.clone(),
            bias: t.bias.clone(),
        })
    }

    /// Bytes held in memory.
    #[must_use]
    pub fn resident_bytes(&self) -> usize {
        let scales = match &self.scales {
            PackedScales::None => 0,
            PackedScales::E4m3(c) | PackedScales::E8m0(c) => c.len(),
            PackedScales::Grid(v) => 4 * v.len(),
        };
        let rows = match &self.output_scale {
            OutputScale::Row(v) => 4 * v.len(),
            _ => 0,
        };
        let floats = |v: &Option<Vec<f32>>| v.as_ref().map_or(0, |v| 4 * v.len());
        let rotation = self.rotation.as_ref().map_or(0, |r| r.bytes());
        self.data.len() + scales + rows + rotation + floats(&self.pre_quant_scale) + floats(&self.bias)
    }

    /// Groups of 16 output rows.
    pub(super) fn groups(&self) -> usize {
        self.n.div_ceil(GROUP)
    }

    /// Packed elements of groups.
    pub(super) fn groups_data(&self, groups: Range<usize>) -> &[u8] {
        let bytes = GROUP * self.element.row_bytes(self.k_padded);
        &self.data[groups.start * bytes..groups.end * bytes]
    }

    /// Blocks along K that have a scale each.
    pub(super) fn weight_blocks(&self) -> usize {
        self.k_padded.div_ceil(self.weight_block)
    }

    /// Scales of groups.
    pub(super) fn groups_scales(&self, groups: Range<usize>) -> Scales<'_> {
        let blocks = groups.start * self.weight_blocks()..groups.end * self.weight_blocks();
        match &self.scales {
            PackedScales::None => Scales::None,
            PackedScales::E4m3(codes) => Scales::E4m3(&codes.as_chunks().0[blocks]),
            PackedScales::E8m0(codes) => Scales::E8m0(&codes.as_chunks().0[blocks]),
            PackedScales::Grid(values) => Scales::Grid(&values[blocks]),
        }
    }

    /// Row `n` in f32, scales applied as [`LinearTensors::decode_row`] does.
    pub(super) fn decode_row(&self, n: usize, out: &mut [f32]) {
        let mut row = vec![0u8; self.element.row_bytes(self.k_padded)];
        let group = n / GROUP;
        deinterleave(self.element, self.groups_data(group..group + 1), n % GROUP, &mut row);
        decode_elements(self.element, &row, out);
        if matches!((&self.scales, &self.output_scale), (PackedScales::None, OutputScale::One)) {
            return;
        }
        let scales = self.groups_scales(group..group + 1);
        for (block, values) in out.chunks_mut(self.weight_block).enumerate() {
            let s = scales.at(block, n % GROUP) * self.output_scale.at(n);
            values.iter_mut().for_each(|v| *v *= s);
        }
    }
}

/// Which kernels take `t`, if any do.
fn family(t: &LinearTensors<'_>) -> Result<Family> {
    let block = (!matches!(t.block_scales, BlockScales::None)).then(|| t.block_scales.block(t.k));
    family_of(t.element, block, t.activation).ok_or_else(|| BackendError::Unsupported {
        module: t.name.clone(),
        backend: "the CPU",
        what: format!("{} weights with {} activations", t.weight_format(), t.activation),
    })
}

/// The kernel family for weights of `element` in blocks of `block` along K; blocks of weight and activation must nest.
fn family_of(element: Element, block: Option<usize>, activation: ActivationFormat) -> Option<Family> {
    use ActivationFormat as A;
    let nests = |other: usize| block.is_none_or(|b| b.is_multiple_of(other) || other.is_multiple_of(b));
    match (element, activation) {
        (Element::E2m1, A::Nvfp4 { .. }) => (block == Some(nvfp4::BLOCK)).then_some(Family::Integer),
        (Element::E2m1, A::Mxfp4 { .. } | A::FpQuant { .. }) => (block == Some(mx::BLOCK)).then_some(Family::Integer),
        (_, A::Nvfp4 { .. } | A::Mxfp4 { .. } | A::FpQuant { .. }) => None,
        (_, A::Fp8Group) => nests(fp8::BLOCK).then_some(Family::Float),
        (_, A::Mxfp8 { .. }) => nests(mx::BLOCK).then_some(Family::Float),
        (_, A::Float | A::Fp8Static { .. } | A::Fp8Token) => Some(Family::Float),
    }
}

/// One combination of formats that checkpoints have, and the kernels it gets.
#[derive(Clone, Debug)]
pub struct Combination {
    pub weight: &'static str,
    pub activation: String,
    pub family: Family,
}

/// The combinations that the dialects produce, for people who ask which kernel they get.
#[must_use]
pub fn combinations() -> Vec<Combination> {
    use ActivationFormat as A;
    let (scale, global_scale) = (1.0, 1.0);
    let rule = e8m0::ScaleRule::Ceil;
    let all = [
        ("nvfp4", Element::E2m1, Some(nvfp4::BLOCK), A::Nvfp4 { global_scale }),
        ("nvfp4", Element::E2m1, Some(nvfp4::BLOCK), A::Float),
        ("nvfp4 block 32", Element::E2m1, Some(32), A::Fp8Static { scale }),
        ("mxfp4", Element::E2m1, Some(mx::BLOCK), A::Mxfp4 { rule }),
        ("mxfp4", Element::E2m1, Some(mx::BLOCK), A::FpQuant { method: Method::AbsMax, global_scale }),
        ("mxfp4", Element::E2m1, Some(mx::BLOCK), A::FpQuant { method: Method::Quest, global_scale }),
        ("mxfp4", Element::E2m1, Some(mx::BLOCK), A::Float),
        ("mxfp8", Element::E4m3, Some(mx::BLOCK), A::Mxfp8 { rule }),
        ("fp8", Element::E4m3, None, A::Fp8Static { scale }),
        ("fp8 per channel", Element::E4m3, None, A::Fp8Token),
        ("fp8 128x128", Element::E4m3, Some(fp8::BLOCK), A::Fp8Group),
        ("fp8 128x128", Element::E4m3, Some(fp8::BLOCK), A::Float),
        ("bf16", Element::Bf16, None, A::Float),
        ("f16", Element::F16, None, A::Float),
        ("f32", Element::F32, None, A::Float),
    ];
    all.into_iter()
        .filter_map(|(weight, element, block, activation)| {
            let family = family_of(element, block, activation)?;
            Some(Combination { weight, activation: activation.to_string(), family })
        })
        .collect()
}

/// Writes a stored row into lane `lane` of its group.
fn interleave(element: Element, row: &[u8], lane: usize, group: &mut [u8]) {
    match element {
        Element::E2m1 => {
            let (chunks, rest) = row.as_chunks::<4>();
            let mut last = [0; 4];
            last[..rest.len()].copy_from_slice(rest);
            for (codes, lanes) in chunks.iter().chain([&last]).zip(group.chunks_exact_mut(4 * GROUP)) {
                // `codes` holds k = 0..8 two to a byte; the lane word pairs k = i with k = 4 + i: the middle bytes change
                // places, then the middle codes of either half.
                let mut word = u32::from_le_bytes(*codes);
                let bytes = (word ^ (word >> 8)) & 0x0000_ff00;
                word ^= bytes ^ (bytes << 8);
                let codes = (word ^ (word >> 4)) & 0x00f0_00f0;
                word ^= codes ^ (codes << 4);
                lanes[4 * lane..][..4].copy_from_slice(&word.to_le_bytes());
            }
        }
        Element::E4m3 => {
            for (chunk, codes) in row.chunks(4).enumerate() {
                group[chunk * 4 * GROUP + 4 * lane..][..codes.len()].copy_from_slice(codes);
            }
        }
        Element::Bf16 | Element::F16 | Element::F32 => {
            /// One size at a time, known when compiling.
            fn spread<const SIZE: usize>(row: &[u8], lane: usize, group: &mut [u8]) {
                for (bytes, lanes) in row.as_chunks::<SIZE>().0.iter().zip(group.chunks_exact_mut(GROUP * SIZE)) {
                    lanes[lane * SIZE..][..SIZE].copy_from_slice(bytes);
                }
            }
            match element {
                Element::F32 => spread::<4>(row, lane, group),
                _ => spread::<2>(row, lane, group),
            }
        }
    }
}

/// The inverse of [`interleave`]: lane `lane` of a group as a stored row.
fn deinterleave(element: Element, group: &[u8], lane: usize, row: &mut [u8]) {
    match element {
        Element::E2m1 => {
            for (chunk, codes) in row.chunks_mut(4).enumerate() {
                let word = &group[chunk * 4 * GROUP + 4 * lane..][..4];
                let code = |k: usize| (word[k % 4] >> (4 * (k / 4))) & 15;
                for (i, b) in codes.iter_mut().enumerate() {
                    *b = code(2 * i) | (code(2 * i + 1) << 4);
                }
            }
        }
        Element::E4m3 => {
            for (chunk, codes) in row.chunks_mut(4).enumerate() {
                codes.copy_from_slice(&group[chunk * 4 * GROUP + 4 * lane..][..codes.len()]);
            }
        }
        Element::Bf16 | Element::F16 | Element::F32 => {
            let size = element.row_bytes(1);
            for (k, bytes) in row.chunks_exact_mut(size).enumerate() {
                bytes.copy_from_slice(&group[(k * GROUP + lane) * size..][..size]);
            }
        }
    }
}

/// [N, blocks] codes to [N/16][blocks][16]; absent rows get code 0.
fn interleave_scales(codes: &[u8], n: usize, blocks: usize, arena: &Arena) -> Lines {
    let mut out = arena.zeros(n.div_ceil(GROUP) * blocks * GROUP);
    for (row, codes) in codes.chunks_exact(blocks.max(1)).take(n).enumerate() {
        for (b, &code) in codes.iter().enumerate() {
            out[(row / GROUP * blocks + b) * GROUP + row % GROUP] = code;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::borrow::Cow;

    /// A weight of numbers in no order, packed, which decodes to what was stored.
    fn packed(element: Element, n: usize, k: usize, seed: u8) -> (PackedLinear, LinearTensors<'static>) {
        let bytes = (0..n * element.row_bytes(k)).map(|i| ((i * 31 + usize::from(seed)) % 120) as u8).collect();
        let codes = (0..n * k / 16).map(|i| ((i * 7 + usize::from(seed)) % 126) as u8).collect();
        let block_scales = match element {
            Element::E2m1 => BlockScales::E4m3 { block: 16, codes: Cow::Owned(codes) },
            _ => BlockScales::None,
        };
        let t = LinearTensors {
            name: "w".into(),
            n,
            k,
            element,
            data: Cow::Owned(bytes),
            block_scales,
            output_scale: OutputScale::Tensor(0.5),
            activation: ActivationFormat::Float,
            pre_quant_scale: None,
            rotation: None,
            bias: None,
        };
        let packed = PackedLinear::pack(&t, &Threads::new(3).unwrap(), &Arena::default()).unwrap();
        let (mut expected, mut got) = (vec![0.0; k], vec![0.0; packed.k_padded]);
        for row in 0..n {
            t.decode_row(row, &mut expected);
            packed.decode_row(row, &mut got);
            assert_eq!(expected, got[..k], "{element:?}, row {row} of {n}");
        }
        (packed, t)
    }

    #[test]
    fn packing_by_many_tasks_loses_nothing() {
        for (element, n, k) in [(Element::E2m1, 1000, 1600), (Element::Bf16, 333, 805), (Element::E4m3, 500, 1021)] {
            packed(element, n, k, 3);
        }
    }

    proptest! {
        #[test]
        fn packing_loses_nothing(n in 1usize..40, blocks in 1usize..5, odd in 0usize..8, which in 0usize..5, seed in any::<u8>()) {
            let element = [Element::F32, Element::F16, Element::Bf16, Element::E4m3, Element::E2m1][which];
            let k = blocks * 16 - if element == Element::E2m1 { 0 } else { odd };
            let (packed, t) = packed(element, n, k, seed);
            prop_assert!(packed.resident_bytes() <= t.stored_bytes() * n.next_multiple_of(16) / n * k.next_multiple_of(8) / k + 4);
        }
    }
}
