//! What one linear layer can be quantized to, by ModelOpt's names.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::e8m0::ScaleRule;
use super::fp_quant::Method;
use super::linear::{ActivationFormat, BlockScales, Element, LinearTensors, OutputScale};
use super::{fp8, mx, nvfp4};

/// How a weight is quantized.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightFormat {
    /// E2M1 with E4M3 block scales and a global scale.
    Nvfp4 { block: usize },
    /// E2M1 with an E8M0 scale per 32.
    Mxfp4,
    /// E4M3 with an E8M0 scale per 32.
    Mxfp8,
    /// E4M3 under f32 scales: of the whole, of rows, or of 128x128 blocks.
    Fp8,
}

impl fmt::Display for WeightFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nvfp4 { block } => write!(f, "NVFP4 in blocks of {block}"),
            Self::Mxfp4 => f.write_str("MXFP4"),
            Self::Mxfp8 => f.write_str("MXFP8"),
            Self::Fp8 => f.write_str("FP8"),
        }
    }
}

/// How an input is quantized, calibrated scales aside: see [`ActivationFormat`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InputFormat {
    Float,
    Nvfp4,
    Fp8Static,
    Fp8Token,
    Fp8Group,
    Mxfp4,
    Mxfp8,
    FpQuant(Method),
}

impl InputFormat {
    /// Of an input whose scale is known.
    #[must_use]
    pub fn of(activation: ActivationFormat) -> Self {
        match activation {
            ActivationFormat::Float => Self::Float,
            ActivationFormat::Nvfp4 { .. } => Self::Nvfp4,
            ActivationFormat::Fp8Static { .. } => Self::Fp8Static,
            ActivationFormat::Fp8Token => Self::Fp8Token,
            ActivationFormat::Fp8Group => Self::Fp8Group,
            ActivationFormat::Mxfp4 { .. } => Self::Mxfp4,
            ActivationFormat::Mxfp8 { .. } => Self::Mxfp8,
            ActivationFormat::FpQuant { method, .. } => Self::FpQuant(method),
        }
    }

    /// With its calibrated scale, where it has one, and the rule of MX blocks.
    #[must_use]
    pub fn with(self, scale: f32, rule: ScaleRule) -> ActivationFormat {
        match self {
            Self::Float => ActivationFormat::Float,
            Self::Nvfp4 => ActivationFormat::Nvfp4 { global_scale: scale },
            Self::Fp8Static => ActivationFormat::Fp8Static { scale },
            Self::Fp8Token => ActivationFormat::Fp8Token,
            Self::Fp8Group => ActivationFormat::Fp8Group,
            Self::Mxfp4 => ActivationFormat::Mxfp4 { rule },
            Self::Mxfp8 => ActivationFormat::Mxfp8 { rule },
            Self::FpQuant(method) => ActivationFormat::FpQuant { method, global_scale: scale },
        }
    }
}

impl WeightFormat {
    /// What it is made of.
    #[must_use]
    pub fn element(self) -> Element {
        match self {
            Self::Nvfp4 { .. } | Self::Mxfp4 => Element::E2m1,
            Self::Mxfp8 | Self::Fp8 => Element::E4m3,
        }
    }

    /// Bits of an element.
    #[must_use]
    pub fn bits(self) -> usize {
        // As many as eight of them have bytes.
        self.element().row_bytes(8)
    }

    /// Elements along K that share a scale and must divide K; `None` where any K will do.
    #[must_use]
    pub fn block(self) -> Option<usize> {
        match self {
            Self::Nvfp4 { block } => Some(block),
            Self::Mxfp4 | Self::Mxfp8 => Some(mx::BLOCK),
            Self::Fp8 => None,
        }
    }
}

macro_rules! schemes {
    ($($(#[$doc:meta])* $scheme:ident = $name:literal, $weight:expr, $input:ident;)*) => {
        /// A format of weight and input together.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
        pub enum Scheme {
            $($(#[$doc])* #[serde(rename = $name)] $scheme,)*
            /// Left as it is.
            #[serde(rename = "none")]
            None,
        }

        impl Scheme {
            /// Every scheme that quantizes.
            pub const ALL: &[Self] = &[$(Self::$scheme),*];

            /// The name in recipes.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$scheme => $name,)*
                    Self::None => "none",
                }
            }

            /// How the weight is quantized; `None` where it is not.
            #[must_use]
            pub fn weight(self) -> Option<WeightFormat> {
                match self {
                    $(Self::$scheme => Some($weight),)*
                    Self::None => None,
                }
            }

            /// How the input is quantized, unless a dialect has it otherwise.
            #[must_use]
            pub fn input(self) -> InputFormat {
                match self {
                    $(Self::$scheme => InputFormat::$input,)*
                    Self::None => InputFormat::Float,
                }
            }
        }
    };
}

// Each with its name in recipes, its weight and its input.
schemes! {
    /// NVFP4 weights and inputs (W4A4), calibrated input scale.
    Nvfp4 = "nvfp4", NVFP4, Nvfp4;
    /// NVFP4 weights, inputs as they are.
    W4a16Nvfp4 = "w4a16_nvfp4", NVFP4, Float;
    /// E2M1 weights in blocks of 32 under E4M3 scales, FP8 inputs.
    W4a8Nvfp4Fp8 = "w4a8_nvfp4_fp8", WeightFormat::Nvfp4 { block: mx::BLOCK }, Fp8Static;
    /// FP8 weights and inputs, one calibrated scale each.
    Fp8 = "fp8", WeightFormat::Fp8, Fp8Static;
    /// FP8 weights under one scale, inputs as they are.
    W8a16Fp8 = "w8a16_fp8", WeightFormat::Fp8, Float;
    /// FP8 weights with a scale per output channel, inputs with a scale per token.
    Fp8PcPt = "fp8_pc_pt", WeightFormat::Fp8, Fp8Token;
    /// FP8 weights with a scale per 128x128 block. Inputs: as they are (ModelOpt), or FP8 per 128 (compressed-tensors).
    Fp8Block = "fp8_block", WeightFormat::Fp8, Float;
    /// MXFP8 weights and inputs.
    Mxfp8 = "mxfp8", WeightFormat::Mxfp8, Mxfp8;
    /// MXFP4 weights and inputs.
    Mxfp4 = "mxfp4", WeightFormat::Mxfp4, Mxfp4;
    /// MXFP4 weights, inputs as they are.
    Mxfp4a16 = "mxfp4a16", WeightFormat::Mxfp4, Float;
}

const NVFP4: WeightFormat = WeightFormat::Nvfp4 { block: nvfp4::BLOCK };

impl Scheme {
    /// The scheme of a stored linear; `None` where its weight and input are no pair of these, or its input is rotated.
    #[must_use]
    pub fn of(linear: &LinearTensors<'_>) -> Option<Self> {
        use InputFormat as I;
        if linear.rotation.is_some() {
            return None;
        }
        let input = I::of(linear.activation);
        let weight = match (linear.element, &linear.block_scales) {
            (e, _) if e.is_float() => return Some(Self::None),
            (Element::E2m1, BlockScales::E4m3 { block, .. }) => WeightFormat::Nvfp4 { block: *block },
            (Element::E2m1, BlockScales::E8m0 { .. }) => WeightFormat::Mxfp4,
            (Element::E4m3, BlockScales::E8m0 { .. }) => WeightFormat::Mxfp8,
            (Element::E4m3, BlockScales::Grid { .. }) if matches!(input, I::Float | I::Fp8Group) => {
                return Some(Self::Fp8Block);
            }
            (Element::E4m3, BlockScales::None) => {
                return match (&linear.output_scale, input) {
                    // A matrix of one block may state its scale as one number.
                    (OutputScale::Tensor(_), I::Float | I::Fp8Group)
                        if linear.n <= fp8::BLOCK && linear.k <= fp8::BLOCK =>
                    {
                        Some(Self::Fp8Block)
                    }
                    (OutputScale::Tensor(_), I::Fp8Static) => Some(Self::Fp8),
                    (OutputScale::Tensor(_), I::Float) => Some(Self::W8a16Fp8),
                    (OutputScale::Row(_), I::Fp8Token) => Some(Self::Fp8PcPt),
                    _ => None,
                };
            }
            _ => return None,
        };
        Self::ALL.iter().copied().find(|s| s.weight() == Some(weight) && s.input() == input)
    }

    /// As [`WeightFormat::block`].
    #[must_use]
    pub fn block(self) -> Option<usize> {
        self.weight()?.block()
    }

    /// Whether weights are E2M1 under an E4M3 scale per 16 and a global one.
    #[must_use]
    pub fn is_nvfp4_weight(self) -> bool {
        self.weight() == Some(NVFP4)
    }

    /// Whether weights are E2M1 in blocks under scales of their own.
    #[must_use]
    pub fn is_four_bit(self) -> bool {
        self.weight().is_some_and(|w| w.element() == Element::E2m1)
    }

    /// Whether weights are E2M1 under E4M3 block scales, whose neighbours are near enough for training to move them.
    #[must_use]
    pub fn has_learnable_scales(self) -> bool {
        matches!(self.weight(), Some(WeightFormat::Nvfp4 { .. }))
    }

    /// Whether a scale of the input is calibrated and stored.
    #[must_use]
    pub fn has_input_scale(self) -> bool {
        matches!(self.input(), InputFormat::Nvfp4 | InputFormat::Fp8Static)
    }

    /// Bits of a weight, block scales included.
    #[must_use]
    pub fn bits_per_weight(self) -> f64 {
        let Some(weight) = self.weight() else { return 16.0 };
        let scales = match weight.block() {
            Some(block) => 8.0 / block as f64,
            None if self == Self::Fp8Block => 32.0 / (fp8::BLOCK * fp8::BLOCK) as f64,
            None => 0.0,
        };
        weight.bits() as f64 + scales
    }
}

impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
