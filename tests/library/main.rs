//! What the library gives and what it refuses, in the order of src/.

#[path = "../support/mod.rs"]
mod support;

mod checkpoint {
    mod architectures;
    mod contradictions;
    mod fp_quant;
    mod fused;
    mod hostile;
    mod wrappers;
}
mod model {
    mod architectures;
    mod configurations;
    mod deployed;
    mod loading;
    mod not_a_number;
    mod oracle;
    mod paged_experts;
}
mod backend {
    mod determinism;
    mod kernels;
}
mod engine;
mod quantize {
    mod architectures;
    mod compared;
    mod dead_places;
    mod experts;
    mod exports;
    mod random_model;
    mod shared_rows;
}
mod evaluate;
mod fuzz;
mod gguf;
mod hybrids;
mod layers;
mod recover;
mod smollm2;
mod streamed;
mod team;
mod text;
