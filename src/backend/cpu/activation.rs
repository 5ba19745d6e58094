//! The input of a linear, quantized as the deployed format says, in the form that the kernels read.

use super::elementwise;
use super::isa::{Isa, multiversion};
use super::packed::{Family, K_STEP, PackedLinear};
use crate::formats::linear::ActivationFormat;
use crate::formats::{fp8, mx, nvfp4};

/// Input of the integer kernels: doubled E2M1 values and what each block needs, row-major by token.
#[derive(Debug, Default)]
pub(super) struct IntegerInput {
    pub block: usize,
    /// [M, K] doubled E2M1 values.
    pub values: Vec<i8>,
    /// [M, K/block] -12 · the block's sum: undoes the offset that makes the weights unsigned.
    pub corrections: Vec<i32>,
    /// [M, K/block]
    pub scales: Vec<f32>,
    /// Scale of everything, the 0.25 of two doublings included.
    pub global: f32,
}

/// Input of the float kernels.
#[derive(Debug, Default)]
pub(super) struct FloatInput {
    /// [M, K padded]
    pub values: Vec<f32>,
    /// Elements under one of `scales`; 0 where there are none.
    pub block: usize,
    /// [M, ⌈K/block⌉]
    pub scales: Vec<f32>,
    /// Scale of each token, [M]; empty where there is none.
    pub rows: Vec<f32>,
}

#[derive(Debug)]
pub(super) enum Input {
    Integer(IntegerInput),
    Float(FloatInput),
}

/// Quantizes `x` [M, K] as linear `w` wants it.
pub(super) fn quantize(isa: Isa, x: &[f32], w: &PackedLinear) -> Input {
    let (k, m) = (w.k, x.len() / w.k);
    let scaled;
    let x = match &w.pre_quant_scale {
        None => x,
        Some(s) => {
            let mut copy = x.to_vec();
            copy.chunks_exact_mut(k).for_each(|row| elementwise::multiply(isa, row, s));
            scaled = copy;
            &scaled
        }
    };
    if w.family == Family::Integer {
        let block = w.weight_block;
        let mut out = IntegerInput {
            block,
            values: vec![0; m * k],
            corrections: vec![0; m * k / block],
            scales: vec![0.0; m * k / block],
            global: 0.25,
        };
        match w.activation {
            ActivationFormat::Nvfp4 { global_scale } => {
                out.global *= global_scale;
                nvfp4_blocks(isa, x, global_scale, &mut out.values, &mut out.corrections, &mut out.scales);
            }
            ActivationFormat::Mxfp4 { rule } => {
                mxfp4_blocks(isa, x, rule, &mut out.values, &mut out.corrections, &mut out.scales);
            }
            // `Family::Integer` is given to these two formats only.
            _ => {}
        }
        return Input::Integer(out);
    }
    let k_padded = k.next_multiple_of(K_STEP);
    let mut out = FloatInput { values: vec![0.0; m * k_padded], ..FloatInput::default() };
    let rows = x.chunks_exact(k).zip(out.values.chunks_exact_mut(k_padded));
    match w.activation {
        ActivationFormat::Fp8Static { scale } => {
            rows.for_each(|(x, v)| fp8_static(isa, x, scale, v));
            out.rows = vec![scale; m];
        }
        ActivationFormat::Fp8Token => {
            out.rows = vec![0.0; m];
            rows.zip(&mut out.rows).for_each(|((x, v), s)| fp8_dynamic(isa, x, v, s));
        }
        ActivationFormat::Fp8Group => {
            out.block = fp8::BLOCK;
            let blocks = k.div_ceil(fp8::BLOCK);
            out.scales = vec![0.0; m * blocks];
            for ((x, v), scales) in rows.zip(out.scales.chunks_exact_mut(blocks)) {
                let groups = x.chunks(fp8::BLOCK).zip(v.chunks_mut(fp8::BLOCK));
                groups.zip(scales).for_each(|((x, v), s)| fp8_dynamic(isa, x, v, s));
            }
        }
        ActivationFormat::Mxfp8 { rule } => {
            out.block = mx::BLOCK;
            let blocks = k.div_ceil(mx::BLOCK);
            out.scales = vec![0.0; m * blocks];
            for ((x, v), scales) in rows.zip(out.scales.chunks_exact_mut(blocks)) {
                mxfp8_blocks(isa, x, rule, v, scales);
            }
        }
        // The 4-bit formats are the integer family's.
        ActivationFormat::Float | ActivationFormat::Nvfp4 { .. } | ActivationFormat::Mxfp4 { .. } => {
            rows.for_each(|(x, v)| v[..k].copy_from_slice(x));
        }
    }
    Input::Float(out)
}

#[inline(always)]
fn correction(values: &[i8]) -> i32 {
    -12 * values.iter().map(|&v| i32::from(v)).sum::<i32>()
}

multiversion! {
    fn nvfp4_blocks(x: &[f32], global_scale: f32, values: &mut [i8], corrections: &mut [i32], scales: &mut [f32]) {
        let blocks = x.as_chunks::<{ nvfp4::BLOCK }>().0.iter().zip(values.as_chunks_mut::<{ nvfp4::BLOCK }>().0);
        for ((x, v), (c, s)) in blocks.zip(corrections.iter_mut().zip(scales)) {
            *s = nvfp4::quantize_activation_block(x, global_scale, v);
            *c = correction(v);
        }
    }
}

multiversion! {
    fn mxfp4_blocks(x: &[f32], rule: crate::formats::e8m0::ScaleRule, values: &mut [i8], corrections: &mut [i32], scales: &mut [f32]) {
        let blocks = x.as_chunks::<{ mx::BLOCK }>().0.iter().zip(values.as_chunks_mut::<{ mx::BLOCK }>().0);
        for ((x, v), (c, s)) in blocks.zip(corrections.iter_mut().zip(scales)) {
            *s = mx::quantize_fp4_block(x, rule, v);
            *c = correction(v);
        }
    }
}

multiversion! {
    fn mxfp8_blocks(x: &[f32], rule: crate::formats::e8m0::ScaleRule, values: &mut [f32], scales: &mut [f32]) {
        for ((x, v), s) in x.chunks(mx::BLOCK).zip(values.chunks_mut(mx::BLOCK)).zip(scales) {
            *s = mx::quantize_fp8_block(x, rule, v);
        }
    }
}

multiversion! {
    fn fp8_static(x: &[f32], scale: f32, values: &mut [f32]) {
        fp8::quantize(x, scale, values);
    }
}

multiversion! {
    fn fp8_dynamic(x: &[f32], values: &mut [f32], scale: &mut f32) {
        *scale = fp8::quantize_dynamic(x, values);
    }
}
