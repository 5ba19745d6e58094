//! What sequences keep on the device. Per attention layer, [pages, KV heads, 16, head_dim padded to 16] keys, and values likewise
//! in their own width; per recurrent layer and slot the convolution's tail and the state, f32.

use std::sync::Arc;

use super::driver::{Device, Memory};
use crate::backend::cpu::recurrent::RecurrentShape;
use crate::backend::{BackendError, CacheLayout, LayerCache, PAGE, Result};

/// Keys and values, tails and states of every layer.
pub struct CudaCache {
    layers: Vec<Layer>,
    recurrent: Vec<Recurrent>,
    pages: usize,
    slots: usize,
}

pub(super) struct Layer {
    pub shape: LayerCache,
    pub keys: Memory,
    pub values: Memory,
}

pub(super) struct Recurrent {
    shape: RecurrentShape,
    /// [slots, kernel - 1, channels].
    pub tails: Memory,
    /// [slots, values of a state].
    pub states: Memory,
}

/// Bytes of one page's keys, and of its values.
fn page_bytes(shape: &LayerCache) -> [usize; 2] {
    let element = shape.format.bytes();
    [shape.head_dim, shape.value_dim].map(|d| element * shape.kv_heads * PAGE * d.next_multiple_of(16))
}

/// Bytes of one slot's tail, and of its state.
fn slot_bytes(shape: &RecurrentShape) -> [usize; 2] {
    [shape.tail * shape.channels, shape.state].map(|values| values * size_of::<f32>())
}

/// Makes `memory`, of `old` bytes, one of `new`.
fn enlarge(device: &Arc<Device>, memory: &mut Memory, old: usize, new: usize) -> Result<()> {
    let larger = device.zeros(new)?;
    device.copy((&larger, 0), (memory, 0), old)?;
    *memory = larger;
    Ok(())
}

impl CudaCache {
    pub(super) fn new(device: &Arc<Device>, layout: &CacheLayout) -> Result<Self> {
        // What was never written must be finite: it is masked, not skipped.
        let layer = |&shape: &LayerCache| {
            let [keys, values] = page_bytes(&shape).map(|bytes| device.zeros(layout.pages * bytes));
            Ok(Layer { shape, keys: keys?, values: values? })
        };
        let recurrent = |&shape: &RecurrentShape| {
            let [tails, states] = slot_bytes(&shape).map(|bytes| device.zeros(layout.slots * bytes));
            Ok(Recurrent { shape, tails: tails?, states: states? })
        };
        Ok(Self {
            layers: layout.layers.iter().map(layer).collect::<Result<_>>()?,
            recurrent: layout.recurrent.iter().map(recurrent).collect::<Result<_>>()?,
            pages: layout.pages,
            slots: layout.slots,
        })
    }

    pub(super) fn grow(&mut self, device: &Arc<Device>, pages: usize, slots: usize) -> Result<()> {
        if pages > self.pages {
            for layer in &mut self.layers {
                let [keys, values] = page_bytes(&layer.shape);
                enlarge(device, &mut layer.keys, self.pages * keys, pages * keys)?;
                enlarge(device, &mut layer.values, self.pages * values, pages * values)?;
            }
            self.pages = pages;
        }
        if slots > self.slots {
            for layer in &mut self.recurrent {
                let [tail, state] = slot_bytes(&layer.shape);
                enlarge(device, &mut layer.tails, self.slots * tail, slots * tail)?;
                enlarge(device, &mut layer.states, self.slots * state, slots * state)?;
            }
            self.slots = slots;
        }
        Ok(())
    }

    /// Copies a page of all layers onto another.
    pub(super) fn copy_page(&mut self, device: &Device, from: u32, to: u32) -> Result<()> {
        let (from, to) = (from as usize, to as usize);
        for layer in &self.layers {
            for (memory, bytes) in [&layer.keys, &layer.values].into_iter().zip(page_bytes(&layer.shape)) {
                device.copy((memory, to * bytes), (memory, from * bytes), bytes)?;
            }
        }
        Ok(())
    }

    /// Copies a slot of all recurrent layers onto another.
    pub(super) fn copy_state(&mut self, device: &Device, from: usize, to: usize) -> Result<()> {
        if let Some(slot) = [from, to].into_iter().find(|slot| *slot >= self.slots) {
            let message = format!("slot {slot} of {} recurrent states", self.slots);
            return Err(BackendError::Failed { context: "recurrent states", message });
        }
        if from == to {
            return Ok(());
        }
        for layer in &self.recurrent {
            for (memory, bytes) in [&layer.tails, &layer.states].into_iter().zip(slot_bytes(&layer.shape)) {
                device.copy((memory, to * bytes), (memory, from * bytes), bytes)?;
            }
        }
        Ok(())
    }

    pub(super) fn pages(&self) -> usize {
        self.pages
    }

    pub(super) fn slots(&self) -> usize {
        self.slots
    }

    pub(super) fn layer(&self, index: usize) -> &Layer {
        &self.layers[index]
    }

    /// Recurrent layer `index`, which keeps `shape`.
    pub(super) fn recurrent(&self, index: usize, shape: RecurrentShape) -> Result<&Recurrent> {
        let held = self.recurrent.get(index).filter(|layer| layer.shape == shape);
        held.ok_or_else(|| BackendError::Failed {
            context: "recurrent states",
            message: format!("layer {index} keeps no {shape:?}"),
        })
    }
}
