//! A mixture of experts with everything between the router and the sum on the device (kernels/mixture.cu): which
//! experts a token goes to stays there too.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use super::driver::{Args, Memory};
use super::product::{format, scales_of};
use super::table::{kernel, suffix};
use super::weight::{Kind, STEP};
use super::{CudaBackend, CudaLinear, CudaTensor};
use crate::backend::{Activation, Backend, Ffn, Result, one};
use crate::formats::linear::ActivationFormat;
use crate::logits::RouterRule;

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
    gate: Side,
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

/// Whether one kernel computes both.
fn alike(a: &CudaLinear, b: &CudaLinear) -> bool {
    let (x, y) = (format(a.activation), format(b.activation));
    (a.n, a.k, a.kind, a.grouped()) == (b.n, b.k, b.kind, b.grouped()) && (x.0, x.2) == (y.0, y.2)
}

/// down(silu(gate x) · up x).
#[derive(Clone, Copy)]
struct Gated<'a> {
    gate: &'a CudaLinear,
    up: &'a CudaLinear,
    down: &'a CudaLinear,
}

/// The experts, if all are of this kind.
fn gated<'a>(experts: &[Ffn<'a, CudaLinear>]) -> Option<Vec<Gated<'a>>> {
    let of = |e: &Ffn<'a, CudaLinear>| {
        let gate = e.gate.filter(|_| e.activation == Activation::Silu)?;
        Some(Gated { gate, up: e.up, down: e.down })
    };
    experts.iter().map(of).collect()
}

/// Whether kernels/mixture.cu has what these take.
fn has_kernels(experts: &[Gated<'_>]) -> bool {
    let Some(first) = experts.first() else { return false };
    let known = |w: &CudaLinear| w.kind != Kind::F32 && (!w.grouped() || w.kind == Kind::E4m3) && w.rotation.is_none();
    let fits = |e: &Gated<'_>| alike(e.gate, first.gate) && alike(e.up, first.up) && alike(e.down, first.down);
    experts.len() <= MAX_EXPERTS
        && experts.iter().flat_map(|e| [e.gate, e.up, e.down]).all(known)
        && first.gate.n == first.up.n
        && first.up.n == first.down.k
        && first.gate.k == first.up.k
        && experts.iter().all(fits)
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
        let scales: Vec<f32> = linears.iter().map(|w| format(w.activation).1).collect();
        let pre: Vec<u64> = linears.iter().map(|w| address(w.pre_quant_scale.as_ref().map(|p| &p.1))).collect();
        Ok(Side {
            pointers: self.device.upload(&pointers)?,
            scales: self.device.upload(&scales)?,
            pre: self.device.upload(&pre)?,
        })
    }

    fn table(&self, experts: &[Gated<'_>]) -> Result<Arc<Table>> {
        let ids: Vec<u64> = experts.iter().flat_map(|e| [e.gate.id, e.up.id, e.down.id]).collect();
        let mut tables = self.mixtures.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(table) = tables.get(&ids[0]).filter(|t| t.ids == ids) {
            return Ok(table.clone());
        }
        let pre = |w: &CudaLinear| w.pre_quant_scale.as_ref().map(|p| p.0.clone());
        let gates: Vec<&CudaLinear> = experts.iter().map(|e| e.gate).collect();
        let ups: Vec<&CudaLinear> = experts.iter().map(|e| e.up).collect();
        let downs: Vec<&CudaLinear> = experts.iter().map(|e| e.down).collect();
        let shared = experts.iter().all(|e| e.gate.activation == e.up.activation && pre(e.gate) == pre(e.up));
        let (gate, up, down) = (self.side(&gates)?, self.side(&ups)?, self.side(&downs)?);
        let table = Arc::new(Table { ids, gate, up, down, shared });
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

    /// Products of sorted rows, [pairs, n], with linears like `w`; an expert has `tokens` rows at most.
    fn products(
        &self,
        (rows, pairs, tokens): (&Rows, usize, usize),
        begins: &Memory,
        w: &CudaLinear,
        (side, experts): (&Side, usize),
    ) -> Result<CudaTensor> {
        let y = self.empty(pairs, w.n)?;
        let planes = if w.activation == ActivationFormat::Float { 2 } else { 1 };
        let columns = if tokens * planes <= 8 { 8 } else { 32 };
        let grouped = if w.grouped() { "g" } else { "" };
        let name = kernel(&format!("mixture_{}_{columns}{grouped}", suffix(w.kind)))?;
        let [of_tokens, of_groups] = scales_of(w.activation, rows.scales.as_ref());
        let args = Args::new()
            .memory(&side.pointers)
            .memory(begins)
            .memory(&rows.x)
            .optional(of_tokens)
            .optional(of_groups)
            .memory(&side.scales)
            .memory(&y.data)
            .int(planes)
            .int(w.n)
            .int(w.k.next_multiple_of(STEP));
        self.launch(name, [w.n.div_ceil(32), (tokens * planes).div_ceil(columns), experts], 256, args)?;
        Ok(y)
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
        let Some(experts) = &gated(experts) else { return Ok(None) };
        let softmax = RouterRule::softmax(rule.top_k, rule.renormalize.is_some());
        if !has_kernels(experts) || router.n != experts.len() || rule.top_k == 0 || *rule != softmax {
            return Ok(None);
        }
        let x = &self.settled(x)?;
        let table = self.table(experts)?;
        let (count, top_k, tokens) = (experts.len(), rule.top_k.min(experts.len()), x.rows);
        let pairs = tokens * top_k;
        let logits = one(self.linears(routed, &[router])?)?;
        let (chosen, weights) = (self.device.take(4 * pairs)?, self.device.take(4 * pairs)?);
        let args = Args::new()
            .memory(&logits.data)
            .memory(&chosen)
            .memory(&weights)
            .int(tokens)
            .int(count)
            .int(top_k)
            .int(usize::from(rule.renormalize.is_some()));
        self.launch("mixture_route", [tokens.div_ceil(ROUTERS), 1, 1], 128, args)?;

        let [token_of, expert_of, place] = [(); 3].map(|()| self.device.take(4 * pairs));
        let (token_of, expert_of, place) = (token_of?, expert_of?, place?);
        let begins = self.device.take(4 * (count + 1))?;
        let args = Args::new()
            .memory(&chosen)
            .memory(&token_of)
            .memory(&expert_of)
            .memory(&place)
            .memory(&begins)
            .int(pairs)
            .int(top_k)
            .int(count);
        self.launch("mixture_sort", [count, 1, 1], 256, args)?;

        let Gated { gate, up, down } = experts[0];
        let input = |w: &CudaLinear, side: &Side| -> Result<Rows> {
            let rows = self.rows_for(w, pairs)?;
            let (number, _, rule) = format(w.activation);
            let args = Args::new()
                .memory(&x.data)
                .memory(&token_of)
                .memory(&expert_of)
                .memory(&side.scales)
                .memory(&side.pre)
                .int(number)
                .int(rule)
                .int(w.k)
                .int(w.k.next_multiple_of(STEP))
                .memory(&rows.x)
                .optional(rows.scales.as_ref());
            self.launch("mixture_operand", [pairs, 1, 1], 256, args)?;
            Ok(rows)
        };
        let rows = input(gate, &table.gate)?;
        let gates = self.products((&rows, pairs, tokens), &begins, gate, (&table.gate, count))?;
        let rows = if table.shared { rows } else { input(up, &table.up)? };
        let ups = self.products((&rows, pairs, tokens), &begins, up, (&table.up, count))?;

        let rows = self.rows_for(down, pairs)?;
        let (number, _, rule) = format(down.activation);
        let args = Args::new()
            .memory(&gates.data)
            .memory(&ups.data)
            .memory(&expert_of)
            .memory(&table.down.scales)
            .memory(&table.down.pre)
            .int(number)
            .int(rule)
            .int(down.k)
            .int(down.k.next_multiple_of(STEP))
            .memory(&rows.x)
            .optional(rows.scales.as_ref());
        self.launch("mixture_silu", [pairs, 1, 1], 256, args)?;
        let y = self.products((&rows, pairs, tokens), &begins, down, (&table.down, count))?;

        let sum = self.empty(tokens, down.n)?;
        let args = Args::new().memory(&y.data).memory(&place).memory(&weights).memory(&sum.data).int(top_k).int(down.n);
        self.launch("mixture_sum", [tokens, 1, 1], 256, args)?;
        Ok(Some(sum))
    }
}
