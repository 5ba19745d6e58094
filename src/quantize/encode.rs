//! A weight as a canonical linear, computed as each exporting tool does: same operations, same order, same rounding.
//!
//! What differs between tools is theirs ([`Tool`]), how codes are made of scales the formats'; both are held to the tools'
//! files bit for bit by tests.

use std::borrow::Cow;

use half::bf16;
use rayon::prelude::*;
use safetensors::Dtype;

use super::QuantizeError;
use super::recipe::ScaleChoice;
use crate::checkpoint::Checkpoint;
use crate::checkpoint::dialect::Tool;
use crate::formats::e8m0::{self, ScaleRule};
use crate::formats::linear::{ActivationFormat, BlockScales, Element, LinearTensors, OutputScale};
use crate::formats::scheme::{InputFormat, Scheme, WeightFormat};
use crate::formats::{amax, e2m1, e4m3, fp8, mx, nvfp4, scalable};
use crate::model::modules::Module;

/// Largest magnitudes that a module's scales come from.
#[derive(Clone, Copy, Debug)]
pub(super) struct Peaks {
    /// Of the weight and of those that deploying engines fuse it with.
    pub fused: f32,
    /// Of the input; 0 where no scale of it is stored.
    pub input: f32,
}

/// The weight in f32, row-major.
pub(super) fn floats(checkpoint: &Checkpoint, m: &Module) -> Result<Vec<f32>, QuantizeError> {
    if checkpoint.is_fused(&m.name) {
        let linear = checkpoint.linear(&m.name, m.role)?;
        return match linear.element.is_float() {
            true => Ok(linear.decode()),
            false => Err(QuantizeError::Module {
                module: m.name.clone(),
                detail: format!("is stored as {:?} already; quantize the BF16 model instead", linear.element),
            }),
        };
    }
    let view = checkpoint.tensors.require(&format!("{}.weight", m.name), "it is to be quantized")?;
    if !matches!(view.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) {
        return Err(QuantizeError::Module {
            module: m.name.clone(),
            detail: format!("is stored as {} already; quantize the BF16 model instead", view.dtype),
        });
    }
    view.expect_shape(&[m.role.n, m.role.k])?;
    Ok(view.floats()?)
}

/// Refuses a weight whose K the scheme's block does not divide.
pub(super) fn check_block(m: &Module, scheme: Scheme) -> Result<(), QuantizeError> {
    match scheme.block().filter(|b| !m.role.k.is_multiple_of(*b)) {
        None => Ok(()),
        Some(block) => Err(QuantizeError::Module {
            module: m.name.clone(),
            detail: format!(
                "has K = {} input features, no multiple of {scheme}'s block of {block}; exclude it or use fp8",
                m.role.k
            ),
        }),
    }
}

/// Largest magnitude of a module's weight.
///
/// # Errors
/// When the weight is missing, quantized already, not finite, or K is no multiple of the scheme's block.
pub(super) fn weight_amax(checkpoint: &Checkpoint, m: &Module, scheme: Scheme) -> Result<f32, QuantizeError> {
    let fail = |detail: String| QuantizeError::Module { module: m.name.clone(), detail };
    check_block(m, scheme)?;
    let w = floats(checkpoint, m)?;
    if let Some(i) = w.par_iter().position_any(|v| !v.is_finite()) {
        return Err(fail(format!("row {}, column {} of its weight is {}", i / m.role.k, i % m.role.k, w[i])));
    }
    Ok(w.par_chunks(1 << 16).map(amax).reduce(|| 0.0, f32::max))
}

/// Whether modules that engines fuse share their weights' scale.
pub(super) fn shares_scale(m: &Module, scheme: Scheme, tool: &dyn Tool) -> bool {
    tool.shares_scale(scheme, m.expert.is_some(), m.role.n <= fp8::BLOCK && m.role.k <= fp8::BLOCK)
}

/// Global scale (a multiplier) of NVFP4 weights up to `amax`, after the rounding of what `tool` stores.
pub(super) fn nvfp4_multiplier(tool: &dyn Tool, amax: f32) -> f32 {
    tool.multiplier(tool.nvfp4_global(amax, e4m3::MAX))
}

/// Global scale, as it is stored, of four-bit weights up to `amax` under E4M3 block scales.
fn four_bit_global(scheme: Scheme, tool: &dyn Tool, amax: f32) -> f32 {
    match scheme {
        // No NVFP4: the largest block scale is reached by a value of 1.
        Scheme::W4a8Nvfp4Fp8 => scalable(amax) / e4m3::MAX,
        _ => tool.nvfp4_global(amax, e4m3::MAX),
    }
}

/// The same as a multiplier.
pub(super) fn four_bit_multiplier(scheme: Scheme, tool: &dyn Tool, amax: f32) -> f32 {
    tool.multiplier(four_bit_global(scheme, tool, amax))
}

/// The quantized weight; its bias, which stays as it is, is not part of it.
///
/// # Errors
/// As [`weight_amax`].
pub(super) fn encode(
    checkpoint: &Checkpoint,
    m: &Module,
    scheme: Scheme,
    tool: &dyn Tool,
    choice: ScaleChoice,
    peaks: Peaks,
) -> Result<LinearTensors<'static>, QuantizeError> {
    let w = floats(checkpoint, m)?;
    let (n, k) = (m.role.n, m.role.k);
    let e8m0 = |codes| BlockScales::E8m0 { block: mx::BLOCK, codes: Cow::Owned(codes) };
    let (element, data, block_scales, output_scale) = match scheme.weight() {
        None => {
            let detail = "is to be quantized to nothing".into();
            return Err(QuantizeError::Module { module: m.name.clone(), detail });
        }
        Some(WeightFormat::Nvfp4 { block }) => {
            let global = match choice {
                ScaleChoice::FourOverSix if scheme.is_nvfp4_weight() => {
                    tool.nvfp4_global(peaks.fused, FOUR_OVER_SIX_MAX)
                }
                _ => four_bit_global(scheme, tool, peaks.fused),
            };
            let multiplier = tool.multiplier(global);
            let scale = |values: &[f32]| match choice {
                ScaleChoice::Mse => least_squares_scale(values, multiplier),
                ScaleChoice::FourOverSix if scheme.is_nvfp4_weight() => {
                    four_over_six_scale(values, scalable(peaks.fused), multiplier)
                }
                _ => tool.nvfp4_block_scale(amax(values), global),
            };
            let (data, codes) = nvfp4::encode_weight(&w, k, block, scale, |s| tool.step(s, global));
            let scales = BlockScales::E4m3 { block, codes: Cow::Owned(codes) };
            (Element::E2m1, data, scales, OutputScale::Tensor(multiplier))
        }
        Some(WeightFormat::Mxfp4) => {
            let scale = |values: &[f32]| match choice {
                ScaleChoice::Mse => least_squares_power(values),
                _ => mx::fp4_scale(values, tool.mx_rule()),
            };
            let (data, codes) = mx::encode_fp4_weight(&w, scale, |x| tool.mxfp4_element(x));
            (Element::E2m1, data, e8m0(codes), OutputScale::One)
        }
        Some(WeightFormat::Mxfp8) => {
            let (data, codes) = mx::encode_fp8_weight(&w, tool.mx_rule());
            (Element::E4m3, data, e8m0(codes), OutputScale::One)
        }
        Some(WeightFormat::Fp8) => {
            let block = match scheme {
                Scheme::Fp8PcPt => [1, k],
                Scheme::Fp8Block => [fp8::BLOCK, fp8::BLOCK],
                _ => [n, k],
            };
            let mut largest = fp8::block_peaks(&w, k, block);
            if let [only] = &mut largest[..] {
                *only = peaks.fused;
            }
            let scales: Vec<f32> = largest.iter().map(|p| tool.round(scalable(*p) / e4m3::MAX)).collect();
            // Under one scale both tools divide in BF16.
            let one = matches!(scheme, Scheme::Fp8 | Scheme::W8a16Fp8);
            let round = |q: f32| if one { bf16::from_f32(q).to_f32() } else { tool.round(q) };
            let data = fp8::encode_weight(&w, k, block, &scales, round);
            let (blocks, output) = match scheme {
                Scheme::Fp8PcPt => (BlockScales::None, OutputScale::Row(scales)),
                Scheme::Fp8Block => (BlockScales::Grid { values: scales }, OutputScale::One),
                _ => (BlockScales::None, OutputScale::Tensor(scales[0])),
            };
            (Element::E4m3, data, blocks, output)
        }
    };
    Ok(LinearTensors {
        name: m.name.clone(),
        n,
        k,
        element,
        data: Cow::Owned(data),
        block_scales,
        output_scale,
        activation: activation(scheme, tool, peaks.input),
        pre_quant_scale: None,
        rotation: None,
        bias: None,
    })
}

/// The input's quantization as the exported checkpoint will state it; `amax` is the input's largest magnitude.
pub(super) fn activation(scheme: Scheme, tool: &dyn Tool, amax: f32) -> ActivationFormat {
    let input = tool.input(scheme);
    let scale = match input {
        InputFormat::Nvfp4 => nvfp4_multiplier(tool, amax),
        _ => tool.round(scalable(amax) / e4m3::MAX),
    };
    input.with(scale, tool.mx_rule())
}

/// Quantizes and dequantizes weights [.., k] in place by their largest values, for judging: `amax` is that of all weights
/// that share a scale. FP8 in 128x128 blocks is taken per row.
pub(super) fn fake_quantize(w: &mut [f32], k: usize, scheme: Scheme, amax_shared: f32) {
    let fp8 =
        |w: &mut [f32], scale: f32| w.iter_mut().for_each(|w| *w = e4m3::decode(e4m3::encode(*w / scale)) * scale);
    let fp4 =
        |w: &mut [f32], scale: f32| w.iter_mut().for_each(|w| *w = e2m1::decode(e2m1::encode(*w / scale)) * scale);
    let rule = ScaleRule::Ceil;
    w.par_chunks_mut(k).for_each(|row| match scheme.weight() {
        None => {}
        Some(WeightFormat::Nvfp4 { block }) => {
            let peak = scalable(amax_shared);
            let global = if scheme == Scheme::W4a8Nvfp4Fp8 { peak / e4m3::MAX } else { nvfp4::global_scale(peak) };
            for block in row.chunks_mut(block) {
                let scale = e4m3::decode(nvfp4::weight_block_scale(amax(block), global)) * global;
                fp4(block, scale);
            }
        }
        Some(WeightFormat::Fp8) => {
            let one = matches!(scheme, Scheme::Fp8 | Scheme::W8a16Fp8);
            let peak = if one { amax_shared } else { amax(row) };
            fp8(row, scalable(peak) / e4m3::MAX);
        }
        Some(WeightFormat::Mxfp8) => row.chunks_mut(mx::BLOCK).for_each(|b| {
            let scale = e8m0::decode(mx::fp8_scale(b, rule));
            fp8(b, scale);
        }),
        Some(WeightFormat::Mxfp4) => row.chunks_mut(mx::BLOCK).for_each(|b| {
            let scale = e8m0::decode(mx::fp4_scale(b, rule));
            fp4(b, scale);
        }),
    });
}

/// What global scales are normalised by instead of 448, so that 3/2 of the largest block scale is still a code.
const FOUR_OVER_SIX_MAX: f32 = 256.0;

/// Squared error of a block rounded under an E4M3 scale code.
fn squared_error(block: &[f32], code: u8, global: f32) -> f64 {
    squared_error_under(block, e4m3::decode(code) * global)
}

/// The E8M0 code of the scale with the least squared error; the larger of equals. No other than the smallest under which
/// nothing saturates, and those below it, can be it: a larger one's values are among the smaller one's.
fn least_squares_power(block: &[f32]) -> u8 {
    let whole = mx::fp4_scale(block, ScaleRule::Ceil);
    let error = |code: u8| squared_error_under(block, e8m0::decode(code));
    let mut best = (whole, error(whole));
    for code in (0..whole).rev() {
        // Saturation alone errs by as much: all below err more.
        let over = amax(block) - e2m1::MAX * e8m0::decode(code);
        if f64::from(over * over) > best.1 {
            break;
        }
        let found = error(code);
        if found < best.1 {
            best = (code, found);
        }
    }
    best.0
}

fn squared_error_under(block: &[f32], scale: f32) -> f64 {
    let error = |w: &f32| w - e2m1::decode(e2m1::encode(w / scale)) * scale;
    block.iter().map(error).map(|e| f64::from(e * e)).sum()
}

/// The code for a largest value of 6, or of 4 where that errs less; `largest` is the largest value under `global`.
fn four_over_six_scale(block: &[f32], largest: f32, global: f32) -> u8 {
    // In ModelOpt's order of operations.
    let code = |peak: f32| {
        let scale = if peak == 0.0 { 1.0 } else { peak / e2m1::MAX };
        e4m3::encode((scale * FOUR_OVER_SIX_MAX / (largest / e2m1::MAX)).clamp(e4m3::MIN_POSITIVE, e4m3::MAX))
    };
    let peak = amax(block);
    let (six, four) = (code(peak), code(peak * 1.5));
    if squared_error(block, four, global) < squared_error(block, six, global) { four } else { six }
}

/// The E4M3 code of the block scale with the least squared error; the smallest of equals, as ModelOpt's sweep over all 126
/// codes finds it.
///
/// Only codes near the one for the block's largest value need to be tried. With p that value and s a scale (global one
/// included), error(s) is at least (p - 6s)² where 6s < p, as nothing above 6s can be represented, and at least the error of
/// nothing below. The search goes from the code for p/6 down until (p - 6s)² alone exceeds the best error, and up to the
/// code for 4p, from which on every value rounds to zero (|x|/s ≤ 1/4) and the error no longer changes.
pub(super) fn least_squares_scale(block: &[f32], global: f32) -> u8 {
    let peak = amax(block);
    if peak == 0.0 {
        return 1;
    }
    let error = |code: u8| squared_error(block, code, global);
    const LAST: u8 = 0x7e;
    let clamp = |s: f32| e4m3::encode(s.clamp(e4m3::MIN_POSITIVE, e4m3::MAX));
    let start = clamp(peak / (e2m1::MAX * global));
    let mut best = (start, error(start));
    for code in (1..start).rev() {
        let lost = peak - e2m1::MAX * e4m3::decode(code) * global;
        // A little above, for the rounding of the sums.
        if lost > 0.0 && f64::from(lost * lost) > best.1 * 1.000_1 {
            break;
        }
        let e = error(code);
        if e <= best.1 {
            best = (code, e);
        }
    }
    for code in start + 1..=clamp(4.0 * peak / global).min(LAST) {
        let e = error(code);
        if e < best.1 {
            best = (code, e);
        }
    }
    best.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_pruned_search_finds_what_the_whole_sweep_finds(
            block in prop::array::uniform16(prop_oneof![-1.0f32..1.0, -0.01f32..0.01, Just(0.0f32)]), exponent in -12i32..0
        ) {
            let global = nvfp4::global_scale((exponent as f32).exp2() * 1.37);
            let error = |code: u8| squared_error(&block, code, global);
            let sweep = (1..=0x7eu8).map(error).fold(f64::INFINITY, f64::min);
            prop_assume!(block.iter().any(|w| *w != 0.0));
            prop_assert_eq!(error(least_squares_scale(&block, global)), sweep);
        }
    }
}
