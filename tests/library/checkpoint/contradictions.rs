//! Checkpoints whose files say different things, or say something in an unusual way: what counts is computed and what
//! differs is told by name, or the model is refused.

use std::path::Path;

use crate::support::command;
use crate::support::fixtures::{self, FP8_KV_BOUND, Fixture, bits, cpu, deviation, shared_folder};
use crate::support::tiny::{FILE, Format, INDEX, Tiny};
use recoup::checkpoint::Checkpoint;
use recoup::model::{Decoder, ModelConfig, consistency};
use serde_json::{Value, json};
use tempfile::TempDir;

fn logits(folder: &Path, sequences: &[Vec<u32>]) -> Result<Vec<f32>, String> {
    let checkpoint = Checkpoint::open(folder).map_err(|e| e.to_string())?;
    let decoder = Decoder::load(cpu(1), &checkpoint).map_err(|e| e.to_string())?;
    Ok(fixtures::logits(&decoder, sequences))
}

/// Bits of the logits of a few tokens.
fn few(folder: &Path) -> Vec<u32> {
    bits(&logits(folder, &[vec![3, 1, 4, 1, 5]]).unwrap_or_else(|e| panic!("{e}")))
}

/// Everything that is told of a checkpoint, or why it is refused.
fn told(folder: &Path) -> Result<String, String> {
    let read = || {
        let checkpoint = Checkpoint::open(folder)?;
        let config = ModelConfig::read(&checkpoint.config)?.untied_where_stored(&checkpoint)?;
        consistency::notes(&checkpoint, &config)
    };
    let notes = read().map_err(|e| e.to_string())?;
    Ok([notes.important, notes.minor].concat().join("\n"))
}

fn written(t: &Tiny) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    t.write(folder.path());
    folder
}

fn changed(format: Format, change: impl FnOnce(&mut Tiny)) -> TempDir {
    let mut t = Tiny::new(format);
    change(&mut t);
    written(&t)
}

/// A BF16 checkpoint with these keys of config.json.
fn configured(keys: Value) -> TempDir {
    changed(Format::Bf16, |t| keys.as_object().unwrap().iter().for_each(|(k, v)| t.config[k] = v.clone()))
}

#[track_caller]
fn says(folder: &TempDir, needles: &[&str]) {
    let notes = told(folder.path()).unwrap();
    needles.iter().for_each(|n| assert!(notes.contains(n), "`{n}` is not in: {notes}"));
}

#[track_caller]
fn refused(folder: &TempDir, needles: &[&str]) {
    let message = logits(folder.path(), &[vec![1]]).map(|_| ()).expect_err("the checkpoint loaded");
    needles.iter().for_each(|n| assert!(message.contains(n), "`{n}` is not in: {message}"));
}

// Positions.

#[test]
fn logits_under_every_rope_scaling_are_those_of_transformers() {
    // transformers 5.24 in f32 on tests/fixtures/transformers/llama_rope_llama3 with other RoPE settings: the first eight
    // logits of the last token of the second sequence.
    let yarn = json!({"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, "beta_fast": 8,
        "beta_slow": 0.5, "mscale": 1.0, "mscale_all_dim": 0.7, "truncate": false, "rope_theta": 10000.0});
    let linear = [0.028987, -0.418032, -0.461694, 0.423977, -0.191707, -0.778195, 0.087826, -0.88752];
    let cases = [
        (
            json!({"rope_theta": 10000.0,
                "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}}),
            [0.32894, -0.609479, -0.098802, 0.306852, -0.221249, -0.851203, -0.080262, -0.459656],
        ),
        (
            json!({"rope_parameters": yarn}),
            [0.210968, -0.656032, -0.215995, 0.168506, -0.177568, -0.902438, 0.124559, -0.405546],
        ),
        (json!({"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 4.0}}), linear),
        (
            json!({"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
                "rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
            linear,
        ),
        (
            json!({"rope_theta": 10000.0, "rope_scaling": {"type": "dynamic", "factor": 4.0}}),
            [0.186704, -0.513525, -0.441385, 0.252774, -0.180136, -0.80688, 0.181968, -0.661973],
        ),
    ];
    let fixture = Fixture::own("transformers/llama_rope_llama3");
    let ids = fixture.input_ids();
    for (keys, expected) in cases {
        let folder = tempfile::tempdir().unwrap();
        std::fs::copy(fixture.folder.join(FILE), folder.path().join(FILE)).unwrap();
        let text = std::fs::read_to_string(fixture.folder.join("config.json")).unwrap();
        let mut config: Value = serde_json::from_str(&text).unwrap();
        config.as_object_mut().unwrap().remove("rope_parameters");
        keys.as_object().unwrap().iter().for_each(|(k, v)| config[k] = v.clone());
        std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        let all = logits(folder.path(), &ids).unwrap();
        let vocab = config["vocab_size"].as_u64().unwrap() as usize;
        let got = &all[all.len() - vocab..][..8];
        assert!(deviation(got, &expected) < 1e-5, "{keys}: {got:?}");
    }
}

#[test]
fn a_sequence_beyond_what_dynamic_scaling_is_computed_for_is_refused() {
    let folder = configured(json!({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}));
    assert!(logits(folder.path(), &[vec![1; 64]]).is_ok());
    let long = std::panic::catch_unwind(|| logits(folder.path(), &[vec![1; 65]]));
    let message = *long.unwrap_err().downcast::<String>().unwrap();
    assert!(message.contains("65 tokens") && message.contains("64 at most"), "{message}");
}

// config.json against itself.

#[test]
fn architectures_and_model_type_must_name_the_same_model() {
    refused(&configured(json!({"model_type": "qwen2"})), &["`model_type`", "LlamaForCausalLM", "qwen2"]);
    refused(
        &configured(json!({"architectures": ["LlamaForCausalLM", "MistralForCausalLM"]})),
        &["`architectures`", "MistralForCausalLM"],
    );
    says(&configured(json!({"model_type": "my_llama"})), &["`model_type` is not used", "my_llama"]);
    let folder = configured(json!({"model_type": "llama"}));
    assert_eq!(told(folder.path()).unwrap(), "");
    assert_eq!(few(folder.path()), few(written(&Tiny::new(Format::Bf16)).path()));
}

#[test]
fn settings_of_windows_that_contradict_each_other_are_told_or_refused() {
    let qwen = |keys: Value| {
        changed(Format::Bf16, |t| {
            t.config["architectures"] = json!(["Qwen2ForCausalLM"]);
            for layer in 0..2 {
                for (name, n) in [("q", 64), ("k", 32), ("v", 32)] {
                    t.push(&format!("model.layers.{layer}.self_attn.{name}_proj.bias"), "BF16", &[n], vec![0; 2 * n]);
                }
            }
            keys.as_object().unwrap().iter().for_each(|(k, v)| t.config[k] = v.clone());
        })
    };
    // 0 that is not used is how some write that there is none.
    let plain = few(qwen(json!({})).path());
    assert_eq!(few(qwen(json!({"sliding_window": 0, "use_sliding_window": false})).path()), plain);
    assert_eq!(few(qwen(json!({"sliding_window": 2, "use_sliding_window": false})).path()), plain);
    let sliding = json!({"sliding_window": 2, "use_sliding_window": true, "max_window_layers": 0});
    assert_ne!(few(qwen(sliding).path()), plain);
    // By default Qwen's first 28 layers attend fully.
    assert_eq!(few(qwen(json!({"sliding_window": 2, "use_sliding_window": true})).path()), plain);
    refused(&qwen(json!({"sliding_window": 0, "use_sliding_window": true})), &["`sliding_window`"]);
    let kinds = json!(["full_attention", "sliding_attention"]);
    refused(&qwen(json!({"layer_types": kinds})), &["`layer_types`", "there is no window"]);
    refused(&qwen(json!({"layer_types": ["full_attention"]})), &["`layer_types`", "2 layers"]);
    let both = json!({"sliding_window": 2, "use_sliding_window": true, "layer_types": kinds, "max_window_layers": 0});
    says(&qwen(both), &["`max_window_layers` is not used"]);
    says(&configured(json!({"sliding_window": 4})), &["`sliding_window` is not used", "Llama"]);
    says(&qwen(json!({"attention_bias": false})), &["`attention_bias` is not used"]);
    // Mistral's class has a window of 4096 where the key is absent; null is none.
    let mistral = |keys: Value| {
        let folder = configured(json!({"architectures": ["MistralForCausalLM"]}));
        let c = Checkpoint::open(folder.path()).unwrap().config.value().clone();
        let mut c = c.as_object().unwrap().clone();
        c.extend(keys.as_object().unwrap().clone());
        std::fs::write(folder.path().join("config.json"), Value::from(c).to_string()).unwrap();
        let config = ModelConfig::read(&Checkpoint::open(folder.path()).unwrap().config).unwrap();
        config.attentions().into_iter().map(|(_, _, a)| a.window).collect::<Vec<_>>()
    };
    assert_eq!(mistral(json!({})), [Some(4096); 2]);
    assert_eq!(mistral(json!({"sliding_window": null})), [None; 2]);
}

#[test]
fn numbers_of_layers_and_a_head_that_is_not_there_are_named() {
    refused(&configured(json!({"num_hidden_layers": 1})), &["layers.1.", "`num_hidden_layers` is 1"]);
    refused(&configured(json!({"num_hidden_layers": 3})), &["`num_hidden_layers`", "2", "found 3"]);
    refused(
        &changed(Format::Bf16, |t| t.remove("lm_head.weight")),
        &["`lm_head.weight` is missing", "tie_word_embeddings"],
    );
}

#[test]
fn types_of_weights_are_told_where_they_differ() {
    says(&configured(json!({"torch_dtype": "float16"})), &["`torch_dtype` is float16", "bfloat16"]);
    says(&configured(json!({"dtype": "float32", "torch_dtype": "bfloat16"})), &["`dtype` is float32", "`torch_dtype`"]);
    assert_eq!(told(configured(json!({"torch_dtype": "bfloat16"})).path()).unwrap(), "");
}

#[test]
fn numbers_that_only_python_writes_and_whole_floats_are_read() {
    let folder = configured(json!({"hidden_size": 64.0, "num_attention_heads": 4.0, "time_step_limit": "HERE"}));
    let file = folder.path().join("config.json");
    let text = std::fs::read_to_string(&file).unwrap().replace("\"HERE\"", "[0.0, Infinity, NaN]");
    std::fs::write(&file, text).unwrap();
    assert_eq!(few(folder.path()), few(written(&Tiny::new(Format::Bf16)).path()));
}

// The tokenizer and generation_config.json.

#[test]
fn tokens_that_files_disagree_about_are_told() {
    let with = |tokens: Value, settings: Value, generation: Value| {
        let folder = configured(json!({"bos_token_id": 0}));
        let vocab = json!({"model": {"type": "BPE", "vocab": tokens, "merges": [["a", "b"]]},
            "added_tokens": [{"id": 2, "content": "<end>", "special": true}]});
        std::fs::write(folder.path().join("tokenizer.json"), vocab.to_string()).unwrap();
        std::fs::write(folder.path().join("tokenizer_config.json"), settings.to_string()).unwrap();
        std::fs::write(folder.path().join("generation_config.json"), generation.to_string()).unwrap();
        folder
    };
    let fits = json!({"a": 0, "b": 1, "z": 39});
    let good = with(fits.clone(), json!({"eos_token": "b"}), json!({"eos_token_id": [1, 2]}));
    assert_eq!(told(good.path()).unwrap(), "");
    says(
        &with(json!({"a": 0, "b": 41}), json!({}), json!({})),
        &["1 tokens that the model has no row for", "41 (\"b\")"],
    );
    says(&with(json!({"a": 0, "b": 1}), json!({}), json!({})), &["knows 3 ids of the 40"]);
    let other = with(fits.clone(), json!({"eos_token": {"content": "<end>"}}), json!({"eos_token_id": 7}));
    says(&other, &["`eos_token_id` is 1 in config.json and 7 for generation_config.json", "and 2 for the tokenizer"]);
    says(&with(fits.clone(), json!({}), json!({"eos_token_id": [1, 99]})), &["`eos_token_id` 99 is outside"]);
    says(&with(fits, json!({"model_max_length": 32}), json!({})), &["`model_max_length`", "32", "64"]);
}

// Files against each other.

#[test]
fn a_single_file_goes_before_an_index_and_what_is_not_read_is_told() {
    let t = Tiny::new(Format::Bf16);
    let folder = tempfile::tempdir().unwrap();
    let mut other = t.clone();
    other.tensor("lm_head.weight").bytes.fill(0);
    other.write_sharded(folder.path(), 2);
    t.write(folder.path());
    assert_eq!(few(folder.path()), few(written(&t).path()));
    says(&folder, &[INDEX, "model.safetensors lies beside it and is read", "2 shards"]);
    // As it remains where shards were merged.
    std::fs::remove_file(folder.path().join("model-00001-of-00002.safetensors")).unwrap();
    assert_eq!(few(folder.path()), few(written(&t).path()));
    says(&folder, &["model-00002-of-00002.safetensors not read"]);
}

#[test]
fn shards_may_lie_in_folders_and_hold_a_tensor_twice_if_it_is_the_same() {
    let t = Tiny::new(Format::Bf16);
    let expected = few(written(&t).path());
    let folder = tempfile::tempdir().unwrap();
    let index = t.write_sharded(folder.path(), 2);
    let respelled = |prefix: &str| {
        let text = index.to_string().replace("model-0", &format!("{prefix}model-0"));
        std::fs::write(folder.path().join(INDEX), text).unwrap();
    };
    respelled("./");
    assert_eq!(few(folder.path()), expected);
    std::fs::create_dir(folder.path().join("shards")).unwrap();
    for i in 1..=2 {
        let name = format!("model-0000{i}-of-00002.safetensors");
        std::fs::rename(folder.path().join(&name), folder.path().join("shards").join(&name)).unwrap();
    }
    respelled("shards/");
    assert_eq!(few(folder.path()), expected);

    let last = |contents: u8| {
        let mut twice = t.tensors[t.tensors.len() / 2..].to_vec();
        let mut again = t.tensors[0].clone();
        again.bytes[0] ^= contents;
        twice.push(again);
        let bytes = Tiny::file(&Tiny::header(&twice).to_string(), &Tiny::data(&twice));
        std::fs::write(folder.path().join("shards/model-00002-of-00002.safetensors"), bytes).unwrap();
    };
    last(0);
    assert_eq!(few(folder.path()), expected);
    says(&folder, &["`model.embed_tokens.weight` is also in", "the same in every byte"]);
    last(1);
    refused(&folder, &["`model.embed_tokens.weight` is also in", "other contents"]);
}

#[test]
fn a_decoder_under_another_prefix_is_read_and_told() {
    let expected = few(written(&Tiny::new(Format::Nvfp4)).path());
    for prefix in ["", "model.language_model.", "language_model.model."] {
        let folder = changed(Format::Nvfp4, |t| {
            for tensor in &mut t.tensors {
                if let Some(rest) = tensor.name.strip_prefix("model.") {
                    tensor.name = format!("{prefix}{rest}");
                } else if prefix.starts_with("language_model.") {
                    tensor.name = format!("language_model.{}", tensor.name);
                }
            }
        });
        assert_eq!(few(folder.path()), expected, "{prefix:?}");
        says(&folder, &["not under `model.`", &format!("`{prefix}embed_tokens.weight` is read as")]);
    }
}

#[test]
fn a_tied_model_may_store_its_table_under_the_heads_name_only() {
    let tied = |name: &str| {
        changed(Format::Bf16, |t| {
            t.remove("lm_head.weight");
            t.tensor("model.embed_tokens.weight").name = name.into();
            t.config["tie_word_embeddings"] = json!(true);
        })
    };
    let folder = tied("lm_head.weight");
    assert_eq!(few(folder.path()), few(tied("model.embed_tokens.weight").path()));
    says(&folder, &["ties it to `lm_head.weight`"]);
}

#[test]
fn rotary_frequencies_that_are_stored_and_differ_are_told() {
    let stored = |theta: f32| {
        let folder = changed(Format::Bf16, |t| {
            let bytes = (0..8).flat_map(|i| theta.powf(-(i as f32) / 8.0).to_le_bytes()).collect();
            t.push("model.layers.0.self_attn.rotary_emb.inv_freq", "F32", &[8], bytes);
        });
        assert_eq!(few(folder.path()), few(written(&Tiny::new(Format::Bf16)).path()));
        told(folder.path()).unwrap()
    };
    assert_eq!(stored(10_000.0), "");
    assert!(stored(20_000.0).contains("rotary_emb.inv_freq` differs from the frequencies"));
}

// Descriptions of the quantization.

#[test]
fn two_descriptions_of_a_quantization_must_agree() {
    let modelopt = |format: Format, change: fn(&mut Value, &mut Value)| {
        changed(format, |t| {
            let mut separate = t.hf_quant_config.take().unwrap();
            change(&mut t.config["quantization_config"], &mut separate["quantization"]);
            t.hf_quant_config = Some(separate);
        })
    };
    refused(&modelopt(Format::Nvfp4, |_, s| s["quant_algo"] = json!("FP8")), &["quant_algo", "NVFP4", "FP8"]);
    refused(&modelopt(Format::Nvfp4, |_, s| s["quant_algo"] = Value::Null), &["quant_algo", "NVFP4", "null"]);
    refused(&modelopt(Format::Nvfp4, |_, s| s["group_size"] = json!(32)), &["group_size", "16", "32"]);
    refused(
        &modelopt(Format::Nvfp4, |q, _| q["config_groups"] = json!({"g": {"weights": {"num_bits": 8}}})),
        &["config_groups.g.weights.num_bits", "4", "NVFP4"],
    );
    says(&modelopt(Format::Nvfp4, |_, s| s["exclude_modules"] = json!(["lm_head", "x"])), &["excludes `x`"]);
    // Stored scales decide between the two; without any nothing does.
    let quiet = |_: &mut Value, s: &mut Value| s["kv_cache_quant_algo"] = Value::Null;
    let folder = modelopt(Format::Fp8, quiet);
    says(&folder, &["kv_cache_quant_algo", "the other configuration file does"]);
    assert_eq!(few(folder.path()), few(written(&Tiny::new(Format::Fp8)).path()));
    let neither = changed(Format::Fp8, |t| {
        t.tensors.retain(|t| !t.name.ends_with("k_scale") && !t.name.ends_with("v_scale"));
        quiet(&mut Value::Null, &mut t.hf_quant_config.as_mut().unwrap()["quantization"]);
    });
    refused(&neither, &["kv_cache_quant_algo", "no scale of it is stored"]);
    let mixed = changed(Format::CtNvfp4, |t| {
        t.hf_quant_config = Some(json!({"quantization": {"quant_algo": "NVFP4"}}));
    });
    refused(&mixed, &["hf_quant_config.json", "compressed-tensors"]);
    let old = changed(Format::CtNvfp4, |t| t.config["compression_config"] = json!({"quant_method": "fp8"}));
    refused(&old, &["compression_config", "quantization_config"]);
}

#[test]
fn scales_must_be_powers_of_two_where_the_configuration_says_so() {
    let scale = |value: f32, name: &str| {
        changed(Format::DeepSeek, |t| {
            t.config["quantization_config"]["scale_fmt"] = json!(name);
            for tensor in t.tensors.iter_mut().filter(|t| t.name.ends_with("weight_scale_inv")) {
                tensor.bytes.chunks_exact_mut(4).for_each(|b| b.copy_from_slice(&value.to_le_bytes()));
            }
        })
    };
    let expected = few(scale(0.125, "float").path());
    assert_eq!(few(scale(0.125, "ue8m0").path()), expected);
    says(&scale(0.125, "ue8m0"), &["scale_fmt"]);
    refused(&scale(0.375, "ue8m0"), &["weight_scale_inv`", "0.375", "no power of two", "scale_fmt"]);
    refused(&scale(0.125, "e5m2"), &["quantization_config.scale_fmt"]);
    // As transformers stores them under that setting.
    let bytes = changed(Format::DeepSeek, |t| {
        t.config["quantization_config"]["scale_fmt"] = json!("ue8m0");
        for tensor in t.tensors.iter_mut().filter(|t| t.name.ends_with("weight_scale_inv")) {
            tensor.dtype = "F8_E8M0";
            tensor.bytes = vec![124; tensor.bytes.len() / 4];
        }
    });
    assert_eq!(few(bytes.path()), expected);
}

#[test]
fn a_block_structure_may_be_a_string() {
    let folder = changed(Format::CtFp8Block, |t| {
        t.config["quantization_config"]["config_groups"]["group_0"]["weights"]["block_structure"] = json!("128x128");
    });
    assert_eq!(few(folder.path()), few(written(&Tiny::new(Format::CtFp8Block)).path()));
}

// The KV cache.

/// A BF16 model under this description, with KV scales of 0.02 and 0.03 named by `names`.
fn kv_only(names: Option<[&str; 2]>, describe: impl FnOnce(&mut Tiny)) -> TempDir {
    changed(Format::Bf16, |t| {
        for layer in 0..2 {
            for (name, value) in names.iter().flatten().zip([0.02f32, 0.03]) {
                let name = format!("model.layers.{layer}.self_attn.{name}");
                t.push(&name, "F32", &[], value.to_le_bytes().to_vec());
            }
        }
        describe(t);
    })
}

const NESTED: [&str; 2] = ["k_proj.k_scale", "v_proj.v_scale"];
const FLAT: [&str; 2] = ["k_scale", "v_scale"];

fn compressed(groups: Value) -> impl Fn(&mut Tiny) {
    move |t| {
        t.config["quantization_config"] = json!({"quant_method": "compressed-tensors", "format": "dense", "ignore": [],
            "kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": false},
            "config_groups": groups});
    }
}

fn separate(algorithm: Option<&str>, kv: Option<&str>) -> impl Fn(&mut Tiny) {
    let q = json!({"quantization": {"quant_algo": algorithm, "kv_cache_quant_algo": kv}});
    move |t| t.hf_quant_config = Some(q.clone())
}

#[test]
fn a_checkpoint_may_quantize_its_kv_cache_only() {
    // A group that matches nothing was always read.
    let fp8 = json!({"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": false});
    let stand_in = json!({"group_0": {"targets": ["re:^nothing$"], "weights": fp8}});
    let expected = few(kv_only(Some(FLAT), compressed(stand_in)).path());
    let plain = few(written(&Tiny::new(Format::Bf16)).path());
    assert_ne!(expected, plain);
    for folder in [
        kv_only(Some(FLAT), compressed(json!({}))),
        kv_only(Some(FLAT), compressed(Value::Null)),
        kv_only(Some(NESTED), compressed(json!({}))),
        kv_only(
            Some(FLAT),
            compressed(json!({"g": {"targets": ["Linear"], "weights": null, "input_activations": null}})),
        ),
        kv_only(Some(NESTED), separate(None, Some("FP8"))),
        kv_only(Some(NESTED), |t| {
            t.config["quantization_config"] = json!({"quant_method": "modelopt", "quant_algo": null,
                "kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": false}});
        }),
    ] {
        assert_eq!(few(folder.path()), expected);
    }
    // Neither weights nor cache: what ModelOpt leaves beside a model that it did not quantize.
    for folder in [
        kv_only(None, separate(None, None)),
        kv_only(None, |t| t.config["quantization_config"] = json!({"quant_method": "modelopt", "quant_algo": null})),
        kv_only(None, |t| {
            t.config["quantization_config"] = json!({"quant_method": "compressed-tensors", "config_groups": {}});
        }),
    ] {
        assert_eq!(few(folder.path()), plain);
    }
    let inputs = json!({"g": {"targets": ["Linear"], "weights": null, "input_activations": fp8}});
    refused(&kv_only(Some(FLAT), compressed(inputs)), &["config_groups.g.weights"]);
    refused(&kv_only(Some(NESTED), separate(None, None)), &["k_scale", "no configuration announces one"]);
}

#[test]
fn a_quantized_kv_cache_alone_is_taken_away_by_convert_and_refused_by_quantize() {
    let recoup = |args: &[&str]| {
        let run = command::run(args);
        (run.status.success(), String::from_utf8(run.stderr).unwrap())
    };
    for names in [NESTED, FLAT] {
        let folder = kv_only(Some(names), compressed(json!({})));
        let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
        let (model, plain, out) = (folder.path().to_str().unwrap(), at("plain"), at("out"));
        let (ok, said) = recoup(&["quantize", model, "-o", &out, "--recipe", "fp8_pc_pt"]);
        assert!(!ok && said.contains("KV cache is quantized;"), "{said}");
        let (ok, said) = recoup(&["convert", model, "-o", &plain]);
        assert!(ok, "{said}");
        assert_eq!(few(Path::new(&plain)), few(written(&Tiny::new(Format::Bf16)).path()));
    }
}

#[test]
fn an_fp8_cache_without_any_scale_has_scales_of_one_and_says_so() {
    let without = |keep: fn(&str) -> bool| {
        changed(Format::Fp8, |t| {
            t.tensors
                .retain(|t| !t.name.ends_with("_proj.k_scale") && !t.name.ends_with("_proj.v_scale") || keep(&t.name))
        })
    };
    let folder = without(|_| false);
    let ones = changed(Format::Fp8, |t| {
        for layer in 0..2 {
            for name in NESTED {
                t.set_f32(&format!("model.layers.{layer}.self_attn.{name}"), 1.0);
            }
        }
    });
    assert_eq!(few(folder.path()), few(ones.path()));
    assert_ne!(few(folder.path()), few(written(&Tiny::new(Format::Fp8)).path()));
    says(&folder, &["no scale of it is stored", "1.0"]);
    refused(
        &without(|n| n.contains("layers.0.")),
        &["model.layers.1.self_attn.k_proj.k_scale` is missing", "other scales"],
    );
    refused(&without(|n| n.ends_with("k_scale")), &["v_proj.v_scale` is missing"]);
    // One for both, as older files have it.
    let both = kv_only(Some(["kv_scale", "x"]), |t| {
        t.tensors.retain(|t| !t.name.ends_with(".x"));
        separate(None, Some("FP8"))(t);
    });
    assert_ne!(few(both.path()), few(written(&Tiny::new(Format::Bf16)).path()));
}

#[test]
fn modelopts_cast_of_the_kv_cache_gives_the_logits_it_gives_when_deployed() {
    let folder = shared_folder().join("fixtures-models/modelopt/llama/nvfp4_kv_cast");
    if !folder.is_dir() {
        println!("skipped: {} does not exist", folder.display());
        return;
    }
    let fixture = Fixture { name: "modelopt/llama/nvfp4_kv_cast".into(), folder };
    let got = logits(&fixture.folder, &fixture.input_ids()).unwrap();
    let apart = deviation(&got, &fixture.golden_logits());
    println!("{apart:.2e}");
    assert!(apart < FP8_KV_BOUND, "{apart}");
}
