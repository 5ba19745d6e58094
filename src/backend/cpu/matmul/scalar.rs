//! The definition of both products, in portable Rust: what every fast kernel equals bit for bit.

use super::{BytesTile, FloatTile, GROUP, IntegerTile, OFFSET_CODES, Scales, TILE};
use crate::formats::linear::Element;
use crate::formats::{e2m1, e4m3};

/// acc[m] = Σ over blocks: (weight scale · input scale) · (integer dot of the block).
pub(super) fn integer(t: &IntegerTile<'_>, rows: usize, acc: &mut [[f32; GROUP]; TILE]) {
    let blocks = t.k / t.block;
    for (m, acc) in acc[..rows].iter_mut().enumerate() {
        for b in 0..blocks {
            let scale = t.scales[m * blocks + b];
            let values = &t.values[m * t.k + b * t.block..][..t.block];
            for lane in 0..GROUP {
                let mut dot = 0i32;
                for (k, &v) in values.iter().enumerate() {
                    dot += i32::from(v) * i32::from(e2m1::DOUBLED[e2m1_code(t.weights, b * t.block + k, lane)]);
                }
                acc[lane] = (t.weight_scales.at(b, lane) * scale).mul_add(dot as f32, acc[lane]);
            }
        }
    }
}

/// [`integer`] of weights that are bytes already: acc[group · rows + m].
pub(super) fn bytes(t: &BytesTile<'_>, rows: usize, acc: &mut [[f32; GROUP]; TILE]) {
    let blocks = t.k / t.block;
    for (i, acc) in acc[..t.groups * rows].iter_mut().enumerate() {
        let (group, m) = (i / rows, i % rows);
        let weights = &t.weights[group * t.k * GROUP..][..t.k * GROUP];
        for b in 0..blocks {
            let scales = &t.weight_scales[(group * blocks + b) * GROUP..][..GROUP];
            for lane in 0..GROUP {
                let mut dot = t.corrections[m * blocks + b];
                for k in b * t.block..(b + 1) * t.block {
                    let weight = weights[k / 4 * 4 * GROUP + 4 * lane + k % 4];
                    dot += i32::from(weight) * i32::from(t.values[m * t.k + k]);
                }
                acc[lane] = (scales[lane] * t.scales[m * blocks + b]).mul_add(dot as f32, acc[lane]);
            }
        }
    }
}

/// What [`BytesTile`] has of packed elements and scales.
pub(super) fn decode_bytes(packed: &[u8], scales: Scales<'_>, bytes: &mut [u8], values: &mut [f32]) {
    for (packed, bytes) in packed.chunks_exact(4 * GROUP).zip(bytes.chunks_exact_mut(8 * GROUP)) {
        let (low, high) = bytes.split_at_mut(4 * GROUP);
        for ((code, low), high) in packed.iter().zip(low).zip(high) {
            (*low, *high) = (OFFSET_CODES[usize::from(code & 15)], OFFSET_CODES[usize::from(code >> 4)]);
        }
    }
    for (i, values) in values.as_chunks_mut::<GROUP>().0.iter_mut().enumerate() {
        *values = std::array::from_fn(|lane| scales.at(i, lane));
    }
}

/// acc[group · rows + m] = Σ over blocks: (weight scale · input scale) · (sequential fused multiply-adds over the block).
pub(super) fn float(t: &FloatTile<'_>, rows: usize, acc: &mut [[f32; GROUP]; TILE]) {
    for (i, acc) in acc[..t.groups * rows].iter_mut().enumerate() {
        let (group, m) = (i / rows, i % rows);
        let weights = &t.weights[group * t.group_bytes()..][..t.group_bytes()];
        let values = &t.values[m * t.k..][..t.k];
        for (b, values) in values.chunks(t.block).enumerate() {
            let scale = t.scale(m, b);
            for lane in 0..GROUP {
                let mut dot = 0.0f32;
                for (k, &v) in values.iter().enumerate() {
                    dot = weight(t.element, weights, b * t.block + k, lane).mul_add(v, dot);
                }
                acc[lane] = (t.weight_scales.at(t.weight_block(group, b), lane) * scale).mul_add(dot, acc[lane]);
            }
        }
    }
}

/// A group's elements in f32, per k one of each row.
pub(super) fn decode(element: Element, packed: &[u8], values: &mut [f32]) {
    for (k, values) in values.as_chunks_mut::<GROUP>().0.iter_mut().enumerate() {
        *values = std::array::from_fn(|lane| weight(element, packed, k, lane));
    }
}

fn e2m1_code(weights: &[u8], k: usize, lane: usize) -> usize {
    let byte = weights[k / 8 * 4 * GROUP + 4 * lane + k % 4];
    usize::from((byte >> (k % 8 / 4 * 4)) & 15)
}

fn weight(element: Element, w: &[u8], k: usize, lane: usize) -> f32 {
    match element {
        Element::E2m1 => e2m1::VALUES[e2m1_code(w, k, lane)],
        Element::E4m3 => e4m3::decode(w[k / 4 * 4 * GROUP + 4 * lane + k % 4]),
        Element::Bf16 => {
            let i = 2 * (k * GROUP + lane);
            f32::from_bits(u32::from(u16::from_le_bytes([w[i], w[i + 1]])) << 16)
        }
        Element::F16 => {
            let i = 2 * (k * GROUP + lane);
            half::f16::from_le_bytes([w[i], w[i + 1]]).to_f32()
        }
        Element::F32 => {
            let i = 4 * (k * GROUP + lane);
            f32::from_le_bytes([w[i], w[i + 1], w[i + 2], w[i + 3]])
        }
    }
}
