//! What one linear layer can be quantized to, by ModelOpt's names.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::checkpoint::dialect::Dialect;
use crate::formats::{fp8, mx, nvfp4};

/// A format of weight and input together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scheme {
    /// NVFP4 weights and inputs (W4A4), calibrated input scale.
    Nvfp4,
    /// NVFP4 weights, inputs as they are.
    W4a16Nvfp4,
    /// E2M1 weights in blocks of 32 under E4M3 scales, FP8 inputs.
    W4a8Nvfp4Fp8,
    /// FP8 weights and inputs, one calibrated scale each.
    Fp8,
    /// FP8 weights with a scale per output channel, inputs with a scale per token.
    Fp8PcPt,
    /// FP8 weights with a scale per 128x128 block. Inputs: as they are (ModelOpt), or FP8 per 128 (compressed-tensors).
    Fp8Block,
    /// MXFP8 weights and inputs.
    Mxfp8,
    /// MXFP4 weights and inputs.
    Mxfp4,
    /// MXFP4 weights, inputs as they are.
    Mxfp4a16,
    /// Left as it is.
    None,
}

impl Scheme {
    /// Every scheme that quantizes.
    pub const ALL: [Self; 9] = [
        Self::Nvfp4,
        Self::W4a16Nvfp4,
        Self::W4a8Nvfp4Fp8,
        Self::Fp8,
        Self::Fp8PcPt,
        Self::Fp8Block,
        Self::Mxfp8,
        Self::Mxfp4,
        Self::Mxfp4a16,
    ];

    /// The name in recipes.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Nvfp4 => "nvfp4",
            Self::W4a16Nvfp4 => "w4a16_nvfp4",
            Self::W4a8Nvfp4Fp8 => "w4a8_nvfp4_fp8",
            Self::Fp8 => "fp8",
            Self::Fp8PcPt => "fp8_pc_pt",
            Self::Fp8Block => "fp8_block",
            Self::Mxfp8 => "mxfp8",
            Self::Mxfp4 => "mxfp4",
            Self::Mxfp4a16 => "mxfp4a16",
            Self::None => "none",
        }
    }

    /// `quant_algo` in ModelOpt's configuration; `None` where that dialect has no such format.
    #[must_use]
    pub fn modelopt_algorithm(self) -> Option<&'static str> {
        match self {
            Self::Nvfp4 => Some("NVFP4"),
            Self::W4a16Nvfp4 => Some("W4A16_NVFP4"),
            Self::W4a8Nvfp4Fp8 => Some("W4A8_NVFP4_FP8"),
            Self::Fp8 => Some("FP8"),
            Self::Fp8PcPt => Some("FP8_PER_CHANNEL_PER_TOKEN"),
            Self::Fp8Block => Some("fp8_pb_wo"),
            Self::Mxfp8 => Some("MXFP8"),
            Self::Mxfp4 => Some("mxfp4"),
            Self::Mxfp4a16 | Self::None => None,
        }
    }

    /// Whether a dialect can say it.
    #[must_use]
    pub fn is_in(self, dialect: Dialect) -> bool {
        match dialect {
            Dialect::ModelOpt => self.modelopt_algorithm().is_some(),
            Dialect::CompressedTensors => !matches!(self, Self::W4a8Nvfp4Fp8 | Self::None),
            _ => false,
        }
    }

    /// Elements along K that share a scale and must divide K; `None` where any K will do.
    #[must_use]
    pub fn block(self) -> Option<usize> {
        match self {
            Self::Nvfp4 | Self::W4a16Nvfp4 => Some(nvfp4::BLOCK),
            Self::W4a8Nvfp4Fp8 | Self::Mxfp8 | Self::Mxfp4 | Self::Mxfp4a16 => Some(mx::BLOCK),
            _ => None,
        }
    }

    /// Whether weights are E2M1 under an E4M3 scale per 16 and a global one.
    #[must_use]
    pub fn is_nvfp4_weight(self) -> bool {
        matches!(self, Self::Nvfp4 | Self::W4a16Nvfp4)
    }

    /// Whether a scale of the input is calibrated and stored.
    #[must_use]
    pub fn has_input_scale(self) -> bool {
        matches!(self, Self::Nvfp4 | Self::W4a8Nvfp4Fp8 | Self::Fp8)
    }

    /// Bits of a weight, block scales included.
    #[must_use]
    pub fn bits_per_weight(self) -> f64 {
        match self {
            Self::Nvfp4 | Self::W4a16Nvfp4 => 4.0 + 8.0 / nvfp4::BLOCK as f64,
            Self::W4a8Nvfp4Fp8 | Self::Mxfp4 | Self::Mxfp4a16 => 4.0 + 8.0 / mx::BLOCK as f64,
            Self::Mxfp8 => 8.0 + 8.0 / mx::BLOCK as f64,
            Self::Fp8 | Self::Fp8PcPt => 8.0,
            Self::Fp8Block => 8.0 + 32.0 / (fp8::BLOCK * fp8::BLOCK) as f64,
            Self::None => 16.0,
        }
    }
}

impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
