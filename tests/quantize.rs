//! Quantizing a BF16 model gives, bit for bit, the weights and weight scales that the exporting tools give.

use std::path::{Path, PathBuf};

use recoup::backend::cpu::{CpuBackend, isa::Isa};
use recoup::checkpoint::Checkpoint;
use recoup::checkpoint::dialect::Dialect;
use recoup::checkpoint::tensors::TensorStore;
use recoup::model::Decoder;
use recoup::quantize::{Recipe, calibrate::calibrate, quantize};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/fixtures")
}

fn backend() -> CpuBackend {
    CpuBackend::new(Isa::detect(), 2).unwrap()
}

/// Quantizes `architecture`'s BF16 fixture and compares with what `dialect`'s tool exported.
fn compare(architecture: &str, recipe: Recipe, dialect: Dialect) {
    let tool = match dialect {
        Dialect::ModelOpt => "modelopt",
        _ => "compressed-tensors",
    };
    let source = Checkpoint::open(&fixtures().join("modelopt").join(architecture).join("bf16")).unwrap();
    let tokens: Vec<Vec<u32>> = (0..4).map(|s| (0..64).map(|i| (i * 37 + s * 101) % 384).collect()).collect();
    let calibration = calibrate(&source, backend(), &tokens, "test", &mut |_, _| {}).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("quantized");
    quantize(&source, &calibration, recipe, dialect, &out).unwrap();

    let ours = Checkpoint::open(&out).unwrap();
    let theirs = TensorStore::open(&fixtures().join(tool).join(architecture).join(recipe.to_string())).unwrap();
    assert!(ours.tensors.names().eq(theirs.names()), "{:?}", ours.tensors.names().collect::<Vec<_>>());
    let mut weights = 0;
    for name in theirs.names() {
        let (a, b) = (ours.tensors.peek(name).unwrap(), theirs.peek(name).unwrap());
        assert_eq!((a.dtype, a.shape), (b.dtype, b.shape), "{name}");
        // Activation scales depend on the calibration text, which the fixtures do not hold.
        if !name.contains("input_") {
            assert!(a.bytes == b.bytes, "{name} differs");
            weights += usize::from(name.contains("proj"));
        }
    }
    assert!(weights >= 14);
    Decoder::load(backend(), &ours).unwrap();
}

#[test]
fn nvfp4_in_the_modelopt_dialect_equals_modelopts_own_export() {
    for architecture in ["llama", "qwen2", "qwen3", "qwen3_moe"] {
        compare(architecture, Recipe::Nvfp4, Dialect::ModelOpt);
    }
}

#[test]
fn fp8_in_the_modelopt_dialect_equals_modelopts_own_export() {
    for architecture in ["llama", "qwen2", "qwen3", "qwen3_moe"] {
        compare(architecture, Recipe::Fp8, Dialect::ModelOpt);
    }
}

#[test]
fn nvfp4_in_the_compressed_tensors_dialect_equals_llm_compressors_export() {
    for architecture in ["llama", "qwen3"] {
        compare(architecture, Recipe::Nvfp4, Dialect::CompressedTensors);
    }
}

#[test]
fn fp8_in_the_compressed_tensors_dialect_equals_llm_compressors_export() {
    compare("llama", Recipe::Fp8, Dialect::CompressedTensors);
}
