//! The configuration files of a quantized checkpoint in each dialect.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use super::recipe::KvCache;
use super::scheme::Scheme;
use super::with_quantization;
use crate::checkpoint::dialect::Dialect;
use crate::checkpoint::write::FolderWriter;
use crate::checkpoint::{Checkpoint, Result};
use crate::formats::{fp8, mx, nvfp4};
use crate::model::ModelConfig;
use crate::model::modules::Module;

/// The version of ModelOpt whose files ours equal: engines look at the producer to tell the dialect.
const MODELOPT_VERSION: &str = "0.47.0";
/// Likewise for compressed-tensors.
const COMPRESSED_TENSORS_VERSION: &str = "0.20.0";

/// Writes config.json, and hf_quant_config.json for ModelOpt. `assigned`: the blocks' linears and what each became.
///
/// # Errors
/// When the folder cannot be written.
pub(super) fn write_configs(
    writer: &FolderWriter,
    source: &Checkpoint,
    config: &ModelConfig,
    assigned: &[(&Module, Scheme)],
    kv_cache: Option<KvCache>,
    dialect: Dialect,
) -> Result<()> {
    let others = config.modules().into_iter().filter(|m: &Module| !m.is_block_linear()).map(|m| m.name);
    let mut excluded: BTreeSet<String> = others.collect();
    // Both tools name the head even where it is tied.
    excluded.insert("lm_head".into());
    let quantization = match dialect {
        Dialect::CompressedTensors => {
            // compressed-tensors lists ignored linears only; an embedding is none.
            excluded.remove("model.embed_tokens");
            excluded.extend(assigned.iter().filter(|(_, s)| *s == Scheme::None).map(|(m, _)| m.name.clone()));
            compressed_tensors(assigned, kv_cache, &excluded)
        }
        _ => {
            excluded.extend(untouched(assigned));
            writer.json("hf_quant_config.json", &hf_quant_config(assigned, kv_cache, &excluded))?;
            modelopt(assigned, kv_cache, &excluded)
        }
    };
    writer.json("config.json", &with_quantization(source.config.value(), quantization))
}

/// Linears that stay as they are, as ModelOpt names them: `….self_attn*` where no part of an attention is quantized.
fn untouched(assigned: &[(&Module, Scheme)]) -> BTreeSet<String> {
    let parent = |m: &Module| m.name.rsplit_once('.').map_or_else(String::new, |(parent, _)| parent.to_owned());
    let touched: BTreeSet<String> =
        assigned.iter().filter(|(_, s)| *s != Scheme::None).map(|(m, _)| parent(m)).collect();
    let left = assigned.iter().filter(|(_, s)| *s == Scheme::None);
    left.map(|(m, _)| if touched.contains(&parent(m)) { m.name.clone() } else { format!("{}*", parent(m)) }).collect()
}

/// The schemes in use, in the order of their first module.
fn schemes(assigned: &[(&Module, Scheme)]) -> Vec<Scheme> {
    let mut out = Vec::new();
    for (_, scheme) in assigned.iter().filter(|(_, s)| *s != Scheme::None) {
        if !out.contains(scheme) {
            out.push(*scheme);
        }
    }
    out
}

fn producer() -> Value {
    json!({"name": "modelopt", "version": MODELOPT_VERSION, "written_by": concat!("recoup ", env!("CARGO_PKG_VERSION"))})
}

/// `group_size` as ModelOpt states it.
fn group_size(scheme: Scheme) -> Option<usize> {
    match scheme {
        Scheme::Nvfp4 | Scheme::W4a16Nvfp4 => Some(nvfp4::BLOCK),
        Scheme::W4a8Nvfp4Fp8 | Scheme::Mxfp8 => Some(mx::BLOCK),
        _ => None,
    }
}

/// ModelOpt's `quantized_layers` of a mixed checkpoint.
fn quantized_layers(assigned: &[(&Module, Scheme)]) -> Value {
    let entry = |scheme: Scheme| {
        let mut entry = json!({"quant_algo": scheme.modelopt_algorithm()});
        if let Some(size) = group_size(scheme) {
            entry["group_size"] = size.into();
        }
        entry
    };
    let layers = assigned.iter().filter(|(_, s)| *s != Scheme::None).map(|(m, s)| (m.name.clone(), entry(*s)));
    Value::Object(layers.collect::<Map<_, _>>())
}

fn hf_quant_config(assigned: &[(&Module, Scheme)], kv_cache: Option<KvCache>, excluded: &BTreeSet<String>) -> Value {
    let kv = kv_cache.map(|KvCache::Fp8| "FP8");
    let quantization = match schemes(assigned)[..] {
        [scheme] => {
            let mut q = json!({"quant_algo": scheme.modelopt_algorithm(), "kv_cache_quant_algo": kv});
            if let Some(size) = group_size(scheme) {
                q["group_size"] = size.into();
            }
            q["exclude_modules"] = json!(excluded);
            q
        }
        _ => json!({"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": kv,
            "quantized_layers": quantized_layers(assigned)}),
    };
    json!({"producer": producer(), "quantization": quantization})
}

/// A `config_groups` entry in ModelOpt's form, for the formats that it writes one for.
fn modelopt_group(scheme: Scheme, targets: Value) -> Option<Value> {
    let mut format = match scheme {
        Scheme::Nvfp4 | Scheme::W4a16Nvfp4 => json!({"dynamic": false, "num_bits": 4, "type": "float"}),
        Scheme::Fp8 => json!({"dynamic": false, "num_bits": 8, "type": "float"}),
        _ => return None,
    };
    if let Some(size) = group_size(scheme) {
        format["group_size"] = size.into();
    }
    Some(match scheme {
        Scheme::W4a16Nvfp4 => json!({"weights": format, "targets": targets}),
        _ => json!({"input_activations": format, "weights": format, "targets": targets}),
    })
}

fn modelopt(assigned: &[(&Module, Scheme)], kv_cache: Option<KvCache>, excluded: &BTreeSet<String>) -> Value {
    let schemes = schemes(assigned);
    let mut out = Map::new();
    let mut groups = Map::new();
    for scheme in &schemes {
        let targets = if schemes.len() == 1 {
            json!(["Linear"])
        } else {
            json!(assigned.iter().filter(|(_, s)| s == scheme).map(|(m, _)| &m.name).collect::<BTreeSet<_>>())
        };
        if let Some(group) = modelopt_group(*scheme, targets) {
            groups.insert(format!("group_{}", groups.len()), group);
        }
    }
    if !groups.is_empty() {
        out.insert("config_groups".into(), groups.into());
    }
    if let [scheme] = schemes[..] {
        out.insert("ignore".into(), json!(excluded));
        out.insert("quant_algo".into(), json!(scheme.modelopt_algorithm()));
    } else {
        out.insert("quantized_layers".into(), quantized_layers(assigned));
        out.insert("ignore".into(), json!([]));
        out.insert("quant_algo".into(), "MIXED_PRECISION".into());
    }
    if kv_cache.is_some() {
        out.insert("kv_cache_scheme".into(), json!({"dynamic": false, "num_bits": 8, "type": "float"}));
    }
    out.insert("producer".into(), producer());
    out.insert("quant_method".into(), "modelopt".into());
    out.into()
}

/// compressed-tensors' `format` of a scheme, and how it describes weights and inputs.
fn compressed_group(scheme: Scheme) -> (&'static str, Value, Value) {
    let float = |bits: usize, more: Value| {
        let mut out = json!({"num_bits": bits, "symmetric": true, "type": "float"});
        if let (Some(out), Value::Object(more)) = (out.as_object_mut(), more) {
            out.extend(more);
            out.sort_keys();
        }
        out
    };
    let weights = |bits, mut more: Value| {
        more["dynamic"] = false.into();
        more["observer"] = "memoryless_minmax".into();
        float(bits, more)
    };
    let (size, e4m3, uint8) = (nvfp4::BLOCK, "torch.float8_e4m3fn", "torch.uint8");
    let nvfp4 = || weights(4, json!({"group_size": size, "scale_dtype": e4m3, "strategy": "tensor_group"}));
    let mx = |bits, dynamic: bool| {
        let more = json!({"dynamic": dynamic, "group_size": mx::BLOCK, "scale_dtype": uint8, "strategy": "group"});
        if dynamic { float(bits, more) } else { weights(bits, more) }
    };
    let fp8 = |strategy: &str| weights(8, json!({"group_size": null, "strategy": strategy}));
    match scheme {
        Scheme::Nvfp4 => {
            let input = json!({"dynamic": "local", "group_size": size, "observer": "static_minmax",
                "scale_dtype": e4m3, "strategy": "tensor_group"});
            ("nvfp4-pack-quantized", nvfp4(), float(4, input))
        }
        Scheme::W4a16Nvfp4 => ("nvfp4-pack-quantized", nvfp4(), Value::Null),
        Scheme::Fp8PcPt => {
            let input = json!({"dynamic": true, "group_size": null, "strategy": "token"});
            ("float-quantized", fp8("channel"), float(8, input))
        }
        Scheme::Fp8Block => {
            let block = json!({"block_structure": [fp8::BLOCK, fp8::BLOCK], "group_size": null, "strategy": "block"});
            let input = json!({"dynamic": true, "group_size": fp8::BLOCK, "strategy": "group"});
            ("float-quantized", weights(8, block), float(8, input))
        }
        Scheme::Mxfp8 => ("mxfp8-quantized", mx(8, false), mx(8, true)),
        Scheme::Mxfp4 => ("mxfp4-pack-quantized", mx(4, false), mx(4, true)),
        Scheme::Mxfp4a16 => ("mxfp4-pack-quantized", mx(4, false), Value::Null),
        Scheme::Fp8 | Scheme::W4a8Nvfp4Fp8 | Scheme::None => {
            let input =
                json!({"dynamic": false, "group_size": null, "observer": "static_minmax", "strategy": "tensor"});
            ("float-quantized", fp8("tensor"), float(8, input))
        }
    }
}

fn compressed_tensors(assigned: &[(&Module, Scheme)], kv_cache: Option<KvCache>, ignore: &BTreeSet<String>) -> Value {
    let schemes = schemes(assigned);
    let mut groups = Map::new();
    let mut formats = BTreeSet::new();
    for (index, scheme) in schemes.iter().enumerate() {
        let (format, weights, inputs) = compressed_group(*scheme);
        formats.insert(format);
        let targets = if schemes.len() == 1 {
            json!(["Linear"])
        } else {
            json!(assigned.iter().filter(|(_, s)| s == scheme).map(|(m, _)| &m.name).collect::<Vec<_>>())
        };
        let group = json!({"format": format, "input_activations": inputs, "output_activations": null,
            "targets": targets, "weights": weights});
        groups.insert(format!("group_{index}"), group);
    }
    let format = if formats.len() == 1 { formats.first().copied().unwrap_or_default() } else { "mixed-precision" };
    let kv = kv_cache.map(|KvCache::Fp8| {
        json!({"dynamic": false, "group_size": null, "num_bits": 8, "observer": "static_minmax", "strategy": "tensor",
            "symmetric": true, "type": "float"})
    });
    json!({
        "config_groups": groups,
        "format": format,
        "global_compression_ratio": null,
        "ignore": ignore,
        "kv_cache_scheme": kv,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": COMPRESSED_TENSORS_VERSION,
    })
}
