//! What the library gives and what it refuses, in the order of src/.

#[path = "../support/mod.rs"]
mod support;

mod checkpoint {
    mod architectures;
    mod contradictions;
    mod hostile;
}
mod model {
    mod architectures;
    mod deployed;
    mod not_a_number;
    mod oracle;
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
    mod exports;
    mod random_model;
}
mod evaluate;
mod gguf;
mod layers;
mod recover;
mod smollm2;
mod text;
