//! Mixers that keep a state instead of keys and values: Mamba-2 and the gated delta net, between their input and output
//! projections.
//!
//! A token's arithmetic is the same however its sequence is cut into passes: the state goes from token to token in order,
//! a row of it is one run of fused multiply-adds in 16 partial sums by index modulo 16.

mod convolution;
mod delta_net;
mod mamba2;
mod states;

use std::ops::Range;

pub use delta_net::{DeltaNet, DeltaNetInputs, DeltaNetShape, DeltaNetWeights};
pub use mamba2::{Mamba2, Mamba2Shape, Mamba2Weights};
pub use states::{RecurrentShape, RecurrentStates};

use crate::backend::{BackendError, Batch, Span};

/// New tokens of one sequence within a batch, for a layer that keeps a state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecurrentSpan {
    /// Its rows in the batch.
    pub rows: Range<usize>,
    /// Whether these are its first tokens: then tail and state are zero, whatever the slot holds.
    pub starts: bool,
    /// Where its tail and state are kept.
    pub slot: usize,
}

/// The spans of a batch.
pub(super) fn spans(batch: &Batch) -> Vec<RecurrentSpan> {
    let mut end = 0;
    let mut one = |span: &Span| {
        end += span.len;
        RecurrentSpan { rows: end - span.len..end, starts: span.start == 0, slot: span.slot as usize }
    };
    batch.spans.iter().map(&mut one).collect()
}

/// Spans of a batch whose sequences all begin, and states for them in layer 0.
fn whole(
    context: &'static str,
    shape: RecurrentShape,
    batch: &Batch,
) -> Result<(Vec<RecurrentSpan>, RecurrentStates), BackendError> {
    if let Some(span) = batch.spans.iter().find(|s| s.start > 0) {
        let message = format!("a sequence goes on at token {}, and no state of it is kept", span.start);
        return Err(BackendError::Failed { context, message });
    }
    let mut states = RecurrentStates::new(&[Some(shape)]);
    states.grow(batch.spans.len());
    let mut spans = spans(batch);
    spans.iter_mut().enumerate().for_each(|(slot, span)| span.slot = slot);
    Ok((spans, states))
}

/// Whether `spans` are all of `rows` rows, one after the other.
fn cover(context: &'static str, spans: &[RecurrentSpan], rows: usize) -> Result<(), BackendError> {
    let mut next = 0;
    for span in spans {
        if span.rows.start != next || span.rows.end < next {
            let message = format!("a span of rows {:?} where row {next} is the next", span.rows);
            return Err(BackendError::Failed { context, message });
        }
        next = span.rows.end;
    }
    expect(context, "spans", next, rows)
}

/// The fewest of `tasks` tasks that are worth a thread, where they take `work` steps together.
fn pieces(tasks: usize, work: usize) -> usize {
    /// Below this many values one thread is done before others have woken.
    const WORTH_SPLITTING: usize = 1 << 14;
    (WORTH_SPLITTING * tasks).div_ceil(work.max(1)).max(1)
}

/// ln(1 + eˣ); x where eˣ is large.
pub(in crate::backend) fn softplus(x: f32) -> f32 {
    // Not f32::max, which would make a number of NaN.
    let positive = if x < 0.0 { 0.0 } else { x };
    positive + libm::log1pf(libm::expf(-x.abs()))
}

/// Tokens that go through a few rows of a state before the next rows do: what they read stays in the first cache.
const TOKENS: usize = 16;

/// Rows of a state that go through some tokens before the next rows do, for the same reason.
const ROWS: usize = 8;

/// Where the results of each row of a batch stand: of each span [heads, tokens, head_dim], the spans `channels` a token
/// apart.
struct Places {
    /// Of each row: the first value of its span's first head, the tokens of the span, its own number among them.
    rows: Vec<[usize; 3]>,
    /// Values into each span's parts where the heads begin, for each token.
    before: usize,
}

impl Places {
    /// `before`: channels before the heads that hold results.
    fn new(spans: &[RecurrentSpan], channels: usize, before: usize) -> Self {
        let of_span = |span: &RecurrentSpan| {
            let (first, len) = (span.rows.start * channels, span.rows.len());
            (0..len).map(move |token| [first, len, token])
        };
        Self { rows: spans.iter().flat_map(of_span).collect(), before }
    }

    /// The heads of `row`, side by side.
    fn gather(&self, parts: &[f32], row: usize, head_dim: usize, out: &mut [f32]) {
        let [first, len, token] = self.rows[row];
        for (head, out) in out.chunks_exact_mut(head_dim).enumerate() {
            let at = first + self.before * len + (head * len + token) * head_dim;
            out.copy_from_slice(&parts[at..at + head_dim]);
        }
    }
}

/// `name` has `found` values, not `expected`.
fn expect(context: &'static str, name: &str, found: usize, expected: usize) -> Result<(), BackendError> {
    if found == expected {
        return Ok(());
    }
    Err(BackendError::Failed { context, message: format!("{name}: {found} values where {expected} were expected") })
}

#[cfg(test)]
mod tests;
