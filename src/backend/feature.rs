//! What only some architectures need.

use super::Activation;

/// What a decoder may need beyond attention with rotation and windows, SiLU-gated feed-forwards and mixtures whose router
/// is a softmax: a backend says of each whether it has it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Feature {
    Mamba,
    DeltaNet,
    Sinks,
    /// An output gate of attention or of a shared expert.
    Gate,
    PartialRotation,
    Router,
    /// An activation other than SiLU.
    Activation(Activation),
    /// A factor on the embedding.
    EmbeddingScale,
    /// Columns that are picked: fused or latent projections.
    Rearranged,
    /// Values of another width than keys.
    ValueWidth,
    /// Norms over whole rows of queries and keys.
    RowNorms,
    QueryGrowth,
}

impl Feature {
    /// For people.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Mamba => "Mamba-2 layers",
            Self::DeltaNet => "gated delta nets",
            Self::Sinks => "attention sinks",
            Self::Gate => "gated attention or gated shared experts",
            Self::PartialRotation => "a rotation of part of a head",
            Self::Router => "a router other than a softmax",
            Self::Activation(Activation::Silu) => "SiLU",
            Self::Activation(Activation::GeluTanh) => "GELU",
            Self::Activation(Activation::Relu2) => "relu²",
            Self::Activation(Activation::ClampedSwiglu { .. }) => "a clamped SwiGLU",
            Self::EmbeddingScale => "scaled embeddings",
            Self::Rearranged => "fused or latent projections",
            Self::ValueWidth => "values of another width than keys",
            Self::RowNorms => "norms over all heads of queries and keys together",
            Self::QueryGrowth => "queries that grow with their position",
        }
    }
}
