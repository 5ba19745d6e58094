//! Causal grouped-query attention over a KV cache of one tensor per layer and sequence.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor, bail};

use super::fake_quantize::FakeQuantize;
use crate::backend::{AttentionShape, Batch, CacheLayout, RopeTable, Span};
use crate::formats::kv::KvFormat;

/// Keys (rotated) and values of every layer and slot, rounded as the layer's format stores them.
#[derive(Debug)]
pub struct KvCache {
    layers: Vec<Layer>,
}

#[derive(Debug)]
struct Layer {
    format: KvFormat,
    /// By slot: keys and values, both [tokens, kv_heads · head_dim].
    slots: BTreeMap<usize, (Tensor, Tensor)>,
}

impl KvCache {
    pub(super) fn new(layout: &CacheLayout) -> Self {
        let layer = |&format| Layer { format, slots: BTreeMap::new() };
        Self { layers: layout.formats.iter().map(layer).collect() }
    }

    /// Slot `to` becomes the first `tokens` tokens of slot `from`.
    pub(super) fn fork(&mut self, from: usize, to: usize, tokens: usize) -> candle_core::Result<()> {
        for layer in &mut self.layers {
            let Some((k, v)) = layer.slots.get(&from) else { bail!("slot {from} is empty") };
            let part = (k.narrow(0, 0, tokens)?, v.narrow(0, 0, tokens)?);
            layer.slots.insert(to, part);
        }
        Ok(())
    }
}

impl Layer {
    /// Puts new keys and values after the first `span.start` rows of the slot and returns all of them.
    fn extend(&mut self, span: &Span, k: &Tensor, v: &Tensor) -> candle_core::Result<(Tensor, Tensor)> {
        let (mut k, mut v) = match self.format {
            KvFormat::F32 => (k.clone(), v.clone()),
            KvFormat::Bf16 => (k.apply_op1(FakeQuantize::Bf16)?, v.apply_op1(FakeQuantize::Bf16)?),
            KvFormat::Fp8 { k_scale, v_scale } => {
                (k.apply_op1(FakeQuantize::E4m3(k_scale))?, v.apply_op1(FakeQuantize::E4m3(v_scale))?)
            }
        };
        if span.start > 0 {
            let Some((old_k, old_v)) = self.slots.get(&span.slot) else {
                bail!("slot {} is empty; the span starts at token {}", span.slot, span.start)
            };
            k = Tensor::cat(&[&old_k.narrow(0, 0, span.start)?, &k], 0)?;
            v = Tensor::cat(&[&old_v.narrow(0, 0, span.start)?, &v], 0)?;
        }
        self.slots.insert(span.slot, (k.clone(), v.clone()));
        Ok((k, v))
    }
}

/// Rotates every head of x [T, heads · d]: (a, b) → (a·cos - b·sin, b·cos + a·sin), a from the first half of the head.
pub(super) fn rotate(x: &Tensor, heads: usize, rope: &RopeTable) -> candle_core::Result<Tensor> {
    let (tokens, half) = (x.dim(0)?, rope.half);
    let table = |values: &[f32]| Tensor::from_slice(values, (tokens, 1, half), x.device());
    let (cos, sin) = (table(&rope.cos)?, table(&rope.sin)?);
    let x_heads = x.reshape((tokens, heads, 2 * half))?;
    let (a, b) = (x_heads.narrow(2, 0, half)?, x_heads.narrow(2, half, half)?);
    let first = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
    let second = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
    Tensor::cat(&[first, second], 2)?.reshape(x.shape())
}

/// Writes k and v to the cache and attends: q [T, heads · d], k and v [T, kv_heads · d], q and k rotated.
pub(super) fn attend(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    shape: &AttentionShape,
    cache: &mut KvCache,
    batch: &Batch,
) -> candle_core::Result<Tensor> {
    let mut outputs = Vec::with_capacity(batch.spans.len());
    let mut row = 0;
    for span in &batch.spans {
        let rows = |x: &Tensor| x.narrow(0, row, span.len);
        let (keys, values) = cache.layers[shape.layer].extend(span, &rows(k)?, &rows(v)?)?;
        outputs.push(attend_span(&rows(q)?, &keys, &values, shape, span.start)?);
        row += span.len;
    }
    Tensor::cat(&outputs, 0)
}

/// One sequence: q [L, heads · d], keys and values [S, kv_heads · d].
fn attend_span(
    q: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    shape: &AttentionShape,
    start: usize,
) -> candle_core::Result<Tensor> {
    let (len, seen) = (q.dim(0)?, keys.dim(0)?);
    let (kv_heads, d) = (shape.kv_heads, shape.head_dim);
    let share = shape.heads / kv_heads;
    // The query heads that share a KV head are rows of one product: [kv_heads, share · L, d].
    let q = q.reshape((len, kv_heads, share, d))?.permute((1, 2, 0, 3))?.reshape((kv_heads, share * len, d))?;
    let keys = keys.reshape((seen, kv_heads, d))?.permute((1, 2, 0))?.contiguous()?;
    let values = values.reshape((seen, kv_heads, d))?.transpose(0, 1)?.contiguous()?;
    let scores = (q.matmul(&keys)? * f64::from(shape.scale()))?.reshape((kv_heads, share, len, seen))?;
    let scores = scores.broadcast_add(&mask(start, len, shape.window, q.device())?)?;
    let mixed = super::softmax(&scores)?.reshape((kv_heads, share * len, seen))?.matmul(&values)?;
    mixed.reshape((kv_heads, share, len, d))?.permute((2, 0, 1, 3))?.reshape((len, shape.heads * d))
}

/// 0 where the query at `start + row` sees key `column`, -∞ where the key is later, or the window or more back.
fn mask(start: usize, len: usize, window: Option<usize>, device: &Device) -> candle_core::Result<Tensor> {
    let seen = |query: usize, key: usize| key <= query && window.is_none_or(|w| query - key < w);
    let values: Vec<f32> = (start..start + len)
        .flat_map(|query| (0..start + len).map(move |key| if seen(query, key) { 0.0 } else { f32::NEG_INFINITY }))
        .collect();
    Tensor::from_vec(values, (len, start + len), device)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::DType;

    #[test]
    fn a_key_the_window_or_more_back_is_not_seen() {
        let mask = mask(2, 2, Some(2), &Device::Cpu).unwrap().to_vec2::<f32>().unwrap();
        let hidden = f32::NEG_INFINITY;
        assert_eq!(mask, [[hidden, 0.0, 0.0, hidden], [hidden, hidden, 0.0, 0.0]]);
    }

    #[test]
    fn a_span_that_starts_past_the_cache_is_an_error() {
        let layout = CacheLayout { formats: vec![KvFormat::F32], kv_heads: 1, head_dim: 2, pages: 1 };
        let mut cache = KvCache::new(&layout);
        let x = Tensor::zeros((1, 2), DType::F32, &Device::Cpu).unwrap();
        let span = |start| Span { slot: 3, start, len: 1, pages: vec![0] };
        assert!(cache.layers[0].extend(&span(1), &x, &x).is_err());
        assert!(cache.layers[0].extend(&span(0), &x, &x).is_ok());
        assert!(cache.layers[0].extend(&span(2), &x, &x).is_err());
        assert_eq!(cache.layers[0].extend(&span(1), &x, &x).unwrap().0.dim(0).unwrap(), 2);
    }
}
