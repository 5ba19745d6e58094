//! The KV cache on the device: per layer, [pages, KV heads, 16, head_dim padded to 16] keys, and values.

use std::sync::Arc;

use super::driver::{Device, Memory};
use crate::backend::{CacheLayout, LayerCache, PAGE, Result};
use crate::formats::kv::KvFormat;

/// Keys and values of every layer.
pub struct CudaCache {
    layers: Vec<Layer>,
    pages: usize,
}

pub(super) struct Layer {
    pub shape: LayerCache,
    pub keys: Memory,
    pub values: Memory,
}

/// Bytes of one page's keys.
fn page_bytes(shape: &LayerCache) -> usize {
    let element = match shape.format {
        KvFormat::F32 => 4,
        KvFormat::Bf16 => 2,
        KvFormat::Fp8 { .. } => 1,
    };
    element * shape.kv_heads * PAGE * shape.head_dim.next_multiple_of(16)
}

impl CudaCache {
    pub(super) fn new(device: &Arc<Device>, layout: &CacheLayout) -> Result<Self> {
        // What was never written must be finite: it is masked, not skipped.
        let layer = |&shape: &LayerCache| {
            let bytes = layout.pages * page_bytes(&shape);
            Ok(Layer { shape, keys: device.zeros(bytes)?, values: device.zeros(bytes)? })
        };
        Ok(Self { layers: layout.layers.iter().map(layer).collect::<Result<_>>()?, pages: layout.pages })
    }

    pub(super) fn grow(&mut self, device: &Arc<Device>, pages: usize) -> Result<()> {
        if pages <= self.pages {
            return Ok(());
        }
        for layer in &mut self.layers {
            let (old, new) = (self.pages * page_bytes(&layer.shape), pages * page_bytes(&layer.shape));
            for memory in [&mut layer.keys, &mut layer.values] {
                let larger = device.zeros(new)?;
                device.copy((&larger, 0), (memory, 0), old)?;
                *memory = larger;
            }
        }
        self.pages = pages;
        Ok(())
    }

    /// Copies a page of all layers onto another.
    pub(super) fn copy_page(&mut self, device: &Device, from: u32, to: u32) -> Result<()> {
        for layer in &self.layers {
            let bytes = page_bytes(&layer.shape);
            for memory in [&layer.keys, &layer.values] {
                device.copy((memory, to as usize * bytes), (memory, from as usize * bytes), bytes)?;
            }
        }
        Ok(())
    }

    pub(super) fn pages(&self) -> usize {
        self.pages
    }

    pub(super) fn layer(&self, index: usize) -> &Layer {
        &self.layers[index]
    }
}
