//! What the first rank tells the others, and what goes with it.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::plan::Cut;
use crate::backend::{
    Activation, AttentionShape, Batch, CacheLayout, DeltaNetShape, DeltaNetWeights, Mamba2Shape, Mamba2Weights,
    Rotation, Run, Span,
};
use crate::formats::linear::{ActivationFormat, BlockScales, Element, InputRotation, LinearTensors, OutputScale};
use crate::logits::RouterRule;

/// Whatever a rank holds, by the number under which all know it.
pub(super) type Id = u64;

/// A tensor that an operation reads; `last`: nobody does after it.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Arg {
    pub id: Id,
    pub last: bool,
}

/// Stages of the layers of a cache.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct CacheStages {
    pub attention: Vec<usize>,
    pub recurrent: Vec<usize>,
}

/// One operation of all ranks. What comes of it is known as `to`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum Op {
    /// Nobody asks for these any more.
    Gone(Vec<Id>),
    /// A weight [n, k] at the ranks of a stage, whose rows follow; `None`: all rows at all of them.
    Linear {
        to: Id,
        stage: usize,
        n: usize,
        k: usize,
        cut: Option<Cut>,
    },
    Vector {
        to: Id,
        values: Vec<f32>,
    },
    Mamba {
        to: Id,
        shape: Mamba2Shape,
        weights: Mamba2Weights,
    },
    DeltaNet {
        to: Id,
        shape: DeltaNetShape,
        weights: DeltaNetWeights,
    },
    Rope {
        to: Id,
        rotation: Rotation,
    },
    Cache {
        to: Id,
        layout: CacheLayout,
        stages: CacheStages,
    },
    Grow {
        cache: Id,
        pages: usize,
        slots: usize,
    },
    CopyState {
        cache: Id,
        from: u32,
        into: u32,
    },
    Fork {
        cache: Id,
        from: Span,
        into: Span,
    },
    Prepare {
        to: Id,
        batch: Batch,
        ropes: Vec<Id>,
    },
    /// Rows of the first rank.
    Tensor {
        to: Id,
        columns: usize,
        data: Vec<f32>,
    },
    Embed {
        to: Id,
        table: Id,
        pass: Id,
    },
    RmsNorm {
        to: Id,
        x: Arg,
        weight: Id,
        eps: f32,
    },
    Linears {
        to: Vec<Id>,
        x: Arg,
        weights: Vec<Id>,
    },
    Attention {
        to: Id,
        qkv: [Arg; 3],
        sinks: Option<Id>,
        shape: AttentionShape,
        pass: Id,
        cache: Id,
    },
    Add {
        to: Id,
        x: Arg,
        y: Arg,
    },
    SiluMul {
        to: Id,
        gate: Arg,
        up: Arg,
    },
    Activate {
        to: Id,
        x: Arg,
        up: Option<Arg>,
        activation: Activation,
    },
    Gate {
        to: Id,
        x: Arg,
        gate: Arg,
    },
    Scale {
        to: Id,
        x: Arg,
        factor: f32,
    },
    Rearrange {
        to: Id,
        sources: Vec<Arg>,
        runs: Vec<Run>,
    },
    SelectRows {
        to: Id,
        x: Arg,
        rows: Vec<usize>,
    },
    AddRows {
        to: Id,
        sum: Arg,
        y: Arg,
        rows: Vec<usize>,
        weights: Vec<f32>,
    },
    ZerosLike {
        to: Id,
        x: Arg,
    },
    Mamba2 {
        to: Id,
        x: Arg,
        mixer: Id,
        layer: usize,
        pass: Id,
        cache: Id,
    },
    Delta {
        to: Id,
        inputs: [Arg; 4],
        mixer: Id,
        layer: usize,
        pass: Id,
        cache: Id,
    },
    /// Experts, each at one rank: gate, up and down.
    Mixture {
        to: Id,
        x: Arg,
        routed: Arg,
        router: Id,
        experts: Vec<(Option<Id>, Id, Id)>,
        activation: Activation,
        rule: RouterRule,
    },
    /// Gives the first rank all of a tensor.
    Collect {
        x: Id,
    },
    End,
}

impl Op {
    /// Whether others have to know of it at once: it takes time, or the first rank waits for what comes of it.
    pub fn is_urgent(&self) -> bool {
        use Op::{
            Attention, Cache, Collect, CopyState, Delta, Embed, End, Fork, Grow, Linear, Linears, Mamba2, Mixture,
            Rearrange,
        };
        matches!(
            self,
            Linear { .. }
                | Cache { .. }
                | Grow { .. }
                | CopyState { .. }
                | Fork { .. }
                | Embed { .. }
                | Linears { .. }
                | Attention { .. }
                | Rearrange { .. }
                | Mamba2 { .. }
                | Delta { .. }
                | Mixture { .. }
                | Collect { .. }
                | End
        )
    }

    /// Appends it to a message.
    pub fn write(&self, message: Vec<u8>) -> Result<Vec<u8>, postcard::Error> {
        postcard::to_extend(self, message)
    }

    /// The first of a message, and the rest.
    pub fn read(message: &[u8]) -> Result<(Self, &[u8]), postcard::Error> {
        postcard::take_from_bytes(message)
    }
}

/// Block scales without their codes.
#[derive(Debug, Serialize, Deserialize)]
enum Blocks {
    None,
    E4m3(usize),
    E8m0(usize),
    Grid(Vec<f32>),
}

/// Rows of a linear without the bytes of their elements and of their scales.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct LinearFacts {
    name: String,
    n: usize,
    k: usize,
    element: Element,
    blocks: Blocks,
    output_scale: OutputScale,
    activation: ActivationFormat,
    pre_quant_scale: Option<Vec<f32>>,
    rotation: Option<InputRotation>,
    bias: Option<Vec<f32>>,
}

impl LinearFacts {
    /// The facts, the elements' bytes and the scales' of a linear.
    pub fn of<'a>(linear: &'a LinearTensors<'_>) -> (Self, &'a [u8], &'a [u8]) {
        let (blocks, codes): (_, &[u8]) = match &linear.block_scales {
            BlockScales::None => (Blocks::None, &[]),
            BlockScales::E4m3 { block, codes } => (Blocks::E4m3(*block), codes),
            BlockScales::E8m0 { block, codes } => (Blocks::E8m0(*block), codes),
            BlockScales::Grid { values } => (Blocks::Grid(values.clone()), &[]),
        };
        let facts = Self {
            name: linear.name.clone(),
            n: linear.n,
            k: linear.k,
            element: linear.element,
            blocks,
            output_scale: linear.output_scale.clone(),
            activation: linear.activation,
            pre_quant_scale: linear.pre_quant_scale.clone(),
            rotation: linear.rotation.as_deref().cloned(),
            bias: linear.bias.clone(),
        };
        (facts, &linear.data, codes)
    }

    /// The linear again.
    pub fn with(self, data: Vec<u8>, codes: Vec<u8>) -> LinearTensors<'static> {
        LinearTensors {
            name: self.name,
            n: self.n,
            k: self.k,
            element: self.element,
            data: data.into(),
            block_scales: match self.blocks {
                Blocks::None => BlockScales::None,
                Blocks::E4m3(block) => BlockScales::E4m3 { block, codes: codes.into() },
                Blocks::E8m0(block) => BlockScales::E8m0 { block, codes: codes.into() },
                Blocks::Grid(values) => BlockScales::Grid { values },
            },
            output_scale: self.output_scale,
            activation: self.activation,
            pre_quant_scale: self.pre_quant_scale,
            rotation: self.rotation.map(Arc::new),
            bias: self.bias,
        }
    }
}
