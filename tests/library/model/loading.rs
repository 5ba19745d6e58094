//! What is in memory while a model is loaded: of what it is made of no more than its largest part, and that while little
//! else is; and what it will be, said before.

use std::cell::RefCell;
use std::path::PathBuf;

use crate::support::fixtures::{architecture_fixtures, cpu};
use recoup::backend::{Backend, PAGE};
use recoup::checkpoint::dialect::Dialect;
use recoup::checkpoint::resolve::LinearRole;
use recoup::checkpoint::{Checkpoint, CheckpointError};
use recoup::formats::kv::KvFormat;
use recoup::formats::linear::LinearTensors;
use recoup::model::memory::Needs;
use recoup::model::{Decoder, ModelConfig, Source};
use recoup::quantize::random_model::RandomModel;

/// Counts bytes: those that are loaded, and those that they are made of and are not done with.
struct Counted<'a> {
    model: &'a RandomModel,
    counts: RefCell<Counts>,
}

#[derive(Default)]
struct Counts {
    loaded: usize,
    held: usize,
    peak: usize,
}

impl Source for Counted<'_> {
    fn place(&self) -> PathBuf {
        self.model.place()
    }

    fn config(&self) -> Result<ModelConfig, CheckpointError> {
        Source::config(self.model)
    }

    fn linear(&self, name: &str, role: LinearRole) -> Result<LinearTensors<'_>, CheckpointError> {
        let linear = self.model.linear(name, role)?;
        let mut counts = self.counts.borrow_mut();
        counts.loaded += linear.stored_bytes();
        counts.held += linear.stored_bytes();
        counts.peak = counts.peak.max(counts.loaded + counts.held);
        Ok(linear)
    }

    fn vector(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, CheckpointError> {
        self.model.vector(name, shape)
    }

    fn kv(&self, module: &str) -> Result<Option<KvFormat>, CheckpointError> {
        self.model.kv(module)
    }

    fn part_done(&self) {
        self.counts.borrow_mut().held = 0;
    }

    fn finish(&self) -> Result<(), CheckpointError> {
        self.model.finish()
    }
}

/// A hybrid of large heads and layers of many experts.
fn model(hidden: usize, vocab: usize, experts: usize) -> RandomModel {
    let config = serde_json::json!({
        "architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h", "hybrid_override_pattern": "ME*-ME*-ME*-",
        "hidden_size": hidden, "vocab_size": vocab, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "intermediate_size": 4 * hidden, "mlp_hidden_act": "relu2", "mamba_num_heads": 4, "mamba_head_dim": 16,
        "n_groups": 2, "ssm_state_size": 16, "conv_kernel": 4, "n_routed_experts": experts, "num_experts_per_tok": 2,
        "n_group": 1, "topk_group": 1, "moe_intermediate_size": hidden, "moe_shared_expert_intermediate_size": hidden,
        "routed_scaling_factor": 2.5, "layer_norm_epsilon": 1e-5, "max_position_embeddings": 64,
        "tie_word_embeddings": false,
    });
    RandomModel::of_config("config.json".as_ref(), config, None, Dialect::ModelOpt).unwrap()
}

#[test]
fn a_model_takes_little_more_than_itself_while_it_is_loaded() {
    let model = model(64, 4096, 32);
    let counted = Counted { model: &model, counts: RefCell::default() };
    Decoder::load(cpu(1), &counted).unwrap();
    let Counts { loaded, peak, .. } = *counted.counts.borrow();
    println!("{loaded} bytes, {peak} at the most");
    assert!(peak as f64 <= 1.05 * loaded as f64, "{peak} of {loaded}");
}

#[test]
fn what_a_model_needs_is_known_before_it_is_loaded() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("m");
    model(64, 4096, 32).write(&out, &|| ()).unwrap();
    let large = Checkpoint::open(&out).unwrap();
    let fixtures = architecture_fixtures().into_iter().map(|f| (f.name.clone(), f.checkpoint()));
    for (i, (name, checkpoint)) in std::iter::once(("hybrid".to_owned(), large)).chain(fixtures).enumerate() {
        let Ok(config) = ModelConfig::read(&checkpoint.config).and_then(|c| c.untied_where_stored(&checkpoint)) else {
            continue;
        };
        let needs = Needs::of(&checkpoint, &config, KvFormat::F32);
        let decoder = Decoder::load(cpu(1), &checkpoint).unwrap();
        assert_eq!(needs.token as usize * PAGE, decoder.page_bytes(KvFormat::F32), "{name}");
        assert_eq!(needs.sequence as usize, decoder.state_bytes(), "{name}");
        let experts: Vec<String> =
            config.modules().into_iter().filter(|m| m.expert.is_some()).map(|m| m.name).collect();
        assert_eq!(needs.experts > 0, !experts.is_empty(), "{name}");
        let bytes = |of: &dyn Fn(&str) -> bool| -> usize {
            decoder.linears().filter(|l| of(&l.name)).map(|l| decoder.backend().resident_bytes(l)).sum()
        };
        let (all, own) = (bytes(&|_| true), bytes(&|name| experts.iter().any(|e| e == name)));
        println!("{name}: {needs:?}; {all} bytes of linears, {own} of them experts'");
        // Rows that fill groups of 16 are what tiny models have more of in memory than in files; and norms in f32.
        let near = |found: u64, held: usize, bound: f64| (held as f64 / found.max(1) as f64 - 1.0).abs() < bound;
        assert!(near(needs.weights, all, if i == 0 { 0.02 } else { 0.25 }), "{name}");
        assert!(own == 0 || near(needs.experts, own, if i == 0 { 0.01 } else { 0.25 }), "{name}");
    }
}

/// Not a check but figures: `cargo test --test library loading -- --ignored --nocapture`.
#[test]
#[cfg(target_os = "linux")]
#[ignore = "prints what loading a folder takes"]
fn memory() {
    let status = |key: &str| -> usize {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|l| l.strip_prefix(key)).unwrap();
        line.trim_matches(|c: char| !c.is_ascii_digit()).parse().unwrap()
    };
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("m");
    let file = model(768, 65536, 24).write(&out, &|| ()).unwrap() / 1024;
    // The peak from here on.
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
    let before = status("VmRSS:");
    let decoder = Decoder::load(cpu(2), &Checkpoint::open(&out).unwrap()).unwrap();
    let percent = |kb: usize| 100.0 * (kb - before) as f64 / file as f64;
    let (peak, now) = (percent(status("VmHWM:")), percent(status("VmRSS:")));
    println!("{file} KB of files: {peak:.1} % of them at the most, {now:.1} % when loaded");
    drop(decoder);
}
