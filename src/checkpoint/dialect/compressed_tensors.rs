//! compressed-tensors' configuration (llm-compressor, vLLM): config groups with targets, weights and activations.

use super::pattern::Pattern;
use super::{Declared, DeclaredActivation, DeclaredWeight, Dialect, Scheme, Target};
use crate::checkpoint::error::{CheckpointError, Result};
use crate::checkpoint::json::Object;
use crate::formats::e8m0::ScaleRule;

/// Reads `quantization_config`.
pub(super) fn read(q: &Object) -> Result<Scheme> {
    for key in ["sparsity_config", "transform_config"] {
        // A transform (a rotation applied at run time) changes what the model computes; an unapplied one is silence.
        let trivial = q.get(key).is_none_or(|v| {
            v.as_object().is_some_and(|m| m.is_empty())
                || v["format"] == "dense"
                || v["config_groups"].as_object().is_some_and(|m| m.is_empty())
        });
        if !trivial {
            return Err(
                q.error(key, "none: Recoup does not apply it, and without it the model computes something else")
            );
        }
    }
    let mut rules = Vec::new();
    for (_, group) in q.objects("config_groups")? {
        let declared = declare(&group)?;
        for target in group.strings("targets")? {
            let target = match target.as_str() {
                "Linear" => Target::AllLinears,
                name => Target::Named(Pattern::compressed_tensors(name, &group, "targets")?),
            };
            rules.push((target, declared));
        }
    }
    if rules.is_empty() {
        return Err(q.error("config_groups", "at least one group with targets"));
    }
    // compressed-tensors looks for an exact name first, then expressions, then the class (match_targets).
    rules.sort_by_key(|(t, _)| matches!(t, Target::Named(Pattern::Regex(_))));
    let mut excluded = Vec::new();
    for text in q.strings("ignore")? {
        excluded.push(Pattern::compressed_tensors(&text, q, "ignore")?);
    }
    let algorithm = q.string("format")?.unwrap_or("unnamed format").to_owned();
    let fp8_kv_cache = fp8_kv_cache(q)?;
    Ok(Scheme { dialect: Dialect::CompressedTensors, algorithm, rules, excluded, fp8_kv_cache })
}

/// Whether `kv_cache_scheme` asks for E4M3 under static per-tensor scales, the only kind there is support for.
pub(super) fn fp8_kv_cache(q: &Object) -> Result<bool> {
    let Some(kv) = q.object("kv_cache_scheme")? else { return Ok(false) };
    let fp8 = kv.integer("num_bits", 1..=64)? == Some(8)
        && kv.string("type")?.is_none_or(|t| t == "float")
        && !kv.bool_or("dynamic", false)?
        && kv.string("strategy")?.is_none_or(|s| s == "tensor");
    if fp8 { Ok(true) } else { Err(q.error("kv_cache_scheme", "8-bit float, static, per tensor")) }
}

fn declare(group: &Object) -> Result<Declared> {
    let weights =
        group.object("weights")?.ok_or_else(|| group.error("weights", "what the weights are quantized to"))?;
    let weight = match (kind(&weights)?, weights.string("strategy")?.unwrap_or("tensor")) {
        ((4, Some(32), true), _) => DeclaredWeight::Mxfp4,
        ((8, Some(32), true), _) => DeclaredWeight::Mxfp8,
        ((4, Some(block @ (16 | 32)), false), _) => DeclaredWeight::Nvfp4 { block },
        ((8, _, false), "tensor" | "channel" | "block") => DeclaredWeight::Fp8,
        _ => return Err(group.error("weights", "NVFP4, MXFP4, MXFP8, or FP8 per tensor, channel or block")),
    };
    if let Some(structure) = weights.get("block_structure")
        && *structure != serde_json::json!([128, 128])
    {
        return Err(weights.error("block_structure", "[128, 128]"));
    }
    let Some(input) = group.object("input_activations")? else {
        return Ok(Declared { weight, activation: DeclaredActivation::Float });
    };
    let dynamic = match input.get("dynamic") {
        None => false,
        Some(v) => v.as_bool().unwrap_or(v == "local"),
    };
    let activation = match (kind(&input)?, input.string("strategy")?.unwrap_or("tensor"), dynamic) {
        ((4, Some(32), true), _, true) => DeclaredActivation::Mxfp4 { rule: ScaleRule::Even },
        ((8, Some(32), true), _, true) => DeclaredActivation::Mxfp8 { rule: ScaleRule::Even },
        ((4, Some(16), false), "tensor_group", _) => DeclaredActivation::Nvfp4,
        ((8, Some(128), false), "group", true) => DeclaredActivation::Fp8Group,
        ((8, None, false), "token", true) => DeclaredActivation::Fp8Token,
        ((8, None, false), "tensor", false) => DeclaredActivation::Fp8Static,
        _ => {
            return Err(group.error(
                "input_activations",
                "NVFP4, MXFP4, MXFP8, or FP8 static per tensor, dynamic per token or dynamic per group of 128",
            ));
        }
    };
    Ok(Declared { weight, activation })
}

/// Bits, group size, and whether scales are powers of two; refuses integers and asymmetric schemes.
fn kind(o: &Object) -> Result<(usize, Option<usize>, bool)> {
    if o.string("type")?.is_some_and(|t| t != "float") {
        return Err(o.error("type", "float"));
    }
    if !o.bool_or("symmetric", true)? {
        return Err(o.error("symmetric", "true"));
    }
    let bits = o.required_integer("num_bits", 1..=16)?;
    let group = o.integer("group_size", 1..=1 << 20)?;
    let mx = match o.string("scale_dtype")? {
        Some("torch.uint8") => true,
        Some("torch.float8_e4m3fn") => false,
        // Older files lack the key: groups of 32 were only ever MX.
        _ => group == Some(32),
    };
    if !matches!(bits, 4 | 8) {
        return Err(CheckpointError::Unknown {
            file: o.file().into(),
            what: "num_bits",
            found: bits.to_string(),
            known: "4 and 8",
        });
    }
    Ok((bits, group, mx))
}
