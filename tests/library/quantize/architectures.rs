//! Architectures that are not plain Llama: what `quantize` and `convert` write of them equals ModelOpt's own exports.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use super::compared::{calibrated, compare, stated};
use crate::support::fixtures::{Fixture, architecture_fixtures, cpu, deviation, is_full};
use recoup::checkpoint::Checkpoint;
use recoup::checkpoint::dialect::Dialect;
use recoup::checkpoint::tensors::TensorStore;
use recoup::formats::linear::Element;
use recoup::model::modules::Part;
use recoup::model::{Decoder, ModelConfig};
use recoup::quantize::convert::convert;
use recoup::quantize::dequantize::dequantize;
use recoup::quantize::random_model::RandomModel;
use recoup::quantize::recipe::{Gptq, KvCache, Rotate, Rule, Smooth};
use recoup::quantize::{CalibrationText, Places, QuantizeError, Recipe, Scheme, apply, quantize};
use safetensors::Dtype;
use serde_json::{Value, json};

/// The unquantized model beside a fixture.
fn source(fixture: &Fixture) -> Option<PathBuf> {
    let folder = fixture.folder.parent()?.join("bf16");
    folder.is_dir().then_some(folder)
}

/// The recipe that a fixture was made by; nothing where none of ours says it or its source is not at hand.
fn recipe(name: &str) -> Option<Recipe> {
    let find = |name: &str| Some(Recipe::find(name).unwrap());
    match name {
        // Attention was left out of it.
        "modelopt/nemotron_h/nvfp4" => find("nano_nvfp4_kv_fp8_cast").map(|r| Recipe { kv_cache: None, ..r }),
        "modelopt/nemotron_h/nvfp4_kv_cast" => find("nano_nvfp4_kv_fp8_cast"),
        "modelopt/nemotron_h/mixed_lightning" => find("lightning_w4a16_nvfp4_4o6"),
        // Other shapes than its source's.
        "modelopt/nemotron_h/mixed_super" | "modelopt/nemotron_h/mixed_nano4b" => None,
        "modelopt/llama/nvfp4_kv_cast" => None,
        name if name.starts_with("modelopt/") => match name.rsplit_once('/')?.1 {
            "nvfp4" => find("nvfp4"),
            "nvfp4_kv_fp8" => find("nvfp4_kv_fp8"),
            "mixed_w4a16_fp8_kv_cast" => find("w4a16_nvfp4-fp8_attn-kv_fp8_cast"),
            _ => None,
        },
        _ => None,
    }
}

/// What an export states and is known to state otherwise than ModelOpt 0.47 means it.
fn mended(name: &str, stated: &mut Value) {
    for key in ["ignore", "exclude_modules"] {
        let Some(names) = stated.get_mut(key).and_then(Value::as_array_mut) else { continue };
        // ModelOpt 0.47 breaks Nemotron-H's names.
        for name in names.iter_mut() {
            let text = name.as_str().unwrap();
            if let Some((module, rest)) = text.split_once(".\0") {
                *name = json!(format!("{module}{}", if rest.ends_with('*') { "*" } else { "" }));
            }
        }
        // Made by an older version, which did not name the embedding.
        if name.contains("nemotron_nas") {
            names.push(json!("model.embed_tokens"));
        }
    }
}

#[test]
fn architectures_quantized_equal_modelopts_own_exports() {
    let (mut compared, mut failed) = (0, Vec::new());
    for fixture in architecture_fixtures() {
        let (Some(recipe), Some(source)) = (recipe(&fixture.name), source(&fixture)) else { continue };
        println!("{}", fixture.name);
        let one = || compare(&source, &recipe, Dialect::ModelOpt, &fixture.folder, &|v| mended(&fixture.name, v));
        if catch_unwind(AssertUnwindSafe(one)).is_err() {
            failed.push(fixture.name);
        }
        compared += 1;
    }
    println!("{compared} exports");
    assert!(failed.is_empty(), "{failed:?}");
    assert!(compared >= if is_full() { 20 } else { 2 }, "{compared}");
}

#[test]
fn experts_become_openais_mxfp4_as_gpt_oss_has_it() {
    let all = architecture_fixtures();
    let find = |name: &str| all.iter().find(|f| f.name == name);
    let (Some(source), Some(theirs)) = (find("modelopt/gpt_oss/bf16"), find("native/gpt_oss/mxfp4")) else { return };
    let mut recipe = Recipe::find("mxfp4a16_experts_only").unwrap();
    compare(&source.folder, &recipe, Dialect::Mxfp4, &theirs.folder, &|_| ());
    let e = refused(&source.checkpoint(), &Recipe::uniform(Scheme::Mxfp4a16), Dialect::Mxfp4);
    assert!(e.contains("self_attn") && e.contains("openai-mxfp4"), "{e}");
    let e = refused(&source.checkpoint(), &Recipe::uniform(Scheme::Fp8), Dialect::ModelOpt);
    assert!(e.contains("mlp.experts.0") && e.contains("one tensor"), "{e}");
    let e = refused(&source.checkpoint(), &Recipe::uniform(Scheme::Nvfp4), Dialect::CompressedTensors);
    assert!(e.contains("mlp.experts.0") && e.contains("compressed-tensors"), "{e}");
    let mut cached = recipe.clone();
    cached.kv_cache = Some(KvCache::Fp8Cast);
    let e = refused(&source.checkpoint(), &cached, Dialect::Mxfp4);
    assert!(e.contains("KV cache") && e.contains("openai-mxfp4"), "{e}");
    recipe.rules[0].modules = "*.mlp.experts.1.*".into();
    let e = refused(&source.checkpoint(), &recipe, Dialect::Mxfp4);
    assert!(e.contains("mlp.experts.1") && e.contains("one rule"), "{e}");
}

fn refused(source: &Checkpoint, recipe: &Recipe, dialect: Dialect) -> String {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let calibration = calibrated(source);
    let e = quantize(source, &calibration, recipe, dialect, &Default::default(), None, &out).unwrap_err();
    assert!(!out.exists());
    e.to_string()
}

/// Recipes of releases whose sources have other shapes than the plain fixtures. A weight that was rounded to a format is the
/// same in it once more, so that what ModelOpt made of its own source is what must be made of the rounded one.
#[test]
fn releases_recipes_make_the_same_files_of_what_the_releases_decode_to() {
    let all = architecture_fixtures();
    let mut compared = 0;
    for (name, recipe) in [("mixed_super", "super-nvfp4-max-calib"), ("mixed_nano4b", "nano4b_nvfp4_fp8")] {
        let Some(theirs) = all.iter().find(|f| f.name == format!("modelopt/nemotron_h/{name}")) else { continue };
        let folder = tempfile::tempdir().unwrap();
        let plain = folder.path().join("plain");
        dequantize(&theirs.checkpoint(), &plain).unwrap();
        for dialect in [Dialect::ModelOpt, Dialect::CompressedTensors] {
            let out = folder.path().join(dialect.name());
            let source = Checkpoint::open(&plain).unwrap();
            let recipe = Recipe::find(recipe).unwrap();
            quantize(&source, &calibrated(&source), &recipe, dialect, &Default::default(), None, &out).unwrap();
            Decoder::load(cpu(2), &Checkpoint::open(&out).unwrap()).unwrap();
        }
        let out = folder.path().join(Dialect::ModelOpt.name());
        assert_eq!(stated(&out), stated(&theirs.folder), "{name}");
        let (ours, theirs) = (TensorStore::open(&out).unwrap(), TensorStore::open(&theirs.folder).unwrap());
        assert!(ours.names().eq(theirs.names()), "{name}");
        for tensor in ours.names() {
            let (a, b) = (ours.peek(tensor).unwrap(), theirs.peek(tensor).unwrap());
            assert_eq!((a.dtype, a.shape), (b.dtype, b.shape), "{name}: {tensor}");
            let calibrated = ["input_scale", "k_scale", "v_scale"].iter().any(|s| tensor.ends_with(s));
            // What was a negative number too small for its format has no sign any more.
            let signless = |bytes: &[u8]| -> Vec<u8> {
                let nibble = |n: u8| if n & 15 == 8 { 0 } else { n & 15 };
                match a.dtype {
                    Dtype::U8 => bytes.iter().map(|b| nibble(*b) | nibble(*b >> 4) << 4).collect(),
                    Dtype::F8_E4M3 => bytes.iter().map(|b| if *b == 0x80 { 0 } else { *b }).collect(),
                    _ => bytes.to_vec(),
                }
            };
            assert!(calibrated || signless(a.bytes) == signless(b.bytes), "{name}: {tensor}");
        }
        compared += 1;
    }
    assert!(compared >= if is_full() { 2 } else { 1 }, "{compared}");
}

#[test]
fn embeddings_and_heads_get_what_dialects_say_of_them_and_nothing_else() {
    let all = architecture_fixtures();
    let source = all.iter().find(|f| f.name == "modelopt/nemotron_h/bf16").unwrap().checkpoint();
    let rules = |pairs: &[(&str, Scheme)]| {
        let rule = |(modules, scheme): &(&str, Scheme)| Rule { modules: (*modules).into(), scheme: *scheme };
        Recipe { rules: pairs.iter().map(rule).collect(), ..Recipe::uniform(Scheme::Nvfp4) }
    };
    let refused = |pairs: &[(&str, Scheme)]| refused(&source, &rules(pairs), Dialect::ModelOpt);
    let e = refused(&[("backbone.embeddings", Scheme::Nvfp4)]);
    assert!(e.contains("backbone.embeddings") && e.contains("no nvfp4 for embeddings"), "{e}");
    let e = refused(&[("*.mixer.in_proj", Scheme::W8a16Fp8)]);
    assert!(e.contains("in_proj") && e.contains("no w8a16_fp8 for linears of blocks"), "{e}");
    let e = refused(&[("model.embed_tokens", Scheme::W4a16Nvfp4)]);
    assert!(e.contains("`backbone.embeddings`"), "{e}");
    let tied = rules(&[("model.embed_tokens", Scheme::W4a16Nvfp4)]);
    let e = RandomModel::new("tiny", Some(&tied), Dialect::ModelOpt).err().unwrap().to_string();
    assert!(e.contains("model.embed_tokens") && e.contains("tied"), "{e}");
    // One format for all that is quantized, the embedding too: named one by one where `Linear` would leave it out.
    let one = rules(&[("*", Scheme::W4a16Nvfp4), ("backbone.embeddings", Scheme::W4a16Nvfp4)]);
    let out = tempfile::tempdir().unwrap();
    for dialect in [Dialect::ModelOpt, Dialect::CompressedTensors] {
        let out = out.path().join(dialect.name());
        quantize(&source, &calibrated(&source), &one, dialect, &Default::default(), None, &out).unwrap();
        let written = Checkpoint::open(&out).unwrap();
        let decoder = Decoder::load(cpu(2), &written).unwrap();
        let m = decoder.config.modules().into_iter().find(|m| m.part == Part::Embedding).unwrap();
        assert_eq!(written.linear(&m.name, m.role).unwrap().element, Element::E2m1, "{dialect}");
    }
}

#[test]
fn every_architecture_is_dequantized() {
    let mut compared = 0;
    for fixture in architecture_fixtures() {
        let source = fixture.checkpoint();
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("bf16");
        if source.announced.dialect == Dialect::Plain {
            continue;
        }
        println!("{}", fixture.name);
        dequantize(&source, &out).unwrap_or_else(|e| panic!("{}: {e}", fixture.name));
        let plain = Checkpoint::open(&out).unwrap();
        Decoder::load(cpu(2), &plain).unwrap();
        let (before, after) = (tensors_beside(&fixture.folder), tensors_beside(&out));
        assert_eq!(before, after, "{}", fixture.name);
        let config = ModelConfig::read(&source.config).unwrap().untied_where_stored(&source).unwrap();
        for m in config.modules() {
            let (a, b) = (source.linear(&m.name, m.role).unwrap(), plain.linear(&m.name, m.role).unwrap());
            if let Some(rotation) = &a.rotation {
                // Its matrix is one up to BF16, so that it undoes itself.
                let mut turned = b.decode();
                turned.chunks_mut(m.role.k).for_each(|row| rotation.apply(row));
                let apart = deviation(&turned, &a.decode());
                assert!(apart < 1e-2, "{}: {}: {apart:.1e}", fixture.name, m.name);
                assert!(deviation(&b.decode(), &a.decode()) > 0.5, "{}: {}", fixture.name, m.name);
                continue;
            }
            let short = b.element == Element::Bf16;
            for (i, (a, b)) in a.decode().iter().zip(b.decode()).enumerate() {
                let a = if short { half::bf16::from_f32(*a).to_f32() } else { *a };
                assert_eq!(a, b, "{}: {} {i}", fixture.name, m.name);
            }
        }
        compared += 1;
    }
    println!("{compared} dequantized");
    assert!(compared >= if is_full() { 28 } else { 2 }, "{compared}");
}

/// Names of the tensors that the text model does not use.
fn tensors_beside(folder: &Path) -> Vec<String> {
    let checkpoint = Checkpoint::open(folder).unwrap();
    checkpoint.tensors.aside().map(|v| v.name.to_owned()).collect()
}

/// There and back, every tensor is what it was, and the configuration as ModelOpt means it.
#[test]
fn architectures_in_the_other_dialect_and_back_are_the_same_files() {
    let mut compared = 0;
    for fixture in architecture_fixtures() {
        let source = fixture.checkpoint();
        if source.announced.dialect != Dialect::ModelOpt {
            continue;
        }
        println!("{}", fixture.name);
        let folder = tempfile::tempdir().unwrap();
        let (other, again) = (folder.path().join("other"), folder.path().join("again"));
        let report = match convert(&source, Dialect::CompressedTensors, &other) {
            Ok(report) => report,
            // Fused experts; an FP8 head without a scale of its input, a quantized embedding.
            Err(QuantizeError::Module { detail, .. }) => {
                let known = fixture.name.contains("gpt_oss") || fixture.name.contains("nano4b");
                assert!(known, "{}: {detail}", fixture.name);
                continue;
            }
            Err(e) => panic!("{}: {e}", fixture.name),
        };
        let other = Checkpoint::open(&other).unwrap();
        assert_eq!(other.announced.dialect, Dialect::CompressedTensors, "{}", fixture.name);
        Decoder::load(cpu(2), &other).unwrap();
        convert(&other, Dialect::ModelOpt, &again).unwrap();
        let mut expected = stated(&fixture.folder);
        expected.iter_mut().flatten().for_each(|v| mended(&fixture.name, v));
        assert_eq!(stated(&again), expected, "{}", fixture.name);
        let (again, stored) = (TensorStore::open(&again).unwrap(), TensorStore::open(&fixture.folder).unwrap());
        // A scale that is left behind at a module without quantized inputs has no place in the other dialect.
        let lost: Vec<&str> = stored.names().filter(|n| !again.contains(n)).collect();
        assert!(lost.iter().all(|n| n.ends_with("input_scale")), "{}: {lost:?}", fixture.name);
        for name in again.names() {
            let (a, b) = (again.peek(name).unwrap(), stored.peek(name).unwrap());
            let is_global = name.ends_with("weight_scale_2") || name.ends_with("input_scale");
            if report.inexact > 0 && is_global {
                continue;
            }
            assert!(a.bytes == b.bytes && a.shape == b.shape, "{}: {name}", fixture.name);
        }
        compared += 1;
    }
    println!("{compared} there and back");
    assert!(compared >= if is_full() { 21 } else { 2 }, "{compared}");
}

#[test]
fn hybrids_are_rounded_layer_by_layer_and_neither_smoothed_nor_rotated() {
    for fixture in architecture_fixtures() {
        if !["modelopt/nemotron_h/bf16", "modelopt/qwen3_5/bf16"].contains(&fixture.name.as_str()) {
            continue;
        }
        let source = fixture.checkpoint();
        let config = ModelConfig::read(&source.config).unwrap();
        let vocab = config.vocab as u32;
        let sequences = (0..4).map(|s| (0..64).map(|i| (i * 37 + s * 101) % vocab).collect()).collect();
        let text = CalibrationText { sequences, description: "test".into() };
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out");
        let places = Places { out: &out, unrounded: None, measured: None, found: None };
        let run =
            |recipe: &Recipe| apply(&source, &cpu(2), &text, recipe, Dialect::ModelOpt, places, &mut |_, _, _| {});
        let plain = Recipe::find("nvfp4").unwrap();
        for recipe in [
            Recipe { smooth: Some(Smooth::PowerOfTwo), ..plain.clone() },
            Recipe { rotate: Some(Rotate::All), ..plain.clone() },
        ] {
            let e = run(&recipe).unwrap_err();
            assert!(matches!(e, QuantizeError::Architecture { .. }), "{}: {e}", fixture.name);
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "{}", fixture.name);
        run(&Recipe { gptq: Some(Gptq::default()), ..plain }).unwrap();
        let rounded = Checkpoint::open(&out).unwrap();
        Decoder::load(cpu(2), &rounded).unwrap();
        // Calibrated rounding moved something in every kind of mixer.
        let nearest = folder.path().join("nearest");
        let nearest_recipe = Recipe::find("nvfp4").unwrap();
        let calibration = calibrated(&source);
        quantize(&source, &calibration, &nearest_recipe, Dialect::ModelOpt, &Default::default(), None, &nearest)
            .unwrap();
        let nearest = Checkpoint::open(&nearest).unwrap();
        for part in [Part::MambaIn, Part::MambaOut, Part::DeltaIn, Part::DeltaOut, Part::Q, Part::Down] {
            for m in config.modules().iter().filter(|m| m.part == part && m.expert.is_none()) {
                let (a, b) = (rounded.linear(&m.name, m.role).unwrap(), nearest.linear(&m.name, m.role).unwrap());
                assert!(a.data != b.data, "{}: {}", fixture.name, m.name);
            }
        }
    }
}
