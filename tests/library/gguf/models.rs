//! Whole models: every architecture's tensors, configuration and files.

use half::bf16;
use recoup::gguf;
use serde_json::json;
use tempfile::TempDir;

use crate::support::gguf::writer::{Gguf, Meta};
use crate::support::gguf::{Model, Sizes, TINY, f32_bytes, import, tensors};
use crate::support::path_from;

fn assert_tensors(model: &Model) -> crate::support::gguf::Imported {
    let imported = import(&model.file);
    let report = imported.result.as_ref().unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(report.tensors, model.expected.len());
    let found = tensors(&imported.out().join("model.safetensors"));
    assert_eq!(found.keys().collect::<Vec<_>>(), model.expected.keys().collect::<Vec<_>>());
    for (name, (shape, values)) in &model.expected {
        let rounded: Vec<bf16> = values.iter().map(|v| bf16::from_f32(*v)).collect();
        assert_eq!(&found[name], &(shape.clone(), rounded), "{name}");
    }
    imported
}

#[test]
fn a_llama_model_becomes_a_hugging_face_folder_with_its_heads_in_order() {
    let imported = assert_tensors(&Model::new("llama", TINY, false, true));
    let config = imported.json("config.json");
    let expected = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 260, "hidden_size": 24,
        "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 8, "hidden_act": "silu", "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0, "tie_word_embeddings": true, "attention_bias": false, "mlp_bias": false,
        "attention_dropout": 0.0, "bos_token_id": 257, "eos_token_id": 257, "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    });
    assert_eq!(config, expected);
    // The end of the turn is found by its name, and stops generation with the end of the text.
    assert_eq!(imported.json("generation_config.json"), json!({"bos_token_id": 257, "eos_token_id": [257, 258]}));
    let report = imported.result.as_ref().unwrap();
    assert_eq!((report.architecture.as_str(), report.name.as_deref()), ("llama", Some("Tiny")));
    assert_eq!(report.bytes, 2 * report.parameters);
    assert_eq!(report.source_types["F32"], report.tensors);
}

#[test]
fn an_output_projection_of_its_own_becomes_lm_head() {
    let imported = assert_tensors(&Model::new("llama", TINY, false, false));
    assert_eq!(imported.json("config.json")["tie_word_embeddings"], false);
}

#[test]
fn biases_of_a_llama_model_are_put_in_order_too() {
    let imported = assert_tensors(&Model::new("llama", TINY, true, true));
    assert_eq!(imported.json("config.json")["attention_bias"], true);
}

#[test]
fn a_sliding_window_makes_a_llama_model_a_mistral() {
    let mut model = Model::new("llama", TINY, false, true);
    model.file.set("llama.attention.sliding_window", Meta::U32(4096));
    let config = assert_tensors(&model).json("config.json");
    assert_eq!((&config["model_type"], &config["sliding_window"]), (&json!("mistral"), &json!(4096)));
}

#[test]
fn biases_in_the_ffn_are_kept_where_the_model_has_them_and_refused_where_not() {
    let mut model = Model::new("llama", TINY, false, true);
    for layer in 0..TINY.layers {
        for (from, to, rows) in [
            ("ffn_gate", "gate_proj", TINY.ffn),
            ("ffn_up", "up_proj", TINY.ffn),
            ("ffn_down", "down_proj", TINY.hidden),
        ] {
            let values: Vec<f32> = (0..rows).map(|i| (i + layer) as f32).collect();
            model.file.add(&format!("blk.{layer}.{from}.bias"), &[rows as u64], 0, f32_bytes(&values));
            model.expected.insert(format!("model.layers.{layer}.mlp.{to}.bias"), (vec![rows], values));
        }
    }
    assert_eq!(assert_tensors(&model).json("config.json")["mlp_bias"], true);
    // Mistral, which it is with a window, has none.
    model.file.set("llama.attention.sliding_window", Meta::U32(4096));
    let error = import(&model.file).error();
    assert!(error.contains("6 tensor(s)") && error.contains("blk.0.ffn_down.bias"), "{error}");
}

#[test]
fn a_qwen2_model_keeps_its_rows_and_biases() {
    let config = assert_tensors(&Model::new("qwen2", TINY, true, true)).json("config.json");
    assert_eq!(config["architectures"], json!(["Qwen2ForCausalLM"]));
    assert_eq!(config["use_sliding_window"], false);
}

#[test]
fn a_qwen2_model_without_biases_is_refused() {
    let error = import(&Model::new("qwen2", TINY, false, true).file).error();
    assert!(error.contains("`blk.0.attn_q.bias` is missing"), "{error}");
}

#[test]
fn a_qwen3_model_keeps_its_head_norms() {
    let config = assert_tensors(&Model::new("qwen3", TINY, false, true)).json("config.json");
    assert_eq!((&config["model_type"], &config["head_dim"]), (&json!("qwen3"), &json!(8)));
}

#[test]
fn fused_experts_become_one_matrix_per_expert() {
    let sizes = Sizes { experts: 4, ..TINY };
    let config = assert_tensors(&Model::new("qwen3moe", sizes, false, false)).json("config.json");
    assert_eq!(config["model_type"], "qwen3_moe");
    assert_eq!(config["num_experts"], 4);
    assert_eq!(config["num_experts_per_tok"], 2);
    assert_eq!(config["moe_intermediate_size"], 16);
    assert_eq!(config["norm_topk_prob"], true);
}

/// Llama 3's divisors as `convert_hf_to_gguf.py` computes them, in f32.
fn llama3_factors(factor: f32, low: f32, high: f32, original: f32) -> Vec<f32> {
    (0..TINY.head_dim / 2)
        .map(|i| {
            let wavelength = std::f32::consts::TAU * 500_000f32.powf(2.0 * i as f32 / TINY.head_dim as f32);
            let smooth = ((original / wavelength - low) / (high - low)).clamp(0.0, 1.0);
            1.0 / ((1.0 - smooth) / factor + smooth)
        })
        .collect()
}

#[test]
fn the_table_of_llama_3_frequencies_is_recognised_and_another_is_refused() {
    let mut model = Model::new("llama", TINY, false, true);
    model.file.add("rope_freqs.weight", &[4], 0, f32_bytes(&llama3_factors(8.0, 1.0, 4.0, 8192.0)));
    let config = assert_tensors(&model).json("config.json");
    let expected = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192});
    assert_eq!(config["rope_scaling"], expected);

    model.file.tensor("rope_freqs.weight").data = f32_bytes(&[1.0, 3.0, 2.0, 8.0]);
    let error = import(&model.file).error();
    assert!(error.contains("rope_freqs.weight") && error.contains("do not follow Llama 3's rule"), "{error}");
    // A table of ones changes nothing.
    model.file.tensor("rope_freqs.weight").data = f32_bytes(&[1.0; 4]);
    assert!(assert_tensors(&model).json("config.json").get("rope_scaling").is_none());
}

#[test]
fn linear_and_yarn_scaling_are_written_as_transformers_names_them() {
    let mut model = Model::new("qwen2", TINY, true, true);
    let yarn = Meta::Str("yarn".into());
    model.file.set("qwen2.rope.scaling.type", yarn).set("qwen2.rope.scaling.factor", Meta::F32(4.0));
    let error = import(&model.file).error();
    assert!(error.contains("qwen2.rope.scaling.original_context_length"), "{error}");
    model.file.set("qwen2.rope.scaling.original_context_length", Meta::U32(128));
    let expected = json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128});
    assert_eq!(assert_tensors(&model).json("config.json")["rope_scaling"], expected);
    // As convert_hf_to_gguf writes `attention_factor`, `beta_fast` and `beta_slow`.
    for (name, value) in [("yarn_attn_factor", 1.25), ("yarn_beta_fast", 16.0), ("yarn_ext_factor", 1.0)] {
        model.file.set(&format!("qwen2.rope.scaling.{name}"), Meta::F32(value));
    }
    let scaling = assert_tensors(&model).json("config.json")["rope_scaling"].clone();
    assert_eq!((&scaling["attention_factor"], &scaling["beta_fast"]), (&json!(1.25), &json!(16.0)));
    model.file.set("qwen2.rope.scaling.yarn_ext_factor", Meta::F32(0.5));
    assert!(import(&model.file).error().contains("yarn_ext_factor"));
    for name in ["yarn_attn_factor", "yarn_beta_fast", "yarn_ext_factor"] {
        model.file.remove(&format!("qwen2.rope.scaling.{name}"));
    }
    model.file.set("qwen2.rope.scaling.attn_factor", Meta::F32(2.0));
    let scaling = assert_tensors(&model).json("config.json")["rope_scaling"].clone();
    assert_eq!(scaling["attention_factor"], json!(2.0 * (0.1 * 4f64.ln() + 1.0)));
    model.file.remove("qwen2.rope.scaling.attn_factor");
    model.file.set("qwen2.rope.scaling.type", Meta::Str("linear".into()));
    let expected = json!({"rope_type": "linear", "factor": 4.0});
    assert_eq!(assert_tensors(&model).json("config.json")["rope_scaling"], expected);
    model.file.set("qwen2.rope.scaling.type", Meta::Str("longrope".into()));
    assert!(import(&model.file).error().contains("unknown rope scaling `longrope`"));
}

#[test]
fn a_model_above_the_limit_is_written_in_shards_that_add_up() {
    let model = Model::new("llama", TINY, false, false);
    let folder = TempDir::new().unwrap();
    let (path, out) = (folder.path().join("m.gguf"), folder.path().join("deep/down/out"));
    std::fs::write(&path, model.file.bytes()).unwrap();
    let mut calls = Vec::new();
    let mut progress = |done: usize, total: usize, name: &str| calls.push((done, total, name.to_owned()));
    let report = gguf::import_sharded(&path, &out, 6000, &mut progress).unwrap();
    assert!(report.shards > 2, "{}", report.shards);
    assert_eq!(calls.len(), report.tensors);
    assert_eq!(calls.last().map(|c| (c.0, c.1)), Some((report.tensors, report.tensors)));
    assert_eq!(calls.first().map(|c| c.2.as_str()), Some("model.embed_tokens.weight"));

    let index: serde_json::Value =
        serde_json::from_slice(&std::fs::read(out.join("model.safetensors.index.json")).unwrap()).unwrap();
    assert_eq!(index["metadata"]["total_size"], report.bytes);
    let map = index["weight_map"].as_object().unwrap();
    assert_eq!(map.len(), model.expected.len());
    let mut seen = 0;
    for shard in 1..=report.shards {
        let name = format!("model-{shard:05}-of-{:05}.safetensors", report.shards);
        let found = tensors(&out.join(&name));
        let bytes: usize = found.values().map(|(_, v)| 2 * v.len()).sum();
        assert!(bytes <= 6000 || found.len() == 1, "{name}: {bytes} bytes");
        for (tensor, (_, values)) in found {
            assert_eq!(map[&tensor], name);
            let expected: Vec<bf16> = model.expected[&tensor].1.iter().map(|v| bf16::from_f32(*v)).collect();
            assert_eq!(values, expected, "{tensor}");
            seen += 1;
        }
    }
    assert_eq!(seen, model.expected.len());
}

#[test]
fn an_output_folder_with_something_in_it_is_left_alone() {
    let model = Model::new("llama", TINY, false, true);
    let folder = TempDir::new().unwrap();
    let (path, out) = (folder.path().join("m.gguf"), folder.path().join("out"));
    std::fs::write(&path, model.file.bytes()).unwrap();
    std::fs::create_dir(&out).unwrap();
    std::fs::write(out.join("mine"), "precious").unwrap();
    let error = gguf::import(&path, &out, &mut |_, _, _| {}).unwrap_err().to_string();
    assert!(error.contains("not empty"), "{error}");
    assert_eq!(std::fs::read_to_string(out.join("mine")).unwrap(), "precious");
    // An empty folder is as good as none.
    std::fs::remove_file(out.join("mine")).unwrap();
    gguf::import(&path, &out, &mut |_, _, _| {}).unwrap();
    assert!(out.join("model.safetensors").is_file());
    // A file of that name is not replaced.
    let file = folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    assert!(gguf::import(&path, &file, &mut |_, _, _| {}).unwrap_err().to_string().contains("no folder"));
}

#[test]
fn an_import_that_fails_half_way_leaves_nothing_behind() {
    let mut model = Model::new("llama", TINY, false, true);
    let norm = model.file.tensor("output_norm.weight");
    norm.data[..4].copy_from_slice(&f32::NAN.to_le_bytes());
    let imported = import(&model.file);
    let error = imported.error();
    assert!(error.contains("`output_norm.weight`") && error.contains("NaN"), "{error}");
    let left: Vec<_> = std::fs::read_dir(imported.folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["model.gguf"]);
}

#[test]
fn a_value_that_rounds_to_infinity_is_refused() {
    let mut model = Model::new("llama", TINY, false, true);
    model.file.tensor("output_norm.weight").data[..4].copy_from_slice(&f32::MAX.to_le_bytes());
    assert!(import(&model.file).error().contains("no finite BF16 number"));
}

#[test]
fn smollm2_equals_a_conversion_by_other_tools_bit_for_bit() {
    let (Some(gguf), Some(reference)) = (path_from("RECOUP_SMOLLM2_GGUF"), path_from("RECOUP_SMOLLM2_BF16")) else {
        return;
    };
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("out");
    let report = gguf::import(&gguf, &out, &mut |_, _, _| {}).unwrap();
    assert_eq!((report.tensors, report.parameters), (272, 134_515_008));
    let (ours, theirs) = (tensors(&out.join("model.safetensors")), tensors(&reference.join("model.safetensors")));
    assert_eq!(ours.keys().collect::<Vec<_>>(), theirs.keys().collect::<Vec<_>>());
    for (name, (shape, values)) in &theirs {
        assert_eq!(&ours[name].0, shape, "{name}");
        let differs = values.iter().zip(&ours[name].1).position(|(a, b)| a.to_bits() != b.to_bits());
        assert_eq!(differs, None, "{name}");
    }
    let read = |folder: &std::path::Path| crate::support::json(&folder.join("config.json"));
    let (ours, theirs) = (read(&out), read(&reference));
    for key in [
        "architectures",
        "model_type",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "rms_norm_eps",
        "tie_word_embeddings",
        "attention_bias",
        "mlp_bias",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    ] {
        assert_eq!(ours[key], theirs[key], "{key}");
    }
}

/// NVFP4 blocks of 64 whose values a second scale multiplies; `codes` by formula.
fn nvfp4_blocks(count: usize) -> Vec<u8> {
    (0..count * 36).map(|i| if i % 36 < 4 { 0x38 + (i % 5) as u8 } else { (i * 29 % 251) as u8 }).collect()
}

/// The values of such blocks, by the format's definition.
fn nvfp4_values(blocks: &[u8], scale: f32) -> Vec<f32> {
    const E2M1: [f32; 16] = [0., 0.5, 1., 1.5, 2., 3., 4., 6., 0., -0.5, -1., -1.5, -2., -3., -4., -6.];
    let mut out = Vec::new();
    for block in blocks.chunks(36) {
        for i in 0..64 {
            let (group, at) = (i / 16, i % 16);
            let byte = block[4 + group * 8 + at % 8];
            let code = if at < 8 { byte & 15 } else { byte >> 4 };
            // E4M3 codes 0x38 to 0x3c: 1 to 1.5 in eighths.
            let own = 1.0 + f32::from(block[group] - 0x38) / 8.0;
            out.push(own * E2M1[usize::from(code)] * scale);
        }
    }
    out
}

#[test]
fn nvfp4_weights_are_multiplied_by_their_second_scale_and_input_scales_are_left_out() {
    let sizes = Sizes { layers: 1, hidden: 64, ffn: 64, heads: 8, kv_heads: 4, head_dim: 8, experts: 0 };
    for name in ["blk.0.ffn_up.scale", "blk.0.ffn_up.weight.scale"] {
        let mut model = Model::new("qwen3", sizes, false, true);
        let blocks = nvfp4_blocks(64);
        let tensor = model.file.tensor("blk.0.ffn_up.weight");
        (tensor.tag, tensor.data) = (40, blocks.clone());
        model.file.add(name, &[1], 0, f32_bytes(&[0.3]));
        model.file.add("blk.0.ffn_up.input_scale", &[1], 0, f32_bytes(&[0.01]));
        model.expected.insert("model.layers.0.mlp.up_proj.weight".into(), (vec![64, 64], nvfp4_values(&blocks, 0.3)));
        let imported = assert_tensors(&model);
        let report = imported.result.as_ref().unwrap();
        assert_eq!(report.source_types["NVFP4"], 1);
        let notes = report.notes.join("\n");
        assert!(notes.contains("1 tensors have a second scale") && notes.contains("1 scales of inputs"), "{notes}");
    }
    let mut model = Model::new("qwen3", sizes, false, true);
    for bad in [0.0, -1.0, f32::NAN] {
        model.file.tensors.retain(|t| t.name != "blk.0.ffn_up.scale");
        model.file.add("blk.0.ffn_up.scale", &[1], 0, f32_bytes(&[bad]));
        let error = import(&model.file).error();
        assert!(error.contains("`blk.0.ffn_up.scale`") && error.contains("positive"), "{error}");
    }
}

#[test]
fn experts_have_a_second_scale_each() {
    let sizes = Sizes { experts: 4, ..TINY };
    let mut model = Model::new("qwen3moe", sizes, false, true);
    let scales = [0.5, 1.0, 2.0, 0.25];
    model.file.add("blk.0.ffn_up_exps.scale", &[4], 0, f32_bytes(&scales));
    for (expert, scale) in scales.iter().enumerate() {
        let name = format!("model.layers.0.mlp.experts.{expert}.up_proj.weight");
        model.expected.get_mut(&name).unwrap().1.iter_mut().for_each(|v| *v *= scale);
    }
    assert_tensors(&model);
}

/// The parts of a split model as llama-gguf-split writes them: metadata in the first, tensors in all.
fn split(model: &Model, count: usize) -> Vec<Gguf> {
    let total = model.file.tensors.len();
    let parts = (0..count).map(|i| {
        let mut part = if i == 0 { model.file.clone() } else { Gguf::new() };
        part.tensors = model.file.tensors[total * i / count..total * (i + 1) / count].to_vec();
        part.set("split.no", Meta::U32(i as u32)).set("split.count", Meta::U32(count as u32));
        part.set("split.tensors.count", Meta::U32(total as u32));
        part
    });
    parts.collect()
}

#[test]
fn the_parts_of_a_split_model_are_joined_whichever_is_given() {
    let model = Model::new("llama", TINY, false, true);
    let folder = tempfile::TempDir::new().unwrap();
    let path = |i: usize| folder.path().join(format!("tiny-{:05}-of-00003.gguf", i + 1));
    for (i, part) in split(&model, 3).iter().enumerate() {
        std::fs::write(path(i), part.bytes()).unwrap();
    }
    let whole = import(&model.file);
    let expected = std::fs::read(whole.out().join("model.safetensors")).unwrap();
    for given in 0..3 {
        let out = folder.path().join(format!("out{given}"));
        recoup::gguf::import(&path(given), &out, &mut |_, _, _| {}).unwrap();
        assert!(std::fs::read(out.join("model.safetensors")).unwrap() == expected, "{given}");
    }
    let refused = |given: &std::path::Path| {
        let out = folder.path().join("refused");
        recoup::gguf::import(given, &out, &mut |_, _, _| {}).unwrap_err().to_string()
    };
    let renamed = folder.path().join("tiny.gguf");
    std::fs::copy(path(0), &renamed).unwrap();
    let error = refused(&renamed);
    assert!(error.contains("part 1 of 3") && error.contains("-00001-of-00003.gguf"), "{error}");
    // A part of another split under this one's name.
    std::fs::write(path(1), split(&model, 2)[1].bytes()).unwrap();
    assert!(refused(&path(0)).contains("split.count"));
    std::fs::remove_file(path(2)).unwrap();
    std::fs::write(path(1), split(&model, 3)[1].bytes()).unwrap();
    let error = refused(&path(0));
    assert!(error.contains("tiny-00003-of-00003.gguf") && error.contains("missing"), "{error}");
}
