//! Rotation, KV cache and causal grouped-query attention as one operation with its gradient.
//!
//! Scores are never kept: the backward pass makes them again from queries, keys and each row's log of the sum of
//! exponentials. Queries go in tiles, so that what causality hides is not computed.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::{Norm, host};
use crate::backend::autograd::dense::{View, serial_f32};
use crate::backend::cpu::elementwise::exp;
use crate::backend::cpu::isa::{Isa, multiversion};
use crate::backend::cpu::recurrent::RecurrentStates;
use crate::backend::{AttentionShape, CacheLayout, HostPass, LayerCache, PAGE, Span};
use crate::formats::fp8;
use crate::formats::kv::KvFormat;

/// Keys (rotated) and values of every layer, rounded as the layer's format stores them; and states of recurrent layers.
#[derive(Debug)]
pub struct KvCache {
    layers: Vec<Layer>,
    pages: usize,
    pub(super) states: RecurrentStates,
}

#[derive(Debug)]
struct Layer {
    shape: LayerCache,
    /// Only the pages that were written.
    pages: BTreeMap<u32, Page>,
}

#[derive(Clone, Debug)]
struct Page {
    /// [tokens, kv_heads · head_dim].
    keys: Vec<f32>,
    /// [tokens, kv_heads · value_dim].
    values: Vec<f32>,
}

type Cached = (Arc<Vec<f32>>, Arc<Vec<f32>>);

impl KvCache {
    pub(super) fn new(layout: &CacheLayout) -> Self {
        let layer = |&shape| Layer { shape, pages: BTreeMap::new() };
        let mut states = RecurrentStates::new(&layout.recurrent.iter().copied().map(Some).collect::<Vec<_>>());
        states.grow(layout.slots);
        Self { layers: layout.layers.iter().map(layer).collect(), pages: layout.pages, states }
    }

    /// What recurrent layer `layer` keeps; nothing where there is room for no sequence.
    pub(super) fn states_of(&mut self, layer: usize) -> Option<(&mut RecurrentStates, usize)> {
        (self.states.slots() > 0).then_some((&mut self.states, layer))
    }

    /// Room for `pages` pages, if there are fewer.
    pub(super) fn grow(&mut self, pages: usize) {
        self.pages = self.pages.max(pages);
    }

    /// Copies the page in which `to` parts from `from`.
    pub(super) fn fork(&mut self, from: &Span, to: &Span) -> Result<()> {
        if to.start.is_multiple_of(PAGE) {
            return Ok(());
        }
        let at = to.start / PAGE;
        let (Some(from), Some(to)) = (from.pages.get(at), to.pages.get(at)) else {
            bail!("the page in which the sequences part is in neither list")
        };
        for layer in &mut self.layers {
            let Some(page) = layer.pages.get(from).cloned() else { bail!("page {from} holds nothing") };
            layer.pages.insert(*to, page);
        }
        Ok(())
    }
}

impl Layer {
    /// Rounds new keys and values, keeps them after the first `span.start` tokens of the sequence and returns all of them.
    /// A span without pages, which must begin its sequence, is not kept: training never reads it again.
    fn extend(&mut self, span: &Span, mut k: Vec<f32>, mut v: Vec<f32>) -> Result<Cached> {
        let width = self.shape.kv_heads * self.shape.head_dim;
        let value_width = self.shape.kv_heads * self.shape.value_dim;
        let round = |x: &mut [f32], scale: f32| x.iter_mut().for_each(|x| *x = fp8::round(*x, scale) * scale);
        let to_bf16 = |x: &mut [f32]| x.iter_mut().for_each(|x| *x = half::bf16::from_f32(*x).to_f32());
        match self.shape.format {
            KvFormat::F32 => {}
            KvFormat::Bf16 => [&mut k, &mut v].into_iter().for_each(|x| to_bf16(x)),
            KvFormat::Fp8 { k_scale, v_scale } => {
                round(&mut k, k_scale);
                round(&mut v, v_scale);
            }
        }
        if span.pages.is_empty() && span.start == 0 {
            return Ok((Arc::new(k), Arc::new(v)));
        }
        let (mut all_k, mut all_v) = (Vec::new(), Vec::new());
        for (i, page) in span.pages[..span.start.div_ceil(PAGE)].iter().enumerate() {
            let wanted = (span.start - i * PAGE).min(PAGE);
            let Some(page) = self.pages.get(page).filter(|p| p.keys.len() >= wanted * width) else {
                bail!("page {page} holds fewer tokens than the {} that the span starts after", span.start)
            };
            all_k.extend_from_slice(&page.keys[..wanted * width]);
            all_v.extend_from_slice(&page.values[..wanted * value_width]);
        }
        for (i, (k, v)) in k.chunks_exact(width).zip(v.chunks_exact(value_width)).enumerate() {
            let position = span.start + i;
            let empty = || Page { keys: Vec::new(), values: Vec::new() };
            let page = self.pages.entry(span.pages[position / PAGE]).or_insert_with(empty);
            page.keys.truncate(position % PAGE * width);
            page.values.truncate(position % PAGE * value_width);
            page.keys.extend_from_slice(k);
            page.values.extend_from_slice(v);
        }
        all_k.append(&mut k);
        all_v.append(&mut v);
        Ok((Arc::new(all_k), Arc::new(all_v)))
    }
}

/// Writes k and v to the cache and attends: q [T, heads · d], k [T, kv_heads · d], v [T, kv_heads · value_dim] to
/// [T, heads · value_dim]. Gradients go to what is new in the batch; what was in the cache is constant, and rounding into
/// the cache is passed straight through. `sinks` [heads] are scores that join each softmax and have no value; their gradient
/// is summed in themselves.
#[allow(clippy::too_many_arguments)]
pub(super) fn attend(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    sinks: Option<&Norm>,
    shape: &AttentionShape,
    pass: &HostPass,
    cache: &mut KvCache,
) -> Result<Tensor> {
    let capacity = cache.pages;
    let Some(layer) = cache.layers.get_mut(shape.cache) else { bail!("the cache has no layer {}", shape.layer) };
    let value_dim = layer.shape.value_dim;
    let (width, value_width) = (shape.kv_heads * shape.head_dim, shape.kv_heads * value_dim);
    let copy = |x: &Tensor| host::with(x, |x| Ok(x.to_vec()));
    let (mut queries, mut keys, values) = (copy(q)?, copy(k)?, copy(v)?);
    if let Some(sinks) = sinks.filter(|s| s.weight().len() != shape.heads) {
        bail!("{} sinks of {} heads", sinks.weight().len(), shape.heads)
    }
    rotate(&mut queries, shape, pass, 1.0);
    grow(&mut queries, shape, pass);
    rotate(&mut keys, shape, pass, 1.0);
    let mut spans = Vec::with_capacity(pass.batch.spans.len());
    let mut row = 0;
    for span in &pass.batch.spans {
        let room = span.pages.len() * PAGE;
        let kept = span.start > 0 || !span.pages.is_empty();
        if (kept && room < span.start + span.len) || span.pages.iter().any(|p| *p as usize >= capacity) {
            bail!("the KV cache has {capacity} pages; a sequence of {} tokens needs others", span.start + span.len)
        }
        let of = |x: &[f32], width: usize| x[row * width..(row + span.len) * width].to_vec();
        let (keys, values) = layer.extend(span, of(&keys, width), of(&values, value_width))?;
        spans.push(Sequence { row, start: span.start, len: span.len, keys, values });
        row += span.len;
    }
    let sinks = sinks.map(|s| (s.clone(), s.weight()));
    let attention = Attention { shape: *shape, value_dim, pass: pass.clone(), queries, spans, sinks };
    q.contiguous()?.apply_op3(&k.contiguous()?, &v.contiguous()?, attention)
}

/// Turns every head of every token of x [T, heads · head_dim]; `direction` -1 turns back.
pub(super) fn rotate(x: &mut [f32], shape: &AttentionShape, pass: &HostPass, direction: f32) {
    let Some(rope) = shape.rope.map(|r| &pass.ropes[r]) else { return };
    let width = x.len() / pass.positions.len().max(1);
    let tokens = x.par_chunks_mut(width.max(1)).zip(&pass.positions);
    tokens.for_each(|(token, &position)| rope.turn(token, shape.head_dim, position, direction));
}

/// Multiplies queries by what they grow by with their position.
fn grow(x: &mut [f32], shape: &AttentionShape, pass: &HostPass) {
    let Some(growth) = shape.growth else { return };
    let width = shape.heads * shape.head_dim;
    let tokens = x.par_chunks_mut(width.max(1)).zip(&pass.positions);
    tokens.for_each(|(token, &position)| {
        let factor = growth.at(position);
        token.iter_mut().for_each(|v| *v *= factor);
    });
}

/// New tokens of one sequence with all of its keys and values.
struct Sequence {
    /// Its first row in the batch.
    row: usize,
    start: usize,
    len: usize,
    keys: Arc<Vec<f32>>,
    values: Arc<Vec<f32>>,
}

struct Attention {
    shape: AttentionShape,
    value_dim: usize,
    pass: HostPass,
    /// Rotated, [T, heads · d].
    queries: Vec<f32>,
    spans: Vec<Sequence>,
    /// And their values, [heads].
    sinks: Option<(Norm, Arc<Vec<f32>>)>,
}

/// Queries in a tile.
const TILE: usize = 64;

/// Gradients of one KV head of one sequence: of its queries [heads that share it, len, d], keys [len, d], values
/// [len, value_dim], and sinks [heads that share it].
struct HeadGradient {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    sinks: Vec<f32>,
}

impl Attention {
    /// (sequence, KV head) of every independent piece of work.
    fn pieces(&self) -> Vec<(usize, usize)> {
        (0..self.spans.len()).flat_map(|s| (0..self.shape.kv_heads).map(move |h| (s, h))).collect()
    }

    fn tokens(&self) -> usize {
        self.spans.iter().map(|s| s.len).sum()
    }

    /// What `all` heads of `d` hold of one of them and one sequence, [len, d].
    fn of_head<'a>(&self, all: &'a [f32], span: &Sequence, head: usize, d: usize) -> View<'a, f32> {
        let width = self.shape.heads * d;
        View::new(all, all.len() / width, width).rows(span.row, span.len).columns(head * d, d)
    }

    /// Rotated queries of one head, [len, d].
    fn queries_of(&self, span: &Sequence, head: usize) -> View<'_, f32> {
        self.of_head(&self.queries, span, head, self.shape.head_dim)
    }

    /// Keys of one head, [start + len, d].
    fn keys_of<'a>(&self, span: &'a Sequence, kv_head: usize) -> View<'a, f32> {
        cached(&span.keys, self.shape.kv_heads, kv_head, self.shape.head_dim)
    }

    /// Values of one head, [start + len, value_dim].
    fn values_of<'a>(&self, span: &'a Sequence, kv_head: usize) -> View<'a, f32> {
        cached(&span.values, self.shape.kv_heads, kv_head, self.value_dim)
    }

    /// Keys that a tile of queries sees: from the first that the first query sees to the last query's own.
    fn seen(&self, span: &Sequence, from: usize, rows: usize) -> (usize, usize) {
        let first = self.shape.window.map_or(0, |w| (span.start + from + 1).saturating_sub(w));
        (first, span.start + from + rows)
    }

    /// Probabilities [rows, seen] of queries `from..from + rows`, and [rows] what the head's sink takes of each.
    #[allow(clippy::too_many_arguments)]
    fn probabilities(
        &self,
        span: &Sequence,
        kv_head: usize,
        head: usize,
        from: usize,
        rows: usize,
        p: &mut Vec<f32>,
        sink_shares: &mut Vec<f32>,
    ) {
        let sink = self.sinks.as_ref().and_then(|(_, s)| s.get(head).copied()).unwrap_or(f32::NEG_INFINITY);
        sink_shares.clear();
        let (first, end) = self.seen(span, from, rows);
        let seen = end - first;
        p.clear();
        p.resize(rows * seen, 0.0);
        let q = self.queries_of(span, head).rows(from, rows);
        let keys = self.keys_of(span, kv_head).rows(first, seen);
        serial_f32(p, seen, false, self.shape.scale, q, keys.t());
        let window = self.shape.window.unwrap_or(usize::MAX);
        for (row, p) in p.chunks_exact_mut(seen).enumerate() {
            let query = span.start + from + row;
            let own = query + 1 - first;
            let hidden = (query + 1).saturating_sub(window).saturating_sub(first);
            p[own..].fill(0.0);
            p[..hidden].fill(0.0);
            let mut share = 0.0;
            softmax(Isa::detect(), &mut p[hidden..own], sink, &mut share);
            sink_shares.push(share);
        }
    }

    /// Output of one KV head of one sequence, [heads that share it, len, value_dim].
    fn forward(&self, (s, kv_head): (usize, usize)) -> Vec<f32> {
        let (span, d) = (&self.spans[s], self.value_dim);
        let share = self.shape.heads / self.shape.kv_heads;
        let mut out = vec![0.0; share * span.len * d];
        let (mut p, mut sink_shares) = (Vec::new(), Vec::new());
        for (i, out) in out.chunks_exact_mut(span.len * d).enumerate() {
            for (from, out) in (0..span.len).step_by(TILE).zip(out.chunks_mut(TILE * d)) {
                let rows = out.len() / d;
                self.probabilities(span, kv_head, kv_head * share + i, from, rows, &mut p, &mut sink_shares);
                let (first, end) = self.seen(span, from, rows);
                let values = self.values_of(span, kv_head).rows(first, end - first);
                serial_f32(out, d, false, 1.0, View::new(&p, rows, end - first), values);
            }
        }
        out
    }

    fn backward(&self, (s, kv_head): (usize, usize), grad: &[f32], result: &[f32]) -> HeadGradient {
        let (span, d, value_dim) = (&self.spans[s], self.shape.head_dim, self.value_dim);
        let share = self.shape.heads / self.shape.kv_heads;
        let all = span.start + span.len;
        let zeros = |count: usize| vec![0.0; count];
        let mut out = HeadGradient {
            q: zeros(share * span.len * d),
            k: zeros(all * d),
            v: zeros(all * value_dim),
            sinks: zeros(share),
        };
        let (mut p, mut dp, mut sink_shares) = (Vec::new(), Vec::new(), Vec::new());
        let width = self.shape.heads * value_dim;
        for i in 0..share {
            let head = kv_head * share + i;
            for from in (0..span.len).step_by(TILE) {
                let rows = TILE.min(span.len - from);
                let (first, end) = self.seen(span, from, rows);
                let seen = end - first;
                self.probabilities(span, kv_head, head, from, rows, &mut p, &mut sink_shares);
                let own_grad = self.of_head(grad, span, head, value_dim).rows(from, rows);
                // dV += Pᵀ · dO, dP = dO · Vᵀ.
                let weights = View::new(&p, rows, seen);
                let dv = &mut out.v[first * value_dim..end * value_dim];
                serial_f32(dv, value_dim, true, 1.0, weights.t(), own_grad);
                dp.clear();
                dp.resize(rows * seen, 0.0);
                let values = self.values_of(span, kv_head).rows(first, seen);
                serial_f32(&mut dp, seen, false, 1.0, own_grad, values.t());
                // dS = P · (dP - dO · O), row by row.
                for (row, (dp, p)) in dp.chunks_exact_mut(seen).zip(p.chunks_exact(seen)).enumerate() {
                    let at = (span.row + from + row) * width + head * value_dim;
                    let part = at..at + value_dim;
                    let along: f32 = grad[part.clone()].iter().zip(&result[part]).map(|(g, o)| g * o).sum();
                    dp.iter_mut().zip(p).for_each(|(dp, p)| *dp = p * (*dp - along));
                    out.sinks[i] -= sink_shares[row] * along;
                }
                let ds = View::new(&dp, rows, seen);
                let q = self.queries_of(span, head).rows(from, rows);
                let keys = self.keys_of(span, kv_head).rows(first, seen);
                let dq = &mut out.q[(i * span.len + from) * d..][..rows * d];
                serial_f32(dq, d, false, self.shape.scale, ds, keys);
                serial_f32(&mut out.k[first * d..end * d], d, true, self.shape.scale, ds.t(), q);
            }
        }
        out
    }
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        layout: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (d, heads) = (self.value_dim, self.shape.heads);
        let share = heads / self.shape.kv_heads;
        let pieces = self.pieces();
        let parts: Vec<Vec<f32>> = pieces.par_iter().map(|piece| self.forward(*piece)).collect();
        let mut out = vec![0.0; self.tokens() * heads * d];
        for ((s, kv_head), part) in pieces.into_iter().zip(parts) {
            let span = &self.spans[s];
            scatter(&part, &mut out, span.row, span.len, heads, d, kv_head * share);
        }
        Ok((CpuStorage::F32(out), Shape::from((layout.dims()[0], heads * d))))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        result: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let AttentionShape { head_dim: d, heads, kv_heads, .. } = self.shape;
        let value_dim = self.value_dim;
        let pieces = self.pieces();
        let parts: Vec<HeadGradient> = host::with(grad, |grad| {
            host::with(result, |result| Ok(pieces.par_iter().map(|p| self.backward(*p, grad, result)).collect()))
        })?;
        let tokens = self.tokens();
        let [mut dq, mut dk, mut dv] =
            [heads * d, kv_heads * d, kv_heads * value_dim].map(|width| vec![0.0; tokens * width]);
        for ((s, kv_head), part) in pieces.into_iter().zip(parts) {
            let span = &self.spans[s];
            if let Some(sum) = self.sinks.as_ref().map(|(s, _)| s.gradient()).as_mut().and_then(|g| g.as_mut()) {
                let own = &mut sum[kv_head * (heads / kv_heads)..];
                own.iter_mut().zip(&part.sinks).for_each(|(sum, part)| *sum += part);
            }
            scatter(&part.q, &mut dq, span.row, span.len, heads, d, kv_head * (heads / kv_heads));
            scatter(&part.k[span.start * d..], &mut dk, span.row, span.len, kv_heads, d, kv_head);
            scatter(&part.v[span.start * value_dim..], &mut dv, span.row, span.len, kv_heads, value_dim, kv_head);
        }
        grow(&mut dq, &self.shape, &self.pass);
        rotate(&mut dq, &self.shape, &self.pass, -1.0);
        rotate(&mut dk, &self.shape, &self.pass, -1.0);
        let tensor = |values, like: &Tensor| Tensor::from_vec(values, like.shape(), like.device());
        Ok((Some(tensor(dq, q)?), Some(tensor(dk, k)?), Some(tensor(dv, v)?)))
    }
}

/// Keys or values of one KV head, [tokens, d], of those of all.
fn cached(all: &[f32], kv_heads: usize, kv_head: usize, d: usize) -> View<'_, f32> {
    let width = kv_heads * d;
    View::new(all, all.len() / width, width).columns(kv_head * d, d)
}

/// Puts `part` [heads, len, d] into columns of `all` [T, all heads · d], from token `row` and head `head` on.
fn scatter(part: &[f32], all: &mut [f32], row: usize, len: usize, heads: usize, d: usize, head: usize) {
    for (i, part) in part.chunks_exact(len * d).enumerate() {
        for (t, values) in part.chunks_exact(d).enumerate() {
            let at = ((row + t) * heads + head + i) * d;
            all[at..at + d].copy_from_slice(values);
        }
    }
}

multiversion! {
    /// `sink`: a score that joins and takes `share`; -∞: none.
    fn softmax(row: &mut [f32], sink: f32, share: &mut f32) {
        let max = row.iter().fold(sink, |m, v| m.max(*v));
        let mut lanes = [0.0f32; 16];
        for run in row.chunks_mut(16) {
            for (v, lane) in run.iter_mut().zip(&mut lanes) {
                *v = exp(*v - max);
                *lane += *v;
            }
        }
        *share = exp(sink - max);
        let inverse = 1.0 / (lanes.iter().sum::<f32>() + *share);
        *share *= inverse;
        row.iter_mut().for_each(|v| *v *= inverse);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_span_that_starts_past_the_cache_is_an_error() {
        let shape = LayerCache { format: KvFormat::F32, kv_heads: 1, head_dim: 2, value_dim: 2 };
        let mut layer = Layer { shape, pages: BTreeMap::new() };
        let span = |start| Span { start, len: 1, pages: vec![0], slot: 0 };
        let mut extend = |start| layer.extend(&span(start), vec![0.0; 2], vec![0.0; 2]);
        assert!(extend(1).is_err());
        assert!(extend(0).is_ok());
        assert!(extend(2).is_err());
        assert_eq!(extend(1).unwrap().0.len(), 4);
    }
}
