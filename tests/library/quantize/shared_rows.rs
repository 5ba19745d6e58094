//! Experts of a layer whose rows lie in one tensor, all of gate before all of up, as transformers 5 writes Qwen3.5's: the same
//! model as the same numbers one by one, computed, quantized and rounded.

use std::path::Path;

use super::compared::{calibrated, stated};
use crate::support::fixtures::{architecture_fixtures, bits, cpu, logits};
use recoup::backend::autograd::AutogradBackend;
use recoup::checkpoint::Checkpoint;
use recoup::checkpoint::dialect::Dialect;
use recoup::checkpoint::tensors::TensorStore;
use recoup::checkpoint::write::{FolderWriter, Pending, metadata};
use recoup::model::{Decoder, ModelConfig};
use recoup::quantize::random_model::RandomModel;
use recoup::quantize::recipe::{Gptq, Rule};
use recoup::quantize::{CalibrationText, Places, QuantizeError, Recipe, Scheme, apply, quantize};
use serde_json::json;

/// A mixture of random weights, its experts one by one.
fn apart(out: &Path, hidden: usize, inner: usize) {
    let config = json!({
        "architectures": ["Qwen3_5MoeForCausalLM"], "model_type": "qwen3_5_moe_text", "hidden_size": hidden,
        "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_conv_kernel_dim": 4, "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": inner, "shared_expert_intermediate_size": 48,
        "vocab_size": 128, "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "tie_word_embeddings": false,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.5},
    });
    let random = RandomModel::of_config("config.json".as_ref(), config, None, Dialect::ModelOpt).unwrap();
    random.write(out, &|| ()).unwrap();
}

/// The same checkpoint with the experts of a layer in one tensor.
fn together(apart: &Path, out: &Path) {
    let from = TensorStore::open(apart).unwrap();
    let mut tensors: Vec<Pending<'_, QuantizeError>> = Vec::new();
    for name in from.names() {
        let view = from.peek(name).unwrap();
        let Some((experts, rest)) = name.split_once(".experts.") else {
            tensors.extend(Pending::copy(&from, name));
            continue;
        };
        let (fused, parts): (_, &[&str]) = match rest {
            "0.gate_proj.weight" => ("gate_up_proj", &["gate_proj", "up_proj"]),
            "0.down_proj.weight" => ("down_proj", &["down_proj"]),
            _ => continue,
        };
        let count = (0..).take_while(|e| from.contains(&format!("{experts}.experts.{e}.down_proj.weight"))).count();
        let all = (0..count).flat_map(|e| parts.iter().map(move |part| (e, part)));
        let of = |(e, part)| from.peek(&format!("{experts}.experts.{e}.{part}.weight")).unwrap().bytes;
        let bytes = all.map(of).collect::<Vec<_>>().concat();
        let shape = [count, view.shape[0] * parts.len(), view.shape[1]];
        tensors.push(Pending::new(format!("{experts}.experts.{fused}"), view.dtype, &shape, move || Ok(bytes.clone())));
    }
    let writer = FolderWriter::create(out).unwrap();
    writer.tensors(tensors, u64::MAX, &metadata([])).unwrap();
    writer.copy_settings(apart).unwrap();
    writer.commit().unwrap();
}

fn recipe(modules: &str, gptq: Option<Gptq>) -> Recipe {
    let rules = vec![Rule { modules: modules.into(), scheme: Scheme::Nvfp4 }];
    Recipe { name: "experts".into(), rules, gptq, ..Recipe::uniform(Scheme::Nvfp4) }
}

#[track_caller]
fn same_files(a: &Path, b: &Path) {
    let (ours, theirs) = (TensorStore::open(a).unwrap(), TensorStore::open(b).unwrap());
    assert_eq!(ours.names().collect::<Vec<_>>(), theirs.names().collect::<Vec<_>>());
    for name in ours.names() {
        let (a, b) = (ours.peek(name).unwrap(), theirs.peek(name).unwrap());
        assert_eq!((a.dtype, a.shape), (b.dtype, b.shape), "{name}");
        assert!(a.bytes == b.bytes, "{name}");
    }
}

#[test]
fn experts_in_one_tensor_are_the_model_that_they_are_one_by_one() {
    let root = tempfile::tempdir().unwrap();
    let mut pairs = Vec::new();
    // The first is as wide as its two halves together: which dimension is which, the shape does not say.
    for (hidden, inner) in [(64, 32), (96, 32)] {
        let [one, all] = ["apart", "together"].map(|name| root.path().join(format!("{name}{hidden}")));
        apart(&one, hidden, inner);
        together(&one, &all);
        pairs.push((one, all));
    }
    if let Some(fixture) = architecture_fixtures().iter().find(|f| f.name == "modelopt/qwen3_5_moe/bf16") {
        let all = root.path().join("fixture");
        together(&fixture.folder, &all);
        pairs.push((fixture.folder.clone(), all));
    }
    for (i, (one, all)) in pairs.iter().enumerate() {
        let [one, all] = [one, all].map(|folder| Checkpoint::open(folder).unwrap());
        assert!(all.tensors.names().any(|n| n.ends_with(".experts.gate_up_proj")));
        let ids: Vec<Vec<u32>> = vec![(0..24).map(|i| i * 37 % 120).collect(), (0..24).map(|i| i * 11 % 120).collect()];
        let packed = [&one, &all].map(|c| bits(&logits(&Decoder::load(cpu(2), c).unwrap(), &ids)));
        assert!(packed[0] == packed[1], "{i}");
        let plain = [&one, &all].map(|c| bits(&logits(&Decoder::load(AutogradBackend::new(), c).unwrap(), &ids)));
        assert!(plain[0] == plain[1], "{i}");

        // Quantized they are what the tools make: one by one; also where only some are.
        let text = CalibrationText { sequences: ids, description: "test".into() };
        let recipes = [recipe("*.mlp.experts.*", None), recipe("*.mlp.experts.1.*", None), recipe("*self_attn*", None)];
        for (r, recipe) in recipes.iter().enumerate() {
            let out = ["one", "all"].map(|name| root.path().join(format!("{name}-{i}-{r}")));
            for (source, out) in [&one, &all].iter().zip(&out) {
                let calibration = calibrated(source);
                quantize(source, &calibration, recipe, Dialect::ModelOpt, &Default::default(), None, out).unwrap();
            }
            if r < 2 {
                same_files(&out[0], &out[1]);
                assert_eq!(stated(&out[0]), stated(&out[1]));
            }
            let both = out.map(|out| {
                let written = Checkpoint::open(&out).unwrap();
                bits(&logits(&Decoder::load(cpu(2), &written).unwrap(), &text.sequences))
            });
            assert!(both[0] == both[1], "{i} {r}");
        }

        // Rounded on text, and what was rounded is kept: in the layout that it came in.
        let out = ["one", "all"].map(|name| root.path().join(format!("{name}-{i}-gptq")));
        let kept = ["one", "all"].map(|name| root.path().join(format!("{name}-{i}-kept")));
        for ((source, out), kept) in [&one, &all].iter().zip(&out).zip(&kept) {
            let places = Places { out, unrounded: Some(kept), measured: None, found: None };
            let recipe = recipe("*.mlp.experts.*", Some(Gptq::default()));
            apply(source, &cpu(2), &text, &recipe, Dialect::ModelOpt, places, &mut |_, _, _| {}).unwrap();
        }
        same_files(&out[0], &out[1]);
        let expected = root.path().join(format!("expected-{i}"));
        together(&kept[0], &expected);
        same_files(&kept[1], &expected);
    }
}

#[test]
fn a_tensor_of_another_shape_or_type_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let [one, all] = ["apart", "together"].map(|name| root.path().join(name));
    apart(&one, 96, 32);
    together(&one, &all);
    let refused = |change: &dyn Fn(&mut serde_json::Value)| {
        let file = all.join("config.json");
        let original = std::fs::read(&file).unwrap();
        let mut config = serde_json::from_slice(&original).unwrap();
        change(&mut config);
        std::fs::write(&file, config.to_string()).unwrap();
        let checkpoint = Checkpoint::open(&all).unwrap();
        let error = match ModelConfig::read(&checkpoint.config) {
            Ok(_) => Decoder::load(cpu(1), &checkpoint).map(drop).unwrap_err().to_string(),
            Err(e) => e.to_string(),
        };
        std::fs::write(&file, original).unwrap();
        error
    };
    let e = refused(&|c| c["num_experts"] = 5.into());
    assert!(e.contains("gate") && e.contains("[5, 96]"), "{e}");
    let e = refused(&|c| c["moe_intermediate_size"] = 16.into());
    assert!(e.contains("experts.gate_up_proj") && e.contains("[4, 32, 96]") && e.contains("[4, 64, 96]"), "{e}");
    let quantization =
        json!({"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head", "*attn*", "*shared*"]});
    let e = refused(&|c| c["quantization_config"] = quantization.clone());
    assert!(e.contains("experts.gate_up_proj") && e.contains("announces NVFP4"), "{e}");
}
