//! A backend of shapes: it says what each operation takes, and computes nothing.

use std::sync::atomic::{AtomicU64, Ordering};

use super::{Event, Pen, Work};
use crate::backend::{
    Activation, AttentionShape, Backend, Batch, CacheLayout, DeltaInputs, DeltaNetShape, DeltaNetWeights, Mamba2Shape,
    Mamba2Weights, Result, Rotation, Run, Span,
};
use crate::formats::linear::{ActivationFormat, Element, LinearTensors};
use crate::logits::{Draw, RankedScore, RouterRule, Routing, Sampled, SamplingError, Scratch, TokenScore};
use crate::random::SplitMix64;
use crate::ranks::Link;

/// A rank's backend on paper.
pub struct Paper {
    pen: Pen,
    /// Routings so far: other tokens have other experts.
    routed: AtomicU64,
}

/// A tensor's rows and columns.
#[derive(Clone, Copy, Debug)]
pub struct Sheet {
    rows: usize,
    columns: usize,
}

impl Sheet {
    fn values(self) -> usize {
        self.rows * self.columns
    }

    fn bytes(self) -> f64 {
        (4 * self.values()) as f64
    }
}

/// A weight [n, k].
pub struct SheetWeight {
    n: usize,
    k: usize,
    bytes: usize,
    integers: bool,
    pen: Pen,
}

impl Drop for SheetWeight {
    fn drop(&mut self) {
        self.pen.write(|trace| trace.weights -= self.bytes);
    }
}

impl Paper {
    pub(super) fn new(pen: Pen) -> Self {
        Self { pen, routed: AtomicU64::new(0) }
    }

    fn event(&self, event: Event) {
        self.pen.write(|trace| trace.events.push(event));
    }

    fn work(&self, bytes: f64, floats: f64, integers: f64) {
        self.event(Event::Work(Work { bytes, floats, integers }));
    }

    /// Of an operation that passes over tensors once.
    fn sweep(&self, sheets: &[Sheet]) {
        self.work(sheets.iter().map(|s| s.bytes()).sum(), 0.0, 0.0);
    }

    fn hold(&self, bytes: usize) {
        self.pen.write(|trace| {
            trace.weights += bytes;
            trace.most_weights = trace.most_weights.max(trace.weights);
        });
    }
}

fn cache_bytes(layout: &CacheLayout, pages: usize, slots: usize) -> usize {
    let token = |l: &crate::backend::LayerCache| l.format.bytes() * l.kv_heads * (l.head_dim + l.value_dim);
    let tokens = pages * crate::backend::PAGE;
    tokens * layout.layers.iter().map(token).sum::<usize>()
        + slots * layout.recurrent.iter().map(crate::backend::RecurrentShape::bytes).sum::<usize>()
}

impl Backend for Paper {
    type Tensor = Sheet;
    type Linear = SheetWeight;
    type Vector = usize;
    type Mamba = Mamba2Shape;
    type DeltaNet = DeltaNetShape;
    type Cache = CacheLayout;
    type Rope = ();
    type Pass = Batch;

    fn name(&self) -> &'static str {
        "paper"
    }

    fn load_linear(&self, tensors: LinearTensors<'_>) -> Result<SheetWeight> {
        use ActivationFormat as A;
        let integers = tensors.element == Element::E2m1
            && matches!(tensors.activation, A::Nvfp4 { .. } | A::Mxfp4 { .. } | A::FpQuant { .. });
        let bytes = tensors.stored_bytes() + 4 * tensors.bias.as_ref().map_or(0, Vec::len);
        self.hold(bytes);
        Ok(SheetWeight { n: tensors.n, k: tensors.k, bytes, integers, pen: self.pen.clone() })
    }

    fn inputs(&self, linear: &SheetWeight) -> usize {
        linear.k
    }

    fn multiplies_integers(&self, linear: &SheetWeight) -> bool {
        linear.integers
    }

    fn resident_bytes(&self, linear: &SheetWeight) -> usize {
        linear.bytes
    }

    fn load_vector(&self, values: Vec<f32>) -> Result<usize> {
        self.hold(4 * values.len());
        Ok(values.len())
    }

    fn load_mamba(&self, shape: Mamba2Shape, weights: Mamba2Weights) -> Result<Mamba2Shape> {
        self.hold(4 * (weights.conv1d.len() + weights.norm.len()));
        Ok(shape)
    }

    fn load_delta_net(&self, shape: DeltaNetShape, weights: DeltaNetWeights) -> Result<DeltaNetShape> {
        self.hold(4 * (weights.conv1d.len() + weights.norm.len()));
        Ok(shape)
    }

    fn load_rope(&self, _: Rotation) -> Result<()> {
        Ok(())
    }

    fn new_cache(&self, layout: &CacheLayout) -> Result<CacheLayout> {
        let bytes = cache_bytes(layout, layout.pages, layout.slots);
        self.pen.write(|trace| trace.caches += bytes);
        Ok(layout.clone())
    }

    fn grow(&self, cache: &mut CacheLayout, pages: usize, slots: usize) -> Result<()> {
        let (pages, slots) = (pages.max(cache.pages), slots.max(cache.slots));
        let more = cache_bytes(cache, pages - cache.pages, slots - cache.slots);
        self.pen.write(|trace| trace.caches += more);
        (cache.pages, cache.slots) = (pages, slots);
        Ok(())
    }

    fn copy_state(&self, _: &mut CacheLayout, _: u32, _: u32) -> Result<()> {
        Ok(())
    }

    fn fork(&self, _: &mut CacheLayout, _: &Span, _: &Span) -> Result<()> {
        Ok(())
    }

    fn prepare(&self, batch: &Batch, _: &[&()]) -> Result<Batch> {
        Ok(batch.clone())
    }

    fn embed(&self, table: &SheetWeight, pass: &Batch) -> Result<Sheet> {
        let x = Sheet { rows: pass.tokens.len(), columns: table.k };
        self.work((x.rows * table.bytes / table.n.max(1)) as f64 + x.bytes(), 0.0, 0.0);
        Ok(x)
    }

    fn rms_norm(&self, x: &Sheet, _: &usize, _: f32) -> Result<Sheet> {
        self.sweep(&[*x, *x]);
        Ok(*x)
    }

    fn linears(&self, x: &Sheet, weights: &[&SheetWeight]) -> Result<Vec<Sheet>> {
        let of = |w: &&SheetWeight| Sheet { rows: x.rows, columns: w.n };
        let (mut floats, mut integers) = (0.0, 0.0);
        for w in weights {
            *(if w.integers { &mut integers } else { &mut floats }) += (x.rows * w.n * w.k) as f64;
        }
        let outputs: Vec<Sheet> = weights.iter().map(of).collect();
        let bytes = weights.iter().map(|w| w.bytes as f64).sum::<f64>();
        self.work(bytes + x.bytes() + outputs.iter().map(|o| o.bytes()).sum::<f64>(), floats, integers);
        Ok(outputs)
    }

    fn attention(
        &self,
        q: Sheet,
        k: Sheet,
        v: Sheet,
        _: Option<&usize>,
        shape: &AttentionShape,
        pass: &Batch,
        cache: &mut CacheLayout,
    ) -> Result<Sheet> {
        let value_dim = v.columns / shape.kv_heads.max(1);
        let element = cache.layers.get(shape.cache).map_or(4, |l| l.format.bytes());
        let seen = |context: usize| context.min(shape.window.unwrap_or(usize::MAX));
        let dims = shape.head_dim + value_dim;
        let (mut read, mut scores) = (0, 0);
        for span in &pass.spans {
            read += seen(span.start + span.len) * shape.kv_heads * dims * element;
            scores += (span.start..span.start + span.len).map(|p| seen(p + 1)).sum::<usize>();
        }
        let out = Sheet { rows: q.rows, columns: shape.heads * value_dim };
        let bytes = read as f64 + [q, k, v, out].map(Sheet::bytes).iter().sum::<f64>();
        self.work(bytes, (scores * shape.heads * dims) as f64, 0.0);
        Ok(out)
    }

    fn rotated(&self, k: &Sheet, _: &AttentionShape, _: &Batch) -> Result<Vec<f32>> {
        self.to_host(k)
    }

    fn add(&self, x: Sheet, y: &Sheet) -> Result<Sheet> {
        self.sweep(&[x, *y, x]);
        Ok(x)
    }

    fn silu_mul(&self, gate: Sheet, up: &Sheet) -> Result<Sheet> {
        self.add(gate, up)
    }

    /// Experts as if each were as likely as any other.
    fn route(&self, logits: &Sheet, rule: &RouterRule) -> Result<Vec<Routing>> {
        let seed = self.routed.fetch_add(1, Ordering::Relaxed);
        self.sweep(&[*logits]);
        let experts = logits.columns;
        let one = |row: usize| {
            let mut random = SplitMix64(seed << 32 | row as u64);
            let mut chosen: Vec<usize> = Vec::with_capacity(rule.top_k);
            while chosen.len() < rule.top_k.min(experts) {
                let expert = (random.draw() % experts as u64) as usize;
                if !chosen.contains(&expert) {
                    chosen.push(expert);
                }
            }
            chosen.sort_unstable();
            chosen.into_iter().map(|expert| (expert, 1.0)).collect()
        };
        Ok((0..logits.rows).map(one).collect())
    }

    fn select_rows(&self, x: &Sheet, rows: &[usize]) -> Result<Sheet> {
        let x = Sheet { rows: rows.len(), ..*x };
        self.sweep(&[x, x]);
        Ok(x)
    }

    fn add_rows(&self, sum: Sheet, y: &Sheet, _: &[usize], _: &[f32]) -> Result<Sheet> {
        self.sweep(&[*y, *y, *y]);
        Ok(sum)
    }

    fn zeros_like(&self, x: &Sheet) -> Result<Sheet> {
        self.sweep(&[*x]);
        Ok(*x)
    }

    fn activate(&self, x: Sheet, up: Option<&Sheet>, _: Activation) -> Result<Sheet> {
        self.add(x, up.unwrap_or(&Sheet { rows: 0, columns: 0 }))
    }

    fn gate(&self, x: Sheet, gate: &Sheet) -> Result<Sheet> {
        self.add(x, gate)
    }

    fn scale(&self, x: Sheet, _: f32) -> Result<Sheet> {
        self.sweep(&[x, x]);
        Ok(x)
    }

    fn rearrange(&self, sources: &[&Sheet], runs: &[Run]) -> Result<Sheet> {
        let rows = sources.first().map_or(0, |s| s.rows);
        let x = Sheet { rows, columns: runs.iter().map(|r| r.count).sum() };
        self.sweep(&[x, x]);
        Ok(x)
    }

    fn mamba(&self, x: Sheet, mixer: &Mamba2Shape, _: usize, pass: &Batch, _: &mut CacheLayout) -> Result<Sheet> {
        let out = Sheet { rows: x.rows, columns: mixer.inner() };
        let state = (2 * pass.spans.len() * mixer.kept().bytes()) as f64;
        // The state is multiplied, added to, and multiplied by C, for each token.
        let products = 3 * mixer.inner() * mixer.state + mixer.kernel * mixer.channels();
        self.work(state + x.bytes() + out.bytes(), (x.rows * products) as f64, 0.0);
        Ok(out)
    }

    fn delta_net(
        &self,
        inputs: DeltaInputs<Sheet>,
        mixer: &DeltaNetShape,
        _: usize,
        pass: &Batch,
        _: &mut CacheLayout,
    ) -> Result<Sheet> {
        let out = Sheet { rows: inputs.z.rows, columns: mixer.inner() };
        let state = (2 * pass.spans.len() * mixer.kept().bytes()) as f64;
        let products = 4 * mixer.inner() * mixer.key_dim + mixer.kernel * mixer.channels();
        self.work(state + inputs.qkv.bytes() + 2.0 * out.bytes(), (out.rows * products) as f64, 0.0);
        Ok(out)
    }

    fn score(&self, logits: &Sheet, picks: &[(usize, u32)]) -> Result<Vec<TokenScore>> {
        self.sweep(&[*logits]);
        Ok(vec![TokenScore { log_prob: 0.0, is_greedy: true }; picks.len()])
    }

    fn score_ranked(&self, logits: &Sheet, tokens: &[u32], _: usize) -> Result<Vec<RankedScore>> {
        self.sweep(&[*logits]);
        Ok(vec![RankedScore { log_prob: 0.0, rank: 1, top: Vec::new() }; tokens.len()])
    }

    /// The first token, always.
    fn sample(
        &self,
        logits: &Sheet,
        draws: &[Draw<'_>],
        _: &mut Scratch,
    ) -> Result<Vec<std::result::Result<Sampled, SamplingError>>> {
        self.sweep(&[*logits]);
        let first = || Sampled { token: 0, logprob: None, rank: None, top_logprobs: Vec::new() };
        Ok(draws.iter().map(|_| Ok(first())).collect())
    }

    fn is_finite(&self, x: &Sheet) -> Result<bool> {
        self.sweep(&[*x]);
        Ok(true)
    }

    fn squares_finite(&self, x: &Sheet, _: usize) -> Result<bool> {
        self.is_finite(x)
    }

    fn spread_rows(&self, _: &dyn Link, own: &[Sheet], rows: &[usize], columns: usize) -> Result<Sheet> {
        let all = Sheet { rows: rows.iter().sum(), columns };
        let own = own.iter().map(|x| x.values()).sum::<usize>();
        self.event(Event::Spread { own: 4 * own, all: 4 * all.values() });
        Ok(all)
    }

    fn spread_columns(
        &self,
        _: &dyn Link,
        own: Option<&Sheet>,
        pieces: &[(usize, usize)],
        (rows, columns): (usize, usize),
    ) -> Result<Sheet> {
        let all: usize = pieces.iter().map(|piece| piece.1 * rows).sum();
        self.event(Event::Spread { own: 4 * own.map_or(0, |x| x.values()), all: 4 * all });
        Ok(Sheet { rows, columns })
    }

    fn give(&self, _: &dyn Link, to: usize, x: &Sheet) -> Result<()> {
        self.event(Event::Send { to, bytes: 4 * x.values() });
        Ok(())
    }

    fn take(&self, _: &dyn Link, from: usize, (rows, columns): (usize, usize)) -> Result<Sheet> {
        self.event(Event::Receive { from, bytes: 4 * rows * columns });
        Ok(Sheet { rows, columns })
    }

    fn tensor(&self, data: Vec<f32>, columns: usize) -> Result<Sheet> {
        Ok(Sheet { rows: data.len() / columns.max(1), columns })
    }

    fn to_host(&self, x: &Sheet) -> Result<Vec<f32>> {
        Ok(vec![0.0; x.rows * x.columns])
    }
}
