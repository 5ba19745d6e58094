//! How keys and values are kept between tokens.

use serde::{Deserialize, Serialize};

/// Storage of one layer's KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum KvFormat {
    F32,
    Bf16,
    /// E4M3 of K (after RoPE) and V under calibrated scales (multipliers): stored = e4m3(value / scale).
    Fp8 {
        k_scale: f32,
        v_scale: f32,
    },
}

impl KvFormat {
    /// Bytes of one value.
    #[must_use]
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
            Self::Fp8 { .. } => 1,
        }
    }
}
