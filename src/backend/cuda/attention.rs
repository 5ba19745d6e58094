//! Attention: norms and rotation of queries and keys, the cache, pieces of keys and their sum (kernels/attention.cu).

use std::sync::{Arc, Mutex, PoisonError};

use super::driver::{Args, Device, Memory};
use super::table::kernel;
use super::{CudaBackend, CudaCache, CudaPass, CudaTensor};
use crate::backend::{AttentionShape, Backend, BackendError, Batch, HeadParameters, PAGE, QueryGrowth, Result};
use crate::formats::kv::KvFormat;

/// Keys that one block of attention looks at: `SPLIT` of kernels/attention.cu.
const SPLIT: usize = 256;
/// The widest head of queries and keys that fits its shared memory.
const MAX_HEAD_DIM: usize = 256;

/// What queries of a pass's tokens are multiplied by, [tokens], by rule.
#[derive(Debug, Default)]
pub(super) struct Grown(Mutex<Vec<(QueryGrowth, Arc<Memory>)>>);

impl Grown {
    fn get(&self, device: &Arc<Device>, growth: QueryGrowth, batch: &Batch) -> Result<Arc<Memory>> {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, memory)) = held.iter().find(|(of, _)| *of == growth) {
            return Ok(memory.clone());
        }
        let factors: Vec<f32> = batch.positions().map(|p| growth.at(p)).collect();
        let memory = Arc::new(device.upload(&factors)?);
        held.push((growth, memory.clone()));
        Ok(memory)
    }
}

impl CudaBackend {
    /// [`Backend::normed_attention`].
    pub(super) fn attend(
        &self,
        [mut q, mut k, v]: [CudaTensor; 3],
        HeadParameters { norms, sinks }: HeadParameters<'_, Self>,
        shape: &AttentionShape,
        pass: &CudaPass,
        cache: &mut CudaCache,
    ) -> Result<CudaTensor> {
        if pass.pages > cache.pages() {
            let (capacity, needed) = (cache.pages() * PAGE, pass.pages * PAGE);
            return Err(BackendError::CacheTooSmall { capacity, needed });
        }
        let &AttentionShape { heads, kv_heads, head_dim, .. } = shape;
        let unsupported =
            |what| Err(BackendError::Unsupported { module: format!("layer {}", shape.layer), backend: "cuda", what });
        if head_dim > MAX_HEAD_DIM || head_dim % 2 == 1 {
            return unsupported(format!("heads of {head_dim}: even, and at most {MAX_HEAD_DIM}"));
        }
        let value_dim = cache.layer(shape.cache).shape.value_dim;
        let rope = shape.rope.map(|r| &pass.ropes[r]);
        if let Some((half, _)) = rope.filter(|(half, _)| 2 * half > head_dim) {
            return unsupported(format!("heads of {head_dim} of which {} dimensions turn", 2 * half));
        }
        if let Some(sinks) = sinks.filter(|s| s.features != heads) {
            return unsupported(format!("{} sinks of {heads} heads", sinks.features));
        }
        // Norms over whole rows come before; those over heads are the kernel's.
        let eps = norms.as_ref().map_or(0.0, |n| n.eps);
        let (mut q_norm, mut k_norm) = (norms.as_ref().map(|n| n.q), norms.as_ref().map(|n| n.k));
        if let Some(norm) = q_norm.take_if(|n| n.features != head_dim) {
            q = self.rms_norm(&q, norm, eps)?;
        }
        if let Some(norm) = k_norm.take_if(|n| n.features != head_dim) {
            k = self.rms_norm(&k, norm, eps)?;
        }
        let growth = shape.growth.map(|growth| pass.grown.get(&self.device, growth, &pass.batch)).transpose()?;
        let tokens = q.rows;
        let layer = cache.layer(shape.cache);
        let (kv, k_scale, v_scale) = match layer.shape.format {
            KvFormat::F32 => (0, 1.0, 1.0),
            KvFormat::Bf16 => (1, 1.0, 1.0),
            KvFormat::Fp8 { k_scale, v_scale } => (2, k_scale, v_scale),
        };
        let turned = self.empty(tokens, q.columns)?;
        let args = Args::new()
            .memory(&q.data)
            .memory(&k.data)
            .memory(&v.data)
            .memory(&turned.data)
            .memory(&layer.keys)
            .memory(&layer.values)
            .optional(q_norm.map(|n| &n.weight))
            .optional(k_norm.map(|n| &n.weight))
            .float(eps)
            .optional(rope.map(|(_, table)| &**table))
            .memory(&pass.positions)
            .memory(&pass.slots)
            .optional(growth.as_deref())
            .int(tokens)
            .int(heads)
            .int(kv_heads)
            .int(head_dim)
            .int(value_dim)
            .int(rope.map_or(0, |(half, _)| *half))
            .int(kv)
            .float(k_scale)
            .float(v_scale);
        self.launch("rope_cache", [(tokens * (heads + 2 * kv_heads)).div_ceil(4), 1, 1], 128, args)?;

        let pieces = pass.batch.reach().div_ceil(SPLIT);
        let parts = self.device.take(4 * tokens * heads * pieces * value_dim)?;
        let totals = self.device.take(8 * tokens * heads * pieces)?;
        let window = shape.window.unwrap_or(0);
        // Blocks of 32 rows read the cache half as often, where there are as many rows. Three terms of f32 leave no room for them.
        let most = pass.longest_run * (heads / kv_heads);
        let rows = if most <= 16 || kv == 0 { 16 } else { 32 };
        let groups = most.div_ceil(rows);
        let args = Args::new()
            .memory(&turned.data)
            .memory(&layer.keys)
            .memory(&layer.values)
            .memory(&parts)
            .memory(&totals)
            .memory(&pass.positions)
            .memory(&pass.tables)
            .memory(&pass.table_of)
            .memory(&pass.runs)
            .int(groups)
            .int(heads)
            .int(kv_heads)
            .int(head_dim)
            .int(value_dim)
            .int(window)
            .float(shape.scale)
            .float(k_scale)
            .float(v_scale)
            .int(pieces);
        let name = kernel(&format!("attention_{}_{rows}", ["f32", "bf16", "fp8"][kv]))?;
        self.launch(name, [pass.run_count, kv_heads * groups, pieces], 128, args)?;
        let out = self.empty(tokens, heads * value_dim)?;
        let args = Args::new()
            .memory(&parts)
            .memory(&totals)
            .optional(sinks.map(|s| &s.weight))
            .memory(&out.data)
            .memory(&pass.positions)
            .int(heads)
            .int(value_dim)
            .int(window)
            .int(pieces);
        self.launch("attention_combine", [tokens, heads, 1], 128, args)?;
        Ok(out)
    }
}
