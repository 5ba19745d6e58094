//! Products: inputs in the form that the kernels read, made once for all weights that read alike, and the launch.

use std::sync::Arc;

use super::driver::{Args, Memory};
use super::table::{SLICES, product_kernel};
use super::weight::{Kind, STEP};
use super::{CudaBackend, CudaLinear, CudaTensor, CudaVector};
use crate::backend::Result;
use crate::formats::e8m0::ScaleRule;
use crate::formats::fp_quant::Method;
use crate::formats::linear::{ActivationFormat, InputRotation};

/// An input in the form that products read: rows of K padded to [`STEP`], in BF16 or as codes.
#[derive(Debug)]
pub(super) struct Operand {
    /// Codes, and not BF16; those in blocks have rows of `scales` as kernels/operand.cu writes them.
    pub codes: bool,
    pub activation: ActivationFormat,
    pub pre_quant_scale: Option<Vec<f32>>,
    pub rotation: Option<Arc<InputRotation>>,
    pub x: Memory,
    /// Per row, per row and 128 columns, or of codes.
    pub scales: Option<Memory>,
    /// Rows of `x` for a token: two where the input is not quantized.
    pub planes: usize,
}

impl Operand {
    pub fn fits(&self, w: &CudaLinear) -> bool {
        self.activation == w.activation
            && self.codes == w.reads_codes()
            && self.pre_quant_scale.as_ref() == w.pre_quant_scale.as_ref().map(|p| &p.0)
            && self.rotation.as_ref() == w.rotation.as_ref().map(|r| &r.0)
    }

    /// What every product with it is multiplied by.
    pub fn scale(&self) -> f32 {
        match self.activation {
            ActivationFormat::Nvfp4 { global_scale } | ActivationFormat::FpQuant { global_scale, .. } => global_scale,
            ActivationFormat::Fp8Static { scale } => scale,
            _ => 1.0,
        }
    }
}

/// What is added to the number of a format whose inputs are codes; twice, where they are in order.
const CODES: usize = 16;

/// Number and scale of the format of `w`'s inputs as kernels/formats.cuh has them, and the rule of MX scales.
pub(super) fn format(w: &CudaLinear) -> (usize, f32, usize) {
    let rule = |r| match r {
        ScaleRule::Ceil => 0,
        ScaleRule::Floor => 1,
        ScaleRule::Even => 2,
    };
    let (number, scale, rule) = match w.activation {
        ActivationFormat::Float => (0, 1.0, 0),
        ActivationFormat::FpQuant { method: Method::AbsMax, global_scale } => (7, global_scale, 0),
        ActivationFormat::FpQuant { method: Method::Quest, global_scale } => (8, global_scale, 0),
        ActivationFormat::Nvfp4 { global_scale } => (1, global_scale, 0),
        ActivationFormat::Fp8Static { scale } => (2, scale, 0),
        ActivationFormat::Fp8Token => (3, 1.0, 0),
        ActivationFormat::Fp8Group => (4, 1.0, 0),
        ActivationFormat::Mxfp4 { rule: r } => (5, 1.0, rule(r)),
        ActivationFormat::Mxfp8 { rule: r } => (6, 1.0, rule(r)),
    };
    let codes = match w.kind {
        Kind::Tcgen { .. } => 2 * CODES,
        kind if kind.is_narrow() => CODES,
        _ => 0,
    };
    (number + codes, scale, rule)
}

/// An input's scales as those of whole tokens, and as those of 128 columns each.
pub(super) fn scales_of(activation: ActivationFormat, scales: Option<&Memory>) -> [Option<&Memory>; 2] {
    if activation == ActivationFormat::Fp8Group { [None, scales] } else { [scales, None] }
}

impl CudaBackend {
    /// Memory for an input of `w`, of `rows` tokens.
    pub(super) fn operand(&self, w: &CudaLinear, rows: usize) -> Result<Operand> {
        let planes = if w.activation == ActivationFormat::Float { 2 } else { 1 };
        let padded = w.k.next_multiple_of(STEP);
        let scales = match (w.kind, w.activation) {
            // A byte for each block, and an f32.
            (Kind::Fp4 { block } | Kind::Tcgen { block }, _) => Some(self.device.take(rows * (padded / block + 4))?),
            (Kind::Fp8Mx, _) => Some(self.device.take(rows * (padded / 32 + 4))?),
            (_, ActivationFormat::Fp8Token) => Some(self.device.take(4 * rows)?),
            (_, ActivationFormat::Fp8Group) => Some(self.device.take(4 * rows * padded / STEP)?),
            _ => None,
        };
        let bytes = match w.kind {
            Kind::Fp4 { .. } | Kind::Tcgen { .. } => padded / 2,
            Kind::Fp8 | Kind::Fp8Mx => padded,
            _ => 2 * planes * padded,
        };
        Ok(Operand {
            codes: w.reads_codes(),
            activation: w.activation,
            pre_quant_scale: w.pre_quant_scale.as_ref().map(|p| p.0.clone()),
            rotation: w.rotation.as_ref().map(|r| r.0.clone()),
            x: self.device.take(rows * bytes)?,
            scales,
            planes,
        })
    }

    /// `x` as `w` reads it.
    pub(super) fn quantize(&self, x: &CudaTensor, w: &CudaLinear) -> Result<Arc<Operand>> {
        if let Some(operand) = x.operand.as_ref().filter(|o| o.fits(w)) {
            return Ok(operand.clone());
        }
        let operand = self.operand(w, x.rows)?;
        let turned;
        let (x, pre) = match &w.rotation {
            Some((rotation, matrix)) => {
                turned = self.rotated_input(x, w, rotation.group(), matrix)?;
                (&turned, None)
            }
            None => (x, w.pre_quant_scale.as_ref()),
        };
        let (number, scale, rule) = format(w);
        let args = Args::new().memory(&x.data);
        let args = if let Some(up) = &x.up { args.memory(up) } else { args };
        let args = args
            .optional(pre.map(|p| &p.1))
            .int(number)
            .float(scale)
            .int(rule)
            .int(w.k)
            .int(w.k.next_multiple_of(STEP))
            .memory(&operand.x)
            .optional(operand.scales.as_ref());
        let name = if x.up.is_some() { "operand_silu" } else { "operand_plain" };
        self.launch(name, [x.rows, 1, 1], 256, args)?;
        Ok(Arc::new(operand))
    }

    /// Each run of `group` columns of `x`, scaled as `w` wants it, times `matrix`.
    fn rotated_input(&self, x: &CudaTensor, w: &CudaLinear, group: usize, matrix: &Memory) -> Result<CudaTensor> {
        let x = self.settled(x)?;
        let out = self.empty(x.rows, x.columns)?;
        let args = Args::new()
            .memory(&x.data)
            .optional(w.pre_quant_scale.as_ref().map(|p| &p.1))
            .memory(matrix)
            .int(group)
            .memory(&out.data)
            .int(x.columns);
        self.launch("rotate", [x.rows, 1, 1], 128, args)?;
        Ok(out)
    }

    /// The product of one weight with an input that is ready.
    pub(super) fn product(&self, x: &CudaTensor, operand: Option<&Operand>, w: &CudaLinear) -> Result<CudaTensor> {
        let y = self.empty(x.rows, w.n)?;
        let Some(operand) = operand else {
            let args = Args::new()
                .memory(&w.words)
                .memory(&x.data)
                .memory(&w.row_scales)
                .optional(w.bias.as_ref())
                .memory(&y.data)
                .int(w.n)
                .int(w.k);
            self.launch("matmul_f32", [w.n.div_ceil(8), x.rows, 1], 256, args)?;
            return Ok(y);
        };
        let rows = x.rows * operand.planes;
        let count = (x.rows, operand.planes);
        let (name, grid) = product_kernel(w.kind, w.grouped(), count, w.n, self.device.multiprocessors)?;
        if let Kind::Tcgen { block } = w.kind {
            self.product_of_codes(operand, (w, block), &y, (name, grid))?;
            return Ok(y);
        }
        let [of_tokens, of_groups] = scales_of(operand.activation, operand.scales.as_ref());
        let args = Args::new()
            .memory(&w.words)
            .optional(w.scales.as_ref())
            .optional(w.grid.as_ref())
            .memory(&operand.x)
            .optional(of_tokens)
            .optional(of_groups)
            .memory(&w.row_scales)
            .optional(w.bias.as_ref())
            .memory(&y.data)
            .int(rows)
            .int(operand.planes)
            .int(w.n)
            .int(w.k.next_multiple_of(STEP))
            .float(operand.scale());
        self.launch(name, grid, 256, args)?;
        Ok(y)
    }

    /// A product by kernels/tcgen.cu, into `y`: at once, or slices of K first, then their sum.
    fn product_of_codes(
        &self,
        operand: &Operand,
        (w, block): (&CudaLinear, usize),
        y: &CudaTensor,
        (name, grid): (&'static str, [usize; 3]),
    ) -> Result<()> {
        let padded = w.k.next_multiple_of(STEP);
        let parts = if grid[2] > 1 { Some(self.device.take(4 * SLICES * y.rows * w.n)?) } else { None };
        let args = Args::new()
            .memory(&w.words)
            .optional(w.scales.as_ref())
            .memory(&operand.x)
            .optional(operand.scales.as_ref())
            .memory(&w.row_scales)
            .optional(w.bias.as_ref())
            .memory(parts.as_ref().unwrap_or(&y.data))
            .int(y.rows)
            .int(grid[2])
            .int(w.n)
            .int(padded)
            .float(operand.scale());
        self.launch(name, grid, 256, args)?;
        let Some(parts) = &parts else { return Ok(()) };
        let args = Args::new()
            .memory(parts)
            .optional(operand.scales.as_ref())
            .memory(&w.row_scales)
            .optional(w.bias.as_ref())
            .memory(&y.data)
            .int(y.rows)
            .int(padded / block / 4 + 1)
            .int(w.n)
            .float(operand.scale());
        self.launch("sum_slices", [w.n.div_ceil(256), y.rows, 1], 256, args)
    }

    /// `x` with `update` added, its norm, and that as the first of `readers` reads it.
    pub(super) fn norm(
        &self,
        x: &CudaTensor,
        update: Option<&CudaTensor>,
        weight: &CudaVector,
        eps: f32,
        readers: &[&CudaLinear],
    ) -> Result<(Option<CudaTensor>, CudaTensor)> {
        let x = &self.settled(x)?;
        let (rows, width) = (x.rows * x.columns / weight.features.max(1), weight.features);
        let sum = update.map(|_| self.empty(x.rows, x.columns)).transpose()?;
        let mut normed = self.empty(x.rows, x.columns)?;
        let reader = readers.first().filter(|w| w.kind != Kind::F32 && w.k == width && w.rotation.is_none());
        let operand = reader.map(|w| self.operand(w, rows)).transpose()?;
        let (number, scale, rule) = reader.map_or((0, 1.0, 0), |w| format(w));
        let args = Args::new()
            .memory(&x.data)
            .optional(update.map(|u| &*u.data))
            .optional(sum.as_ref().map(|s| &*s.data))
            .memory(&weight.weight)
            .float(eps)
            .memory(&normed.data)
            .optional(reader.and_then(|w| w.pre_quant_scale.as_ref()).map(|p| &p.1))
            .int(number)
            .float(scale)
            .int(rule)
            .int(width)
            .int(width.next_multiple_of(STEP))
            .optional(operand.as_ref().map(|o| &o.x))
            .optional(operand.as_ref().and_then(|o| o.scales.as_ref()));
        self.launch("operand_norm", [rows, 1, 1], 256, args)?;
        normed.operand = operand.map(Arc::new);
        Ok((sum, normed))
    }
}
