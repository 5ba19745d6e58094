//! Configurations that say too little, too much or the impossible: each is refused by the name of the key, and nothing is
//! taken for something else.

use std::path::Path;

use recoup::checkpoint::json::Object;
use recoup::model::ModelConfig;
use serde_json::{Map, Value, json};

use crate::support::fixtures::architecture_fixtures;

fn read(config: &Value) -> Result<ModelConfig, String> {
    let object = Object::of(Path::new("config.json"), config.clone()).unwrap();
    ModelConfig::read(&object).map_err(|e| e.to_string())
}

/// Configurations of every architecture at hand, one of each.
fn configurations() -> Vec<(String, Map<String, Value>)> {
    let mut found: Vec<(String, Map<String, Value>)> = Vec::new();
    for fixture in architecture_fixtures() {
        let config = fixture.checkpoint().config.value().as_object().unwrap().clone();
        let name = format!("{:?}", read(&Value::Object(config.clone())).unwrap().architecture);
        if found.iter().all(|(n, _)| *n != name) {
            found.push((name, config));
        }
    }
    assert!(found.len() >= 5);
    found
}

fn with(config: &Map<String, Value>, keys: Value) -> Value {
    let mut config = config.clone();
    config.extend(keys.as_object().unwrap().clone());
    Value::Object(config)
}

/// `config` with `keys` is refused, and the message names each of `words`.
fn refused(what: &str, config: &Map<String, Value>, keys: Value, words: &[&str]) {
    let error = read(&with(config, keys.clone())).expect_err(&format!("{what}: {keys} is taken"));
    for word in words {
        assert!(error.contains(word), "{what}: {keys}: {error}");
    }
}

#[test]
fn a_key_of_another_type_or_out_of_every_range_is_named() {
    for (name, config) in configurations() {
        let mut numbers = 0;
        // An empty list of ids is one, and a factor may be of any size.
        let other = |key: &str| key.ends_with("_token_id") || key == "query_pre_attn_scalar";
        for (key, value) in config.iter().filter(|(key, _)| !other(key)) {
            let taken: Vec<Value> = match value {
                Value::Number(n) if n.as_u64().is_some_and(|n| n > 0) => {
                    vec![json!("x"), json!(-1), json!(1e30), json!([])]
                }
                Value::Bool(_) => vec![json!("yes"), json!(1)],
                _ => continue,
            };
            for other in taken {
                let read = read(&with(&config, json!({key.as_str(): other})));
                // What is read is judged; what is not changes nothing.
                match read {
                    Ok(same) => assert_eq!(same, self::read(&Value::Object(config.clone())).unwrap(), "{name}: {key}"),
                    Err(e) => {
                        assert!(e.contains(&format!("`{key}`")), "{name}: {key} = {other}: {e}");
                        numbers += 1;
                    }
                }
            }
        }
        assert!(numbers >= 20, "{name}: only {numbers} are refused");
    }
}

#[test]
fn a_missing_key_is_a_stated_default_or_named() {
    for (name, config) in configurations() {
        let mut named = 0;
        for key in config.keys() {
            let mut less = config.clone();
            less.remove(key);
            if let Err(e) = read(&Value::Object(less)) {
                assert!(e.contains('`'), "{name} without {key}: {e}");
                named += 1;
            }
        }
        assert!(named >= 3, "{name}: only {named} keys are needed");
    }
}

#[test]
fn zeros_and_numbers_that_do_not_divide_never_reach_a_kernel() {
    for (name, config) in configurations() {
        for key in config.keys().filter(|k| config[*k].is_u64()) {
            for n in [0u64, 1, 2, 3, 5, 7, 1000, 1 << 20] {
                // Whatever is taken can be laid out: no panic, no division by zero.
                if let Ok(config) = read(&with(&config, json!({key.as_str(): n}))) {
                    let (modules, vectors) = (config.modules(), config.vectors());
                    assert!(modules.iter().all(|m| m.role.n > 0 && m.role.k > 0), "{name}: {key} = {n}");
                    assert!(vectors.iter().all(|(_, shape)| shape.iter().all(|d| *d > 0)), "{name}: {key} = {n}");
                    let _ = (config.cache_values(), config.state_values(), config.plain());
                }
            }
        }
    }
}

#[test]
fn contradictions_of_a_hybrid_are_named() {
    let (_, config) = configurations().into_iter().find(|(n, _)| n == "NemotronH").unwrap();
    let layers = read(&Value::Object(config.clone())).unwrap().layers.len();
    let refused = |keys, words: &[&str]| refused("NemotronH", &config, keys, words);
    refused(json!({"hybrid_override_pattern": "MX"}), &["`hybrid_override_pattern`", "M (Mamba-2)"]);
    refused(json!({"hybrid_override_pattern": ""}), &["`hybrid_override_pattern`"]);
    refused(json!({"hybrid_override_pattern": null, "layers_block_type": ["mamba", "conv"]}), &["`layers_block_type`"]);
    refused(
        json!({"hybrid_override_pattern": "MM", "layers_block_type": ["mamba", "mlp"], "num_hidden_layers": 2}),
        &["`hybrid_override_pattern`", "layers_block_type"],
    );
    refused(json!({"num_hidden_layers": layers + 1}), &["`num_hidden_layers`", &layers.to_string()]);
    refused(json!({"n_groups": 4}), &["`n_groups`", "mamba_num_heads"]);
    refused(json!({"mlp_hidden_act": "silu"}), &["`mlp_hidden_act`", "relu2"]);
    refused(json!({"time_step_limit": [1.0]}), &["`time_step_limit`"]);
    refused(json!({"time_step_limit": [2.0, 1.0]}), &["`time_step_limit`"]);
    refused(json!({"sliding_window": 8}), &["`sliding_window`"]);
}

#[test]
fn contradictions_of_other_architectures_are_named() {
    let all = configurations();
    let of = |name: &str| all.iter().find(|(n, _)| n == name).map(|(_, c)| c);
    let check = |name: &str, keys: Value, words: &[&str]| match of(name) {
        Some(config) => refused(name, config, keys, words),
        None => println!("skipped: {name} is not at hand"),
    };
    check("GptOss", json!({"layer_types": ["full_attention"]}), &["`layer_types`", "3 layers"]);
    check("GptOss", json!({"layer_types": ["full_attention", "chunked", "full_attention"]}), &["`layer_types`"]);
    check("GptOss", json!({"swiglu_alpha": 2.0}), &["`swiglu_alpha`", "1.702"]);
    check("GptOss", json!({"num_experts_per_tok": 9}), &["`num_experts_per_tok`"]);
    check("Qwen3_5", json!({"linear_num_value_heads": 3}), &["`linear_num_value_heads`", "linear_num_key_heads"]);
    check(
        "Qwen3_5",
        json!({"rope_parameters": {"partial_rotary_factor": 0.1, "rope_theta": 1e4}}),
        &["partial_rotary_factor"],
    );
    check("Gemma3", json!({"final_logit_softcapping": 30.0}), &["`final_logit_softcapping`", "null"]);
    check("Gemma3", json!({"hidden_activation": "silu"}), &["`hidden_activation`"]);
    check("DeepseekV3", json!({"n_group": 4}), &["`n_group`", "two in a group"]);
    check("DeepseekV3", json!({"num_experts_per_tok": 3}), &["`num_experts_per_tok`"]);
    check("DeepseekV3", json!({"qk_rope_head_dim": 15}), &["`qk_rope_head_dim`", "even"]);
    check("DeepseekV3", json!({"topk_method": "greedy"}), &["`topk_method`"]);
    check("Glm4Moe", json!({"num_key_value_heads": 3}), &["`num_key_value_heads`"]);
    check("MiniMaxM2", json!({"rotary_dim": 20}), &["`rotary_dim`"]);
    check("Phi3", json!({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}), &["longrope"]);
    check("NemotronNas", json!({"block_configs": []}), &["`block_configs`", "4 layers"]);
    let block = json!({"attention": {"n_heads_in_group": 3}, "ffn": {"ffn_mult": 1.0}});
    check("NemotronNas", json!({"block_configs": [block, block, block, block]}), &["n_heads_in_group"]);
    let block = json!({"attention": {"n_heads_in_group": 1, "window_length": 8}, "ffn": {"ffn_mult": 1.0}});
    check("NemotronNas", json!({"block_configs": [block, block, block, block]}), &["window_length"]);
    check("Ministral3", json!({"hidden_act": "gelu"}), &["`hidden_act`"]);
    // A model whose queries grow is not one whose queries don't.
    if let Some(config) = of("Mixtral") {
        let rope = json!({"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, "llama_4_scaling_beta": 0.1});
        refused("Mixtral", config, json!({"rope_parameters": rope}), &["llama_4_scaling_beta"]);
    }
}
