//! A model before it has learned anything.

use std::path::Path;

use safetensors::Dtype;
use serde_json::Map;

use super::Result;
use super::data::SplitMix;
use crate::checkpoint::write::{FolderWriter, SHARD_BYTES, TensorSpec};
use crate::model::ModelConfig;
use crate::model::modules::Part;

/// Standard deviation of weights; that of the projections that write the residual stream is divided by √(2 · layers).
const DEVIATION: f64 = 0.02;

/// Writes a BF16 model of random weights with the settings and tokenizer of the folder `like`, to `out`.
///
/// # Errors
/// When `out` cannot be written.
pub fn initialize(config: &ModelConfig, like: &Path, seed: u64, out: &Path) -> Result<()> {
    let writer = FolderWriter::create(out)?;
    let mut specs = Vec::new();
    let mut deviations = Vec::new();
    for m in config.modules() {
        let deep = matches!(m.part, Part::O | Part::Down);
        let shrink = if deep { (2.0 * config.layers as f64).sqrt() } else { 1.0 };
        specs.push(TensorSpec {
            name: format!("{}.weight", m.name),
            dtype: Dtype::BF16,
            shape: vec![m.role.n, m.role.k],
        });
        deviations.push(DEVIATION / shrink);
        if m.role.bias {
            specs.push(TensorSpec { name: format!("{}.bias", m.name), dtype: Dtype::BF16, shape: vec![m.role.n] });
            deviations.push(0.0);
        }
    }
    let norms = specs.len();
    for (name, length) in config.norms() {
        specs.push(TensorSpec { name, dtype: Dtype::BF16, shape: vec![length] });
        deviations.push(0.0);
    }
    let mut random = SplitMix(seed);
    let mut next = 0;
    writer.tensors(&specs, SHARD_BYTES, &Map::new(), |spec| -> Result<Vec<u8>> {
        let count: usize = spec.shape.iter().product();
        let (deviation, mean) = (deviations[next], if next >= norms { 1.0 } else { 0.0 });
        next += 1;
        let value = || half::bf16::from_f64(mean + if deviation > 0.0 { deviation * normal(&mut random) } else { 0.0 });
        Ok(std::iter::repeat_with(value).take(count).flat_map(half::bf16::to_le_bytes).collect())
    })?;
    writer.copy_settings(like)?;
    writer.copy_text_files(like)?;
    writer.commit()?;
    Ok(())
}

/// A normal random number (Box, Muller 1958).
fn normal(random: &mut SplitMix) -> f64 {
    let mut unit = || ((random.next() >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
    let (a, b) = (unit(), unit());
    (-2.0 * a.ln()).sqrt() * (std::f64::consts::TAU * b).cos()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normal_numbers_have_the_moments_of_the_normal_distribution() {
        let mut random = SplitMix(1);
        let values: Vec<f64> = (0..100_000).map(|_| normal(&mut random)).collect();
        let moment = |power: i32| values.iter().map(|v| v.powi(power)).sum::<f64>() / values.len() as f64;
        assert!(moment(1).abs() < 0.02 && (moment(2) - 1.0).abs() < 0.02 && (moment(4) - 3.0).abs() < 0.15);
    }
}
