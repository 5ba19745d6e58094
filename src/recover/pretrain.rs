//! A model before it has learned anything.

use std::cell::RefCell;
use std::path::Path;

use safetensors::Dtype;
use serde_json::Map;

use super::Result;
use crate::checkpoint::write::{FolderWriter, Pending, SHARD_BYTES};
use crate::model::ModelConfig;
use crate::model::modules::Part;
use crate::random::SplitMix64;

/// Standard deviation of weights; that of the projections that write the residual stream is divided by √(2 · layers).
const DEVIATION: f64 = 0.02;

/// Writes a BF16 model of random weights with the settings and tokenizer of the folder `like`, to `out`.
///
/// # Errors
/// When `out` cannot be written.
pub fn initialize(config: &ModelConfig, like: &Path, seed: u64, out: &Path) -> Result<()> {
    let writer = FolderWriter::create(out)?;
    let random = &RefCell::new(SplitMix64(seed));
    let tensor = |name: String, shape: &[usize], mean: f64, deviation: f64| {
        let count: usize = shape.iter().product();
        Pending::new(name, Dtype::BF16, shape, move || -> Result<Vec<u8>> {
            let random = &mut *random.borrow_mut();
            let value = || half::bf16::from_f64(mean + if deviation > 0.0 { deviation * normal(random) } else { 0.0 });
            Ok(std::iter::repeat_with(value).take(count).flat_map(half::bf16::to_le_bytes).collect())
        })
    };
    let mut tensors = Vec::new();
    for m in config.modules() {
        let deep = matches!(m.part, Part::O | Part::Down);
        let shrink = if deep { (2.0 * config.layers.len() as f64).sqrt() } else { 1.0 };
        tensors.push(tensor(format!("{}.weight", m.name), &[m.role.n, m.role.k], 0.0, DEVIATION / shrink));
        if m.role.bias {
            tensors.push(tensor(format!("{}.bias", m.name), &[m.role.n], 0.0, 0.0));
        }
    }
    tensors.extend(config.vectors().into_iter().map(|(name, shape)| tensor(name, &shape, 1.0, 0.0)));
    writer.tensors(tensors, SHARD_BYTES, &Map::new())?;
    writer.copy_settings(like)?;
    writer.copy_text_files(like)?;
    writer.commit()?;
    Ok(())
}

/// A normal random number (Box, Muller 1958).
fn normal(random: &mut SplitMix64) -> f64 {
    let mut unit = || ((random.draw() >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
    let (a, b) = (unit(), unit());
    (-2.0 * a.ln()).sqrt() * (std::f64::consts::TAU * b).cos()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normal_numbers_have_the_moments_of_the_normal_distribution() {
        let mut random = SplitMix64(1);
        let values: Vec<f64> = (0..100_000).map(|_| normal(&mut random)).collect();
        let moment = |power: i32| values.iter().map(|v| v.powi(power)).sum::<f64>() / values.len() as f64;
        assert!(moment(1).abs() < 0.02 && (moment(2) - 1.0).abs() < 0.02 && (moment(4) - 3.0).abs() < 0.15);
    }
}
