//! Training of hybrids and mixtures: what they are made of against PyTorch (mixers.rs) and finite differences
//! (gradients.rs), every architecture (architectures.rs), and a small one from its first step to its recovered NVFP4 form
//! (recovered.rs).

use recoup::backend::autograd::{AutogradBackend, Linear};
use recoup::backend::{Backend, Batch, HostPass, Mamba2Shape, Span};
use recoup::formats::linear::OutputScale;

use crate::recover::float_linear;

mod architectures;
mod gradients;
mod mixers;
mod recovered;

/// Sequences that begin in this pass, without pages.
fn batch(lengths: &[usize]) -> Batch {
    let span = |len: &usize| Span { start: 0, len: *len, pages: Vec::new(), slot: 0 };
    Batch { tokens: vec![0; lengths.iter().sum()], spans: lengths.iter().map(span).collect() }
}

fn pass(backend: &AutogradBackend, lengths: &[usize]) -> HostPass {
    backend.prepare(&batch(lengths), &[]).unwrap()
}

const MAMBA: Mamba2Shape = Mamba2Shape {
    heads: 4,
    head_dim: 3,
    groups: 2,
    state: 5,
    kernel: 4,
    eps: 1e-5,
    time_step_limit: (0.0, f32::INFINITY),
};

/// Linears of `weight` [experts, n, k].
fn experts(backend: &AutogradBackend, weight: &[f32], [n, k]: [usize; 2]) -> Vec<Linear> {
    let load = |w: &[f32]| backend.load_linear(float_linear(w, n, OutputScale::One, false, None)).unwrap();
    weight.chunks_exact(n * k).map(load).collect()
}
