//! One of several ranks: does its part of every operation.
//!
//! All ranks know of every tensor where it is, how long it is and how it is cut, so that all see alike what has to go between them.

mod layers;

use std::collections::HashMap;
use std::sync::Arc;

use super::op::{Arg, CacheStages, Id, LinearFacts, Op};
use super::plan::{Cut, Size, heads};
use crate::backend::{Activation, Backend, BackendError, Batch, CacheLayout, LayerCache, Result, Run};
use crate::ranks::{Link, ROOT};

/// A tensor: of the ranks of `stage`, each of which has all of it, or what `cut` says.
#[derive(Clone)]
struct Entry<T> {
    stage: usize,
    rows: usize,
    columns: usize,
    cut: Option<Cut>,
    /// What this rank has; `None`: nothing.
    value: Option<T>,
}

struct Weight<L> {
    stage: usize,
    n: usize,
    k: usize,
    cut: Option<Cut>,
    value: Option<L>,
}

/// Numbers that all ranks have, and parts of them in the place of which they stand.
struct Numbers<V> {
    values: Vec<f32>,
    whole: V,
    parts: HashMap<(usize, usize), V>,
}

struct Pass<P> {
    batch: Batch,
    value: P,
}

struct Cache<C> {
    stages: CacheStages,
    layers: Vec<LayerCache>,
    value: C,
}

/// Takes part in what several ranks do.
pub(super) struct Rank<B: Backend> {
    backend: B,
    size: Size,
    /// All ranks, and those of this one's stage.
    world: Arc<dyn Link>,
    team: Arc<dyn Link>,
    stage: usize,
    tensors: HashMap<Id, Entry<B::Tensor>>,
    weights: HashMap<Id, Weight<B::Linear>>,
    numbers: HashMap<Id, Numbers<B::Vector>>,
    /// Mixers, and the columns of what they give.
    mambas: HashMap<Id, (usize, B::Mamba)>,
    nets: HashMap<Id, B::DeltaNet>,
    ropes: HashMap<Id, B::Rope>,
    passes: HashMap<Id, Pass<B::Pass>>,
    caches: HashMap<Id, Cache<B::Cache>>,
    /// At the first rank: what the others have not been told yet.
    untold: Vec<u8>,
    /// At the first rank: tensors of other stages that it was given to read.
    read: HashMap<Id, B::Tensor>,
}

/// Bytes of operations that others may be behind with.
const MOST_UNTOLD: usize = 1 << 16;

pub(super) fn failed(e: impl std::fmt::Display) -> BackendError {
    BackendError::Failed { context: "several ranks", message: e.to_string() }
}

fn unknown(what: &str) -> BackendError {
    BackendError::Failed { context: "several ranks", message: format!("asked for a {what} that is not there") }
}

fn get<'a, T>(of: &'a HashMap<Id, T>, id: Id, what: &str) -> Result<&'a T> {
    of.get(&id).ok_or_else(|| unknown(what))
}

fn get_mut<'a, T>(of: &'a mut HashMap<Id, T>, id: Id, what: &str) -> Result<&'a mut T> {
    of.get_mut(&id).ok_or_else(|| unknown(what))
}

/// Some of some numbers.
fn part<V>(numbers: &HashMap<Id, Numbers<V>>, id: Id, piece: (usize, usize)) -> Result<&V> {
    let numbers = get(numbers, id, "vector")?;
    Ok(numbers.parts.get(&piece).unwrap_or(&numbers.whole))
}

/// The index among the layers of `stage` of layer `index`; and how many there are before it.
fn local(stages: &[usize], index: usize) -> (usize, usize) {
    let stage = stages.get(index).copied().unwrap_or(0);
    (stage, stages.iter().take(index).filter(|s| **s == stage).count())
}

impl<B: Backend> Rank<B> {
    /// Called by all ranks of `world`, which are as many as `size` says.
    ///
    /// # Errors
    /// When the backend cannot reach the others'.
    pub fn new(backend: B, world: Arc<dyn Link>, size: Size) -> Result<Self> {
        let stage = size.stage_of(world.rank());
        let team = world.split(stage);
        let backend = backend.joined(&*world, &*team)?;
        Ok(Self {
            backend,
            size,
            world,
            team,
            stage,
            tensors: HashMap::new(),
            weights: HashMap::new(),
            numbers: HashMap::new(),
            mambas: HashMap::new(),
            nets: HashMap::new(),
            ropes: HashMap::new(),
            passes: HashMap::new(),
            caches: HashMap::new(),
            untold: Vec::new(),
            read: HashMap::new(),
        })
    }

    pub fn backend(&self) -> &B {
        &self.backend
    }

    pub fn world(&self) -> &Arc<dyn Link> {
        &self.world
    }

    fn me(&self) -> usize {
        self.team.rank()
    }

    /// At the first rank: keeps an operation to tell the others of.
    pub fn note(&mut self, op: &Op) -> Result<()> {
        self.untold = op.write(std::mem::take(&mut self.untold)).map_err(failed)?;
        if op.is_urgent() || self.untold.len() > MOST_UNTOLD {
            self.tell();
        }
        Ok(())
    }

    /// Tells the others what they have not been told yet, as they have to be before anything goes between ranks.
    fn tell(&mut self) {
        if !self.untold.is_empty() {
            self.world.broadcast(&mut self.untold);
            self.untold.clear();
        }
    }

    /// The ranks of a stage.
    pub fn members(&self, stage: usize) -> std::ops::Range<usize> {
        stage * self.size.tensor..(stage + 1) * self.size.tensor
    }

    /// Keeps what this rank has of a weight.
    pub fn keep(&mut self, to: Id, stage: usize, (n, k): (usize, usize), cut: Option<Cut>, value: Option<B::Linear>) {
        self.weights.insert(to, Weight { stage, n, k, cut, value });
    }

    /// A tensor that the first rank has all of.
    pub fn held(&self, id: Id) -> Result<&B::Tensor> {
        let entry = get(&self.tensors, id, "tensor")?;
        let own = entry.value.as_ref().filter(|_| entry.cut.is_none());
        own.or_else(|| self.read.get(&id)).ok_or_else(|| unknown("tensor of this rank"))
    }

    /// A tensor's rows and columns.
    pub fn shape(&self, id: Id) -> Result<(usize, usize)> {
        get(&self.tensors, id, "tensor").map(|e| (e.rows, e.columns))
    }

    pub fn pass(&self, id: Id) -> Result<&B::Pass> {
        get(&self.passes, id, "pass").map(|p| &p.value)
    }

    /// Gives every rank of a tensor's stage all of it.
    fn whole(&mut self, id: Id) -> Result<()> {
        let entry = get_mut(&mut self.tensors, id, "tensor")?;
        let Some(cut) = entry.cut.take() else { return Ok(()) };
        let (here, rows, columns) = (entry.stage == self.stage, entry.rows, entry.columns);
        let value = entry.value.take();
        self.tell();
        if !here {
            return Ok(());
        }
        let value = self.backend.spread_columns(&*self.team, value.as_ref(), &cut.0, (rows, columns))?;
        get_mut(&mut self.tensors, id, "tensor")?.value = Some(value);
        Ok(())
    }

    /// Gets a tensor to the ranks of `stage`.
    fn bring(&mut self, id: Id, stage: usize) -> Result<()> {
        let from = get(&self.tensors, id, "tensor")?.stage;
        if from == stage {
            return Ok(());
        }
        self.whole(id)?;
        self.tell();
        let me = self.me();
        let entry = get_mut(&mut self.tensors, id, "tensor")?;
        entry.stage = stage;
        if self.stage == from {
            let value = entry.value.take().ok_or_else(|| unknown("tensor of this rank"))?;
            self.backend.give(&*self.world, stage * self.size.tensor + me, &value)?;
        } else if self.stage == stage {
            let shape = (entry.rows, entry.columns);
            entry.value = Some(self.backend.take(&*self.world, from * self.size.tensor + me, shape)?);
        }
        Ok(())
    }

    /// All of a tensor, at every rank of `stage`.
    fn all_at(&mut self, id: Id, stage: usize) -> Result<()> {
        self.whole(id)?;
        self.bring(id, stage)
    }

    /// A tensor as it is here; taken away, where nobody needs it after this.
    fn take(&mut self, arg: Arg) -> Result<Entry<B::Tensor>> {
        if arg.last {
            self.read.remove(&arg.id);
            return self.tensors.remove(&arg.id).ok_or_else(|| unknown("tensor"));
        }
        get(&self.tensors, arg.id, "tensor").cloned()
    }

    /// `op` of whatever this rank has of `x`, which changes no shape.
    fn each(&mut self, to: Id, x: Arg, op: impl FnOnce(&B, B::Tensor) -> Result<B::Tensor>) -> Result<()> {
        let mut entry = self.take(x)?;
        entry.value = entry.value.map(|value| op(&self.backend, value)).transpose()?;
        self.tensors.insert(to, entry);
        Ok(())
    }

    /// `op` of what this rank has of `x` and of `y`, which are cut alike.
    fn both(
        &mut self,
        to: Id,
        x: Arg,
        y: Arg,
        op: impl FnOnce(&B, B::Tensor, &B::Tensor) -> Result<B::Tensor>,
    ) -> Result<()> {
        let (stage, cut) = get(&self.tensors, x.id, "tensor").map(|e| (e.stage, e.cut.clone()))?;
        self.bring(y.id, stage)?;
        if get(&self.tensors, y.id, "tensor")?.cut != cut {
            self.whole(x.id)?;
            self.whole(y.id)?;
        }
        let y = self.take(Arg { last: false, ..y })?.value;
        self.each(to, x, |backend, x| match y {
            Some(y) => op(backend, x, &y),
            None => Err(unknown("tensor of this rank")),
        })
    }

    fn insert(
        &mut self,
        to: Id,
        stage: usize,
        (rows, columns): (usize, usize),
        cut: Option<Cut>,
        value: Option<B::Tensor>,
    ) {
        self.tensors.insert(to, Entry { stage, rows, columns, cut, value });
    }

    /// Does this rank's part of an operation.
    ///
    /// # Errors
    /// The backend's own, and what no rank has.
    pub fn execute(&mut self, op: Op) -> Result<()> {
        match op {
            Op::Gone(ids) => ids.into_iter().for_each(|id| self.forget(id)),
            Op::Linear { to, stage, n, k, cut } => self.receive(to, stage, (n, k), cut)?,
            Op::Vector { to, values } => {
                let whole = self.backend.load_vector(values.clone())?;
                self.numbers.insert(to, Numbers { values, whole, parts: HashMap::new() });
            }
            Op::Mamba { to, shape, weights } => {
                self.mambas.insert(to, (shape.inner(), self.backend.load_mamba(shape, weights)?));
            }
            Op::DeltaNet { to, shape, weights } => {
                self.nets.insert(to, self.backend.load_delta_net(shape, weights)?);
            }
            Op::Rope { to, rotation } => {
                self.ropes.insert(to, self.backend.load_rope(rotation)?);
            }
            Op::Cache { to, layout, stages } => self.new_cache(to, layout, stages)?,
            Op::Grow { cache, pages, slots } => {
                self.backend.grow(&mut get_mut(&mut self.caches, cache, "cache")?.value, pages, slots)?;
            }
            Op::CopyState { cache, from, into } => {
                let cache = get_mut(&mut self.caches, cache, "cache")?;
                if cache.stages.recurrent.contains(&self.stage) {
                    self.backend.copy_state(&mut cache.value, from, into)?;
                }
            }
            Op::Fork { cache, from, into } => {
                let cache = get_mut(&mut self.caches, cache, "cache")?;
                if cache.stages.attention.contains(&self.stage) {
                    self.backend.fork(&mut cache.value, &from, &into)?;
                }
            }
            Op::Prepare { to, batch, ropes } => {
                let ropes = ropes.iter().map(|r| get(&self.ropes, *r, "rotation")).collect::<Result<Vec<_>>>()?;
                let value = self.backend.prepare(&batch, &ropes)?;
                self.passes.insert(to, Pass { batch, value });
            }
            Op::Tensor { to, columns, data } => {
                let rows = data.len() / columns.max(1);
                let value = if self.stage == 0 { Some(self.backend.tensor(data, columns)?) } else { None };
                self.insert(to, 0, (rows, columns), None, value);
            }
            Op::Embed { to, table, pass } => self.embed(to, table, pass)?,
            Op::RmsNorm { to, x, weight, eps } => self.rms_norm(to, x, weight, eps)?,
            Op::Linears { to, x, weights } => self.linears(&to, x, &weights)?,
            Op::Attention { to, qkv, sinks, shape, pass, cache } => {
                self.attention(to, qkv, sinks, &shape, pass, cache)?;
            }
            Op::Add { to, x, y } => self.both(to, x, y, B::add)?,
            Op::SiluMul { to, gate, up } => self.both(to, gate, up, B::silu_mul)?,
            Op::Activate { to, x, up, activation } => self.activate(to, x, up, activation)?,
            Op::Gate { to, x, gate } => self.gate(to, x, gate)?,
            Op::Scale { to, x, factor } => self.each(to, x, |backend, x| backend.scale(x, factor))?,
            Op::Rearrange { to, sources, runs } => self.rearrange(to, &sources, &runs)?,
            Op::SelectRows { to, x, rows } => {
                self.each(to, x, |backend, x| backend.select_rows(&x, &rows))?;
                get_mut(&mut self.tensors, to, "tensor")?.rows = rows.len();
            }
            Op::AddRows { to, sum, y, rows, weights } => {
                self.both(to, sum, y, |backend, sum, y| backend.add_rows(sum, y, &rows, &weights))?;
            }
            Op::ZerosLike { to, x } => self.each(to, x, |backend, x| backend.zeros_like(&x))?,
            Op::Mamba2 { to, x, mixer, layer, pass, cache } => self.mamba(to, x, mixer, layer, pass, cache)?,
            Op::Delta { to, inputs, mixer, layer, pass, cache } => {
                self.delta_net(to, inputs, mixer, layer, pass, cache)?;
            }
            Op::Mixture { to, x, routed, router, experts, activation, rule } => {
                self.mixture(to, x, routed, router, &experts, activation, &rule)?;
            }
            Op::Collect { x } => self.collect(x)?,
            Op::End => (),
        }
        Ok(())
    }

    fn forget(&mut self, id: Id) {
        self.read.remove(&id);
        // Numbers are given once, whatever they are of.
        let _ = self.tensors.remove(&id).is_some()
            || self.passes.remove(&id).is_some()
            || self.weights.remove(&id).is_some()
            || self.numbers.remove(&id).is_some()
            || self.caches.remove(&id).is_some()
            || self.ropes.remove(&id).is_some()
            || self.mambas.remove(&id).is_some()
            || self.nets.remove(&id).is_some();
    }

    /// Takes the rows of a weight that are this rank's from the first one.
    fn receive(&mut self, to: Id, stage: usize, (n, k): (usize, usize), cut: Option<Cut>) -> Result<()> {
        let here = stage == self.stage && cut.as_ref().is_none_or(|cut| cut.0[self.me()].1 > 0);
        let value = if here {
            let facts = self.world.receive_bytes(ROOT);
            let (data, codes) = (self.world.receive_bytes(ROOT), self.world.receive_bytes(ROOT));
            let facts: LinearFacts = postcard::from_bytes(&facts).map_err(failed)?;
            Some(self.backend.load_linear(facts.with(data, codes))?)
        } else {
            None
        };
        self.keep(to, stage, (n, k), cut, value);
        Ok(())
    }

    /// This rank's layers of a cache, and of their heads what it computes.
    fn new_cache(&mut self, to: Id, layout: CacheLayout, stages: CacheStages) -> Result<()> {
        let mine = |stages: &[usize], index: usize| stages.get(index).copied().unwrap_or(0) == self.stage;
        let (me, ranks) = (self.me(), self.size.tensor);
        let layers = layout.layers.iter().enumerate().filter(|(i, _)| mine(&stages.attention, *i));
        let own = CacheLayout {
            // Of one head of queries for each of keys, or as many as there are ranks: those of keys are the same for more.
            layers: layers
                .map(|(_, layer)| {
                    let cut = heads(layer.kv_heads * ranks, layer.kv_heads, ranks)
                        .map_or(layer.kv_heads, |[_, kv]| kv.0[me].1);
                    LayerCache { kv_heads: cut, ..*layer }
                })
                .collect(),
            recurrent: layout
                .recurrent
                .iter()
                .enumerate()
                .filter(|(i, _)| mine(&stages.recurrent, *i))
                .map(|(_, shape)| *shape)
                .collect(),
            ..layout
        };
        let value = self.backend.new_cache(&own)?;
        self.caches.insert(to, Cache { stages, layers: layout.layers, value });
        Ok(())
    }

    fn rms_norm(&mut self, to: Id, x: Arg, weight: Id, eps: f32) -> Result<()> {
        let width = get(&self.numbers, weight, "vector")?.values.len().max(1);
        let entry = get(&self.tensors, x.id, "tensor")?;
        // Each run that a norm is over has to be one rank's.
        let apart = |cut: &Cut| cut.0.iter().all(|(first, n)| first % width == 0 && n % width == 0);
        if !entry.cut.as_ref().is_none_or(apart) {
            self.whole(x.id)?;
        }
        let mut entry = self.take(x)?;
        let weight = &get(&self.numbers, weight, "vector")?.whole;
        entry.value = entry.value.map(|x| self.backend.rms_norm(&x, weight, eps)).transpose()?;
        self.tensors.insert(to, entry);
        Ok(())
    }

    fn linears(&mut self, to: &[Id], x: Arg, weights: &[Id]) -> Result<()> {
        let Some(&first) = weights.first() else { return Ok(()) };
        let stage = get(&self.weights, first, "weight")?.stage;
        self.all_at(x.id, stage)?;
        let rows = get(&self.tensors, x.id, "tensor")?.rows;
        let weights = weights.iter().map(|w| get(&self.weights, *w, "weight")).collect::<Result<Vec<_>>>()?;
        if weights.iter().any(|w| w.stage != stage) {
            return Err(unknown("weight of one stage"));
        }
        let own: Vec<&B::Linear> = weights.iter().filter_map(|w| w.value.as_ref()).collect();
        let outputs = match &get(&self.tensors, x.id, "tensor")?.value {
            Some(x) if !own.is_empty() => self.backend.linears(x, &own)?,
            _ => Vec::new(),
        };
        let mut outputs = outputs.into_iter();
        let entries: Vec<_> = weights
            .iter()
            .map(|w| Entry {
                stage,
                rows,
                columns: w.n,
                cut: w.cut.clone(),
                value: if w.value.is_some() { outputs.next() } else { None },
            })
            .collect();
        self.tensors.extend(to.iter().copied().zip(entries));
        if x.last {
            self.tensors.remove(&x.id);
        }
        Ok(())
    }

    fn activate(&mut self, to: Id, x: Arg, up: Option<Arg>, activation: Activation) -> Result<()> {
        match up {
            Some(up) => self.both(to, x, up, |backend, x, up| backend.activate(x, Some(up), activation)),
            None => self.each(to, x, |backend, x| backend.activate(x, None, activation)),
        }
    }

    fn gate(&mut self, to: Id, x: Arg, gate: Arg) -> Result<()> {
        let (rows, columns) = self.shape(x.id)?;
        if self.shape(gate.id)? != (rows, 1) || columns == 1 {
            return self.both(to, x, gate, B::gate);
        }
        let stage = get(&self.tensors, x.id, "tensor")?.stage;
        self.all_at(gate.id, stage)?;
        let gate = self.take(Arg { last: false, ..gate })?.value;
        self.each(to, x, |backend, x| match gate {
            Some(gate) => backend.gate(x, &gate),
            None => Err(unknown("tensor of this rank")),
        })
    }

    fn rearrange(&mut self, to: Id, sources: &[Arg], runs: &[Run]) -> Result<()> {
        let Some(first) = sources.first() else { return Err(unknown("tensor")) };
        let stage = get(&self.tensors, first.id, "tensor")?.stage;
        for source in sources {
            self.all_at(source.id, stage)?;
        }
        let rows = self.shape(first.id)?.0;
        let value = if stage == self.stage {
            let held = sources.iter().map(|s| self.held(s.id)).collect::<Result<Vec<_>>>()?;
            Some(self.backend.rearrange(&held, runs)?)
        } else {
            None
        };
        self.insert(to, stage, (rows, runs.iter().map(|r| r.count).sum()), None, value);
        Ok(())
    }

    /// Gives the first rank all of a tensor.
    fn collect(&mut self, id: Id) -> Result<()> {
        self.whole(id)?;
        let entry = get(&self.tensors, id, "tensor")?;
        let sender = entry.stage * self.size.tensor;
        if sender == ROOT {
            return Ok(());
        }
        self.tell();
        let entry = get(&self.tensors, id, "tensor")?;
        if self.world.rank() == sender {
            let value = entry.value.as_ref().ok_or_else(|| unknown("tensor of this rank"))?;
            self.backend.give(&*self.world, ROOT, value)?;
        } else if self.world.rank() == ROOT {
            self.read.insert(id, self.backend.take(&*self.world, sender, (entry.rows, entry.columns))?);
        }
        Ok(())
    }
}

/// Where each of some runs begins.
fn starts(counts: &[usize]) -> Vec<usize> {
    let begin = |at: &mut usize, n: &usize| {
        let start = *at;
        *at += n;
        Some(start)
    };
    counts.iter().scan(0, begin).collect()
}
