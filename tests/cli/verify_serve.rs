//! `recoup verify` against `recoup serve` of a checkpoint that is not the one it should be: what an engine that reads its weights
//! wrongly would answer, through the whole server.

use std::ops::Range;
use std::path::Path;

use serde_json::Value;

use crate::support::command::{BF16, Folder, NVFP4, copy_model, run, said, succeed};
use crate::support::http::Server;

const TEMPLATE: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
    {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// A shipped model, and a copy of it that is served instead.
fn two(shipped: &str) -> (Folder, String, String) {
    let folder = Folder::new();
    let [model, served] = ["m", "served"].map(|name| folder.model(name, shipped));
    for name in ["m", "served"] {
        folder.write(format!("{name}/chat_template.jinja"), TEMPLATE);
    }
    (folder, model, served)
}

/// Changes tensors of a checkpoint where they lie: `change` gets all bytes, and where a tensor's are.
fn change(model: &str, change: impl FnOnce(&mut [u8], &dyn Fn(&str) -> Range<usize>)) {
    let file = Path::new(model).join("model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    let data = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..data]).unwrap();
    let place = |name: &str| {
        let offsets = &header[name]["data_offsets"];
        let [from, to] = [0, 1].map(|i| data + offsets[i].as_u64().unwrap_or_else(|| panic!("no {name}")) as usize);
        from..to
    };
    change(&mut bytes, &place);
    std::fs::write(file, bytes).unwrap();
}

/// Gives a layer's gate the name of its up, and the other way round.
fn swap_gate_and_up(model: &str, layer: usize) {
    change(model, |bytes, place| {
        for part in ["weight", "weight_scale", "weight_scale_2", "input_scale"] {
            let [gate, up] = ["gate", "up"].map(|m| place(&format!("model.layers.{layer}.mlp.{m}_proj.{part}")));
            let of_gate = bytes[gate.clone()].to_vec();
            bytes.copy_within(up.clone(), gate.start);
            bytes[up].copy_from_slice(&of_gate);
        }
    });
}

/// The exit code and the report of `recoup serve` of `served`, which should serve `model`.
#[track_caller]
fn verified(served: &str, model: &str, more: &[&str]) -> (i32, Value) {
    verified_by(served, model, &[&["--longest", "120", "-n", "6"], more].concat())
}

#[track_caller]
fn verified_by(served: &str, model: &str, options: &[&str]) -> (i32, Value) {
    let server = Server::start(&[served]);
    let url = format!("http://{}", server.address);
    let out = run(&[&["verify", &url, model, "--json"], options].concat());
    server.is_well();
    let report = serde_json::from_slice(&out.stdout).unwrap_or_else(|e| panic!("{e}: {}", said(&out)));
    (out.status.code().unwrap(), report)
}

/// A fault that must be found, as the first thing and with these words.
#[track_caller]
fn found(served: &str, model: &str, kind: &str, words: &str, more: &[&str]) -> Value {
    let (code, report) = verified(served, model, more);
    let finding = &report["findings"][0];
    assert_eq!((code, &report["verdict"], &finding["kind"]), (3, &"differs".into(), &kind.into()), "{report:#}");
    assert!(finding["what"].as_str().unwrap().contains(words), "{finding:#}");
    report
}

#[test]
fn the_checkpoint_itself_is_the_same() {
    let (_folder, model, served) = two(NVFP4);
    let (code, report) = verified(&served, &model, &[]);
    assert_eq!((code, &report["verdict"]), (0, &"same".into()), "{report:#}");
    assert_eq!(report["server"]["way"], "prompt_logprobs");
    assert!(report["agreement"]["rms_exact"].as_f64().unwrap() < 1e-4, "{}", report["agreement"]);
}

#[test]
fn a_global_scale_that_is_wrong_is_found_in_its_layer() {
    let (_folder, model, served) = two(NVFP4);
    let module = "model.layers.4.mlp.down_proj";
    change(&served, |bytes, place| {
        let at = place(&format!("{module}.weight_scale_2"));
        let scale = f32::from_le_bytes(bytes[at.clone()].try_into().unwrap());
        bytes[at].copy_from_slice(&(3.0 * scale).to_le_bytes());
    });
    found(&served, &model, "scale", module, &[]);
}

#[test]
fn gate_and_up_that_were_swapped_are_found() {
    let (_folder, model, served) = two(NVFP4);
    swap_gate_and_up(&served, 7);
    found(&served, &model, "weights", "in layer 7", &[]);
}

#[test]
fn scales_of_the_cache_that_were_left_at_one_are_found() {
    let folder = Folder::new();
    let model = folder.model("m", BF16);
    let [quantized, served] = ["q", "s"].map(|name| folder.name(name));
    for out in [&quantized, &served] {
        succeed(&["quantize", &model, "-o", out, "--recipe", "nvfp4_kv_fp8", "--samples", "8"]);
    }
    change(&served, |bytes, place| {
        for (layer, which) in (0..12).flat_map(|layer| ["k", "v"].map(|which| (layer, which))) {
            let at = place(&format!("model.layers.{layer}.self_attn.{which}_proj.{which}_scale"));
            bytes[at].copy_from_slice(&1f32.to_le_bytes());
        }
    });
    found(&served, &quantized, "kv_cache", "scales of 1.0", &["--no-search"]);
}

#[test]
fn another_template_is_found() {
    let (folder, model, served) = two(NVFP4);
    folder.write("served/chat_template.jinja", TEMPLATE.replace("<|im_end|>\n{% endfor %}", "<|im_end|>{% endfor %}"));
    let report = found(&served, &model, "template", "", &[]);
    assert_eq!(report["log_probabilities_within"], true, "{report:#}");
}

#[test]
fn texts_that_do_not_get_their_beginning_are_found() {
    let (folder, model, served) = two(NVFP4);
    let mut tokenizer = folder.json("m/tokenizer.json");
    tokenizer["post_processor"] = serde_json::json!({"type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}}});
    folder.write("m/tokenizer.json", tokenizer.to_string());
    let config = r#"{"bos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}"#;
    for name in ["m", "served"] {
        folder.write(format!("{name}/tokenizer_config.json"), config);
    }
    let report = found(&served, &model, "bos", "missing on the server", &[]);
    assert_eq!(report["log_probabilities_within"], true, "{report:#}");
}

/// Four-bit activations make noise of almost a nat in this model, whatever rounds: a server that computes exactly what the checkpoint
/// says has to be one of many such, and a fault below the noise must show all the same. Needs `RECOUP_SMOLLM2_GGUF`, see
/// CONTRIBUTING.md.
#[test]
fn a_real_model_in_four_bits_is_itself_and_a_fault_below_its_noise_is_found() {
    let Some(gguf) = std::env::var_os("RECOUP_SMOLLM2_GGUF") else { return };
    let folder = Folder::new();
    let [plain, model, served] = ["plain", "m", "served"].map(|name| folder.name(name));
    succeed(&["convert", gguf.to_str().unwrap(), "-o", &plain]);
    succeed(&["quantize", &plain, "-o", &model, "--recipe", "nvfp4", "--samples", "32"]);
    copy_model(&model, Path::new(&served));
    let (code, report) = verified_by(&served, &model, &["--no-search"]);
    assert_eq!((code, &report["verdict"]), (0, &"same".into()), "{report:#}");
    assert!(report["agreement"]["rms_exact"].as_f64().unwrap() < 1e-3, "{}", report["agreement"]);

    swap_gate_and_up(&served, 12);
    let (code, report) = verified_by(&served, &model, &["--no-search"]);
    assert_eq!((code, &report["verdict"]), (3, &"differs".into()), "{report:#}");
}
