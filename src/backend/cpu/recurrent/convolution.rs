//! Causal depthwise convolution, and what it keeps for the next pass.
