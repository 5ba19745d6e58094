//! Experts that gpt-oss stores as one tensor for a layer: one expert's projection of it as a linear of its own, and back.
//!
//! `P.experts.gate_up_proj` has the rows of gate and up in turns, gate first. With E experts, inner width I, hidden H:
//! OpenAI's MXFP4 is row-major, `gate_up_proj_blocks` [E, 2I, H/32, 16], `gate_up_proj_scales` [E, 2I, H/32]; floats
//! (transformers) and ModelOpt's NVFP4 have the outputs last, `gate_up_proj` [E, H, 2I], or [E, H/2, 2I] with two codes of
//! neighbours in H to a byte, `gate_up_proj_weight_scale` [E, H/16, 2I]. `down_proj` is alike.

use std::borrow::Cow;

use safetensors::Dtype;

use super::Checkpoint;
use super::dialect::Declared;
use super::dialect::store::Content;
use super::error::{CheckpointError, Result};
use super::json;
use super::resolve::{LinearRole, cross_check, expect_e4m3_scales, expect_e8m0_scales, scalar_scale};
use super::tensors::{TensorStore, TensorView};
use crate::formats::linear::{ActivationFormat, BlockScales, Element, LinearTensors, OutputScale};
use crate::formats::mx;
use crate::formats::scheme::{InputFormat, WeightFormat};

/// Bytes of one block of OpenAI's: 32 codes.
const BLOCK_BYTES: usize = mx::BLOCK / 2;
/// Keys of a configuration that say how many experts there are.
const COUNTS: [&str; 3] = ["num_local_experts", "num_experts", "n_routed_experts"];

/// Where one expert's projection lies in the tensors of its layer.
pub struct Fused {
    /// What their names begin with: `model.layers.0.mlp.experts.gate_up_proj`.
    pub(super) stem: String,
    pub(super) expert: usize,
    /// Its first row, and how far they are apart.
    pub(super) first: usize,
    pub(super) step: usize,
}

impl Fused {
    /// Of `model.layers.0.mlp.experts.3.gate_proj`, where it is stored so.
    pub(super) fn find(tensors: &TensorStore, module: &str) -> Option<Self> {
        let found = Self::named(module)?;
        (tensors.contains(&found.name("")) || tensors.contains(&found.name("_blocks"))).then_some(found)
    }

    /// Of `model.layers.0.mlp.experts.3.gate_proj`, were it stored so.
    #[must_use]
    pub fn named(module: &str) -> Option<Self> {
        let (rest, projection) = module.rsplit_once('.')?;
        let (experts, expert) = rest.rsplit_once('.').filter(|(e, _)| e.ends_with(".experts"))?;
        let (name, first, step) = match projection {
            "gate_proj" => ("gate_up_proj", 0, 2),
            "up_proj" => ("gate_up_proj", 1, 2),
            "down_proj" => ("down_proj", 0, 1),
            _ => return None,
        };
        Some(Self { stem: format!("{experts}.{name}"), expert: expert.parse().ok()?, first, step })
    }

    pub(super) fn name(&self, suffix: &str) -> String {
        format!("{}{suffix}", self.stem)
    }

    /// The linear `module` that lies here.
    ///
    /// # Errors
    /// As [`Checkpoint::linear`].
    pub(super) fn linear<'a>(&self, c: &'a Checkpoint, module: &str, role: LinearRole) -> Result<LinearTensors<'a>> {
        let LinearRole { n, k, .. } = role;
        let declared = c.announced.declared(&self.stem)?;
        let blocks = self.name("_blocks");
        let (element, data, (block_scales, output_scale, activation)) = match c.tensors.contains(&blocks) {
            true => {
                let view = self.require(c, "_blocks")?;
                if !k.is_multiple_of(mx::BLOCK) {
                    return Err(view.wrong_shape(format!("blocks of 32 along K, but K = {k} is no multiple of 32")));
                }
                self.expect_shape(c, &view, &[n * self.step, k / mx::BLOCK, BLOCK_BYTES])?;
                if view.dtype != Dtype::U8 {
                    return Err(view.wrong_dtype("U8 (two E2M1 codes a byte)"));
                }
                self.agree(&view, module, declared, "MXFP4", |w| w == WeightFormat::Mxfp4)?;
                (Element::E2m1, self.rows(view.bytes, n, k / 2), self.mxfp4(c, role, declared)?)
            }
            false => self.transposed(c, module, role, declared)?,
        };
        let bias = match role.bias {
            true => {
                let view = self.require(c, "_bias")?;
                self.expect_shape(c, &view, &[n * self.step])?;
                view.expect_finite()?;
                let all = view.floats()?;
                Some((0..n).map(|row| all[self.row(row, n)]).collect())
            }
            false => None,
        };
        Ok(LinearTensors {
            name: module.into(),
            n,
            k,
            element,
            data,
            block_scales,
            output_scale,
            activation,
            pre_quant_scale: None,
            rotation: None,
            bias,
        })
    }

    /// Floats, or ModelOpt's NVFP4: the outputs are the last dimension.
    #[allow(clippy::type_complexity)]
    fn transposed<'a>(
        &self,
        c: &'a Checkpoint,
        module: &str,
        role: LinearRole,
        declared: Option<Declared>,
    ) -> Result<(Element, Cow<'a, [u8]>, (BlockScales<'a>, OutputScale, ActivationFormat))> {
        let LinearRole { n, k, .. } = role;
        let view = self.require(c, "")?;
        let (element, size, units) = match view.dtype {
            Dtype::F32 => (Element::F32, 4, k),
            Dtype::F16 => (Element::F16, 2, k),
            Dtype::BF16 => (Element::Bf16, 2, k),
            Dtype::U8 => (Element::E2m1, 1, k / 2),
            _ => return Err(view.wrong_dtype("F32, F16, BF16, or U8 with two E2M1 codes a byte")),
        };
        self.expect_shape(c, &view, &[units, n * self.step])?;
        let own = units * n * self.step * size;
        let expert = TensorView { bytes: &view.bytes[self.expert * own..][..own], ..view };
        // The whole once more for the element's position.
        expert.expect_finite().or_else(|_| view.expect_finite())?;
        let data = self.columns(view.bytes, n, units, size);
        let scales = match (element, declared) {
            (Element::E2m1, Some(d)) => {
                self.agree(&view, module, declared, "NVFP4", |w| matches!(w, WeightFormat::Nvfp4 { .. }))?;
                self.nvfp4(c, role, d, &data)?
            }
            _ => {
                cross_check(&view, module, element, declared, role.may_be_plain)?;
                (BlockScales::None, OutputScale::One, ActivationFormat::Float)
            }
        };
        Ok((element, Cow::Owned(data), scales))
    }

    fn mxfp4<'a>(
        &self,
        c: &'a Checkpoint,
        role: LinearRole,
        declared: Option<Declared>,
    ) -> Result<(BlockScales<'a>, OutputScale, ActivationFormat)> {
        let LinearRole { n, k, .. } = role;
        let view = self.require(c, "_scales")?;
        self.expect_shape(c, &view, &[n * self.step, k / mx::BLOCK])?;
        if !matches!(view.dtype, Dtype::U8 | Dtype::F8_E8M0) {
            return Err(view.wrong_dtype("U8 (E8M0)"));
        }
        let codes = self.rows(view.bytes, n, k / mx::BLOCK);
        expect_e8m0_scales(&view, &codes, k / mx::BLOCK, &self.place())?;
        let rule = c.announced.dialect.conventions().mx_rule();
        let activation = match declared.map_or(InputFormat::Float, |d| d.input) {
            input @ (InputFormat::Float | InputFormat::Mxfp4) => input.with(1.0, rule),
            _ => return Err(view.bad_value("belongs to inputs of another format than MXFP4's, which nobody writes")),
        };
        Ok((BlockScales::E8m0 { block: mx::BLOCK, codes }, OutputScale::One, activation))
    }

    fn nvfp4<'a>(
        &self,
        c: &'a Checkpoint,
        role: LinearRole,
        declared: Declared,
        data: &[u8],
    ) -> Result<(BlockScales<'a>, OutputScale, ActivationFormat)> {
        let LinearRole { n, k, .. } = role;
        let block = declared.weight.block().unwrap_or(k);
        let view = self.require(c, "_weight_scale")?;
        if view.dtype != Dtype::F8_E4M3 {
            return Err(view.wrong_dtype("F8_E4M3"));
        }
        if !k.is_multiple_of(block) {
            return Err(view.wrong_shape(format!("blocks of {block} along K, but K = {k} is no multiple of {block}")));
        }
        self.expect_shape(c, &view, &[k / block, n * self.step])?;
        let codes = self.columns(view.bytes, n, k / block, 1);
        expect_e4m3_scales(&view, &codes, data, [block, k / block], &self.place())?;
        let output_scale = scalar_scale(&self.require(c, "_weight_scale_2")?)?;
        let stored = |suffix| self.require(c, suffix).and_then(|view| scalar_scale(&view));
        let input = match declared.input {
            // Left behind where experts were made weight-only after calibration; it is not used.
            InputFormat::Float if !c.tensors.contains(&self.name("_input_scale")) => 1.0,
            _ => stored("_input_scale")?,
        };
        let activation = declared.input.with(input, c.announced.dialect.conventions().mx_rule());
        Ok((BlockScales::E4m3 { block, codes: Cow::Owned(codes) }, OutputScale::Tensor(output_scale), activation))
    }

    /// The configuration must announce what the layout means.
    fn agree(
        &self,
        view: &TensorView<'_>,
        module: &str,
        declared: Option<Declared>,
        stored: &str,
        is: impl Fn(WeightFormat) -> bool,
    ) -> Result<()> {
        if declared.is_some_and(|d| is(d.weight)) {
            return Ok(());
        }
        let said = declared.map_or_else(|| "leaves it unquantized".to_owned(), |d| format!("announces {}", d.weight));
        Err(CheckpointError::Conflict {
            file: view.file.into(),
            module: module.into(),
            detail: format!(
                "`{}` is laid out as {stored}, but the configuration {said}; mend the configuration's excludes or the export",
                view.name
            ),
        })
    }

    fn require<'a>(&self, c: &'a Checkpoint, suffix: &str) -> Result<TensorView<'a>> {
        c.tensors.require(&self.name(suffix), "the layer's experts are stored as one tensor, which needs it")
    }

    /// [E, then `rest`], with as many experts as the configuration has.
    fn expect_shape(&self, c: &Checkpoint, view: &TensorView<'_>, rest: &[usize]) -> Result<()> {
        let announced = COUNTS.iter().find_map(|key| c.config.get(key).and_then(json::whole));
        let fits = |e: &usize| self.expert < *e && announced.is_none_or(|a| a == *e as u64);
        match view.shape.split_first() {
            Some((experts, found)) if fits(experts) && found == rest => Ok(()),
            _ => {
                let experts = announced.unwrap_or(self.expert as u64 + 1);
                let rest: String = rest.iter().map(|d| format!(", {d}")).collect();
                Err(view.wrong_shape(format!("[{experts}{rest}] (the experts of a layer together)")))
            }
        }
    }

    fn place(&self) -> String {
        format!("expert {}: ", self.expert)
    }

    /// The stored row of row `row` of `n`.
    pub(super) fn row(&self, row: usize, n: usize) -> usize {
        (self.expert * n + row) * self.step + self.first
    }

    /// Its `n` rows of `length` bytes out of [E, n · step, length].
    fn rows<'a>(&self, bytes: &'a [u8], n: usize, length: usize) -> Cow<'a, [u8]> {
        if self.step == 1 {
            return Cow::Borrowed(&bytes[self.row(0, n) * length..][..n * length]);
        }
        (0..n).flat_map(|row| &bytes[self.row(row, n) * length..][..length]).copied().collect::<Vec<u8>>().into()
    }

    /// Its `n` columns of `units` of `size` bytes out of [E, units, n · step], each as a row.
    fn columns(&self, bytes: &[u8], n: usize, units: usize, size: usize) -> Vec<u8> {
        /// Units that are read side by side, so that what is read stays in the first cache and what is written is a run.
        const TILE: usize = 64;
        let (width, mut out) = (n * self.step, vec![0; n * units * size]);
        let own = &bytes[self.expert * units * width * size..][..units * width * size];
        for tile in (0..units).step_by(TILE) {
            for row in 0..n {
                let column = row * self.step + self.first;
                for unit in tile..(tile + TILE).min(units) {
                    let from = (unit * width + column) * size;
                    out[(row * units + unit) * size..][..size].copy_from_slice(&own[from..from + size]);
                }
            }
        }
        out
    }
}

/// A tensor that holds a part of a projection of all experts of a layer.
#[derive(Clone, Copy, Debug)]
pub struct FusedTensor<'a> {
    /// `model.layers.0.mlp.experts`.
    experts: &'a str,
    projection: &'static str,
    content: Content,
    /// Whether outputs are its last dimension.
    transposed: bool,
    count: usize,
    /// Rows of a linear in it.
    n: usize,
    /// Bytes of an element.
    size: usize,
}

impl<'a> FusedTensor<'a> {
    /// `name`, if it is one whose values training may change.
    #[must_use]
    pub fn of(tensors: &TensorStore, name: &'a str) -> Option<Self> {
        let (parent, own) = name.rsplit_once('.')?;
        let projection = ["gate_up_proj", "down_proj"].into_iter().find(|p| own.starts_with(p))?;
        let (content, transposed) = match &own[projection.len()..] {
            "_blocks" => (Content::Elements, false),
            "_scales" => (Content::Scales, false),
            "" => (Content::Elements, true),
            "_weight_scale" => (Content::Scales, true),
            _ => return None,
        };
        let view = tensors.peek(name).filter(|_| parent.ends_with(".experts"))?;
        let count = view.shape.first().copied()?;
        let all = *view.shape.get(if transposed { 2 } else { 1 })?;
        let n = if projection == "down_proj" { all } else { all / 2 };
        let size = view.dtype.bitsize() / 8;
        Some(Self { experts: parent, projection, content, transposed, count, n, size })
    }

    /// Its bytes, those of every linear of which `own` gives some in their places; row-major, as [`Fused::linear`] gives them.
    pub fn with(&self, bytes: &[u8], own: &dyn Fn(&str, Content) -> Option<Vec<u8>>) -> Vec<u8> {
        let mut out = bytes.to_vec();
        let parts: &[&str] = if self.projection == "down_proj" { &["down_proj"] } else { &["gate_proj", "up_proj"] };
        for expert in 0..self.count {
            for (first, part) in parts.iter().enumerate() {
                let module = format!("{}.{expert}.{part}", self.experts);
                let Some(values) = own(&module, self.content) else { continue };
                let place = Fused { stem: String::new(), expert, first, step: parts.len() };
                place.insert(&mut out, &values, self.n, self.transposed.then_some(self.size));
            }
        }
        out
    }
}

impl Fused {
    /// Puts `own` [n, length in bytes] where [`Self::rows`] takes it from, or [`Self::columns`] of elements of that size.
    fn insert(&self, bytes: &mut [u8], own: &[u8], n: usize, columns: Option<usize>) {
        let length = own.len() / n.max(1);
        for (row, own) in own.chunks_exact(length.max(1)).enumerate() {
            let Some(size) = columns else {
                bytes[self.row(row, n) * length..][..length].copy_from_slice(own);
                continue;
            };
            let (units, width) = (length / size, n * self.step);
            for (unit, element) in own.chunks_exact(size).enumerate() {
                let at = (self.expert * units + unit) * width + row * self.step + self.first;
                bytes[at * size..][..size].copy_from_slice(element);
            }
        }
    }
}
