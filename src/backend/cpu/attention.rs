//! Causal grouped-query attention over a paged KV cache.
//!
//! Per layer, page and KV head: keys as [head_dim][16 tokens], one token per SIMD lane; values as [16 tokens][head_dim].
//! A query's arithmetic never depends on which other queries are computed with it: scores are one fused multiply-add
//! per dimension in order, the softmax sum keeps 16 partial sums by position modulo 16, and values are added in the
//! order of positions.

use rayon::prelude::*;

use super::elementwise::{LANES, exp, tree_sum};
use super::isa::{Isa, multiversion};
use crate::backend::{AttentionShape, Batch, CacheLayout, LayerCache, PAGE, Span};
use crate::formats::kv::KvFormat;
use crate::formats::{e4m3, fp8};

/// Queries that share one pass over the pages.
const QUERY_BLOCK: usize = 8;

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
    /// Elements of one page's keys (or values) of one KV head.
    fn tile(&self) -> usize {
        PAGE * self.shape.head_dim
    }

    fn offset(&self, page: u32, kv_head: usize) -> usize {
        (page as usize * self.shape.kv_heads + kv_head) * self.tile()
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
            let elements = layout.pages * shape.kv_heads * PAGE * shape.head_dim;
            let store = |value| Store::new(shape.format, elements, value);
            Layer { shape, keys: store(false), values: store(true) }
        };
        Self { layers: layout.layers.iter().map(layer).collect(), pages: layout.pages }
    }

    /// Room for `pages` pages, if there are fewer.
    pub(super) fn grow(&mut self, pages: usize) {
        self.pages = self.pages.max(pages);
        for layer in &mut self.layers {
            let elements = layer.offset(self.pages as u32, 0);
            layer.keys.grow(elements);
            layer.values.grow(elements);
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
            let count = layer.shape.kv_heads * layer.tile();
            let (from, to) = (layer.offset(from, 0), layer.offset(to, 0));
            layer.keys.copy(from, to, count);
            layer.values.copy(from, to, count);
        }
    }

    /// Writes the new tokens of `batch`: k (already rotated) and v, [T, kv_heads · head_dim].
    pub(super) fn write(&mut self, layer: usize, batch: &Batch, k: &[f32], v: &[f32]) {
        let layer = &mut self.layers[layer];
        let LayerCache { kv_heads, head_dim: d, .. } = layer.shape;
        let width = kv_heads * d;
        let mut row = 0;
        for span in &batch.spans {
            for position in span.start..span.start + span.len {
                let (page, lane) = (span.pages[position / PAGE], position % PAGE);
                for head in 0..kv_heads {
                    let at = layer.offset(page, head);
                    let part = row * width + head * d..row * width + (head + 1) * d;
                    layer.keys.write(&k[part.clone()], |i| at + i * PAGE + lane);
                    layer.values.write(&v[part], |i| at + lane * d + i);
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

/// Attends: q [T, heads · d] (rotated) to `out` of the same shape, over what the cache holds up to each token.
pub(super) fn attend(isa: Isa, cache: &KvCache, shape: &AttentionShape, batch: &Batch, q: &[f32], out: &mut [f32]) {
    let mut tasks = Vec::new();
    let mut row = 0;
    for span in &batch.spans {
        for first in (0..span.len).step_by(QUERY_BLOCK) {
            let count = QUERY_BLOCK.min(span.len - first);
            tasks.extend((0..shape.kv_heads).map(|head| (span, row + first, span.start + first, count, head)));
        }
        row += span.len;
    }
    let width = shape.heads * shape.head_dim;
    let output = Output(out.as_mut_ptr());
    let share = shape.heads / shape.kv_heads * shape.head_dim;
    tasks.par_iter().for_each_init(Vec::new, |scratch, &(span, row, position, count, head)| {
        let mut results = vec![0.0f32; count * share];
        let task = Task { cache, shape, span, position, count, head };
        let queries: Vec<&[f32]> = (0..count).map(|i| &q[(row + i) * width + head * share..][..share]).collect();
        block(isa, &task, &queries, scratch, &mut results);
        for (i, result) in results.chunks_exact(share).enumerate() {
            // SAFETY: rows `row..row + count`, heads of KV head `head`: this task's own part of `out`.
            unsafe {
                let to = output.at((row + i) * width + head * share);
                std::ptr::copy_nonoverlapping(result.as_ptr(), to, share);
            }
        }
    });
}

/// Some consecutive queries of one sequence, and one KV head.
struct Task<'a> {
    cache: &'a KvCache,
    shape: &'a AttentionShape,
    span: &'a Span,
    /// Position of the first query.
    position: usize,
    count: usize,
    head: usize,
}

multiversion! {
    /// `queries[i]` holds the query heads that share the KV head; `results` likewise, [count, heads, d].
    fn block(t: &Task<'_>, queries: &[&[f32]], scratch: &mut Vec<f32>, results: &mut [f32]) {
        let d = t.shape.head_dim;
        let share = t.shape.heads / t.shape.kv_heads;
        let layer = &t.cache.layers[t.shape.cache];
        // First key that query `i` sees, and one past its last.
        let range = |i: usize| {
            let position = t.position + i;
            (t.shape.window.map_or(0, |w| (position + 1).saturating_sub(w)), position + 1)
        };
        let first_page = range(0).0 / PAGE;
        let last_page = (range(t.count - 1).1 - 1) / PAGE;
        let length = (last_page + 1 - first_page) * PAGE;
        let tile = layer.tile();
        scratch.clear();
        scratch.resize(t.count * share * length + tile, 0.0);
        let (scores, decoded) = scratch.split_at_mut(t.count * share * length);
        let scale = t.shape.scale();

        for page in first_page..=last_page {
            let keys = layer.keys.read(layer.offset(t.span.pages[page], t.head), decoded);
            let keys = keys.as_chunks::<PAGE>().0;
            for (i, query) in queries.iter().enumerate() {
                for (h, query) in query.chunks_exact(d).enumerate() {
                    let mut lanes = [0.0f32; PAGE];
                    for (x, key) in query.iter().zip(keys) {
                        for (lane, k) in lanes.iter_mut().zip(key) {
                            *lane = k.mul_add(*x, *lane);
                        }
                    }
                    let to = &mut scores[(i * share + h) * length + (page - first_page) * PAGE..][..PAGE];
                    to.iter_mut().zip(lanes).for_each(|(to, lane)| *to = lane * scale);
                }
            }
        }

        // Softmax numerators in place, zero outside the range; sums by position modulo 16.
        let mut sums = vec![0.0f32; t.count * share];
        for (row, sum) in sums.iter_mut().enumerate() {
            let (from, to) = range(row / share);
            let scores = &mut scores[row * length..][..length];
            let seen = &scores[from - first_page * PAGE..to - first_page * PAGE];
            let max = seen.iter().fold(f32::NEG_INFINITY, |m, &s| if s > m { s } else { m });
            let mut lanes = [0.0f32; LANES];
            for (p, scores) in scores.as_chunks_mut::<PAGE>().0.iter_mut().enumerate() {
                for lane in 0..PAGE {
                    let position = (first_page + p) * PAGE + lane;
                    let e = exp(scores[lane] - max);
                    scores[lane] = if position >= from && position < to { e } else { 0.0 };
                    lanes[lane] += scores[lane];
                }
            }
            *sum = tree_sum(lanes);
        }

        results.fill(0.0);
        for page in first_page..=last_page {
            let values = layer.values.read(layer.offset(t.span.pages[page], t.head), decoded);
            for row in 0..t.count * share {
                let (from, to) = range(row / share);
                let result = &mut results[row * d..][..d];
                let from = from.max(page * PAGE);
                for position in from..to.min((page + 1) * PAGE) {
                    let p = scores[row * length + position - first_page * PAGE];
                    let value = &values[(position % PAGE) * d..][..d];
                    for (r, v) in result.iter_mut().zip(value) {
                        *r = p.mul_add(*v, *r);
                    }
                }
            }
        }
        for (result, sum) in results.chunks_exact_mut(d).zip(sums) {
            result.iter_mut().for_each(|r| *r /= sum);
        }
    }
}
