//! One model over several ranks, each with a backend of its own: processes of MPI, or threads with a GPU each.
//!
//! A rank has rows of weights, heads, experts or layers, and computes whole outputs of them; what others need of them is put side by
//! side (a concatenation, never a sum), so that every bit is what one rank alone would compute. The first rank runs the model: it is
//! a [`Backend`], of which every operation is told to the others (`op.rs`), which know of no model (`rank.rs`). It reads the files as
//! well, and sends each its rows.

mod op;
pub mod paper;
mod plan;
mod rank;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use recoup_ground::divergence::{Pair, RowError};

use self::op::{Arg, CacheStages, Id, LinearFacts, Op};
pub use self::plan::{Cut, Piece, Plan, Rows, Size, heads};
use self::rank::{Rank, failed};
use super::{
    Activation, AttentionShape, Backend, BackendError, Batch, CacheLayout, DeltaInputs, DeltaNetShape, DeltaNetWeights,
    Ffn, Mamba2Shape, Mamba2Weights, Result, Rotation, Run, Span, Stored, mixture_by_expert,
};
use crate::formats::linear::{BlockScales, LinearTensors};
use crate::logits::{Draw, RankedScore, RouterRule, Routing, Sampled, SamplingError, Scratch, TokenScore};
use crate::ranks::{Link, ROOT};

/// The first of several ranks. Clones are the same ranks.
pub struct Parallel<B: Backend> {
    shared: Arc<Shared<B>>,
    plan: Arc<Plan>,
}

impl<B: Backend> Clone for Parallel<B> {
    fn clone(&self) -> Self {
        Self { shared: self.shared.clone(), plan: self.plan.clone() }
    }
}

struct Shared<B: Backend> {
    state: Mutex<State<B>>,
    size: Size,
    name: &'static str,
    gone: Arc<Mutex<Vec<Id>>>,
    /// Ranks that are threads of this process.
    threads: Mutex<Vec<std::thread::JoinHandle<()>>>,
}

struct State<B: Backend> {
    rank: Rank<B>,
    next: Id,
    /// What this rank alone came upon in the midst of an operation: the others are not where it is any more.
    broken: Option<String>,
}

/// Something that all ranks hold, until nobody asks for it.
struct Owned {
    id: Id,
    gone: Arc<Mutex<Vec<Id>>>,
}

impl Drop for Owned {
    fn drop(&mut self) {
        locked(&self.gone).push(self.id);
    }
}

/// Something that all ranks hold.
#[derive(Clone)]
pub struct Handle(Arc<Owned>);

impl Handle {
    fn id(&self) -> Id {
        self.0.id
    }

    fn arg(&self) -> Arg {
        Arg { id: self.id(), last: false }
    }

    /// As what is given away: if nobody else has it, nobody reads it after this.
    fn given(self) -> Arg {
        Arg { id: self.id(), last: Arc::strong_count(&self.0) == 1 }
    }
}

/// A weight, and what is asked of it.
pub struct Weight {
    handle: Handle,
    k: usize,
    bytes: usize,
    integers: bool,
    /// Whether all of it is at one rank of its stage.
    owned: bool,
}

/// Rows that say how a weight is kept, where the first rank has none of it.
const PROBED: usize = 256;

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<B: Backend> Parallel<B> {
    /// The first of the ranks of `link`, which are as many as `size` says; the others call [`help`] at the same time.
    ///
    /// # Errors
    /// When the backend cannot reach those of the others.
    pub fn new(backend: B, link: Arc<dyn Link>, size: Size) -> Result<Self> {
        let name = backend.name();
        let state = State { rank: Rank::new(backend, link, size)?, next: 0, broken: None };
        let shared = Shared { state: Mutex::new(state), size, name, gone: Arc::default(), threads: Mutex::default() };
        Ok(Self { shared: Arc::new(shared), plan: Arc::default() })
    }

    /// Waits for these ranks, which are threads, at the end.
    pub fn wait_for(&self, threads: Vec<std::thread::JoinHandle<()>>) {
        locked(&self.shared.threads).extend(threads);
    }

    /// The same ranks for a model of which `plan` says who has what.
    #[must_use]
    pub fn with_plan(&self, plan: Plan) -> Self {
        Self { shared: self.shared.clone(), plan: Arc::new(plan) }
    }

    /// How many ranks there are.
    #[must_use]
    pub fn size(&self) -> Size {
        self.shared.size
    }

    /// What is read of this rank's own backend.
    pub fn own<T>(&self, read: impl FnOnce(&B) -> T) -> T {
        read(locked(&self.shared.state).rank.backend())
    }

    fn tensor_of(&self, op: impl FnOnce(Id) -> Op) -> Result<Handle> {
        let mut state = locked(&self.shared.state);
        let handle = self.shared.handle(&mut state);
        self.shared.run(&mut state, op(handle.id()))?;
        Ok(handle)
    }

    fn run(&self, op: Op) -> Result<()> {
        self.shared.run(&mut locked(&self.shared.state), op)
    }

    /// What `read` says of a tensor, all of it.
    fn read<T>(&self, x: &Handle, read: impl FnOnce(&B, &B::Tensor) -> Result<T>) -> Result<T> {
        let mut state = locked(&self.shared.state);
        self.shared.collect(&mut state, x.id())?;
        read(state.rank.backend(), state.rank.held(x.id())?)
    }

    fn load(&self, linear: LinearTensors<'_>, stored: Option<Box<dyn Stored>>) -> Result<Weight> {
        let unit = plan::unit(matches!(linear.block_scales, BlockScales::Grid { .. }));
        let (stage, cut) = self.plan.place_by(&linear.name, linear.n, self.shared.size.tensor, unit);
        let (n, k) = (linear.n, linear.k);
        let owned = cut.as_ref().is_none_or(|cut| cut.owner().is_some());
        let mut state = locked(&self.shared.state);
        let handle = self.shared.handle(&mut state);
        let op = Op::Linear { to: handle.id(), stage, n, k, cut: cut.clone() };
        state.rank.note(&op)?;
        let (world, members) = (state.rank.world().clone(), state.rank.members(stage));
        let mut own = None;
        for (at, member) in members.enumerate() {
            let (first, count) = cut.as_ref().map_or((0, n), |cut| cut.0[at]);
            if member == ROOT {
                own = Some((first, count));
            } else if count > 0 {
                let part = linear.rows(first, count);
                let (facts, data, codes) = LinearFacts::of(&part);
                let facts = postcard::to_allocvec(&facts).map_err(failed)?;
                [&facts, data, codes].into_iter().for_each(|bytes| world.send_bytes(member, bytes));
            }
        }
        let backend = state.rank.backend();
        let (value, probe) = match own {
            // An expert of this rank's own can be had from its file again.
            Some((0, count)) if count == n => (Some(backend.load_expert(linear, stored)?), None),
            Some((first, count)) if count > 0 => (Some(backend.load_linear(linear.rows(first, count))?), None),
            // What is asked of it is what some rows of it say: enough for what kernels pad.
            _ => (None, Some(backend.load_linear(linear.rows(0, n.min(PROBED)))?)),
        };
        let Some(known) = value.as_ref().or(probe.as_ref()) else { return Err(failed("a weight without rows")) };
        let rows = own.map_or(0, |(_, count)| count);
        let rows = if rows == 0 { n.min(PROBED) } else { rows };
        let weight = Weight {
            k,
            bytes: backend.resident_bytes(known) * n / rows,
            integers: backend.multiplies_integers(known),
            owned,
            handle: handle.clone(),
        };
        state.rank.keep(handle.id(), stage, (n, k), cut, value);
        Ok(weight)
    }
}

impl<B: Backend> Shared<B> {
    fn handle(&self, state: &mut State<B>) -> Handle {
        state.next += 1;
        Handle(Arc::new(Owned { id: state.next, gone: self.gone.clone() }))
    }

    /// Has all ranks do an operation, and forget what nobody asks for after it.
    fn run(&self, state: &mut State<B>, op: Op) -> Result<()> {
        if let Some(why) = &state.broken {
            return Err(failed(format!("they are out of step since an error of the first one ({why})")));
        }
        state.rank.note(&op)?;
        let outcome = state.rank.execute(op);
        if let Err(e) = &outcome
            && !everyones(e)
        {
            state.broken = Some(e.to_string());
            return outcome;
        }
        let gone = std::mem::take(&mut *locked(&self.gone));
        if !gone.is_empty() {
            let op = Op::Gone(gone);
            state.rank.note(&op)?;
            state.rank.execute(op)?;
        }
        outcome
    }

    fn collect(&self, state: &mut State<B>, x: Id) -> Result<()> {
        if state.rank.held(x).is_ok() { Ok(()) } else { self.run(state, Op::Collect { x }) }
    }
}

impl<B: Backend> Drop for Shared<B> {
    fn drop(&mut self) {
        let mut state = locked(&self.state);
        if state.broken.is_some() {
            // Who waits for what never comes cannot be told anything, and ends when this process has said why it ends.
            std::mem::forget(state.rank.world().clone());
            state.rank.backend().abandon();
            return;
        }
        // Nothing is left to be told if it cannot be told.
        let _ = state.rank.note(&Op::End);
        locked(&self.threads).drain(..).for_each(|thread| drop(thread.join()));
    }
}

/// Whether every rank comes upon an error, at the same place: it is of what was asked, not of a rank.
fn everyones(e: &BackendError) -> bool {
    matches!(
        e,
        BackendError::Unsupported { .. } | BackendError::TokenOutOfRange { .. } | BackendError::CacheTooSmall { .. }
    )
}

/// What every rank but the first one does, until the first one needs nobody any more.
///
/// # Errors
/// What this rank alone came upon, such as too little memory: the others wait for it in vain then, and have to be ended.
pub fn help<B: Backend>(backend: B, link: Arc<dyn Link>, size: Size) -> Result<()> {
    let mut rank = Rank::new(backend, link.clone(), size)?;
    let outcome = follow(&mut rank, &*link);
    if outcome.is_err() {
        rank.backend().abandon();
    }
    outcome
}

/// Does what the first rank says, until the end.
fn follow<B: Backend>(rank: &mut Rank<B>, link: &dyn Link) -> Result<()> {
    loop {
        let mut message = Vec::new();
        link.broadcast(&mut message);
        let mut rest = &message[..];
        while !rest.is_empty() {
            let (op, others) = Op::read(rest).map_err(failed)?;
            rest = others;
            if matches!(op, Op::End) {
                return Ok(());
            }
            match rank.execute(op) {
                // The first rank says so.
                Err(e) if !everyones(&e) => return Err(e),
                _ => (),
            }
        }
    }
}

impl<B: Backend> Backend for Parallel<B> {
    type Tensor = Handle;
    type Linear = Weight;
    type Vector = Handle;
    type Mamba = Handle;
    type DeltaNet = Handle;
    type Cache = Handle;
    type Rope = Handle;
    type Pass = Handle;

    fn name(&self) -> &'static str {
        self.shared.name
    }

    fn exchanges_by(&self) -> Option<String> {
        self.own(B::exchanges_by)
    }

    fn load_linear(&self, tensors: LinearTensors<'_>) -> Result<Weight> {
        self.load(tensors, None)
    }

    fn load_expert(&self, tensors: LinearTensors<'_>, stored: Option<Box<dyn Stored>>) -> Result<Weight> {
        self.load(tensors, stored)
    }

    fn inputs(&self, linear: &Weight) -> usize {
        linear.k
    }

    fn multiplies_integers(&self, linear: &Weight) -> bool {
        linear.integers
    }

    fn resident_bytes(&self, linear: &Weight) -> usize {
        linear.bytes
    }

    fn load_vector(&self, values: Vec<f32>) -> Result<Handle> {
        self.tensor_of(|to| Op::Vector { to, values })
    }

    fn load_mamba(&self, shape: Mamba2Shape, weights: Mamba2Weights) -> Result<Handle> {
        self.tensor_of(|to| Op::Mamba { to, shape, weights })
    }

    fn load_delta_net(&self, shape: DeltaNetShape, weights: DeltaNetWeights) -> Result<Handle> {
        self.tensor_of(|to| Op::DeltaNet { to, shape, weights })
    }

    fn load_rope(&self, rotation: Rotation) -> Result<Handle> {
        self.tensor_of(|to| Op::Rope { to, rotation })
    }

    fn new_cache(&self, layout: &CacheLayout) -> Result<Handle> {
        let stages = |of: &[usize], count: usize| (0..count).map(|i| of.get(i).copied().unwrap_or(0)).collect();
        let stages = CacheStages {
            attention: stages(&self.plan.caches, layout.layers.len()),
            recurrent: stages(&self.plan.recurrent, layout.recurrent.len()),
        };
        self.tensor_of(|to| Op::Cache { to, layout: layout.clone(), stages })
    }

    fn grow(&self, cache: &mut Handle, pages: usize, slots: usize) -> Result<()> {
        self.run(Op::Grow { cache: cache.id(), pages, slots })
    }

    fn copy_state(&self, cache: &mut Handle, from: u32, to: u32) -> Result<()> {
        self.run(Op::CopyState { cache: cache.id(), from, into: to })
    }

    fn fork(&self, cache: &mut Handle, from: &Span, to: &Span) -> Result<()> {
        self.run(Op::Fork { cache: cache.id(), from: from.clone(), into: to.clone() })
    }

    fn prepare(&self, batch: &Batch, ropes: &[&Handle]) -> Result<Handle> {
        let ropes = ropes.iter().map(|r| r.id()).collect();
        self.tensor_of(|to| Op::Prepare { to, batch: batch.clone(), ropes })
    }

    fn embed(&self, table: &Weight, pass: &Handle) -> Result<Handle> {
        self.tensor_of(|to| Op::Embed { to, table: table.handle.id(), pass: pass.id() })
    }

    fn rms_norm(&self, x: &Handle, weight: &Handle, eps: f32) -> Result<Handle> {
        self.tensor_of(|to| Op::RmsNorm { to, x: x.arg(), weight: weight.id(), eps })
    }

    fn linears(&self, x: &Handle, weights: &[&Weight]) -> Result<Vec<Handle>> {
        let mut state = locked(&self.shared.state);
        let outputs: Vec<Handle> = weights.iter().map(|_| self.shared.handle(&mut state)).collect();
        let op = Op::Linears {
            to: outputs.iter().map(Handle::id).collect(),
            x: x.arg(),
            weights: weights.iter().map(|w| w.handle.id()).collect(),
        };
        self.shared.run(&mut state, op)?;
        Ok(outputs)
    }

    fn attention(
        &self,
        q: Handle,
        k: Handle,
        v: Handle,
        sinks: Option<&Handle>,
        shape: &AttentionShape,
        pass: &Handle,
        cache: &mut Handle,
    ) -> Result<Handle> {
        let qkv = [q, k, v].map(Handle::given);
        let (sinks, pass, cache) = (sinks.map(Handle::id), pass.id(), cache.id());
        self.tensor_of(|to| Op::Attention { to, qkv, sinks, shape: *shape, pass, cache })
    }

    fn rotated(&self, k: &Handle, shape: &AttentionShape, pass: &Handle) -> Result<Vec<f32>> {
        let mut state = locked(&self.shared.state);
        self.shared.collect(&mut state, k.id())?;
        let rank = &state.rank;
        rank.backend().rotated(rank.held(k.id())?, shape, rank.pass(pass.id())?)
    }

    fn add(&self, x: Handle, y: &Handle) -> Result<Handle> {
        let (x, y) = (x.given(), y.arg());
        self.tensor_of(|to| Op::Add { to, x, y })
    }

    fn silu_mul(&self, gate: Handle, up: &Handle) -> Result<Handle> {
        let (gate, up) = (gate.given(), up.arg());
        self.tensor_of(|to| Op::SiluMul { to, gate, up })
    }

    fn route(&self, logits: &Handle, rule: &RouterRule) -> Result<Vec<Routing>> {
        self.read(logits, |backend, logits| backend.route(logits, rule))
    }

    fn select_rows(&self, x: &Handle, rows: &[usize]) -> Result<Handle> {
        self.tensor_of(|to| Op::SelectRows { to, x: x.arg(), rows: rows.to_vec() })
    }

    fn add_rows(&self, sum: Handle, y: &Handle, rows: &[usize], weights: &[f32]) -> Result<Handle> {
        let (sum, y) = (sum.given(), y.arg());
        self.tensor_of(|to| Op::AddRows { to, sum, y, rows: rows.to_vec(), weights: weights.to_vec() })
    }

    fn zeros_like(&self, x: &Handle) -> Result<Handle> {
        self.tensor_of(|to| Op::ZerosLike { to, x: x.arg() })
    }

    fn mixture(
        &self,
        x: &Handle,
        routed: &Handle,
        router: &Weight,
        experts: &[Ffn<'_, Weight>],
        rule: &RouterRule,
    ) -> Result<Handle> {
        let Some(first) = experts.first() else { return self.zeros_like(x) };
        let activation = first.activation;
        if !experts.iter().all(|e| e.down.owned && e.activation == activation) {
            return mixture_by_expert(self, x, routed, router, experts, rule);
        }
        let id = |weight: &Weight| weight.handle.id();
        let experts = experts.iter().map(|e| (e.gate.map(id), id(e.up), id(e.down))).collect();
        let (x, routed, router, rule) = (x.arg(), routed.arg(), id(router), rule.clone());
        self.tensor_of(|to| Op::Mixture { to, x, routed, router, experts, activation, rule })
    }

    fn activate(&self, x: Handle, up: Option<&Handle>, activation: Activation) -> Result<Handle> {
        let (x, up) = (x.given(), up.map(Handle::arg));
        self.tensor_of(|to| Op::Activate { to, x, up, activation })
    }

    fn gate(&self, x: Handle, gate: &Handle) -> Result<Handle> {
        let (x, gate) = (x.given(), gate.arg());
        self.tensor_of(|to| Op::Gate { to, x, gate })
    }

    fn scale(&self, x: Handle, factor: f32) -> Result<Handle> {
        let x = x.given();
        self.tensor_of(|to| Op::Scale { to, x, factor })
    }

    fn rearrange(&self, sources: &[&Handle], runs: &[Run]) -> Result<Handle> {
        let sources = sources.iter().map(|s| s.arg()).collect();
        self.tensor_of(|to| Op::Rearrange { to, sources, runs: runs.to_vec() })
    }

    fn mamba(&self, x: Handle, mixer: &Handle, layer: usize, pass: &Handle, cache: &mut Handle) -> Result<Handle> {
        let x = x.given();
        self.tensor_of(|to| Op::Mamba2 { to, x, mixer: mixer.id(), layer, pass: pass.id(), cache: cache.id() })
    }

    fn delta_net(
        &self,
        inputs: DeltaInputs<Handle>,
        mixer: &Handle,
        layer: usize,
        pass: &Handle,
        cache: &mut Handle,
    ) -> Result<Handle> {
        let DeltaInputs { qkv, z, b, a } = inputs;
        let inputs = [qkv, z, b, a].map(Handle::given);
        self.tensor_of(|to| Op::Delta { to, inputs, mixer: mixer.id(), layer, pass: pass.id(), cache: cache.id() })
    }

    fn score(&self, logits: &Handle, picks: &[(usize, u32)]) -> Result<Vec<TokenScore>> {
        self.read(logits, |backend, logits| backend.score(logits, picks))
    }

    fn score_ranked(&self, logits: &Handle, tokens: &[u32], count: usize) -> Result<Vec<RankedScore>> {
        self.read(logits, |backend, logits| backend.score_ranked(logits, tokens, count))
    }

    fn sample(
        &self,
        logits: &Handle,
        draws: &[Draw<'_>],
        scratch: &mut Scratch,
    ) -> Result<Vec<std::result::Result<Sampled, SamplingError>>> {
        self.read(logits, |backend, logits| backend.sample(logits, draws, scratch))
    }

    fn sample_scored(
        &self,
        logits: &Handle,
        draws: &[Draw<'_>],
        scratch: &mut Scratch,
    ) -> Result<Vec<std::result::Result<Sampled, SamplingError>>> {
        self.read(logits, |backend, logits| backend.sample_scored(logits, draws, scratch))
    }

    fn compare(
        &self,
        baseline: &Handle,
        model: &Handle,
        vocab: usize,
        targets: &[u32],
    ) -> Result<Vec<std::result::Result<Pair, RowError>>> {
        let mut state = locked(&self.shared.state);
        self.shared.collect(&mut state, baseline.id())?;
        self.shared.collect(&mut state, model.id())?;
        let rank = &state.rank;
        rank.backend().compare(rank.held(baseline.id())?, rank.held(model.id())?, vocab, targets)
    }

    fn is_finite(&self, x: &Handle) -> Result<bool> {
        self.read(x, |backend, x| backend.is_finite(x))
    }

    fn squares_finite(&self, x: &Handle, width: usize) -> Result<bool> {
        self.read(x, |backend, x| backend.squares_finite(x, width))
    }

    fn tensor(&self, data: Vec<f32>, columns: usize) -> Result<Handle> {
        if columns == 0 || !data.len().is_multiple_of(columns) {
            let message = format!("{} values do not make rows of {columns}", data.len());
            return Err(BackendError::Failed { context: "tensor", message });
        }
        self.tensor_of(|to| Op::Tensor { to, columns, data })
    }

    fn to_host(&self, x: &Handle) -> Result<Vec<f32>> {
        self.read(x, |backend, x| backend.to_host(x))
    }
}
