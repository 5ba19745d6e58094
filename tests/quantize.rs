//! Quantizing a BF16 model gives, bit for bit, the weights and weight scales that the exporting tools give.

mod common;

use std::path::Path;

use common::{all_fixtures, own_folder};
use recoup::backend::cpu::{CpuBackend, isa::Isa};
use recoup::checkpoint::Checkpoint;
use recoup::checkpoint::dialect::Dialect;
use recoup::checkpoint::tensors::TensorStore;
use recoup::model::Decoder;
use recoup::quantize::calibrate::{Calibration, calibrate};
use recoup::quantize::{QuantizeError, Recipe, quantize};

fn backend() -> CpuBackend {
    CpuBackend::new(Isa::detect(), 2).unwrap()
}

fn calibrated(source: &Checkpoint) -> Calibration {
    let tokens: Vec<Vec<u32>> = (0..4).map(|s| (0..64).map(|i| (i * 37 + s * 101) % 384).collect()).collect();
    calibrate(source, backend(), &tokens, "test", &mut |_, _| {}).unwrap()
}

/// Quantizes the BF16 model in `source` and compares with what the dialect's tool exported to `theirs`. Activation
/// scales depend on the calibration text, which fixtures do not hold; KV scales come from other recipes.
fn compare(source: &Path, recipe: Recipe, dialect: Dialect, theirs: &Path) {
    let source = Checkpoint::open(source).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("quantized");
    quantize(&source, &calibrated(&source), recipe, dialect, &out).unwrap();
    let ours = Checkpoint::open(&out).unwrap();
    let theirs = TensorStore::open(theirs).unwrap();
    let mut weights = 0;
    for name in theirs.names().filter(|n| !n.ends_with("k_scale") && !n.ends_with("v_scale")) {
        let a = ours.tensors.peek(name).unwrap_or_else(|| panic!("{name} is missing"));
        let b = theirs.peek(name).unwrap();
        assert_eq!((a.dtype, a.shape), (b.dtype, b.shape), "{name}");
        if !name.contains("input_") {
            assert!(a.bytes == b.bytes, "{name} differs");
            weights += usize::from(name.contains("proj"));
        }
    }
    assert!(weights >= 14);
    Decoder::load(backend(), &ours).unwrap();
}

/// The models whose BF16 form and export are both at hand: the repository's own, and the full set where it is.
fn compare_all(recipe: Recipe, dialect: Dialect, own: &[(&str, &str)]) {
    let folder = own_folder();
    for (source, theirs) in own {
        compare(&folder.join(source), recipe, dialect, &folder.join(theirs));
    }
    let tool = match dialect {
        Dialect::ModelOpt => "modelopt",
        _ => "compressed-tensors",
    };
    for fixture in all_fixtures() {
        let mut parts = fixture.name.split('/');
        let (Some(t), Some(architecture), Some(scheme)) = (parts.next(), parts.next(), parts.next()) else { continue };
        let root = fixture.folder.ancestors().nth(3).unwrap();
        let source = root.join("modelopt").join(architecture).join("bf16");
        if t == tool && scheme == recipe.to_string() && source.is_dir() {
            compare(&source, recipe, dialect, &fixture.folder);
        }
    }
}

#[test]
fn nvfp4_in_the_modelopt_dialect_equals_modelopts_own_export() {
    let own = [
        ("modelopt/llama/bf16", "modelopt/llama/nvfp4_kv_fp8"),
        ("modelopt/qwen3_moe/bf16", "modelopt/qwen3_moe/nvfp4"),
    ];
    compare_all(Recipe::Nvfp4, Dialect::ModelOpt, &own);
}

#[test]
fn fp8_in_the_modelopt_dialect_equals_modelopts_own_export() {
    // Their export of the same model with FP8 in the attention only.
    let source = Checkpoint::open(&own_folder().join("modelopt/llama/bf16")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("quantized");
    quantize(&source, &calibrated(&source), Recipe::Fp8, Dialect::ModelOpt, &out).unwrap();
    let ours = TensorStore::open(&out).unwrap();
    let theirs = TensorStore::open(&own_folder().join("modelopt/llama/mixed_fp8_attn_nvfp4_mlp")).unwrap();
    for part in ["q_proj", "k_proj", "v_proj", "o_proj"] {
        for suffix in ["weight", "weight_scale"] {
            let name = format!("model.layers.1.self_attn.{part}.{suffix}");
            assert!(ours.peek(&name).unwrap().bytes == theirs.peek(&name).unwrap().bytes, "{name}");
        }
    }
    compare_all(Recipe::Fp8, Dialect::ModelOpt, &[]);
}

#[test]
fn the_compressed_tensors_dialect_equals_llm_compressors_exports() {
    compare_all(
        Recipe::Nvfp4,
        Dialect::CompressedTensors,
        &[("modelopt/llama/bf16", "compressed-tensors/llama/nvfp4")],
    );
    compare_all(Recipe::Fp8, Dialect::CompressedTensors, &[("modelopt/llama/bf16", "compressed-tensors/llama/fp8")]);
}

#[test]
fn the_shipped_nvfp4_model_is_what_quantizing_the_shipped_bf16_model_gives() {
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("models");
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("books-nvfp4");
    let status = std::process::Command::new(env!("CARGO_BIN_EXE_recoup"))
        .args(["quantize".as_ref(), models.join("books-bf16").as_os_str(), "-o".as_ref(), out.as_os_str()])
        .args(["--recipe", "nvfp4"])
        .status()
        .unwrap();
    assert!(status.success());
    let (ours, shipped) = (TensorStore::open(&out).unwrap(), TensorStore::open(&models.join("books-nvfp4")).unwrap());
    assert!(ours.names().eq(shipped.names()));
    for name in shipped.names() {
        assert!(ours.peek(name).unwrap().bytes == shipped.peek(name).unwrap().bytes, "{name}");
    }
}

#[test]
fn what_cannot_be_quantized_is_refused_by_name_and_leaves_nothing_behind() {
    let source = Checkpoint::open(&own_folder().join("modelopt/llama/bf16")).unwrap();
    let good = calibrated(&source);
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");

    let mut unreached = good.clone();
    unreached.amax.retain(|m, _| !m.contains("layers.1.mlp.down_proj"));
    let e = quantize(&source, &unreached, Recipe::Nvfp4, Dialect::ModelOpt, &out).unwrap_err();
    assert!(e.to_string().contains("model.layers.1.mlp.down_proj"), "{e}");

    let already = Checkpoint::open(&own_folder().join("compressed-tensors/llama/fp8")).unwrap();
    let e = quantize(&already, &good, Recipe::Nvfp4, Dialect::ModelOpt, &out).unwrap_err();
    assert!(e.to_string().contains("F8_E4M3") && e.to_string().contains("q_proj"), "{e}");

    let e = calibrate(&source, backend(), &[], "test", &mut |_, _| {}).unwrap_err();
    assert!(matches!(e, QuantizeError::Calibration(_)), "{e}");
    let e = calibrate(&source, backend(), &[vec![384]], "test", &mut |_, _| {}).unwrap_err();
    assert!(e.to_string().contains("384"), "{e}");

    std::fs::create_dir(&out).unwrap();
    std::fs::write(out.join("precious"), "x").unwrap();
    let e = quantize(&source, &good, Recipe::Nvfp4, Dialect::ModelOpt, &out).unwrap_err();
    assert!(e.to_string().contains("not empty"), "{e}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "a partial folder was left behind");
}
