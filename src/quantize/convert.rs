//! A quantized checkpoint in the other dialect: the same codes and block scales under that dialect's names, with its
//! configuration. Nothing is rounded again.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use safetensors::Dtype;

use super::encode;
use super::recipe::KvCache;
use super::scheme::Scheme;
use super::{QuantizeError, export};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::dialect::Dialect;
use crate::checkpoint::resolve::is_kv_scale;
use crate::checkpoint::write::{FolderWriter, Pending, SHARD_BYTES, TensorSpec, metadata};
use crate::formats::linear::{ActivationFormat, BlockScales, Element, LinearTensors, OutputScale};
use crate::formats::{fp8, mx, nvfp4};
use crate::model::ModelConfig;
use crate::model::modules::Module;

/// What converting did.
#[derive(Clone, Debug, Default)]
pub struct Converted {
    /// Quantized linears.
    pub modules: usize,
    /// Global scales that no reciprocal equals: off by one part in 2^24 at most.
    pub inexact: usize,
    /// Where engines compute otherwise in the new dialect although every weight is the same.
    pub notes: BTreeSet<&'static str>,
}

/// Writes `checkpoint` to `out` in `dialect`, one tensor in memory at a time.
///
/// # Errors
/// When nothing is quantized, a module's format has no name in `dialect`, the checkpoint is faulty, or `out` cannot be
/// written.
pub fn convert(checkpoint: &Checkpoint, dialect: Dialect, out: &Path) -> Result<Converted, QuantizeError> {
    if !matches!(dialect, Dialect::ModelOpt | Dialect::CompressedTensors) {
        return Err(QuantizeError::Dialect(dialect));
    }
    let config = ModelConfig::read(&checkpoint.config)?.untied_where_stored(checkpoint)?;
    let modules = config.modules();
    let mut report = Converted::default();
    let mut assigned: Vec<(&Module, Scheme)> = Vec::new();
    let mut tensors: Vec<Pending<'_, QuantizeError>> = Vec::new();
    let mut owned = BTreeSet::new();
    for m in &modules {
        let linear = checkpoint.linear(&m.name, m.role)?;
        let fail = |detail: String| QuantizeError::Module { module: m.name.clone(), detail };
        let scheme = scheme_of(&linear).map_err(fail)?;
        if m.is_block_linear() {
            assigned.push((m, scheme));
        }
        if scheme == Scheme::None {
            continue;
        }
        if !m.is_block_linear() {
            return Err(fail("is quantized, which `convert` knows of the blocks' linears only".into()));
        }
        if !scheme.is_in(dialect) {
            return Err(fail(format!("is {scheme}, which the {dialect} dialect has no name for")));
        }
        if linear.pre_quant_scale.is_some() {
            return Err(fail(
                "has AWQ's scale on its input (pre_quant_scale), which the other dialect has no place for; convert to \
                 bf16 and quantize again"
                    .into(),
            ));
        }
        report.modules += 1;
        let stated = state(&linear, scheme, dialect, &mut report).into_iter();
        let spec = |(suffix, t): (&str, Stated)| TensorSpec {
            name: format!("{}.{suffix}", m.name),
            dtype: t.dtype,
            shape: t.shape,
        };
        tensors.push(Pending::together(stated.map(spec).collect(), move || {
            checkpoint.tensors.release_pages();
            let linear = checkpoint.linear(&m.name, m.role)?;
            let stated = state(&linear, scheme, dialect, &mut Converted::default());
            Ok(stated.into_iter().map(|(_, t)| t.bytes).collect())
        }));
        owned.extend(OWN.iter().map(|suffix| format!("{}.{suffix}", m.name)));
    }
    if report.modules == 0 {
        super::plain_cache(checkpoint)?;
        return Err(QuantizeError::Nothing(checkpoint.tensors.folder().into()));
    }
    let mut kv = BTreeMap::new();
    for layer in 0..config.layers {
        if let Some(scales) = checkpoint.kv_scales(&format!("model.layers.{layer}.self_attn"))? {
            kv.extend(super::calibrate::kv_names(layer).into_iter().zip([scales.k, scales.v]));
        }
    }
    let shape: &[usize] = if dialect == Dialect::CompressedTensors { &[1] } else { &[] };
    for (name, &scale) in &kv {
        tensors.push(Pending::new(name, Dtype::F32, shape, move || Ok(scale.to_le_bytes().to_vec())));
    }
    let others = checkpoint.tensors.names().filter(|name| !owned.contains(*name) && !is_kv_scale(name));
    tensors.extend(others.filter_map(|name| Pending::copy(&checkpoint.tensors, name)));
    let writer = FolderWriter::create(out)?;
    let from = [("recoup_converted_from", checkpoint.scheme.dialect.to_string())];
    writer.tensors(tensors, SHARD_BYTES, &metadata(from))?;
    let kv_cache = (!kv.is_empty()).then_some(KvCache::Fp8);
    export::write_configs(&writer, checkpoint, &config, &assigned, kv_cache, dialect)?;
    writer.copy_text_files(checkpoint.tensors.folder())?;
    writer.commit()?;
    Ok(report)
}

/// Suffixes of the tensors that a quantized linear is stored in, bias aside.
pub(super) const OWN: [&str; 9] = [
    "weight",
    "weight_packed",
    "weight_scale",
    "weight_scale_2",
    "weight_scale_inv",
    "weight_global_scale",
    "input_scale",
    "input_global_scale",
    "pre_quant_scale",
];

/// The scheme of a stored linear.
fn scheme_of(linear: &LinearTensors<'_>) -> Result<Scheme, String> {
    use ActivationFormat as A;
    Ok(match (linear.element, &linear.block_scales, &linear.output_scale, &linear.activation) {
        (e, ..) if e.is_float() => Scheme::None,
        (Element::E2m1, BlockScales::E4m3 { block: nvfp4::BLOCK, .. }, _, A::Nvfp4 { .. }) => Scheme::Nvfp4,
        (Element::E2m1, BlockScales::E4m3 { block: nvfp4::BLOCK, .. }, _, A::Float) => Scheme::W4a16Nvfp4,
        (Element::E2m1, BlockScales::E4m3 { block: mx::BLOCK, .. }, _, A::Fp8Static { .. }) => Scheme::W4a8Nvfp4Fp8,
        (Element::E2m1, BlockScales::E8m0 { .. }, _, A::Mxfp4 { .. }) => Scheme::Mxfp4,
        (Element::E2m1, BlockScales::E8m0 { .. }, _, A::Float) => Scheme::Mxfp4a16,
        (Element::E4m3, BlockScales::E8m0 { .. }, _, A::Mxfp8 { .. }) => Scheme::Mxfp8,
        (Element::E4m3, BlockScales::Grid { .. }, _, A::Float | A::Fp8Group) => Scheme::Fp8Block,
        // A matrix of one block may state its scale as one number.
        (Element::E4m3, BlockScales::None, OutputScale::Tensor(_), A::Float | A::Fp8Group)
            if linear.n <= fp8::BLOCK && linear.k <= fp8::BLOCK =>
        {
            Scheme::Fp8Block
        }
        (Element::E4m3, BlockScales::None, OutputScale::Tensor(_), A::Fp8Static { .. }) => Scheme::Fp8,
        (Element::E4m3, BlockScales::None, OutputScale::Row(_), A::Fp8Token) => Scheme::Fp8PcPt,
        (element, _, _, activation) => {
            return Err(format!(
                "holds {element:?} weights and {activation} inputs, a pair that `convert` does not know"
            ));
        }
    })
}

/// A tensor to be written.
struct Stated {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

/// The tensors of a linear in `dialect`, in the order in which they are written.
fn state(
    linear: &LinearTensors<'_>,
    scheme: Scheme,
    dialect: Dialect,
    report: &mut Converted,
) -> Vec<(&'static str, Stated)> {
    let compressed = dialect == Dialect::CompressedTensors;
    let (n, k) = (linear.n, linear.k);
    let mut global = |value: f32| {
        if !compressed {
            return value;
        }
        let (divisor, exact) = reciprocal(value);
        report.inexact += usize::from(!exact);
        divisor
    };
    let scales = match (&linear.block_scales, &linear.output_scale) {
        (BlockScales::Grid { values }, _) | (_, OutputScale::Row(values)) => values.clone(),
        (_, OutputScale::Tensor(scale)) => vec![*scale],
        _ => Vec::new(),
    };
    let input = match linear.activation {
        ActivationFormat::Nvfp4 { global_scale } => Some(global(global_scale)),
        ActivationFormat::Fp8Static { scale } => Some(scale),
        _ => None,
    };
    let parts = encode::parts_of(n, k, scheme, dialect).into_iter().map(|part| {
        let floats = |values: &[f32]| {
            // compressed-tensors keeps FP8 scales in BF16; one that BF16 cannot hold stays f32.
            let short = part.dtype == Dtype::BF16 && values.iter().all(|v| half::bf16::from_f32(*v).to_f32() == *v);
            let dtype = if short { Dtype::BF16 } else { Dtype::F32 };
            let bytes = values.iter().flat_map(|v| encode::scalar(*v, dtype)).collect();
            Stated { dtype, shape: part.shape.clone(), bytes }
        };
        let raw = |bytes: &[u8]| Stated { dtype: part.dtype, shape: part.shape.clone(), bytes: bytes.to_vec() };
        let stated = match (part.suffix, &linear.block_scales) {
            ("weight" | "weight_packed", _) => raw(&linear.data),
            ("weight_scale", BlockScales::E4m3 { codes, .. } | BlockScales::E8m0 { codes, .. }) => raw(codes),
            ("weight_scale", _) => floats(&scales),
            ("weight_scale_2" | "weight_global_scale", _) => floats(&[global(scales[0])]),
            _ => floats(&[input.unwrap_or(1.0)]),
        };
        (part.suffix, stated)
    });
    let parts: Vec<(&'static str, Stated)> = parts.collect();
    let own = match scheme {
        Scheme::Fp8Block if compressed => linear.activation == ActivationFormat::Fp8Group,
        Scheme::Fp8Block => linear.activation == ActivationFormat::Float,
        _ => true,
    };
    if !own {
        report.notes.insert(
            "FP8 in 128x128 blocks: engines leave inputs as they are in the modelopt dialect and quantize them per 128 in the other",
        );
    }
    let expected =
        if compressed { crate::formats::e8m0::ScaleRule::Even } else { crate::formats::e8m0::ScaleRule::Ceil };
    if let ActivationFormat::Mxfp4 { rule } | ActivationFormat::Mxfp8 { rule } = linear.activation
        && rule != expected
    {
        report.notes.insert("MX inputs: the dialects round the shared exponent differently when a model runs");
    }
    parts
}

/// The f32 whose reciprocal in f32 is `value`, and whether there is one. Of several the one with the shortest significand:
/// compressed-tensors rounds its divisors to BF16.
fn reciprocal(value: f32) -> (f32, bool) {
    let near = 1.0 / value;
    let candidates = (-2i32..=2).map(|d| f32::from_bits(near.to_bits().wrapping_add_signed(d)));
    let exact = candidates.filter(|d| 1.0 / d == value).max_by_key(|d| d.to_bits().trailing_zeros());
    exact.map_or((near, false), |d| (d, true))
}

#[cfg(test)]
mod tests {
    use super::reciprocal;

    #[test]
    fn reciprocals_come_back_where_they_can_and_are_an_ulp_off_at_most() {
        let mut exact = 0;
        for i in 1..2000u32 {
            let value = f32::from_bits(0x3900_0000 + i * 7919);
            let (divisor, found) = reciprocal(value);
            let back = 1.0 / divisor;
            assert!(!found || back == value);
            assert!(back.to_bits().abs_diff(value.to_bits()) <= 1);
            exact += u32::from(found);
        }
        assert!(exact > 1000, "{exact}");
        assert_eq!(reciprocal(0.25), (4.0, true));
    }
}
