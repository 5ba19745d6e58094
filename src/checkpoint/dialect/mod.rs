//! Dialects: what each exporting tool calls, stores and computes, for reading and for writing. One file beside this one
//! each, and a line in the list.

mod agreement;
mod announced;
mod compressed_tensors;
mod deepseek;
mod fp_quant;
pub mod kv;
pub mod modelopt;
mod mxfp4;
mod pattern;
pub mod store;

use std::fmt;

use safetensors::Dtype;
use serde_json::Value;

use super::error::Result;
use super::fused_write::FusedLayout;
use super::json::Object;
use super::write::FolderWriter;
use crate::formats::e8m0::ScaleRule;
use crate::formats::scheme::{InputFormat, Scheme};
pub use announced::{Announced, Declared};

macro_rules! dialects {
    ($($(#[$doc:meta])* $name:ident = $conventions:expr;)*) => {
        /// The tool conventions a checkpoint follows.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Dialect { $($(#[$doc])* $name),* }

        impl Dialect {
            /// Every dialect.
            pub const ALL: &[Self] = &[$(Self::$name),*];

            pub(super) fn conventions(self) -> &'static dyn Conventions {
                match self { $(Self::$name => &$conventions),* }
            }
        }
    };
}

dialects! {
    /// No quantization.
    Plain = Unquantized;
    ModelOpt = modelopt::ModelOpt;
    CompressedTensors = compressed_tensors::CompressedTensors;
    /// `quant_method: fp8` with 128x128 blocks.
    DeepSeek = deepseek::DeepSeek;
    FpQuant = fp_quant::FpQuant;
    /// OpenAI's fused experts.
    Mxfp4 = mxfp4::Mxfp4;
}

impl Dialect {
    /// What people call it.
    #[must_use]
    pub fn name(self) -> &'static str {
        self.conventions().name()
    }

    /// Those that can be written.
    pub fn written() -> impl Iterator<Item = Self> {
        Self::ALL.iter().copied().filter(|d| d.tool().is_some())
    }

    /// How to write it; nothing where it is only read.
    #[must_use]
    pub fn tool(self) -> Option<&'static dyn Tool> {
        self.conventions().tool()
    }
}

impl fmt::Display for Dialect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How a dialect is read.
pub trait Conventions: Sync {
    /// What people call it.
    fn name(&self) -> &'static str;

    /// Its `quant_method`, for a list of those that are known.
    fn method(&self) -> Option<&'static str> {
        None
    }

    /// Whether `q`, a `quantization_config` with this `quant_method`, is this dialect's.
    fn claims(&self, method: Option<&str>, _q: &Object) -> bool {
        method.is_some() && method == self.method()
    }

    /// Reads `quantization_config`. `separate`: hf_quant_config.json, where that exists too.
    ///
    /// # Errors
    /// Names what is unknown or contradictory.
    fn read(&self, q: &Object, separate: Option<&Object>) -> Result<Announced>;

    /// How a quantized linear's tensors are called and shaped.
    fn layout(&self) -> &'static Layout;

    /// How engines round the shared exponents of MX inputs.
    fn mx_rule(&self) -> ScaleRule {
        ScaleRule::Ceil
    }

    /// Whether a module that it announces as quantized may be stored as floats.
    fn leaves_plain(&self) -> bool {
        false
    }

    /// How to write it; nothing where it is only read.
    fn tool(&self) -> Option<&dyn Tool> {
        None
    }
}

/// Names and types of the tensors of a quantized linear. Elements of eight bits are always `weight`, a static FP8 scale of
/// the input `input_scale`.
pub struct Layout {
    /// E2M1 elements, two to a byte.
    pub packed: &'static str,
    /// Scales of blocks, rows or blocks of rows; of FP8 the scale of the whole as well.
    pub scales: &'static str,
    /// The type of NVFP4's block scales.
    pub e4m3_scales: Dtype,
    /// The global scale of NVFP4 weights.
    pub global: &'static str,
    /// Whether MXFP4 weights have one too.
    pub mx_global: bool,
    /// That of NVFP4 inputs.
    pub input: &'static str,
    /// Global scales are stored as what values are multiplied with before they are rounded.
    pub divisors: bool,
    /// FP8 weights have scales of 128x128 blocks and no others.
    pub only_grids: bool,
    /// The shape of one scale.
    pub one: &'static [usize],
    /// The type of FP8 scales.
    pub fp8_scale: Dtype,
}

/// How a dialect is written, and the arithmetic of the tool that exports it: same operations, same order, same rounding.
pub trait Tool: Conventions {
    /// Whether it has a name for `scheme`.
    fn says(&self, scheme: Scheme) -> bool;

    /// How inputs of a linear of `scheme` are quantized by what loads it.
    fn input(&self, scheme: Scheme) -> InputFormat {
        scheme.input()
    }

    /// How experts of `scheme` are stored that lie in one tensor for a layer; nothing where there is no such.
    fn fused(&self, _scheme: Scheme) -> Option<FusedLayout> {
        None
    }

    /// Whether a linear that is stored by itself and stands at `place` can be of `scheme`.
    fn says_at(&self, scheme: Scheme, place: Place) -> bool {
        self.says(scheme) && (place != Place::Embedding || self.input(scheme) == InputFormat::Float)
    }

    /// Whether it has a place for an FP8 KV cache.
    fn says_fp8_cache(&self) -> bool {
        true
    }

    /// The shape of the scales of an FP8 weight [n, k].
    fn fp8_scale_shape(&self, scheme: Scheme, n: usize, k: usize) -> Vec<usize>;

    /// `quantization_config`, and hf_quant_config.json where the tool writes one.
    fn describe(&self, model: &Assigned) -> (Value, Option<Value>);

    /// Rounds as the tool does in the model's own type.
    fn round(&self, x: f32) -> f32 {
        x
    }

    /// The global scale, as it is stored, of NVFP4 values up to `amax`, under which the largest block scale is `largest`.
    fn nvfp4_global(&self, amax: f32, largest: f32) -> f32;

    /// E4M3 code of the scale of a block of NVFP4 weights up to `amax`, under a stored global scale.
    fn nvfp4_block_scale(&self, amax: f32, global: f32) -> u8;

    /// The code of a scaled MXFP4 weight.
    fn mxfp4_element(&self, x: f32) -> u8;

    /// Whether linears that engines fuse share one scale of their weights. `expert`: they are a mixture's; `one_block`: no
    /// larger than one FP8 block.
    fn shares_scale(&self, scheme: Scheme, expert: bool, one_block: bool) -> bool;
}

impl dyn Tool + '_ {
    /// A stored global scale as a multiplier.
    #[must_use]
    pub fn multiplier(&self, stored: f32) -> f32 {
        if self.layout().divisors { 1.0 / stored } else { stored }
    }

    /// What weights are divided by under a block scale and a stored global one.
    #[must_use]
    pub fn step(&self, block_scale: f32, stored: f32) -> f32 {
        if self.layout().divisors { block_scale / stored } else { block_scale * stored }
    }
}

/// No quantization at all.
struct Unquantized;

impl Conventions for Unquantized {
    fn name(&self) -> &'static str {
        "plain"
    }

    fn read(&self, _: &Object, _: Option<&Object>) -> Result<Announced> {
        Ok(Announced::new(Dialect::Plain, "none".into()))
    }

    fn layout(&self) -> &'static Layout {
        &modelopt::LAYOUT
    }
}

/// Where in the model a linear stands, as far as formats depend on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    Block,
    /// Its inputs are numbers of tokens: it has no format of inputs.
    Embedding,
    Head,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Block => "linears of blocks",
            Self::Embedding => "embeddings",
            Self::Head => "heads",
        })
    }
}

/// A quantized model, for whoever describes it, by the names that its files have.
#[derive(Clone)]
pub struct Assigned {
    /// The blocks' linears in the model's order, and what each became; embedding and head, where they are quantized.
    pub linears: Vec<(String, Scheme)>,
    /// Modules with a weight that stay as they are, whatever the recipe says of the blocks' linears.
    pub others: Vec<Plain>,
    pub embedding: String,
    /// The head's name. Tools name it where it is tied, too.
    pub head: String,
    /// Whether K and V are stored in FP8.
    pub fp8_kv_cache: bool,
}

/// A module that is not quantized.
#[derive(Clone, Debug)]
pub struct Plain {
    pub name: String,
    pub kind: Kind,
}

/// What a module that is not quantized is to the tools.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Linear,
    Embedding,
    /// An embedding of a class of its own, which ModelOpt passes by.
    ScaledEmbedding,
    Convolution,
}

impl Assigned {
    /// Writes config.json, which else is `config`, and hf_quant_config.json where `tool` has one.
    ///
    /// # Errors
    /// When the folder cannot be written.
    pub fn write(&self, tool: &dyn Tool, config: &Value, writer: &FolderWriter) -> Result<()> {
        let (quantization, separate) = tool.describe(self);
        if let Some(separate) = separate {
            writer.json("hf_quant_config.json", &separate)?;
        }
        let mut config = config.clone();
        if let Some(map) = config.as_object_mut() {
            map.insert("quantization_config".into(), quantization);
        }
        writer.json("config.json", &config)
    }

    /// Linears that are quantized.
    fn quantized(&self) -> impl Iterator<Item = (&str, Scheme)> {
        self.linears.iter().map(|(m, s)| (m.as_str(), *s)).filter(|(_, s)| *s != Scheme::None)
    }

    /// Linears that stay as they are.
    fn left(&self) -> impl Iterator<Item = &str> {
        self.linears.iter().filter(|(_, s)| *s == Scheme::None).map(|(m, _)| m.as_str())
    }

    /// The head, unless it is quantized.
    fn plain_head(&self) -> Option<&str> {
        let quantized = self.quantized().any(|(m, _)| m == self.head);
        (!quantized).then_some(self.head.as_str())
    }

    /// Whether the embedding is quantized.
    fn embeds(&self) -> bool {
        self.quantized().any(|(m, _)| m == self.embedding)
    }

    /// Linears of one scheme.
    fn of(&self, scheme: Scheme) -> impl Iterator<Item = &str> {
        self.quantized().filter(move |(_, s)| *s == scheme).map(|(m, _)| m)
    }

    /// The schemes in use, in the order of their first module.
    fn schemes(&self) -> Vec<Scheme> {
        let mut out = Vec::new();
        for (_, scheme) in self.quantized() {
            if !out.contains(&scheme) {
                out.push(scheme);
            }
        }
        out
    }
}
