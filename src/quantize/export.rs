//! The configuration files of a quantized checkpoint in each dialect.

use serde_json::{Value, json};

use super::{Recipe, with_quantization};
use crate::checkpoint::dialect::Dialect;
use crate::checkpoint::write::FolderWriter;
use crate::checkpoint::{Checkpoint, Result};
use crate::formats::nvfp4;
use crate::model::ModelConfig;
use crate::model::modules::Module;

/// The version of ModelOpt whose files ours equal: engines look at the producer to tell the dialect.
const MODELOPT_VERSION: &str = "0.47.0";
/// Likewise for compressed-tensors.
const COMPRESSED_TENSORS_VERSION: &str = "0.20.0";

/// Writes config.json, and hf_quant_config.json for ModelOpt.
///
/// # Errors
/// When the folder cannot be written.
pub(super) fn write_configs(
    writer: &FolderWriter,
    source: &Checkpoint,
    config: &ModelConfig,
    recipe: Recipe,
    dialect: Dialect,
) -> Result<()> {
    let mut excluded: Vec<String> =
        config.modules().into_iter().filter(|m: &Module| !m.is_block_linear()).map(|m| m.name).collect();
    // Both tools name the head even where it is tied.
    if config.tied_embeddings {
        excluded.push("lm_head".into());
    }
    excluded.sort();
    let quantization = match dialect {
        Dialect::CompressedTensors => compressed_tensors(recipe, &excluded),
        _ => {
            writer.json("hf_quant_config.json", &hf_quant_config(recipe, &excluded))?;
            modelopt(recipe, &excluded)
        }
    };
    writer.json("config.json", &with_quantization(source.config.value(), quantization))
}

fn producer() -> Value {
    json!({"name": "modelopt", "version": MODELOPT_VERSION, "written_by": concat!("recoup ", env!("CARGO_PKG_VERSION"))})
}

fn algorithm(recipe: Recipe) -> &'static str {
    match recipe {
        Recipe::Nvfp4 => "NVFP4",
        Recipe::Fp8 => "FP8",
    }
}

fn hf_quant_config(recipe: Recipe, excluded: &[String]) -> Value {
    let mut quantization = json!({"quant_algo": algorithm(recipe), "kv_cache_quant_algo": null});
    if recipe == Recipe::Nvfp4 {
        quantization["group_size"] = nvfp4::BLOCK.into();
    }
    quantization["exclude_modules"] = excluded.into();
    json!({"producer": producer(), "quantization": quantization})
}

fn modelopt(recipe: Recipe, excluded: &[String]) -> Value {
    let mut scheme = match recipe {
        Recipe::Nvfp4 => json!({"dynamic": false, "num_bits": 4, "type": "float"}),
        Recipe::Fp8 => json!({"dynamic": false, "num_bits": 8, "type": "float"}),
    };
    if recipe == Recipe::Nvfp4 {
        scheme["group_size"] = nvfp4::BLOCK.into();
    }
    json!({
        "config_groups": {"group_0": {"input_activations": scheme, "weights": scheme, "targets": ["Linear"]}},
        "ignore": excluded,
        "quant_algo": algorithm(recipe),
        "producer": producer(),
        "quant_method": "modelopt",
    })
}

fn compressed_tensors(recipe: Recipe, excluded: &[String]) -> Value {
    let (format, weights, activations) = match recipe {
        Recipe::Nvfp4 => {
            let scheme = |dynamic: Value, observer: &str| {
                json!({"dynamic": dynamic, "group_size": nvfp4::BLOCK, "num_bits": 4, "observer": observer,
                    "scale_dtype": "torch.float8_e4m3fn", "strategy": "tensor_group", "symmetric": true, "type": "float"})
            };
            let activations = scheme("local".into(), "static_minmax");
            ("nvfp4-pack-quantized", scheme(false.into(), "memoryless_minmax"), activations)
        }
        Recipe::Fp8 => {
            let scheme = |observer: &str| {
                json!({"dynamic": false, "group_size": null, "num_bits": 8, "observer": observer,
                    "strategy": "tensor", "symmetric": true, "type": "float"})
            };
            ("float-quantized", scheme("memoryless_minmax"), scheme("static_minmax"))
        }
    };
    // compressed-tensors lists ignored linears only; an embedding is none.
    let ignore: Vec<&String> = excluded.iter().filter(|m| *m != "model.embed_tokens").collect();
    json!({
        "config_groups": {"group_0": {"format": format, "input_activations": activations, "output_activations": null,
            "targets": ["Linear"], "weights": weights}},
        "format": format,
        "ignore": ignore,
        "kv_cache_scheme": null,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "version": COMPRESSED_TENSORS_VERSION,
    })
}
