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
    /// Bytes that `t` takes in memory when it is packed.
    ///
    /// # Errors
    /// When no kernel takes this weight with this activation.
    pub(super) fn packed_bytes(t: &LinearTensors<'_>) -> Result<usize> {
        family(t)?;
        let rows = t.n.next_multiple_of(GROUP);
        let scales = match &t.block_scales {
            BlockScales::None => 0,
            BlockScales::E4m3 { block, .. } | BlockScales::E8m0 { block, .. } => rows * (t.k / block),
            BlockScales::Grid { .. } => 4 * (rows / GROUP) * t.k.div_ceil(fp8::BLOCK),
        };
        let output = match &t.output_scale {
            OutputScale::Row(v) => 4 * v.len(),
            _ => 0,
        };
        let floats = |v: &Option<Vec<f32>>| v.as_ref().map_or(0, |v| 4 * v.len());
        let rotation = t.rotation.as_ref().map_or(0, |r| r.bytes());
        let elements = rows * t.element.row_bytes(t.k.next_multiple_of(K_STEP));
        Ok(elements + scales + output + rotation + floats(&t.pre_quant_scale) + floats(&t.bias))
    }

    /// Interleaves the rows of `t`, by `threads`, in memory of `arena`.
    ///
    /// # Errors
    /// When no kernel takes this weight with this activation.
    pub(super) fn pack(t: &LinearTensors<'_>, threads: &Threads, arena: &Arena) -> Result<Self> {
        Self::pack_into(t, threads, arena, &mut Vec::new())
    }

    /// The memory of its elements, for others.
    pub(super) fn into_elements(self) -> Lines {
        self.data
    }

    /// The same in memory of `spare`, whatever that holds, if some of it is of the size: fresh memory costs more than packing. The
    /// others are given back.
    ///
    /// # Errors
    /// As [`Self::pack`].
    pub(super) fn pack_into(
        t: &LinearTensors<'_>,
        threads: &Threads,
        arena: &Arena,
        spare: &mut Vec<Lines>,
    ) -> Result<Self> {
        let family = family(t)?;
        let k_padded = t.k.next_multiple_of(K_STEP);
        let groups = t.n.div_ceil(GROUP);
        let bytes = groups * GROUP * t.element.row_bytes(k_padded);
        let fits = spare.iter().position(|lines| lines.len() == bytes);
        let reused = fits.map(|i| spare.swap_remove(i));
        // The rest goes before anything new comes.
        spare.clear();
        let mut data = reused.unwrap_or_else(|| arena.zeros(bytes));
        let row_bytes = t.element.row_bytes(t.k);
        let group_bytes = GROUP * t.element.row_bytes(k_padded);
        threads.pieces(&mut data, group_bytes, |g, group| {
            let rows = &t.data[g * GROUP * row_bytes..(t.n.min((g + 1) * GROUP)) * row_bytes];
            if k_padded != t.k || rows.len() < GROUP * row_bytes {
                group.fill(0);
            }
            interleave(t.element, rows, row_bytes, group);
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
pub(super) fn family(t: &LinearTensors<'_>) -> Result<Family> {
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

/// Writes stored rows of `row_bytes`, at most 16 of them, into the lanes of their group; what there is no row or
/// column for stays as it is, but for the rest of a row's last word.
fn interleave(element: Element, rows: &[u8], row_bytes: usize, group: &mut [u8]) {
    match element {
        Element::Bf16 | Element::F16 => interleave_words::<2>(rows, row_bytes, group),
        Element::F32 | Element::E4m3 => interleave_words::<4>(rows, row_bytes, group),
        Element::E2m1 => {
            interleave_words::<4>(rows, row_bytes, group);
            group.as_chunks_mut().0.iter_mut().for_each(|word| *word = pair_codes(*word));
        }
    }
}

/// Of 8 codes, k ascending two to a byte, those with k = i and k = 4 + i in byte i.
fn pair_codes(codes: [u8; 4]) -> [u8; 4] {
    // Each nibble of the lower half to a byte of its own.
    let spread = |half: u32| {
        let bytes = (half | half << 8) & 0x00ff_00ff;
        (bytes | bytes << 4) & 0x0f0f_0f0f
    };
    let word = u32::from_le_bytes(codes);
    (spread(word & 0xffff) | spread(word >> 16) << 4).to_le_bytes()
}

/// Words of `SIZE` bytes, in turns one of each row; a row's last may be cut short.
fn interleave_words<const SIZE: usize>(rows: &[u8], row_bytes: usize, group: &mut [u8]) {
    /// Words of a row that are moved before the next row's: their lines stay in the first cache.
    const RUN: usize = 64;
    let lanes: Vec<(&[[u8; SIZE]], &[u8])> = rows.chunks_exact(row_bytes.max(1)).map(<[u8]>::as_chunks).collect();
    let group = group.as_chunks_mut::<SIZE>().0;
    for (run, out) in group.chunks_mut(RUN * GROUP).enumerate() {
        for (lane, (row, _)) in lanes.iter().enumerate() {
            let row = &row[(run * RUN).min(row.len())..((run + 1) * RUN).min(row.len())];
            row.iter().zip(out.chunks_exact_mut(GROUP)).for_each(|(word, out)| out[lane] = *word);
        }
    }
    for (lane, (row, rest)) in lanes.iter().enumerate().filter(|(_, (_, rest))| !rest.is_empty()) {
        group[row.len() * GROUP + lane][..rest.len()].copy_from_slice(rest);
    }
}

/// Undoes [`interleave`]: lane `lane` of a group as a stored row.
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
        let (threads, arena) = (Threads::new(3).unwrap(), Arena::default());
        let packed = PackedLinear::pack(&t, &threads, &arena).unwrap();
        assert_eq!(PackedLinear::packed_bytes(&t).unwrap(), packed.resident_bytes());
        // In memory that was another's.
        let mut spare = vec![arena.zeros(1), PackedLinear::pack(&t, &threads, &arena).unwrap().into_elements()];
        spare[1].fill(0xa5);
        let place = spare[1].as_ptr();
        let again = PackedLinear::pack_into(&t, &threads, &arena, &mut spare).unwrap();
        assert_eq!((again.data.as_ptr(), spare.len()), (place, 0));
        assert!(again.data[..] == packed.data[..]);
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
