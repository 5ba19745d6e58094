//! The input of a linear, quantized as the deployed format says, in the form that the kernels read.

use std::borrow::Cow;

use super::elementwise;
use super::isa::{Isa, multiversion};
use super::packed::{Family, K_STEP, PackedLinear};
use super::threads::Threads;
use crate::formats::fp_quant::{self, Method};
use crate::formats::linear::{ActivationFormat, InputRotation};
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
pub(super) struct FloatInput<'a> {
    /// [M, K padded]
    pub values: Cow<'a, [f32]>,
    /// Elements under one of `scales`; 0 where there are none.
    pub block: usize,
    /// [M, ⌈K/block⌉]
    pub scales: Vec<f32>,
    /// Scale of each token, [M]; empty where there is none.
    pub rows: Vec<f32>,
}

#[derive(Debug)]
pub(super) enum Input<'a> {
    Integer(IntegerInput),
    Float(FloatInput<'a>),
}

/// Values that one task quantizes, about: more than handing them over takes.
const TASK_VALUES: usize = 1 << 12;

/// Quantizes `x` [M, K] as linear `w` wants it.
pub(super) fn quantize<'a>(isa: Isa, threads: &Threads, x: &'a [f32], w: &PackedLinear) -> Input<'a> {
    let k = w.k;
    let task_tokens = task_tokens(k);
    let scaled: Cow<[f32]> = match (&w.pre_quant_scale, &w.rotation) {
        (None, None) => x.into(),
        (scale, rotation) => {
            let mut copy = x.to_vec();
            threads.pieces(&mut copy, task_tokens * k, |_, rows| {
                for row in rows.chunks_exact_mut(k) {
                    if let Some(scale) = scale {
                        elementwise::multiply(isa, row, scale);
                    }
                    if let Some(rotation) = rotation {
                        rotate(isa, row, rotation);
                    }
                }
            });
            copy.into()
        }
    };
    if w.family == Family::Integer {
        Input::Integer(integer(isa, threads, &scaled, w))
    } else {
        float(isa, threads, scaled, w)
    }
}

/// Tokens of `k` values that one task quantizes.
fn task_tokens(k: usize) -> usize {
    (TASK_VALUES / k.max(1)).max(1)
}

fn integer(isa: Isa, threads: &Threads, x: &[f32], w: &PackedLinear) -> IntegerInput {
    let block = w.weight_block;
    let (blocks, task) = (x.len() / block, task_tokens(w.k) * w.k);
    let mut out = IntegerInput {
        block,
        values: vec![0; x.len()],
        corrections: vec![0; blocks],
        scales: vec![0.0; blocks],
        global: 0.25,
    };
    let mut tasks: Vec<_> = (x.chunks(task).zip(out.values.chunks_mut(task)))
        .zip(out.corrections.chunks_mut(task / block).zip(out.scales.chunks_mut(task / block)))
        .collect();
    let activation = w.activation;
    threads.pieces(&mut tasks, 1, |_, tasks| {
        for ((x, v), (c, s)) in tasks {
            match activation {
                ActivationFormat::Nvfp4 { global_scale } => nvfp4_blocks(isa, x, global_scale, v, c, s),
                ActivationFormat::Mxfp4 { rule } => mxfp4_blocks(isa, x, rule, v, c, s),
                ActivationFormat::FpQuant { method, global_scale } => {
                    fp_quant_blocks(isa, x, method, global_scale, v, c, s);
                }
                // `Family::Integer` is given to these formats only.
                _ => {}
            }
        }
    });
    if let ActivationFormat::Nvfp4 { global_scale } | ActivationFormat::FpQuant { global_scale, .. } = activation {
        out.global *= global_scale;
    }
    out
}

fn float<'a>(isa: Isa, threads: &Threads, x: Cow<'a, [f32]>, w: &PackedLinear) -> Input<'a> {
    let (k, m) = (w.k, x.len() / w.k);
    let k_padded = k.next_multiple_of(K_STEP);
    let mut out = FloatInput::default();
    // The 4-bit formats are the integer family's.
    let plain = matches!(
        w.activation,
        ActivationFormat::Float
            | ActivationFormat::Nvfp4 { .. }
            | ActivationFormat::Mxfp4 { .. }
            | ActivationFormat::FpQuant { .. }
    );
    if plain && k == k_padded {
        out.values = x;
        return Input::Float(out);
    }
    let mut values = vec![0.0; m * k_padded];
    // Scales that each row has: one of its own, or one of each block.
    let (block, per_row) = match w.activation {
        ActivationFormat::Fp8Token => (0, 1),
        ActivationFormat::Fp8Group => (fp8::BLOCK, k.div_ceil(fp8::BLOCK)),
        ActivationFormat::Mxfp8 { .. } => (mx::BLOCK, k.div_ceil(mx::BLOCK)),
        _ => (0, 0),
    };
    let mut scales = vec![0.0; m * per_row];
    let mut of_rows = scales.chunks_mut(per_row.max(1));
    let mut rows: Vec<_> = (x.chunks(k).zip(values.chunks_mut(k_padded)))
        .map(|(x, v)| (x, v, of_rows.next().unwrap_or_default()))
        .collect();
    threads.pieces(&mut rows, task_tokens(k), |_, rows| {
        for (x, v, scales) in rows {
            match w.activation {
                ActivationFormat::Fp8Static { scale } => fp8_static(isa, x, scale, v),
                ActivationFormat::Fp8Token => scales.iter_mut().for_each(|s| fp8_dynamic(isa, x, v, s)),
                ActivationFormat::Fp8Group => {
                    let groups = x.chunks(fp8::BLOCK).zip(v.chunks_mut(fp8::BLOCK));
                    groups.zip(scales.iter_mut()).for_each(|((x, v), s)| fp8_dynamic(isa, x, v, s));
                }
                ActivationFormat::Mxfp8 { rule } => mxfp8_blocks(isa, x, rule, v, scales),
                ActivationFormat::Float
                | ActivationFormat::Nvfp4 { .. }
                | ActivationFormat::Mxfp4 { .. }
                | ActivationFormat::FpQuant { .. } => v[..k].copy_from_slice(x),
            }
        }
    });
    out.block = block;
    match w.activation {
        ActivationFormat::Fp8Static { scale } => out.rows = vec![scale; m],
        ActivationFormat::Fp8Token => out.rows = scales,
        _ => out.scales = scales,
    }
    out.values = values.into();
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
    fn fp_quant_blocks(x: &[f32], method: Method, global_scale: f32, values: &mut [i8], corrections: &mut [i32], scales: &mut [f32]) {
        let blocks = x.as_chunks::<{ mx::BLOCK }>().0.iter().zip(values.as_chunks_mut::<{ mx::BLOCK }>().0);
        for ((x, v), (c, s)) in blocks.zip(corrections.iter_mut().zip(scales)) {
            *s = fp_quant::quantize_block(x, method, global_scale, v);
            *c = correction(v);
        }
    }
}

multiversion! {
    fn rotate(row: &mut [f32], rotation: &InputRotation) {
        rotation.apply(row);
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
