//! The CPU backend: packed weights, every instruction set, the same bits from all of them.

mod activation;
mod attention;
mod buffer;
pub(super) mod elementwise;
pub mod isa;
mod lanes;
mod matmul;
mod memory;
pub mod packed;
mod paged;
mod peak;
pub mod recurrent;
mod threads;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

pub use attention::KvCache;
use buffer::{Buffer, BufferPool};
use isa::Isa;
use memory::Arena;
use packed::{Family, PackedLinear};
pub use paged::{CpuLinear, Usage};
use paged::{Held, Pool};
pub use peak::Peak;
use recurrent::{DeltaNet, DeltaNetInputs, Mamba2, RecurrentStates};
use threads::Threads;

use recoup_ground::divergence::{Pair, RowError, compare_rows};

use super::{
    Activation, AttentionShape, Backend, BackendError, Batch, CacheLayout, DeltaInputs, DeltaNetShape, DeltaNetWeights,
    HostPass, Mamba2Shape, Mamba2Weights, PAGE, Result, RopeTable, Rotation, Run, Span, Stored, sample_rows,
};
use crate::formats::linear::LinearTensors;
use crate::formats::{all_finite, squares_finite};
use crate::logits::{Draw, RouterRule, Routing, Sampled, SamplingError, Scratch, TokenScore};

/// Runs the decoder on packed weights with threads of its own. Clones share them.
#[derive(Clone)]
pub struct CpuBackend {
    isa: Isa,
    threads: Threads,
    buffers: BufferPool,
    weights: Arc<Arena>,
    /// Where experts are that are not always in memory; `None`: all are.
    experts: Option<Arc<Pool>>,
    /// Bytes that experts of models on these threads may still take.
    open: Arc<AtomicUsize>,
}

/// Activations, row-major.
#[derive(Clone, Debug)]
pub struct CpuTensor {
    data: Buffer,
    columns: usize,
}

/// What layers keep: keys and values in pages, recurrent states in slots.
#[derive(Debug)]
pub struct CpuCache {
    pub kv: KvCache,
    states: RecurrentStates,
}

impl CpuTensor {
    fn rows(&self) -> usize {
        self.data.len() / self.columns.max(1)
    }
}

impl CpuBackend {
    /// A backend with the given instruction set and number of threads (0: one per core).
    ///
    /// # Errors
    /// When the threads cannot be started.
    pub fn new(isa: Isa, threads: usize) -> Result<Self> {
        let threads = Threads::new(threads)
            .map_err(|e| BackendError::Failed { context: "starting threads", message: e.to_string() })?;
        Ok(Self {
            isa,
            threads,
            buffers: BufferPool::default(),
            weights: Arc::default(),
            experts: None,
            open: Arc::default(),
        })
    }

    /// The same threads for models of which `bytes` of experts are kept in memory at the most: they are packed when a token first
    /// needs them, and the least recently used give way. Results are the same bits. What is in use is in memory besides, an
    /// expert's two products.
    #[must_use]
    pub fn with_expert_memory(&self, bytes: usize) -> Self {
        Self { experts: Some(Arc::new(Pool::new(bytes, self.open.clone()))), ..self.clone() }
    }

    /// Bytes that experts of models on these threads may take and have not taken yet: memory that looks free and is not.
    #[must_use]
    pub fn open_expert_bytes(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }

    /// What of the experts is in memory, and how often they were brought in; `None` where all of them are.
    #[must_use]
    pub fn expert_usage(&self) -> Option<Usage> {
        self.experts.as_ref().map(|pool| pool.usage())
    }

    /// The instruction set in use.
    #[must_use]
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Threads in use.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.threads.count()
    }

    /// Bytes per second that the threads read from memory.
    #[must_use]
    pub fn memory_speed(&self) -> f64 {
        memory::speed(&self.threads)
    }

    /// How fast the threads multiply at best.
    #[must_use]
    pub fn peak(&self) -> Peak {
        peak::peak(self.isa, &self.threads)
    }

    /// A row's maximum, and the sum of exp(x - maximum).
    fn softmax_total(&self, row: &[f32]) -> (f32, f64) {
        let mut out = (0.0, 0.0);
        elementwise::softmax_total(self.isa, row, &mut out);
        out
    }

    /// Turns every head of queries or keys [tokens, heads · head_dim].
    fn rotate(&self, x: &mut CpuTensor, shape: &AttentionShape, pass: &HostPass) {
        let Some(rope) = shape.rope.map(|r| &pass.ropes[r]) else { return };
        let columns = x.columns;
        self.by_rows(&mut x.data, columns, |first, rows| {
            for (token, &position) in rows.chunks_exact_mut(columns).zip(&pass.positions[first..]) {
                let (cos, sin) = rope.at(position);
                elementwise::rotate(self.isa, token, shape.head_dim, cos, sin);
            }
        });
    }

    /// Whether `holds` for all rows of `columns` values, asked for many of them at once.
    fn all(&self, x: &[f32], columns: usize, holds: impl Fn(&[f32]) -> bool + Sync) -> bool {
        let piece = ((1 << 14) / columns.max(1)).max(1) * columns.max(1);
        let failed = AtomicBool::new(false);
        self.threads.run(x.len().div_ceil(piece), |i| {
            if !holds(&x[i * piece..x.len().min((i + 1) * piece)]) {
                failed.store(true, Ordering::Relaxed);
            }
        });
        !failed.into_inner()
    }

    /// Splits rows of `columns` values over the threads.
    fn by_rows(&self, out: &mut [f32], columns: usize, f: impl Fn(usize, &mut [f32]) + Sync) {
        // Below this many values one thread is done before others have woken.
        const WORTH_SPLITTING: usize = 1 << 14;
        let rows = out.len() / columns.max(1);
        if out.len() < WORTH_SPLITTING || rows < 2 {
            return f(0, out);
        }
        let per_task = rows.div_ceil(self.threads());
        self.threads.pieces(out, per_task * columns, |i, part| f(i * per_task, part));
    }
}

impl Backend for CpuBackend {
    type Tensor = CpuTensor;
    type Linear = CpuLinear;
    type Vector = Vec<f32>;
    type Mamba = Mamba2;
    type DeltaNet = DeltaNet;
    type Cache = CpuCache;
    type Rope = RopeTable;
    type Pass = HostPass;

    fn load_linear(&self, tensors: LinearTensors<'_>) -> Result<CpuLinear> {
        PackedLinear::pack(&tensors, &self.threads, &self.weights).map(CpuLinear::Kept)
    }

    fn load_expert(&self, tensors: LinearTensors<'_>, stored: Option<Box<dyn Stored>>) -> Result<CpuLinear> {
        match (&self.experts, stored) {
            (Some(pool), Some(stored)) => Pool::page(pool, &tensors, stored).map(CpuLinear::Paged),
            _ => self.load_linear(tensors),
        }
    }

    fn inputs(&self, linear: &CpuLinear) -> usize {
        linear.inputs()
    }

    fn multiplies_integers(&self, linear: &CpuLinear) -> bool {
        linear.family() == Family::Integer
    }

    fn resident_bytes(&self, linear: &CpuLinear) -> usize {
        linear.bytes()
    }

    fn name(&self) -> &'static str {
        "CPU"
    }

    fn load_vector(&self, values: Vec<f32>) -> Result<Vec<f32>> {
        Ok(values)
    }

    fn load_mamba(&self, shape: Mamba2Shape, weights: Mamba2Weights) -> Result<Mamba2> {
        Mamba2::new(shape, weights)
    }

    fn load_delta_net(&self, shape: DeltaNetShape, weights: DeltaNetWeights) -> Result<DeltaNet> {
        DeltaNet::new(shape, weights)
    }

    fn load_rope(&self, rotation: Rotation) -> Result<RopeTable> {
        Ok(RopeTable::new(rotation))
    }

    fn new_cache(&self, layout: &CacheLayout) -> Result<CpuCache> {
        let mut states = RecurrentStates::new(&layout.recurrent.iter().copied().map(Some).collect::<Vec<_>>());
        states.grow(layout.slots);
        Ok(CpuCache { kv: KvCache::new(layout), states })
    }

    fn grow(&self, cache: &mut CpuCache, pages: usize, slots: usize) -> Result<()> {
        cache.kv.grow(pages);
        cache.states.grow(slots);
        Ok(())
    }

    fn copy_state(&self, cache: &mut CpuCache, from: u32, to: u32) -> Result<()> {
        cache.states.copy(from as usize, to as usize)
    }

    fn prepare(&self, batch: &Batch, ropes: &[&RopeTable]) -> Result<HostPass> {
        Ok(HostPass::new(batch, ropes))
    }

    fn embed(&self, table: &CpuLinear, pass: &HostPass) -> Result<CpuTensor> {
        let table = table.held(&self.threads)?;
        let tokens = &pass.batch.tokens;
        // Rows of E4M3 or BF16 are decoded with K padded; one spare row takes the padding.
        let mut row = vec![0.0; table.k_padded];
        let mut data = self.buffers.take(tokens.len() * table.k);
        for (&token, out) in tokens.iter().zip(data.chunks_exact_mut(table.k)) {
            if token as usize >= table.n {
                return Err(BackendError::TokenOutOfRange { token, vocab: table.n });
            }
            table.decode_row(token as usize, &mut row);
            out.copy_from_slice(&row[..table.k]);
        }
        Ok(CpuTensor { data, columns: table.k })
    }

    fn rms_norm(&self, x: &CpuTensor, weight: &Vec<f32>, eps: f32) -> Result<CpuTensor> {
        let mut data = self.buffers.take(x.data.len());
        self.by_rows(&mut data, x.columns, |row, out| {
            let x = &x.data[row * x.columns..][..out.len()];
            elementwise::rms_norm(self.isa, x, weight, eps, out);
        });
        Ok(CpuTensor { data, columns: x.columns })
    }

    fn linears(&self, x: &CpuTensor, weights: &[&CpuLinear]) -> Result<Vec<CpuTensor>> {
        let weights = weights.iter().map(|w| w.held(&self.threads)).collect::<Result<Vec<Held<'_>>>>()?;
        let rows = x.rows();
        let mut inputs: Vec<(usize, activation::Input)> = Vec::new();
        let mut which = Vec::new();
        for (i, w) in weights.iter().map(|w| &**w).enumerate() {
            let same = |&(j, _): &(usize, _)| {
                let other: &PackedLinear = &weights[j];
                other.activation == w.activation
                    && other.family == w.family
                    && other.pre_quant_scale == w.pre_quant_scale
                    && other.rotation == w.rotation
            };
            let at = inputs.iter().position(same).unwrap_or_else(|| {
                inputs.push((i, activation::quantize(self.isa, &self.threads, &x.data, w)));
                inputs.len() - 1
            });
            which.push(at);
        }
        let mut outputs: Vec<CpuTensor> =
            weights.iter().map(|w| CpuTensor { data: self.buffers.take(rows * w.n), columns: w.n }).collect();
        let mut jobs: Vec<_> = weights
            .iter()
            .zip(&mut outputs)
            .zip(which)
            .map(|((w, out), input)| (&**w, &inputs[input].1, &mut out.data[..]))
            .collect();
        matmul::run(self.isa, &self.threads, &mut jobs, rows);
        Ok(outputs)
    }

    fn attention(
        &self,
        mut q: CpuTensor,
        mut k: CpuTensor,
        v: CpuTensor,
        sinks: Option<&Vec<f32>>,
        shape: &AttentionShape,
        pass: &HostPass,
        cache: &mut CpuCache,
    ) -> Result<CpuTensor> {
        let cache = &mut cache.kv;
        for span in &pass.batch.spans {
            let needed = span.start + span.len;
            let pages_fit = span.pages.iter().all(|&p| (p as usize + 1) * PAGE <= cache.capacity());
            if span.pages.len() * PAGE < needed || !pages_fit {
                return Err(BackendError::CacheTooSmall { capacity: cache.capacity(), needed });
            }
        }
        self.rotate(&mut q, shape, pass);
        self.rotate(&mut k, shape, pass);
        if let Some(growth) = shape.growth {
            let columns = q.columns;
            for (query, &position) in q.data.chunks_exact_mut(columns).zip(&pass.positions) {
                let factor = growth.at(position);
                query.iter_mut().for_each(|v| *v *= factor);
            }
        }
        cache.write(shape.cache, &pass.batch, &k.data, &v.data);
        let columns = shape.heads * cache.value_dim(shape.cache);
        let mut data = self.buffers.take(q.rows() * columns);
        let sinks = sinks.map(Vec::as_slice);
        attention::attend(self.isa, &self.threads, cache, shape, sinks, &pass.batch, &q.data, &mut data);
        Ok(CpuTensor { data, columns })
    }

    fn rotated(&self, k: &CpuTensor, shape: &AttentionShape, pass: &HostPass) -> Result<Vec<f32>> {
        let mut k = k.clone();
        self.rotate(&mut k, shape, pass);
        self.to_host(&k)
    }

    fn fork(&self, cache: &mut CpuCache, from: &Span, to: &Span) -> Result<()> {
        let cache = &mut cache.kv;
        if !to.start.is_multiple_of(PAGE) {
            let page = to.start / PAGE;
            cache.copy_page(from.pages[page], to.pages[page]);
        }
        Ok(())
    }

    fn score(&self, logits: &CpuTensor, picks: &[(usize, u32)]) -> Result<Vec<TokenScore>> {
        if let Some(&(_, token)) = picks.iter().find(|p| p.1 as usize >= logits.columns) {
            return Err(BackendError::TokenOutOfRange { token, vocab: logits.columns });
        }
        let row = |row: usize| &logits.data[row * logits.columns..][..logits.columns];
        let mut totals = vec![(0.0, 0.0); logits.rows()];
        self.threads.pieces(&mut totals, 1, |r, total| total[0] = self.softmax_total(row(r)));
        Ok(picks.iter().map(|&(r, token)| elementwise::token_score(row(r), token, totals[r])).collect())
    }

    fn add(&self, mut x: CpuTensor, y: &CpuTensor) -> Result<CpuTensor> {
        let columns = x.columns;
        self.by_rows(&mut x.data, columns, |row, x| elementwise::add(self.isa, x, &y.data[row * columns..][..x.len()]));
        Ok(x)
    }

    fn silu_mul(&self, mut gate: CpuTensor, up: &CpuTensor) -> Result<CpuTensor> {
        let columns = gate.columns;
        self.by_rows(&mut gate.data, columns, |row, gate| {
            elementwise::silu_mul(self.isa, gate, &up.data[row * columns..][..gate.len()]);
        });
        Ok(gate)
    }

    fn route(&self, logits: &CpuTensor, rule: &RouterRule) -> Result<Vec<Routing>> {
        let rows = logits.data.chunks_exact(logits.columns);
        Ok(rows.map(|row| rule.route(row)).collect())
    }

    fn sample(
        &self,
        logits: &CpuTensor,
        draws: &[Draw<'_>],
        scratch: &mut Scratch,
    ) -> Result<Vec<std::result::Result<Sampled, SamplingError>>> {
        Ok(sample_rows(&logits.data, draws, scratch))
    }

    fn compare(
        &self,
        baseline: &CpuTensor,
        model: &CpuTensor,
        vocab: usize,
        targets: &[u32],
    ) -> Result<Vec<std::result::Result<Pair, RowError>>> {
        let rows = baseline.rows().min(model.rows());
        let mut pairs: Vec<_> = targets.iter().take(rows).map(|_| None).collect();
        fn row(x: &CpuTensor, i: usize, vocab: usize) -> &[f32] {
            &x.data[i * x.columns..][..vocab]
        }
        self.threads.pieces(&mut pairs, 1, |i, pair| {
            pair[0] = Some(compare_rows(row(baseline, i, vocab), row(model, i, vocab), targets[i] as usize));
        });
        Ok(pairs.into_iter().flatten().collect())
    }

    fn activate(&self, mut x: CpuTensor, up: Option<&CpuTensor>, activation: Activation) -> Result<CpuTensor> {
        let columns = x.columns;
        let up = up.map(|u| &u.data[..]).unwrap_or_default();
        self.by_rows(&mut x.data, columns, |row, x| {
            let up = up.get(row * columns..row * columns + x.len()).unwrap_or_default();
            match activation {
                Activation::Silu => elementwise::silu_mul(self.isa, x, up),
                Activation::GeluTanh => elementwise::gelu_tanh_mul(self.isa, x, up),
                Activation::Relu2 => elementwise::relu2(self.isa, x),
                Activation::ClampedSwiglu { limit } => elementwise::clamped_swiglu(self.isa, x, up, limit),
            }
        });
        Ok(x)
    }

    fn gate(&self, mut x: CpuTensor, gate: &CpuTensor) -> Result<CpuTensor> {
        let (columns, width) = (x.columns, gate.columns);
        self.by_rows(&mut x.data, columns, |row, x| {
            let gate = &gate.data[row * width..][..x.len() / columns * width];
            match width {
                1 => elementwise::sigmoid_mul_rows(self.isa, x, gate, columns),
                _ => elementwise::sigmoid_mul(self.isa, x, gate),
            }
        });
        Ok(x)
    }

    fn scale(&self, mut x: CpuTensor, factor: f32) -> Result<CpuTensor> {
        x.data.iter_mut().for_each(|v| *v *= factor);
        Ok(x)
    }

    fn rearrange(&self, sources: &[&CpuTensor], runs: &[Run]) -> Result<CpuTensor> {
        let columns: usize = runs.iter().map(|r| r.count).sum();
        let rows = sources.first().map_or(0, |s| s.rows());
        let mut data = self.buffers.take(rows * columns);
        for (row, out) in data.chunks_exact_mut(columns.max(1)).enumerate() {
            let mut at = 0;
            for &Run { source, first, count } in runs {
                let source = sources[source];
                let from = &source.data[row * source.columns + first..][..count];
                out[at..at + count].copy_from_slice(from);
                at += count;
            }
        }
        Ok(CpuTensor { data, columns })
    }

    fn mamba(
        &self,
        x: CpuTensor,
        mixer: &Mamba2,
        layer: usize,
        pass: &HostPass,
        cache: &mut CpuCache,
    ) -> Result<CpuTensor> {
        let columns = mixer.shape().inner();
        let mut data = self.buffers.take(x.rows() * columns);
        let (spans, states) = (recurrent::spans(&pass.batch), &mut cache.states);
        mixer.run(self.isa, &self.threads, &self.buffers, &x.data, &spans, states, layer, &mut data)?;
        Ok(CpuTensor { data, columns })
    }

    fn delta_net(
        &self,
        inputs: DeltaInputs<CpuTensor>,
        mixer: &DeltaNet,
        layer: usize,
        pass: &HostPass,
        cache: &mut CpuCache,
    ) -> Result<CpuTensor> {
        let columns = mixer.shape().inner();
        let mut data = self.buffers.take(inputs.z.rows() * columns);
        let DeltaInputs { qkv, z, b, a } = &inputs;
        let inputs = DeltaNetInputs { qkv: &qkv.data, z: &z.data, a: &a.data, b: &b.data };
        let (spans, states) = (recurrent::spans(&pass.batch), &mut cache.states);
        mixer.run(self.isa, &self.threads, &self.buffers, inputs, &spans, states, layer, &mut data)?;
        Ok(CpuTensor { data, columns })
    }

    fn select_rows(&self, x: &CpuTensor, rows: &[usize]) -> Result<CpuTensor> {
        let mut data = self.buffers.take(rows.len() * x.columns);
        for (&r, out) in rows.iter().zip(data.chunks_exact_mut(x.columns)) {
            out.copy_from_slice(&x.data[r * x.columns..][..x.columns]);
        }
        Ok(CpuTensor { data, columns: x.columns })
    }

    fn add_rows(&self, mut sum: CpuTensor, y: &CpuTensor, rows: &[usize], weights: &[f32]) -> Result<CpuTensor> {
        let columns = sum.columns;
        for ((y, &row), &weight) in y.data.chunks_exact(columns).zip(rows).zip(weights) {
            elementwise::add_scaled(self.isa, &mut sum.data[row * columns..][..columns], y, weight);
        }
        Ok(sum)
    }

    fn zeros_like(&self, x: &CpuTensor) -> Result<CpuTensor> {
        Ok(CpuTensor { data: self.buffers.zeros(x.data.len()), columns: x.columns })
    }

    fn is_finite(&self, x: &CpuTensor) -> Result<bool> {
        Ok(self.all(&x.data, 1, all_finite))
    }

    fn squares_finite(&self, x: &CpuTensor, width: usize) -> Result<bool> {
        Ok(self.all(&x.data, width, |rows| squares_finite(rows, width)))
    }

    fn tensor(&self, data: Vec<f32>, columns: usize) -> Result<CpuTensor> {
        if columns == 0 || !data.len().is_multiple_of(columns) {
            let message = format!("{} values do not make rows of {columns}", data.len());
            return Err(BackendError::Failed { context: "tensor", message });
        }
        Ok(CpuTensor { data: self.buffers.adopt(data), columns })
    }

    fn to_host(&self, x: &CpuTensor) -> Result<Vec<f32>> {
        Ok(x.data.to_vec())
    }
}
