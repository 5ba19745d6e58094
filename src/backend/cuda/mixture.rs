//! A mixture of experts with everything between the router and the sum on the device (kernels/mixture.cu): which
//! experts a token goes to stays there too.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use super::driver::{Args, Memory};
use super::elementwise::activation_number;
use super::product::{format, scales_of};
use super::table::{FEW, kernel, suffix};
use super::weight::{Kind, ROWS, SIDE, STEP};
use super::{CudaBackend, CudaLinear, CudaTensor};
use crate::backend::{Backend, Ffn, Result, one};
use crate::formats::linear::ActivationFormat;
use crate::logits::{RouterRule, RouterScores};

/// As in mixture.cu.
const MAX_EXPERTS: usize = 512;
const ROUTERS: usize = 4;
/// Mixtures that are remembered at most.
const REMEMBERED: usize = 1024;

/// Tables of mixtures, by the first linear of each.
#[derive(Debug, Default)]
pub(super) struct Tables(Mutex<HashMap<u64, Arc<Table>>>);

/// Where the weights of a mixture lie.
#[derive(Debug)]
struct Table {
    /// Every linear it was made of.
    ids: Vec<u64>,
    /// What is added to scores to choose by, here and there.
    correction: Option<(Arc<[f32]>, Memory)>,
    /// `None`: the activation has none, or `up` gives it too.
    gate: Option<Side>,
    up: Side,
    down: Side,
    /// Whether gate and up of each expert read the same operand.
    shared: bool,
}

/// One linear of every expert.
#[derive(Debug)]
struct Side {
    /// [experts, 5] pointers.
    pointers: Memory,
    /// [experts]: scales of inputs; pointers to what multiplies inputs, or 0.
    scales: Memory,
    pre: Memory,
}

/// Rows of sorted pairs in the form that products read.
struct Rows {
    x: Memory,
    scales: Option<Memory>,
}

/// Tokens and their experts: pairs, sorted by expert and then token.
struct Pairs {
    tokens: usize,
    experts: usize,
    count: usize,
    /// [tokens, experts a token], ascending by expert: weights, and where each went.
    weights: Memory,
    place: Memory,
    /// Of each sorted pair.
    token_of: Memory,
    expert_of: Memory,
    /// Where each expert's begin, and the end.
    begins: Memory,
}

/// Whether one kernel computes both.
fn alike(a: &CudaLinear, b: &CudaLinear) -> bool {
    let (x, y) = (format(a), format(b));
    (a.n, a.k, a.kind, a.grouped()) == (b.n, b.k, b.kind, b.grouped()) && (x.0, x.2) == (y.0, y.2)
}

/// Every linear of some experts.
fn linears<'a>(experts: &[Ffn<'a, CudaLinear>]) -> impl Iterator<Item = &'a CudaLinear> {
    experts.iter().flat_map(|e| e.gate.into_iter().chain([e.up, e.down]))
}

/// What is added to scores to choose by.
fn correction(rule: &RouterRule) -> Option<&Arc<[f32]>> {
    match &rule.scores {
        RouterScores::Sigmoid { bias, .. } => bias.as_ref(),
        RouterScores::Softmax | RouterScores::SoftmaxOfChosen => None,
    }
}

/// Number of what experts are compared by as kernels/mixture.cu has it, groups, and how many of them are kept.
fn scores_number(scores: &RouterScores) -> (usize, usize, usize) {
    match *scores {
        RouterScores::Softmax => (0, 1, 1),
        RouterScores::SoftmaxOfChosen => (1, 1, 1),
        RouterScores::Sigmoid { groups, top_groups, .. } => (2, groups, top_groups),
    }
}

/// Whether kernels/mixture.cu has what these take: all alike, in formats that its products read.
fn has_kernels(experts: &[Ffn<'_, CudaLinear>]) -> bool {
    let Some(first) = experts.first() else { return false };
    let known = |w: &CudaLinear| {
        w.kind != Kind::F32 && (!w.grouped() || matches!(w.kind, Kind::E4m3 | Kind::Fp8)) && w.rotation.is_none()
    };
    let same_gate = |a: Option<&CudaLinear>| match (a, first.gate) {
        (Some(a), Some(b)) => alike(a, b),
        (a, b) => a.is_none() && b.is_none(),
    };
    let fits = |e: &Ffn<'_, CudaLinear>| {
        same_gate(e.gate) && alike(e.up, first.up) && alike(e.down, first.down) && e.activation == first.activation
    };
    let width = match first.gate {
        Some(gate) => first.activation.is_gated() && gate.k == first.up.k && gate.n == first.up.n,
        None => true,
    };
    let halves = if first.gate.is_none() && first.activation.is_gated() { 2 } else { 1 };
    experts.len() <= MAX_EXPERTS
        && linears(experts).all(known)
        && width
        && first.up.n == halves * first.down.k
        && experts.iter().all(fits)
}

/// The last arguments of a kernel that quantizes a row for each pair, as linears like `w` read it.
fn quantizing<'a>(args: Args<'a>, pairs: &'a Pairs, w: &CudaLinear, side: &'a Side, rows: &'a Rows) -> Args<'a> {
    let (number, _, rule) = format(w);
    args.memory(&pairs.expert_of)
        .memory(&side.scales)
        .memory(&side.pre)
        .int(number)
        .int(rule)
        .int(w.k)
        .int(w.k.next_multiple_of(STEP))
        .memory(&rows.x)
        .optional(rows.scales.as_ref())
}

impl CudaBackend {
    fn side(&self, linears: &[&CudaLinear]) -> Result<Side> {
        let address = |m: Option<&Memory>| m.map_or(0, Memory::address);
        let pointers: Vec<u64> = linears
            .iter()
            .flat_map(|w| {
                let [scales, grid, bias] = [&w.scales, &w.grid, &w.bias].map(|m| address(m.as_ref()));
                [w.words.address(), scales, grid, w.row_scales.address(), bias]
            })
            .collect();
        let scales: Vec<f32> = linears.iter().map(|w| format(w).1).collect();
        let pre: Vec<u64> = linears.iter().map(|w| address(w.pre_quant_scale.as_ref().map(|p| &p.1))).collect();
        Ok(Side {
            pointers: self.device.upload(&pointers)?,
            scales: self.device.upload(&scales)?,
            pre: self.device.upload(&pre)?,
        })
    }

    fn table(&self, experts: &[Ffn<'_, CudaLinear>], rule: &RouterRule) -> Result<Arc<Table>> {
        let ids: Vec<u64> = linears(experts).map(|w| w.id).collect();
        let correction = correction(rule);
        let mut tables = self.mixtures.0.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = |t: &&Arc<Table>| t.ids == ids && t.correction.as_ref().map(|c| &c.0) == correction;
        if let Some(table) = tables.get(&ids[0]).filter(fits) {
            return Ok(table.clone());
        }
        let pre = |w: &CudaLinear| w.pre_quant_scale.as_ref().map(|p| p.0.clone());
        let gates: Vec<&CudaLinear> = experts.iter().filter_map(|e| e.gate).collect();
        let ups: Vec<&CudaLinear> = experts.iter().map(|e| e.up).collect();
        let downs: Vec<&CudaLinear> = experts.iter().map(|e| e.down).collect();
        let same = |(gate, up): (&&CudaLinear, &&CudaLinear)| gate.activation == up.activation && pre(gate) == pre(up);
        let table = Arc::new(Table {
            shared: gates.iter().zip(&ups).all(same),
            correction: correction.map(|c| Ok((c.clone(), self.device.upload(c)?))).transpose()?,
            gate: if gates.is_empty() { None } else { Some(self.side(&gates)?) },
            up: self.side(&ups)?,
            down: self.side(&downs)?,
            ids,
        });
        if tables.len() >= REMEMBERED {
            tables.clear();
        }
        tables.insert(table.ids[0], table.clone());
        Ok(table)
    }

    /// Memory for `rows` rows that linears like `w` read.
    fn rows_for(&self, w: &CudaLinear, rows: usize) -> Result<Rows> {
        let operand = self.operand(w, rows)?;
        Ok(Rows { x: operand.x, scales: operand.scales })
    }

    /// Products of sorted rows, [pairs, n], with linears like `w`; an expert has a row of every token at most.
    fn products(&self, rows: &Rows, pairs: &Pairs, w: &CudaLinear, side: &Side) -> Result<CudaTensor> {
        let y = self.empty(pairs.count, w.n)?;
        let planes = if w.activation == ActivationFormat::Float { 2 } else { 1 };
        let most = pairs.tokens * planes;
        let (outputs, wide) = if matches!(w.kind, Kind::Tcgen { .. }) { (SIDE, SIDE) } else { (ROWS, 32) };
        let columns = if most <= FEW { FEW } else { wide };
        let grouped = if w.grouped() { "g" } else { "" };
        let name = kernel(&format!("mixture_{}_{columns}{grouped}", suffix(w.kind)))?;
        let [of_tokens, of_groups] = scales_of(w.activation, rows.scales.as_ref());
        let args = Args::new()
            .memory(&side.pointers)
            .memory(&pairs.begins)
            .memory(&rows.x)
            .optional(of_tokens)
            .optional(of_groups)
            .memory(&side.scales)
            .memory(&y.data)
            .int(planes)
            .int(w.n)
            .int(w.k.next_multiple_of(STEP));
        self.launch(name, [w.n.div_ceil(outputs), most.div_ceil(columns), pairs.experts], 256, args)?;
        Ok(y)
    }

    /// Routes and sorts the tokens of logits [tokens, experts].
    fn pairs(&self, logits: &CudaTensor, rule: &RouterRule, correction: Option<&Memory>) -> Result<Pairs> {
        let (tokens, experts, top_k) = (logits.rows, logits.columns, rule.top_k);
        let count = tokens * top_k;
        let take = || self.device.take(4 * count);
        let (chosen, weights) = (take()?, take()?);
        let (scores, groups, top_groups) = scores_number(&rule.scores);
        let args = Args::new()
            .memory(&logits.data)
            .optional(correction)
            .memory(&chosen)
            .memory(&weights)
            .int(tokens)
            .int(experts)
            .int(top_k)
            .int(scores)
            .int(groups)
            .int(top_groups)
            .int(usize::from(rule.renormalize.is_some()))
            .float(rule.renormalize.unwrap_or(0.0))
            .float(rule.scale);
        self.launch("mixture_route", [tokens.div_ceil(ROUTERS), 1, 1], 128, args)?;

        let (token_of, expert_of, place) = (take()?, take()?, take()?);
        let begins = self.device.take(4 * (experts + 1))?;
        let args = Args::new()
            .memory(&chosen)
            .memory(&token_of)
            .memory(&expert_of)
            .memory(&place)
            .memory(&begins)
            .int(count)
            .int(top_k)
            .int(experts);
        self.launch("mixture_sort", [experts, 1, 1], 256, args)?;
        Ok(Pairs { tokens, experts, count, weights, token_of, expert_of, place, begins })
    }

    /// Rows of `x` for each pair, as linears like `w` read them.
    fn inputs_of(&self, x: &CudaTensor, pairs: &Pairs, w: &CudaLinear, side: &Side) -> Result<Rows> {
        let rows = self.rows_for(w, pairs.count)?;
        let args = Args::new().memory(&x.data).memory(&pairs.token_of);
        self.launch("mixture_operand", [pairs.count, 1, 1], 256, quantizing(args, pairs, w, side, &rows))?;
        Ok(rows)
    }

    /// [`crate::backend::Backend::mixture`]; `None` where there are no kernels for it.
    pub(super) fn mixture_on_device(
        &self,
        x: &CudaTensor,
        routed: &CudaTensor,
        router: &CudaLinear,
        experts: &[Ffn<'_, CudaLinear>],
        rule: &RouterRule,
    ) -> Result<Option<CudaTensor>> {
        if !has_kernels(experts) || router.n != experts.len() || rule.check(experts.len()).is_err() {
            return Ok(None);
        }
        let x = &self.settled(x)?;
        let table = self.table(experts, rule)?;
        let logits = one(self.linears(routed, &[router])?)?;
        let pairs = &self.pairs(&logits, rule, table.correction.as_ref().map(|c| &c.1))?;

        let Ffn { gate, up, down, activation } = experts[0];
        let mut rows = self.inputs_of(x, pairs, up, &table.up)?;
        let ups = self.products(&rows, pairs, up, &table.up)?;
        let gates = match gate.zip(table.gate.as_ref()) {
            Some((gate, side)) => {
                if !table.shared {
                    rows = self.inputs_of(x, pairs, gate, side)?;
                }
                Some(self.products(&rows, pairs, gate, side)?)
            }
            None => None,
        };

        let rows = self.rows_for(down, pairs.count)?;
        let args = match &gates {
            Some(gates) => Args::new().memory(&gates.data).memory(&ups.data),
            // Gate and up side by side.
            None if activation.is_gated() => Args::new().memory(&ups.data).memory_at(&ups.data, 4 * down.k),
            None => Args::new().memory(&ups.data).optional(None),
        };
        let (kind, limit) = activation_number(activation);
        let args = quantizing(args.int(up.n).int(kind).float(limit), pairs, down, &table.down, &rows);
        self.launch("mixture_activate", [pairs.count, 1, 1], 256, args)?;
        let y = self.products(&rows, pairs, down, &table.down)?;

        let sum = self.empty(pairs.tokens, down.n)?;
        let args = Args::new()
            .memory(&y.data)
            .memory(&pairs.place)
            .memory(&pairs.weights)
            .memory(&sum.data)
            .int(rule.top_k)
            .int(down.n);
        self.launch("mixture_sum", [pairs.tokens, 1, 1], 256, args)?;
        Ok(Some(sum))
    }
}
