//! `recoup pretrain` as its users run it.
#![cfg(unix)] // It is held and killed.

use serde_json::json;

use super::recover::TEXT;
use crate::support::command::{BF16, Folder, assert_same_files, lines, recoup, succeed};
use crate::support::held::Held;
use crate::support::{json as read_json, json_lines, project};

/// A model from scratch learns, is resumed to the byte, and is a BF16 checkpoint that can be quantized.
#[test]
fn a_model_is_trained_from_scratch() {
    let folder = Folder::new();
    let model = project().join(BF16);
    folder.write("shape/tokenizer.json", std::fs::read(model.join("tokenizer.json")).unwrap());
    let mut config = read_json(&model.join("config.json"));
    for (key, value) in [("hidden_size", 32), ("intermediate_size", 64), ("num_hidden_layers", 2), ("head_dim", 16)] {
        config[key] = value.into();
    }
    config["num_attention_heads"] = 2.into();
    folder.write("shape/config.json", config.to_string());
    let args = |out: &str| {
        let (shape, out) = (folder.name("shape"), folder.name(out));
        let line = format!(
            "pretrain {shape} -o {out} --data {TEXT} --watch {TEXT} --settings steps=60,lr=1e-2,sequences=4,warmup=5 \
             --length 64 --evaluate-every 20 --watch-samples 4 --threads 2 --save-every 0"
        );
        line.split_whitespace().map(str::to_owned).collect::<Vec<String>>()
    };
    let (_, stderr) = succeed(&args("whole"));
    assert!(stderr.contains("cross-entropy on calibration"), "{stderr}");
    let curve = json_lines(&folder.at("whole/recoup_curve.jsonl"));
    let watched = curve.iter().filter(|e| e["event"] == "watched");
    let losses: Vec<f64> = watched.map(|e| e["loss"]["calibration"].as_f64().unwrap()).collect();
    assert!((losses[0] - 4096f64.ln()).abs() < 0.1, "it begins knowing nothing: {losses:?}");
    assert!(losses.last().unwrap() + 1.0 < losses[0], "{losses:?}");
    let mut parts = args("parts");
    parts.push("--resume".into());
    let mut killed = Held::start(recoup(&parts));
    killed.until(|| lines(&folder.at("parts.training/curve.jsonl")) > 12);
    killed.kill();
    succeed(&parts);
    assert_same_files(&folder.at("whole"), &folder.at("parts"));
    let quantized = folder.name("quantized");
    succeed(&["quantize", &folder.name("whole"), "-o", &quantized, "--recipe", "nvfp4"]);
    succeed(&["inspect", &quantized]);
}

/// Mamba-2, a mixture, attention and a feed-forward: trained, quantized, and recovered by both methods.
#[test]
fn a_hybrid_is_trained_quantized_and_recovered() {
    let folder = Folder::new();
    let model = project().join(BF16);
    folder.write("shape/tokenizer.json", std::fs::read(model.join("tokenizer.json")).unwrap());
    let shape = json!({
        "architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h", "hybrid_override_pattern": "ME*-",
        "hidden_size": 64, "vocab_size": 4096, "bos_token_id": 0, "eos_token_id": 0, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 96, "mlp_hidden_act": "relu2",
        "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 16, "conv_kernel": 4,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 48,
        "moe_shared_expert_intermediate_size": 48, "routed_scaling_factor": 2.5, "layer_norm_epsilon": 1e-5,
        "max_position_embeddings": 256, "tie_word_embeddings": false,
    });
    folder.write("shape/config.json", shape.to_string());
    let [shape, plain, quantized, recovered] = ["shape", "bf16", "nvfp4", "recovered"].map(|name| folder.name(name));
    let line = format!(
        "pretrain {shape} -o {plain} --data {TEXT} --watch {TEXT} --settings steps=60,lr=1e-2,sequences=4,warmup=5 \
         --length 64 --evaluate-every 60 --watch-samples 4 --threads 2"
    );
    succeed(&line.split_whitespace().collect::<Vec<_>>());
    succeed(&["quantize", &plain, "-o", &quantized, "--recipe", "nvfp4"]);
    let line = format!(
        "recover {quantized} --teacher {plain} --data {TEXT} --method block:steps=40 --method qad:steps=60,lr=1e-5 \
         --length 64 --watch-samples 32 --samples 256 --threads 2 -o {recovered}"
    );
    let (_, stderr) = succeed(&line.split_whitespace().collect::<Vec<_>>());
    let curve = json_lines(&folder.at("recovered/recoup_curve.jsonl"));
    let watched: Vec<f64> = curve
        .iter()
        .filter(|e| e["event"] == "watched")
        .map(|e| e["loss"].as_object().unwrap().values().map(|v| v.as_f64().unwrap()).sum())
        .collect();
    assert!(watched.last().unwrap() < &(0.85 * watched[0]), "{watched:?}\n{stderr}");
    succeed(&["run", &recovered, "-p", "The", "--max-tokens", "4"]);
}
