//! Codes and scales of one weight, as each exporting tool computes them: same operations, same order, same rounding.
//!
//! Read off nvidia-modelopt 0.47 and compressed-tensors 0.20 and held to their files bit for bit by tests.

use half::bf16;
use rayon::prelude::*;
use safetensors::Dtype;

use super::{QuantizeError, Recipe};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::dialect::Dialect;
use crate::formats::{amax, e2m1, e4m3, nvfp4};
use crate::model::modules::Module;

/// Codes of one weight, row-major, and its block scales (empty for FP8).
pub(super) struct Encoded {
    pub codes: Vec<u8>,
    pub block_scales: Vec<u8>,
}

/// Rounds to BF16 and back: the exporting tools compute some steps in the model's dtype.
fn round_bf16(x: f32) -> f32 {
    bf16::from_f32(x).to_f32()
}

/// Largest magnitude of a module's weight.
///
/// # Errors
/// When the weight is missing, quantized already, not finite, or K is no multiple of the recipe's block.
pub(super) fn weight_amax(checkpoint: &Checkpoint, m: &Module, recipe: Recipe) -> Result<f32, QuantizeError> {
    let fail = |detail: String| QuantizeError::Module { module: m.name.clone(), detail };
    if recipe == Recipe::Nvfp4 && !m.role.k.is_multiple_of(nvfp4::BLOCK) {
        return Err(fail(format!(
            "has K = {} input features, no multiple of NVFP4's block of {}; exclude it or use fp8",
            m.role.k,
            nvfp4::BLOCK
        )));
    }
    let w = floats(checkpoint, m)?;
    if let Some(i) = w.par_iter().position_any(|v| !v.is_finite()) {
        return Err(fail(format!("row {}, column {} of its weight is {}", i / m.role.k, i % m.role.k, w[i])));
    }
    Ok(w.par_chunks(1 << 16).map(amax).reduce(|| 0.0, f32::max))
}

/// The weight in f32, row-major.
fn floats(checkpoint: &Checkpoint, m: &Module) -> Result<Vec<f32>, QuantizeError> {
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

/// Global or tensor scale for largest magnitude `amax`, in the convention the dialect stores.
pub(super) fn tensor_scale(recipe: Recipe, dialect: Dialect, amax: f32) -> f32 {
    match (recipe, dialect) {
        // A divisor, computed in BF16.
        (Recipe::Nvfp4, Dialect::CompressedTensors) => round_bf16(round_bf16(1.0 / amax) * nvfp4::RANGE),
        (Recipe::Nvfp4, _) => nvfp4::global_scale(amax),
        (Recipe::Fp8, Dialect::CompressedTensors) => round_bf16(amax / e4m3::MAX),
        (Recipe::Fp8, _) => amax / e4m3::MAX,
    }
}

/// Encodes a module's weight under `scale`, the value of [`tensor_scale`].
///
/// # Errors
/// As [`weight_amax`].
pub(super) fn weight(
    checkpoint: &Checkpoint,
    m: &Module,
    recipe: Recipe,
    dialect: Dialect,
    scale: f32,
) -> Result<Encoded, QuantizeError> {
    let w = floats(checkpoint, m)?;
    let k = m.role.k;
    match recipe {
        Recipe::Fp8 => {
            // Both tools divide in BF16.
            let codes = w.par_iter().map(|&w| e4m3::encode(round_bf16(w / scale))).collect();
            Ok(Encoded { codes, block_scales: Vec::new() })
        }
        Recipe::Nvfp4 => {
            let blocks = k / nvfp4::BLOCK;
            let mut codes = vec![0u8; w.len() / 2];
            let mut block_scales = vec![0u8; m.role.n * blocks];
            let rows = codes.par_chunks_mut(k / 2).zip(block_scales.par_chunks_mut(blocks)).zip(w.par_chunks(k));
            rows.for_each(|((codes, scales), row)| {
                let blocks = row.as_chunks::<{ nvfp4::BLOCK }>().0.iter();
                for ((block, codes), s) in blocks.zip(codes.as_chunks_mut::<8>().0).zip(scales) {
                    let divisor = match dialect {
                        Dialect::CompressedTensors => {
                            *s = compressed_tensors_block_scale(amax(block), scale);
                            e4m3::decode(*s) / scale
                        }
                        _ => {
                            *s = nvfp4::weight_block_scale(amax(block), scale);
                            e4m3::decode(*s) * scale
                        }
                    };
                    for (byte, pair) in codes.iter_mut().zip(block.as_chunks::<2>().0) {
                        *byte = e2m1::pack(e2m1::encode(pair[0] / divisor), e2m1::encode(pair[1] / divisor));
                    }
                }
            });
            Ok(Encoded { codes, block_scales })
        }
    }
}

/// E4M3 code of a block's scale as compressed-tensors computes it; `global` is its divisor. A zero becomes 1/8.
fn compressed_tensors_block_scale(block_amax: f32, global: f32) -> u8 {
    let code = e4m3::encode(global * round_bf16(block_amax / e2m1::MAX));
    if code == 0 { e4m3::encode(0.125) } else { code }
}
