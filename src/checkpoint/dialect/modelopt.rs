//! NVIDIA ModelOpt's configuration: hf_quant_config.json, or the same inside config.json.

use super::pattern::{Pattern, PatternSet};
use super::{Declared, DeclaredActivation, DeclaredWeight, Dialect, Scheme};
use crate::checkpoint::error::{CheckpointError, Result};
use crate::checkpoint::json::Object;
use crate::formats::e8m0::ScaleRule;

const KNOWN: &str = "NVFP4, W4A16_NVFP4, NVFP4_AWQ, W4A8_NVFP4_FP8, FP8, FP8_PER_CHANNEL_PER_TOKEN, FP8_PB_WO, MXFP8, MXFP4, MIXED_PRECISION";

/// Reads `q`: `quantization_config` of config.json, or the whole of hf_quant_config.json. `other` is the second file
/// where both exist; what one does not say is taken from the other.
pub(super) fn read(q: &Object, other: Option<&Object>) -> Result<Scheme> {
    let inner = |o: &Object| Ok::<_, CheckpointError>(o.object("quantization")?.unwrap_or_else(|| o.clone()));
    let q = inner(q)?;
    let other = other.map(inner).transpose()?;
    let sources: Vec<&Object> = std::iter::once(&q).chain(other.as_ref()).collect();

    let algorithm = first(&sources, |o| o.string("quant_algo").map(|s| s.map(str::to_owned)))?
        .ok_or_else(|| q.error("quant_algo", KNOWN))?;
    for o in &sources {
        if o.string("quant_algo")?.is_some_and(|a| !a.eq_ignore_ascii_case(&algorithm)) {
            let expected = format!("{algorithm}, as {} says; one of the two is of another export", q.file().display());
            return Err(o.error("quant_algo", expected));
        }
    }
    let group = first(&sources, group_size)?;

    let (mut rules, mut targets, mut all_linears) = (Vec::new(), PatternSet::default(), None);
    if algorithm.eq_ignore_ascii_case("MIXED_PRECISION") {
        let holder = sources.iter().find(|o| o.get("quantized_layers").is_some());
        let holder = holder.ok_or_else(|| q.error("quantized_layers", "an object of modules"))?;
        for (module, layer) in holder.objects("quantized_layers")? {
            let algorithm = layer.string("quant_algo")?.ok_or_else(|| layer.error("quant_algo", KNOWN))?.to_owned();
            let group = group_size(&layer)?;
            let declared = declare(&layer, &algorithm, group)?;
            targets.push(Pattern::modelopt(&module, holder, "quantized_layers")?, holder, "quantized_layers")?;
            rules.push(declared);
        }
    } else {
        all_linears = Some(declare(&q, &algorithm, group)?);
    }

    let mut excluded = PatternSet::default();
    for o in &sources {
        for key in ["ignore", "exclude_modules"] {
            for text in o.strings(key)? {
                excluded.push(Pattern::modelopt(&text, o, key)?, o, key)?;
            }
        }
    }
    let mut fp8_kv_cache = false;
    for o in &sources {
        match o.string("kv_cache_quant_algo")? {
            None => {}
            Some(s) if s.eq_ignore_ascii_case("FP8") => fp8_kv_cache = true,
            Some(s) => {
                return Err(CheckpointError::Unknown {
                    file: o.file().into(),
                    what: "kv_cache_quant_algo",
                    found: s.into(),
                    known: "FP8",
                });
            }
        }
        fp8_kv_cache |= super::compressed_tensors::fp8_kv_cache(o)?;
    }
    Ok(Scheme { dialect: Dialect::ModelOpt, algorithm, rules, targets, all_linears, excluded, fp8_kv_cache })
}

fn first<T>(sources: &[&Object], read: impl Fn(&Object) -> Result<Option<T>>) -> Result<Option<T>> {
    for o in sources {
        if let Some(v) = read(o)? {
            return Ok(Some(v));
        }
    }
    Ok(None)
}

/// Elements under one E4M3 block scale, for the algorithms that have any; FP8 and MX files carry the key as well.
fn group_size(o: &Object) -> Result<Option<usize>> {
    o.integer("group_size", 0..=1 << 20)
}

fn declare(q: &Object, algorithm: &str, group: Option<usize>) -> Result<Declared> {
    use DeclaredActivation as A;
    use DeclaredWeight as W;
    let block = |default| match group.unwrap_or(default) {
        block @ (16 | 32) => Ok(block),
        _ => Err(q.error("group_size", "16 or 32")),
    };
    let (weight, activation) = match algorithm.to_ascii_uppercase().as_str() {
        "NVFP4" | "NVFP4_AWQ" => (W::Nvfp4 { block: block(16)? }, A::Nvfp4),
        "W4A16_NVFP4" => (W::Nvfp4 { block: block(16)? }, A::Float),
        "W4A8_NVFP4_FP8" => (W::Nvfp4 { block: block(32)? }, A::Fp8Static),
        "FP8" => (W::Fp8, A::Fp8Static),
        "FP8_PER_CHANNEL_PER_TOKEN" => (W::Fp8, A::Fp8Token),
        "FP8_PB_WO" => (W::Fp8, A::Float),
        "MXFP8" => (W::Mxfp8, A::Mxfp8 { rule: ScaleRule::Ceil }),
        "MXFP4" => (W::Mxfp4, A::Mxfp4 { rule: ScaleRule::Ceil }),
        _ => {
            return Err(CheckpointError::Unknown {
                file: q.file().into(),
                what: "quant_algo",
                found: algorithm.into(),
                known: KNOWN,
            });
        }
    };
    Ok(Declared { weight, activation })
}
