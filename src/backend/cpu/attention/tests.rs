//! Attention against the formula in f64.

use super::*;
use crate::backend::Span;

/// Values from -2 to 2 in no order.
fn values(count: usize, seed: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * 7919 + seed * 104_729) % 1009) as f32 / 252.25 - 2.0).collect()
}

/// Queries, keys and values of one sequence, and sinks.
struct Case {
    shape: AttentionShape,
    value_dim: usize,
    tokens: usize,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    sinks: Option<Vec<f32>>,
}

impl Case {
    fn new(shape: AttentionShape, value_dim: usize, tokens: usize, sinks: bool) -> Self {
        let AttentionShape { heads, kv_heads, head_dim, .. } = shape;
        Self {
            shape,
            value_dim,
            tokens,
            q: values(tokens * heads * head_dim, 1),
            k: values(tokens * kv_heads * head_dim, 2),
            v: values(tokens * kv_heads * value_dim, 3),
            sinks: sinks.then(|| values(heads, 4).iter().map(|s| 3.0 * s).collect()),
        }
    }

    /// The formula in f64, [T, heads · value_dim].
    fn exact(&self) -> Vec<f64> {
        let AttentionShape { heads, kv_heads, head_dim, window, scale, .. } = self.shape;
        let mut out = Vec::new();
        for t in 0..self.tokens {
            for h in 0..heads {
                let kv_head = h / (heads / kv_heads);
                let from = window.map_or(0, |w| (t + 1).saturating_sub(w));
                let score = |j: usize| -> f64 {
                    let q = &self.q[(t * heads + h) * head_dim..][..head_dim];
                    let k = &self.k[(j * kv_heads + kv_head) * head_dim..][..head_dim];
                    q.iter().zip(k).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum::<f64>() * f64::from(scale)
                };
                let weights: Vec<f64> = (from..=t).map(|j| score(j).exp()).collect();
                let sink = self.sinks.as_ref().map_or(0.0, |s| f64::from(s[h]).exp());
                let total = weights.iter().sum::<f64>() + sink;
                out.extend((0..self.value_dim).map(|i| {
                    let v = |j: usize| f64::from(self.v[(j * kv_heads + kv_head) * self.value_dim + i]);
                    weights.iter().zip(from..).map(|(w, j)| w * v(j)).sum::<f64>() / total
                }));
            }
        }
        out
    }

    /// In passes of at most `chunk` tokens, on the third layer of a cache that grows.
    fn run(&self, isa: Isa, chunk: usize) -> Vec<f32> {
        let AttentionShape { heads, kv_heads, head_dim, .. } = self.shape;
        let layer = LayerCache { format: KvFormat::F32, kv_heads, head_dim, value_dim: self.value_dim };
        let mut cache = KvCache::new(&CacheLayout { layers: vec![layer], pages: 0, ..CacheLayout::default() });
        cache.grow(self.tokens.div_ceil(PAGE) + 1);
        let pages: Vec<u32> = (0..self.tokens.div_ceil(PAGE) as u32).rev().map(|p| p + 1).collect();
        let (threads, mut out) = (Threads::ambient(), Vec::new());
        for start in (0..self.tokens).step_by(chunk) {
            let len = chunk.min(self.tokens - start);
            let batch = Batch { tokens: vec![0; len], spans: vec![Span { start, len, pages: pages.clone(), slot: 0 }] };
            let of = |x: &[f32], width: usize| x[start * width..(start + len) * width].to_vec();
            let (k, v) = (of(&self.k, kv_heads * head_dim), of(&self.v, kv_heads * self.value_dim));
            cache.write(0, &batch, &k, &v);
            let mut part = vec![f32::NAN; len * heads * self.value_dim];
            attend(
                isa,
                &threads,
                &cache,
                &self.shape,
                self.sinks.as_deref(),
                &batch,
                &of(&self.q, heads * head_dim),
                &mut part,
            );
            out.extend(part);
        }
        out
    }
}

#[test]
fn sinks_windows_and_widths_are_the_formula_in_any_chunks_and_instruction_set() {
    // Strips of pages, groups of rows and runs of columns: whole ones and what is left of them.
    for (heads, kv_heads, head_dim, value_dim, window, sinks, tokens) in [
        (4, 2, 16, 16, None, true, 43),
        (4, 2, 16, 16, Some(5), true, 43),
        (3, 3, 24, 16, None, false, 43),
        (4, 1, 10, 33, Some(7), true, 43),
        (2, 1, 192, 128, None, false, 43),
        (3, 1, 16, 64, None, false, 200),
        (6, 1, 12, 101, Some(70), true, 149),
        (7, 1, 8, 80, Some(33), false, 110),
    ] {
        let shape = AttentionShape {
            layer: 0,
            cache: 0,
            heads,
            kv_heads,
            head_dim,
            window,
            rope: None,
            scale: 0.03,
            growth: None,
        };
        let case = Case::new(shape, value_dim, tokens, sinks);
        let exact = case.exact();
        let reference = case.run(Isa::available()[0], tokens);
        let largest = exact.iter().fold(0.0f64, |m, v| m.max(v.abs()));
        let off = reference.iter().zip(&exact).fold(0.0f64, |m, (a, b)| m.max((f64::from(*a) - b).abs()));
        assert!(reference.len() == exact.len() && off < 2e-6 * largest, "{shape:?}: {off:e} of {largest}");
        for isa in Isa::available() {
            for chunk in [1, 7, 16, tokens] {
                let got = case.run(isa, chunk);
                assert!(got.iter().zip(&reference).all(|(a, b)| a.to_bits() == b.to_bits()), "{isa}, {chunk}");
            }
        }
    }
}

#[test]
fn a_sink_far_above_takes_all_and_one_far_below_takes_nothing() {
    let shape = AttentionShape {
        layer: 0,
        cache: 0,
        heads: 2,
        kv_heads: 1,
        head_dim: 8,
        window: None,
        rope: None,
        scale: 0.3,
        growth: None,
    };
    let mut case = Case::new(shape, 8, 9, false);
    let without = case.run(Isa::detect(), 9);
    case.sinks = Some(vec![-1e30, 1e30]);
    for (with, without) in case.run(Isa::detect(), 9).chunks(8).zip(without.chunks(8)).step_by(2) {
        assert_eq!(with, without);
    }
    assert!(case.run(Isa::detect(), 9).chunks(8).skip(1).step_by(2).all(|head| head.iter().all(|v| *v == 0.0)));
}

#[test]
fn a_copied_page_holds_keys_and_values_of_their_own_widths() {
    let layer = LayerCache { format: KvFormat::F32, kv_heads: 2, head_dim: 3, value_dim: 5 };
    let mut cache = KvCache::new(&CacheLayout { layers: vec![layer; 2], pages: 3, ..CacheLayout::default() });
    let numbers = |count: usize| (0..count).map(|i| i as f32 + 1.0).collect::<Vec<_>>();
    let write = |cache: &mut KvCache, page| {
        let batch = Batch { tokens: vec![0; 16], spans: vec![Span { start: 0, len: 16, pages: vec![page], slot: 0 }] };
        cache.write(1, &batch, &numbers(16 * 6), &numbers(16 * 10));
    };
    write(&mut cache, 0);
    cache.copy_page(0, 2);
    let mut other = KvCache::new(&CacheLayout { layers: vec![layer; 2], pages: 3, ..CacheLayout::default() });
    write(&mut other, 0);
    write(&mut other, 2);
    for (a, b) in cache.layers.iter().zip(&other.layers) {
        for (a, b) in [(&a.keys, &b.keys), (&a.values, &b.values)] {
            let (Store::F32(a), Store::F32(b)) = (a, b) else { panic!("f32") };
            assert_eq!(a, b);
        }
    }
}
