//! What recurrent layers keep of each sequence: the convolution's tail and the state, f32, in slots.

use super::RecurrentSpan;
use crate::backend::BackendError;
use serde::{Deserialize, Serialize};

/// What one layer keeps of one sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecurrentShape {
    /// Inputs of the convolution that the next token still sees: its kernel less one.
    pub tail: usize,
    /// Channels of the convolution.
    pub channels: usize,
    /// Values of the state.
    pub state: usize,
}

impl RecurrentShape {
    /// Bytes of one slot.
    #[must_use]
    pub fn bytes(&self) -> usize {
        (self.tail * self.channels + self.state) * size_of::<f32>()
    }
}

/// Tails and states of every layer that has one.
#[derive(Debug, Default)]
pub struct RecurrentStates {
    layers: Vec<Option<Layer>>,
    slots: usize,
}

#[derive(Debug)]
struct Layer {
    shape: RecurrentShape,
    /// Each allocated by itself: growing moves nothing, and the system zeroes memory when it is first touched.
    slots: Vec<Slot>,
}

/// One sequence's share of one layer.
#[derive(Debug)]
pub(super) struct Slot {
    /// [kernel - 1, channels], the oldest first.
    pub(super) tail: Vec<f32>,
    pub(super) state: Vec<f32>,
}

impl RecurrentStates {
    /// No slots yet; `None` for a layer that keeps nothing.
    #[must_use]
    pub fn new(shapes: &[Option<RecurrentShape>]) -> Self {
        let layer = |shape: RecurrentShape| Layer { shape, slots: Vec::new() };
        Self { layers: shapes.iter().map(|shape| shape.map(layer)).collect(), slots: 0 }
    }

    /// Sequences it has room for.
    #[must_use]
    pub fn slots(&self) -> usize {
        self.slots
    }

    /// Room for `slots` sequences, if there is less; what is there stays.
    pub fn grow(&mut self, slots: usize) {
        self.slots = self.slots.max(slots);
        for Layer { shape, slots } in self.layers.iter_mut().flatten() {
            let slot = || Slot { tail: vec![0.0; shape.tail * shape.channels], state: vec![0.0; shape.state] };
            slots.resize_with(self.slots, slot);
        }
    }

    /// Makes slot `to` hold what slot `from` does, in every layer.
    ///
    /// # Errors
    /// When there is no such slot.
    pub fn copy(&mut self, from: usize, to: usize) -> Result<(), BackendError> {
        if let Some(slot) = [from, to].into_iter().find(|slot| *slot >= self.slots) {
            return Err(failed(format!("slot {slot} of {} recurrent states", self.slots)));
        }
        for layer in self.layers.iter_mut().flatten() {
            if let Ok([from, to]) = layer.slots.get_disjoint_mut([from, to]) {
                to.tail.copy_from_slice(&from.tail);
                to.state.copy_from_slice(&from.state);
            }
        }
        Ok(())
    }

    /// The slots of `spans` in `layer`, in their order.
    ///
    /// # Errors
    /// When the layer keeps something else, a slot isn't there, or two spans share one.
    pub(super) fn of_spans(
        &mut self,
        layer: usize,
        shape: RecurrentShape,
        spans: &[RecurrentSpan],
    ) -> Result<Vec<&mut Slot>, BackendError> {
        let Some(held) = self.layers.get_mut(layer).and_then(Option::as_mut) else {
            return Err(failed(format!("layer {layer} keeps no state")));
        };
        if held.shape != shape {
            return Err(failed(format!("layer {layer} keeps {:?}; its mixer needs {shape:?}", held.shape)));
        }
        let mut slots: Vec<Option<&mut Slot>> = held.slots.iter_mut().map(Some).collect();
        let mut take = |span: &RecurrentSpan| {
            let missing = || failed(format!("slot {} is not there, or two sequences share it", span.slot));
            slots.get_mut(span.slot).and_then(Option::take).ok_or_else(missing)
        };
        spans.iter().map(&mut take).collect()
    }
}

fn failed(message: String) -> BackendError {
    BackendError::Failed { context: "recurrent states", message }
}
