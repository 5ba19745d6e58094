//! A model before it has learned anything.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::Path;

use safetensors::Dtype;
use serde_json::Map;

use super::Result;
use crate::checkpoint::fused::Fused;
use crate::checkpoint::write::{FolderWriter, Pending, SHARD_BYTES};
use crate::model::ModelConfig;
use crate::model::config::MixerConfig;
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
    let modules = config.modules();
    let mut fused = BTreeSet::new();
    for m in &modules {
        let deep = matches!(m.part, Part::O | Part::Down | Part::MambaOut | Part::DeltaOut);
        let shrink = if deep { (2.0 * config.layers.len() as f64).sqrt() } else { 1.0 };
        if let Some(place) = m.expert.filter(|_| config.fuses_experts()).and_then(|_| Fused::named(&m.name)) {
            let experts = 1 + modules.iter().filter(|o| o.layer == m.layer).filter_map(|o| o.expert).max().unwrap_or(0);
            if fused.insert(place.stem().to_owned()) {
                let [weight, bias] = place.plain(experts, m.role);
                tensors.push(tensor(weight.name, &weight.shape, 0.0, DEVIATION / shrink));
                tensors.push(tensor(bias.name, &bias.shape, 0.0, 0.0));
            }
            continue;
        }
        tensors.push(tensor(format!("{}.weight", m.name), &[m.role.n, m.role.k], 0.0, DEVIATION / shrink));
        if m.role.bias {
            tensors.push(tensor(format!("{}.bias", m.name), &[m.role.n], 0.0, 0.0));
        }
    }
    tensors.extend(config.vectors().into_iter().map(|(name, shape)| {
        let first = First::of(config, &name, &shape);
        let count: usize = shape.iter().product();
        Pending::new(name, Dtype::BF16, &shape, move || -> Result<Vec<u8>> {
            let random = &mut *random.borrow_mut();
            let value = || half::bf16::from_f64(first.draw(random));
            Ok(std::iter::repeat_with(value).take(count).flat_map(half::bf16::to_le_bytes).collect())
        })
    }));
    writer.tensors(tensors, SHARD_BYTES, &Map::new())?;
    writer.copy_settings(like)?;
    writer.copy_text_files(like)?;
    writer.commit()?;
    Ok(())
}

/// What the values of a tensor that is no matrix begin at.
#[derive(Clone, Copy)]
enum First {
    Is(f64),
    /// Normal, about 0.
    Normal(f64),
    /// A_log: ln of 1 to 16, even (Mamba-2's own).
    Decay,
    /// dt_bias: what softplus makes 0.001 to 0.1 of, even in their logarithms (the same).
    Step,
}

impl First {
    fn of(config: &ModelConfig, name: &str, shape: &[usize]) -> Self {
        let ends = |end: &str| name.ends_with(end);
        let of_delta_net = || {
            let layers = config.layers.iter().enumerate();
            let mut steps = layers.flat_map(|(i, l)| l.steps.iter().map(move |s| (i, s)));
            let own = |i: usize, at: &str| name.starts_with(&config.in_layer(i, &format!("{at}.")));
            steps.any(|(i, s)| matches!(s.mixer, MixerConfig::DeltaNet(_)) && own(i, s.at))
        };
        match shape.last() {
            // As torch begins a convolution: uniform within 1 / √taps, here normal of the same variance.
            Some(&taps) if ends(".conv1d.weight") => Self::Normal((3.0 * taps as f64).sqrt().recip()),
            _ if ends(".A_log") => Self::Decay,
            _ if ends(".dt_bias") => Self::Step,
            _ if ends("bias") || ends(".sinks") => Self::Is(0.0),
            // Those of delta nets multiply by the weight itself.
            _ if config.offset_norms && !of_delta_net() => Self::Is(0.0),
            _ => Self::Is(1.0),
        }
    }

    fn draw(self, random: &mut SplitMix64) -> f64 {
        let mut unit = || ((random.draw() >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
        match self {
            Self::Is(value) => value,
            Self::Normal(deviation) => deviation * normal(random),
            Self::Decay => (1.0 + 15.0 * unit()).ln(),
            Self::Step => {
                let step = (1e-3f64.ln() + unit() * 100f64.ln()).exp();
                // The inverse of softplus.
                step + (-(-step).exp_m1()).ln()
            }
        }
    }
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
