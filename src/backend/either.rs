//! One of two backends, chosen while the program runs: what is generic over backends is compiled once for both.

use recoup_ground::divergence::{Pair, RowError};

use super::{
    Activation, AttentionShape, Backend, BackendError, Batch, CacheLayout, DeltaInputs, DeltaNetShape, DeltaNetWeights,
    Ffn, HeadNorms, HeadParameters, Mamba2Shape, Mamba2Weights, Result, Rotation, Run, Span, Stored, Update,
};
use crate::formats::linear::LinearTensors;
use crate::logits::{Draw, RouterRule, Routing, Sampled, SamplingError, Scratch, TokenScore};
use crate::ranks::Link;

/// A backend of one of two kinds, or what belongs to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Either<A, B> {
    A(A),
    B(B),
}

fn foreign() -> BackendError {
    BackendError::Failed { context: "backend", message: "was given what belongs to another backend".into() }
}

impl<A, B> Either<A, B> {
    fn a(&self) -> Result<&A> {
        match self {
            Self::A(a) => Ok(a),
            Self::B(_) => Err(foreign()),
        }
    }

    fn b(&self) -> Result<&B> {
        match self {
            Self::B(b) => Ok(b),
            Self::A(_) => Err(foreign()),
        }
    }

    fn a_mut(&mut self) -> Result<&mut A> {
        match self {
            Self::A(a) => Ok(a),
            Self::B(_) => Err(foreign()),
        }
    }

    fn b_mut(&mut self) -> Result<&mut B> {
        match self {
            Self::B(b) => Ok(b),
            Self::A(_) => Err(foreign()),
        }
    }

    fn into_a(self) -> Result<A> {
        match self {
            Self::A(a) => Ok(a),
            Self::B(_) => Err(foreign()),
        }
    }

    fn into_b(self) -> Result<B> {
        match self {
            Self::B(b) => Ok(b),
            Self::A(_) => Err(foreign()),
        }
    }
}

/// All of a list, as what the chosen backend takes.
fn all<'a, T: 'a, U>(list: impl IntoIterator<Item = &'a T>, one: impl Fn(&'a T) -> Result<U>) -> Result<Vec<U>> {
    list.into_iter().map(one).collect()
}

fn update_a<A: Backend, B: Backend>(update: Update<'_, Either<A, B>>) -> Result<Update<'_, A>> {
    Ok(match update {
        Update::Product { input, weight } => Update::Product { input: input.into_a()?, weight: weight.a()? },
        Update::Ready(y) => Update::Ready(y.into_a()?),
    })
}

fn update_b<A: Backend, B: Backend>(update: Update<'_, Either<A, B>>) -> Result<Update<'_, B>> {
    Ok(match update {
        Update::Product { input, weight } => Update::Product { input: input.into_b()?, weight: weight.b()? },
        Update::Ready(y) => Update::Ready(y.into_b()?),
    })
}

fn ffn_a<'a, A, B>(f: &Ffn<'a, Either<A, B>>) -> Result<Ffn<'a, A>> {
    let gate = f.gate.map(Either::a).transpose()?;
    Ok(Ffn { gate, up: f.up.a()?, down: f.down.a()?, activation: f.activation })
}

fn ffn_b<'a, A, B>(f: &Ffn<'a, Either<A, B>>) -> Result<Ffn<'a, B>> {
    let gate = f.gate.map(Either::b).transpose()?;
    Ok(Ffn { gate, up: f.up.b()?, down: f.down.b()?, activation: f.activation })
}

/// The call of whichever backend it is.
macro_rules! of {
    ($self:ident, |$backend:ident| $a:expr, $b:expr) => {
        match $self {
            Either::A($backend) => $a,
            Either::B($backend) => $b,
        }
    };
}

impl<A: Backend, B: Backend> Backend for Either<A, B> {
    type Tensor = Either<A::Tensor, B::Tensor>;
    type Linear = Either<A::Linear, B::Linear>;
    type Vector = Either<A::Vector, B::Vector>;
    type Mamba = Either<A::Mamba, B::Mamba>;
    type DeltaNet = Either<A::DeltaNet, B::DeltaNet>;
    type Cache = Either<A::Cache, B::Cache>;
    type Rope = Either<A::Rope, B::Rope>;
    type Pass = Either<A::Pass, B::Pass>;

    fn load_linear(&self, tensors: LinearTensors<'_>) -> Result<Self::Linear> {
        of!(self, |x| x.load_linear(tensors).map(Either::A), x.load_linear(tensors).map(Either::B))
    }

    fn load_expert(&self, tensors: LinearTensors<'_>, stored: Option<Box<dyn Stored>>) -> Result<Self::Linear> {
        of!(self, |x| x.load_expert(tensors, stored).map(Either::A), x.load_expert(tensors, stored).map(Either::B))
    }

    fn inputs(&self, linear: &Self::Linear) -> usize {
        match (self, linear) {
            (Either::A(x), Either::A(l)) => x.inputs(l),
            (Either::B(x), Either::B(l)) => x.inputs(l),
            _ => 0,
        }
    }

    fn multiplies_integers(&self, linear: &Self::Linear) -> bool {
        match (self, linear) {
            (Either::A(x), Either::A(l)) => x.multiplies_integers(l),
            (Either::B(x), Either::B(l)) => x.multiplies_integers(l),
            _ => false,
        }
    }

    fn resident_bytes(&self, linear: &Self::Linear) -> usize {
        match (self, linear) {
            (Either::A(x), Either::A(l)) => x.resident_bytes(l),
            (Either::B(x), Either::B(l)) => x.resident_bytes(l),
            _ => 0,
        }
    }

    fn name(&self) -> &'static str {
        of!(self, |x| x.name(), x.name())
    }

    fn load_vector(&self, values: Vec<f32>) -> Result<Self::Vector> {
        of!(self, |x| x.load_vector(values).map(Either::A), x.load_vector(values).map(Either::B))
    }

    fn load_mamba(&self, shape: Mamba2Shape, weights: Mamba2Weights) -> Result<Self::Mamba> {
        of!(self, |x| x.load_mamba(shape, weights).map(Either::A), x.load_mamba(shape, weights).map(Either::B))
    }

    fn load_delta_net(&self, shape: DeltaNetShape, weights: DeltaNetWeights) -> Result<Self::DeltaNet> {
        of!(self, |x| x.load_delta_net(shape, weights).map(Either::A), {
            x.load_delta_net(shape, weights).map(Either::B)
        })
    }

    fn load_rope(&self, rotation: Rotation) -> Result<Self::Rope> {
        of!(self, |x| x.load_rope(rotation).map(Either::A), x.load_rope(rotation).map(Either::B))
    }

    fn new_cache(&self, layout: &CacheLayout) -> Result<Self::Cache> {
        of!(self, |x| x.new_cache(layout).map(Either::A), x.new_cache(layout).map(Either::B))
    }

    fn grow(&self, cache: &mut Self::Cache, pages: usize, slots: usize) -> Result<()> {
        of!(self, |x| x.grow(cache.a_mut()?, pages, slots), x.grow(cache.b_mut()?, pages, slots))
    }

    fn copy_state(&self, cache: &mut Self::Cache, from: u32, to: u32) -> Result<()> {
        of!(self, |x| x.copy_state(cache.a_mut()?, from, to), x.copy_state(cache.b_mut()?, from, to))
    }

    fn fork(&self, cache: &mut Self::Cache, from: &Span, to: &Span) -> Result<()> {
        of!(self, |x| x.fork(cache.a_mut()?, from, to), x.fork(cache.b_mut()?, from, to))
    }

    fn prepare(&self, batch: &Batch, ropes: &[&Self::Rope]) -> Result<Self::Pass> {
        of!(
            self,
            |x| x.prepare(batch, &all(ropes, |r| r.a())?).map(Either::A),
            x.prepare(batch, &all(ropes, |r| r.b())?).map(Either::B)
        )
    }

    fn embed(&self, table: &Self::Linear, pass: &Self::Pass) -> Result<Self::Tensor> {
        of!(self, |x| x.embed(table.a()?, pass.a()?).map(Either::A), x.embed(table.b()?, pass.b()?).map(Either::B))
    }

    fn rms_norm(&self, x: &Self::Tensor, weight: &Self::Vector, eps: f32) -> Result<Self::Tensor> {
        of!(self, |by| by.rms_norm(x.a()?, weight.a()?, eps).map(Either::A), {
            by.rms_norm(x.b()?, weight.b()?, eps).map(Either::B)
        })
    }

    fn linears(&self, x: &Self::Tensor, weights: &[&Self::Linear]) -> Result<Vec<Self::Tensor>> {
        Ok(match self {
            Either::A(by) => wrap(by.linears(x.a()?, &all(weights, |w| w.a())?)?, Either::A),
            Either::B(by) => wrap(by.linears(x.b()?, &all(weights, |w| w.b())?)?, Either::B),
        })
    }

    fn attention(
        &self,
        q: Self::Tensor,
        k: Self::Tensor,
        v: Self::Tensor,
        sinks: Option<&Self::Vector>,
        shape: &AttentionShape,
        pass: &Self::Pass,
        cache: &mut Self::Cache,
    ) -> Result<Self::Tensor> {
        self.normed_attention(q, k, v, HeadParameters { norms: None, sinks }, shape, pass, cache)
    }

    fn rotated(&self, k: &Self::Tensor, shape: &AttentionShape, pass: &Self::Pass) -> Result<Vec<f32>> {
        of!(self, |x| x.rotated(k.a()?, shape, pass.a()?), x.rotated(k.b()?, shape, pass.b()?))
    }

    fn add(&self, x: Self::Tensor, y: &Self::Tensor) -> Result<Self::Tensor> {
        of!(self, |by| by.add(x.into_a()?, y.a()?).map(Either::A), by.add(x.into_b()?, y.b()?).map(Either::B))
    }

    fn silu_mul(&self, gate: Self::Tensor, up: &Self::Tensor) -> Result<Self::Tensor> {
        of!(self, |by| by.silu_mul(gate.into_a()?, up.a()?).map(Either::A), {
            by.silu_mul(gate.into_b()?, up.b()?).map(Either::B)
        })
    }

    fn route(&self, logits: &Self::Tensor, rule: &RouterRule) -> Result<Vec<Routing>> {
        of!(self, |x| x.route(logits.a()?, rule), x.route(logits.b()?, rule))
    }

    fn select_rows(&self, x: &Self::Tensor, rows: &[usize]) -> Result<Self::Tensor> {
        of!(self, |by| by.select_rows(x.a()?, rows).map(Either::A), by.select_rows(x.b()?, rows).map(Either::B))
    }

    fn add_rows(&self, sum: Self::Tensor, y: &Self::Tensor, rows: &[usize], weights: &[f32]) -> Result<Self::Tensor> {
        of!(self, |by| by.add_rows(sum.into_a()?, y.a()?, rows, weights).map(Either::A), {
            by.add_rows(sum.into_b()?, y.b()?, rows, weights).map(Either::B)
        })
    }

    fn joined(self, world: &dyn Link, team: &dyn Link) -> Result<Self> {
        Ok(match self {
            Self::A(by) => Self::A(by.joined(world, team)?),
            Self::B(by) => Self::B(by.joined(world, team)?),
        })
    }

    fn abandon(&self) {
        of!(self, |by| by.abandon(), by.abandon());
    }

    fn exchanges_by(&self) -> Option<String> {
        of!(self, |by| by.exchanges_by(), by.exchanges_by())
    }

    fn spread_rows(
        &self,
        link: &dyn Link,
        own: &[Self::Tensor],
        rows: &[usize],
        columns: usize,
    ) -> Result<Self::Tensor> {
        of!(
            self,
            |by| {
                let own = all(own, |x| x.a().cloned())?;
                by.spread_rows(link, &own, rows, columns).map(Either::A)
            },
            {
                let own = all(own, |x| x.b().cloned())?;
                by.spread_rows(link, &own, rows, columns).map(Either::B)
            }
        )
    }

    fn spread_columns(
        &self,
        link: &dyn Link,
        own: Option<&Self::Tensor>,
        pieces: &[(usize, usize)],
        shape: (usize, usize),
    ) -> Result<Self::Tensor> {
        of!(
            self,
            |by| by.spread_columns(link, own.map(Self::Tensor::a).transpose()?, pieces, shape).map(Either::A),
            by.spread_columns(link, own.map(Self::Tensor::b).transpose()?, pieces, shape).map(Either::B)
        )
    }

    fn give(&self, link: &dyn Link, to: usize, x: &Self::Tensor) -> Result<()> {
        of!(self, |by| by.give(link, to, x.a()?), by.give(link, to, x.b()?))
    }

    fn take(&self, link: &dyn Link, from: usize, shape: (usize, usize)) -> Result<Self::Tensor> {
        of!(self, |by| by.take(link, from, shape).map(Either::A), by.take(link, from, shape).map(Either::B))
    }

    fn zeros_like(&self, x: &Self::Tensor) -> Result<Self::Tensor> {
        of!(self, |by| by.zeros_like(x.a()?).map(Either::A), by.zeros_like(x.b()?).map(Either::B))
    }

    fn residual(&self, x: Self::Tensor, update: Update<'_, Self>) -> Result<Self::Tensor> {
        of!(self, |by| by.residual(x.into_a()?, update_a(update)?).map(Either::A), {
            by.residual(x.into_b()?, update_b(update)?).map(Either::B)
        })
    }

    fn residual_norm(
        &self,
        x: Self::Tensor,
        update: Update<'_, Self>,
        norm: &Self::Vector,
        eps: f32,
        readers: &[&Self::Linear],
    ) -> Result<(Self::Tensor, Self::Tensor)> {
        match self {
            Either::A(by) => {
                let readers = all(readers, |r| r.a())?;
                let (x, y) = by.residual_norm(x.into_a()?, update_a(update)?, norm.a()?, eps, &readers)?;
                Ok((Either::A(x), Either::A(y)))
            }
            Either::B(by) => {
                let readers = all(readers, |r| r.b())?;
                let (x, y) = by.residual_norm(x.into_b()?, update_b(update)?, norm.b()?, eps, &readers)?;
                Ok((Either::B(x), Either::B(y)))
            }
        }
    }

    fn normed_attention(
        &self,
        q: Self::Tensor,
        k: Self::Tensor,
        v: Self::Tensor,
        heads: HeadParameters<'_, Self>,
        shape: &AttentionShape,
        pass: &Self::Pass,
        cache: &mut Self::Cache,
    ) -> Result<Self::Tensor> {
        match self {
            Either::A(by) => {
                let norms = heads.norms.map(|n| Ok(HeadNorms { q: n.q.a()?, k: n.k.a()?, eps: n.eps })).transpose()?;
                let heads = HeadParameters { norms, sinks: heads.sinks.map(|s| s.a()).transpose()? };
                let (q, k, v) = (q.into_a()?, k.into_a()?, v.into_a()?);
                by.normed_attention(q, k, v, heads, shape, pass.a()?, cache.a_mut()?).map(Either::A)
            }
            Either::B(by) => {
                let norms = heads.norms.map(|n| Ok(HeadNorms { q: n.q.b()?, k: n.k.b()?, eps: n.eps })).transpose()?;
                let heads = HeadParameters { norms, sinks: heads.sinks.map(|s| s.b()).transpose()? };
                let (q, k, v) = (q.into_b()?, k.into_b()?, v.into_b()?);
                by.normed_attention(q, k, v, heads, shape, pass.b()?, cache.b_mut()?).map(Either::B)
            }
        }
    }

    fn expanded(&self, x: &Self::Tensor, ffn: &Ffn<'_, Self::Linear>) -> Result<Self::Tensor> {
        of!(self, |by| by.expanded(x.a()?, &ffn_a(ffn)?).map(Either::A), {
            by.expanded(x.b()?, &ffn_b(ffn)?).map(Either::B)
        })
    }

    fn mixture(
        &self,
        x: &Self::Tensor,
        routed: &Self::Tensor,
        router: &Self::Linear,
        experts: &[Ffn<'_, Self::Linear>],
        rule: &RouterRule,
    ) -> Result<Self::Tensor> {
        match self {
            Either::A(by) => by.mixture(x.a()?, routed.a()?, router.a()?, &all(experts, ffn_a)?, rule).map(Either::A),
            Either::B(by) => by.mixture(x.b()?, routed.b()?, router.b()?, &all(experts, ffn_b)?, rule).map(Either::B),
        }
    }

    fn activate(&self, x: Self::Tensor, up: Option<&Self::Tensor>, activation: Activation) -> Result<Self::Tensor> {
        of!(self, |by| by.activate(x.into_a()?, up.map(|u| u.a()).transpose()?, activation).map(Either::A), {
            by.activate(x.into_b()?, up.map(|u| u.b()).transpose()?, activation).map(Either::B)
        })
    }

    fn gate(&self, x: Self::Tensor, gate: &Self::Tensor) -> Result<Self::Tensor> {
        of!(self, |by| by.gate(x.into_a()?, gate.a()?).map(Either::A), by.gate(x.into_b()?, gate.b()?).map(Either::B))
    }

    fn scale(&self, x: Self::Tensor, factor: f32) -> Result<Self::Tensor> {
        of!(self, |by| by.scale(x.into_a()?, factor).map(Either::A), by.scale(x.into_b()?, factor).map(Either::B))
    }

    fn rearrange(&self, sources: &[&Self::Tensor], runs: &[Run]) -> Result<Self::Tensor> {
        let sources = sources.iter().copied();
        match self {
            Either::A(by) => by.rearrange(&all(sources, |s| s.a())?, runs).map(Either::A),
            Either::B(by) => by.rearrange(&all(sources, |s| s.b())?, runs).map(Either::B),
        }
    }

    fn mamba(
        &self,
        x: Self::Tensor,
        mixer: &Self::Mamba,
        layer: usize,
        pass: &Self::Pass,
        cache: &mut Self::Cache,
    ) -> Result<Self::Tensor> {
        of!(self, |by| by.mamba(x.into_a()?, mixer.a()?, layer, pass.a()?, cache.a_mut()?).map(Either::A), {
            by.mamba(x.into_b()?, mixer.b()?, layer, pass.b()?, cache.b_mut()?).map(Either::B)
        })
    }

    fn delta_net(
        &self,
        inputs: DeltaInputs<Self::Tensor>,
        mixer: &Self::DeltaNet,
        layer: usize,
        pass: &Self::Pass,
        cache: &mut Self::Cache,
    ) -> Result<Self::Tensor> {
        let DeltaInputs { qkv, z, b, a } = inputs;
        match self {
            Either::A(by) => {
                let inputs = DeltaInputs { qkv: qkv.into_a()?, z: z.into_a()?, b: b.into_a()?, a: a.into_a()? };
                by.delta_net(inputs, mixer.a()?, layer, pass.a()?, cache.a_mut()?).map(Either::A)
            }
            Either::B(by) => {
                let inputs = DeltaInputs { qkv: qkv.into_b()?, z: z.into_b()?, b: b.into_b()?, a: a.into_b()? };
                by.delta_net(inputs, mixer.b()?, layer, pass.b()?, cache.b_mut()?).map(Either::B)
            }
        }
    }

    fn score(&self, logits: &Self::Tensor, picks: &[(usize, u32)]) -> Result<Vec<TokenScore>> {
        of!(self, |x| x.score(logits.a()?, picks), x.score(logits.b()?, picks))
    }

    fn sample(
        &self,
        logits: &Self::Tensor,
        draws: &[Draw<'_>],
        scratch: &mut Scratch,
    ) -> Result<Vec<std::result::Result<Sampled, SamplingError>>> {
        of!(self, |x| x.sample(logits.a()?, draws, scratch), x.sample(logits.b()?, draws, scratch))
    }

    fn compare(
        &self,
        baseline: &Self::Tensor,
        model: &Self::Tensor,
        vocab: usize,
        targets: &[u32],
    ) -> Result<Vec<std::result::Result<Pair, RowError>>> {
        of!(self, |x| x.compare(baseline.a()?, model.a()?, vocab, targets), {
            x.compare(baseline.b()?, model.b()?, vocab, targets)
        })
    }

    fn is_finite(&self, x: &Self::Tensor) -> Result<bool> {
        of!(self, |by| by.is_finite(x.a()?), by.is_finite(x.b()?))
    }

    fn squares_finite(&self, x: &Self::Tensor, width: usize) -> Result<bool> {
        of!(self, |by| by.squares_finite(x.a()?, width), by.squares_finite(x.b()?, width))
    }

    fn tensor(&self, data: Vec<f32>, columns: usize) -> Result<Self::Tensor> {
        of!(self, |x| x.tensor(data, columns).map(Either::A), x.tensor(data, columns).map(Either::B))
    }

    fn to_host(&self, x: &Self::Tensor) -> Result<Vec<f32>> {
        of!(self, |by| by.to_host(x.a()?), by.to_host(x.b()?))
    }
}

fn wrap<T, U>(list: Vec<T>, one: impl Fn(T) -> U) -> Vec<U> {
    list.into_iter().map(one).collect()
}
