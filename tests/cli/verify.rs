//! `recoup verify` against engines that are sound and engines with planted faults: sound ones pass in every way to ask, and
//! each fault is found and named.

use std::path::Path;

use serde_json::Value;

use crate::support::command::{BF16, Folder, NVFP4, run, said, succeed};
use crate::support::engine_server::{Fault, Protocol, start};
use crate::support::{json, project};

const TEMPLATE: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
    {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// A shipped model with a chat template.
fn model(shipped: &str) -> (Folder, String) {
    let folder = Folder::new();
    let model = folder.model("m", shipped);
    folder.write("m/chat_template.jinja", TEMPLATE);
    (folder, model)
}

/// The exit code and the report of a server with `fault` that should serve `model`.
#[track_caller]
fn verified(model: &str, protocol: Protocol, fault: Fault, more: &[&str]) -> (i32, Value) {
    let url = start(Path::new(model), protocol, fault);
    let words = ["verify", &url, model, "--json", "--longest", "120"];
    let few: &[&str] = if more.contains(&"-n") { &[] } else { &["-n", "6"] };
    let out = run(&[&words[..], few, more].concat());
    let report = serde_json::from_slice(&out.stdout).unwrap_or_else(|e| panic!("{e}: {}", said(&out)));
    (out.status.code().unwrap(), report)
}

fn kinds(report: &Value) -> Vec<&str> {
    report["findings"].as_array().unwrap().iter().map(|f| f["kind"].as_str().unwrap()).collect()
}

/// A fault that must be found, as the first thing and with these words.
#[track_caller]
fn found(model: &str, fault: Fault, kind: &str, words: &str, more: &[&str]) -> Value {
    let (code, report) = verified(model, Protocol::Vllm, fault, more);
    let finding = &report["findings"][0];
    assert_eq!((code, &report["verdict"], &finding["kind"]), (3, &"differs".into(), &kind.into()), "{report:#}");
    assert!(finding["what"].as_str().unwrap().contains(words), "{finding:#}");
    report
}

#[test]
fn a_sound_engine_passes_in_every_way_to_ask() {
    let (_folder, model) = model(NVFP4);
    for (protocol, way, ids) in [
        (Protocol::Vllm, "prompt_logprobs", true),
        (Protocol::Echo, "echo", false),
        (Protocol::Sglang, "generate", true),
        (Protocol::LlamaCpp, "completion", true),
    ] {
        let (code, report) = verified(&model, protocol, Fault::None, &[]);
        assert_eq!((code, &report["verdict"]), (0, &"same".into()), "{report:#}");
        assert_eq!((&report["server"]["way"], &report["server"]["prompts_as_ids"]), (&way.into(), &ids.into()));
        let agreement = &report["agreement"];
        let tokens = agreement["tokens"].as_u64().unwrap();
        assert!(tokens > if protocol == Protocol::LlamaCpp { 40 } else { 500 }, "{agreement}");
        let number = |name: &str| agreement[name].as_f64().unwrap();
        assert!(number("within") > 0.98 * tokens as f64, "{agreement}");
        // The same library on both sides.
        assert!(number("rms_exact") < 1e-4, "{agreement}");
        // A computation that rounds nothing is no farther from those that do than they are from each other.
        assert!(number("rms") < number("allowed") && number("noise") > 1e-3, "{agreement}");
        // Quantized inputs: any rounding is as good as any other.
        assert!(report["tolerance"]["growth"].as_f64().unwrap() < 0.5, "{}", report["tolerance"]);
        assert!(report["least_seen"].as_f64().unwrap() < number("noise"), "{agreement}");
    }
}

#[test]
fn a_server_without_log_probabilities_is_no_verdict() {
    let (_folder, model) = model(NVFP4);
    let url = start(Path::new(&model), Protocol::Mute, Fault::None);
    let out = run(&["verify", &url, &model]);
    assert_eq!(out.status.code(), Some(1));
    let said = said(&out);
    for part in ["gives no log-probabilities", "prompt_logprobs of /v1/completions: ", "--logits_all true"] {
        assert!(said.contains(part), "{part}: {said}");
    }
}

#[test]
fn a_wrong_scale_is_found_in_its_layer() {
    let (folder, model) = model(NVFP4);
    let module = "model.layers.4.mlp.down_proj";
    let output = folder.name("report.json");
    let report = found(&model, Fault::Scale(module, 3.0), "scale", module, &["-o", &output]);
    assert_eq!(json(Path::new(&output)), report);
    let what = report["findings"][0]["what"].as_str().unwrap();
    let factor: f64 = what.split("that is ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
    assert!((2.7..3.3).contains(&factor), "{what}");
    assert!(report["parting"]["position"].as_u64().unwrap() > 0);
}

#[test]
fn another_checkpoint_of_the_same_shape_is_no_noise() {
    let (_folder, model) = model(NVFP4);
    // The same model, recovered or never quantized: as far apart as noise is large.
    for served in ["models/books-nvfp4-qad", "models/books-bf16"] {
        let served = start(&project().join(served), Protocol::Vllm, Fault::None);
        let out = run(&["verify", &served, &model, "--json", "--no-search", "-n", "6"]);
        let report: Value = serde_json::from_slice(&out.stdout).unwrap();
        assert_eq!((out.status.code(), &report["log_probabilities_within"]), (Some(3), &false.into()), "{report:#}");
        assert!(!kinds(&report).is_empty(), "{}", report["findings"]);
    }
}

#[test]
fn the_text_says_what_would_have_been_seen() {
    for (shipped, chaos) in [(NVFP4, true), (BF16, false)] {
        let (_folder, model) = model(shipped);
        let url = start(Path::new(&model), Protocol::Vllm, Fault::None);
        let out = run(&["verify", &url, &model, "--longest", "60", "-n", "4"]);
        assert_eq!(out.status.code(), Some(0), "{}", said(&out));
        let text = String::from_utf8(out.stdout).unwrap();
        let power = text.lines().find(|l| l.starts_with("power")).unwrap();
        assert!(power.contains("would have been seen"), "{power}");
        assert_eq!(power.contains("flips codes"), chaos, "{power}");
    }
}

#[test]
fn gate_and_up_taken_for_each_other_are_found_in_one_layer_and_in_all() {
    let (_folder, model) = model(NVFP4);
    found(&model, Fault::GateUp(None), "weights", "in every layer", &[]);
    found(&model, Fault::GateUp(Some(7)), "weights", "in layer 7", &[]);
}

#[test]
fn inputs_that_are_not_quantized_are_found() {
    let (_folder, model) = model(NVFP4);
    found(&model, Fault::FloatInputs, "activations", "does not quantize inputs", &["--no-search"]);
}

#[test]
fn a_cache_without_its_scales_is_found() {
    let (folder, model) = model(BF16);
    let quantized = folder.name("q");
    succeed(&["quantize", &model, "-o", &quantized, "--recipe", "nvfp4_kv_fp8", "--samples", "8"]);
    found(&quantized, Fault::UnitCache, "kv_cache", "scales of 1.0", &["--no-search"]);
    let (code, report) = verified(&quantized, Protocol::Vllm, Fault::None, &["--no-search"]);
    assert_eq!(code, 0, "{report:#}");
}

#[test]
fn a_window_that_is_ignored_is_found_where_it_begins() {
    let (folder, model) = model(BF16);
    let mut config = folder.json("m/config.json");
    config["architectures"] = serde_json::json!(["MistralForCausalLM"]);
    config["model_type"] = "mistral".into();
    config["sliding_window"] = 32.into();
    folder.write("m/config.json", config.to_string());
    let report = found(&model, Fault::NoWindow, "window", "ignores the sliding window", &["--no-search"]);
    assert!(report["parting"]["position"].as_u64().unwrap() > 30, "{}", report["parting"]);
}

#[test]
fn texts_without_their_beginning_are_told_from_wrong_numbers() {
    let (folder, model) = model(NVFP4);
    let mut tokenizer = folder.json("m/tokenizer.json");
    tokenizer["post_processor"] = serde_json::json!({"type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}}});
    folder.write("m/tokenizer.json", tokenizer.to_string());
    folder.write(
        "m/tokenizer_config.json",
        r#"{"bos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}"#,
    );
    let report = found(&model, Fault::NoBeginning, "bos", "missing on the server", &[]);
    assert_eq!((kinds(&report), &report["log_probabilities_within"]), (vec!["bos"], &true.into()), "{report:#}");
    // Where the server gives numbers of tokens only.
    let (code, report) = verified(&model, Protocol::Echo, Fault::NoBeginning, &[]);
    assert_eq!((code, kinds(&report)), (3, vec!["bos"]), "{report:#}");
    assert_eq!(report["log_probabilities_within"], true);
}

#[test]
fn another_template_is_found() {
    let (_folder, model) = model(NVFP4);
    let report = found(&model, Fault::Template, "template", "here `<|im_start|>", &[]);
    assert_eq!((kinds(&report), &report["log_probabilities_within"]), (vec!["template"], &true.into()));
}

#[test]
fn log_probabilities_after_a_temperature_or_in_the_wrong_place_are_found() {
    let (_folder, model) = model(NVFP4);
    found(&model, Fault::Temperature(0.7), "sampling", "a temperature of 0.70", &["--no-search"]);
    found(&model, Fault::Late, "shift", "from the logits after it", &["--no-search"]);
}

#[test]
fn a_penalty_that_nobody_asked_for_is_found() {
    let (_folder, model) = model(NVFP4);
    found(&model, Fault::Penalty, "sampling", "chose a less probable token", &["-n", "16"]);
}

#[test]
fn kernels_of_single_tokens_are_told_from_those_of_prompts() {
    let (_folder, model) = model(NVFP4);
    let fault = Fault::Decoding("model.layers.2.mlp.down_proj", 4.0);
    found(&model, fault, "decoding", "says of prompts agrees", &["--no-search", "-n", "16"]);
}
