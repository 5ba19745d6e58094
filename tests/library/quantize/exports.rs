//! Quantizing a BF16 model gives, bit for bit, the weights and weight scales that the exporting tools give.

use std::path::Path;

use super::compared::{calibrated, compare};
use crate::support::command::{BF16, Folder, NVFP4, shown_json, succeed};
use crate::support::fixtures::{all_fixtures, cpu, deviation, is_full, own_folder, try_logits};
use crate::support::project;
use recoup::checkpoint::dialect::Dialect;
use recoup::checkpoint::tensors::TensorStore;
use recoup::checkpoint::write::{FolderWriter, Pending, SHARD_BYTES};
use recoup::checkpoint::{Checkpoint, CheckpointError};
use recoup::formats::linear::Element;
use recoup::model::modules::Module;
use recoup::model::{Decoder, ModelConfig};
use recoup::quantize::calibrate::{Calibration, calibrate};
use recoup::quantize::convert::convert;
use recoup::quantize::dequantize::dequantize;
use recoup::quantize::recipe::{Rotate, Smooth};
use recoup::quantize::rotate::rotate;
use recoup::quantize::{CalibrationText, Places, QuantizeError, Recipe, Scheme, apply, quantize, smooth};

/// Recipes, and the names of the tools' exports that they equal.
const MODELOPT: [(&str, &str); 14] = [
    ("nvfp4", "nvfp4"),
    ("nvfp4_kv_fp8", "nvfp4_kv_fp8"),
    ("nvfp4_mlp_only", "nvfp4_mlp_only"),
    ("nvfp4_mse", "nvfp4_mse_sweep"),
    ("nvfp4_four_over_six", "nvfp4_four_over_six"),
    ("w4a16_nvfp4", "nvfp4_w4a16"),
    ("w4a8_nvfp4_fp8", "w4a8_nvfp4_fp8"),
    ("mixed_fp8_attn_nvfp4_mlp", "mixed_fp8_attn_nvfp4_mlp"),
    ("fp8", "fp8"),
    ("fp8_kv_fp8", "fp8_kv_fp8"),
    ("fp8_pc_pt", "fp8_pc_pt"),
    ("fp8_block", "fp8_block"),
    ("mxfp8", "mxfp8"),
    ("mxfp4", "mxfp4"),
];
const COMPRESSED_TENSORS: [(&str, &str); 8] = [
    ("nvfp4", "nvfp4"),
    ("w4a16_nvfp4", "nvfp4a16"),
    ("fp8", "fp8"),
    ("fp8_pc_pt", "fp8_dynamic"),
    ("fp8_block", "fp8_block"),
    ("mxfp8", "mxfp8"),
    ("mxfp4", "mxfp4"),
    ("mxfp4a16", "mxfp4a16"),
];

fn recipe(name: &str) -> Recipe {
    let mut recipe = match name {
        "mxfp4a16" => Recipe::uniform(Scheme::Mxfp4a16),
        _ => Recipe::find(name).unwrap(),
    };
    if name.starts_with("mixed") {
        // The fixture has NVFP4 in the first layer only.
        recipe.rules[1].modules = "model.layers.0.mlp.*".into();
    }
    recipe
}

/// Every export of `dialect`'s tool whose BF16 form is at hand: the repository's own, and the full set where it is.
fn compare_all(tool: &str, dialect: Dialect, recipes: &[(&str, &str)]) {
    let mut compared = 0;
    for fixture in all_fixtures() {
        let mut parts = fixture.name.split('/');
        let (Some(t), Some(architecture), Some(export)) = (parts.next(), parts.next(), parts.next()) else { continue };
        let root = fixture.folder.ancestors().nth(3).unwrap();
        let sources = [root.to_path_buf(), own_folder()].map(|r| r.join("modelopt").join(architecture).join("bf16"));
        let Some(source) = sources.into_iter().find(|s| s.is_dir()) else { continue };
        if let Some((name, _)) = recipes.iter().find(|(_, e)| t == tool && *e == export) {
            println!("{}", fixture.name);
            compare(&source, &recipe(name), dialect, &fixture.folder, &|_| ());
            compared += 1;
        }
    }
    println!("{compared} exports of {tool}");
    assert!(compared >= if is_full() { 8 } else { 3 }, "{compared}");
}

#[test]
fn the_modelopt_dialect_equals_modelopts_own_exports() {
    compare_all("modelopt", Dialect::ModelOpt, &MODELOPT);
}

#[test]
fn the_compressed_tensors_dialect_equals_llm_compressors_own_exports() {
    compare_all("compressed-tensors", Dialect::CompressedTensors, &COMPRESSED_TENSORS);
}

#[test]
fn the_shipped_nvfp4_model_is_what_quantizing_the_shipped_bf16_model_gives() {
    let folder = Folder::new();
    succeed(&["quantize", BF16, "-o", &folder.name("out"), "--recipe", "nvfp4"]);
    let ours = TensorStore::open(&folder.at("out")).unwrap();
    let shipped = TensorStore::open(&project().join(NVFP4)).unwrap();
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
    let nvfp4 = |source: &Checkpoint, calibration: &Calibration| {
        let recipe = Recipe::uniform(Scheme::Nvfp4);
        quantize(source, calibration, &recipe, Dialect::ModelOpt, &Default::default(), None, &out).unwrap_err()
    };
    let e = nvfp4(&source, &unreached);
    assert!(e.to_string().contains("model.layers.1.mlp.down_proj"), "{e}");

    let already = Checkpoint::open(&own_folder().join("compressed-tensors/llama/fp8_dynamic")).unwrap();
    let e = nvfp4(&already, &good);
    assert!(e.to_string().contains("F8_E4M3") && e.to_string().contains("q_proj"), "{e}");

    let e = calibrate(&source, cpu(2), &[], "test", &mut |_, _| {}).unwrap_err();
    assert!(matches!(e, QuantizeError::Calibration(_)), "{e}");
    let e = calibrate(&source, cpu(2), &[vec![384]], "test", &mut |_, _| {}).unwrap_err();
    assert!(e.to_string().contains("384"), "{e}");

    std::fs::create_dir(&out).unwrap();
    std::fs::write(out.join("precious"), "x").unwrap();
    let e = nvfp4(&source, &good);
    assert!(e.to_string().contains("not empty"), "{e}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "a partial folder was left behind");
}

/// Logits of a fixture's model on its reference's tokens.
fn logits(folder: &Path) -> Vec<f32> {
    let checkpoint = Checkpoint::open(folder).unwrap();
    let model = Decoder::load(cpu(2), &checkpoint).unwrap();
    try_logits(&model, &(0..48u32).map(|i| (i * 31 + 7) % 384).collect::<Vec<_>>()).unwrap()
}

fn text() -> CalibrationText {
    let sequences = (0..4).map(|s| (0..64).map(|i| (i * 37 + s * 101) % 384).collect()).collect();
    CalibrationText { sequences, description: "test".into() }
}

#[test]
fn smoothing_changes_no_bit_of_what_the_unquantized_model_computes() {
    let mut smoothed = 0;
    for fixture in all_fixtures().into_iter().filter(|f| f.name.ends_with("/bf16")) {
        let source = fixture.checkpoint();
        let mut errors = Vec::new();
        for form in [Smooth::PowerOfTwo, Smooth::PowerOfTwoChannels] {
            let scheme = |_: &Module| Scheme::Nvfp4;
            let found = smooth::choose(&source, &cpu(2), &text().sequences, form, &scheme, &mut |_, _| {}).unwrap();
            let chosen = found.chosen.iter().filter(|(_, strength, _)| strength.is_some()).count();
            assert!(chosen > 0 && found.chosen.iter().all(|(_, _, share)| *share <= 1.0), "{}", fixture.name);
            errors.push(found.chosen.iter().map(|(_, _, share)| share).sum::<f64>());
            let folder = tempfile::tempdir().unwrap();
            let out = folder.path().join("smoothed");
            found.write(&source, &out).unwrap();
            assert!(logits(&fixture.folder) == logits(&out), "{} computes something else", fixture.name);
            smoothed += 1;
        }
        assert!(errors[1] < errors[0], "{}: channels lose {errors:?}", fixture.name);
    }
    assert!(smoothed >= if is_full() { 4 } else { 2 }, "{smoothed}");
}

/// A copy in f32, in which folded factors and rotations cost no rounding.
fn as_f32(source: &Checkpoint, out: &Path) {
    let writer = FolderWriter::create(out).unwrap();
    let tensor = |name: &str| {
        let view = source.tensors.peek(name).unwrap();
        let floats = move || view.floats();
        let bytes = move || Ok::<_, CheckpointError>(floats()?.iter().flat_map(|v| v.to_le_bytes()).collect());
        Pending::new(name, safetensors::Dtype::F32, view.shape, bytes)
    };
    writer.tensors(source.tensors.names().map(tensor).collect(), SHARD_BYTES, &serde_json::Map::new()).unwrap();
    writer.json("config.json", source.config.value()).unwrap();
    writer.commit().unwrap();
}

#[test]
fn exact_factors_and_rotations_change_the_unquantized_model_by_rounding_only() {
    let mut seen = 0;
    for fixture in all_fixtures().into_iter().filter(|f| f.name.ends_with("/bf16")) {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        as_f32(&fixture.checkpoint(), &at("f32"));
        let (source, plain) = (Checkpoint::open(&at("f32")).unwrap(), logits(&at("f32")));
        let apart = |name: &str| deviation(&logits(&at(name)), &plain);
        for form in [Smooth::Awq, Smooth::Smoothquant] {
            let name = format!("{form:?}");
            let scheme = |_: &Module| Scheme::Nvfp4;
            let found = smooth::choose(&source, &cpu(2), &text().sequences, form, &scheme, &mut |_, _| {}).unwrap();
            assert!(found.chosen.iter().any(|(_, strength, _)| strength.is_some()), "{}: {name}", fixture.name);
            found.write(&source, &at(&name)).unwrap();
            assert!(apart(&name) < 1e-5, "{}, {name}: {:.1e}", fixture.name, apart(&name));
        }
        for what in [Rotate::Values, Rotate::All] {
            let name = format!("{what:?}");
            rotate(&source, what, &|m| m.is_block_linear(), &at(&name)).unwrap();
            assert!(apart(&name) < 1e-5, "{}, {name}: {:.1e}", fixture.name, apart(&name));
            let weight = |folder: &str| {
                let tensors = TensorStore::open(&at(folder)).unwrap();
                tensors.peek("model.layers.0.self_attn.v_proj.weight").unwrap().bytes.to_vec()
            };
            assert!(weight("f32") != weight(&name), "{}, {name}: nothing was rotated", fixture.name);
        }
        seen += 1;
    }
    assert!(seen >= if is_full() { 2 } else { 1 }, "{seen}");
}

#[test]
fn the_best_recipe_runs_on_every_architecture_and_both_dialects_and_leaves_no_scratch() {
    let mut everything = Recipe::find("nvfp4_best").unwrap();
    (everything.rotate, everything.smooth) = (Some(Rotate::All), Some(Smooth::Awq));
    let best = Recipe::find("nvfp4_best").unwrap();
    for fixture in all_fixtures().into_iter().filter(|f| f.name.ends_with("/bf16")) {
        for (dialect, recipe) in [(Dialect::ModelOpt, &best), (Dialect::CompressedTensors, &everything)] {
            let folder = tempfile::tempdir().unwrap();
            let out = folder.path().join("best");
            let source = fixture.checkpoint();
            apply(
                &source,
                &cpu(2),
                &text(),
                recipe,
                dialect,
                Places { out: &out, unrounded: None, measured: None, found: None },
                &mut |_, _, _| {},
            )
            .unwrap();
            let ours = Checkpoint::open(&out).unwrap();
            Decoder::load(cpu(2), &ours).unwrap();
            assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "{}", fixture.name);
        }
    }
}

/// A trained model: on text that calibration has not seen.
#[test]
fn the_best_recipe_loses_less_than_the_largest_values_scales() {
    let folder = Folder::new();
    let best = folder.name("best");
    succeed(&["quantize", BF16, "-o", &best, "--recipe", "nvfp4_best"]);
    let compare = ["compare", BF16, NVFP4, &best, "--tasks", "none", "--no-speed", "--json"];
    let text = ["--text", "books", "--windows", "12", "--window", "256", "-o", &folder.name("report")];
    let report = shown_json(&[&compare[..], &text].concat());
    let kl = |i: usize| report["divergences"][i]["kl"]["value"].as_f64().unwrap();
    println!("largest values {:.5}, best {:.5}", kl(0), kl(1));
    assert!(kl(1) < 0.9 * kl(0), "{} against {}", kl(1), kl(0));
}

#[test]
fn recipes_that_fit_no_module_and_formats_that_a_dialect_lacks_are_refused() {
    let source = Checkpoint::open(&own_folder().join("modelopt/llama/bf16")).unwrap();
    let good = calibrated(&source);
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let refuse = |recipe: &Recipe, dialect| {
        quantize(&source, &good, recipe, dialect, &Default::default(), None, &out).unwrap_err().to_string()
    };
    let experts = Recipe::find("nvfp4_experts_only").unwrap();
    assert!(refuse(&experts, Dialect::ModelOpt).contains("*.mlp.experts.*"));
    let e = refuse(&Recipe::uniform(Scheme::W4a8Nvfp4Fp8), Dialect::CompressedTensors);
    assert!(e.contains("w4a8_nvfp4_fp8") && e.contains("q_proj"), "{e}");
    assert!(refuse(&Recipe::uniform(Scheme::None), Dialect::ModelOpt).contains("nothing"));
    assert!(!out.exists());
}

#[test]
fn dequantized_checkpoints_hold_the_decoded_weights() {
    let mut compared = 0;
    for fixture in all_fixtures() {
        let source = fixture.checkpoint();
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("bf16");
        if fixture.name.ends_with("bf16") || source.announced.dialect == Dialect::Plain {
            assert!(dequantize(&source, &out).unwrap_err().to_string().contains("plain"), "{}", fixture.name);
            continue;
        }
        dequantize(&source, &out).unwrap();
        let plain = Checkpoint::open(&out).unwrap();
        Decoder::load(cpu(2), &plain).unwrap();
        let config = ModelConfig::read(&source.config).unwrap().untied_where_stored(&source).unwrap();
        for m in config.modules() {
            let (a, b) = (source.linear(&m.name, m.role).unwrap(), plain.linear(&m.name, m.role).unwrap());
            assert!(b.element == Element::Bf16 || a.element == b.element, "{}: {}", fixture.name, m.name);
            let (a_scale, k) = (a.pre_quant_scale.clone(), m.role.k);
            for (i, (a, b)) in a.decode().iter().zip(b.decode()).enumerate() {
                let wanted = a_scale.as_ref().map_or(*a, |s| a * s[i % k]);
                assert_eq!(half::bf16::from_f32(wanted).to_f32(), b, "{}: {} {i}", fixture.name, m.name);
            }
        }
        compared += 1;
    }
    assert!(compared > 8, "{compared}");
}

/// There and back, every tensor and configuration is what it was, whichever tool wrote it; and in between the weights are.
#[test]
fn converting_to_the_other_dialect_and_back_gives_the_same_files() {
    let (mut compared, mut refused) = (0, 0);
    for fixture in all_fixtures() {
        let source = fixture.checkpoint();
        let (there, back) = match source.announced.dialect {
            Dialect::ModelOpt => (Dialect::CompressedTensors, Dialect::ModelOpt),
            Dialect::CompressedTensors => (Dialect::ModelOpt, Dialect::CompressedTensors),
            _ => continue,
        };
        let folder = tempfile::tempdir().unwrap();
        let (other, again) = (folder.path().join("other"), folder.path().join("again"));
        let report = match convert(&source, there, &other) {
            Ok(report) => report,
            Err(QuantizeError::Module { detail, .. }) => {
                assert!(detail.contains("no name") || detail.contains("pre_quant_scale"), "{}: {detail}", fixture.name);
                refused += 1;
                continue;
            }
            Err(QuantizeError::Nothing(_)) => continue,
            Err(e) => panic!("{}: {e}", fixture.name),
        };
        let other = Checkpoint::open(&other).unwrap();
        assert_eq!(other.announced.dialect, there, "{}", fixture.name);
        Decoder::load(cpu(2), &other).unwrap();
        let config = ModelConfig::read(&source.config).unwrap().untied_where_stored(&source).unwrap();
        for m in config.modules() {
            let (a, b) = (source.linear(&m.name, m.role).unwrap(), other.linear(&m.name, m.role).unwrap());
            assert!(a.data == b.data, "{}: {}", fixture.name, m.name);
            for (a, b) in a.decode().iter().zip(b.decode()) {
                assert!((a - b).abs() <= 2e-7 * a.abs(), "{}: {}: {a} {b}", fixture.name, m.name);
            }
        }
        convert(&other, back, &again).unwrap();
        let (again, stored) = (TensorStore::open(&again).unwrap(), &source.tensors);
        for name in again.names() {
            let (a, b) = (again.peek(name).unwrap(), stored.peek(name));
            let b = b.unwrap_or_else(|| panic!("{}: {name} is new", fixture.name));
            let is_global = name.ends_with("weight_scale_2") || name.ends_with("input_scale");
            if report.inexact > 0 && is_global {
                continue;
            }
            // A scale of one tensor may be [] or [1], in BF16 or f32.
            let same = a.bytes == b.bytes || a.floats().ok() == b.floats().ok();
            assert!(same, "{}: {name}", fixture.name);
        }
        compared += 1;
    }
    // What the other dialect lacks is in the full set only.
    assert!(compared >= 8 && (refused > 0 || !is_full()), "{compared} {refused}");
}
