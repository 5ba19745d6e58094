//! Resolves one module of a checkpoint to its tensors: the stored dtype and shape decide what it is, the configuration
//! is cross-checked against them, and every dialect's scales become positive finite multipliers.

use std::borrow::Cow;

use safetensors::Dtype;

use super::Checkpoint;
use super::dialect::kv::{self, KvScales};
use super::dialect::store::{INPUT_SCALE, WEIGHT, element_names};
use super::dialect::{Conventions, Declared, Dialect};
use super::error::{CheckpointError, Result};
use super::fused::Fused;
use super::rotation;
use super::tensors::TensorView;
use crate::formats::linear::{ActivationFormat, BlockScales, Element, LinearTensors, OutputScale};
use crate::formats::scheme::{InputFormat, WeightFormat};
use crate::formats::{e4m3, e8m0, fp8, mx};

/// What the model knows of a linear before it looks into the file.
#[derive(Clone, Copy, Debug)]
pub struct LinearRole {
    /// Output features.
    pub n: usize,
    /// Input features.
    pub k: usize,
    /// Whether the architecture gives it a bias.
    pub bias: bool,
    /// Routers and heads: deployed unquantized by every engine, whether or not the configuration remembers to say so.
    pub may_be_plain: bool,
}

impl Checkpoint {
    /// A float tensor of the given shape, in f32 (norm weights and the like).
    ///
    /// # Errors
    /// When it is missing, or of another dtype or shape, or holds a NaN.
    pub fn floats(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let view = self.tensors.require(name, "the model needs it")?;
        view.expect_shape(shape)?;
        view.expect_finite()?;
        view.floats()
    }

    /// Whether tensors of linear `module` are stored, packed or plain.
    #[must_use]
    pub fn has_linear(&self, module: &str) -> bool {
        element_names().any(|name| self.tensors.contains(&format!("{module}.{name}"))) || self.is_fused(module)
    }

    /// Whether linear `module` is an expert that is stored in one tensor with the others of its layer.
    #[must_use]
    pub fn is_fused(&self, module: &str) -> bool {
        self.fused(module).is_some()
    }

    /// Whether what is written of linear `module` lies in one tensor with the other experts of its layer too.
    #[must_use]
    pub fn stays_fused(&self, module: &str) -> bool {
        self.fused(module).is_some_and(|place| place.stays())
    }

    /// Where linear `module` lies in the tensors that it is stored in with the other experts of its layer.
    #[must_use]
    pub fn fused(&self, module: &str) -> Option<Fused> {
        Fused::find(self, module)
    }

    /// The tensor that holds the weight of linear `module`, unquantized.
    #[must_use]
    pub fn weight_name(&self, module: &str) -> String {
        self.fused(module).map_or_else(|| format!("{module}.{WEIGHT}"), |fused| fused.stem().to_owned())
    }

    /// The linear `module`.
    ///
    /// # Errors
    /// Names the tensor that is missing, of the wrong dtype, shape or packing, or holds a bad scale; and the module
    /// where the configuration announces something else than is stored.
    pub fn linear(&self, module: &str, role: LinearRole) -> Result<LinearTensors<'_>> {
        match Fused::find(self, module) {
            Some(place) => place.linear(self, module, role),
            None => Resolver { checkpoint: self, module, role }.resolve(),
        }
    }

    /// KV-cache scales of attention module `module` (`model.layers.0.self_attn`); `None` where the cache is not FP8.
    ///
    /// # Errors
    /// When the configuration announces an FP8 cache and a scale is bad, or missing while others are stored. With none
    /// stored at all each is 1: what ModelOpt's `kv_fp8_cast` means by that, and what engines take.
    pub fn kv_scales(&self, module: &str) -> Result<Option<KvScales>> {
        if !self.announced.fp8_kv_cache {
            return Ok(None);
        }
        if self.unit_kv_scales {
            return Ok(Some(KvScales { k: 1.0, v: 1.0 }));
        }
        let one = |which: char| {
            let names = kv::names(module, which);
            let name = names.iter().find(|n| self.tensors.contains(n)).unwrap_or(&names[0]);
            let view = self
                .tensors
                .require(name, "the configuration announces an FP8 KV cache, and other scales of it are stored")?;
            scalar_scale(&view)
        };
        Ok(Some(KvScales { k: one('k')?, v: one('v')? }))
    }
}

struct Resolver<'a, 'm> {
    checkpoint: &'a Checkpoint,
    module: &'m str,
    role: LinearRole,
}

impl<'a> Resolver<'a, '_> {
    fn resolve(&self) -> Result<LinearTensors<'a>> {
        let LinearRole { n, k, .. } = self.role;
        let declared = self.checkpoint.announced.declared(self.module)?;
        let name = element_names().find(|name| self.peek(name).is_some()).unwrap_or(WEIGHT);
        let weight = self.require(name, "it is the weight of a linear layer")?;
        let element = match weight.dtype {
            Dtype::F32 => Element::F32,
            Dtype::F16 => Element::F16,
            Dtype::BF16 => Element::Bf16,
            Dtype::F8_E4M3 => Element::E4m3,
            Dtype::U8 => Element::E2m1,
            _ => return Err(weight.wrong_dtype("F32, F16, BF16, F8_E4M3, or U8 with two E2M1 codes a byte")),
        };
        if element == Element::E2m1 && k % 2 != 0 {
            return Err(weight.wrong_shape(format!("an even number of input features; the model has K = {k}")));
        }
        let columns = if element == Element::E2m1 { k / 2 } else { k };
        if weight.shape != [n, columns] {
            let packing = if element == Element::E2m1 { "[N, K/2], two codes a byte," } else { "[N, K]" };
            return Err(weight.wrong_shape(format!("[{n}, {columns}] ({packing} as config.json has N = {n}, K = {k})")));
        }
        let may_be_plain = self.role.may_be_plain || self.conventions().leaves_plain();
        cross_check(&weight, self.module, element, declared, may_be_plain)?;
        let (block_scales, output_scale, activation) = match declared {
            Some(d) if matches!(element, Element::E2m1 | Element::E4m3) => self.quantized(&weight, d)?,
            _ => (BlockScales::None, OutputScale::One, ActivationFormat::Float),
        };
        weight.expect_finite()?;
        if element == Element::E4m3
            && let Some(i) = weight.bytes.iter().position(|b| b & 0x7f == e4m3::NAN)
        {
            return Err(weight.bad_value(format!("row {}, column {} is a NaN code (0x7f or 0xff)", i / k, i % k)));
        }
        let pre_quant_scale = match self.take("pre_quant_scale") {
            None => None,
            Some(view) => {
                view.expect_shape(&[k])?;
                Some(scale_values(&view)?)
            }
        };
        let rotation = match self.checkpoint.announced.rotated {
            Some(group) if !element.is_float() => {
                Some(rotation::read(&self.checkpoint.tensors, self.module, k, group)?)
            }
            _ => None,
        };
        let bias = match self.take("bias") {
            Some(view) if self.role.bias => {
                view.expect_shape(&[n])?;
                view.expect_finite()?;
                Some(view.floats()?)
            }
            Some(view) => {
                return Err(view.bad_value("is a bias, which this architecture's configuration does not have here"));
            }
            None if self.role.bias => {
                self.require("bias", "the architecture's configuration has a bias here")?;
                None
            }
            None => None,
        };
        Ok(LinearTensors {
            name: self.module.into(),
            n,
            k,
            element,
            data: Cow::Borrowed(weight.bytes),
            block_scales,
            output_scale,
            activation,
            pre_quant_scale,
            rotation,
            bias,
        })
    }

    fn quantized(
        &self,
        weight: &TensorView<'a>,
        declared: Declared,
    ) -> Result<(BlockScales<'a>, OutputScale, ActivationFormat)> {
        let layout = self.conventions().layout();
        let (block_scales, output_scale) = match declared.weight {
            WeightFormat::Nvfp4 { block } => {
                let codes = self.e4m3_blocks(block, weight)?;
                (BlockScales::E4m3 { block, codes }, OutputScale::Tensor(self.global(layout.global)?))
            }
            WeightFormat::Mxfp4 | WeightFormat::Mxfp8 => {
                let scale = if layout.mx_global && declared.weight == WeightFormat::Mxfp4 {
                    OutputScale::Tensor(self.global(layout.global)?)
                } else {
                    OutputScale::One
                };
                (BlockScales::E8m0 { block: mx::BLOCK, codes: self.e8m0_blocks()? }, scale)
            }
            WeightFormat::Fp8 => self.fp8_scales()?,
        };
        let input = self.stored_input(declared);
        let scale = match input {
            InputFormat::Nvfp4 | InputFormat::FpQuant(_) => self.global(layout.input)?,
            InputFormat::Fp8Static => self.one(INPUT_SCALE)?.1,
            _ => 1.0,
        };
        // Left behind where a module was made weight-only after calibration; it is not used.
        if input == InputFormat::Float && matches!(declared.weight, WeightFormat::Nvfp4 { .. }) && !layout.divisors {
            self.peek(INPUT_SCALE).map(|_| self.one(INPUT_SCALE)).transpose()?;
        }
        Ok((block_scales, output_scale, input.with(scale, self.conventions().mx_rule())))
    }

    /// What is announced for the input; ModelOpt says FP8 of heads that it stores without a scale of the input, and means
    /// weights only by that.
    fn stored_input(&self, declared: Declared) -> InputFormat {
        let weight_only = declared.input == InputFormat::Fp8Static
            && self.role.may_be_plain
            && self.checkpoint.announced.dialect == Dialect::ModelOpt
            && self.peek(INPUT_SCALE).is_none();
        if weight_only { InputFormat::Float } else { declared.input }
    }

    /// E4M3 block scales [N, K/block]: no NaN, no negative, and zero only over a block whose codes are all zero.
    fn e4m3_blocks(&self, block: usize, weight: &TensorView<'_>) -> Result<Cow<'a, [u8]>> {
        let dtype = self.conventions().layout().e4m3_scales;
        let dtype_name = if dtype == Dtype::U8 { "U8 (E4M3)" } else { "F8_E4M3" };
        let view = self.block_scale_tensor(dtype, dtype_name, block)?;
        expect_e4m3_scales(&view, view.bytes, weight.bytes, [block, self.role.k / block], "")?;
        Ok(Cow::Borrowed(view.bytes))
    }

    fn e8m0_blocks(&self) -> Result<Cow<'a, [u8]>> {
        let view = self.block_scale_tensor(Dtype::U8, "U8 (E8M0)", mx::BLOCK)?;
        expect_e8m0_scales(&view, view.bytes, self.role.k / mx::BLOCK, "")?;
        Ok(Cow::Borrowed(view.bytes))
    }

    fn block_scale_tensor(&self, dtype: Dtype, dtype_name: &str, block: usize) -> Result<TensorView<'a>> {
        let view = self.require(self.conventions().layout().scales, "it holds the block scales of the weight")?;
        let e8m0 = block == mx::BLOCK && dtype == Dtype::U8 && view.dtype == Dtype::F8_E8M0;
        if view.dtype != dtype && !e8m0 {
            return Err(view.wrong_dtype(dtype_name));
        }
        if !self.role.k.is_multiple_of(block) {
            return Err(view
                .wrong_shape(format!("blocks of {block} along K, but K = {} is no multiple of {block}", self.role.k)));
        }
        let expected = [self.role.n, self.role.k / block];
        if view.shape != expected {
            return Err(view.wrong_shape(format!("{expected:?} ([N, K/{block}], row-major, not swizzled)")));
        }
        Ok(view)
    }

    /// FP8 weight scales in any of the shapes that the tools write.
    fn fp8_scales(&self) -> Result<(BlockScales<'a>, OutputScale)> {
        let layout = self.conventions().layout();
        let view = self.require(layout.scales, "it holds the scale of the FP8 weight")?;
        let LinearRole { n, k, .. } = self.role;
        let (rows, columns) = (n.div_ceil(fp8::BLOCK), k.div_ceil(fp8::BLOCK));
        let values = self.fp8_scale_values(&view)?;
        let grid = |values| (BlockScales::Grid { values }, OutputScale::One);
        match *view.shape {
            [] | [1] if !layout.only_grids => Ok((BlockScales::None, OutputScale::Tensor(values[0]))),
            [r, c] if (r, c) == (rows, columns) && layout.only_grids => Ok(grid(values)),
            [r, 1, c, 1] if (r, c) == (rows, columns) => Ok(grid(values)),
            [r] | [r, 1] if r == n => Ok((BlockScales::None, OutputScale::Row(values))),
            [r, c] if (r, c) == (rows, columns) => Ok(grid(values)),
            _ => Err(view.wrong_shape(format!("[] or [1] (per tensor), [{n}] or [{n}, 1] (per channel), or [{rows}, {columns}] or [{rows}, 1, {columns}, 1] (128x128 blocks)"))),
        }
    }

    /// In f32; E8M0 exponents, and the check that scales are powers of two where the configuration says so.
    fn fp8_scale_values(&self, view: &TensorView<'_>) -> Result<Vec<f32>> {
        let powers = self.checkpoint.announced.power_of_two_scales;
        if view.dtype == Dtype::F8_E8M0 || (view.dtype == Dtype::U8 && powers) {
            return match view.bytes.iter().position(|&b| b == e8m0::NAN) {
                Some(i) => Err(view.bad_value(format!("element {i} is NaN (0xff)"))),
                None => Ok(view.bytes.iter().map(|&b| e8m0::decode(b)).collect()),
            };
        }
        let values = scale_values(view)?;
        match values.iter().position(|v| powers && v.to_bits() & 0x007f_ffff != 0) {
            None => Ok(values),
            Some(i) => Err(view.bad_value(format!(
                "element {i} is {}, no power of two, but the configuration says that scales are (`scale_fmt` ue8m0); one \
                 of the two is of another export",
                values[i]
            ))),
        }
    }

    /// The tensor of one scale, and its value.
    fn one(&self, suffix: &str) -> Result<(TensorView<'a>, f32)> {
        let view = self.require(suffix, "the configuration's format needs this scale, and none is ever assumed")?;
        let scale = scalar_scale(&view)?;
        Ok((view, scale))
    }

    /// A global scale as a multiplier.
    fn global(&self, suffix: &str) -> Result<f32> {
        let (view, stored) = self.one(suffix)?;
        if !self.conventions().layout().divisors {
            return Ok(stored);
        }
        let inverse = 1.0 / stored;
        if inverse.is_normal() { Ok(inverse) } else { Err(view.bad_value("is so large that its reciprocal vanishes")) }
    }

    fn conventions(&self) -> &'static dyn Conventions {
        self.checkpoint.announced.dialect.conventions()
    }

    fn tensor_name(&self, suffix: &str) -> String {
        format!("{}.{suffix}", self.module)
    }

    fn peek(&self, suffix: &str) -> Option<TensorView<'a>> {
        self.checkpoint.tensors.peek(&self.tensor_name(suffix))
    }

    fn take(&self, suffix: &str) -> Option<TensorView<'a>> {
        self.checkpoint.tensors.take(&self.tensor_name(suffix))
    }

    fn require(&self, suffix: &str, why: &str) -> Result<TensorView<'a>> {
        self.checkpoint.tensors.require(&self.tensor_name(suffix), why)
    }
}

/// The configuration and the stored weight must tell the same story.
pub(super) fn cross_check(
    weight: &TensorView<'_>,
    module: &str,
    element: Element,
    declared: Option<Declared>,
    may_be_plain: bool,
) -> Result<()> {
    let stored_quantized = !element.is_float();
    let expected = match declared {
        None if stored_quantized => "the configuration leaves this module unquantized".to_owned(),
        None => return Ok(()),
        Some(_) if !stored_quantized && may_be_plain => return Ok(()),
        Some(d) if d.weight.element() == element => return Ok(()),
        Some(d) => format!("the configuration announces {}", d.weight),
    };
    Err(CheckpointError::Conflict {
        file: weight.file.into(),
        module: module.into(),
        detail: format!(
            "{expected}, but `{}` is stored as {} {:?}; mend the configuration's excludes or the export",
            weight.name, weight.dtype, weight.shape
        ),
    })
}

/// Refuses E4M3 block scales, `per_row` to a row, that are NaN, negative, or zero over a block of `elements` (two E2M1
/// codes a byte) that is not. `place` is said before the row.
pub(super) fn expect_e4m3_scales(
    view: &TensorView<'_>,
    codes: &[u8],
    elements: &[u8],
    [block, per_row]: [usize; 2],
    place: &str,
) -> Result<()> {
    for (i, &code) in codes.iter().enumerate() {
        let elements = &elements[i * block / 2..(i + 1) * block / 2];
        let zero_block = || elements.iter().all(|b| b & 0x77 == 0);
        let problem = match code {
            c if c & 0x7f == e4m3::NAN => "is NaN",
            0 | 0x80 if !zero_block() => "is zero, but its block is not: the scale underflowed or is missing",
            c if c & 0x80 != 0 && c != 0x80 => "is negative",
            _ => continue,
        };
        let (row, block) = (i / per_row, i % per_row);
        return Err(view.bad_value(format!("{place}the scale of row {row}, block {block} {problem}")));
    }
    Ok(())
}

/// Refuses E8M0 block scales, `per_row` to a row, that are NaN.
pub(super) fn expect_e8m0_scales(view: &TensorView<'_>, codes: &[u8], per_row: usize, place: &str) -> Result<()> {
    match codes.iter().position(|&b| b == e8m0::NAN) {
        None => Ok(()),
        Some(i) => {
            let (row, block) = (i / per_row, i % per_row);
            Err(view.bad_value(format!("{place}the scale of row {row}, block {block} is NaN (0xff)")))
        }
    }
}

/// One scale, stored as [] or [1].
pub(super) fn scalar_scale(view: &TensorView<'_>) -> Result<f32> {
    if !matches!(*view.shape, [] | [1]) {
        return Err(view.wrong_shape("[] or [1] (one scale)"));
    }
    Ok(scale_values(view)?[0])
}

/// Scales in f32, each positive and finite.
fn scale_values(view: &TensorView<'_>) -> Result<Vec<f32>> {
    let values = view.floats()?;
    if values.is_empty() {
        return Err(view.wrong_shape("at least one scale"));
    }
    match values.iter().position(|v| !(v.is_finite() && *v > 0.0)) {
        None => Ok(values),
        Some(i) => Err(view.bad_value(format!(
            "element {i} is {}; a scale is positive and finite (was it written before calibration?)",
            values[i]
        ))),
    }
}
