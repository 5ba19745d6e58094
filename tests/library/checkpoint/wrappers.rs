//! A text model inside of a wrapper, ModelOpt's configurations as its tools and NVIDIA write them: what is read
//! otherwise is told, what is contradictory is refused.

use super::hostile::{breaking, load, refused};
use crate::support::tiny::{FILE, Format, Tiny};
use recoup::checkpoint::Checkpoint;
use recoup::checkpoint::resolve::LinearRole;
use recoup::formats::linear::ActivationFormat;
use serde_json::{Value, json};
use tempfile::TempDir;

const UP: &str = "model.layers.1.mlp.up_proj";

fn changed(format: Format, change: impl FnOnce(&mut Tiny)) -> TempDir {
    let mut t = Tiny::new(format);
    change(&mut t);
    let folder = tempfile::tempdir().unwrap();
    t.write(folder.path());
    folder
}

fn logits(folder: &TempDir) -> Vec<f32> {
    load(folder.path()).unwrap_or_else(|e| panic!("{e}"))
}

fn notes(folder: &TempDir) -> String {
    Checkpoint::open(folder.path()).unwrap().notes.join("\n")
}

#[test]
fn a_text_model_in_a_wrapper_computes_what_it_computes_alone() {
    let expected = logits(&changed(Format::Nvfp4, |_| ()));
    for (key, prefix, head) in [
        ("text_config", "model.language_model.", ""),
        ("text_config", "language_model.model.", "language_model."),
        ("llm_config", "language_model.model.", "language_model."),
    ] {
        let folder = changed(Format::Nvfp4, |t| {
            t.wrap(key, prefix, head);
            t.push("vision_tower.patch.weight", "BF16", &[4], vec![0; 8]);
            t.push("mtp.fc.weight", "BF16", &[3, 2], vec![0; 12]);
        });
        assert_eq!(logits(&folder), expected, "{prefix}");
        let notes = notes(&folder);
        for needle in ["1 tensor(s) of `vision_tower.` (8 bytes)", "1 tensor(s) of `mtp.` (12 bytes)"] {
            assert!(notes.contains(needle), "`{needle}` is not in: {notes}");
        }
    }
}

#[test]
fn errors_name_the_keys_of_a_wrapped_configuration_where_they_stand() {
    let change = |t: &mut Tiny| {
        t.config["hidden_size"] = json!("many");
        t.wrap("text_config", "model.language_model.", "");
    };
    breaking(Format::Bf16, change, &["config.json", "`text_config.hidden_size`"]);
    let change = |t: &mut Tiny| {
        t.wrap("text_config", "model.language_model.", "");
        t.config["llm_config"] = json!({});
    };
    breaking(Format::Bf16, change, &["config.json", "`llm_config`", "nothing beside `text_config`"]);
    breaking(Format::Bf16, |t| t.config["text_config"] = json!([1]), &["config.json", "`text_config`", "an object"]);
}

#[test]
fn a_wrapper_may_tie_the_embeddings_for_its_text_model() {
    let folder = changed(Format::Bf16, |t| {
        t.config.as_object_mut().unwrap().remove("tie_word_embeddings");
        t.wrap("text_config", "model.language_model.", "");
        t.config["tie_word_embeddings"] = json!(true);
        t.remove("lm_head.weight");
    });
    assert!(!logits(&folder).is_empty());
}

#[test]
fn nemotron_h_is_read_as_backbone_whatever_it_stands_under() {
    for (root, head) in [
        ("backbone.", ""),
        ("model.", ""),
        ("", ""),
        ("language_model.backbone.", "language_model."),
        ("model.language_model.", "model.language_model."),
    ] {
        for exclude in
            ["layers.0.mixer.out_proj", "layers.0.mixer.o*", "layers.0.mixer.\u{0}backbone.pt_name_sentinel*"]
        {
            let excluded = json!([format!("{root}{exclude}"), format!("{head}lm_head"), "vision_model*"]);
            let folder = changed(Format::Nvfp4, |t| {
                t.tensors.clear();
                t.hf_quant_config = None;
                t.config = json!({"model_type": "nemotron_h", "quantization_config": {"quant_method": "modelopt",
                    "quant_algo": "NVFP4", "group_size": 16, "exclude_modules": excluded}});
                t.push(&format!("{root}layers.0.mixer.out_proj.weight"), "BF16", &[2, 16], vec![0; 64]);
                t.push(&format!("{root}embeddings.weight"), "BF16", &[2, 16], vec![0; 64]);
                t.push(&format!("{root}norm_f.weight"), "BF16", &[16], vec![0; 32]);
                t.push(&format!("{head}lm_head.weight"), "BF16", &[2, 16], vec![0; 64]);
            });
            let checkpoint = Checkpoint::open(folder.path()).unwrap();
            let names: Vec<&str> = checkpoint.tensors.names().collect();
            let expected = ["embeddings.weight", "layers.0.mixer.out_proj.weight", "norm_f.weight"];
            assert_eq!(names, [&expected.map(|e| format!("backbone.{e}"))[..], &["lm_head.weight".into()]].concat());
            let role = LinearRole { n: 2, k: 16, bias: false, may_be_plain: false };
            for module in ["backbone.layers.0.mixer.out_proj", "lm_head"] {
                checkpoint.linear(module, role).unwrap_or_else(|e| panic!("{root} {exclude}: {e}"));
            }
            let may_be_plain = LinearRole { may_be_plain: true, ..role };
            checkpoint.linear("backbone.embeddings", may_be_plain).unwrap();
        }
    }
}

#[test]
fn tensors_of_parts_that_nobody_listed_are_left_over() {
    for name in ["audio_tower.conv.weight", "model.audio.weight", "visually.weight", "model.mtp_head.weight"] {
        breaking(Format::Bf16, |t| t.push(name, "BF16", &[2], vec![0; 4]), &[FILE, name, "does not use"]);
    }
}

#[test]
fn a_layer_that_predicts_further_tokens_is_set_aside_if_it_is_announced() {
    let name = "model.layers.2.eh_proj.weight";
    let push = |t: &mut Tiny| t.push(name, "BF16", &[2], vec![0; 4]);
    let folder = changed(Format::Bf16, |t| {
        push(t);
        t.config["num_nextn_predict_layers"] = json!(1);
    });
    assert_eq!(logits(&folder), logits(&changed(Format::Bf16, |_| ())));
    assert!(notes(&folder).contains("1 tensor(s) of `model.layers.2.` (4 bytes)"));
    breaking(Format::Bf16, push, &[name, "`num_hidden_layers` is 2"]);
}

/// Of a checkpoint whose config.json and hf_quant_config.json are ModelOpt's.
fn modelopt(format: Format, change: impl Fn(&mut Value, &mut Value)) -> TempDir {
    changed(format, |t| {
        let mut separate = t.hf_quant_config.take().unwrap();
        change(&mut t.config["quantization_config"], &mut separate["quantization"]);
        t.hf_quant_config = Some(separate);
    })
}

#[test]
fn names_that_modelopt_047_broke_are_read_as_they_were_meant_and_told() {
    let broken = json!(["lm_head.\u{0}backbone.pt_name_sentinel", "model.embed_tokens.\u{0}x", "model.visual.\u{0}x*"]);
    let folder = modelopt(Format::Nvfp4, |q, s| {
        q["exclude_modules"] = broken.clone();
        s["exclude_modules"] = broken.clone();
    });
    assert_eq!(logits(&folder), logits(&changed(Format::Nvfp4, |_| ())));
    let told = notes(&folder);
    assert!(told.contains("3 module name(s) are broken") && told.contains("is read as `lm_head`"), "{told}");
    // The `*` behind the break is the pattern's.
    let layer = json!(["lm_head", "model.layers.1.mlp.\u{0}backbone.pt_name_sentinel*"]);
    let folder = modelopt(Format::Nvfp4, |q, s| {
        q["exclude_modules"] = layer.clone();
        s["exclude_modules"] = layer.clone();
    });
    refused(folder.path(), &["model.layers.1.mlp.gate_proj", "leaves this module unquantized"]);
}

/// NVFP4 said module by module.
fn layers(algorithm: &str) -> Value {
    let one = json!({"quant_algo": algorithm, "group_size": 16});
    json!({"model.layers.0": one, "model.layers.1.self_attn": one, "model.layers.1.mlp": one})
}

fn mixed(q: &mut Value) {
    q["quant_algo"] = json!("MIXED_PRECISION");
    q.as_object_mut().unwrap().remove("group_size");
}

#[test]
fn quantized_layers_may_stand_in_one_file_and_name_containers() {
    let expected = logits(&changed(Format::Nvfp4, |_| ()));
    for in_config in [true, false] {
        let folder = modelopt(Format::Nvfp4, |q, s| {
            mixed(q);
            mixed(s);
            let holder = if in_config { &mut *q } else { &mut *s };
            holder["quantized_layers"] = layers("NVFP4");
            // What config_groups say does not count beside them.
            q["config_groups"] =
                json!({"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float"}}});
        });
        assert_eq!(logits(&folder), expected, "{in_config}");
        // The algorithm too may stand in one file only.
        let folder = modelopt(Format::Nvfp4, |q, s| {
            for o in [&mut *q, &mut *s] {
                o.as_object_mut().unwrap().retain(|key, _| !["group_size", "quant_algo"].contains(&key.as_str()));
            }
            let holder = if in_config { q } else { s };
            mixed(holder);
            holder["quantized_layers"] = layers("NVFP4");
        });
        assert_eq!(logits(&folder), expected, "{in_config}");
    }
}

#[test]
fn quantized_layers_that_contradict_each_other_or_say_nothing_are_refused() {
    let folder = modelopt(Format::Nvfp4, |q, s| {
        mixed(q);
        mixed(s);
        q["quantized_layers"] = layers("NVFP4");
        s["quantized_layers"] = layers("FP8");
    });
    refused(
        folder.path(),
        &["hf_quant_config.json", "quantized_layers.model.layers.0.quant_algo", "NVFP4", "config.json"],
    );
    for none in [Value::Null, json!({})] {
        let folder = modelopt(Format::Nvfp4, |q, s| {
            mixed(q);
            mixed(s);
            q["quantized_layers"] = none.clone();
        });
        refused(folder.path(), &["config.json", "quantized_layers"]);
    }
}

#[test]
fn a_modules_own_entry_counts_before_its_containers() {
    let folder = modelopt(Format::Nvfp4, |q, s| {
        mixed(q);
        mixed(s);
        q["quantized_layers"] = layers("NVFP4");
        q["quantized_layers"][UP] = json!({"quant_algo": "FP8"});
    });
    refused(folder.path(), &[FILE, UP, "announces FP8", "stored as U8"]);
}

#[test]
fn an_input_scale_beside_weights_only_is_checked_and_not_used() {
    let weight_only = |t: &mut Tiny| {
        t.config["quantization_config"]["quant_algo"] = json!("W4A16_NVFP4");
        t.hf_quant_config = None;
    };
    let kept = changed(Format::Nvfp4, weight_only);
    let gone = changed(Format::Nvfp4, |t| {
        weight_only(t);
        t.tensors.retain(|t| !t.name.ends_with("input_scale"));
    });
    assert_eq!(logits(&kept), logits(&gone));
    let name = format!("{UP}.input_scale");
    let change = |t: &mut Tiny| {
        weight_only(t);
        t.set_f32(&name, 0.0);
    };
    breaking(Format::Nvfp4, change, &[FILE, &name, "positive"]);
}

#[test]
fn a_head_in_fp8_without_an_input_scale_is_weights_only() {
    let folder = changed(Format::Fp8, |t| {
        let (n, k) = (t.tensor("lm_head.weight").shape[0], t.tensor("lm_head.weight").shape[1]);
        t.remove("lm_head.weight");
        t.push("lm_head.weight", "F8_E4M3", &[n, k], (0..n * k).map(|i| (i % 0x40) as u8).collect());
        t.push("lm_head.weight_scale", "F32", &[], 0.1f32.to_le_bytes().into());
        t.hf_quant_config = None;
        t.config["quantization_config"]["exclude_modules"] = json!(["model.embed_tokens"]);
    });
    assert!(logits(&folder).iter().any(|v| *v != 0.0));
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let role = LinearRole { n: 40, k: 64, bias: false, may_be_plain: true };
    let head = checkpoint.linear("lm_head", role).unwrap();
    assert_eq!((head.activation, head.weight_format()), (ActivationFormat::Float, "fp8"));
}

#[test]
fn an_embedding_may_be_quantized_where_the_configuration_says_so() {
    let pack = |t: &mut Tiny| {
        t.remove("model.embed_tokens.weight");
        t.push("model.embed_tokens.weight", "U8", &[40, 32], (0..40 * 32).map(|i| (i * 7) as u8).collect());
        t.push("model.embed_tokens.weight_scale", "F8_E4M3", &[40, 4], vec![0x38; 160]);
        t.push("model.embed_tokens.weight_scale_2", "F32", &[], 0.1f32.to_le_bytes().into());
    };
    let said = |t: &mut Tiny| {
        pack(t);
        t.hf_quant_config = None;
        mixed(&mut t.config["quantization_config"]);
        t.config["quantization_config"]["quantized_layers"] = layers("NVFP4");
    };
    let folder = changed(Format::Nvfp4, |t| {
        said(t);
        let entry = json!({"quant_algo": "W4A16_NVFP4", "group_size": 16});
        t.config["quantization_config"]["quantized_layers"]["model.embed_tokens"] = entry;
    });
    assert!(logits(&folder).iter().any(|v| *v != 0.0));
    breaking(Format::Nvfp4, said, &[FILE, "model.embed_tokens", "leaves this module unquantized"]);
}
