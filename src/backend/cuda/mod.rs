//! The CUDA backend: packed weights, BF16 tensor cores for every format, everything of a pass on the device.
//!
//! The driver is found at run time and the kernels are embedded (`images/`), so nothing but a driver is needed. Sources are in
//! `kernels/`; `standin/` compiles the same sources for the CPU, as a driver library that needs no GPU.
//! **No GPU has run this yet.** docs/cuda.md says what was checked, and how.

mod attention;
mod cache;
mod driver;
mod elementwise;
mod graph;
mod mixture;
mod recurrent;
mod sample;
mod weight;

use std::sync::{Arc, Mutex, PoisonError};

pub use cache::CudaCache;
pub use driver::Device;
use driver::{Args, Memory};
pub use recurrent::{CudaDeltaNet, CudaMamba};
pub use weight::CudaLinear;
use weight::{Kind, STEP};

use recoup_ground::divergence::{Pair, RowError};

use super::{
    Activation, AttentionShape, Backend, BackendError, Batch, CacheLayout, DeltaInputs, DeltaNetShape, DeltaNetWeights,
    Ffn, HeadParameters, Mamba2Shape, Mamba2Weights, PAGE, Result, RopeTable, Rotation, Run, Span, Update, exactly,
    expanded_by_parts, mixture_by_expert, one,
};
use crate::formats::e8m0::ScaleRule;
use crate::formats::fp_quant::Method;
use crate::formats::linear::{ActivationFormat, InputRotation, LinearTensors};
use crate::logits::{Draw, RouterRule, Routing, Sampled, SamplingError, Scratch, TokenScore};

/// Tokens of a run, consecutive ones of a sequence whose rows (query heads that share keys) make blocks: any number will do;
/// this one leaves no block of 32 rows incomplete.
const RUN: usize = 32;

/// Kernels that are launched by name; matmul_*, tile_*, mixture_* and embed_* for each kind of weight.
const KERNELS: [&str; 112] = [
    "activate",
    "add",
    "add_rows",
    "attention_bf16_16",
    "attention_bf16_32",
    "attention_combine",
    "attention_f32_16",
    "attention_fp8_16",
    "attention_fp8_32",
    "delta_convolve",
    "delta_norm",
    "delta_scan",
    "delta_unit",
    "embed_bf16",
    "embed_e2m1_16",
    "embed_e2m1_32",
    "embed_e4m3",
    "embed_f32",
    "embed_mxfp4",
    "embed_mxfp8",
    "gate",
    "gather",
    "keep_tail",
    "logits_at",
    "look",
    "mamba_convolve",
    "mamba_norm",
    "mamba_scan",
    "matmul_bf16_16",
    "matmul_bf16_16g",
    "matmul_bf16_32",
    "matmul_bf16_32g",
    "matmul_bf16_8",
    "matmul_bf16_8g",
    "matmul_e2m1_16_16",
    "matmul_e2m1_16_16g",
    "matmul_e2m1_16_32",
    "matmul_e2m1_16_32g",
    "matmul_e2m1_16_8",
    "matmul_e2m1_16_8g",
    "matmul_e2m1_32_16",
    "matmul_e2m1_32_16g",
    "matmul_e2m1_32_32",
    "matmul_e2m1_32_32g",
    "matmul_e2m1_32_8",
    "matmul_e2m1_32_8g",
    "matmul_e4m3_16",
    "matmul_e4m3_16g",
    "matmul_e4m3_32",
    "matmul_e4m3_32g",
    "matmul_e4m3_8",
    "matmul_e4m3_8g",
    "matmul_f32",
    "matmul_mxfp4_16",
    "matmul_mxfp4_16g",
    "matmul_mxfp4_32",
    "matmul_mxfp4_32g",
    "matmul_mxfp4_8",
    "matmul_mxfp4_8g",
    "matmul_mxfp8_16",
    "matmul_mxfp8_16g",
    "matmul_mxfp8_32",
    "matmul_mxfp8_32g",
    "matmul_mxfp8_8",
    "matmul_mxfp8_8g",
    "mixture_bf16_32",
    "mixture_bf16_8",
    "mixture_e2m1_16_32",
    "mixture_e2m1_16_8",
    "mixture_e2m1_32_32",
    "mixture_e2m1_32_8",
    "mixture_e4m3_32",
    "mixture_e4m3_32g",
    "mixture_e4m3_8",
    "mixture_e4m3_8g",
    "mixture_mxfp4_32",
    "mixture_mxfp4_8",
    "mixture_mxfp8_32",
    "mixture_mxfp8_8",
    "mixture_operand",
    "mixture_route",
    "mixture_silu",
    "mixture_sort",
    "mixture_sum",
    "operand_norm",
    "operand_plain",
    "operand_silu",
    "penalise",
    "rearrange",
    "rope_cache",
    "rotate",
    "sample_count",
    "sample_gather",
    "sample_head",
    "sample_max",
    "sample_pick",
    "sample_sums",
    "scale",
    "silu_mul",
    "tile_bf16",
    "tile_bf16g",
    "tile_e2m1_16",
    "tile_e2m1_16g",
    "tile_e2m1_32",
    "tile_e2m1_32g",
    "tile_e4m3",
    "tile_e4m3g",
    "tile_mxfp4",
    "tile_mxfp4g",
    "tile_mxfp8",
    "tile_mxfp8g",
    "totals",
];

/// Whether the backend computes this. A router's rule is carried out on the host where no kernel knows it.
#[must_use]
/// Runs the decoder on one GPU. Clones share it.
#[derive(Clone)]
pub struct CudaBackend {
    device: Arc<Device>,
    /// Where the weights of mixtures lie, as kernels read it.
    mixtures: Arc<mixture::Tables>,
    /// Which columns rearranged tensors are made of.
    columns: Arc<elementwise::Columns>,
}

/// Activations on the device, row-major f32.
#[derive(Clone, Debug)]
pub struct CudaTensor {
    data: Arc<Memory>,
    rows: usize,
    columns: usize,
    /// What it was quantized to already.
    operand: Option<Arc<Operand>>,
    /// Then it is silu(data) · up, not computed yet: that is done inside of what quantizes it.
    up: Option<Arc<Memory>>,
}

/// An input in the form that products read: BF16 rows of K padded to [`STEP`].
#[derive(Debug)]
struct Operand {
    activation: ActivationFormat,
    pre_quant_scale: Option<Vec<f32>>,
    rotation: Option<Arc<InputRotation>>,
    x: Memory,
    /// Per row, or per row and 128 columns.
    scales: Option<Memory>,
    /// Rows of `x` for a token: two where the input is not quantized.
    planes: usize,
}

impl Operand {
    fn fits(&self, w: &CudaLinear) -> bool {
        self.activation == w.activation
            && self.pre_quant_scale.as_ref() == w.pre_quant_scale.as_ref().map(|p| &p.0)
            && self.rotation.as_ref() == w.rotation.as_ref().map(|r| &r.0)
    }

    /// What every product with it is multiplied by.
    fn scale(&self) -> f32 {
        match self.activation {
            ActivationFormat::Nvfp4 { global_scale } | ActivationFormat::FpQuant { global_scale, .. } => global_scale,
            ActivationFormat::Fp8Static { scale } => scale,
            _ => 1.0,
        }
    }
}

/// A rotation, its table on the device for as many positions as were needed so far, [positions, 2, half].
#[derive(Debug)]
pub struct CudaRope {
    /// Pairs that turn.
    half: usize,
    table: RopeTable,
    device: Mutex<Option<(usize, Arc<Memory>)>>,
}

/// Numbers that are no matrix: a norm's weight.
#[derive(Debug)]
pub struct CudaVector {
    weight: Memory,
    features: usize,
}

/// What a pass needs, on the device.
#[derive(Debug)]
pub struct CudaPass {
    batch: Batch,
    tokens: Memory,
    positions: Memory,
    /// Where a token's keys and values go: page · 16 + row.
    slots: Memory,
    /// Page tables, one after the other, and where each token's begins.
    tables: Memory,
    table_of: Memory,
    /// The first token of each run, and how many they are; the longest.
    runs: Memory,
    run_count: usize,
    longest_run: usize,
    /// Pairs that turn and [positions, cosines and sines] of each rotation.
    ropes: Vec<(usize, Arc<Memory>)>,
    /// One past the highest page in use.
    pages: usize,
    /// What only some layers need, made when the first of them asks.
    grown: attention::Grown,
    spans: recurrent::Spans,
}

/// Number and scale of an input's format as kernels/formats.cuh has them, and the rule of MX scales.
fn format(activation: ActivationFormat) -> (usize, f32, usize) {
    let rule = |r| match r {
        ScaleRule::Ceil => 0,
        ScaleRule::Floor => 1,
        ScaleRule::Even => 2,
    };
    match activation {
        ActivationFormat::Float => (0, 1.0, 0),
        ActivationFormat::FpQuant { method: Method::AbsMax, global_scale } => (7, global_scale, 0),
        ActivationFormat::FpQuant { method: Method::Quest, global_scale } => (8, global_scale, 0),
        ActivationFormat::Nvfp4 { global_scale } => (1, global_scale, 0),
        ActivationFormat::Fp8Static { scale } => (2, scale, 0),
        ActivationFormat::Fp8Token => (3, 1.0, 0),
        ActivationFormat::Fp8Group => (4, 1.0, 0),
        ActivationFormat::Mxfp4 { rule: r } => (5, 1.0, rule(r)),
        ActivationFormat::Mxfp8 { rule: r } => (6, 1.0, rule(r)),
    }
}

/// End of the name of a weight's kernels.
fn suffix(kind: Kind) -> &'static str {
    match kind {
        Kind::E2m1 { block: 16 } => "e2m1_16",
        Kind::E2m1 { .. } => "e2m1_32",
        Kind::Mxfp4 => "mxfp4",
        Kind::E4m3 => "e4m3",
        Kind::Mxfp8 => "mxfp8",
        Kind::Bf16 => "bf16",
        Kind::F32 => "f32",
    }
}

/// An input's scales as those of whole tokens, and as those of 128 columns each.
fn scales_of(activation: ActivationFormat, scales: Option<&Memory>) -> [Option<&Memory>; 2] {
    if activation == ActivationFormat::Fp8Group { [None, scales] } else { [scales, None] }
}

/// The loaded kernel of this name.
fn kernel(name: &str) -> Result<&'static str> {
    let missing = || BackendError::Failed { context: "CUDA", message: format!("there is no kernel `{name}`") };
    KERNELS.iter().copied().find(|k| *k == name).ok_or_else(missing)
}

/// The kernel of a product and its grid: of `tokens` rows of x, each of them `planes` rows of BF16, with a weight of `n` outputs,
/// on a device of so many multiprocessors. All kernels give the same bits.
///
/// Up to 32 rows the weights are read once and bound the time, by the kernel with the fewest columns that has room. Beyond, the
/// kernel for 32 is bound by L2, 160 bytes per HMMA (E2M1); a tile takes 34 and is bound by tensor cores, but its blocks are few.
/// By assumed rates of an H200 (42 bytes and 0.6 HMMA a clock and multiprocessor) they break even on a quarter of it.
///
/// # Errors
/// When there is no kernel for this kind.
pub(crate) fn product_kernel(
    kind: Kind,
    grouped: bool,
    (tokens, planes): (usize, usize),
    n: usize,
    multiprocessors: usize,
) -> Result<(&'static str, [usize; 3])> {
    let rows = tokens * planes;
    let group = if grouped { "g" } else { "" };
    let tile = [n.div_ceil(if grouped { 128 } else { 256 }), tokens.div_ceil(64), 1];
    if rows > 32 && 4 * tile[0] * tile[1] >= multiprocessors {
        return Ok((kernel(&format!("tile_{}{group}", suffix(kind)))?, tile));
    }
    let columns = [8, 16].into_iter().find(|c| rows <= *c).unwrap_or(32);
    let name = kernel(&format!("matmul_{}_{columns}{group}", suffix(kind)))?;
    Ok((name, [n.div_ceil(32), rows.div_ceil(columns), 1]))
}

/// Tokens that [`CudaBackend::kernel_table`] has a column for.
pub const TABLE_TOKENS: [usize; 6] = [1, 8, 16, 32, 128, 2048];

impl CudaBackend {
    /// Which kernel computes a product with 4,096 outputs, by weight and input, for each of [`TABLE_TOKENS`].
    ///
    /// # Errors
    /// Never, unless a kernel lacks that the table names.
    pub fn kernel_table(&self) -> Result<Vec<(String, Vec<&'static str>)>> {
        let weights = [
            ("NVFP4", Kind::E2m1 { block: 16 }, false),
            ("NVFP4 in blocks of 32", Kind::E2m1 { block: 32 }, false),
            ("MXFP4", Kind::Mxfp4, false),
            ("FP8", Kind::E4m3, false),
            ("FP8 in blocks, or inputs in groups of 128", Kind::E4m3, true),
            ("MXFP8", Kind::Mxfp8, false),
            ("BF16", Kind::Bf16, false),
        ];
        let mut out = Vec::new();
        for (name, kind, grouped) in weights {
            for (input, planes) in [("quantized", 1), ("float", 2)] {
                let row = |tokens| product_kernel(kind, grouped, (tokens, planes), 4096, self.device.multiprocessors);
                let kernels = TABLE_TOKENS.iter().map(|&tokens| Ok(row(tokens)?.0)).collect::<Result<_>>()?;
                out.push((format!("{name}, {input} inputs"), kernels));
            }
        }
        Ok(out)
    }

    /// The backend on device `ordinal`.
    ///
    /// # Errors
    /// No driver, one that is too old, no such device, or one that cannot run the kernels.
    pub fn new(ordinal: usize) -> Result<Self> {
        Ok(Self {
            device: Arc::new(Device::open(ordinal, &KERNELS)?),
            mixtures: Arc::default(),
            columns: Arc::default(),
        })
    }

    /// The device in use.
    #[must_use]
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    fn empty(&self, rows: usize, columns: usize) -> Result<CudaTensor> {
        let data = Arc::new(self.device.take(4 * rows * columns)?);
        Ok(CudaTensor { data, rows, columns, operand: None, up: None })
    }

    fn launch(&self, kernel: &'static str, grid: [usize; 3], threads: u32, args: Args<'_>) -> Result<()> {
        // SAFETY: each call in this folder gives the parameters of the kernel it names, with memory of the shapes that the
        // kernel's first lines state; the kernels compiled for the CPU check both.
        unsafe { self.device.launch(kernel, grid, threads, args) }
    }

    /// `x` with its values computed.
    fn settled(&self, x: &CudaTensor) -> Result<CudaTensor> {
        self.settle(x.clone())
    }

    fn settle(&self, mut x: CudaTensor) -> Result<CudaTensor> {
        let Some(up) = &x.up.take() else { return Ok(x) };
        let gate = self.own(x)?;
        let args = Args::new().memory(&gate.data).memory(up).int(gate.columns);
        self.launch("silu_mul", [gate.rows, 1, 1], 128, args)?;
        Ok(gate)
    }

    /// A tensor with memory of its own, to be changed in place.
    fn own(&self, x: CudaTensor) -> Result<CudaTensor> {
        if Arc::strong_count(&x.data) == 1 {
            return Ok(CudaTensor { operand: None, ..x });
        }
        let copy = self.empty(x.rows, x.columns)?;
        self.device.copy((&copy.data, 0), (&x.data, 0), 4 * x.rows * x.columns)?;
        Ok(copy)
    }

    /// Memory for an input of `w`, of `rows` tokens.
    fn operand(&self, w: &CudaLinear, rows: usize) -> Result<Operand> {
        let planes = if w.activation == ActivationFormat::Float { 2 } else { 1 };
        let padded = w.k.next_multiple_of(STEP);
        let scales = match w.activation {
            ActivationFormat::Fp8Token => Some(self.device.take(4 * rows)?),
            ActivationFormat::Fp8Group => Some(self.device.take(4 * rows * padded / STEP)?),
            _ => None,
        };
        Ok(Operand {
            activation: w.activation,
            pre_quant_scale: w.pre_quant_scale.as_ref().map(|p| p.0.clone()),
            rotation: w.rotation.as_ref().map(|r| r.0.clone()),
            x: self.device.take(2 * planes * rows * padded)?,
            scales,
            planes,
        })
    }

    /// `x` as `w` reads it.
    fn quantize(&self, x: &CudaTensor, w: &CudaLinear) -> Result<Arc<Operand>> {
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
        let (number, scale, rule) = format(w.activation);
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
    fn product(&self, x: &CudaTensor, operand: Option<&Operand>, w: &CudaLinear) -> Result<CudaTensor> {
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

    /// `x` with `update` added, its norm, and that as the first of `readers` reads it.
    fn norm(
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
        let (number, scale, rule) = reader.map_or((0, 1.0, 0), |w| format(w.activation));
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

    /// Sum of squares of each run of `width` values, and how many of them are not finite.
    fn look(&self, x: &CudaTensor, width: usize) -> Result<Vec<f32>> {
        let x = &self.settled(x)?;
        let rows = x.rows * x.columns / width.max(1);
        let out = self.device.take(8 * rows)?;
        let args = Args::new().memory(&x.data).memory(&out).int(width);
        self.launch("look", [rows, 1, 1], 128, args)?;
        self.device.download(&out, 2 * rows)
    }

    fn index(&self, rows: &[usize]) -> Result<Memory> {
        self.device.upload(&rows.iter().map(|r| *r as i32).collect::<Vec<_>>())
    }

    /// Rotation `index` up to position `reach`, on the device.
    fn rope(&self, rope: &CudaRope, reach: usize) -> Result<Arc<Memory>> {
        let mut held = rope.device.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((positions, memory)) = &*held
            && *positions >= reach
        {
            return Ok(memory.clone());
        }
        // Doubling keeps the cost of growing within that of the table.
        let positions = reach.next_power_of_two().max(512);
        let rows = rope.table.upto(positions);
        let values: Vec<f32> = (0..positions).flat_map(|p| [rows.at(p).0, rows.at(p).1].concat()).collect();
        let memory = Arc::new(self.device.upload(&values)?);
        *held = Some((positions, memory.clone()));
        Ok(memory)
    }
}

impl Backend for CudaBackend {
    type Tensor = CudaTensor;
    type Linear = CudaLinear;
    type Vector = CudaVector;
    type Mamba = CudaMamba;
    type DeltaNet = CudaDeltaNet;
    type Cache = CudaCache;
    type Rope = CudaRope;
    type Pass = CudaPass;

    fn load_linear(&self, tensors: LinearTensors<'_>) -> Result<CudaLinear> {
        CudaLinear::load(&self.device, &tensors)
    }

    fn inputs(&self, linear: &CudaLinear) -> usize {
        linear.k
    }

    fn resident_bytes(&self, linear: &CudaLinear) -> usize {
        linear.bytes()
    }

    fn name(&self) -> &'static str {
        "CUDA"
    }

    fn load_vector(&self, values: Vec<f32>) -> Result<CudaVector> {
        Ok(CudaVector { features: values.len(), weight: self.device.upload(&values)? })
    }

    fn load_mamba(&self, shape: Mamba2Shape, weights: Mamba2Weights) -> Result<CudaMamba> {
        CudaMamba::load(&self.device, shape, weights)
    }

    fn load_delta_net(&self, shape: DeltaNetShape, weights: DeltaNetWeights) -> Result<CudaDeltaNet> {
        CudaDeltaNet::load(&self.device, shape, weights)
    }

    fn load_rope(&self, rotation: Rotation) -> Result<CudaRope> {
        let half = rotation.frequencies.len();
        Ok(CudaRope { half, table: RopeTable::new(rotation), device: Mutex::default() })
    }

    fn new_cache(&self, layout: &CacheLayout) -> Result<CudaCache> {
        CudaCache::new(&self.device, layout)
    }

    fn grow(&self, cache: &mut CudaCache, pages: usize, slots: usize) -> Result<()> {
        cache.grow(&self.device, pages, slots)
    }

    fn copy_state(&self, cache: &mut CudaCache, from: u32, to: u32) -> Result<()> {
        cache.copy_state(&self.device, from as usize, to as usize)
    }

    fn fork(&self, cache: &mut CudaCache, from: &Span, to: &Span) -> Result<()> {
        if !to.start.is_multiple_of(PAGE) {
            let page = to.start / PAGE;
            cache.copy_page(&self.device, from.pages[page], to.pages[page])?;
        }
        Ok(())
    }

    fn prepare(&self, batch: &Batch, ropes: &[&CudaRope]) -> Result<CudaPass> {
        let (mut slots, mut tables, mut table_of, mut runs) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for span in &batch.spans {
            let needed = span.start + span.len;
            if span.pages.len() * PAGE < needed {
                return Err(BackendError::CacheTooSmall { capacity: span.pages.len() * PAGE, needed });
            }
            for first in (0..span.len).step_by(RUN) {
                runs.push([(slots.len() + first) as i32, RUN.min(span.len - first) as i32]);
            }
            for position in span.start..needed {
                slots.push((span.pages[position / PAGE] as usize * PAGE + position % PAGE) as i32);
                table_of.push(tables.len() as i32);
            }
            tables.extend(span.pages.iter().map(|p| *p as i32));
        }
        let positions: Vec<i32> = batch.positions().map(|p| p as i32).collect();
        let pages = tables.iter().max().map_or(0, |p| *p as usize + 1);
        Ok(CudaPass {
            batch: batch.clone(),
            tokens: self.device.upload(&batch.tokens)?,
            positions: self.device.upload(&positions)?,
            slots: self.device.upload(&slots)?,
            tables: self.device.upload(&tables)?,
            table_of: self.device.upload(&table_of)?,
            run_count: runs.len(),
            longest_run: runs.iter().map(|r| r[1] as usize).max().unwrap_or(0),
            runs: self.device.upload(&runs.concat())?,
            ropes: ropes.iter().map(|r| Ok((r.half, self.rope(r, batch.reach())?))).collect::<Result<_>>()?,
            pages,
            grown: attention::Grown::default(),
            spans: recurrent::Spans::default(),
        })
    }

    fn embed(&self, table: &CudaLinear, pass: &CudaPass) -> Result<CudaTensor> {
        if let Some(&token) = pass.batch.tokens.iter().find(|t| **t as usize >= table.n) {
            return Err(BackendError::TokenOutOfRange { token, vocab: table.n });
        }
        let rows = pass.batch.tokens.len();
        let out = self.empty(rows, table.k)?;
        let args = Args::new().memory(&table.words);
        let args = if table.kind == Kind::F32 {
            args.memory(&table.row_scales).memory(&pass.tokens).memory(&out.data).int(table.k)
        } else {
            args.optional(table.scales.as_ref())
                .optional(table.grid.as_ref())
                .memory(&table.row_scales)
                .memory(&pass.tokens)
                .memory(&out.data)
                .int(table.k)
                .int(table.k.div_ceil(STEP))
        };
        self.launch(kernel(&format!("embed_{}", suffix(table.kind)))?, [rows, 1, 1], 128, args)?;
        Ok(out)
    }

    fn rms_norm(&self, x: &CudaTensor, weight: &CudaVector, eps: f32) -> Result<CudaTensor> {
        Ok(self.norm(x, None, weight, eps, &[])?.1)
    }

    fn linears(&self, x: &CudaTensor, weights: &[&CudaLinear]) -> Result<Vec<CudaTensor>> {
        let mut inputs: Vec<Arc<Operand>> = Vec::new();
        let mut out = Vec::new();
        for w in weights {
            if w.kind == Kind::F32 {
                out.push(self.product(&self.settled(x)?, None, w)?);
                continue;
            }
            let input = match inputs.iter().find(|o| o.fits(w)) {
                Some(input) => input.clone(),
                None => {
                    inputs.push(self.quantize(x, w)?);
                    inputs[inputs.len() - 1].clone()
                }
            };
            out.push(self.product(x, Some(&input), w)?);
        }
        Ok(out)
    }

    fn attention(
        &self,
        q: CudaTensor,
        k: CudaTensor,
        v: CudaTensor,
        sinks: Option<&CudaVector>,
        shape: &AttentionShape,
        pass: &CudaPass,
        cache: &mut CudaCache,
    ) -> Result<CudaTensor> {
        self.attend([q, k, v], HeadParameters { norms: None, sinks }, shape, pass, cache)
    }

    fn normed_attention(
        &self,
        q: CudaTensor,
        k: CudaTensor,
        v: CudaTensor,
        heads: HeadParameters<'_, Self>,
        shape: &AttentionShape,
        pass: &CudaPass,
        cache: &mut CudaCache,
    ) -> Result<CudaTensor> {
        self.attend([q, k, v], heads, shape, pass, cache)
    }

    fn rotated(&self, k: &CudaTensor, shape: &AttentionShape, pass: &CudaPass) -> Result<Vec<f32>> {
        let mut host = self.to_host(k)?;
        if let Some((half, rope)) = shape.rope.map(|r| &pass.ropes[r]) {
            let half = *half;
            let reach = pass.batch.reach();
            let rows: Vec<f32> = self.device.download(rope, 2 * half * reach)?;
            for (token, position) in host.chunks_exact_mut(k.columns).zip(pass.batch.positions()) {
                let (cos, sin) = rows[2 * half * position..][..2 * half].split_at(half);
                for head in token.chunks_exact_mut(shape.head_dim) {
                    let (first, second) = head[..2 * half].split_at_mut(half);
                    for (((a, b), c), s) in first.iter_mut().zip(second).zip(cos).zip(sin) {
                        (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
                    }
                }
            }
        }
        Ok(host)
    }

    fn add(&self, x: CudaTensor, y: &CudaTensor) -> Result<CudaTensor> {
        let (x, y) = (self.own(self.settle(x)?)?, self.settled(y)?);
        let args = Args::new().memory(&x.data).memory(&y.data).int(x.columns);
        self.launch("add", [x.rows, 1, 1], 128, args)?;
        Ok(x)
    }

    fn silu_mul(&self, gate: CudaTensor, up: &CudaTensor) -> Result<CudaTensor> {
        let (gate, up) = (self.own(self.settle(gate)?)?, self.settled(up)?);
        let args = Args::new().memory(&gate.data).memory(&up.data).int(gate.columns);
        self.launch("silu_mul", [gate.rows, 1, 1], 128, args)?;
        Ok(gate)
    }

    fn route(&self, logits: &CudaTensor, rule: &RouterRule) -> Result<Vec<Routing>> {
        let host = self.to_host(logits)?;
        Ok(host.chunks_exact(logits.columns.max(1)).map(|row| rule.route(row)).collect())
    }

    fn select_rows(&self, x: &CudaTensor, rows: &[usize]) -> Result<CudaTensor> {
        let x = &self.settled(x)?;
        let out = self.empty(rows.len(), x.columns)?;
        let index = self.index(rows)?;
        let args = Args::new().memory(&x.data).memory(&index).memory(&out.data).int(x.columns);
        self.launch("gather", [rows.len(), 1, 1], 128, args)?;
        Ok(out)
    }

    fn add_rows(&self, sum: CudaTensor, y: &CudaTensor, rows: &[usize], weights: &[f32]) -> Result<CudaTensor> {
        let (sum, y) = (self.own(self.settle(sum)?)?, self.settled(y)?);
        let (index, weights) = (self.index(rows)?, self.device.upload(weights)?);
        let args = Args::new().memory(&sum.data).memory(&y.data).memory(&index).memory(&weights).int(sum.columns);
        self.launch("add_rows", [rows.len(), 1, 1], 128, args)?;
        Ok(sum)
    }

    fn zeros_like(&self, x: &CudaTensor) -> Result<CudaTensor> {
        let data = Arc::new(self.device.zeros(4 * x.rows * x.columns)?);
        Ok(CudaTensor { data, rows: x.rows, columns: x.columns, operand: None, up: None })
    }

    fn residual_norm(
        &self,
        x: CudaTensor,
        update: Update<'_, Self>,
        norm: &CudaVector,
        eps: f32,
        readers: &[&CudaLinear],
    ) -> Result<(CudaTensor, CudaTensor)> {
        let y = match update {
            Update::Product { input, weight } => one(self.linears(&input, &[weight])?)?,
            Update::Ready(y) => self.settle(y)?,
        };
        let (sum, normed) = self.norm(&x, Some(&y), norm, eps, readers)?;
        Ok((sum.unwrap_or(x), normed))
    }

    fn expanded(&self, x: &CudaTensor, ffn: &Ffn<'_, CudaLinear>) -> Result<CudaTensor> {
        let (Some(gate), Activation::Silu) = (ffn.gate, ffn.activation) else {
            return expanded_by_parts(self, x, ffn);
        };
        let [gate, up] = exactly(self.linears(x, &[gate, ffn.up])?)?;
        Ok(CudaTensor { up: Some(up.data), ..gate })
    }

    fn mixture(
        &self,
        x: &CudaTensor,
        routed: &CudaTensor,
        router: &CudaLinear,
        experts: &[Ffn<'_, CudaLinear>],
        rule: &RouterRule,
    ) -> Result<CudaTensor> {
        match self.mixture_on_device(x, routed, router, experts, rule)? {
            Some(sum) => Ok(sum),
            None => mixture_by_expert(self, x, routed, router, experts, rule),
        }
    }

    fn activate(&self, x: CudaTensor, up: Option<&CudaTensor>, activation: Activation) -> Result<CudaTensor> {
        self.activated(x, up, activation)
    }

    fn gate(&self, x: CudaTensor, gate: &CudaTensor) -> Result<CudaTensor> {
        self.gated(x, gate)
    }

    fn scale(&self, x: CudaTensor, factor: f32) -> Result<CudaTensor> {
        self.scaled(x, factor)
    }

    fn rearrange(&self, sources: &[&CudaTensor], runs: &[Run]) -> Result<CudaTensor> {
        self.rearranged(sources, runs)
    }

    fn mamba(
        &self,
        x: CudaTensor,
        mixer: &CudaMamba,
        layer: usize,
        pass: &CudaPass,
        cache: &mut CudaCache,
    ) -> Result<CudaTensor> {
        self.run_mamba(x, mixer, layer, pass, cache)
    }

    fn delta_net(
        &self,
        inputs: DeltaInputs<CudaTensor>,
        mixer: &CudaDeltaNet,
        layer: usize,
        pass: &CudaPass,
        cache: &mut CudaCache,
    ) -> Result<CudaTensor> {
        self.run_delta_net(inputs, mixer, layer, pass, cache)
    }

    fn score(&self, logits: &CudaTensor, picks: &[(usize, u32)]) -> Result<Vec<TokenScore>> {
        self.score_rows(logits, picks)
    }

    fn sample(
        &self,
        logits: &CudaTensor,
        draws: &[Draw<'_>],
        scratch: &mut Scratch,
    ) -> Result<Vec<std::result::Result<Sampled, SamplingError>>> {
        self.choose(logits, draws, scratch)
    }

    fn compare(
        &self,
        baseline: &CudaTensor,
        model: &CudaTensor,
        vocab: usize,
        targets: &[u32],
    ) -> Result<Vec<std::result::Result<Pair, RowError>>> {
        self.compare_rows(baseline, model, vocab, targets)
    }

    fn is_finite(&self, x: &CudaTensor) -> Result<bool> {
        // A row of a vocabulary in pieces that divide it: a block has one.
        let width = (512..=4096).rev().find(|w| x.columns.is_multiple_of(*w)).unwrap_or(x.columns);
        Ok(self.look(x, width)?.chunks_exact(2).all(|piece| piece[1] == 0.0))
    }

    fn squares_finite(&self, x: &CudaTensor, width: usize) -> Result<bool> {
        Ok(self.look(x, width)?.chunks_exact(2).all(|row| row[0].is_finite()))
    }

    fn tensor(&self, data: Vec<f32>, columns: usize) -> Result<CudaTensor> {
        if columns == 0 || !data.len().is_multiple_of(columns) {
            let message = format!("{} values do not make rows of {columns}", data.len());
            return Err(BackendError::Failed { context: "tensor", message });
        }
        let rows = data.len() / columns;
        Ok(CudaTensor { data: Arc::new(self.device.upload(&data)?), rows, columns, operand: None, up: None })
    }

    fn to_host(&self, x: &CudaTensor) -> Result<Vec<f32>> {
        let x = &self.settled(x)?;
        self.device.download(&x.data, x.rows * x.columns)
    }
}
