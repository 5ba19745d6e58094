//! The arithmetic of some queries over the pages that they see, in registers of each instruction set.

// Sums and what they are made of are walked in step; iterators over one of them would hide that.
#![allow(clippy::needless_range_loop)]

use std::ops::Range;

use super::KvCache;
use crate::backend::cpu::elementwise::{LANES, exp, largest, tree_sum};
use crate::backend::cpu::isa::{Isa, Kind};
use crate::backend::cpu::lanes::{self, Lanes};
use crate::backend::{AttentionShape, PAGE, Span};

/// Pages that are gone through at once, and rows (queries of one head each) that share what is read of them.
const STRIP: usize = 4;
const ROWS: usize = 4;

/// Some consecutive queries of one sequence, and one KV head.
pub(super) struct Task<'a> {
    pub cache: &'a KvCache,
    pub shape: &'a AttentionShape,
    /// Of the query heads that share the KV head.
    pub sinks: Option<&'a [f32]>,
    pub span: &'a Span,
    /// Position of the first query.
    pub position: usize,
    pub count: usize,
    pub head: usize,
}

/// `queries[i]` holds the query heads that share the KV head; `results` likewise, [count, heads, value_dim].
pub(super) fn block(isa: Isa, t: &Task<'_>, queries: &[&[f32]], scratch: &mut Vec<f32>, results: &mut [f32]) {
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
            keys.copy_from_slice(&self.keys[page..page + P]);
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
