//! Causal grouped-query attention over a paged KV cache.
//!
//! Per layer, page and KV head: keys as [head_dim][16 tokens], one token per SIMD lane; values as [16 tokens][value_dim].
//! A query's arithmetic never depends on which other queries are computed with it: scores are one fused multiply-add
//! per dimension in order, the softmax sum keeps 16 partial sums by position modulo 16, and values are added in the
//! order of positions. A head's sink joins the maximum and, last, the sum; it has no value.

use std::cell::RefCell;
use std::ops::Range;

use super::elementwise::{LANES, exp, largest, tree_sum};
use super::isa::{Isa, Kind};
use super::lanes::{self, Lanes};
use super::threads::Threads;
use crate::backend::{AttentionShape, Batch, CacheLayout, LayerCache, PAGE, Span};
use crate::formats::kv::KvFormat;
use crate::formats::{e4m3, fp8};

/// Rows (queries of one head each) that share one pass over the pages, about.
const TASK_ROWS: usize = 32;
/// Queries of one head that do, at most.
const QUERY_BLOCK: usize = 16;

/// Keys and values of every layer.
#[derive(Debug)]
pub struct KvCache {
    layers: Vec<Layer>,
    pages: usize,
}

#[derive(Debug)]
struct Layer {
    shape: LayerCache,
    keys: Store,
    values: Store,
}

impl Layer {
    /// Elements of one page's keys of one KV head, and of its values.
    fn tiles(&self) -> [usize; 2] {
        [self.shape.head_dim, self.shape.value_dim].map(|d| PAGE * d)
    }

    /// Where the keys of a page and KV head begin, and where its values do.
    fn offsets(&self, page: u32, kv_head: usize) -> [usize; 2] {
        self.tiles().map(|tile| (page as usize * self.shape.kv_heads + kv_head) * tile)
    }
}

#[derive(Debug)]
enum Store {
    F32(Vec<f32>),
    Bf16(Vec<u16>),
    Fp8(Vec<u8>, f32),
}

impl Store {
    fn new(format: KvFormat, elements: usize, value: bool) -> Self {
        // Zeroed memory comes from the system lazily: pages never written take no space.
        match format {
            KvFormat::F32 => Self::F32(vec![0.0; elements]),
            KvFormat::Bf16 => Self::Bf16(vec![0; elements]),
            KvFormat::Fp8 { k_scale, v_scale } => Self::Fp8(vec![0; elements], if value { v_scale } else { k_scale }),
        }
    }

    /// Room for `elements` in all; no more is reserved.
    fn grow(&mut self, elements: usize) {
        fn to<T: Clone>(v: &mut Vec<T>, elements: usize, zero: T) {
            v.reserve_exact(elements.saturating_sub(v.len()));
            v.resize(elements.max(v.len()), zero);
        }
        match self {
            Self::F32(v) => to(v, elements, 0.0),
            Self::Bf16(v) => to(v, elements, 0),
            Self::Fp8(v, _) => to(v, elements, 0),
        }
    }

    /// Writes `to(i) = x[i]` for each, encoded.
    fn write(&mut self, x: &[f32], to: impl Fn(usize) -> usize) {
        match self {
            Self::F32(v) => x.iter().enumerate().for_each(|(i, x)| v[to(i)] = *x),
            Self::Bf16(v) => x.iter().enumerate().for_each(|(i, x)| v[to(i)] = half::bf16::from_f32(*x).to_bits()),
            Self::Fp8(v, scale) => x.iter().enumerate().for_each(|(i, x)| v[to(i)] = fp8::encode(*x, *scale)),
        }
    }

    /// Copies `count` elements.
    fn copy(&mut self, from: usize, to: usize, count: usize) {
        match self {
            Self::F32(v) => v.copy_within(from..from + count, to),
            Self::Bf16(v) => v.copy_within(from..from + count, to),
            Self::Fp8(v, _) => v.copy_within(from..from + count, to),
        }
    }

    /// `scratch.len()` elements from `index` on, decoded into `scratch` where they are not f32 already.
    fn read<'a>(&'a self, index: usize, scratch: &'a mut [f32]) -> &'a [f32] {
        let n = scratch.len();
        match self {
            Self::F32(v) => return &v[index..index + n],
            Self::Bf16(v) => {
                for (s, &b) in scratch.iter_mut().zip(&v[index..]) {
                    *s = f32::from_bits(u32::from(b) << 16);
                }
            }
            Self::Fp8(v, scale) => {
                for (s, &c) in scratch.iter_mut().zip(&v[index..]) {
                    *s = e4m3::decode(c) * scale;
                }
            }
        }
        scratch
    }
}

impl KvCache {
    /// An empty cache.
    #[must_use]
    pub fn new(layout: &CacheLayout) -> Self {
        let layer = |&shape: &LayerCache| {
            let store = |d, value| Store::new(shape.format, layout.pages * shape.kv_heads * PAGE * d, value);
            Layer { shape, keys: store(shape.head_dim, false), values: store(shape.value_dim, true) }
        };
        Self { layers: layout.layers.iter().map(layer).collect(), pages: layout.pages }
    }

    /// Room for `pages` pages, if there are fewer.
    pub(super) fn grow(&mut self, pages: usize) {
        self.pages = self.pages.max(pages);
        for layer in &mut self.layers {
            let [keys, values] = layer.offsets(self.pages as u32, 0);
            layer.keys.grow(keys);
            layer.values.grow(values);
        }
    }

    /// Tokens it can hold.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.pages * PAGE
    }

    /// Format of each layer.
    pub fn formats(&self) -> impl Iterator<Item = KvFormat> {
        self.layers.iter().map(|l| l.shape.format)
    }

    /// Copies a page's keys and values, of all layers, onto another page.
    pub(super) fn copy_page(&mut self, from: u32, to: u32) {
        for layer in &mut self.layers {
            let [keys, values] = layer.tiles().map(|tile| layer.shape.kv_heads * tile);
            let (from, to) = (layer.offsets(from, 0), layer.offsets(to, 0));
            layer.keys.copy(from[0], to[0], keys);
            layer.values.copy(from[1], to[1], values);
        }
    }

    /// Values of a value in a layer.
    pub(super) fn value_dim(&self, layer: usize) -> usize {
        self.layers[layer].shape.value_dim
    }

    /// Writes the new tokens of `batch`: k (already rotated) [T, kv_heads · head_dim], v [T, kv_heads · value_dim].
    pub(super) fn write(&mut self, layer: usize, batch: &Batch, k: &[f32], v: &[f32]) {
        let layer = &mut self.layers[layer];
        let LayerCache { kv_heads, head_dim, value_dim, .. } = layer.shape;
        let mut row = 0;
        for span in &batch.spans {
            for position in span.start..span.start + span.len {
                let (page, lane) = (span.pages[position / PAGE], position % PAGE);
                for head in 0..kv_heads {
                    let [key, value] = layer.offsets(page, head);
                    let of = |d: usize| (row * kv_heads + head) * d..(row * kv_heads + head + 1) * d;
                    layer.keys.write(&k[of(head_dim)], |i| key + i * PAGE + lane);
                    layer.values.write(&v[of(value_dim)], |i| value + lane * value_dim + i);
                }
                row += 1;
            }
        }
    }
}

/// Raw pointer to the output; tasks write disjoint parts of it.
#[derive(Clone, Copy)]
struct Output(*mut f32);
// SAFETY: each task writes the heads of its own queries only.
unsafe impl Send for Output {}
// SAFETY: as above.
unsafe impl Sync for Output {}

impl Output {
    /// # Safety
    /// `index` lies inside the output.
    unsafe fn at(self, index: usize) -> *mut f32 {
        // SAFETY: the caller's.
        unsafe { self.0.add(index) }
    }
}

/// Attends: q [T, heads · d] (rotated) to `out` [T, heads · value_dim], over what the cache holds up to each token.
/// `sinks` [heads]: scores that take a share of the softmax and give nothing.
#[allow(clippy::too_many_arguments)]
pub(super) fn attend(
    isa: Isa,
    threads: &Threads,
    cache: &KvCache,
    shape: &AttentionShape,
    sinks: Option<&[f32]>,
    batch: &Batch,
    q: &[f32],
    out: &mut [f32],
) {
    let heads = shape.heads / shape.kv_heads;
    let queries = (TASK_ROWS / heads).clamp(1, QUERY_BLOCK);
    let mut tasks = Vec::new();
    let mut row = 0;
    for span in &batch.spans {
        for first in (0..span.len).step_by(queries) {
            let count = queries.min(span.len - first);
            tasks.extend((0..shape.kv_heads).map(|head| (span, row + first, span.start + first, count, head)));
        }
        row += span.len;
    }
    let value_dim = cache.value_dim(shape.cache);
    let (width, share) = (shape.heads * shape.head_dim, heads * shape.head_dim);
    let (out_width, out_share) = (shape.heads * value_dim, heads * value_dim);
    assert_eq!((q.len(), out.len()), (row * width, row * out_width), "queries or their results have the wrong size");
    assert!(sinks.is_none_or(|s| s.len() == shape.heads), "a sink for each head");
    let output = Output(out.as_mut_ptr());
    threads.run(tasks.len(), |i| {
        let (span, row, position, count, head) = tasks[i];
        let sinks = sinks.map(|s| &s[head * heads..][..heads]);
        let task = Task { cache, shape, sinks, span, position, count, head };
        let mut queries = [&q[..0]; QUERY_BLOCK];
        for (i, query) in queries[..count].iter_mut().enumerate() {
            *query = &q[(row + i) * width + head * share..][..share];
        }
        SCRATCH.with_borrow_mut(|(scratch, results)| {
            results.resize(count * out_share, 0.0);
            block(isa, &task, &queries[..count], scratch, results);
            for (i, result) in results.chunks_exact(out_share).enumerate() {
                // SAFETY: rows `row..row + count`, heads of KV head `head`: this task's own part of `out`.
                unsafe {
                    let to = output.at((row + i) * out_width + head * out_share);
                    std::ptr::copy_nonoverlapping(result.as_ptr(), to, out_share);
                }
            }
        });
    });
}

thread_local! {
    /// Scores and results of a task.
    static SCRATCH: RefCell<(Vec<f32>, Vec<f32>)> = const { RefCell::new((Vec::new(), Vec::new())) };
}

/// Some consecutive queries of one sequence, and one KV head.
struct Task<'a> {
    cache: &'a KvCache,
    shape: &'a AttentionShape,
    /// Of the query heads that share the KV head.
    sinks: Option<&'a [f32]>,
    span: &'a Span,
    /// Position of the first query.
    position: usize,
    count: usize,
    head: usize,
}

/// Pages that are gone through at once, and rows (queries of one head each) that share what is read of them.
const STRIP: usize = 4;
const ROWS: usize = 4;

/// `queries[i]` holds the query heads that share the KV head; `results` likewise, [count, heads, value_dim].
fn block(isa: Isa, t: &Task<'_>, queries: &[&[f32]], scratch: &mut Vec<f32>, results: &mut [f32]) {
    /// Within `target_feature`, so that everything is compiled for it.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")]
    fn avx512(t: &Task<'_>, queries: &[&[f32]], scratch: &mut Vec<f32>, results: &mut [f32]) {
        // SAFETY: the CPU has what this function needs.
        unsafe { block_of::<lanes::Avx512>(t, queries, scratch, results) }
    }
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn avx2(t: &Task<'_>, queries: &[&[f32]], scratch: &mut Vec<f32>, results: &mut [f32]) {
        // SAFETY: as above.
        unsafe { block_of::<lanes::Avx2>(t, queries, scratch, results) }
    }
    // SAFETY: an Isa of a kind exists only if the CPU has its features.
    unsafe {
        match isa.kind() {
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => avx512(t, queries, scratch, results),
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 | Kind::AvxVnni => avx2(t, queries, scratch, results),
            #[cfg(target_arch = "aarch64")]
            Kind::Neon => block_of::<lanes::Neon>(t, queries, scratch, results),
            _ => block_of::<[f32; LANES]>(t, queries, scratch, results),
        }
    }
}

/// # Safety
/// The CPU has the instruction set of `V`.
#[inline(always)]
unsafe fn block_of<V: Lanes>(t: &Task<'_>, queries: &[&[f32]], scratch: &mut Vec<f32>, results: &mut [f32]) {
    let d = t.shape.head_dim;
    let share = t.shape.heads / t.shape.kv_heads;
    let layer = &t.cache.layers[t.shape.cache];
    // First key that query `i` sees, and one past its last.
    let range = |i: usize| {
        let position = t.position + i;
        (t.shape.window.map_or(0, |w| (position + 1).saturating_sub(w)), position + 1)
    };
    let first_page = range(0).0 / PAGE;
    let pages = &t.span.pages[first_page..=(range(t.count - 1).1 - 1) / PAGE];
    let length = pages.len() * PAGE;
    let value_dim = layer.shape.value_dim;
    let [key_tile, value_tile] = layer.tiles();
    let rows = t.count * share;
    // What a row sees, counted from the first page's first position.
    let seen = |row: usize| {
        let (from, to) = range(row / share);
        (from - first_page * PAGE, to - first_page * PAGE)
    };
    let query = |row: usize| &queries[row / share][row % share * d..][..d];
    // Where the strip's keys (`of` 0) or values (1) of this head are, decoded into `scratch` where they are not f32.
    let strip = |of: usize, pages: &[u32], scratch: &mut [f32]| {
        let (store, tile) = if of == 0 { (&layer.keys, key_tile) } else { (&layer.values, value_tile) };
        let mut at = [std::ptr::null::<f32>(); STRIP];
        for ((at, &page), scratch) in at.iter_mut().zip(pages).zip(scratch.chunks_exact_mut(tile)) {
            *at = store.read(layer.offsets(page, t.head)[of], scratch).as_ptr();
        }
        at
    };

    let room = rows * length;
    let needed = room + STRIP * key_tile.max(value_tile) + rows;
    if scratch.len() < needed {
        scratch.resize(needed, 0.0);
    }
    let (scores, rest) = scratch.split_at_mut(room);
    let (sums, decoded) = rest.split_at_mut(rows);

    for (s, pages) in pages.chunks(STRIP).enumerate() {
        let keys = strip(0, pages, decoded);
        for first in (0..rows).step_by(ROWS) {
            let to = scores[first * length + s * STRIP * PAGE..].as_mut_ptr();
            let at = Scores { query: &query, first, keys: &keys[..pages.len()], scale: t.shape.scale, to, length };
            // SAFETY: the caller's for the instruction set; a row's scores are `length` apart, and there are `rows`.
            unsafe {
                match rows - first {
                    1 => at.rows::<V, 1>(),
                    2 => at.rows::<V, 2>(),
                    3 => at.rows::<V, 3>(),
                    _ => at.rows::<V, ROWS>(),
                }
            }
        }
    }

    // Softmax numerators in place, zero outside the range; sums by position modulo 16.
    for (row, sum) in sums.iter_mut().enumerate() {
        let (from, to) = seen(row);
        let scores = &mut scores[row * length..][..length];
        let sink = t.sinks.map(|s| s[row % share]);
        let max = largest(&scores[from..to], sink.unwrap_or(f32::NEG_INFINITY));
        let mut lanes = [0.0f32; LANES];
        for (p, scores) in scores.as_chunks_mut::<PAGE>().0.iter_mut().enumerate() {
            scores.iter_mut().for_each(|s| *s = exp(*s - max));
            scores[..from.saturating_sub(p * PAGE).min(PAGE)].fill(0.0);
            scores[to.saturating_sub(p * PAGE).min(PAGE)..].fill(0.0);
            lanes.iter_mut().zip(&*scores).for_each(|(lane, s)| *lane += s);
        }
        *sum = tree_sum(lanes);
        if let Some(sink) = sink {
            *sum += exp(sink - max);
        }
    }

    results.fill(0.0);
    for (s, pages) in pages.chunks(STRIP).enumerate() {
        let values = strip(1, pages, decoded);
        // Positions of the strip that a row sees, counted from its first.
        let (start, end) = (s * STRIP * PAGE, (s * STRIP + pages.len()) * PAGE);
        let within = |row: usize| {
            let (from, to) = seen(row);
            (from.clamp(start, end) - start, to.clamp(start, end) - start)
        };
        for first in (0..rows).step_by(ROWS) {
            let weights = scores[first * length + start..].as_ptr();
            let at = Sums { values: &values[..pages.len()], value_dim, weights, length };
            let together = first..rows.min(first + ROWS);
            let from = together.clone().map(|row| within(row).0).max().unwrap_or(0);
            let to = together.clone().map(|row| within(row).1).min().unwrap_or(0);
            let results = results[first * value_dim..together.end * value_dim].as_mut_ptr();
            // What not all of them see, each adds by itself, before and after what all see: always in the order of positions.
            let alone = |range: &dyn Fn(usize) -> (usize, usize)| {
                for row in together.clone() {
                    let (a, b) = range(row);
                    if a < b {
                        // SAFETY: as below.
                        unsafe { at.add::<V, 1>(row - first, a..b, results) }
                    }
                }
            };
            if from >= to {
                alone(&within);
                continue;
            }
            alone(&|row| (within(row).0, from));
            // SAFETY: the caller's for the instruction set; weights and results of the rows are `length` and `value_dim` apart.
            unsafe {
                match together.len() {
                    1 => at.add::<V, 1>(0, from..to, results),
                    2 => at.add::<V, 2>(0, from..to, results),
                    3 => at.add::<V, 3>(0, from..to, results),
                    _ => at.add::<V, ROWS>(0, from..to, results),
                }
            }
            alone(&|row| (to, within(row).1));
        }
    }
    for (result, sum) in results.chunks_exact_mut(value_dim).zip(sums) {
        result.iter_mut().for_each(|r| *r /= *sum);
    }
}

/// Scores of some rows of queries with the keys of a strip.
struct Scores<'a, 'q, Q: Fn(usize) -> &'q [f32]> {
    query: &'a Q,
    /// The first row.
    first: usize,
    /// Keys of each page, [head_dim][16].
    keys: &'a [*const f32],
    scale: f32,
    /// Where the first row's scores go; the next row's are `length` further.
    to: *mut f32,
    length: usize,
}

impl<'q, Q: Fn(usize) -> &'q [f32]> Scores<'_, 'q, Q> {
    /// # Safety
    /// The CPU has the instruction set of `V`; keys and scores are as said above, for `R` rows.
    #[inline(always)]
    unsafe fn rows<V: Lanes, const R: usize>(&self) {
        let queries: [&[f32]; R] = std::array::from_fn(|r| (self.query)(self.first + r));
        let mut page = 0;
        // SAFETY: the caller's.
        unsafe {
            if 4 * R <= V::SUMS {
                while page + 4 <= self.keys.len() {
                    self.tile::<V, R, 4>(&queries, page);
                    page += 4;
                }
            }
            if 2 * R <= V::SUMS {
                while page + 2 <= self.keys.len() {
                    self.tile::<V, R, 2>(&queries, page);
                    page += 2;
                }
            }
            while page < self.keys.len() {
                self.tile::<V, R, 1>(&queries, page);
                page += 1;
            }
        }
    }

    /// One fused multiply-add for each dimension, in order.
    ///
    /// # Safety
    /// As above, and there are `P` pages from `page` on.
    #[inline(always)]
    unsafe fn tile<V: Lanes, const R: usize, const P: usize>(&self, queries: &[&[f32]; R], page: usize) {
        // SAFETY: the caller's.
        unsafe {
            let mut sums = [[V::splat(0.0); P]; R];
            let mut keys = [self.keys[page]; P];
            for p in 1..P {
                keys[p] = self.keys[page + p];
            }
            for i in 0..queries[0].len() {
                let mut key = [V::splat(0.0); P];
                for p in 0..P {
                    key[p] = V::load(keys[p].add(i * PAGE));
                }
                for r in 0..R {
                    let x = V::splat(*queries[r].get_unchecked(i));
                    for p in 0..P {
                        sums[r][p] = key[p].times_plus(x, sums[r][p]);
                    }
                }
            }
            let scale = V::splat(self.scale);
            for r in 0..R {
                for p in 0..P {
                    sums[r][p].times(scale).store(self.to.add(r * self.length + (page + p) * PAGE));
                }
            }
        }
    }
}

/// Sums of a strip's values, weighted by the scores of some rows.
struct Sums<'a> {
    /// Values of each page, [16][value_dim].
    values: &'a [*const f32],
    value_dim: usize,
    /// The first row's weights of the strip's positions; the next row's are `length` further.
    weights: *const f32,
    length: usize,
}

impl Sums<'_> {
    /// Adds the values at `positions` to `results` [rows, value_dim], in order, for `R` rows from `row` on.
    ///
    /// # Safety
    /// The CPU has the instruction set of `V`; values, weights and results are as said above, for all the rows.
    #[inline(always)]
    unsafe fn add<V: Lanes, const R: usize>(&self, row: usize, positions: Range<usize>, results: *mut f32) {
        let mut column = 0;
        // SAFETY: the caller's.
        unsafe {
            if 4 * R <= V::SUMS {
                while column + 4 * LANES <= self.value_dim {
                    self.tile::<V, R, 4>(row, &positions, results, column);
                    column += 4 * LANES;
                }
            }
            if 2 * R <= V::SUMS {
                while column + 2 * LANES <= self.value_dim {
                    self.tile::<V, R, 2>(row, &positions, results, column);
                    column += 2 * LANES;
                }
            }
            while column + LANES <= self.value_dim {
                self.tile::<V, R, 1>(row, &positions, results, column);
                column += LANES;
            }
            for r in row..row + R {
                for column in column..self.value_dim {
                    let result = &mut *results.add(r * self.value_dim + column);
                    for i in positions.clone() {
                        let value = *self.values[i / PAGE].add(i % PAGE * self.value_dim + column);
                        *result = (*self.weights.add(r * self.length + i)).mul_add(value, *result);
                    }
                }
            }
        }
    }

    /// Of `C` runs of 16 columns.
    ///
    /// # Safety
    /// As above, and there are so many columns from `column` on.
    #[inline(always)]
    unsafe fn tile<V: Lanes, const R: usize, const C: usize>(
        &self,
        row: usize,
        positions: &Range<usize>,
        results: *mut f32,
        column: usize,
    ) {
        // SAFETY: the caller's.
        unsafe {
            let result = |r: usize, c: usize| results.add((row + r) * self.value_dim + column + c * LANES);
            let mut sums = [[V::splat(0.0); C]; R];
            for r in 0..R {
                for c in 0..C {
                    sums[r][c] = V::load(result(r, c));
                }
            }
            let weights = self.weights.add(row * self.length);
            let mut i = positions.start;
            while i < positions.end {
                let page = self.values.as_ptr().add(i / PAGE).read().add(column);
                let end = positions.end.min((i / PAGE + 1) * PAGE);
                while i < end {
                    let at = page.add(i % PAGE * self.value_dim);
                    let mut value = [V::splat(0.0); C];
                    for c in 0..C {
                        value[c] = V::load(at.add(c * LANES));
                    }
                    for r in 0..R {
                        let weight = V::splat(*weights.add(r * self.length + i));
                        for c in 0..C {
                            sums[r][c] = weight.times_plus(value[c], sums[r][c]);
                        }
                    }
                    i += 1;
                }
            }
            for r in 0..R {
                for c in 0..C {
                    sums[r][c].store(result(r, c));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
