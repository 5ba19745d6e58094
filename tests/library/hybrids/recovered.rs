//! A small hybrid from its first step to its recovered NVFP4 form.

use std::ops::ControlFlow;
use std::path::Path;

use recoup::backend::autograd::AutogradBackend;
use recoup::checkpoint::Checkpoint;
use recoup::checkpoint::dialect::Dialect;
use recoup::corpus::Row;
use recoup::model::{Decoder, ModelConfig};
use recoup::quantize::{CalibrationText, Places, Recipe, apply};
use recoup::recover::data::Data;
use recoup::recover::parameter::Learned;
use recoup::recover::student::Student;
use recoup::recover::{block, distill, pretrain};
use serde_json::json;

use crate::support::fixtures::{bits, cpu, deviation, logits};

/// config.json of a small Nemotron-H: Mamba-2, mixture, attention, feed-forward.
fn write_shape(folder: &Path) {
    let shape = json!({
        "architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h", "hybrid_override_pattern": "ME*-",
        "hidden_size": 64, "vocab_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "intermediate_size": 96, "mlp_hidden_act": "relu2", "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 2,
        "ssm_state_size": 16, "conv_kernel": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
        "topk_group": 1, "moe_intermediate_size": 48, "moe_shared_expert_intermediate_size": 48,
        "routed_scaling_factor": 2.5, "layer_norm_epsilon": 1e-5, "max_position_embeddings": 64,
        "tie_word_embeddings": false,
    });
    std::fs::create_dir_all(folder).unwrap();
    std::fs::write(folder.join("config.json"), shape.to_string()).unwrap();
}

/// Arithmetic progressions: what comes next can be told from the third token on.
fn progressions(count: u32, seed: u32) -> Vec<Row> {
    let row = |i: u32| {
        let (start, step) = ((i * 31 + seed * 17) % 48, 1 + (i * 7 + seed) % 11);
        Row::text((0..24).map(|t| (start + t * step) % 48).collect())
    };
    (0..count).map(row).collect()
}

#[test]
fn a_small_hybrid_is_trained_quantized_and_recovered() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    write_shape(&at("shape"));
    let shape = recoup::checkpoint::json::Object::read(&at("shape/config.json")).unwrap();
    pretrain::initialize(&ModelConfig::read(&shape).unwrap(), &at("shape"), 3, &at("initial")).unwrap();
    let data = Data { rows: progressions(384, 0), description: String::new() };
    let unseen = || progressions(16, 5);

    let initial = Checkpoint::open(&at("initial")).unwrap();
    let mut model = Student::load_plain(&initial, AutogradBackend::new()).unwrap();
    model.train(|_| Learned::weight(true));
    let options = distill::Options {
        kl: 0.0,
        cross_entropy: 1.0,
        steps: 160,
        sequences: 8,
        learning_rate: 1e-2,
        ..distill::Options::default()
    };
    let mut curve = Vec::new();
    let mut keep = |point: &distill::Point, _: &Student| {
        curve.push(point.cross_entropy);
        Ok(ControlFlow::Continue(()))
    };
    distill::train(&mut model, None, &data, &options, 0, &mut keep).unwrap();
    println!("cross-entropy {:.3} to {:.3}", curve[0], curve[curve.len() - 1]);
    assert!((curve[0] - 48f64.ln()).abs() < 0.3, "it begins knowing nothing: {}", curve[0]);
    assert!(curve[curve.len() - 1] < 0.5 * curve[0], "{curve:?}");
    model.write(&initial, &[], &at("bf16")).unwrap();
    drop(model);

    let plain = Checkpoint::open(&at("bf16")).unwrap();
    let text = CalibrationText {
        sequences: progressions(16, 2).iter().map(|r| r.0[0].tokens.clone()).collect(),
        description: "progressions".into(),
    };
    let quantized = at("nvfp4");
    let places = Places { out: &quantized, unrounded: None, measured: None, found: None };
    let recipe = Recipe::find("nvfp4").unwrap();
    apply(&plain, &cpu(2), &text, &recipe, Dialect::ModelOpt, places, &mut |_, _, _| ()).unwrap();

    let teacher = Decoder::load(AutogradBackend::new(), &plain).unwrap();
    let checkpoint = Checkpoint::open(&quantized).unwrap();
    let mut student = Student::load(&checkpoint, Some(&plain), AutogradBackend::new()).unwrap();
    let watched = [data.rows[..64].to_vec(), unseen()]
        .map(|rows| distill::Watched::new("progressions".into(), rows, Some(&teacher)).unwrap());
    // On what is trained on, and on others.
    let kl = |s: &Student| watched.each_ref().map(|w| w.loss(&s.decoder, Some(&teacher)).unwrap());
    let rounded = kl(&student);
    let options =
        block::Options { steps: 40, sequences: 8, learning_rate: 1e-3, norms: true, ..block::Options::default() };
    let mut reports = Vec::new();
    let mut report = |r: &block::BlockReport, _: &Student| {
        reports.push(*r);
        Ok(())
    };
    block::train(&mut student, &teacher, &data, &options, 0, folder.path(), &mut report).unwrap();
    assert_eq!(reports.len(), 4);
    let by_block = kl(&student);
    // The other method from the same beginning.
    let mut student = Student::load(&checkpoint, Some(&plain), AutogradBackend::new()).unwrap();
    student.train(|p| Learned::weight(p.is_quantized() || p.is_norm()));
    let options = distill::Options {
        steps: 60,
        sequences: 8,
        learning_rate: 3e-4,
        norms: true,
        recompute: true,
        ..distill::Options::default()
    };
    let go_on = &mut |_: &distill::Point, _: &Student| Ok(ControlFlow::Continue(()));
    distill::train(&mut student, Some(&teacher), &data, &options, 0, go_on).unwrap();
    let recovered = kl(&student);
    println!("KL to the teacher: {rounded:.4?} rounded, {by_block:.4?} by block, {recovered:.4?} by QAD; {reports:?}");
    assert!(reports.iter().all(|r| r.after <= r.before), "{reports:?}");
    for kl in [by_block, recovered] {
        assert!(kl[0] < 0.9 * rounded[0] && kl[1] < 0.9 * rounded[1], "{rounded:?} {kl:?}");
    }

    student.write(&checkpoint, &[], &at("recovered")).unwrap();
    let written = Checkpoint::open(&at("recovered")).unwrap();
    let tokens: Vec<Vec<u32>> = unseen().iter().map(|r| r.0[0].tokens.clone()).collect();
    let trained = logits(&student.decoder, &tokens);
    let again = Student::load(&written, None, AutogradBackend::new()).unwrap();
    assert!(bits(&logits(&again.decoder, &tokens)) == bits(&trained));
    let packed = deviation(&logits(&Decoder::load(cpu(2), &written).unwrap(), &tokens), &trained);
    assert!(packed < 5e-3, "{packed:e}");
}
