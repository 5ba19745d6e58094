//! Codes and scales of one weight, as each exporting tool computes them: same operations, same order, same rounding.
//!
//! Read off nvidia-modelopt 0.47 and compressed-tensors 0.20 and held to their files bit for bit by tests.

use std::collections::BTreeMap;

use half::bf16;
use rayon::prelude::*;
use safetensors::Dtype;

use super::recipe::ScaleChoice;
use super::scheme::Scheme;
use super::{Prepared, QuantizeError};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::dialect::Dialect;
use crate::formats::e8m0::{self, ScaleRule};
use crate::formats::linear::ActivationFormat;
use crate::formats::{amax, e2m1, e4m3, fp8, mx, nvfp4};
use crate::model::modules::Module;

/// One tensor of a quantized module.
pub(super) struct Part {
    pub suffix: &'static str,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
}

/// Largest magnitudes that a module's scales come from.
#[derive(Clone, Copy, Debug)]
pub(super) struct Peaks {
    /// Of the weight and of those that deploying engines fuse it with.
    pub fused: f32,
    /// Of the input; 0 where no scale of it is stored.
    pub input: f32,
}

/// Rounds to BF16 and back: the exporting tools compute some steps in the model's dtype.
fn round_bf16(x: f32) -> f32 {
    bf16::from_f32(x).to_f32()
}

/// The weight in f32, row-major.
pub(super) fn floats(checkpoint: &Checkpoint, m: &Module) -> Result<Vec<f32>, QuantizeError> {
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

/// The tensors of a module, in the order in which they are written.
pub(super) fn parts(m: &Module, scheme: Scheme, dialect: Dialect) -> Vec<Part> {
    parts_of(m.role.n, m.role.k, scheme, dialect)
}

/// As [`parts`], for a weight [n, k].
pub(super) fn parts_of(n: usize, k: usize, scheme: Scheme, dialect: Dialect) -> Vec<Part> {
    let compressed = dialect == Dialect::CompressedTensors;
    let part = |suffix, dtype, shape: &[usize]| Part { suffix, dtype, shape: shape.to_vec() };
    let packed = if compressed { "weight_packed" } else { "weight" };
    // Stored scales: f32 scalars in ModelOpt's files, BF16 vectors in those of compressed-tensors.
    let scale_type = if compressed { Dtype::BF16 } else { Dtype::F32 };
    let one: &[usize] = if compressed { &[1] } else { &[] };
    match scheme {
        Scheme::None => Vec::new(),
        Scheme::Nvfp4 | Scheme::W4a16Nvfp4 | Scheme::W4a8Nvfp4Fp8 => {
            let block = scheme.block().unwrap_or(nvfp4::BLOCK);
            let (global, input) = if compressed {
                ("weight_global_scale", "input_global_scale")
            } else {
                ("weight_scale_2", "input_scale")
            };
            let mut parts = vec![
                part(packed, Dtype::U8, &[n, k / 2]),
                part("weight_scale", Dtype::F8_E4M3, &[n, k / block]),
                part(global, Dtype::F32, one),
            ];
            if scheme.has_input_scale() {
                parts.push(part(input, Dtype::F32, one));
            }
            parts
        }
        Scheme::Fp8 => vec![
            part("weight", Dtype::F8_E4M3, &[n, k]),
            part("weight_scale", scale_type, one),
            part("input_scale", scale_type, one),
        ],
        Scheme::Fp8PcPt => {
            let shape: &[usize] = if compressed { &[n, 1] } else { &[n] };
            vec![part("weight", Dtype::F8_E4M3, &[n, k]), part("weight_scale", scale_type, shape)]
        }
        Scheme::Fp8Block => {
            let (rows, columns) = (n.div_ceil(fp8::BLOCK), k.div_ceil(fp8::BLOCK));
            let shape = match (compressed, n <= fp8::BLOCK && k <= fp8::BLOCK) {
                (true, _) => vec![rows, columns],
                (false, true) => Vec::new(),
                (false, false) => vec![rows, 1, columns, 1],
            };
            vec![part("weight", Dtype::F8_E4M3, &[n, k]), Part { suffix: "weight_scale", dtype: scale_type, shape }]
        }
        Scheme::Mxfp8 => {
            vec![part("weight", Dtype::F8_E4M3, &[n, k]), part("weight_scale", Dtype::U8, &[n, k / mx::BLOCK])]
        }
        Scheme::Mxfp4 | Scheme::Mxfp4a16 => {
            vec![part(packed, Dtype::U8, &[n, k / 2]), part("weight_scale", Dtype::U8, &[n, k / mx::BLOCK])]
        }
    }
}

/// Whether a matrix is no larger than one FP8 block.
fn is_one_block(m: &Module) -> bool {
    m.role.n <= fp8::BLOCK && m.role.k <= fp8::BLOCK
}

/// Whether modules that engines fuse share their weights' scale.
///
/// FP8 engines keep one scale per projection; the experts' fused gate and up share theirs (ModelOpt).
pub(super) fn shares_scale(m: &Module, scheme: Scheme, dialect: Dialect) -> bool {
    match scheme {
        Scheme::Nvfp4 | Scheme::W4a16Nvfp4 | Scheme::W4a8Nvfp4Fp8 => true,
        Scheme::Fp8 => m.expert.is_some() && dialect == Dialect::ModelOpt,
        Scheme::Fp8Block => is_one_block(m) && dialect == Dialect::ModelOpt,
        _ => false,
    }
}

/// The least largest magnitude that a scale is computed from: below it, quotients and products with the smallest block
/// scale would leave f32's normal numbers, and a divisor (6·448 / amax, in BF16) its range. Smaller values become zeros.
pub(super) const LEAST: f32 = f32::from_bits((127 - 96) << 23);

/// What a scale of largest magnitude `amax` is computed from. An all-zero weight or input has no scale of its own and any
/// will do: 1, which every loader takes.
pub(super) fn some(amax: f32) -> f32 {
    if amax == 0.0 { 1.0 } else { amax.max(LEAST) }
}

/// Global scale (a multiplier) of NVFP4 weights, after `dialect`'s rounding of what it stores.
pub(super) fn nvfp4_multiplier(dialect: Dialect, amax: f32) -> f32 {
    match dialect {
        Dialect::CompressedTensors => 1.0 / nvfp4_divisor(amax),
        _ => nvfp4::global_scale(some(amax)),
    }
}

/// compressed-tensors' global scale: a divisor, computed in BF16.
fn nvfp4_divisor(amax: f32) -> f32 {
    round_bf16(round_bf16(1.0 / some(amax)) * nvfp4::RANGE)
}

pub(super) fn scalar(value: f32, dtype: Dtype) -> Vec<u8> {
    match dtype {
        Dtype::BF16 => bf16::from_f32(value).to_le_bytes().to_vec(),
        _ => value.to_le_bytes().to_vec(),
    }
}

/// The tensors of [`parts`] by suffix.
///
/// # Errors
/// As [`weight_amax`].
pub(super) fn encode(
    checkpoint: &Checkpoint,
    m: &Module,
    scheme: Scheme,
    dialect: Dialect,
    choice: ScaleChoice,
    peaks: Peaks,
) -> Result<BTreeMap<&'static str, Vec<u8>>, QuantizeError> {
    let w = floats(checkpoint, m)?;
    let (n, k) = (m.role.n, m.role.k);
    let compressed = dialect == Dialect::CompressedTensors;
    let packed = if compressed { "weight_packed" } else { "weight" };
    let scale_type = if compressed { Dtype::BF16 } else { Dtype::F32 };
    // compressed-tensors computes scales and quotients in the model's BF16.
    let rounded = |x: f32| if compressed { round_bf16(x) } else { x };
    let vector = |values: &[f32]| values.iter().flat_map(|v| scalar(*v, scale_type)).collect::<Vec<u8>>();
    Ok(match scheme {
        Scheme::None => BTreeMap::new(),
        Scheme::Nvfp4 | Scheme::W4a16Nvfp4 if compressed => {
            let room = if choice == ScaleChoice::FourOverSix { e4m3::MAX / FOUR_OVER_SIX_MAX } else { 1.0 };
            let global = nvfp4_divisor(peaks.fused * room);
            let code = |block: &[f32]| match choice {
                ScaleChoice::Max => compressed_tensors_block_scale(amax(block), global),
                ScaleChoice::Mse => least_squares_scale(block, 1.0 / global),
                ScaleChoice::FourOverSix => four_over_six_scale(block, some(peaks.fused), 1.0 / global),
            };
            let (codes, scales) = e2m1_blocks(&w, n, k, nvfp4::BLOCK, code, |s| e4m3::decode(s) / global);
            let mut out = BTreeMap::from([
                (packed, codes),
                ("weight_scale", scales),
                ("weight_global_scale", scalar(global, Dtype::F32)),
            ]);
            if scheme.has_input_scale() {
                out.insert("input_global_scale", scalar(nvfp4_divisor(peaks.input), Dtype::F32));
            }
            out
        }
        Scheme::Nvfp4 | Scheme::W4a16Nvfp4 => {
            let global = match choice {
                ScaleChoice::FourOverSix => some(peaks.fused) / (e2m1::MAX * FOUR_OVER_SIX_MAX),
                _ => nvfp4::global_scale(some(peaks.fused)),
            };
            let code = |block: &[f32]| match choice {
                ScaleChoice::Max => nvfp4::weight_block_scale(amax(block), global),
                ScaleChoice::Mse => least_squares_scale(block, global),
                ScaleChoice::FourOverSix => four_over_six_scale(block, some(peaks.fused), global),
            };
            let (codes, scales) = e2m1_blocks(&w, n, k, nvfp4::BLOCK, code, |s| e4m3::decode(s) * global);
            let mut out = BTreeMap::from([
                (packed, codes),
                ("weight_scale", scales),
                ("weight_scale_2", scalar(global, Dtype::F32)),
            ]);
            if scheme.has_input_scale() {
                out.insert("input_scale", scalar(nvfp4::global_scale(peaks.input), Dtype::F32));
            }
            out
        }
        Scheme::W4a8Nvfp4Fp8 => {
            let global = some(peaks.fused) / e4m3::MAX;
            let code = |block: &[f32]| nvfp4::weight_block_scale(amax(block), global);
            let (codes, scales) = e2m1_blocks(&w, n, k, mx::BLOCK, code, |s| e4m3::decode(s) * global);
            BTreeMap::from([
                ("weight", codes),
                ("weight_scale", scales),
                ("weight_scale_2", scalar(global, Dtype::F32)),
                ("input_scale", scalar(peaks.input / e4m3::MAX, Dtype::F32)),
            ])
        }
        Scheme::Fp8 => {
            let scale = rounded(some(peaks.fused) / e4m3::MAX);
            // Both tools divide in BF16.
            let codes = w.par_iter().map(|&w| e4m3::encode(round_bf16(w / scale))).collect();
            let input = peaks.input / e4m3::MAX;
            BTreeMap::from([
                ("weight", codes),
                ("weight_scale", scalar(scale, scale_type)),
                ("input_scale", scalar(input, scale_type)),
            ])
        }
        Scheme::Fp8PcPt => {
            let scales: Vec<f32> = w.chunks(k).map(|row| rounded(some(amax(row)) / e4m3::MAX)).collect();
            let mut codes = vec![0u8; w.len()];
            codes.par_chunks_mut(k).zip(w.par_chunks(k)).zip(&scales).for_each(|((codes, row), s)| {
                codes.iter_mut().zip(row).for_each(|(c, w)| *c = e4m3::encode(rounded(w / s)));
            });
            BTreeMap::from([("weight", codes), ("weight_scale", vector(&scales))])
        }
        Scheme::Fp8Block => {
            let columns = k.div_ceil(fp8::BLOCK);
            let mut peak = vec![0.0f32; n.div_ceil(fp8::BLOCK) * columns];
            for (r, row) in w.chunks(k).enumerate() {
                for (c, block) in row.chunks(fp8::BLOCK).enumerate() {
                    let p = &mut peak[r / fp8::BLOCK * columns + c];
                    *p = p.max(amax(block));
                }
            }
            if let ([only], false) = (&mut peak[..], compressed) {
                *only = peaks.fused;
            }
            let scales: Vec<f32> = peak.iter().map(|p| rounded(some(*p) / e4m3::MAX)).collect();
            let mut codes = vec![0u8; w.len()];
            codes.par_chunks_mut(k).zip(w.par_chunks(k)).enumerate().for_each(|(r, (codes, row))| {
                for (i, (c, w)) in codes.iter_mut().zip(row).enumerate() {
                    *c = e4m3::encode(rounded(w / scales[r / fp8::BLOCK * columns + i / fp8::BLOCK]));
                }
            });
            BTreeMap::from([("weight", codes), ("weight_scale", vector(&scales))])
        }
        Scheme::Mxfp8 => {
            let rule = mx_rule(dialect);
            let mut codes = vec![0u8; w.len()];
            let mut scales = vec![0u8; w.len() / mx::BLOCK];
            let blocks = codes.par_chunks_mut(mx::BLOCK).zip(&mut scales).zip(w.par_chunks(mx::BLOCK));
            blocks.for_each(|((codes, s), block)| {
                *s = mx::fp8_scale(block, rule);
                let scale = e8m0::decode(*s);
                codes.iter_mut().zip(block).for_each(|(c, w)| *c = e4m3::encode(w / scale));
            });
            BTreeMap::from([("weight", codes), ("weight_scale", scales)])
        }
        Scheme::Mxfp4 | Scheme::Mxfp4a16 => {
            let rule = mx_rule(dialect);
            let element = if compressed { e2m1::encode } else { modelopt_mxfp4 };
            let mut codes = vec![0u8; w.len() / 2];
            let mut scales = vec![0u8; w.len() / mx::BLOCK];
            let blocks = codes.par_chunks_mut(mx::BLOCK / 2).zip(&mut scales).zip(w.par_chunks(mx::BLOCK));
            blocks.for_each(|((codes, s), block)| {
                *s = mx::fp4_scale(block, rule);
                let scale = e8m0::decode(*s);
                for (byte, pair) in codes.iter_mut().zip(block.as_chunks::<2>().0) {
                    *byte = e2m1::pack(element(pair[0] / scale), element(pair[1] / scale));
                }
            });
            BTreeMap::from([(packed, codes), ("weight_scale", scales)])
        }
    })
}

/// The tensors of a weight that was rounded beforehand.
pub(super) fn prepared(
    p: &Prepared,
    scheme: Scheme,
    dialect: Dialect,
    peaks: Peaks,
) -> BTreeMap<&'static str, Vec<u8>> {
    let (codes, scales) = (p.codes.clone(), p.block_scales.clone());
    let compressed = dialect == Dialect::CompressedTensors;
    let mut out = if compressed {
        let global = scalar(1.0 / p.global_scale, Dtype::F32);
        BTreeMap::from([("weight_packed", codes), ("weight_scale", scales), ("weight_global_scale", global)])
    } else {
        let global = scalar(p.global_scale, Dtype::F32);
        BTreeMap::from([("weight", codes), ("weight_scale", scales), ("weight_scale_2", global)])
    };
    if scheme.has_input_scale() {
        let (suffix, value) = if compressed {
            ("input_global_scale", nvfp4_divisor(peaks.input))
        } else {
            ("input_scale", nvfp4::global_scale(peaks.input))
        };
        out.insert(suffix, scalar(value, Dtype::F32));
    }
    out
}

/// The input's quantization as the exported checkpoint will state it; `amax` is the input's largest magnitude.
pub(super) fn activation(scheme: Scheme, dialect: Dialect, amax: f32) -> ActivationFormat {
    let compressed = dialect == Dialect::CompressedTensors;
    match scheme {
        Scheme::Nvfp4 if compressed => ActivationFormat::Nvfp4 { global_scale: 1.0 / nvfp4_divisor(amax) },
        Scheme::Nvfp4 => ActivationFormat::Nvfp4 { global_scale: nvfp4::global_scale(some(amax)) },
        Scheme::Fp8 | Scheme::W4a8Nvfp4Fp8 => ActivationFormat::Fp8Static { scale: some(amax) / e4m3::MAX },
        Scheme::Fp8PcPt => ActivationFormat::Fp8Token,
        Scheme::Fp8Block if compressed => ActivationFormat::Fp8Group,
        Scheme::Mxfp8 => ActivationFormat::Mxfp8 { rule: mx_rule(dialect) },
        Scheme::Mxfp4 => ActivationFormat::Mxfp4 { rule: mx_rule(dialect) },
        Scheme::Fp8Block | Scheme::W4a16Nvfp4 | Scheme::Mxfp4a16 | Scheme::None => ActivationFormat::Float,
    }
}

/// Quantizes and dequantizes weights [.., k] in place by their largest values, for judging: `amax` is that of all weights
/// that share a scale. FP8 in 128x128 blocks is taken per row.
pub(super) fn fake_quantize(w: &mut [f32], k: usize, scheme: Scheme, amax_shared: f32) {
    let fp8 =
        |w: &mut [f32], scale: f32| w.iter_mut().for_each(|w| *w = e4m3::decode(e4m3::encode(*w / scale)) * scale);
    let fp4 =
        |w: &mut [f32], scale: f32| w.iter_mut().for_each(|w| *w = e2m1::decode(e2m1::encode(*w / scale)) * scale);
    let rule = ScaleRule::Ceil;
    w.par_chunks_mut(k).for_each(|row| match scheme {
        Scheme::None => {}
        Scheme::Nvfp4 | Scheme::W4a16Nvfp4 | Scheme::W4a8Nvfp4Fp8 => {
            let eight = scheme == Scheme::W4a8Nvfp4Fp8;
            let global = if eight { some(amax_shared) / e4m3::MAX } else { nvfp4::global_scale(some(amax_shared)) };
            for block in row.chunks_mut(scheme.block().unwrap_or(nvfp4::BLOCK)) {
                let scale = e4m3::decode(nvfp4::weight_block_scale(amax(block), global)) * global;
                fp4(block, scale);
            }
        }
        Scheme::Fp8 => fp8(row, some(amax_shared) / e4m3::MAX),
        Scheme::Fp8PcPt | Scheme::Fp8Block => {
            let scale = some(amax(row)) / e4m3::MAX;
            fp8(row, scale);
        }
        Scheme::Mxfp8 => row.chunks_mut(mx::BLOCK).for_each(|b| {
            let scale = e8m0::decode(mx::fp8_scale(b, rule));
            fp8(b, scale);
        }),
        Scheme::Mxfp4 | Scheme::Mxfp4a16 => row.chunks_mut(mx::BLOCK).for_each(|b| {
            let scale = e8m0::decode(mx::fp4_scale(b, rule));
            fp4(b, scale);
        }),
    });
}

fn mx_rule(dialect: Dialect) -> ScaleRule {
    if dialect == Dialect::CompressedTensors { ScaleRule::Even } else { ScaleRule::Ceil }
}

/// E2M1 codes and block scales of a weight whose blocks' scales `code` chooses and `divisor` decodes.
fn e2m1_blocks(
    w: &[f32],
    n: usize,
    k: usize,
    block: usize,
    code: impl Fn(&[f32]) -> u8 + Sync,
    divisor: impl Fn(u8) -> f32 + Sync,
) -> (Vec<u8>, Vec<u8>) {
    let mut codes = vec![0u8; w.len() / 2];
    let mut scales = vec![0u8; n * (k / block)];
    let rows = codes.par_chunks_mut(k / 2).zip(scales.par_chunks_mut(k / block)).zip(w.par_chunks(k));
    rows.for_each(|((codes, scales), row)| {
        for ((values, codes), s) in row.chunks(block).zip(codes.chunks_mut(block / 2)).zip(scales) {
            *s = code(values);
            let divisor = divisor(*s);
            for (byte, pair) in codes.iter_mut().zip(values.as_chunks::<2>().0) {
                *byte = e2m1::pack(e2m1::encode(pair[0] / divisor), e2m1::encode(pair[1] / divisor));
            }
        }
    });
    (codes, scales)
}

/// E4M3 code of a block's scale as compressed-tensors computes it; `global` is its divisor. A zero becomes 1/8.
fn compressed_tensors_block_scale(block_amax: f32, global: f32) -> u8 {
    let code = e4m3::encode(global * round_bf16(block_amax / e2m1::MAX));
    if code == 0 { e4m3::encode(0.125) } else { code }
}

/// MXFP4 elements as ModelOpt 0.47 writes them: ties go down, and 0 is written with the sign bit.
fn modelopt_mxfp4(x: f32) -> u8 {
    const BOUNDS: [f32; 7] = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0];
    let magnitude = BOUNDS.iter().filter(|b| x.abs() > **b).count() as u8;
    magnitude | if x > 0.0 { 0 } else { 8 }
}

/// What global scales are normalised by instead of 448, so that 3/2 of the largest block scale is still a code.
const FOUR_OVER_SIX_MAX: f32 = 256.0;

/// Squared error of a block rounded under an E4M3 scale code.
fn squared_error(block: &[f32], code: u8, global: f32) -> f64 {
    let scale = e4m3::decode(code) * global;
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

    #[test]
    fn modelopts_mxfp4_ties_go_down_and_zero_is_negative() {
        let codes = [0.0, -0.1, 0.1, 0.25, 0.75, 5.0, 5.1, -6.0].map(modelopt_mxfp4);
        assert_eq!(codes, [8, 8, 0, 0, 1, 6, 7, 15]);
    }
}
