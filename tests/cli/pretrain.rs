//! `recoup pretrain` as its users run it.
#![cfg(unix)] // It is held and killed.

use super::recover::TEXT;
use crate::support::command::{BF16, Folder, assert_same_files, lines, recoup, succeed};
use crate::support::held::Held;
use crate::support::{json, json_lines, project};

/// A model from scratch learns, is resumed to the byte, and is a BF16 checkpoint that can be quantized.
#[test]
fn a_model_is_trained_from_scratch() {
    let folder = Folder::new();
    let model = project().join(BF16);
    folder.write("shape/tokenizer.json", std::fs::read(model.join("tokenizer.json")).unwrap());
    let mut config = json(&model.join("config.json"));
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
