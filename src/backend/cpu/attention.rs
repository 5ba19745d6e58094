//! Causal grouped-query attention over a paged KV cache.
//!
//! Per layer, page and KV head: keys as [head_dim][16 tokens], one token per SIMD lane; values as [16 tokens][value_dim].
//! A query's arithmetic never depends on which other queries are computed with it: scores are one fused multiply-add
//! per dimension in order, the softmax sum keeps 16 partial sums by position modulo 16, and values are added in the
//! order of positions. A head's sink joins the maximum and, last, the sum; it has no value.

mod kernel;

use std::cell::RefCell;

use kernel::{Task, block};

use super::isa::Isa;
use super::threads::Threads;
use crate::backend::{AttentionShape, Batch, CacheLayout, LayerCache, PAGE};
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

#[cfg(test)]
mod tests;
