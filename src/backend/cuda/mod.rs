//! The CUDA backend: packed weights, BF16 tensor cores for every format, everything of a pass on the device.
//!
//! The driver is found at run time and the kernels are embedded (`images/`), so nothing but a driver is needed. Sources are in
//! `kernels/`; `standin/` compiles the same sources for the CPU, as a driver library that needs no GPU.
//! **No GPU has run this yet.** docs/cuda.md says what was checked, and how.

mod attention;
mod blas;
mod cache;
mod driver;
mod elementwise;
mod exchange;
mod graph;
mod libraries;
mod mixture;
mod narrow;
mod nccl;
mod product;
mod recurrent;
mod sample;
mod staging;
mod table;
mod weight;

use std::sync::{Arc, Mutex, PoisonError};

pub use blas::{Blas, Library, Numbers, Side};
pub use cache::CudaCache;
use driver::Args;
pub use driver::{Device, MEMORY, Memory};
use product::Operand;
pub use recurrent::{CudaDeltaNet, CudaMamba};
pub use staging::Staging;
pub use table::TABLE_TOKENS;
use table::{KERNELS, NARROW_KERNELS, TCGEN_KERNELS, kernel, suffix};
pub use weight::CudaLinear;
use weight::{Kind, STEP};

use recoup_ground::divergence::{Pair, RowError};

use super::{
    Activation, AttentionShape, Backend, BackendError, Batch, CacheLayout, DeltaInputs, DeltaNetShape, DeltaNetWeights,
    Ffn, HeadParameters, Mamba2Shape, Mamba2Weights, PAGE, Result, RopeTable, Rotation, Run, Span, Update, exactly,
    expanded_by_parts, mixture_by_expert, one,
};
use crate::formats::linear::LinearTensors;
use crate::logits::{Draw, RouterRule, Routing, Sampled, SamplingError, Scratch, TokenScore};
use crate::ranks::Link;

/// Tokens of a run, consecutive ones of a sequence whose rows (query heads that share keys) make blocks: any number will do;
/// this one leaves no block of 32 rows incomplete.
const RUN: usize = 32;

/// Runs the decoder on one GPU. Clones share it.
#[derive(Clone)]
pub struct CudaBackend {
    device: Arc<Device>,
    /// Where the weights of mixtures lie, as kernels read it.
    mixtures: Arc<mixture::Tables>,
    /// Which columns rearranged tensors are made of.
    columns: Arc<elementwise::Columns>,
    narrow: Narrow,
    /// How it exchanges with other ranks.
    road: exchange::Road,
}

/// Tensor cores that multiply what both sides have in their formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Narrow {
    /// None of them: BF16's compute everything.
    None,
    /// FP4's and FP8's of sm_120's family (kernels/narrow.cu).
    Mma,
    /// FP4's of sm_100's family and of sm_110 (kernels/tcgen.cu).
    Tcgen,
}

impl Narrow {
    /// Their formats, if there are any.
    #[must_use]
    pub fn formats(self) -> Option<&'static str> {
        match self {
            Self::None => None,
            Self::Mma => Some("FP4 and FP8"),
            Self::Tcgen => Some("FP4"),
        }
    }
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

impl CudaBackend {
    /// The backend on device `ordinal`; with its FP4 and FP8 tensor cores, if there are kernels for them, unless `RECOUP_CUDA_NARROW` is 0.
    ///
    /// # Errors
    /// No driver, one that is too old, no such device, or one that cannot run the kernels.
    pub fn new(ordinal: usize) -> Result<Self> {
        let more = [&NARROW_KERNELS[..], &TCGEN_KERNELS[..]].concat();
        let device = Arc::new(Device::open(ordinal, &KERNELS, &more)?);
        let wanted = std::env::var_os("RECOUP_CUDA_NARROW").is_none_or(|v| v != "0");
        let has = |kernels: &[&str]| wanted && kernels.iter().all(|name| device.has(name));
        let narrow = if has(&NARROW_KERNELS) {
            Narrow::Mma
        } else if has(&TCGEN_KERNELS) {
            Narrow::Tcgen
        } else {
            Narrow::None
        };
        let (mixtures, columns, road) = Default::default();
        Ok(Self { device, mixtures, columns, narrow, road })
    }

    /// Which FP4 and FP8 tensor cores compute what they can.
    #[must_use]
    pub fn narrow(&self) -> Narrow {
        self.narrow
    }

    /// Which kernels compute, for keys of results: the beginning of their hash, and whether those for FP4 and FP8 tensor cores are among them.
    #[must_use]
    pub fn kernels(&self) -> String {
        let narrow = match self.narrow {
            Narrow::None => "",
            Narrow::Mma => " narrow",
            Narrow::Tcgen => " tcgen",
        };
        self.device.kernels() + narrow
    }

    /// The same device, on which BF16 tensor cores compute everything. Linears that are loaded stay what they are.
    #[must_use]
    pub fn without_narrow(&self) -> Self {
        Self { narrow: Narrow::None, ..self.clone() }
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
        CudaLinear::load(&self.device, self.narrow, &tensors)
    }

    fn joined(self, world: &dyn Link, team: &dyn Link) -> Result<Self> {
        let road = exchange::Road::of(&self, world, team)?;
        Ok(Self { road, ..self })
    }

    fn abandon(&self) {
        // What is never put away waits for nobody.
        std::mem::forget(self.road.clone());
    }

    fn exchanges_by(&self) -> Option<String> {
        self.road.said()
    }

    fn spread_rows(&self, link: &dyn Link, own: &[CudaTensor], rows: &[usize], columns: usize) -> Result<CudaTensor> {
        match self.spread_rows_by(link, own, rows, columns)? {
            Some(all) => Ok(all),
            None => super::exchange::spread_rows(self, link, own, rows, columns),
        }
    }

    fn spread_columns(
        &self,
        link: &dyn Link,
        own: Option<&CudaTensor>,
        pieces: &[(usize, usize)],
        shape: (usize, usize),
    ) -> Result<CudaTensor> {
        match self.spread_columns_by(link, own, pieces, shape)? {
            Some(all) => Ok(all),
            None => super::exchange::spread_columns(self, link, own, pieces, shape),
        }
    }

    fn give(&self, link: &dyn Link, to: usize, x: &CudaTensor) -> Result<()> {
        if !self.give_by(link, to, x)? {
            super::exchange::give(self, link, to, x)?;
        }
        Ok(())
    }

    fn take(&self, link: &dyn Link, from: usize, shape: (usize, usize)) -> Result<CudaTensor> {
        match self.take_by(link, from, shape)? {
            Some(x) => Ok(x),
            None => super::exchange::take(self, link, from, shape),
        }
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
