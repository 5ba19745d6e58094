//! A canonical linear as the tensors of a dialect, and which tensor holds what.

use half::bf16;
use safetensors::Dtype;

use super::{Dialect, Layout, Tool};
use crate::checkpoint::write::TensorSpec;
use crate::formats::linear::{ActivationFormat, BlockScales, LinearTensors, OutputScale};
use crate::formats::mx;
use crate::formats::scheme::{InputFormat, Scheme, WeightFormat};

/// What of a quantized linear a tensor holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    Elements,
    /// Of blocks, rows or blocks of rows; of FP8 of the whole as well.
    Scales,
    /// The scale of the whole above those of blocks.
    Global,
    /// The input's calibrated scale.
    Input,
    /// What multiplies the input's channels (AWQ).
    Factors,
}

/// Of plain linears the same, and of quantized ones with elements of eight bits.
pub(in crate::checkpoint) const WEIGHT: &str = "weight";
/// A static FP8 scale of the input.
pub(in crate::checkpoint) const INPUT_SCALE: &str = "input_scale";

/// What the tensor of a linear's elements may be called, in whichever dialect; [`WEIGHT`] last.
pub(in crate::checkpoint) fn element_names() -> impl Iterator<Item = &'static str> {
    let packed = Dialect::ALL.iter().map(|d| d.conventions().layout().packed);
    packed.filter(|name| *name != WEIGHT).chain([WEIGHT])
}

/// What the tensor `suffix` of a quantized linear holds, in whichever dialect; nothing of a bias.
#[must_use]
pub fn content(suffix: &str) -> Option<Content> {
    let of = |layout: &Layout| match suffix {
        WEIGHT => Some(Content::Elements),
        INPUT_SCALE => Some(Content::Input),
        "pre_quant_scale" => Some(Content::Factors),
        s if s == layout.packed => Some(Content::Elements),
        s if s == layout.scales => Some(Content::Scales),
        s if s == layout.global => Some(Content::Global),
        s if s == layout.input => Some(Content::Input),
        _ => None,
    };
    Dialect::ALL.iter().find_map(|d| of(d.conventions().layout()))
}

/// One tensor of a quantized linear.
#[derive(Clone, Debug)]
pub struct Part {
    pub suffix: &'static str,
    pub content: Content,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
}

impl Part {
    /// As a tensor of `module`.
    #[must_use]
    pub fn of(self, module: &str) -> TensorSpec {
        TensorSpec { name: format!("{module}.{}", self.suffix), dtype: self.dtype, shape: self.shape }
    }
}

/// The tensors of a linear of `scheme` with a weight [n, k], in the order in which they are written.
pub fn parts(tool: &dyn Tool, scheme: Scheme, n: usize, k: usize) -> Vec<Part> {
    let layout = tool.layout();
    let part = |suffix, content, dtype, shape: &[usize]| Part { suffix, content, dtype, shape: shape.to_vec() };
    let packed = part(layout.packed, Content::Elements, Dtype::U8, &[n, k / 2]);
    let eight = part(WEIGHT, Content::Elements, Dtype::F8_E4M3, &[n, k]);
    let scales = |dtype, shape: &[usize]| part(layout.scales, Content::Scales, dtype, shape);
    let mut out = match scheme.weight() {
        None => return Vec::new(),
        Some(WeightFormat::Nvfp4 { block }) => {
            let global = part(layout.global, Content::Global, Dtype::F32, layout.one);
            vec![packed, scales(Dtype::F8_E4M3, &[n, k / block]), global]
        }
        Some(WeightFormat::Mxfp4) => vec![packed, scales(Dtype::U8, &[n, k / mx::BLOCK])],
        Some(WeightFormat::Mxfp8) => vec![eight, scales(Dtype::U8, &[n, k / mx::BLOCK])],
        Some(WeightFormat::Fp8) => vec![eight, scales(layout.fp8_scale, &tool.fp8_scale_shape(scheme, n, k))],
    };
    match tool.input(scheme) {
        InputFormat::Nvfp4 => out.push(part(layout.input, Content::Input, Dtype::F32, layout.one)),
        InputFormat::Fp8Static => out.push(part(INPUT_SCALE, Content::Input, layout.fp8_scale, layout.one)),
        _ => {}
    }
    out
}

/// A linear in a dialect.
pub struct Stored {
    /// With the bytes of each. An FP8 scale that the dialect's own type cannot hold is f32.
    pub parts: Vec<(Part, Vec<u8>)>,
    /// Global scales that no divisor gives exactly: off by one part in 2^24.
    pub inexact: usize,
}

/// The tensors of `linear`, which is of `scheme`. Its bias is a tensor of its own in every dialect.
pub fn store(tool: &dyn Tool, linear: &LinearTensors<'_>, scheme: Scheme) -> Stored {
    let mut inexact = 0;
    let mut global = |value: f32| {
        if !tool.layout().divisors {
            return value;
        }
        let (divisor, exact) = reciprocal(value);
        inexact += usize::from(!exact);
        divisor
    };
    let mut parts = parts(tool, scheme, linear.n, linear.k);
    let bytes: Vec<Vec<u8>> = parts
        .iter_mut()
        .map(|part| match (part.content, &linear.block_scales, &linear.output_scale) {
            (Content::Elements, ..) => linear.data.to_vec(),
            (Content::Scales, BlockScales::E4m3 { codes, .. } | BlockScales::E8m0 { codes, .. }, _) => codes.to_vec(),
            (Content::Scales, BlockScales::Grid { values }, _) | (Content::Scales, _, OutputScale::Row(values)) => {
                floats(part, values)
            }
            (Content::Scales, BlockScales::None, scale) => floats(part, &[scale.at(0)]),
            (Content::Global, _, scale) => floats(part, &[global(scale.at(0))]),
            (Content::Input | Content::Factors, ..) => match linear.activation {
                ActivationFormat::Nvfp4 { global_scale } => floats(part, &[global(global_scale)]),
                ActivationFormat::Fp8Static { scale } => floats(part, &[scale]),
                _ => floats(part, &[1.0]),
            },
        })
        .collect();
    Stored { parts: parts.into_iter().zip(bytes).collect(), inexact }
}

/// Values in the part's type; one that BF16 cannot hold makes it f32.
fn floats(part: &mut Part, values: &[f32]) -> Vec<u8> {
    if part.dtype == Dtype::BF16 && values.iter().all(|v| bf16::from_f32(*v).to_f32() == *v) {
        return values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect();
    }
    part.dtype = Dtype::F32;
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
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
    use super::*;

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

    #[test]
    fn a_divisor_that_bf16_holds_is_written_as_it_was_computed() {
        for bits in (0x0f00u32..0x7000).step_by(7) {
            let divisor = f32::from_bits(bits << 16);
            assert_eq!(reciprocal(1.0 / divisor), (divisor, true));
        }
    }

    #[test]
    fn what_each_dialects_tensors_hold_is_known_by_their_names() {
        for (suffix, holds) in [
            ("weight", Content::Elements),
            ("weight_packed", Content::Elements),
            ("weight_scale", Content::Scales),
            ("weight_scale_inv", Content::Scales),
            ("weight_scale_2", Content::Global),
            ("weight_global_scale", Content::Global),
            ("input_scale", Content::Input),
            ("input_global_scale", Content::Input),
            ("pre_quant_scale", Content::Factors),
        ] {
            assert_eq!(content(suffix), Some(holds), "{suffix}");
        }
        assert_eq!((content("bias"), content("k_scale")), (None, None));
    }
}
