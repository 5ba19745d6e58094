//! Models with a dead place (a projection or a norm of zeros, so that what reads it is always zero) are quantized by every
//! recipe, with a scale that every loader takes and a note that says why; what is too small for a scale is said too.

use std::path::Path;

use crate::support::fixtures::{cpu, try_logits};
use crate::support::tiny::{Format, SMALL, Size, Tiny};
use recoup::checkpoint::Checkpoint;
use recoup::checkpoint::dialect::Dialect;
use recoup::model::Decoder;
use recoup::quantize::{CalibrationText, Places, Recipe, Report, apply};

/// A model whose widths every block divides.
fn model() -> Tiny {
    Tiny::with_size(Format::Bf16, Size { hidden: 128, intermediate: 128, heads: 8, ..SMALL })
}

fn quantized(t: &Tiny, recipe: &str, dialect: Dialect, folder: &Path) -> Result<Report, String> {
    let source = folder.join("source");
    std::fs::create_dir_all(&source).unwrap();
    t.write(&source);
    let checkpoint = Checkpoint::open(&source).unwrap();
    let sequences: Vec<Vec<u32>> = (0..4).map(|i| (0..24).map(|j| (i * 7 + j * 5) % 40).collect()).collect();
    let text = CalibrationText { sequences, description: "test".into() };
    let places = Places { out: &folder.join("out"), unrounded: None, measured: None, found: None };
    let recipe = Recipe::find(recipe).unwrap();
    apply(&checkpoint, &cpu(1), &text, &recipe, dialect, places, &mut |_, _, _| {}).map_err(|e| e.to_string())
}

/// Loads what was written, which refuses any scale that is not positive and finite, and computes with it.
fn logits(folder: &Path) -> Vec<f32> {
    let model = Decoder::load(cpu(1), &Checkpoint::open(&folder.join("out")).unwrap()).unwrap();
    try_logits(&model, &[1, 2, 3]).unwrap()
}

const DEAD: [(&str, &str); 4] = [
    ("model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.down_proj"),
    ("model.layers.0.self_attn.v_proj.weight", "model.layers.0.self_attn.o_proj"),
    ("model.layers.1.post_attention_layernorm.weight", "model.layers.1.mlp.gate_proj"),
    ("model.layers.0.input_layernorm.weight", "model.layers.0.self_attn.q_proj"),
];

#[test]
fn every_recipe_quantizes_a_model_with_a_dead_place_and_says_why_it_is_dead() {
    for recipe in [
        "nvfp4",
        "nvfp4_best",
        "nvfp4_best_channels",
        "nvfp4_awq",
        "nvfp4_smoothquant",
        "nvfp4_gptq",
        "nvfp4_mse",
        "nvfp4_four_over_six",
        "nvfp4_kv_fp8",
        "w4a8_nvfp4_fp8",
        "nvfp4_fp8_auto",
        "fp8",
        "fp8_kv_fp8",
        "fp8_pc_pt",
        "fp8_block",
        "mxfp8",
        "mxfp4",
        "nvfp4_rotate",
    ] {
        for (zeros, reader) in DEAD {
            let mut t = model();
            t.fill(zeros, 0.0);
            let folder = tempfile::tempdir().unwrap();
            let report = quantized(&t, recipe, Dialect::ModelOpt, folder.path())
                .unwrap_or_else(|e| panic!("{recipe}, {zeros}: {e}"));
            assert!(logits(folder.path()).iter().all(|v| v.is_finite()), "{recipe}, {zeros}");
            // Rotation folds a norm of zeros into what it feeds, whose input then is not zero.
            if recipe.contains("rotate") {
                continue;
            }
            let checkpoint = Checkpoint::open(&folder.path().join("out")).unwrap();
            let Some(scale) = checkpoint.tensors.peek(&format!("{reader}.input_scale")) else { continue };
            let found = scale.floats().unwrap()[0];
            assert!([1.0 / 448.0, 1.0 / 2688.0].contains(&found), "{recipe}, {zeros}: {found}");
            let said = report.notes.iter().any(|n| n.contains(reader) && n.contains(&format!("`{zeros}` is zero")));
            assert!(said, "{recipe}, {zeros}: {:?}", report.notes);
        }
    }
}

#[test]
fn the_other_dialect_has_a_divisor_for_a_dead_place() {
    for recipe in ["nvfp4", "fp8", "nvfp4_gptq"] {
        let mut t = model();
        t.fill(DEAD[0].0, 0.0);
        let folder = tempfile::tempdir().unwrap();
        quantized(&t, recipe, Dialect::CompressedTensors, folder.path()).unwrap();
        assert!(logits(folder.path()).iter().all(|v| v.is_finite()), "{recipe}");
    }
}

#[test]
fn a_cache_of_values_that_are_always_zero_has_a_scale() {
    let mut t = model();
    t.fill("model.layers.0.self_attn.v_proj.weight", 0.0);
    let folder = tempfile::tempdir().unwrap();
    let report = quantized(&t, "fp8_kv_fp8", Dialect::ModelOpt, folder.path()).unwrap();
    let checkpoint = Checkpoint::open(&folder.path().join("out")).unwrap();
    let scale = checkpoint.tensors.peek("model.layers.0.self_attn.v_proj.v_scale").unwrap().floats().unwrap();
    assert_eq!(scale, [1.0 / 448.0]);
    assert!(report.notes.iter().any(|n| n.contains("v_scale") && n.contains("is zero")), "{:?}", report.notes);
}

#[test]
fn weights_too_small_for_a_scale_become_zeros_with_a_note() {
    for value in [1e-30, 1e-38, 1e-40] {
        for dialect in [Dialect::ModelOpt, Dialect::CompressedTensors] {
            for recipe in ["nvfp4", "fp8", "nvfp4_gptq"] {
                let mut t = model();
                t.fill("model.layers.1.mlp.up_proj.weight", value);
                let folder = tempfile::tempdir().unwrap();
                let report = quantized(&t, recipe, dialect, folder.path()).unwrap();
                assert!(logits(folder.path()).iter().all(|v| v.is_finite()), "{recipe}, {value}");
                let notes = report.notes.join("\n");
                assert!(notes.contains("up_proj are at most"), "{value}: {notes}");
            }
        }
    }
}

#[test]
fn an_overflow_is_called_one_and_not_a_lack_of_text() {
    let mut t = model();
    t.fill("model.layers.1.mlp.down_proj.weight", 3e38);
    for recipe in ["nvfp4", "nvfp4_best", "fp8"] {
        let folder = tempfile::tempdir().unwrap();
        let error = quantized(&t, recipe, Dialect::ModelOpt, folder.path()).unwrap_err();
        assert!(error.contains("what comes out of `model.layers.1.mlp.down_proj`"), "{recipe}: {error}");
    }
}

#[test]
fn a_tensor_that_is_only_copied_is_refused_where_it_holds_what_is_no_number() {
    let mut t = model();
    t.fill("model.layers.1.input_layernorm.weight", f32::INFINITY);
    let folder = tempfile::tempdir().unwrap();
    let error = quantized(&t, "fp8_pc_pt", Dialect::ModelOpt, folder.path()).unwrap_err();
    assert!(error.contains("model.layers.1.input_layernorm.weight") && error.contains("NaN or infinite"), "{error}");
}

#[test]
fn a_state_whose_square_overflows_is_not_taken_for_a_dead_place() {
    // One large weight: what it adds to the residual stream is finite, its square is not, and the next norm would give zeros.
    let mut t = model();
    let one = t.tensor("model.layers.0.mlp.down_proj.weight");
    one.bytes[..2].copy_from_slice(&(((1e30f32).to_bits() >> 16) as u16).to_le_bytes());
    for recipe in ["nvfp4", "nvfp4_best", "fp8", "nvfp4_fp8_auto"] {
        let folder = tempfile::tempdir().unwrap();
        let error = quantized(&t, recipe, Dialect::ModelOpt, folder.path()).unwrap_err();
        assert!(error.contains("the square of what leaves `model.layers.0` is inf"), "{recipe}: {error}");
    }
}
