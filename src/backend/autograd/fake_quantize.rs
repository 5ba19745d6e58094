//! Rounding to a number format and back as one candle operation.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, bail};

use crate::formats::e4m3;
use crate::formats::linear::ActivationFormat;

/// What the values are rounded to. The input is contiguous f32, [tokens, features].
///
/// There is no `bwd` yet, so a backward pass through it fails by name instead of losing the gradient. It will be
/// straight-through: the output's gradient, with zeros where |x| exceeds what the format's calibrated scale reaches
/// (NVFP4: 6 · 448 · global scale, static FP8: 448 · scale), and unchanged for the formats whose scale follows x (per
/// token, per group, MX), for BF16 and for the KV cache.
#[derive(Clone, Copy, Debug)]
pub(super) enum FakeQuantize {
    /// The input of a linear.
    Activation(ActivationFormat),
    /// Keys or values kept in BF16.
    Bf16,
    /// Keys or values kept as e4m3(x / scale).
    E4m3(f32),
}

impl CustomOp1 for FakeQuantize {
    fn name(&self) -> &'static str {
        "fake_quantize"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let Some((start, end)) = layout.contiguous_offsets() else { bail!("fake_quantize needs a contiguous tensor") };
        let mut values = storage.as_slice::<f32>()?[start..end].to_vec();
        match *self {
            Self::Activation(format) => {
                let features = layout.dims().last().map_or(1, |&d| d.max(1));
                values.chunks_exact_mut(features).for_each(|row| format.fake_quantize(row));
            }
            Self::Bf16 => values.iter_mut().for_each(|v| *v = half::bf16::from_f32(*v).to_f32()),
            Self::E4m3(scale) => values.iter_mut().for_each(|v| *v = e4m3::round(*v / scale) * scale),
        }
        Ok((CpuStorage::F32(values), layout.shape().clone()))
    }
}
