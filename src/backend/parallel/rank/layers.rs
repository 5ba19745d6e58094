//! A rank's part of what layers are made of: the embedding, attention, recurrences, mixtures.

use super::{Rank, get, get_mut, local, part, starts, unknown};
use crate::backend::parallel::op::{Arg, Id};
use crate::backend::parallel::plan::{Cut, heads};
use crate::backend::{Activation, AttentionShape, Backend, BackendError, Batch, DeltaInputs, Ffn, Result, Run, one};
use crate::logits::{RouterRule, Routing};

impl<B: Backend> Rank<B> {
    pub(super) fn embed(&mut self, to: Id, table: Id, pass: Id) -> Result<()> {
        let weight = get(&self.weights, table, "weight")?;
        let pass = get(&self.passes, pass, "pass")?;
        let (stage, columns) = (weight.stage, weight.k);
        let tokens = &pass.batch.tokens;
        if let Some(&token) = tokens.iter().find(|t| **t as usize >= weight.n) {
            return Err(BackendError::TokenOutOfRange { token, vocab: weight.n });
        }
        let rows = tokens.len();
        let value = match &weight.cut {
            _ if stage != self.stage => None,
            None => {
                let table = weight.value.as_ref().ok_or_else(|| unknown("weight of this rank"))?;
                Some(self.backend.embed(table, &pass.value)?)
            }
            Some(cut) => {
                // Whose row a token's is, and which tokens each rank has rows of.
                let whose = |token: u32| {
                    cut.0.iter().position(|(first, count)| (*first..first + count).contains(&(token as usize)))
                };
                let owners: Vec<usize> = tokens.iter().map(|t| whose(*t).unwrap_or(0)).collect();
                let counts: Vec<usize> = (0..cut.0.len()).map(|r| owners.iter().filter(|o| **o == r).count()).collect();
                let me = self.me();
                let first = cut.0[me].0 as u32;
                let own: Vec<u32> =
                    tokens.iter().zip(&owners).filter(|(_, o)| **o == me).map(|(t, _)| t - first).collect();
                let own = match &weight.value {
                    Some(table) if !own.is_empty() => {
                        let pass = self.backend.prepare(&Batch::alone(own), &[])?;
                        vec![self.backend.embed(table, &pass)?]
                    }
                    _ => Vec::new(),
                };
                let all = self.backend.spread_rows(&*self.team, &own, &counts, columns)?;
                let mut next = starts(&counts);
                let place = |owner: usize| {
                    next[owner] += 1;
                    next[owner] - 1
                };
                let places: Vec<usize> = owners.into_iter().map(place).collect();
                let in_order = places.iter().copied().eq(0..rows);
                Some(if in_order { all } else { self.backend.select_rows(&all, &places)? })
            }
        };
        self.insert(to, stage, (rows, columns), None, value);
        Ok(())
    }

    pub(super) fn attention(
        &mut self,
        to: Id,
        [q, k, v]: [Arg; 3],
        sinks: Option<Id>,
        shape: &AttentionShape,
        pass: Id,
        cache: Id,
    ) -> Result<()> {
        let held = get(&self.caches, cache, "cache")?;
        let (stage, index) = local(&held.stages.attention, shape.cache);
        let value_dim = held.layers.get(shape.cache).ok_or_else(|| unknown("layer of a cache"))?.value_dim;
        let cuts = if self.size.tensor > 1 {
            let cuts = heads(shape.heads, shape.kv_heads, self.size.tensor);
            Some(cuts.ok_or_else(|| unknown("head for every rank"))?)
        } else {
            None
        };
        let [q_cut, kv_cut] = match &cuts {
            Some([q, kv]) => [Some(q), Some(kv)],
            None => [None, None],
        };
        let rows = get(&self.tensors, q.id, "tensor")?.rows;
        let times = |cut: Option<&Cut>, n: usize| cut.map(|cut| cut.times(n));
        let own_q = self.cut_as(q, stage, times(q_cut, shape.head_dim).as_ref())?;
        let own_k = self.cut_as(k, stage, times(kv_cut, shape.head_dim).as_ref())?;
        let own_v = self.cut_as(v, stage, times(kv_cut, value_dim).as_ref())?;
        let out = times(q_cut, value_dim);
        let value = if let (Some(q), Some(k), Some(v)) = (own_q, own_k, own_v) {
            let me = self.me();
            let count = |cut: Option<&Cut>, all: usize| cut.map_or((0, all), |cut| cut.0[me]);
            let (own_heads, own_kv) = (count(q_cut, shape.heads), count(kv_cut, shape.kv_heads));
            let own = AttentionShape { cache: index, heads: own_heads.1, kv_heads: own_kv.1, ..*shape };
            if let Some(sinks) = sinks {
                self.make_part(sinks, own_heads)?;
            }
            let sinks = sinks.map(|sinks| part(&self.numbers, sinks, own_heads)).transpose()?;
            let pass = &get(&self.passes, pass, "pass")?.value;
            let cache = &mut self.caches.get_mut(&cache).ok_or_else(|| unknown("cache"))?.value;
            Some(self.backend.attention(q, k, v, sinks, &own, pass, cache)?)
        } else {
            None
        };
        self.insert(to, stage, (rows, shape.heads * value_dim), out, value);
        Ok(())
    }

    /// What this rank has of columns that are to be cut as `cut` says.
    fn cut_as(&mut self, arg: Arg, stage: usize, cut: Option<&Cut>) -> Result<Option<B::Tensor>> {
        self.bring(arg.id, stage)?;
        if get(&self.tensors, arg.id, "tensor")?.cut.as_ref() != cut {
            self.whole(arg.id)?;
        }
        let entry = self.take(arg)?;
        Ok(match (entry.value, cut) {
            (Some(value), Some(cut)) if entry.cut.is_none() => {
                let (first, count) = cut.0[self.me()];
                Some(self.backend.rearrange(&[&value], &[Run::of(0, first, count)])?)
            }
            (value, _) => value,
        })
    }

    /// Sees to it that [`part`] is there.
    fn make_part(&mut self, id: Id, (first, count): (usize, usize)) -> Result<()> {
        let numbers = get_mut(&mut self.numbers, id, "vector")?;
        if (first, count) != (0, numbers.values.len()) && !numbers.parts.contains_key(&(first, count)) {
            let part = self.backend.load_vector(numbers.values[first..first + count].to_vec())?;
            numbers.parts.insert((first, count), part);
        }
        Ok(())
    }

    /// Recurrences are computed whole by every rank of their stage.
    pub(super) fn mamba(&mut self, to: Id, x: Arg, mixer: Id, layer: usize, pass: Id, cache: Id) -> Result<()> {
        let (stage, index) = local(&get(&self.caches, cache, "cache")?.stages.recurrent, layer);
        self.all_at(x.id, stage)?;
        let entry = self.take(x)?;
        let rows = entry.rows;
        let (columns, mixer) = get(&self.mambas, mixer, "mixer")?;
        let pass = &get(&self.passes, pass, "pass")?.value;
        let cache = &mut self.caches.get_mut(&cache).ok_or_else(|| unknown("cache"))?.value;
        let value = entry.value.map(|x| self.backend.mamba(x, mixer, index, pass, cache)).transpose()?;
        let shape = (rows, *columns);
        self.insert(to, stage, shape, None, value);
        Ok(())
    }

    pub(super) fn delta_net(
        &mut self,
        to: Id,
        inputs: [Arg; 4],
        mixer: Id,
        layer: usize,
        pass: Id,
        cache: Id,
    ) -> Result<()> {
        let (stage, index) = local(&get(&self.caches, cache, "cache")?.stages.recurrent, layer);
        for input in inputs {
            self.all_at(input.id, stage)?;
        }
        let (rows, columns) = self.shape(inputs[1].id)?;
        let held = inputs.map(|arg| self.take(arg));
        let [qkv, z, b, a] = held;
        let (qkv, z, b, a) = (qkv?.value, z?.value, b?.value, a?.value);
        let mixer = get(&self.nets, mixer, "mixer")?;
        let pass = &get(&self.passes, pass, "pass")?.value;
        let cache = &mut self.caches.get_mut(&cache).ok_or_else(|| unknown("cache"))?.value;
        let value = match (qkv, z, b, a) {
            (Some(qkv), Some(z), Some(b), Some(a)) => {
                Some(self.backend.delta_net(DeltaInputs { qkv, z, b, a }, mixer, index, pass, cache)?)
            }
            _ => None,
        };
        self.insert(to, stage, (rows, columns), None, value);
        Ok(())
    }

    /// What experts make of the rows that are routed to them, each at its rank, added in the order of experts.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn mixture(
        &mut self,
        to: Id,
        x: Arg,
        routed: Arg,
        router: Id,
        experts: &[(Option<Id>, Id, Id)],
        activation: Activation,
        rule: &RouterRule,
    ) -> Result<()> {
        /// Of what lives as long as this operation.
        const LOGITS: Id = Id::MAX;
        let stage = get(&self.weights, router, "weight")?.stage;
        self.all_at(x.id, stage)?;
        self.all_at(routed.id, stage)?;
        let shape = self.shape(x.id)?;
        let value = if self.size.tensor > 1 {
            self.linears(&[LOGITS], Arg { last: false, ..routed }, &[router])?;
            self.whole(LOGITS)?;
            let logits = self.tensors.remove(&LOGITS).and_then(|logits| logits.value);
            let routing = logits.map(|logits| self.backend.route(&logits, rule)).transpose()?;
            routing.map(|routing| self.mixed(x.id, &routing, experts, activation)).transpose()?
        } else if stage == self.stage {
            Some(self.mixture_of_all((x.id, routed.id), router, experts, activation, rule)?)
        } else {
            None
        };
        for arg in [x, routed].into_iter().filter(|arg| arg.last) {
            self.tensors.remove(&arg.id);
        }
        self.insert(to, stage, shape, None, value);
        Ok(())
    }

    /// The same of a rank that has all of them.
    fn mixture_of_all(
        &self,
        (x, routed): (Id, Id),
        router: Id,
        experts: &[(Option<Id>, Id, Id)],
        activation: Activation,
        rule: &RouterRule,
    ) -> Result<B::Tensor> {
        let weight = |id: Id| {
            let weight = get(&self.weights, id, "weight")?;
            weight.value.as_ref().ok_or_else(|| unknown("weight of this rank"))
        };
        let ffn = |&(gate, up, down): &(Option<Id>, Id, Id)| -> Result<Ffn<'_, B::Linear>> {
            Ok(Ffn { gate: gate.map(weight).transpose()?, up: weight(up)?, down: weight(down)?, activation })
        };
        let ffns = experts.iter().map(ffn).collect::<Result<Vec<_>>>()?;
        self.backend.mixture(self.held(x)?, self.held(routed)?, weight(router)?, &ffns, rule)
    }

    fn mixed(
        &self,
        x: Id,
        routing: &[Routing],
        experts: &[(Option<Id>, Id, Id)],
        activation: Activation,
    ) -> Result<B::Tensor> {
        let columns = self.shape(x)?.1;
        let x = self.held(x)?;
        let mut takers: Vec<(Vec<usize>, Vec<f32>)> = vec![Default::default(); experts.len()];
        for (row, chosen) in routing.iter().enumerate() {
            for &(expert, weight) in chosen {
                takers[expert].0.push(row);
                takers[expert].1.push(weight);
            }
        }
        let chosen = || experts.iter().zip(&takers).filter(|(_, (rows, _))| !rows.is_empty());
        let (mut own, mut counts, mut owners) = (Vec::new(), vec![0; self.size.tensor], Vec::new());
        for (&(gate, up, down), (rows, _)) in chosen() {
            let [up, down] = [up, down].map(|id| get(&self.weights, id, "weight"));
            let (up, down) = (up?, down?);
            let owner = down.cut.as_ref().map_or(Some(0), Cut::owner).ok_or_else(|| unknown("expert of one rank"))?;
            counts[owner] += rows.len();
            owners.push(owner);
            if let (Some(up), Some(down)) = (&up.value, &down.value) {
                let gate = gate.map(|id| get(&self.weights, id, "weight")).transpose()?;
                let ffn = Ffn { gate: gate.and_then(|g| g.value.as_ref()), up, down, activation };
                let h = self.backend.expanded(&self.backend.select_rows(x, rows)?, &ffn)?;
                own.push(one(self.backend.linears(&h, &[down])?)?);
            }
        }
        let all = self.backend.spread_rows(&*self.team, &own, &counts, columns)?;
        let mut next = starts(&counts);
        let mut sum = self.backend.zeros_like(x)?;
        for ((_, (rows, weights)), owner) in chosen().zip(owners) {
            let places: Vec<usize> = (next[owner]..next[owner] + rows.len()).collect();
            let y = self.backend.select_rows(&all, &places)?;
            next[owner] += rows.len();
            sum = self.backend.add_rows(sum, &y, rows, weights)?;
        }
        Ok(sum)
    }
}
