//! Experts that are stored as one tensor for a layer: one expert's projection of it as a linear of its own, and back.
//!
//! gpt-oss's `P.experts.gate_up_proj` has the rows of gate and up in turns, gate first. With E experts, inner width I, hidden H:
//! OpenAI's MXFP4 is row-major, `gate_up_proj_blocks` [E, 2I, H/32, 16], `gate_up_proj_scales` [E, 2I, H/32]; floats
//! (transformers) and ModelOpt's NVFP4 have the outputs last, `gate_up_proj` [E, H, 2I], or [E, H/2, 2I] with two codes of
//! neighbours in H to a byte, `gate_up_proj_weight_scale` [E, H/16, 2I]. `down_proj` is alike.
//!
//! Every other architecture's (transformers 5; Qwen3.5's releases) are floats and row-major, `gate_up_proj` [E, 2I, H] with all
//! rows of gate before those of up, `down_proj` [E, H, I]. Quantized they are stored one by one, as the tools do it.

use std::borrow::Cow;

use safetensors::Dtype;
use serde_json::Value;

use super::Checkpoint;
use super::dialect::Declared;
use super::dialect::store::Content;
use super::error::{CheckpointError, Result};
use super::json::{self, Object};
use super::resolve::{LinearRole, cross_check, expect_e4m3_scales, expect_e8m0_scales, scalar_scale};
use super::tensors::TensorView;
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
    /// Which of the projections that share the tensor it is, and how many there are.
    pub(super) part: usize,
    pub(super) parts: usize,
    pub(super) order: Order,
}

/// How projections share a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// A row of each in turns (gpt-oss).
    Turns,
    /// One after the other.
    Blocks,
}

impl Order {
    /// Of the model that `config` says.
    fn of(config: &Object) -> Self {
        let by_type = config.get("model_type").and_then(Value::as_str) == Some("gpt_oss");
        let names = config.get("architectures").and_then(Value::as_array);
        let by_class = names.into_iter().flatten().filter_map(Value::as_str).any(|name| name.starts_with("GptOss"));
        if by_type || by_class { Self::Turns } else { Self::Blocks }
    }
}

impl Fused {
    /// Of `model.layers.0.mlp.experts.3.gate_proj`, where it is stored so.
    pub(super) fn find(c: &Checkpoint, module: &str) -> Option<Self> {
        let found = Self { order: Order::of(&c.config), ..Self::named(module)? };
        (c.tensors.contains(&found.name("")) || c.tensors.contains(&found.name("_blocks"))).then_some(found)
    }

    /// Of `model.layers.0.mlp.experts.3.gate_proj`, were it stored as gpt-oss's are.
    #[must_use]
    pub fn named(module: &str) -> Option<Self> {
        let (rest, projection) = module.rsplit_once('.')?;
        let (experts, expert) = rest.rsplit_once('.').filter(|(e, _)| e.ends_with(".experts"))?;
        let (name, part, parts) = match projection {
            "gate_proj" => ("gate_up_proj", 0, 2),
            "up_proj" => ("gate_up_proj", 1, 2),
            "down_proj" => ("down_proj", 0, 1),
            _ => return None,
        };
        Some(Self { stem: format!("{experts}.{name}"), expert: expert.parse().ok()?, part, parts, order: Order::Turns })
    }

    /// Whether what is written of it lies in one tensor with the other experts too.
    #[must_use]
    pub fn stays(&self) -> bool {
        self.order == Order::Turns
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
                self.expect_shape(c, &view, &[n * self.parts, k / mx::BLOCK, BLOCK_BYTES])?;
                if view.dtype != Dtype::U8 {
                    return Err(view.wrong_dtype("U8 (two E2M1 codes a byte)"));
                }
                self.agree(&view, module, declared, "MXFP4", |w| w == WeightFormat::Mxfp4)?;
                (Element::E2m1, self.rows(view.bytes, n, k / 2), self.mxfp4(c, role, declared)?)
            }
            false if self.order == Order::Blocks => self.floats(c, module, role, declared)?,
            false => self.transposed(c, module, role, declared)?,
        };
        let bias = match role.bias {
            true => {
                let view = self.require(c, "_bias")?;
                self.expect_shape(c, &view, &[n * self.parts])?;
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

    /// Floats, row-major.
    #[allow(clippy::type_complexity)]
    fn floats<'a>(
        &self,
        c: &'a Checkpoint,
        module: &str,
        role: LinearRole,
        declared: Option<Declared>,
    ) -> Result<(Element, Cow<'a, [u8]>, (BlockScales<'a>, OutputScale, ActivationFormat))> {
        let LinearRole { n, k, .. } = role;
        let view = self.require(c, "")?;
        let element = match view.dtype {
            Dtype::F32 => Element::F32,
            Dtype::F16 => Element::F16,
            Dtype::BF16 => Element::Bf16,
            _ => return Err(view.wrong_dtype("F32, F16 or BF16 (quantized experts are stored one by one)")),
        };
        self.expect_shape(c, &view, &[n * self.parts, k])?;
        let length = element.row_bytes(k);
        let bytes = &view.bytes[self.row(0, n) * length..][..n * length];
        // The whole once more for the element's position.
        TensorView { bytes, ..view }.expect_finite().or_else(|_| view.expect_finite())?;
        cross_check(&view, module, element, declared, role.may_be_plain)?;
        Ok((element, Cow::Borrowed(bytes), (BlockScales::None, OutputScale::One, ActivationFormat::Float)))
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
        self.expect_shape(c, &view, &[units, n * self.parts])?;
        let own = units * n * self.parts * size;
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
        self.expect_shape(c, &view, &[n * self.parts, k / mx::BLOCK])?;
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
        self.expect_shape(c, &view, &[k / block, n * self.parts])?;
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
        match self.order {
            Order::Turns => (self.expert * n + row) * self.parts + self.part,
            Order::Blocks => (self.expert * self.parts + self.part) * n + row,
        }
    }

    /// Its `n` rows of `length` bytes out of [E, n · step, length].
    fn rows<'a>(&self, bytes: &'a [u8], n: usize, length: usize) -> Cow<'a, [u8]> {
        if self.parts == 1 {
            return Cow::Borrowed(&bytes[self.row(0, n) * length..][..n * length]);
        }
        let mut out = Vec::with_capacity(n * length);
        (0..n).for_each(|row| out.extend_from_slice(&bytes[self.row(row, n) * length..][..length]));
        out.into()
    }

    /// Its `n` columns of `units` of `size` bytes out of [E, units, n · step], each as a row.
    fn columns(&self, bytes: &[u8], n: usize, units: usize, size: usize) -> Vec<u8> {
        /// Units that are read side by side, so that what is read stays in the first cache and what is written is a run.
        const TILE: usize = 64;
        let (width, mut out) = (n * self.parts, vec![0; n * units * size]);
        let own = &bytes[self.expert * units * width * size..][..units * width * size];
        for tile in (0..units).step_by(TILE) {
            for row in 0..n {
                let column = row * self.parts + self.part;
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
    order: Order,
    count: usize,
    /// Rows of a linear in it.
    n: usize,
    /// Bytes of an element.
    size: usize,
}

impl<'a> FusedTensor<'a> {
    /// `name`, if it is one whose values training may change.
    #[must_use]
    pub fn of(c: &Checkpoint, name: &'a str) -> Option<Self> {
        let (parent, own) = name.rsplit_once('.')?;
        let projection = ["gate_up_proj", "down_proj"].into_iter().find(|p| own.starts_with(p))?;
        let order = Order::of(&c.config);
        let (content, transposed) = match &own[projection.len()..] {
            "_blocks" => (Content::Elements, false),
            "_scales" => (Content::Scales, false),
            "" => (Content::Elements, order == Order::Turns),
            "_weight_scale" => (Content::Scales, true),
            _ => return None,
        };
        let view = c.tensors.peek(name).filter(|_| parent.ends_with(".experts"))?;
        let count = view.shape.first().copied()?;
        let all = *view.shape.get(if transposed { 2 } else { 1 })?;
        let n = if projection == "down_proj" { all } else { all / 2 };
        let size = view.dtype.bitsize() / 8;
        Some(Self { experts: parent, projection, content, transposed, order, count, n, size })
    }

    /// Its bytes, those of every linear of which `own` gives some in their places; row-major, as [`Fused::linear`] gives them.
    pub fn with(&self, bytes: &[u8], own: &dyn Fn(&str, Content) -> Option<Vec<u8>>) -> Vec<u8> {
        let mut out = bytes.to_vec();
        let parts: &[&str] = if self.projection == "down_proj" { &["down_proj"] } else { &["gate_proj", "up_proj"] };
        for expert in 0..self.count {
            for (part, projection) in parts.iter().enumerate() {
                let module = format!("{}.{expert}.{projection}", self.experts);
                let Some(values) = own(&module, self.content) else { continue };
                let place = Fused { stem: String::new(), expert, part, parts: parts.len(), order: self.order };
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
            let (units, width) = (length / size, n * self.parts);
            for (unit, element) in own.chunks_exact(size).enumerate() {
                let at = (self.expert * units + unit) * width + row * self.parts + self.part;
                bytes[at * size..][..size].copy_from_slice(element);
            }
        }
    }
}
