//! compressed-tensors' configuration (llm-compressor, vLLM): config groups with targets, weights and activations.

use super::pattern::{Pattern, PatternSet};
use super::{Declared, DeclaredActivation, DeclaredWeight, Dialect, Scheme};
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
    let (mut rules, mut targets, mut all_linears) = (Vec::new(), PatternSet::default(), None);
    let groups = q.objects("config_groups")?;
    // compressed-tensors looks for an exact name first, then expressions, then the class (match_targets).
    for expressions in [false, true] {
        for (_, group) in &groups {
            let Some(declared) = declare(group)? else { continue };
            for target in group.strings("targets")? {
                if target == "Linear" {
                    all_linears.get_or_insert(declared);
                } else if target.starts_with("re:") == expressions {
                    targets.push(Pattern::compressed_tensors(&target, group, "targets")?, group, "targets")?;
                    rules.push(declared);
                }
            }
        }
    }
    let mut excluded = PatternSet::default();
    for text in q.strings("ignore")? {
        excluded.push(Pattern::compressed_tensors(&text, q, "ignore")?, q, "ignore")?;
    }
    let nothing = rules.is_empty() && all_linears.is_none();
    let algorithm = match q.string("format")? {
        _ if nothing => "no weights".into(),
        Some(format) => format.to_owned(),
        None => "unnamed format".into(),
    };
    let mut scheme = Scheme::new(Dialect::CompressedTensors, algorithm);
    scheme.fp8_kv_cache = fp8_kv_cache(q)?;
    if nothing && !scheme.fp8_kv_cache {
        scheme.notes.push(format!(
            "{}: `{}` announces neither weights nor a KV cache: the model is read as plain",
            q.file().display(),
            q.path("config_groups")
        ));
        scheme.dialect = Dialect::Plain;
    }
    (scheme.rules, scheme.targets, scheme.all_linears, scheme.excluded) = (rules, targets, all_linears, excluded);
    Ok(scheme)
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

/// What a group announces; nothing where its weights are null, as in a scheme of the KV cache only.
fn declare(group: &Object) -> Result<Option<Declared>> {
    let Some(weights) = group.object("weights")? else {
        return match group.get("input_activations") {
            None => Ok(None),
            Some(_) => Err(group.error("weights", "a format of weights: inputs alone are never quantized")),
        };
    };
    let weight = match (kind(&weights)?, weights.string("strategy")?.unwrap_or("tensor")) {
        ((4, Some(32), true), _) => DeclaredWeight::Mxfp4,
        ((8, Some(32), true), _) => DeclaredWeight::Mxfp8,
        ((4, Some(block @ (16 | 32)), false), _) => DeclaredWeight::Nvfp4 { block },
        ((8, _, false), "tensor" | "channel" | "block") => DeclaredWeight::Fp8,
        _ => return Err(group.error("weights", "NVFP4, MXFP4, MXFP8, or FP8 per tensor, channel or block")),
    };
    if let Some(structure) = weights.get("block_structure")
        && *structure != serde_json::json!([128, 128])
        // Before lists, it was a string.
        && *structure != "128x128"
    {
        return Err(weights.error("block_structure", "[128, 128]"));
    }
    let Some(input) = group.object("input_activations")? else {
        return Ok(Some(Declared { weight, activation: DeclaredActivation::Float }));
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
    Ok(Some(Declared { weight, activation }))
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
