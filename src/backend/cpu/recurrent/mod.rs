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

/// `name` has `found` values, not `expected`.
fn expect(context: &'static str, name: &str, found: usize, expected: usize) -> Result<(), BackendError> {
    if found == expected {
        return Ok(());
    }
    Err(BackendError::Failed { context, message: format!("{name}: {found} values where {expected} were expected") })
}
