//! Layers of random numbers in every format, for checks and measurements that need no checkpoint.

use super::e8m0::ScaleRule;
use super::linear::{ActivationFormat, BlockScales, Element, LinearTensors, OutputScale};
use crate::random::SplitMix64;

/// What scales there are below those of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blocks {
    None,
    /// E4M3, one for this many elements.
    E4m3(usize),
    /// E8M0, one for 32 elements.
    E8m0,
    /// f32, one for 128 x 128 elements.
    Grid,
}

/// Every way in which a weight is stored.
pub const WEIGHTS: [(Element, Blocks); 9] = [
    (Element::F32, Blocks::None),
    (Element::F16, Blocks::None),
    (Element::Bf16, Blocks::None),
    (Element::E4m3, Blocks::None),
    (Element::E4m3, Blocks::E8m0),
    (Element::E4m3, Blocks::Grid),
    (Element::E2m1, Blocks::E4m3(16)),
    (Element::E2m1, Blocks::E4m3(32)),
    (Element::E2m1, Blocks::E8m0),
];

/// Every way in which an input is quantized.
#[must_use]
pub fn activations() -> Vec<ActivationFormat> {
    use ActivationFormat as A;
    let mut all =
        vec![A::Float, A::Nvfp4 { global_scale: 7e-4 }, A::Fp8Static { scale: 5e-3 }, A::Fp8Token, A::Fp8Group];
    for rule in [ScaleRule::Ceil, ScaleRule::Floor, ScaleRule::Even] {
        all.extend([A::Mxfp4 { rule }, A::Mxfp8 { rule }]);
    }
    all
}

/// What K must be a multiple of.
#[must_use]
pub fn unit(blocks: Blocks) -> usize {
    match blocks {
        Blocks::E8m0 => 32,
        Blocks::E4m3(block) => block,
        Blocks::None | Blocks::Grid => 1,
    }
}

fn below(r: &mut SplitMix64, n: usize) -> usize {
    (r.draw() % n as u64) as usize
}

/// In -1..1.
pub fn uniform(r: &mut SplitMix64) -> f32 {
    (r.draw() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
}

fn positive(r: &mut SplitMix64) -> f32 {
    0.01 + uniform(r).abs()
}

/// One value of an activation: mostly small, a few large, some zero.
pub fn activation(r: &mut SplitMix64) -> f32 {
    match below(r, 16) {
        0 => 0.0,
        1 => 30.0 * uniform(r),
        _ => uniform(r),
    }
}

/// A layer of random codes under scales of every size, some with a bias and with a scale of each input channel.
pub fn layer(
    r: &mut SplitMix64,
    n: usize,
    k: usize,
    (element, blocks): (Element, Blocks),
    activation: ActivationFormat,
) -> LinearTensors<'static> {
    let count = n * k;
    let mut data = Vec::with_capacity(n * element.row_bytes(k));
    match element {
        Element::F32 => (0..count).for_each(|_| data.extend(uniform(r).to_le_bytes())),
        Element::F16 => (0..count).for_each(|_| data.extend(half::f16::from_f32(uniform(r)).to_le_bytes())),
        Element::Bf16 => (0..count).for_each(|_| data.extend(half::bf16::from_f32(uniform(r)).to_le_bytes())),
        // Every code but NaN (0x7f, 0xff).
        Element::E4m3 => data.extend((0..count).map(|_| below(r, 127) as u8 | (below(r, 2) << 7) as u8)),
        Element::E2m1 => data.extend((0..count / 2).map(|_| below(r, 256) as u8)),
    }
    let block_scales = match blocks {
        Blocks::None => BlockScales::None,
        Blocks::E4m3(block) => {
            BlockScales::E4m3 { block, codes: (0..count / block).map(|_| below(r, 127) as u8).collect() }
        }
        Blocks::E8m0 => {
            BlockScales::E8m0 { block: 32, codes: (0..count / 32).map(|_| 110 + below(r, 30) as u8).collect() }
        }
        Blocks::Grid => {
            BlockScales::Grid { values: (0..n.div_ceil(128) * k.div_ceil(128)).map(|_| positive(r)).collect() }
        }
    };
    let output_scale = match below(r, 3) {
        0 => OutputScale::One,
        1 => OutputScale::Tensor(positive(r)),
        _ => OutputScale::Row((0..n).map(|_| positive(r)).collect()),
    };
    LinearTensors {
        name: "random".into(),
        n,
        k,
        element,
        data: data.into(),
        block_scales,
        output_scale,
        activation,
        rotation: None,
        pre_quant_scale: (below(r, 4) == 0).then(|| (0..k).map(|_| positive(r)).collect()),
        bias: (below(r, 2) == 0).then(|| (0..n).map(|_| uniform(r)).collect()),
    }
}
