//! Rotation by Hadamard matrices, folded into the weights: outliers spread over the channels of a block, and nothing is
//! computed when the model runs.
//!
//! The residual stream's rotation R (QuaRot, SpinQuant's R1) goes into the embedding, the head, and every linear that reads
//! or writes the stream; norms are folded into what reads them first, as RMSNorm commutes with a rotation only without
//! weights. The values' rotation (R2) goes into v_proj's rows and o_proj's columns, head by head. R is the block-diagonal
//! Hadamard matrix of the largest power of two that divides the width, with random signs.
//!
//! Unlike smoothing by powers of two this changes the unquantized model a little: the embedding and the head are stored
//! in their own type, rounded.

use std::path::Path;

use rayon::prelude::*;
use safetensors::Dtype;
use serde_json::Map;

use super::QuantizeError;
use super::error::plain;
use super::recipe::Rotate;
use crate::checkpoint::Checkpoint;
use crate::checkpoint::write::{FolderWriter, Pending, SHARD_BYTES, float_bytes};
use crate::model::ModelConfig;
use crate::model::modules::{Module, Part};
use crate::random::SplitMix64;

/// A block-diagonal Hadamard matrix with signs, scaled to be orthogonal.
struct Rotation {
    signs: Vec<f32>,
    block: usize,
}

impl Rotation {
    fn new(width: usize, seed: u64) -> Self {
        let mut random = SplitMix64(seed);
        let signs = (0..width).map(|_| if random.draw() & 1 == 0 { 1.0 } else { -1.0 }).collect();
        Self { signs, block: 1 << width.trailing_zeros() }
    }

    /// x ← x·R for each row of `rows` [.., width].
    fn rows(&self, rows: &mut [f32]) {
        rows.par_chunks_mut(self.signs.len()).for_each(|row| self.row(row));
    }

    fn row(&self, row: &mut [f32]) {
        row.iter_mut().zip(&self.signs).for_each(|(x, s)| *x *= s);
        for block in row.chunks_mut(self.block) {
            let mut half = 1;
            while half < block.len() {
                for pair in block.chunks_mut(2 * half) {
                    let (a, b) = pair.split_at_mut(half);
                    for (a, b) in a.iter_mut().zip(b) {
                        (*a, *b) = (*a + *b, *a - *b);
                    }
                }
                half *= 2;
            }
        }
        let scale = 1.0 / (self.block as f32).sqrt();
        row.iter_mut().for_each(|x| *x *= scale);
    }

    /// W ← Rᵀ·W for each run of `width` rows of W [.., columns].
    fn outputs(&self, w: &mut [f32], columns: usize) {
        let width = self.signs.len();
        for group in w.chunks_mut(width * columns) {
            let mut transposed: Vec<f32> = vec![0.0; group.len()];
            for (r, row) in group.chunks(columns).enumerate() {
                row.iter().enumerate().for_each(|(c, v)| transposed[c * width + r] = *v);
            }
            self.rows(&mut transposed);
            for (r, row) in group.chunks_mut(columns).enumerate() {
                row.iter_mut().enumerate().for_each(|(c, v)| *v = transposed[c * width + r]);
            }
        }
    }
}

/// Writes the rotated model to `folder`: linears that `quantized` names in f32, all else in its own type.
///
/// # Errors
/// When a tensor cannot be read or the folder cannot be written.
pub fn rotate(
    checkpoint: &Checkpoint,
    what: Rotate,
    quantized: &dyn Fn(&Module) -> bool,
    folder: &Path,
) -> Result<(), QuantizeError> {
    let config = ModelConfig::read(&checkpoint.config)?;
    let head_dim = plain(&config, "rotating")?.attention.head_dim;
    let modules = config.modules();
    let stream = (what == Rotate::All).then(|| Rotation::new(config.hidden, 1));
    let head = Rotation::new(head_dim, 2);
    let module_of = |tensor: &str| {
        let (name, suffix) = tensor.rsplit_once('.')?;
        Some((modules.iter().find(|m| m.name == name)?, suffix.to_owned()))
    };
    let untie = stream.is_some() && config.tied_embeddings;
    let floats = |name: &str| -> Result<Vec<f32>, QuantizeError> {
        Ok(checkpoint.tensors.require(name, "it is rotated")?.floats()?)
    };
    // What becomes of tensor `name`, of the values that are stored under `stored`; nothing where it stays as it is.
    let rotated = |name: &str, stored: &str| -> Result<Option<Vec<f32>>, QuantizeError> {
        let mut values = floats(stored)?;
        if name == "lm_head.weight" {
            read(&mut values, &floats("model.norm.weight")?, stream.as_ref());
        } else if let Some((m, suffix)) = module_of(name) {
            turn(m, &suffix, &mut values, stream.as_ref(), &head, &floats)?;
        } else if stream.is_some() && is_stream_norm(name) {
            values.fill(1.0);
        } else {
            return Ok(None);
        }
        checkpoint.tensors.release_pages();
        Ok(Some(values))
    };
    let rotated = &rotated;
    let mut tensors: Vec<Pending<'_, QuantizeError>> = Vec::new();
    for stored in checkpoint.tensors.names().filter(|name| !(untie && *name == "lm_head.weight")) {
        let Some(view) = checkpoint.tensors.peek(stored) else { continue };
        let head = (untie && stored == "model.embed_tokens.weight").then_some("lm_head.weight");
        for name in std::iter::once(stored).chain(head) {
            let is_linear = module_of(name).is_some_and(|(m, suffix)| suffix == "weight" && quantized(m));
            let dtype = if is_linear { Dtype::F32 } else { view.dtype };
            let spelled = checkpoint.tensors.stored_name(name);
            tensors.push(Pending::new(spelled, dtype, view.shape, move || match rotated(name, stored)? {
                Some(values) => Ok(float_bytes(dtype, &values)),
                None => Ok(view.bytes.to_vec()),
            }));
        }
    }
    tensors.extend(Pending::aside(&checkpoint.tensors));
    let writer = FolderWriter::create(folder)?;
    writer.tensors(tensors, SHARD_BYTES, &Map::new())?;
    let mut json = checkpoint.whole_config.value().clone();
    if untie {
        crate::checkpoint::untie(&mut json);
    }
    writer.json("config.json", &json)?;
    writer.copy_text_files(checkpoint.tensors.folder())?;
    Ok(writer.commit()?)
}

/// Whether a norm's weights multiply the residual stream.
fn is_stream_norm(name: &str) -> bool {
    name == "model.norm.weight" || name.ends_with("layernorm.weight")
}

/// What reads the stream through a norm: its columns take the norm's weights and the rotation.
fn read(w: &mut [f32], norm: &[f32], stream: Option<&Rotation>) {
    let Some(stream) = stream else { return };
    w.par_chunks_mut(norm.len()).for_each(|row| row.iter_mut().zip(norm).for_each(|(w, g)| *w *= g));
    stream.rows(w);
}

/// One tensor of a module, turned as its place asks.
fn turn(
    m: &Module,
    suffix: &str,
    values: &mut [f32],
    stream: Option<&Rotation>,
    head: &Rotation,
    floats: &dyn Fn(&str) -> Result<Vec<f32>, QuantizeError>,
) -> Result<(), QuantizeError> {
    let bias = suffix == "bias";
    let columns = if bias { 1 } else { m.role.k };
    let layer = m.layer.unwrap_or(0);
    let norm = |which: &str| floats(&format!("model.layers.{layer}.{which}.weight"));
    match m.part {
        Part::Embedding => {
            if let Some(stream) = stream {
                stream.rows(values);
            }
        }
        Part::Q | Part::K | Part::V if !bias && stream.is_some() => read(values, &norm("input_layernorm")?, stream),
        Part::Gate | Part::Up | Part::Router if !bias => read(values, &norm("post_attention_layernorm")?, stream),
        _ => {}
    }
    match m.part {
        Part::V => head.outputs(values, columns),
        Part::O if !bias => {
            head.rows(values);
        }
        _ => {}
    }
    if let (Part::O | Part::Down, Some(stream)) = (m.part, stream) {
        stream.outputs(values, columns);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rotations_are_orthogonal_and_their_transpose_undoes_them() {
        let r = Rotation::new(48, 3);
        assert_eq!(r.block, 16);
        let mut identity = vec![0.0f32; 48 * 48];
        (0..48).for_each(|i| identity[i * 49] = 1.0);
        let mut forward = identity.clone();
        r.rows(&mut forward);
        assert!(forward.iter().filter(|v| **v != 0.0).count() == 48 * 16);
        // Rᵀ·R = 1.
        let mut back = forward.clone();
        r.outputs(&mut back, 48);
        for (a, b) in back.iter().zip(&identity) {
            assert!((a - b).abs() < 1e-6);
        }
    }
}
