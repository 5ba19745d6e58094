//! Calibrated rounding of a mixture's experts, those of a layer stored in one tensor among them: each is rounded on the
//! tokens that reach it, by its weights where those are few, under the one scale that the tensor has.

use std::path::Path;

use super::compared::calibrated;
use crate::support::fixtures::{architecture_fixtures, cpu, deviation, logits};
use recoup::checkpoint::Checkpoint;
use recoup::checkpoint::dialect::Dialect;
use recoup::checkpoint::tensors::TensorStore;
use recoup::formats::linear::OutputScale;
use recoup::model::modules::Module;
use recoup::model::{Decoder, ModelConfig};
use recoup::quantize::random_model::RandomModel;
use recoup::quantize::recipe::{Gptq, Rule};
use recoup::quantize::{CalibrationText, Places, Recipe, Report, Scheme, apply, quantize};

/// gpt-oss in BF16, its experts as transformers has them.
fn plain(folder: &Path) -> Checkpoint {
    let out = folder.join("plain");
    RandomModel::new("tiny-gpt-oss", None, Dialect::ModelOpt).unwrap().write(&out, &|| ()).unwrap();
    Checkpoint::open(&out).unwrap()
}

fn recipe(gptq: Option<Gptq>) -> Recipe {
    let rules = vec![Rule { modules: "*.mlp.experts.*".into(), scheme: Scheme::W4a16Nvfp4 }];
    Recipe { name: "experts".into(), rules, gptq, ..Recipe::uniform(Scheme::W4a16Nvfp4) }
}

fn text(sequences: Vec<Vec<u32>>) -> CalibrationText {
    CalibrationText { sequences, description: "test".into() }
}

fn sequences(count: u32, length: u32, vocab: u32) -> Vec<Vec<u32>> {
    (0..count).map(|s| (0..length).map(|i| (i * 37 + s * 101 + i * i) % vocab).collect()).collect()
}

fn rounded(source: &Checkpoint, gptq: Gptq, text: &CalibrationText, out: &Path, unrounded: Option<&Path>) -> Report {
    let places = Places { out, unrounded, measured: None, found: None };
    apply(source, &cpu(2), text, &recipe(Some(gptq)), Dialect::ModelOpt, places, &mut |_, _, _| {}).unwrap()
}

fn experts(source: &Checkpoint) -> Vec<Module> {
    let config = ModelConfig::read(&source.config).unwrap();
    config.modules().into_iter().filter(|m| m.expert.is_some()).collect()
}

#[test]
fn experts_in_one_tensor_are_rounded_on_their_own_tokens_under_one_scale() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let source = plain(folder.path());
    let vocab = ModelConfig::read(&source.config).unwrap().vocab as u32;
    let sequences = sequences(16, 64, vocab);
    let none = calibrated(&source);
    quantize(&source, &none, &recipe(None), Dialect::ModelOpt, &Default::default(), None, &at("nearest")).unwrap();
    let report = rounded(&source, Gptq::default(), &text(sequences.clone()), &at("gptq"), Some(&at("unrounded")));
    assert!(report.notes.is_empty(), "{:?}", report.notes);
    let ridge = Gptq { ridge: Some(0.1), ..Gptq::default() };
    rounded(&source, ridge, &text(sequences.clone()), &at("ridge"), None);

    let computed = |name: &str| {
        let checkpoint = Checkpoint::open(&at(name)).unwrap();
        logits(&Decoder::load(cpu(2), &checkpoint).unwrap(), &sequences[..4])
    };
    let wanted = computed("plain");
    let [nearest, gptq, ridge] = ["nearest", "gptq", "ridge"].map(|name| deviation(&computed(name), &wanted));
    println!("logits: {nearest:.4} to nearest, {gptq:.4} calibrated, {ridge:.4} with ridge");
    assert!(gptq < nearest && ridge < nearest, "{gptq} and {ridge} against {nearest}");

    let [plain, nearest, gptq, unrounded] =
        ["plain", "nearest", "gptq", "unrounded"].map(|name| Checkpoint::open(&at(name)).unwrap());
    for m in experts(&source) {
        let (a, b) = (gptq.linear(&m.name, m.role).unwrap(), nearest.linear(&m.name, m.role).unwrap());
        assert!(a.data != b.data, "{}", m.name);
        assert!(matches!(a.output_scale, OutputScale::Tensor(_)) && a.output_scale == b.output_scale, "{}", m.name);
        // What was rounded lies nearer to what it became than the weights do, and not far from them.
        let (moved, own) = (unrounded.linear(&m.name, m.role).unwrap(), plain.linear(&m.name, m.role).unwrap());
        assert_eq!(moved.bias, own.bias);
        let [a, moved, own] = [a, moved, own].map(|l| l.decode());
        let (rounding, all) = (deviation(&a, &moved), deviation(&a, &own));
        assert!(rounding < all && all < 0.5, "{}: {rounding} and {all}", m.name);
    }
    // Nothing but the experts' weights is another.
    let [a, b] = ["plain", "unrounded"].map(|name| TensorStore::open(&at(name)).unwrap());
    assert!(a.names().eq(b.names()));
    for name in a.names().filter(|n| !n.ends_with("experts.gate_up_proj") && !n.ends_with("experts.down_proj")) {
        assert!(a.peek(name).unwrap().bytes == b.peek(name).unwrap().bytes, "{name}");
    }
}

#[test]
fn experts_that_few_tokens_reach_are_rounded_by_their_weights_and_named() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let source = plain(folder.path());
    let none = calibrated(&source);
    quantize(&source, &none, &recipe(None), Dialect::ModelOpt, &Default::default(), None, &at("nearest")).unwrap();
    // Three tokens: none is enough, and what they are not routed to sees none.
    let report = rounded(&source, Gptq::default(), &text(vec![vec![7, 9, 11]]), &at("gptq"), None);
    println!("{:?}", report.notes);
    let told = |n: &&String| n.contains(" of 4 experts saw ") && n.contains("use more text");
    let layers = ModelConfig::read(&source.config).unwrap().layers.len();
    assert_eq!(report.notes.iter().filter(told).count(), 2 * layers, "{:?}", report.notes);
    let [nearest, gptq] = ["nearest", "gptq"].map(|name| Checkpoint::open(&at(name)).unwrap());
    Decoder::load(cpu(1), &gptq).unwrap();
    for m in experts(&source) {
        let own = source.linear(&m.name, m.role).unwrap().decode();
        let (few, near) = (gptq.linear(&m.name, m.role).unwrap(), nearest.linear(&m.name, m.role).unwrap());
        assert_eq!(few.output_scale, near.output_scale, "{}", m.name);
        let [few, near] = [few, near].map(|l| deviation(&l.decode(), &own));
        assert!(few < near, "{}: {few} against {near}", m.name);
    }
}

/// Experts that are stored one by one, in the same way.
#[test]
fn experts_of_their_own_that_few_tokens_reach_are_named_too() {
    let all = architecture_fixtures();
    let source = all.iter().find(|f| f.name == "modelopt/nemotron_h/bf16").unwrap().checkpoint();
    let folder = tempfile::tempdir().unwrap();
    let recipe = Recipe { gptq: Some(Gptq::default()), ..Recipe::find("nvfp4").unwrap() };
    let run = |name: &str, sequences: Vec<Vec<u32>>| {
        let out = folder.path().join(name);
        let places = Places { out: &out, unrounded: None, measured: None, found: None };
        apply(&source, &cpu(2), &text(sequences), &recipe, Dialect::ModelOpt, places, &mut |_, _, _| {}).unwrap().notes
    };
    let few = |notes: &[String]| notes.iter().filter(|n| n.contains(".experts.") && n.contains("fewer than")).count();
    assert_eq!(few(&run("enough", sequences(16, 64, 176))), 0);
    let notes = run("few", sequences(1, 12, 176));
    assert!(few(&notes) > 0, "{notes:?}");
}
